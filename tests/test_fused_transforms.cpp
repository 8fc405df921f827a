// FusedScope under functorch transforms and under forward mode: while they are at work, the result is LibTorch's own.
#include "fused_helpers.hpp"

#include <ATen/functorch/DynamicLayer.h>
#include <ATen/functorch/TensorWrapper.h>

using namespace helpers;

namespace {

namespace functorch = at::functorch;

/// A transform around the code below it, as torch.func.vmap and torch.func.grad push it.
class Level {
 public:
  static Level vmap(std::int64_t batch) {
    return Level(functorch::initAndPushDynamicLayer(functorch::TransformType::Vmap, c10::SymInt(batch),
                                                    functorch::RandomnessType::Same));
  }
  static Level grad() {
    return Level(functorch::initAndPushDynamicLayer(functorch::TransformType::Grad, std::nullopt, std::nullopt,
                                                    /*prev_grad_mode=*/true));
  }
  Level(const Level&) = delete;
  Level& operator=(const Level&) = delete;
  ~Level() { functorch::popDynamicLayerAndDeleteMetadata(); }

  [[nodiscard]] std::int64_t number() const { return number_; }

 private:
  explicit Level(std::int64_t number) : number_(number) {}
  std::int64_t number_;
};

struct DualLevel {
  const std::int64_t number = static_cast<std::int64_t>(torch::autograd::forward_ad::enter_dual_level());
  ~DualLevel() { torch::autograd::forward_ad::exit_dual_level(static_cast<std::uint64_t>(number)); }
};

struct Operation {
  std::string name;
  std::vector<torch::Tensor> inputs;
  Function function;
};

std::vector<Operation> operations() {
  torch::manual_seed(3);
  const auto leaf = [](std::initializer_list<std::int64_t> shape) {
    return torch::randn(shape, torch::kFloat64).requires_grad_();
  };
  return {
      {"convolution",
       {leaf({2, 3, 5, 5}), leaf({4, 3, 3, 3})},
       [](const auto& in) { return torch::conv2d(in[0], in[1]); }},
      {"batch normalisation",
       {leaf({4, 3, 2, 2}), leaf({3}), leaf({3})},
       [](const auto& in) { return torch::batch_norm(in[0], in[1], in[2], {}, {}, true, 0.1, 1e-5, false); }},
      {"layer normalisation",
       {leaf({4, 7}), leaf({7}), leaf({7})},
       [](const auto& in) { return torch::layer_norm(in[0], {7}, in[1], in[2]); }},
      {"group normalisation",
       {leaf({4, 6, 3}), leaf({6}), leaf({6})},
       [](const auto& in) { return torch::group_norm(in[0], 2, in[1], in[2]); }},
      {"GELU", {leaf({4, 7})}, [](const auto& in) { return torch::gelu(in[0]); }},
      {"softmax", {leaf({4, 7})}, [](const auto& in) { return torch::softmax(in[0], -1); }},
  };
}

std::vector<torch::Tensor> defined(std::vector<torch::Tensor> tensors) {
  std::erase_if(tensors, [](const torch::Tensor& tensor) { return !tensor.defined(); });
  return tensors;
}

struct Outcome {
  std::vector<torch::Tensor> tensors;
  std::string error;  // of LibTorch
};

/// The largest difference between what `compute` gives inside and outside a scope, relative to the latter. Where
/// LibTorch fails (some operations have no forward mode) there is nothing to compare with.
template <class Compute>
double scope_error(const Compute& compute) {
  const auto run = [&](bool fused) -> Outcome {
    const microreg::FusedScope scope(fused);
    try {
      return {compute(), ""};
    } catch (const c10::Error& error) {
      return {{}, error.what_without_backtrace()};
    }
  };
  const Outcome fused = run(true);
  const Outcome stock = run(false);
  UNSCOPED_INFO("inside: " << fused.error);
  UNSCOPED_INFO("outside: " << stock.error);
  double worst = fused.error.empty() || !stock.error.empty() ? 0 : 1;
  for (std::size_t i = 0; i < std::min(fused.tensors.size(), stock.tensors.size()); ++i) {
    worst = std::max(worst, relative_error(fused.tensors[i], stock.tensors[i]));
  }
  return worst;
}

}  // namespace

TEST_CASE("under vmap over the incoming gradients a scope gives LibTorch's result", "[fused]") {
  for (const Operation& operation : operations()) {
    INFO(operation.name);
    CHECK(scope_error([&] {
            const torch::Tensor y = operation.function(operation.inputs).sin();
            torch::manual_seed(4);
            std::vector<std::int64_t> shape = y.sizes().vec();
            shape.insert(shape.begin(), 3);
            const torch::Tensor directions = torch::randn(shape, torch::kFloat64);
            std::vector<torch::Tensor> first;
            {
              const Level level = Level::vmap(3);
              const torch::Tensor direction = at::_add_batch_dim(directions, 0, level.number());
              for (const torch::Tensor& part :
                   torch::autograd::grad({y}, operation.inputs, {direction}, /*retain_graph=*/true,
                                         /*create_graph=*/true)) {
                first.push_back(at::_remove_batch_dim(part, level.number(), 3, 0));
              }
            }
            torch::Tensor sum = torch::zeros({}, torch::kFloat64);
            for (const torch::Tensor& part : first) {
              sum = sum + part.pow(3).sum();
            }
            return defined(torch::autograd::grad({sum}, operation.inputs, {}, true, false, /*allow_unused=*/true));
          }) < 1e-12);
  }
}

TEST_CASE("under a gradient transform a scope gives LibTorch's result", "[fused]") {
  for (const Operation& operation : operations()) {
    INFO(operation.name);
    CHECK(scope_error([&] {
            std::vector<torch::Tensor> inputs = clones(operation.inputs);
            const Level level = Level::grad();
            for (torch::Tensor& input : inputs) {
              input = functorch::makeTensorWrapper(input, level.number()).requires_grad_();
            }
            auto second = defined(second_derivatives(operation.function, inputs, false).second);
            for (torch::Tensor& part : second) {
              part = functorch::maybeGetTensorWrapper(part)->value();
            }
            return second;
          }) < 1e-12);
  }
}

TEST_CASE("tensors that a transform has not wrapped get LibTorch's result too", "[fused]") {
  for (const Operation& operation : operations()) {
    INFO(operation.name);
    CHECK(scope_error([&] {
            const Level level = Level::vmap(3);
            return defined(second_derivatives(operation.function, operation.inputs, false).second);
          }) < 1e-12);
  }
}

TEST_CASE("with a forward-mode tangent on any input a scope gives LibTorch's result", "[fused]") {
  for (const Operation& operation : operations()) {
    for (std::size_t i = 0; i < operation.inputs.size(); ++i) {
      for (const bool linear : {true, false}) {
        INFO(operation.name << ", tangent on input " << i << ", " << (linear ? "linear" : "sine") << " loss");
        CHECK(scope_error([&] {
                const DualLevel level;
                std::vector<torch::Tensor> inputs = operation.inputs;
                torch::manual_seed(4);
                inputs[i] = at::_make_dual(inputs[i], torch::randn_like(inputs[i]), level.number);
                const torch::Tensor y = operation.function(inputs);
                const torch::Tensor loss = ((linear ? y : y.sin()) * torch::randn_like(y)).sum();
                std::vector<torch::Tensor> tangents;
                for (const torch::Tensor& gradient : torch::autograd::grad({loss}, inputs, {}, true, true)) {
                  tangents.push_back(std::get<1>(at::_unpack_dual(gradient, level.number)));
                }
                return clones(defined(tangents));
              }) < 1e-12);
      }
    }
  }
}
