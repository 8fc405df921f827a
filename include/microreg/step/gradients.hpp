/// @file
/// Gradients by LibTorch, and what to say where there is none.
#pragma once

#include <ATen/ATen.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <c10/util/Exception.h>
#include <torch/csrc/autograd/autograd.h>
#include <microreg/detail/config.hpp>
#include <microreg/detail/text.hpp>
#include <microreg/error.hpp>
#include <microreg/step/second_derivatives.hpp>
#include <microreg/step/seeded_roots.hpp>

#include <algorithm>
#include <exception>
#include <iterator>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace microreg::inline MICROREG_ABI::detail {

/// An operation has no derivative where one is needed. Known by what LibTorch, and libraries of operations, say then.
class MissingDerivative : public ModelError {
 public:
  MissingDerivative(const std::string& message, std::string operation)
      : ModelError(message), operation_(std::move(operation)) {}
  /// LibTorch's sentence, which names the operation.
  [[nodiscard]] const std::string& operation() const noexcept { return operation_; }

 private:
  std::string operation_;
};

/// A gradient that is no dense tensor.
class SparseGradient : public ModelError {
 public:
  explicit SparseGradient(const at::Tensor& parameter)
      : ModelError(text({"the gradient of a parameter of shape ", parameter.sizes(),
                         " is sparse; construct the Embedding or EmbeddingBag with .sparse(false)"})),
        parameter_(parameter) {}
  [[nodiscard]] const at::Tensor& parameter() const noexcept { return parameter_; }

 private:
  at::Tensor parameter_;
};

/// What to do about an operation without a derivative, by LibTorch's sentence about it.
inline std::string remedy_of_missing(std::string_view sentence, bool second) {
  const auto has = [&](const char* part) { return sentence.find(part) != std::string_view::npos; };
  std::string remedy = second ? "replace this operation by differentiable ones, or choose an estimator that needs "
                                "first derivatives only, ForwardDifference"
                              : "replace this operation by differentiable ones";
  if (has("scaled_dot_product") || has("attention")) {
    remedy =
        "only the math kernel of scaled_dot_product_attention can be differentiated twice: call "
        "at::globalContext().setSDPUseFlash(false), setSDPUseMemEfficient(false) and setSDPUseCuDNN(false) once";
  } else if (has("cudnn_rnn") || has("CuDNN")) {
    remedy =
        "cuDNN's recurrent networks cannot be differentiated twice: call "
        "at::globalContext().setUserEnabledCuDNN(false) "
        "around the step";
  } else if (second && (has("ctc_loss") || has("embedding_bag") || has("cdist"))) {
    remedy = has("ctc_loss")        ? "choose ForwardDifference, which needs first derivatives only"
             : has("embedding_bag") ? "use an Embedding and a mean or sum over it, or ForwardDifference"
                                    : "write (a - b).square().sum(-1) of unsqueezed operands, or ForwardDifference";
  }
  return remedy;
}

/// LibTorch's sentence without the backtrace behind it.
inline std::string sentence_of(const std::exception& error) {
  const std::string message = error.what();
  return message.substr(0, message.find('\n'));
}

/// Rethrows the error that is being handled: as MissingDerivative, with what can be done, if it says that there is no
/// derivative, and as it is otherwise. `second`: a second derivative was asked for, so that first ones exist.
[[noreturn]] inline void rethrow_with_remedy(const std::exception& error, std::string_view what, bool second,
                                             bool with_graph) {
  const std::string sentence = sentence_of(error);
  const auto has = [&](const char* part) { return sentence.find(part) != std::string::npos; };
  if (has("backward through the graph a second time")) {
    throw ModelError(text({what,
                           " depends on a graph that an earlier backward pass has freed: something with a graph is "
                           "kept from one pass to the next (a state, an average, weights made once outside of "
                           "forward()); keep it detached, or make it in each pass"}));
  }
  // The backward pass of a function writes to tensors of its own (CrossMapLRN2d), which a graph cannot see.
  second = second || (with_graph && has("functions with out="));
  const bool missing = (second && has("functions with out=")) || (has("derivative") && has("not implemented")) ||
                       has("not differentiable") || has("differentiate twice") || has("once_differentiable") ||
                       ((has("ouble backward") || has("ouble-backward") || has("econd derivative")) &&
                        (has("not support") || has("n't support") || has("not implemented") || has("unsupported")));
  if (!missing || dynamic_cast<const Error*>(&error) != nullptr ||
      dynamic_cast<const c10::OutOfMemoryError*>(&error) != nullptr) {
    throw;  // Not about differentiability: the original error says it best.
  }
  throw MissingDerivative(text({what, " needs a ", second ? "second " : "", "derivative that ",
                                second ? "LibTorch does not have: " : "is not there: ", sentence, "; ",
                                remedy_of_missing(sentence, second)}),
                          sentence);
}

/// d(sum of <outputs, seeds>)/d(inputs); undefined where an input does not take part. `second`: the outputs are
/// themselves functions of gradients.
inline std::vector<at::Tensor> gradients(const std::vector<at::Tensor>& outputs, const std::vector<at::Tensor>& inputs,
                                         const std::vector<at::Tensor>& seeds, bool retain_graph, bool create_graph,
                                         std::string_view what, bool second = false) {
  // In the types that the graph was made in, also where the user's Autocast is around the whole step.
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  std::optional<SecondDerivatives> watched;
  if (create_graph) {
    watched.emplace(outputs, what);
  }
  std::vector<at::Tensor> starts = outputs;
  std::vector<at::Tensor> start_seeds = seeds;
  const bool elsewhere = create_graph && !outputs.front().is_cpu();  // another thread makes the nodes
  if (elsewhere) {
    SeededRoots roots;
    roots.add(outputs, [&] {
      std::vector<at::Tensor> ones;
      std::transform(outputs.begin(), outputs.end(), std::back_inserter(ones),
                     [](const at::Tensor& output) { return at::ones_like(output.detach()); });
      return seeds.empty() ? ones : seeds;
    });
    starts = {roots.taken()};
    start_seeds = {starts.front().detach()};
  }
  std::vector<at::Tensor> result;
  try {
    result = torch::autograd::grad(starts, inputs, start_seeds, retain_graph, create_graph, /*allow_unused=*/true);
  } catch (const std::exception& error) {
    rethrow_with_remedy(error, what, second, create_graph);
  }
  if (elsewhere) {
    number_nodes_behind(result);
  }
  if (watched.has_value()) {
    watched->require_graphs();
  }
  for (std::size_t i = 0; i < result.size(); ++i) {
    if (result[i].defined() && result[i].layout() != at::kStrided) {
      throw SparseGradient(inputs[i]);
    }
  }
  return result;
}

}  // namespace microreg::inline MICROREG_ABI::detail
