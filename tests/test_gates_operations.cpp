// Activations, clamps and extrema: recording is LibTorch's, replaying is a formula written by hand.
#include "gates_helpers.hpp"

#include <ATen/CPUGeneratorImpl.h>
#include <microreg/detail/finite.hpp>
#include <microreg/detail/libtorch.hpp>

#include <cmath>
#include <cstdint>
#include <limits>

using namespace helpers;
using torch::where;

namespace {

/// Multiples of a quarter: values at the kinks, ties, and exact arithmetic.
torch::Tensor quarters(const std::vector<std::int64_t>& shape, std::uint64_t seed, torch::Dtype type, double scale) {
  const torch::Tensor numbers = randn_of_the_cpu(shape, torch::kFloat64, at::detail::createCPUGenerator(seed));
  return (numbers * (4 * scale)).round().div(4).to(type);
}

/// Two points, one or more operands each, of the given shapes.
std::vector<Tensors> points(const std::vector<std::vector<std::int64_t>>& shapes, torch::Dtype type, double scale = 2) {
  std::vector<Tensors> result(2);
  for (std::size_t i = 0; i < shapes.size(); ++i) {
    result[0].push_back(quarters(shapes[i], 10 + i, type, scale));
    result[1].push_back(result[0][i] + quarters(shapes[i], 20 + i, type, scale));
  }
  return result;
}

using Unary = std::function<torch::Tensor(torch::Tensor)>;
using ByHand = std::function<torch::Tensor(const torch::Tensor&, const torch::Tensor&)>;

/// An operation on one tensor, out of place and in place, over shapes, memory layouts and types.
void check_unary(const std::string& name, const Unary& operation, const std::string& name_in_place,
                 const Unary& in_place, const ByHand& by_hand, double scale = 2, double scalar = -9) {
  const std::vector<std::vector<std::int64_t>> shapes = {{}, {7}, {3, 5}, {2, 3, 4, 5}, {4, 64, 9}};
  for (const auto& shape : shapes) {
    for (const torch::Dtype type : {torch::kFloat64, torch::kFloat32}) {
      for (const bool transposed : {false, true}) {
        INFO("shape " << shape << ", " << type << ", transposed " << transposed);
        auto where_to = points({shape}, type, scale);
        if (shape.empty()) {
          where_to = {{helpers::tensor(scalar, type)}, {helpers::tensor(9.5, type)}};
        }
        const auto input = [=](const Tensors& at) {
          return transposed && at[0].dim() > 1 ? at[0].transpose(0, 1) : at[0];
        };
        const auto hand = [=](const Tensors& first, const Tensors& second) {
          return by_hand(input(first), input(second));
        };
        check_gates({name, where_to, [=](const Tensors& at) { return operation(input(at)); }, hand});
        if (in_place) {
          check_gates({name_in_place, where_to, [=](const Tensors& at) { return in_place(input(at).clone()); }, hand});
        }
      }
    }
  }
}

torch::Tensor none_like(const torch::Tensor& x) { return torch::zeros_like(x.detach()); }
torch::Tensor filled_like(const torch::Tensor& x, double value) { return torch::full_like(x.detach(), value); }

}  // namespace

TEST_CASE("gates of relu", "[gates]") {
  check_unary(
      "relu", [](torch::Tensor x) { return torch::relu(x); }, "relu_", [](torch::Tensor x) { return torch::relu_(x); },
      [](const auto& a, const auto& b) { return where(a > 0, b, none_like(b)); });
}

TEST_CASE("gates of leaky_relu", "[gates]") {
  for (const double slope : {0.01, 0.2, 0.0}) {
    check_unary(
        "leaky_relu", [=](torch::Tensor x) { return torch::leaky_relu(x, slope); }, "leaky_relu_",
        [=](torch::Tensor x) { return torch::leaky_relu_(x, slope); },
        [=](const auto& a, const auto& b) { return where(a > 0, b, b * slope); });
  }
  check_unary(
      "leaky_relu", [=](torch::Tensor x) { return torch::leaky_relu(x, -0.5); }, "", {},
      [=](const auto& a, const auto& b) { return where(a > 0, b, b * -0.5); });
}

TEST_CASE("gates of rrelu in evaluation mode", "[gates]") {
  check_unary(
      "rrelu_with_noise", [](torch::Tensor x) { return torch::rrelu(x, 0.25, 0.5, false); }, "rrelu_with_noise_",
      [](torch::Tensor x) { return torch::rrelu_(x, 0.25, 0.5, false); },
      [](const auto& a, const auto& b) { return where(a > 0, b, b * 0.375); });
}

TEST_CASE("rrelu in training mode repeats its slopes and draws nothing in a replay", "[gates]") {
  const auto where_to = points({{3, 50}}, torch::kFloat64);
  for (const bool in_place : {false, true}) {
    auto draw = generator(8);
    const auto forward = [&](const torch::Tensor& x) {
      draw.set_current_seed(8);
      torch::Tensor copy = x.clone();
      return in_place ? torch::rrelu_(copy, 0.1, 0.9, true, draw) : torch::rrelu(copy, 0.1, 0.9, true, draw);
    };
    microreg::GateTape tape;
    torch::Tensor first;
    {
      const microreg::RecordGates record(tape);
      first = forward(where_to[0][0]);
    }
    draw.set_current_seed(8);
    const torch::Tensor state = draw.get_state();
    const torch::Tensor slopes = first / where_to[0][0];
    const torch::Tensor second = [&] {
      const microreg::ReplayGates replay(tape, microreg::Keep::no);
      return forward(where_to[1][0]);
    }();
    const torch::Tensor expected = where(where_to[0][0] > 0, where_to[1][0], slopes * where_to[1][0]);
    const torch::Tensor decided = where_to[0][0] != 0;
    CHECK(places(second.index({decided}), expected.index({decided})) <= 4);
    CHECK(same_bits(draw.get_state(), state));
  }
}

TEST_CASE("gates of prelu, with the gradient of its slopes", "[gates]") {
  for (const torch::Dtype type : {torch::kFloat64, torch::kFloat32}) {
    for (const std::int64_t slopes : {1, 4}) {
      for (const auto& shape : std::vector<std::vector<std::int64_t>>{{6, 4}, {2, 4, 3, 5}}) {
        std::vector<std::int64_t> over(shape.size(), 1);
        over[1] = slopes;
        check_gates({"_prelu_kernel", points({shape, {slopes}}, type),
                     [](const Tensors& at) { return torch::prelu(at[0], at[1]); },
                     [&](const Tensors& first, const Tensors& second) {
                       return where(first[0] > 0, second[0], second[0] * second[1].reshape(over));
                     }},
                    8);
      }
    }
  }
}

TEST_CASE("gates of threshold", "[gates]") {
  check_unary(
      "threshold", [](torch::Tensor x) { return torch::threshold(x, 0.5, -3); }, "threshold_",
      [](torch::Tensor x) { return torch::threshold_(x, 0.5, -3); },
      [](const auto& a, const auto& b) { return where(a > 0.5, b, filled_like(b, -3)); });
}

TEST_CASE("gates of hardtanh and relu6", "[gates]") {
  const auto by_hand = [](double low, double high) {
    return [=](const torch::Tensor& a, const torch::Tensor& b) {
      return where(a <= low, filled_like(b, low), where(a >= high, filled_like(b, high), b));
    };
  };
  check_unary(
      "hardtanh", [](torch::Tensor x) { return torch::hardtanh(x, -1, 1.5); }, "hardtanh_",
      [](torch::Tensor x) { return torch::hardtanh_(x, -1, 1.5); }, by_hand(-1, 1.5));
  check_unary(
      "hardtanh", [](torch::Tensor x) { return torch::relu6(x); }, "hardtanh_",
      [](torch::Tensor x) { return torch::relu6_(x); }, by_hand(0, 6), 5);
}

TEST_CASE("gates of hardshrink and softshrink", "[gates]") {
  check_unary(
      "hardshrink", [](torch::Tensor x) { return torch::hardshrink(x, 1); }, "", {},
      [](const auto& a, const auto& b) { return where(a.abs() <= 1, none_like(b), b); }, 2, 0.25);
  check_unary(
      "softshrink", [](torch::Tensor x) { return torch::softshrink(x, 1); }, "", {},
      [](const auto& a, const auto& b) { return where(a > 1, b - 1, where(a < -1, b + 1, none_like(b))); });
}

TEST_CASE("gates of hardsigmoid and hardswish", "[gates]") {
  check_unary(
      "hardsigmoid", [](torch::Tensor x) { return torch::hardsigmoid(x); }, "hardsigmoid_",
      [](torch::Tensor x) { return torch::hardsigmoid_(x); },
      [](const auto& a, const auto& b) {
        // LibTorch's gradient takes a float32 sixth, whatever the type.
        const torch::Tensor slope = b * double{1.0F / 6.0F};
        const bool rounded = !test_device().is_cpu();  // there its value does, too
        const torch::Tensor value = rounded ? (b + 3) * double{1.0F / 6.0F} : b / 6 + 0.5;
        const torch::Tensor middle = value.detach() + (slope - slope.detach());
        return where(a <= -3, none_like(b),
                     where(a >= 3, filled_like(b, rounded ? 6 * double{1.0F / 6.0F} : 1), middle));
      },
      4);
  // Away from the kinks where LibTorch's derivative there depends on how an element lies in memory.
  const double shift = microreg::detail::hardswish_kinks_vary ? 0.125 : 0;
  check_unary(
      "hardswish", [=](torch::Tensor x) { return torch::hardswish(x + shift); }, "hardswish_",
      [=](torch::Tensor x) { return torch::hardswish_(x.add_(shift)); },
      [=](const auto& a, const auto& b) {
        const torch::Tensor y = b + shift;
        const torch::Tensor result = where(a + shift <= -3, none_like(y), where(a + shift >= 3, y, y * (y / 6 + 0.5)));
        // On CUDA LibTorch's value takes a float32 sixth, whatever the type.
        return test_device().is_cpu() ? result : result + result.detach() * (6 * double{1.0F / 6.0F} - 1);
      },
      4);
}

TEST_CASE("gates of elu and selu", "[gates]") {
  check_unary(
      "elu", [](torch::Tensor x) { return torch::elu(x, 0.5, 2, 0.25); }, "elu_",
      [](torch::Tensor x) { return torch::elu_(x, 0.5, 2, 0.25); },
      [](const auto& a, const auto& b) { return where(a > 0, 2 * b, torch::expm1(0.25 * b)); });
  constexpr double scale = 1.0507009873554804934193349852946;
  constexpr double alpha = 1.6732632423543772848170429916717;
  check_unary(
      "elu", [](torch::Tensor x) { return torch::selu(x); }, "elu_", [](torch::Tensor x) { return torch::selu_(x); },
      [=](const auto& a, const auto& b) { return where(a > 0, scale * b, (scale * alpha) * torch::expm1(b)); });
}

TEST_CASE("gates of abs", "[gates]") {
  check_unary(
      "abs", [](torch::Tensor x) { return torch::abs(x); }, "abs_", [](torch::Tensor x) { return torch::abs_(x); },
      [](const auto& a, const auto& b) { return where(a > 0, b, where(a < 0, -b, b * 0)); });
}

TEST_CASE("gates of clamp, clamp_min, clamp_max with numbers", "[gates]") {
  using Bound = std::optional<torch::Scalar>;
  const auto both = [](double low, double high) {
    return [=](const torch::Tensor& a, const torch::Tensor& b) {
      constexpr bool open = microreg::detail::clamp_shares_ties;
      return where(open ? a >= high : a > high, filled_like(b, high),
                   where(open ? a <= low : a < low, filled_like(b, low), b));
    };
  };
  check_unary(
      "clamp", [](torch::Tensor x) { return torch::clamp(x, -1, 1.5); }, "clamp_",
      [](torch::Tensor x) { return torch::clamp_(x, -1, 1.5); }, both(-1, 1.5));
  check_unary(
      "clamp", [](torch::Tensor x) { return torch::clamp(x, -1); }, "clamp_",
      [](torch::Tensor x) { return torch::clamp_(x, -1); }, both(-1, INFINITY));
  check_unary(
      "clamp", [](torch::Tensor x) { return torch::clamp(x, Bound(), Bound(1)); }, "clamp_",
      [](torch::Tensor x) { return torch::clamp_(x, Bound(), Bound(1)); }, both(-INFINITY, 1));
  check_unary(
      "clamp_min", [](torch::Tensor x) { return torch::clamp_min(x, -1); }, "clamp_min_",
      [](torch::Tensor x) { return torch::clamp_min_(x, -1); }, both(-1, INFINITY));
  check_unary(
      "clamp_max", [](torch::Tensor x) { return torch::clamp_max(x, 1); }, "clamp_max_",
      [](torch::Tensor x) { return torch::clamp_max_(x, 1); }, both(-INFINITY, 1));
}

TEST_CASE("bounds of clamp that are crossed give the upper one", "[gates]") {
  const auto where_to = points({{40}}, torch::kFloat64);
  microreg::GateTape tape;
  {
    const microreg::RecordGates record(tape);
    torch::clamp(where_to[0][0], 1, -1);
  }
  const microreg::ReplayGates replay(tape, microreg::Keep::no);
  CHECK(same_bits(torch::clamp(where_to[1][0], 1, -1), filled_like(where_to[1][0], -1)));
}

TEST_CASE("gates of clamp, clamp_min, clamp_max with tensors, and their gradients", "[gates]") {
  const auto shared = [](const torch::Tensor& tie, const torch::Tensor& one, const torch::Tensor& other) {
    return microreg::detail::clamp_shares_ties ? where(tie, (one + other) / 2, one) : one;
  };
  const auto min_by_hand = [&](const Tensors& a, const Tensors& b) {
    return where(a[0] < a[1], b[1], shared(a[0] == a[1], b[0], b[1]));
  };
  const auto max_by_hand = [&](const Tensors& a, const Tensors& b) {
    return where(a[0] > a[1], b[1], shared(a[0] == a[1], b[0], b[1]));
  };
  const auto both_by_hand = [&](const Tensors& a, const Tensors& b) {
    const torch::Tensor inside = shared(a[0] == a[1], shared(a[0] == a[2], b[0], b[2]), b[1]);
    return where(a[0] > a[2], b[2], where(a[0] < a[1], b[1], inside));
  };
  for (const torch::Dtype type : {torch::kFloat64, torch::kFloat32}) {
    for (const auto& bound : std::vector<std::vector<std::int64_t>>{{6, 5}, {5}, {}}) {
      INFO("bound " << bound);
      const auto two = points({{6, 5}, bound}, type);
      auto three = points({{6, 5}, bound, bound}, type);
      for (Tensors& point : three) {  // upper bounds at or above the lower ones
        point[2] = point[1] + point[2].abs() + 0.25;
      }
      using Maybe = std::optional<torch::Tensor>;
      check_gates({"clamp_min", two, [](const Tensors& at) { return torch::clamp_min(at[0], at[1]); }, min_by_hand}, 8);
      check_gates({"clamp_max", two, [](const Tensors& at) { return torch::clamp_max(at[0], at[1]); }, max_by_hand}, 8);
      check_gates({"clamp_min_", two,
                   [](const Tensors& at) {
                     torch::Tensor x = at[0].clone();
                     return torch::clamp_min_(x, at[1]);
                   },
                   min_by_hand},
                  8);
      check_gates({"clamp_max_", two,
                   [](const Tensors& at) {
                     torch::Tensor x = at[0].clone();
                     return torch::clamp_max_(x, at[1]);
                   },
                   max_by_hand},
                  8);
      check_gates({"clamp", two, [](const Tensors& at) { return torch::clamp(at[0], Maybe(at[1])); }, min_by_hand}, 8);
      check_gates(
          {"clamp", two, [](const Tensors& at) { return torch::clamp(at[0], Maybe(), Maybe(at[1])); }, max_by_hand}, 8);
      check_gates({"clamp", three, [](const Tensors& at) { return torch::clamp(at[0], Maybe(at[1]), Maybe(at[2])); },
                   both_by_hand},
                  8);
      check_gates({"clamp_", three,
                   [](const Tensors& at) {
                     torch::Tensor x = at[0].clone();
                     return torch::clamp_(x, Maybe(at[1]), Maybe(at[2]));
                   },
                   both_by_hand},
                  8);
    }
  }
}

TEST_CASE("tensor bounds that meet or cross have LibTorch's gradients", "[gates]") {
  const Tensors at = {helpers::tensor({-1.0, 0.0, 1.0, -1.0, 0.5, 2.0, 0.0, 0.0, 0.0}),
                      helpers::tensor({0.0, 0.0, 0.0, 1.0, 1.0, 1.0, 0.0, -1.0, 1.0}),
                      helpers::tensor({0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0})};
  const auto operation = [](const Tensors& in) {
    return torch::clamp(in[0], std::optional(in[1]), std::optional(in[2]));
  };
  const Evaluation stock = evaluate(operation, at);
  microreg::GateTape tape;
  {
    const microreg::RecordGates record(tape);
    evaluate(operation, at);
  }
  const Evaluation replayed = [&] {
    const microreg::ReplayGates replay(tape, microreg::Keep::no);
    return evaluate(operation, at);
  }();
  CHECK(places(replayed, stock) == 0);
}

TEST_CASE("gates of max and min over everything: ties share", "[gates]") {
  const auto by_hand = [](bool greatest) {
    return [=](const Tensors& a, const Tensors& b) {
      const double extreme = (greatest ? a[0].max() : a[0].min()).item<double>();
      const torch::Tensor taken = (a[0] == extreme).to(b[0].dtype());
      return (b[0] * taken).sum() / taken.sum();
    };
  };
  for (const torch::Dtype type : {torch::kFloat64, torch::kFloat32}) {
    for (const auto& shape : std::vector<std::vector<std::int64_t>>{{1}, {50}, {4, 5, 6}}) {
      INFO("shape " << shape);
      auto where_to = points({shape}, type);
      where_to[0][0].flatten()[0] = 9;  // two that tie, unless there is but one element
      where_to[0][0].flatten()[-1] = 9;
      if (shape.front() > 1) {
        where_to[0][0].flatten()[1] = -9;
        where_to[0][0].flatten()[-2] = -9;
        where_to[0][0].flatten()[-3] = -9;
      }
      where_to[1][0] = where_to[1][0] + 20 * torch::rand(shape, generator(4), where_to[1][0].options());
      if (shape.front() > 1) {
        check_gates({"max", where_to, [](const Tensors& at) { return torch::max(at[0]); }, by_hand(true)});
        check_gates({"min", where_to, [](const Tensors& at) { return torch::min(at[0]); }, by_hand(false)});
      }
    }
  }
}

TEST_CASE("gates of max and min over a dimension: values and indices of the first pass", "[gates]") {
  for (const torch::Dtype type : {torch::kFloat64, torch::kFloat32}) {
    for (const std::int64_t dim : {0, 1, -1}) {
      for (const bool keep : {false, true}) {
        INFO("dim " << dim << ", keepdim " << keep);
        // Without ties, where LibTorch may take any.
        const std::vector<Tensors> where_to = {{torch::rand({4, 5, 6}, generator(1), torch::kFloat64).to(type)},
                                               {torch::rand({4, 5, 6}, generator(2), torch::kFloat64).to(type)}};
        const auto by_hand = [=](bool greatest) {
          return [=](const Tensors& a, const Tensors& b) {
            const torch::Tensor at = greatest ? a[0].argmax(dim, true) : a[0].argmin(dim, true);
            const torch::Tensor taken = torch::zeros_like(b[0].detach()).scatter(dim, at, 1);
            return (b[0] * taken).sum(dim, keep);
          };
        };
        check_gates({"max", where_to, [=](const Tensors& at) { return std::get<0>(torch::max(at[0], dim, keep)); },
                     by_hand(true)});
        check_gates({"min", where_to, [=](const Tensors& at) { return std::get<0>(torch::min(at[0], dim, keep)); },
                     by_hand(false)});
        microreg::GateTape tape;
        torch::Tensor first;
        {
          const microreg::RecordGates record(tape);
          first = std::get<1>(torch::max(where_to[0][0], dim, keep));
        }
        const microreg::ReplayGates replay(tape, microreg::Keep::no);
        CHECK(same_bits(std::get<1>(torch::max(where_to[1][0], dim, keep)), first));
      }
    }
  }
}

TEST_CASE("gates of amax and amin: ties share", "[gates]") {
  for (const torch::Dtype type : {torch::kFloat64, torch::kFloat32}) {
    for (const auto& dims : std::vector<std::vector<std::int64_t>>{{}, {0}, {-1}, {0, 2}, {1, -1}}) {
      for (const bool keep : {false, true}) {
        INFO("dims " << torch::IntArrayRef(dims) << ", keepdim " << keep);
        const auto where_to = points({{4, 5, 6}}, type, 0.5);  // few values, many ties
        const auto by_hand = [=](bool greatest) {
          return [=](const Tensors& a, const Tensors& b) {
            const auto over = dims.empty() ? std::vector<std::int64_t>{0, 1, 2} : dims;
            torch::Tensor extreme = a[0].detach();
            for (const std::int64_t d : over) {
              extreme = greatest ? std::get<0>(extreme.max(d, true)) : std::get<0>(extreme.min(d, true));
            }
            const torch::Tensor taken = (a[0] == extreme).to(b[0].dtype());
            return (b[0] * taken).sum(over, keep) / taken.sum(over, keep);
          };
        };
        check_gates(
            {"amax", where_to, [=](const Tensors& at) { return torch::amax(at[0], dims, keep); }, by_hand(true)});
        check_gates(
            {"amin", where_to, [=](const Tensors& at) { return torch::amin(at[0], dims, keep); }, by_hand(false)});
      }
    }
  }
}

TEST_CASE("gates of maximum, minimum, fmax, fmin", "[gates]") {
  const auto half = [](const torch::Tensor& first, const torch::Tensor& second) {
    return where(first, torch::ones_like(second), torch::zeros_like(second));
  };
  for (const torch::Dtype type : {torch::kFloat64, torch::kFloat32}) {
    for (const auto& other : std::vector<std::vector<std::int64_t>>{{6, 5}, {5}, {6, 1}, {}}) {
      INFO("other " << other);
      const auto where_to = points({{6, 5}, other}, type, 0.75);
      // Each operand weighs 1 where it is beyond the other, 1/2 at a tie (fmax before LibTorch 2.14: all to the first).
      constexpr double tie_of_fmax = microreg::detail::clamp_shares_ties ? 0.5 : 1;
      const auto by_hand = [=](int sign, double tie) {
        return [=](const Tensors& a, const Tensors& b) {
          const torch::Tensor difference = (a[0] - a[1]) * sign;
          const torch::Tensor one = half(difference > 0, difference) + tie * half(difference == 0, difference);
          return one * b[0] + (1 - one) * b[1];
        };
      };
      check_gates(
          {"maximum", where_to, [](const Tensors& at) { return torch::maximum(at[0], at[1]); }, by_hand(1, 0.5)}, 8);
      check_gates({"maximum", where_to, [](const Tensors& at) { return torch::max(at[0], at[1]); }, by_hand(1, 0.5)},
                  8);
      check_gates(
          {"minimum", where_to, [](const Tensors& at) { return torch::minimum(at[0], at[1]); }, by_hand(-1, 0.5)}, 8);
      check_gates(
          {"fmax", where_to, [](const Tensors& at) { return torch::fmax(at[0], at[1]); }, by_hand(1, tie_of_fmax)}, 8);
      check_gates(
          {"fmin", where_to, [](const Tensors& at) { return torch::fmin(at[0], at[1]); }, by_hand(-1, tie_of_fmax)}, 8);
    }
  }
}

TEST_CASE("a scalar's extrema are the scalar", "[gates]") {
  const torch::Tensor x = helpers::tensor(2.5).requires_grad_();
  const auto all = [&] {
    return torch::max(x) + torch::amin(x) + std::get<0>(torch::max(x, 0)) + torch::amax(x, {0}, true);
  };
  microreg::GateTape tape;
  {
    const microreg::RecordGates record(tape);
    all();
  }
  const microreg::ReplayGates replay(tape, microreg::Keep::no);
  const torch::Tensor y = all();
  CHECK(y.item<float>() == 10);
  CHECK(torch::autograd::grad({y}, {x})[0].item<float>() == 4);
}

TEST_CASE("half types have gates", "[gates]") {
  for (const torch::Dtype type : {torch::kHalf, torch::kBFloat16}) {
    const auto where_to = points({{6, 8}}, type);
    check_gates({"relu", where_to, [](const Tensors& at) { return torch::relu(at[0]); },
                 [](const Tensors& a, const Tensors& b) { return where(a[0] > 0, b[0], none_like(b[0])); }});
    check_gates({"leaky_relu", where_to, [](const Tensors& at) { return torch::leaky_relu(at[0], 0.25); },
                 [](const Tensors& a, const Tensors& b) { return where(a[0] > 0, b[0], b[0] / 4); }});
    check_gates({"abs", where_to, [](const Tensors& at) { return torch::abs(at[0]); },
                 [](const Tensors& a, const Tensors& b) { return torch::sign(a[0]) * b[0]; }});
  }
}

TEST_CASE("the number next to a bound is the standard library's", "[gates]") {
  const auto check = [](auto number, auto bits) {
    using Number = decltype(number);
    using Limits = std::numeric_limits<Number>;
    const auto infinity = Limits::infinity();
    for (const Number positive : {Number(0), Number(1), Number(0.1), Number(1e30), Limits::min(), Limits::denorm_min(),
                                  Limits::max(), infinity}) {
      for (const Number bound : {positive, -positive}) {
        INFO(bound);
        CHECK(microreg::detail::next_to<Number, decltype(bits)>(bound, true) ==
              (std::isinf(bound) ? bound : std::nextafter(bound, infinity)));
        CHECK(microreg::detail::next_to<Number, decltype(bits)>(bound, false) ==
              (std::isinf(bound) ? bound : std::nextafter(bound, -infinity)));
        CHECK(microreg::detail::is_finite(static_cast<double>(bound)) == std::isfinite(bound));
      }
    }
  };
  check(float{}, std::uint32_t{});
  check(double{}, std::uint64_t{});
  CHECK_FALSE(microreg::detail::is_finite(std::nan("")));
  CHECK(microreg::detail::unbounded() == std::numeric_limits<double>::infinity());
}
