/// @file
/// One operation with gates against LibTorch's own at the recorded point and against a formula written by hand at
/// another.
#pragma once

#include "helpers.hpp"

#include <microreg/gates/scope.hpp>

#include <functional>
#include <limits>
#include <string>
#include <vector>

namespace helpers {

using Tensors = std::vector<torch::Tensor>;

struct GateCase {
  std::string name;             // as an error message says it
  std::vector<Tensors> points;  // two: where the gates are recorded, where they are replayed
  std::function<torch::Tensor(const Tensors&)> operation;
  std::function<torch::Tensor(const Tensors&, const Tensors&)> by_hand;  // with the pieces of the first, at the second
};

struct Evaluation {
  torch::Tensor value;
  Tensors gradients;
};

inline Tensors leaves(const Tensors& values) {
  Tensors result;
  for (const torch::Tensor& value : values) {
    result.push_back(value.detach().clone().requires_grad_(value.is_floating_point()));
  }
  return result;
}

/// The value, and the gradients of a fixed random combination of its elements.
inline Evaluation evaluate(const std::function<torch::Tensor(const Tensors&)>& function, const Tensors& at) {
  const Tensors inputs = leaves(at);
  const torch::Tensor value = function(inputs);
  auto draw = generator(3);
  const torch::Tensor weights = torch::rand(value.sizes(), draw, value.options()) + 0.5;
  const Tensors gradients = torch::autograd::grad({(value * weights).sum()}, inputs, {}, false, false, true);
  return {value.variable_data(), gradients};  // not recorded, as detach() is
}

/// The largest difference in units of the type's last place, relative to the larger of one and the exact element.
inline double places(const torch::Tensor& a, const torch::Tensor& b) {
  if (!a.defined() || !b.defined()) {
    const torch::Tensor& other = a.defined() ? a : b;
    return other.defined() ? other.abs().max().item<double>() * 1e30 : 0.0;  // undefined is zero
  }
  if (a.sizes() != b.sizes() || a.scalar_type() != b.scalar_type()) {
    return std::numeric_limits<double>::infinity();
  }
  if (a.numel() == 0) {
    return 0;
  }
  const double epsilon = a.scalar_type() == torch::kFloat64   ? std::numeric_limits<double>::epsilon()
                         : a.scalar_type() == torch::kFloat32 ? std::numeric_limits<float>::epsilon()
                         : a.scalar_type() == torch::kHalf    ? 0x1p-10
                                                              : 0x1p-7;
  const torch::Tensor exact = b.to(torch::kFloat64);
  return ((a.to(torch::kFloat64) - exact).abs() / exact.abs().clamp_min(1)).max().item<double>() / epsilon;
}

inline double places(const Evaluation& a, const Evaluation& b) {
  double worst = places(a.value, b.value);
  for (std::size_t i = 0; i < b.gradients.size(); ++i) {
    worst = std::max(worst, places(a.gradients[i], b.gradients[i]));
  }
  return worst;
}

/// All that is asked of one operation. `bound` in units in the last place.
inline void check_gates(const GateCase& test, double bound = 2) {
  INFO(test.name);
  const Tensors& first = test.points[0];
  const Tensors& second = test.points[1];
  const Evaluation stock = evaluate(test.operation, first);

  microreg::GateTape tape;
  const Evaluation recorded = [&] {
    const microreg::RecordGates record(tape);
    return evaluate(test.operation, first);
  }();
  REQUIRE(tape.size() == 1);
  CHECK(tape.entries()[0].operation == test.name);
  CHECK(same_bits(recorded.value, stock.value));
  for (std::size_t i = 0; i < stock.gradients.size(); ++i) {
    // CUDA's backward passes of pooling add in an order of chance.
    CHECK((same_bits(recorded.gradients[i], stock.gradients[i]) ||
           (!test_device().is_cpu() && !has_stand_in_gpu() &&
            places(recorded.gradients[i], stock.gradients[i]) <= bound)));
  }

  const auto replayed = [&](const Tensors& at, microreg::Keep keep) {
    const microreg::ReplayGates replay(tape, keep);
    Evaluation result = evaluate(test.operation, at);
    replay.finish();
    return result;
  };
  CHECK(places(replayed(first, microreg::Keep::yes), stock) <= bound);

  const Evaluation there = replayed(second, microreg::Keep::no);
  const Evaluation expected = evaluate([&](const Tensors& at) { return test.by_hand(first, at); }, second);
  CHECK(places(there, expected) <= 4 * bound);
  // The points are far enough apart that gates flip: ignoring the tape would not do.
  CHECK(places(evaluate(test.operation, second), expected) > 20 * bound);
}

}  // namespace helpers
