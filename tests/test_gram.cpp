// Wide linear layers and few samples: the second derivative through Gram matrices is the one without them.
#include "helpers.hpp"

#include <ATen/record_function.h>
#include <microreg/microreg.hpp>
#include <microreg/step/call_watch.hpp>
#include <microreg/step/gram.hpp>

#include <cstdint>
#include <optional>
#include <string_view>
#include <utility>
#include <vector>

using namespace helpers;
using microreg::detail::gram_factors;

namespace {

/// Three layers, the middle one wide. `Multiplied` by one, a weight's gradient is no longer a product, and takes the
/// other way to the same numbers.
struct WideImpl : torch::nn::Module {
  enum class Weights { as_they_are, multiplied, tied };

  explicit WideImpl(Weights how = Weights::as_they_are) : weights(how) {
    register_module("first", first);
    register_module("middle", middle);
    register_module("last", last);
    to(torch::kFloat64);
  }
  torch::Tensor apply(const torch::nn::Linear& layer, const torch::Tensor& x) const {
    return torch::linear(x, weights == Weights::multiplied ? layer->weight * 1.0 : layer->weight, layer->bias);
  }
  torch::Tensor forward(const torch::Tensor& x) {
    torch::Tensor h = torch::tanh(apply(middle, torch::tanh(apply(first, x))));
    h = weights == Weights::tied ? torch::tanh(apply(middle, h)) : h;
    return apply(last, h);
  }

  Weights weights;
  torch::nn::Linear first{6, 150};
  torch::nn::Linear middle{150, 150};
  torch::nn::Linear last{150, 5};
};
TORCH_MODULE(Wide);

Wide wide(WideImpl::Weights how = WideImpl::Weights::as_they_are) {
  torch::manual_seed(1);
  return Wide(how);
}

struct Gradients {
  std::vector<torch::Tensor> of_parameters;
  std::optional<microreg::detail::GramFactors> middle;
};

Gradients gradients(Wide& model, std::int64_t samples, torch::ScalarType type = torch::kFloat64) {
  model->to(type);
  torch::manual_seed(2);
  const torch::Tensor loss =
      torch::cross_entropy_loss(model->forward(torch::randn({samples, 6}, type)), torch::randint(5, {samples}));
  Gradients result{torch::autograd::grad({loss}, model->parameters(), {}, true, true), {}};
  result.middle = gram_factors(result.of_parameters[2]);
  return result;
}

torch::Tensor step(Wide model, const microreg::AnyPenalty<>& penalty, std::int64_t samples = 9, bool fused = true) {
  torch::manual_seed(3);
  const torch::Tensor input = torch::randn({samples, 6}, torch::kFloat64);
  const torch::Tensor target = torch::randint(5, {samples});
  clear_grad(model->parameters());
  microreg::Regularizer regularizer(
      model, cross_entropy, penalty,
      {.strength = 0.7, .micro_batch_size = 4, .generator = generator(4), .fused = fused});
  (void)regularizer.backward(input, target);
  return flat_grad(model->parameters());
}

/// Counts the matrix products on this thread whose result is n x n.
class SquareProducts final : public microreg::detail::CallWatch<SquareProducts> {
 public:
  explicit SquareProducts(std::int64_t n) : CallWatch(true), n_(n) {}
  [[nodiscard]] int count() const { return count_; }

 private:
  friend class CallWatch<SquareProducts>;
  void note(const at::RecordFunction& function) {
    if (std::string_view(function.name()) == "aten::mm") {
      const auto operands = function.inputs();
      if (operands.size() != 2) {
        return;  // the same into a tensor that is given
      }
      count_ += operands[0].toTensor().size(0) == n_ && operands[1].toTensor().size(1) == n_ ? 1 : 0;
    }
  }

  std::int64_t n_;
  int count_ = 0;
};

}  // namespace

TEST_CASE("a gradient's factors are those that it is the product of", "[gram]") {
  Wide model = wide();
  const Gradients all = gradients(model, 4);
  REQUIRE(all.middle.has_value());
  CHECK(relative_error(all.middle->left.mm(all.middle->right), all.of_parameters[2]) < 1e-14);
  CHECK(all.middle->right.size(0) == 4);

  // Their seeds are the derivatives of half the squared norm.
  const torch::Tensor left = all.middle->left.detach().requires_grad_();
  const torch::Tensor right = all.middle->right.detach().requires_grad_();
  const auto by_hand = torch::autograd::grad({0.5 * left.mm(right).square().sum()}, {left, right});
  const auto seeds = all.middle->seeds();
  CHECK(relative_error(seeds[0], by_hand[0]) < 1e-13);
  CHECK(relative_error(seeds[1], by_hand[1]) < 1e-13);
}

TEST_CASE("where a gradient is no such product, or it would gain nothing, there are no factors", "[gram]") {
  Wide model = wide();
  CHECK_FALSE(gram_factors(gradients(model, 4).of_parameters[0]).has_value());  // small, and its input is data
  CHECK_FALSE(gradients(model, 38).middle.has_value());                         // 2 * 38 * 300 > 150 * 150
  CHECK(gradients(model, 37).middle.has_value());
  CHECK(gradients(model, 4, torch::kFloat32).middle.has_value());
  CHECK_FALSE(gradients(model, 4, torch::kBFloat16).middle.has_value());

  Wide multiplied = wide(WideImpl::Weights::multiplied);
  CHECK_FALSE(gradients(multiplied, 4).middle.has_value());
  Wide tied = wide(WideImpl::Weights::tied);
  CHECK_FALSE(gradients(tied, 4).middle.has_value());

  Gradients written = gradients(model, 4, torch::kFloat64);
  {
    const torch::NoGradGuard no_grad;
    written.of_parameters[2].mul_(2);
  }
  CHECK_FALSE(gram_factors(written.of_parameters[2]).has_value());
}

TEST_CASE("a hook on a weight, or between, is part of the penalty", "[gram]") {
  Wide model = wide();
  model->middle->weight.register_hook([](const torch::Tensor& g) { return g * g.norm(); });
  CHECK_FALSE(gradients(model, 4).middle.has_value());

  Wide watched = wide();
  Gradients all = gradients(watched, 4);
  all.of_parameters[2].register_hook([](const torch::Tensor& g) { return 2 * g; });
  CHECK_FALSE(gram_factors(all.of_parameters[2]).has_value());
}

TEST_CASE("a step of every penalty is the same without Gram matrices", "[gram]") {
  using microreg::AnyPenalty;
  const std::vector<std::pair<const char*, AnyPenalty<>>> penalties{
      {"gradient norm", microreg::GradientNorm{}},       {"Fisher trace", microreg::FisherTrace{}},
      {"average Jacobian", microreg::AverageJacobian{}}, {"unit Jacobian", microreg::UnitJacobian{}},
      {"input Jacobian", microreg::InputJacobian{}},     {"unsquared", microreg::Unsquared(microreg::GradientNorm{})}};
  for (const auto& [name, penalty] : penalties) {
    INFO(name);
    const torch::Tensor reference = step(wide(WideImpl::Weights::multiplied), penalty);
    CHECK(relative_error(step(wide(), penalty), reference) < 1e-12);
  }
}

TEST_CASE("a step takes the two Gram matrices of the wide layer, unless it is LibTorch's own", "[gram]") {
  const auto gram_matrices = [](std::int64_t samples, bool fused) {
    const SquareProducts products(samples);
    (void)step(wide(), microreg::GradientNorm{}, samples, fused);
    return products.count();
  };
  CHECK(gram_matrices(4, true) == 2);
  CHECK(gram_matrices(4, false) == 0);
}

TEST_CASE("a step through Gram matrices is double backward by hand", "[gram]") {
  for (const auto how : {WideImpl::Weights::as_they_are, WideImpl::Weights::tied}) {
    Wide model = wide(how);
    torch::manual_seed(3);
    const torch::Tensor input = torch::randn({4, 6}, torch::kFloat64);
    const torch::Tensor target = torch::randint(5, {4});
    const auto parameters = model->parameters();
    const torch::Tensor loss = torch::cross_entropy_loss(model->forward(input), target);
    const torch::Tensor plain = flattened(torch::autograd::grad({loss}, parameters, {}, true), parameters);
    const torch::Tensor expected = plain + 0.7 * penalty_by_hand(loss, parameters);
    CHECK(relative_error(step(model, microreg::GradientNorm{}, 4), expected) < 1e-13);
  }
}
