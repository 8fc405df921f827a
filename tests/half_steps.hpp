/// @file
/// Steps on parameters in half types whose gradients are known by hand, on any device.
#pragma once

#include "helpers.hpp"

#include <microreg/microreg.hpp>

#include <utility>

namespace helpers {

inline double epsilon_of(torch::Dtype type) { return type == torch::kHalf ? 0x1p-10 : 0x1p-7; }

/// Gradients over many micro-batches add up in float32.
inline void check_sums_of(torch::Dtype type, at::Device device) {
  constexpr std::int64_t samples = 2048;
  const torch::TensorOptions options = torch::TensorOptions(device).dtype(type);
  torch::Tensor w = torch::ones({3}, options).requires_grad_();
  microreg::FunctionModel model{[&](const torch::Tensor& x) { return (x * w).sum(1); }, {w}};
  microreg::Regularizer regularizer(model,
                                    [](const torch::Tensor& output, const torch::Tensor&) { return output.mean(); },
                                    microreg::GradientNorm{}, {.strength = 0.25, .micro_batch_size = 1});
  const microreg::Report report =
      regularizer.backward(torch::ones({samples, 3}, options), torch::zeros({samples}, device));
  CHECK(w.grad().scalar_type() == type);
  // The loss is linear: its gradient is 1 in each element, the penalty's 0.
  CHECK(relative_error(w.grad(), torch::ones({3})) < epsilon_of(type));
  CHECK(report.penalties[0].value.item<double>() == Approx(3.0).epsilon(1e-3));
}

/// The loss 50 ||w||^2 has the gradient 100 w = 0.01 in each element, the penalty 2 strength 100^2 w: a fifth of it at
/// a strength of 1e-3. Of many micro-batches seeds, 2 strength weight g, are 2e-8, where float16 has nothing left.
inline void check_no_underflow(std::int64_t samples, at::Device device) {
  const torch::TensorOptions options = torch::TensorOptions(device).dtype(torch::kHalf);
  torch::Tensor w = torch::full({1000}, 1e-4, options).requires_grad_();
  microreg::FunctionModel model{[&](const torch::Tensor& x) { return w.square() * x.sum() * 50; }, {w}};
  const auto loss = [](const torch::Tensor& output, const torch::Tensor&) { return output.to(torch::kFloat).sum(); };
  const auto gradient = [&](double strength, double scale) {
    clear_grad({w});
    microreg::Regularizer regularizer(model, loss, microreg::GradientNorm{},
                                      {.strength = strength, .micro_batch_size = 1, .loss_scale = scale});
    const microreg::Report report =
        regularizer.backward(torch::ones({samples}, options), torch::zeros({samples}, device));
    return std::make_pair(w.grad().to(torch::kFloat64).mean().item<double>(), report.penalties[0].value.item<double>());
  };
  const double g = 100 * w.detach()[0].item<double>();
  const double norm = 1000 * g * g;
  for (const double scale : {1.0, 1024.0}) {
    for (const double strength : {1e-2, 1e-3, 1e-4}) {
      const auto [found, value] = gradient(strength, scale);
      INFO(samples << " micro-batches, strength " << strength << ", scale " << scale);
      CHECK(found == Approx(g * (1 + 200 * strength)).epsilon(2e-3));
      CHECK(value == Approx(norm).epsilon(2e-3));
    }
  }
}

}  // namespace helpers
