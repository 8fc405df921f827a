// Half types: the fused formulas on tensors of them, and parameters in them.
#include "fused_operations.hpp"
#include "half_steps.hpp"

#include <algorithm>

using namespace helpers;

TEST_CASE("fused formulas take half types, and are as accurate as LibTorch in them", "[half]") {
  const auto type = GENERATE(torch::kBFloat16, torch::kHalf);
  for (const FusedOperation& of : fused_operations) {
    if (!of.runs_on(test_device())) {
      continue;
    }
    const DoubleBackward problem(of, type);
    const torch::Tensor exact = problem.exact();
    bool ours = false;
    const double fused = relative_error(problem({.type = type}, true, &ours), exact);
    const double stock = relative_error(problem({.type = type}, false), exact);
    INFO(of.name << " in " << type << ": fused " << fused << ", LibTorch " << stock);
    CHECK(ours == of.is_fused_on(test_device()));
    CHECK(fused < std::max(1.1 * stock, epsilon_of(type)));
  }
}

TEST_CASE("gradients of parameters in half types add up in float32", "[half]") {
  check_sums_of(GENERATE(torch::kBFloat16, torch::kHalf), test_device());
}

TEST_CASE("float16 loses no penalty to underflow, at any strength", "[half]") {
  check_no_underflow(GENERATE(1, 1024), test_device());
}
