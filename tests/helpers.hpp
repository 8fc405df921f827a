/// @file
/// Small helpers that the tests share: flat gradients, relative errors, messages of errors, and a watch on everything
/// that a failed call must leave alone.
#pragma once

#include "catch.hpp"
#include "on_device.hpp"
#include "stand_in_gpu.hpp"

#include <ATen/SequenceNumber.h>
#include <torch/torch.h>
#include <microreg/detail/libtorch.hpp>
#include <microreg/step/seeded_roots.hpp>

#include <cmath>
#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <thread>
#include <utility>
#include <vector>

namespace helpers {

inline const torch::nn::CrossEntropyLoss cross_entropy{};

inline void clear_grad(const std::vector<torch::Tensor>& parameters) {
  for (const torch::Tensor& parameter : parameters) {
    parameter.mutable_grad() = torch::Tensor();
  }
}

/// All `.grad` fields in one float64 vector; zeros where there is none.
inline torch::Tensor flat_grad(const std::vector<torch::Tensor>& parameters) {
  std::vector<torch::Tensor> parts;
  for (const torch::Tensor& parameter : parameters) {
    const torch::Tensor grad = parameter.grad().defined() ? parameter.grad() : torch::zeros_like(parameter);
    parts.push_back(grad.detach().to(torch::kCPU, torch::kFloat64).flatten());
  }
  return torch::cat(parts);
}

/// The gradient that `step` leaves in the parameters of `model`, where there was none before, as flat_grad() has it.
template <class Step>
torch::Tensor grad_after(const torch::nn::Module& model, const Step& step) {
  clear_grad(model.parameters());
  step();
  return flat_grad(model.parameters());
}

/// All elements of all of them, in one vector.
inline torch::Tensor flat(const std::vector<torch::Tensor>& tensors) {
  std::vector<torch::Tensor> parts;
  for (const torch::Tensor& tensor : tensors) {
    parts.push_back(tensor.flatten());
  }
  return torch::cat(parts);
}

/// What `call` returns on a thread of its own.
inline torch::Tensor in_thread(const std::function<torch::Tensor()>& call) {
  torch::Tensor result;
  std::thread([&] { result = call(); }).join();
  return result;
}

/// Gradients by `parameters` in one float64 vector on the CPU; zeros where one is undefined.
inline torch::Tensor flattened(const std::vector<torch::Tensor>& gradients,
                               const std::vector<torch::Tensor>& parameters) {
  std::vector<torch::Tensor> parts;
  for (std::size_t i = 0; i < parameters.size(); ++i) {
    const torch::Tensor part = gradients[i].defined() ? gradients[i] : torch::zeros_like(parameters[i]);
    parts.push_back(part.detach().to(torch::kCPU, torch::kFloat64).flatten());
  }
  return torch::cat(parts);
}

/// What backward passes on `device` make with a graph comes behind this thread's nodes. LibTorch numbers nodes by
/// thread, and its engine runs those of higher numbers first: on a GPU its own double backward otherwise fails on views
/// that were written to. That the library's does not is a test of test_cuda.cpp.
inline void number_nodes_behind_these(const at::Device& device) {
  const torch::Tensor one = torch::zeros({}, torch::TensorOptions(device)).requires_grad_() * 1;
  one.register_hook([number = at::sequence_number::peek()](const torch::Tensor& /*gradient*/) {
    microreg::detail::number_nodes_from(number);
  });
  one.backward();
}

/// || grad loss ||^2 in float64, with its graph, composed of LibTorch's operations: what penalties are compared with.
inline torch::Tensor squared_norm_by_hand(const torch::Tensor& loss, const std::vector<torch::Tensor>& parameters) {
  number_nodes_behind_these(loss.device());
  torch::Tensor sum = torch::zeros({}, torch::kFloat64);
  for (const torch::Tensor& g : torch::autograd::grad({loss}, parameters, {}, true, true, true)) {
    sum = g.defined() ? sum + (g * g.conj()).sum().to(torch::kFloat64) : sum;
  }
  return sum;
}

/// Its gradient, flat.
inline torch::Tensor penalty_by_hand(const torch::Tensor& loss, const std::vector<torch::Tensor>& parameters) {
  const torch::Tensor value = squared_norm_by_hand(loss, parameters);
  return flattened(value.requires_grad() ? torch::autograd::grad({value}, parameters, {}, false, false, true)
                                         : std::vector<torch::Tensor>(parameters.size()),
                   parameters);
}

/// The gradient of sum of weights[i] * loss[i] + penalty_weights[i] * strength * || grad loss[i] ||^2, by hand.
inline torch::Tensor step_by_hand(const std::vector<torch::Tensor>& losses, const std::vector<double>& weights,
                                  const std::vector<double>& penalty_weights, double strength,
                                  const std::vector<torch::Tensor>& parameters) {
  torch::Tensor sum = torch::zeros({}, torch::kFloat64);
  for (std::size_t i = 0; i < losses.size(); ++i) {
    sum = sum + weights[i] * losses[i] + penalty_weights[i] * strength * squared_norm_by_hand(losses[i], parameters);
  }
  return flattened(torch::autograd::grad({sum}, parameters), parameters);
}

/// Mean of `draw()` over many draws, and its standard error.
template <class Draw>
std::pair<double, double> monte_carlo(int draws, const Draw& draw) {
  double sum = 0, squares = 0;
  for (int i = 0; i < draws; ++i) {
    const double value = draw();
    sum += value;
    squares += value * value;
  }
  const double mean = sum / draws;
  return {mean, std::sqrt((squares / draws - mean * mean) / draws)};
}

/// || a - b || / || b ||, in float64.
inline double relative_error(const torch::Tensor& a, const torch::Tensor& b) {
  const torch::Tensor exact = b.detach().to(torch::kCPU, torch::kFloat64);
  const torch::Tensor other = a.detach().to(torch::kCPU, torch::kFloat64);
  return (other - exact).norm().item<double>() / exact.norm().item<double>();
}

/// Same shape, same type, same bits.
inline bool same_bits(const torch::Tensor& a, const torch::Tensor& b) {
  if (!a.defined() || !b.defined()) {
    return a.defined() == b.defined();
  }
  return a.scalar_type() == b.scalar_type() && a.sizes() == b.sizes() &&
         at::equal(a.flatten().view(torch::kUInt8), b.flatten().view(torch::kUInt8));
}

/// Whether `part` is the slice [begin, begin + length) of `whole`, and a view of it.
inline bool is_view(const torch::Tensor& part, const torch::Tensor& whole, std::int64_t begin, std::int64_t length) {
  return at::equal(part, whole.narrow(0, begin, length)) && part.storage().is_alias_of(whole.storage());
}

/// The message of the `Error` that `call` throws; fails the test if it throws none.
template <class Error, class Call>
std::string message_of(const Call& call) {
  try {
    call();
  } catch (const Error& error) {
    UNSCOPED_INFO(error.what());
    return error.what();
  } catch (const std::exception& error) {
    FAIL("an error of another type was thrown: " << error.what());
  }
  FAIL("no error was thrown");
  return {};
}

/// What `reference()` returns. Nothing where this LibTorch has no derivative to compute it with and 2.13 has: the case
/// is left out then, by name.
template <class Reference>
auto if_differentiable(const std::string& name, const Reference& reference) -> std::optional<decltype(reference())> {
  try {
    return reference();
  } catch (const std::exception& error) {
    const std::string words = error.what();
    if (MICROREG_LIBTORCH >= 213 || words.find("is not implemented") == std::string::npos) {
      throw;
    }
    WARN(name << " is left out: " << words);
    return std::nullopt;
  }
}

/// Whether `text` contains every one of `parts`.
inline bool has(const std::string& text, std::initializer_list<const char*> parts) {
  for (const char* part : parts) {
    if (text.find(part) == std::string::npos) {
      UNSCOPED_INFO("missing \"" << part << "\" in: " << text);
      return false;
    }
  }
  return true;
}

inline std::vector<torch::Tensor> clones(const std::vector<torch::Tensor>& tensors) {
  std::vector<torch::Tensor> result;
  result.reserve(tensors.size());
  for (const torch::Tensor& tensor : tensors) {
    result.push_back(tensor.defined() ? tensor.detach().clone() : tensor);
  }
  return result;
}

/// Remembers parameters, buffers, `.grad`, training mode and the default generator of a module, to tell whether
/// anything has changed since.
class Watch {
 public:
  explicit Watch(const torch::nn::Module& module) : module_(module), state_(read()) {}

  [[nodiscard]] bool unchanged() const {
    const State now = read();
    bool same = true;
    const auto compare = [&](const auto& before, const auto& after, const char* what) {
      for (std::size_t i = 0; i < before.size(); ++i) {
        if (!same_bits(before[i], after[i])) {
          UNSCOPED_INFO("changed: " << what << " " << i);
          same = false;
        }
      }
    };
    compare(state_.parameters, now.parameters, "parameter");
    compare(state_.buffers, now.buffers, "buffer");
    compare(state_.grads, now.grads, "grad of parameter");
    compare(state_.random, now.random, "default generator");
    return same && state_.training == now.training;
  }

 private:
  struct State {
    std::vector<torch::Tensor> parameters, buffers, grads, random;
    std::vector<bool> training;
  };

  [[nodiscard]] State read() const {
    State state;
    state.parameters = clones(module_.parameters());
    state.buffers = clones(module_.buffers());
    for (const torch::Tensor& parameter : module_.parameters()) {
      state.grads.push_back(parameter.grad().defined() ? parameter.grad().clone() : torch::Tensor());
    }
    state.random.push_back(at::globalContext().defaultGenerator(test_device()).get_state());
    for (const auto& submodule : module_.modules()) {
      state.training.push_back(submodule->is_training());
    }
    return state;
  }

  const torch::nn::Module& module_;
  State state_;
};

}  // namespace helpers
