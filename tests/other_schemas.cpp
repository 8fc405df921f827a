// A LibTorch that has operations otherwise than the gates know them. Kernels are registered once a process, and this
// one changes the dispatcher for good: a program of its own.
#include "helpers.hpp"

#include <torch/library.h>
#include <torch/torch.h>
#include <microreg/detail/interceptors.hpp>
#include <microreg/gates/schema.hpp>
#include <microreg/gates/scope.hpp>
#include <microreg/microreg.hpp>

#include <algorithm>
#include <functional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

namespace {

using helpers::has;
using helpers::message_of;
using microreg::detail::find_operation;

// Forms in place that no LibTorch has, of operations of each kind, as a future one might: kernels for the schemas known
// would take one argument for another, or find none.

torch::Tensor smooth(const torch::Tensor& self) { return self.sin() + 1; }

TORCH_LIBRARY_FRAGMENT(aten, library) {
  library.def("amax_(Tensor self, bool keepdim) -> Tensor",
              [](const torch::Tensor& self, bool) { return smooth(self); });
  library.def("isnan_(Tensor self) -> Tensor[]",
              [](const torch::Tensor& self) { return std::vector<torch::Tensor>{smooth(self)}; });
  library.def("sort_(int dim, Tensor self) -> (Tensor, Tensor)",
              [](std::int64_t, const torch::Tensor& self) { return std::tuple(smooth(self), self.detach()); });
  library.def("_to_copy_(Tensor self, Tensor dtype) -> Tensor",
              [](const torch::Tensor& self, const torch::Tensor&) { return smooth(self); });
  library.def("max_pool1d_(int[] kernel_size, Tensor self) -> Tensor",
              [](at::IntArrayRef, const torch::Tensor& self) { return smooth(self); });
  library.def("segment_reduce_(str reduce, Tensor data) -> Tensor",
              [](c10::string_view, const torch::Tensor& self) { return smooth(self); });
}

const std::vector<std::string> defined = {"amax_", "isnan_", "sort_", "_to_copy_", "max_pool1d_", "segment_reduce_"};

/// Renames an argument of an operation that LibTorch has, or gives it another result if that is no argument's name.
void change(const std::string& operation, const std::string& argument) {
  const auto& schema = find_operation("aten::" + operation)->schema();
  auto arguments = schema.arguments();
  auto results = schema.returns();
  bool found = false;
  for (c10::Argument& each : arguments) {
    if (each.name() == argument) {
      each = c10::Argument("other_" + argument, each.type(), each.N(), each.default_value(), each.kwarg_only());
      found = true;
    }
  }
  if (!found) {
    REQUIRE(argument == "result");
    results.emplace_back("", c10::TensorType::get());
  }
  auto& there = const_cast<c10::FunctionSchema&>(schema);  // NOLINT: the dispatcher's own object, which is no constant
  there = c10::FunctionSchema(schema.name(), schema.overload_name(), arguments, results);
}

/// One of each list at least, by what its kernel reads.
const std::vector<std::pair<std::string, std::string>> changed = {
    {"relu", "self"},
    {"clamp", "max"},
    {"aminmax", "result"},
    {"smooth_l1_loss", "beta"},
    {"frac", "self"},
    {"adaptive_max_pool3d", "output_size"},
    {"grid_sampler_2d", "grid"},
    {"_embedding_bag", "mode"},
    {"segment_reduce", "reduce"},
    {"nonzero", "result"},
    {"unique_dim", "result"},
    {"equal", "result"},
    {"sign", "result"},
    {"div.Tensor_mode", "rounding_mode"},
    {"topk", "dim"},
    {"detach", "self"},
    {"_to_copy", "dtype"},
    {"max_pool1d", "ceil_mode"},
    {"poisson", "result"},
    {"log_normal_", "self"},
    {"_standard_gamma", "generator"},
    {"_flash_attention_forward", "dropout_p"},
    {"native_dropout", "train"},
    {"embedding_renorm_", "self"},
    {"rrelu_with_noise", "training"},
    {"batch_norm", "training"},
    {"instance_norm", "use_input_stats"},
    {"layer_norm", "normalized_shape"},
    {"group_norm", "num_groups"},
};

/// Calls an operation as the dispatcher has it; its first result.
torch::Tensor call(const std::string& operation, std::vector<c10::IValue> stack) {
  find_operation("aten::" + operation)->callBoxed(stack);
  return stack[0].isTensorList() ? stack[0].toTensorVector()[0] : stack[0].toTensor();
}

struct Warnings final : c10::WarningHandler {
  std::vector<std::string> messages;
  void process(const c10::Warning& warning) override { messages.push_back(warning.msg()); }
};

/// How often one says that this operation is left to LibTorch.
std::int64_t times(const std::vector<std::string>& messages, const std::string& operation) {
  return std::count_if(messages.begin(), messages.end(), [&](const std::string& message) {
    return message.find(" aten::" + operation + " ") != std::string::npos;
  });
}

torch::Tensor gradient(const std::function<torch::Tensor(const torch::Tensor&)>& forward, const torch::Tensor& weight,
                       const microreg::Estimator& estimator) {
  microreg::FunctionModel model{forward, {weight}};
  const auto loss = [](const torch::Tensor& output, const torch::Tensor& target) {
    return (output - target).pow(2).mean();
  };
  microreg::Regularizer regularizer(model, loss, microreg::GradientNorm{},
                                    {.strength = 0.3, .micro_batch_size = 4, .estimator = estimator});
  auto draw = helpers::generator(1);
  const auto x = torch::rand({8, 3}, draw, torch::kFloat64);
  weight.mutable_grad() = torch::Tensor();
  regularizer.backward(x, x.sum(1, true));
  return weight.grad().clone();
}

}  // namespace

TEST_CASE("operations whose schemas are not as known are left to LibTorch, each said once, and no step throws for it") {
  for (const auto& [operation, argument] : changed) {
    change(operation, argument);
  }
  change("max_pool3d_with_indices_backward", "indices");  // which a replay calls

  Warnings warnings;
  const c10::WarningUtils::WarningHandlerGuard guard(&warnings);
  const auto model = [&](const torch::Tensor& x, const torch::Tensor& w) {
    torch::Tensor h = torch::layer_norm(x.mm(w), {4}).tanh();
    h = torch::batch_norm(h, {}, {}, {}, {}, true, 0.1, 1e-5, false);
    h = call("amax_", {h, true}) + call("isnan_", {h}) + call("sort_", {0, h}) + call("_to_copy_", {h, h.detach()}) +
        call("max_pool1d_", {std::vector<std::int64_t>{2}, h}) + call("segment_reduce_", {"max", h});
    std::ignore = torch::empty({3}).log_normal_();
    std::ignore = h.detach().nonzero();
    return h.sum(1, true);
  };
  const torch::Tensor weight = torch::linspace(-1, 1, 12, torch::kFloat64).view({3, 4}).requires_grad_();
  const auto forward = [&](const torch::Tensor& x) { return model(x, weight); };
  const torch::Tensor exact = gradient(forward, weight, microreg::Exact{});
  CHECK(helpers::relative_error(gradient(forward, weight, microreg::CentralDifference{}), exact) < 1e-6);
  CHECK(helpers::relative_error(gradient(forward, weight, microreg::ForwardDifference{}), exact) < 1e-3);

  for (const std::string& operation : defined) {
    INFO(operation);
    CHECK(times(warnings.messages, operation) == 1);
  }
  for (const auto& [operation, argument] : changed) {
    INFO(operation);
    CHECK(times(warnings.messages, operation) == 1);
  }
  CHECK(times(warnings.messages, "max_pool3d_with_indices") == 1);
  CHECK(times(warnings.messages, "max_pool3d_with_indices_backward") == 1);  // which has a fused rule

  // The others are as known.
  const auto& all = warnings.messages;
  const auto said = std::count_if(all.begin(), all.end(), [](const std::string& message) {
    return message.find("microreg leaves ") != std::string::npos;
  });
  CHECK(said == static_cast<std::int64_t>(defined.size() + changed.size()) + 2);

  // What hides a decision is refused by name then, rather than left free.
  const auto kinked = [&](const torch::Tensor& x) { return x.mm(weight).relu().sum(1, true); };
  CHECK(has(message_of<microreg::GateError>([&] { gradient(kinked, weight, microreg::CentralDifference{}); }),
            {"ReluBackward0", "cannot be frozen", "left to this LibTorch"}));
}

TEST_CASE("a kernel knows a schema by what it reads") {
  const auto knows = [](const char* operation, const char* known) {
    return microreg::detail::gating::is_known(find_operation(std::string("aten::") + operation)->schema(), known);
  };
  CHECK(knows("amax", "Tensor self, int[] dim, bool keepdim"));
  CHECK(knows("amax", "Tensor self, ..."));
  CHECK(knows("amax", "..., bool keepdim, ..."));
  CHECK(knows("amax", "... -> ..."));
  CHECK(knows("amax", "... -> Tensor, ..."));
  CHECK_FALSE(knows("amax", "Tensor self, int[] dim"));
  CHECK_FALSE(knows("amax", "Tensor self, int dim, bool keepdim"));
  CHECK_FALSE(knows("amax", "Tensor self, int[] dims, bool keepdim"));
  CHECK_FALSE(knows("amax", "int[] dim, ..."));
  CHECK_FALSE(knows("amax", "... -> Tensor, Tensor"));
  CHECK_FALSE(knows("amax", ""));
  CHECK(knows("sort", "... -> Tensor, Tensor"));
  CHECK(knows("sort", "... -> Tensor, ..."));
  CHECK_FALSE(knows("sort", "..."));  // one tensor, where nothing is said
  CHECK_FALSE(knows("_foreach_abs_", "... -> Tensor, ..."));
  CHECK(knows("_foreach_abs_", "... -> ..."));
}
