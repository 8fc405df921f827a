// Double backward of batch normalisation inside a FusedScope against LibTorch's own.
#include "fused_helpers.hpp"

#include <microreg/fused/batch_norm.hpp>
#include <microreg/fused/group_norm.hpp>
#include <microreg/microreg.hpp>

#include <array>

using namespace helpers;

namespace {

struct Settings {
  bool affine = true;
  bool statistics = true;
  bool training = true;
};

Function batch_norm(std::int64_t channels, torch::Dtype type, Settings settings = {}) {
  return [=](const std::vector<torch::Tensor>& in) {
    torch::manual_seed(11);
    const torch::Tensor mean = settings.statistics ? torch::randn({channels}, type) : torch::Tensor();
    const torch::Tensor var = settings.statistics ? torch::rand({channels}, type) + 0.5 : torch::Tensor();
    // A nonlinear function of x first, so that x has a second derivative of its own.
    const torch::Tensor x = in[0] + 0.1 * in[0].pow(2);
    return torch::batch_norm(x, settings.affine ? in[1] : torch::Tensor(), settings.affine ? in[2] : torch::Tensor(),
                             mean, var, settings.training, 0.1, 1e-5, true);
  };
}

std::vector<torch::Tensor> inputs_of(const std::vector<std::int64_t>& shape, torch::Dtype type,
                                     std::array<bool, 3> requires_grad = {true, true, true}, int layout = 0) {
  torch::manual_seed(5);
  torch::Tensor x = torch::randn(shape, type);
  if (layout == 1 && x.dim() >= 4) {
    x = x.contiguous(x.dim() == 4 ? torch::MemoryFormat::ChannelsLast : torch::MemoryFormat::ChannelsLast3d);
  } else if (layout == 2) {
    x = torch::stack({x, x}, -1).select(-1, 0);
  }
  return {x.detach().requires_grad_(requires_grad[0]),
          (torch::rand({shape[1]}, type) + 0.5).requires_grad_(requires_grad[1]),
          torch::randn({shape[1]}, type).requires_grad_(requires_grad[2])};
}

std::vector<torch::Tensor> only_input(std::vector<torch::Tensor> inputs) { return {inputs[0]}; }

const std::vector<std::vector<std::int64_t>> shapes = {
    {8, 5},        {9, 16},       {7, 33},      {6, 5, 7},    {4, 3, 17},      {4, 5, 6, 7},
    {3, 32, 4, 4}, {5, 17, 1, 1}, {1, 6, 5, 5}, {2, 1, 9, 9}, {2, 4, 3, 4, 5}, {3, 40, 2, 2, 2},
};

}  // namespace

TEST_CASE("fused batch normalisation equals stock over shapes, layouts and types", "[fused]") {
  for (const auto& shape : shapes) {
    for (const torch::Dtype type : {torch::kFloat64, torch::kFloat32}) {
      for (const int layout : {0, 1, 2}) {
        for (const bool affine : {true, false}) {
          for (const bool statistics : {true, false}) {
            INFO("shape " << shape << ", " << type << ", layout " << layout << ", affine " << affine << ", statistics "
                          << statistics);
            const auto inputs = inputs_of(shape, type, {true, true, true}, layout);
            const Function function = batch_norm(shape[1], type, {.affine = affine, .statistics = statistics});
            CHECK(fused_error(function, affine ? inputs : only_input(inputs)) < tolerance(type));
          }
        }
      }
    }
  }
}

TEST_CASE("fused batch normalisation gives the gradients of any subset of its inputs", "[fused]") {
  for (unsigned subset = 1; subset < 8; ++subset) {
    INFO("subset " << subset);
    const auto inputs =
        inputs_of({4, 5, 6, 7}, torch::kFloat64, {(subset & 1) != 0, (subset & 2) != 0, (subset & 4) != 0});
    CHECK(fused_error(batch_norm(5, torch::kFloat64), inputs) < 1e-9);
  }
}

TEST_CASE("inside a scope batch normalisation in training mode is ours, in evaluation mode LibTorch's", "[fused]") {
  const auto inputs = inputs_of({4, 5, 6, 7}, torch::kFloat64);
  const Function training = batch_norm(5, torch::kFloat64);
  const Function evaluation = batch_norm(5, torch::kFloat64, {.training = false});
  CHECK(graph_has(second_derivatives(training, inputs, true).first, "_batch_norm_backward"));
  CHECK(graph_has(second_derivatives(training, inputs, true).first, "microreg::aten::"));
  CHECK_FALSE(graph_has(second_derivatives(training, inputs, false).first, "microreg"));
  CHECK_FALSE(graph_has(second_derivatives(evaluation, inputs, true).first, "microreg"));
  CHECK(fused_error(evaluation, inputs) == 0);
}

TEST_CASE("third derivatives through fused batch normalisation are exact", "[fused]") {
  for (const bool affine : {true, false}) {
    const auto inputs = inputs_of({4, 3, 2, 2}, torch::kFloat64);
    CHECK(third_derivative_error(batch_norm(3, torch::kFloat64, {.affine = affine}),
                                 affine ? inputs : only_input(inputs)) < 1e-6);
  }
}

namespace {

using microreg::detail::NormProblem;

NormProblem problem(const std::vector<std::int64_t>& shape, torch::Dtype type, double offset) {
  torch::manual_seed(2);
  const torch::Tensor x = torch::randn(shape, torch::kFloat64) * 2 + offset;
  const torch::Tensor dy = torch::randn(shape, torch::kFloat64) + 0.5;
  const torch::Tensor v = torch::randn(shape, torch::kFloat64) - 0.25;
  std::vector<std::int64_t> rest;
  for (std::int64_t d = 0; d < x.dim(); ++d) {
    if (d != 1) {
      rest.push_back(d);
    }
  }
  const auto channel = [&] { return torch::randn({shape[1]}, torch::kFloat64).to(type); };
  return microreg::detail::batch_norm_problem(
      dy.to(type), x.to(type), (torch::rand({shape[1]}, torch::kFloat64) + 0.5).to(type), x.mean(rest).to(type),
      (x.var(rest, /*unbiased=*/false) + 1e-5).rsqrt().to(type), {v.to(type), channel(), channel()});
}

template <class Results>
void check_close(const Results& a, const Results& b, double bound) {
  for (std::size_t i = 0; i < 3; ++i) {
    CHECK(relative_error(a[i].flatten(), b[i].flatten()) < bound);
  }
}

constexpr std::array<bool, 3> all{true, true, true};

std::vector<torch::Tensor> aten_form(const NormProblem& in) {
  const auto out = microreg::detail::norm_double_backward_aten(in, all);
  return {out.begin(), out.end()};
}

}  // namespace

TEST_CASE("float32 sums stay accurate for a million elements a channel", "[fused]") {
  if (skipped_off_the_cpu("sums over a channel are LibTorch's own there")) {
    return;
  }
  const torch::NoGradGuard no_graph;  // or the kernels would not be asked
  for (const auto format : {torch::MemoryFormat::Contiguous, torch::MemoryFormat::ChannelsLast}) {
    auto single = problem({16, 3, 256, 256}, torch::kFloat32, 5.0);
    for (torch::Tensor* tensor : {&single.x, &single.dy, &single.v}) {
      *tensor = tensor->contiguous(format);
    }
    auto exact = single;
    for (torch::Tensor* tensor :
         {&exact.x, &exact.dy, &exact.v, &exact.mean, &exact.rstd, &exact.weight, &exact.a, &exact.b}) {
      *tensor = tensor->to(torch::kFloat64);
    }
    check_close(microreg::detail::batch_norm_double_backward(single, all), aten_form(exact), 2e-6);
  }
}

TEST_CASE("the ATen form, which CUDA runs, equals the CPU kernels", "[fused]") {
  const torch::NoGradGuard no_graph;  // or the kernels would not be asked
  for (const auto& shape : shapes) {
    INFO("shape " << shape);
    const auto in = problem(shape, torch::kFloat64, 1.0);
    check_close(aten_form(in), microreg::detail::batch_norm_double_backward(in, all), 1e-10);
  }
}

TEST_CASE("a mean that was rounded is corrected in the form for CUDA", "[fused]") {
  const torch::NoGradGuard no_graph;  // the statistics are functions of x otherwise
  const auto check = [](NormProblem in) {
    const auto right = microreg::detail::norm_double_backward_aten(in, all);
    in.mean = in.mean + 0.01;
    check_close(microreg::detail::norm_double_backward_aten(in, all), right, 1e-12);
  };
  for (const auto& shape : shapes) {
    INFO("shape " << shape);
    check(problem(shape, torch::kFloat64, 1.0));
  }
  const NormCase c({4, 6, 5, 3}, {6}, 1.0);
  const auto wide = [](const torch::Tensor& tensor) { return tensor.to(torch::kFloat64); };
  const auto [y, mean, rstd] = at::native_group_norm(wide(c.x), wide(c.weight), wide(c.bias), 4, 6, 15, 2, 1e-5);
  const torch::Tensor exact = wide(c.x).view({4, 2, -1}).mean(2);
  check(microreg::detail::group_norm_problem(wide(c.dy), wide(c.x), wide(c.weight), exact, rstd, 2,
                                             {wide(c.v), wide(c.a), wide(c.b)}));
}

TEST_CASE("batch normalisation far from zero is as accurate as LibTorch's, in the form for CUDA too", "[fused]") {
  const Function function = [](const std::vector<torch::Tensor>& in) {
    return torch::batch_norm(in[0], in[1], in[2], {}, {}, true, 0.1, 1e-5, false);
  };
  for (const double offset : {0.0, 1e3, 1e4}) {
    for (const auto format : {torch::MemoryFormat::Contiguous, torch::MemoryFormat::ChannelsLast}) {
      INFO("offset " << offset << ", " << format);
      NormCase c({16, 8, 12, 12}, {8}, offset);
      for (torch::Tensor* tensor : {&c.x, &c.dy, &c.v}) {
        *tensor = tensor->contiguous(format);
      }
      c.check(function, c.double_backward(function, torch::kFloat32, true), 3e-7);
      const torch::NoGradGuard no_graph;
      const auto [y, mean, rstd] = at::native_batch_norm(c.x, c.weight, c.bias, {}, {}, true, 0.1, 1e-5);
      // LibTorch saves a rounded mean, and its own formula is wrong by that, which this form corrects. On CUDA the
      // saved standard deviation is rounded as well.
      const double share = offset > 0 && test_device().is_cpu() ? 0.1 : 1.5;
      c.check(function,
              aten_form(microreg::detail::batch_norm_problem(c.dy, c.x, c.weight, mean, rstd, {c.v, c.a, c.b})), 3e-7,
              share);
    }
  }
}

TEST_CASE("every instruction set gives the same batch normalisation", "[fused]") {
  using namespace microreg::detail;
  const torch::NoGradGuard no_graph;
  if (!test_device().is_cpu()) {
    return;  // these kernels are the CPU's
  }
  NormProblem in = problem({3, 5, 7, 9}, torch::kFloat32, 1.0);
  const NormPointers<float> pointers = pointers_of<float>(in);
  const RowLayout layout{.rows = 5, .parts = 1, .runs = 3, .length = 63, .row_step = 1, .run_step = 5};
  using Kernel = RowKernel<ChannelNorm<float>>;
  const auto run = [&](auto kernel) {
    std::vector<torch::Tensor> out{torch::empty_like(in.x), torch::empty_like(in.x),
                                   torch::empty({5}, torch::kFloat64)};
    ChannelNorm<float> norm(pointers, 1, 5, out[2].mutable_data_ptr<double>());
    kernel(norm, Streams<float>{in.x.data_ptr<float>(), in.dy.data_ptr<float>(), in.v.data_ptr<float>(),
                                out[0].mutable_data_ptr<float>(), out[1].mutable_data_ptr<float>()});
    return out;
  };
  const auto baseline = run([&](auto& norm, const auto& streams) { Kernel::run(norm, streams, layout, 0, 5); });
  const auto widest = run([&](auto& norm, const auto& streams) {
    run_widest<Kernel, ChannelNorm<float>&, const Streams<float>&, const RowLayout&>(norm, streams, layout,
                                                                                     std::int64_t{0}, std::int64_t{5});
  });
  check_close(widest, baseline, 1e-5);
#if MICROREG_MULTIVERSION
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    const auto avx2 = run([&](auto& norm, const auto& streams) {
      run_avx2<Kernel, ChannelNorm<float>&, const Streams<float>&, const RowLayout&>(norm, streams, layout,
                                                                                     std::int64_t{0}, std::int64_t{5});
    });
    check_close(avx2, baseline, 1e-5);
  }
#endif
}

// LibTorch 2.13 is wrong there by itself: docs/libtorch-bugs.md.
TEST_CASE("batch normalisation over dimensions of one element takes gradients in any strides", "[fused]") {
  const auto type = GENERATE(torch::kFloat64, torch::kFloat32);
  const bool training = GENERATE(true, false);
  const auto shape = GENERATE(std::vector<std::int64_t>{1, 2, 8, 7}, std::vector<std::int64_t>{2, 3, 1, 5},
                              std::vector<std::int64_t>{3, 2, 5, 1}, std::vector<std::int64_t>{7, 4, 2, 2, 1});
  const std::int64_t odd = GENERATE(1, 2);
  INFO(type << (training ? " training " : " evaluation ") << shape << ", strides of " << odd);
  torch::manual_seed(3);
  const std::int64_t channels = shape[1];
  const torch::Tensor mean = torch::randn({channels}, type), variance = torch::rand({channels}, type) + 0.5;
  const torch::Tensor x = torch::randn(shape, type), direction = torch::randn(shape, type);
  const torch::Tensor w = (torch::rand({channels}, type) + 0.5).requires_grad_();
  const torch::Tensor b = torch::randn({channels}, type).requires_grad_();
  const torch::Tensor h = torch::randn({3, channels}, type).requires_grad_();
  const std::vector<torch::Tensor> parameters{w, b, h};
  const auto two_branches = [&](const torch::Tensor& y) {
    return (y * direction).sum() + torch::linear(y.movedim(1, -1), h).square().sum();
  };
  const auto by_hand = [&](const torch::Tensor& input) {
    std::vector<std::int64_t> dims{0}, view(shape.size(), 1);
    for (std::size_t d = 2; d < shape.size(); ++d) {
      dims.push_back(static_cast<std::int64_t>(d));
    }
    view[1] = channels;
    const auto each = [&](const torch::Tensor& t) { return t.to(torch::kFloat64).view(view); };
    const torch::Tensor centred = input - (training ? input.mean(dims, true) : each(mean));
    const torch::Tensor spread = training ? centred.square().mean(dims, true) : each(variance);
    return centred / (spread + 1e-5).sqrt() * each(w) + each(b);
  };
  const auto normalised = [&](const torch::Tensor& input) {
    torch::Tensor y = torch::batch_norm(input, w, b, mean.clone(), variance.clone(), training, 0.1, 1e-5, true);
    y.register_hook([odd](const torch::Tensor& g) {  // as sums of gradients in both layouts come
      const torch::Tensor last = g.movedim(1, -1).contiguous().movedim(-1, 1);
      std::vector<std::int64_t> strides = last.strides().vec();
      for (std::size_t d = 0; d < strides.size(); ++d) {
        strides[d] = last.size(static_cast<std::int64_t>(d)) == 1 ? odd : strides[d];
      }
      return last.as_strided(g.sizes(), strides);
    });
    return y;
  };
  torch::Tensor expected, plain;
  {
    const torch::Tensor y = by_hand(x.to(torch::kFloat64));
    const torch::Tensor loss = (y * direction.to(torch::kFloat64)).sum() +
                               torch::linear(y.movedim(1, -1), h.to(torch::kFloat64)).square().sum();
    plain = flattened(torch::autograd::grad({loss}, parameters, {}, true, true), parameters);
    expected = plain + penalty_by_hand(loss, parameters) * 1e-3;
  }
  const double bound = type == torch::kFloat64 ? 1e-12 : 1e-4;
  {
    const microreg::FusedScope scope;
    const torch::Tensor loss = two_branches(normalised(x));
    CHECK(relative_error(flattened(torch::autograd::grad({loss}, parameters), parameters), plain) < bound);
  }
  microreg::FunctionModel model{normalised, parameters};
  microreg::Regularizer regularizer(model, two_branches, microreg::GradientNorm{}, {.strength = 1e-3});
  (void)regularizer.backward(x);
  CHECK(relative_error(flat_grad(parameters), expected) < bound);
}
