// Double backward of batch normalisation inside a FusedScope against LibTorch's own.
#include "fused_helpers.hpp"

#include <microreg/fused/batch_norm.hpp>

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
  CHECK(graph_has(second_derivatives(training, inputs, true).first, "microreg::detail::BatchNormBackward"));
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

microreg::detail::BatchNormInputs problem(const std::vector<std::int64_t>& shape, torch::Dtype type, double offset) {
  torch::manual_seed(2);
  microreg::detail::BatchNormInputs in;
  in.x = torch::randn(shape, torch::kFloat64) * 2 + offset;
  in.dy = torch::randn(shape, torch::kFloat64) + 0.5;
  in.v = torch::randn(shape, torch::kFloat64) - 0.25;
  std::vector<std::int64_t> rest;
  for (std::int64_t d = 0; d < in.x.dim(); ++d) {
    if (d != 1) {
      rest.push_back(d);
    }
  }
  in.mean = in.x.mean(rest);
  in.invstd = (in.x.var(rest, /*unbiased=*/false) + 1e-5).rsqrt();
  in.weight = torch::rand({shape[1]}, torch::kFloat64) + 0.5;
  in.a = torch::randn({shape[1]}, torch::kFloat64);
  in.b = torch::randn({shape[1]}, torch::kFloat64);
  for (torch::Tensor* tensor : {&in.x, &in.dy, &in.v, &in.mean, &in.invstd, &in.weight, &in.a, &in.b}) {
    *tensor = tensor->to(type);
  }
  return in;
}

void check_close(const microreg::detail::BatchNormResults& a, const microreg::detail::BatchNormResults& b,
                 double bound) {
  CHECK(relative_error(a.d_dy, b.d_dy) < bound);
  CHECK(relative_error(a.d_x, b.d_x) < bound);
  CHECK(relative_error(a.d_weight, b.d_weight) < bound);
}

constexpr std::array<bool, 3> all{true, true, true};

}  // namespace

TEST_CASE("float32 sums stay accurate for a million elements a channel", "[fused]") {
  const torch::NoGradGuard no_graph;  // or the kernels would not be asked
  for (const auto format : {torch::MemoryFormat::Contiguous, torch::MemoryFormat::ChannelsLast}) {
    auto single = problem({16, 3, 256, 256}, torch::kFloat32, 5.0);
    for (torch::Tensor* tensor : {&single.x, &single.dy, &single.v}) {
      *tensor = tensor->contiguous(format);
    }
    auto exact = single;
    for (torch::Tensor* tensor :
         {&exact.x, &exact.dy, &exact.v, &exact.mean, &exact.invstd, &exact.weight, &exact.a, &exact.b}) {
      *tensor = tensor->to(torch::kFloat64);
    }
    check_close(microreg::detail::batch_norm_double_backward(single, all),
                microreg::detail::batch_norm_double_backward_aten(exact, all), 2e-6);
  }
}

TEST_CASE("the ATen form, which CUDA runs, equals the CPU kernels", "[fused]") {
  const torch::NoGradGuard no_graph;  // or the kernels would not be asked
  for (const auto& shape : shapes) {
    INFO("shape " << shape);
    const auto in = problem(shape, torch::kFloat64, 1.0);
    check_close(microreg::detail::batch_norm_double_backward_aten(in, all),
                microreg::detail::batch_norm_double_backward(in, all), 1e-10);
  }
}

TEST_CASE("every instruction set gives the same batch normalisation", "[fused]") {
  using namespace microreg::detail;
  const auto in = problem({3, 5, 7, 9}, torch::kFloat32, 1.0);
  const auto run = [&](auto kernel) {
    BatchNormResults out{torch::empty_like(in.x), torch::empty_like(in.x), torch::empty_like(in.invstd)};
    const BatchNormProblem<float> p{in.x.const_data_ptr<float>(),
                                    in.dy.const_data_ptr<float>(),
                                    in.v.const_data_ptr<float>(),
                                    in.mean.const_data_ptr<float>(),
                                    in.invstd.const_data_ptr<float>(),
                                    in.weight.const_data_ptr<float>(),
                                    in.a.const_data_ptr<float>(),
                                    in.b.const_data_ptr<float>(),
                                    out.d_dy.mutable_data_ptr<float>(),
                                    out.d_x.mutable_data_ptr<float>(),
                                    out.d_weight.mutable_data_ptr<float>(),
                                    3,
                                    5,
                                    63};
    kernel(p);
    return out;
  };
  const auto baseline = run([](const auto& p) { BatchNormPlanes<float>::run(p, 0, 5); });
  const auto widest = run([](const auto& p) {
    run_widest<BatchNormPlanes<float>, const BatchNormProblem<float>&>(p, std::int64_t{0}, std::int64_t{5});
  });
  check_close(widest, baseline, 1e-5);
#if MICROREG_MULTIVERSION
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    check_close(run([](const auto& p) {
                  run_avx2<BatchNormPlanes<float>, const BatchNormProblem<float>&>(p, std::int64_t{0}, std::int64_t{5});
                }),
                baseline, 1e-5);
  }
#endif
}
