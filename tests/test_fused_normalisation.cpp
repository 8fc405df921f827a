// What the fused double backward of batch, layer and group normalisation have in common: few elements.
#include "fused_helpers.hpp"

#include <microreg/fused/normalisation.hpp>
#include <microreg/microreg.hpp>

#include <cmath>
#include <cstdint>
#include <functional>
#include <vector>

using namespace helpers;

namespace {

struct Normalisation {
  const char* name;
  std::function<torch::Tensor(const torch::Tensor& rows)> apply;  // normalises each row of a matrix
};

const std::vector<Normalisation> normalisations = {
    {"batch",
     [](const torch::Tensor& rows) { return torch::batch_norm(rows.t(), {}, {}, {}, {}, true, 0.1, 1e-5, false).t(); }},
    {"batch, channels-last",
     [](const torch::Tensor& rows) {
       const torch::Tensor maps = rows.t().reshape({rows.size(1), rows.size(0), 1, 1});
       return torch::batch_norm(maps, {}, {}, {}, {}, true, 0.1, 1e-5, false).flatten(1).t();
     }},
    {"layer", [](const torch::Tensor& rows) { return torch::layer_norm(rows, {rows.size(1)}); }},
    {"group", [](const torch::Tensor& rows) { return torch::group_norm(rows.unsqueeze(0), rows.size(0)).squeeze(0); }},
    {"group, two channels",
     [](const torch::Tensor& rows) {
       const torch::Tensor maps = rows.reshape({1, 2 * rows.size(0), rows.size(1) / 2});
       return torch::group_norm(maps, rows.size(0)).reshape(rows.sizes());
     }},
};

/// Second derivatives by rows and weight, flat, in float64, of what stands before and behind a normalisation. In
/// float32 and in float64 of the same numbers.
torch::Tensor second_derivative(const Normalisation& normalisation, const torch::Tensor& rows, torch::Dtype type,
                                bool fused) {
  const microreg::FusedScope scope(fused);
  torch::manual_seed(3);
  const torch::Tensor weight = (torch::rand({rows.size(1)}) + 0.5).to(type).requires_grad_();
  const torch::Tensor x = rows.to(type).clone().requires_grad_();
  const torch::Tensor y = normalisation.apply(x + 0.1 * x.pow(2)) * weight;
  const auto first = torch::autograd::grad({(y * y.sin()).sum()}, {x, weight}, {}, true, true);
  const torch::Tensor combination =
      (first[0] * torch::randn(x.sizes()).to(type)).sum() + (first[1] * torch::randn(weight.sizes()).to(type)).sum();
  const auto second = torch::autograd::grad({combination}, {x, weight});
  return torch::cat({second[0].flatten(), second[1].flatten()}).to(torch::kFloat64);
}

}  // namespace

// LibTorch's own cancels in float32, by an amount that differs from row to row: the mean of its logarithm is compared.
TEST_CASE("of two elements fused normalisation loses less than LibTorch in float32", "[fused]") {
  for (const Normalisation& normalisation : normalisations) {
    double gain = 0;
    constexpr std::uint64_t seeds = 100;
    for (std::uint64_t seed = 0; seed < seeds; ++seed) {
      torch::manual_seed(seed);
      const torch::Tensor rows = torch::randn({40, 2}) + 1;
      const torch::Tensor exact = second_derivative(normalisation, rows, torch::kFloat64, false);
      const auto off = [&](bool fused) {
        return relative_error(second_derivative(normalisation, rows, torch::kFloat32, fused), exact);
      };
      gain += std::log(off(false) / off(true)) / static_cast<double>(seeds);
    }
    INFO(normalisation.name << ": " << std::exp(gain) << " times");
    CHECK(std::exp(gain) > 1.1);
  }
}

TEST_CASE("of few elements fused normalisation is differentiated in every type and order", "[fused]") {
  for (const Normalisation& normalisation : normalisations) {
    for (const std::int64_t elements : {2, 4, 16}) {
      INFO(normalisation.name << " over " << elements);
      torch::manual_seed(4);
      const torch::Tensor rows = torch::randn({9, elements}) + 1;
      const torch::Tensor exact = second_derivative(normalisation, rows, torch::kFloat64, false);
      CHECK(relative_error(second_derivative(normalisation, rows, torch::kFloat64, true), exact) < 1e-11);
      CHECK(relative_error(second_derivative(normalisation, rows, torch::kFloat32, true), exact) < 1e-3);
      // The third order in float32, against that in float64.
      const auto third = [&](torch::Dtype type) {
        const microreg::FusedScope scope;
        const torch::Tensor x = rows.to(type).clone().requires_grad_();
        const torch::Tensor y = normalisation.apply(x + 0.1 * x.pow(2));
        const torch::Tensor first = torch::autograd::grad({(y * y.sin()).sum()}, {x}, {}, true, true)[0];
        const torch::Tensor second = torch::autograd::grad({first.square().sum()}, {x}, {}, true, true)[0];
        return torch::autograd::grad({second.square().sum()}, {x})[0].to(torch::kFloat64);
      };
      CHECK(relative_error(third(torch::kFloat32), third(torch::kFloat64)) < (elements > 2 ? 1e-4 : 0.1));
    }
  }
}
