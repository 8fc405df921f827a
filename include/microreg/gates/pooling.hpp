/// @file
/// Max pooling, adaptive and fractional max pooling: the elements that the first pass took. The one-dimensional forms
/// are two-dimensional ones to LibTorch.
#pragma once

#include <ATen/ATen.h>
#include <torch/csrc/autograd/custom_function.h>
#include <microreg/gates/rule.hpp>

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

namespace microreg::detail {

/// `self` at flat positions within its last dimensions, in the memory layout of the positions.
inline at::Tensor gather_flat(const at::Tensor& self, const at::Tensor& indices, std::int64_t dimensions) {
  const at::MemoryFormat format = indices.suggest_memory_format();
  at::Tensor result = at::empty(indices.sizes(), self.options(), format);
  const auto flat = [&](const at::Tensor& tensor) {
    return format == at::MemoryFormat::Contiguous ? tensor.flatten(-dimensions) : tensor.movedim(1, -1).flatten(1, -2);
  };
  at::Tensor there = flat(result);
  at::gather_out(there, flat(self), format == at::MemoryFormat::Contiguous ? -1 : 1, flat(indices));
  return result;
}

/// Max pooling at given indices, whose gradient is LibTorch's.
struct ReplayPooling : torch::autograd::Function<ReplayPooling> {
  static at::Tensor forward(torch::autograd::AutogradContext* context, const at::Tensor& self,
                            const at::Tensor& indices, const std::string& operation,
                            std::vector<c10::IValue> arguments) {
    context->save_for_backward({self, indices});
    context->saved_data["operation"] = operation;
    context->saved_data["arguments"] = c10::ivalue::Tuple::create(std::move(arguments));
    return gather_flat(self, indices, operation.find("3d") == std::string::npos ? 2 : 3);
  }
  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* context,
                                                 torch::autograd::variable_list upstream) {
    const auto saved = context->get_saved_variables();
    const auto backward = c10::Dispatcher::singleton().findSchemaOrThrow(
        ("aten::" + context->saved_data["operation"].toStringRef() + "_backward").c_str(), "");
    // (upstream, self, as many of the forward's further arguments as it takes, indices)
    torch::jit::Stack stack{upstream[0], saved[0]};
    const auto arguments = context->saved_data["arguments"].toTuple();
    const auto further = static_cast<std::ptrdiff_t>(backward.schema().arguments().size()) - 3;
    stack.insert(stack.end(), arguments->elements().begin() + 1, arguments->elements().begin() + 1 + further);
    stack.emplace_back(saved[1]);
    backward.callBoxed(stack);
    return {stack.front().toTensor(), at::Tensor(), at::Tensor(), at::Tensor()};
  }
};

inline Gates gates_of_pooling(const Arguments& /*in*/, const std::vector<c10::IValue>& results) {
  return {results[1].toTensor()};
}
inline Tensors replay_pooling(const Arguments& in, const Gates& gates) {
  std::vector<c10::IValue> arguments = in.values();
  arguments.front() = c10::IValue();  // autograd keeps it
  return {ReplayPooling::apply(in.tensor(0), gates[0], std::string(in.operation()), std::move(arguments)), gates[0]};
}

inline constexpr Rule poolings[] = {
    {"max_pool2d_with_indices",
     "Tensor self, int[] kernel_size, int[] stride, int[] padding, int[] dilation, bool ceil_mode", nullptr,
     gates_of_pooling, replay_pooling},
    {"max_pool3d_with_indices",
     "Tensor self, int[] kernel_size, int[] stride, int[] padding, int[] dilation, bool ceil_mode", nullptr,
     gates_of_pooling, replay_pooling},
    {"adaptive_max_pool2d", "Tensor self, int[] output_size", nullptr, gates_of_pooling, replay_pooling},
    {"adaptive_max_pool3d", "Tensor self, int[] output_size", nullptr, gates_of_pooling, replay_pooling},
    {"fractional_max_pool2d", "Tensor self, int[] kernel_size, int[] output_size, Tensor random_samples", nullptr,
     gates_of_pooling, replay_pooling},
    {"fractional_max_pool3d", "Tensor self, int[] kernel_size, int[] output_size, Tensor random_samples", nullptr,
     gates_of_pooling, replay_pooling},
};

/// Without a gradient LibTorch's max_pool1d takes a way without indices: here it takes the other, so that every call
/// has its gate.
inline void max_pool1d(Call& call) {
  const Arguments& in = call.in;
  call.give({std::get<0>(at::max_pool1d_with_indices(in.tensor(0), in.integers(1), in.integers(2), in.integers(3),
                                                     in.integers(4), in.flag(5)))});
}

}  // namespace microreg::detail
