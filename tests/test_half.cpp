// Half types: the fused formulas on tensors of them, and parameters in them.
#include "fused_operations.hpp"
#include "half_steps.hpp"

#include <microreg/detail/interceptors.hpp>
#include <microreg/fused/batch_norm.hpp>
#include <microreg/fused/gelu.hpp>
#include <microreg/fused/layer_norm.hpp>
#include <microreg/fused/max_pool.hpp>
#include <microreg/fused/softmax.hpp>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

using namespace helpers;

namespace {

/// Reads what it is given and writes it back, by way of float32.
struct ThereAndBack {
  static MICROREG_ALWAYS_INLINE void run(const at::BFloat16* from, float* wide, at::BFloat16* to, std::int64_t count) {
    microreg::detail::Lanes<float>::type lanes;
    for (std::int64_t i = 0; i < count; i += microreg::detail::Lanes<float>::count) {
      microreg::detail::load(lanes, from + i);
      microreg::detail::store(wide + i, lanes);
      microreg::detail::store(to + i, lanes);
    }
  }
};
struct Rounding {
  static MICROREG_ALWAYS_INLINE void run(const float* from, at::BFloat16* to, std::int64_t count) {
    microreg::detail::Lanes<float>::type lanes;
    for (std::int64_t i = 0; i < count; i += microreg::detail::Lanes<float>::count) {
      microreg::detail::load(lanes, from + i);
      microreg::detail::store(to + i, lanes);
    }
  }
};

/// body(run) for each way to run a kernel that this processor has.
template <class Kernel, class... Arguments, class Body>
void by_every_instruction_set(const Body& body) {
  body(&Kernel::run);
#if MICROREG_MULTIVERSION
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    body(&microreg::detail::run_avx2<Kernel, Arguments...>);
  }
#endif
  if (microreg::detail::vector_level() > 0) {
    body(&microreg::detail::run_widest<Kernel, Arguments...>);
  }
}

float of_bits(std::uint32_t bits) {
  float result;
  std::memcpy(&result, &bits, sizeof(result));
  return result;
}

bool is_same(at::BFloat16 one, at::BFloat16 other) {
  const auto is_nan = [](at::BFloat16 x) { return (x.x & 0x7fff) > 0x7f80; };
  return one.x == other.x || (is_nan(one) && is_nan(other));
}

}  // namespace

TEST_CASE("lanes read and round bfloat16 as LibTorch does, NaN, infinities and subnormal numbers included", "[half]") {
  constexpr std::int64_t count = 1 << 16;
  std::vector<at::BFloat16> all(count), back(count);
  std::vector<float> wide(count);
  for (std::int64_t i = 0; i < count; ++i) {
    all[static_cast<std::size_t>(i)].x = static_cast<std::uint16_t>(i);
  }
  by_every_instruction_set<ThereAndBack, const at::BFloat16*, float*, at::BFloat16*, std::int64_t>([&](auto run) {
    std::int64_t wrong = 0;
    run(all.data(), wide.data(), back.data(), count);
    for (std::size_t i = 0; i < all.size(); ++i) {
      const float expected = of_bits(static_cast<std::uint32_t>(all[i].x) << 16);
      wrong += std::memcmp(&wide[i], &expected, sizeof(expected)) != 0 || !is_same(back[i], all[i]);
    }
    CHECK(wrong == 0);
  });

  // Any upper half, with lower halves around the tie and at both ends.
  std::vector<float> floats;
  for (std::uint32_t upper = 0; upper < count; ++upper) {
    for (const std::uint32_t lower : {0x0000U, 0x0001U, 0x7fffU, 0x8000U, 0x8001U, 0xffffU}) {
      floats.push_back(of_bits(upper << 16 | lower));
    }
  }
  std::vector<at::BFloat16> rounded(floats.size());
  by_every_instruction_set<Rounding, const float*, at::BFloat16*, std::int64_t>([&](auto run) {
    std::int64_t wrong = 0;
    run(floats.data(), rounded.data(), static_cast<std::int64_t>(floats.size()));
    for (std::size_t i = 0; i < floats.size(); ++i) {
      wrong += !is_same(rounded[i], at::BFloat16(floats[i]));
    }
    CHECK(wrong == 0);
  });
}

TEST_CASE("kernels that read bfloat16 as it lies give the bits of those that read it converted", "[half]") {
  using namespace microreg::detail;
  if (!test_device().is_cpu() || vector_level() == 0) {
    return;  // these kernels are the CPU's
  }
  const torch::NoGradGuard no_graph;
  torch::manual_seed(3);
  const auto draw = [](at::IntArrayRef shape, at::MemoryFormat format = at::MemoryFormat::Contiguous) {
    return torch::randn(shape).to(torch::kBFloat16).contiguous(format);
  };
  const auto check = [](const Tensors& found, const Tensors& wide, torch::Dtype type) {
    for (std::size_t i = 0; i < found.size(); ++i) {
      INFO("result " << i);
      REQUIRE(found[i].scalar_type() == (wide[i].numel() > 8 ? type : torch::kFloat32));  // of channels: sums
      CHECK(torch::equal(found[i], wide[i].to(found[i].scalar_type())));
    }
  };
  const auto norm = [&](const NormProblem& p, const auto& derivative) {
    NormProblem wide = p;
    for (at::Tensor* const each : {&wide.dy, &wide.x, &wide.v}) {
      *each = widened(*each);
    }
    const Tensors found = derivative(p), expected = derivative(wide);
    check(found, expected, torch::kBFloat16);
    NormProblem uneven = p;  // types that differ
    uneven.dy = widened(p.dy);
    check(derivative(uneven), expected, torch::kFloat32);
  };
  constexpr OutputMask all{true, true, true};
  for (const auto format : {at::MemoryFormat::Contiguous, at::MemoryFormat::ChannelsLast}) {
    for (const std::int64_t side : {2, 5, 8}) {  // columns; a plane with a part of a vector; whole vectors
      INFO("batch normalisation, planes of " << side << ", " << format);
      const std::vector<std::int64_t> shape{9, 6, side, side};
      const at::Tensor x = draw(shape, format), wide = x.to(torch::kFloat);
      const NormProblem p =
          batch_norm_problem(draw(shape, format), x, torch::randn({6}), wide.mean(at::IntArrayRef{0, 2, 3}),
                             (wide.var(at::IntArrayRef{0, 2, 3}, false) + 1e-5).rsqrt(),
                             {draw(shape, format), torch::randn({6}), torch::randn({6})});
      norm(p, [&](const NormProblem& problem) { return batch_norm_double_backward(problem, all); });
    }
  }
  {
    INFO("layer normalisation");
    const at::Tensor x = draw({10, 37}), wide = x.to(torch::kFloat);
    NormProblem p = layer_norm_problem(draw({10, 37}), x, torch::randn({37}), wide.mean({1}, true),
                                       (wide.var(at::IntArrayRef{1}, false, true) + 1e-5).rsqrt(),
                                       {draw({10, 37}), torch::randn({37}), torch::randn({37})});
    norm(p, [&](const NormProblem& problem) {
      const auto results = layer_norm_double_backward(problem, all);
      return Tensors{results[0], results[1]};
    });
  }
  {
    INFO("softmax");
    for (const std::int64_t length : {11, 32, 37}) {
      const Tensors in{draw({7, length}), torch::softmax(draw({7, length}), -1), draw({7, length})};
      const auto derivative = [&](const Tensors& of) {
        const Call call{*find_schema(softmax_backward_rule.schema), {of[0], of[1], -1, torch::kBFloat16}};
        return softmax_backward_rule.derivative(call, {of[2]}, all);
      };
      Tensors wide(in.size());
      std::transform(in.begin(), in.end(), wide.begin(), widened);
      check(derivative(in), derivative(wide), torch::kBFloat16);
    }
  }
  {
    INFO("GELU");
    const at::Tensor x = draw({1003}) * 3, dy = draw({1003}), v = draw({1003});
    check({gelu_second_derivative(x, dy, v)}, {gelu_second_derivative(widened(x), widened(dy), widened(v))},
          torch::kBFloat16);
  }
  {
    INFO("max pooling");
    const at::Tensor x = draw({3, 9, 8, 8}, at::MemoryFormat::ChannelsLast);
    const at::Tensor v = draw({3, 9, 8, 8}, at::MemoryFormat::ChannelsLast);
    const at::Tensor indices = std::get<1>(at::max_pool2d_with_indices(x, 2));
    check({take_maxima<2>(v, indices)}, {take_maxima<2>(widened(v), indices)}, torch::kBFloat16);
  }
}

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
