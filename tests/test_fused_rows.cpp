// Double backward of what is normalised over rows, where a row is short or has no variance, against float64.
#include "fused_helpers.hpp"

#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

using namespace helpers;
using torch::Tensor;

namespace {

struct Normalised {
  std::string name;
  std::vector<std::int64_t> shape;
  std::int64_t channels;
  Function function;
};

/// Everything over rows of n elements, and of 2n and 4n where there are channels or planes.
std::vector<Normalised> over_rows_of(std::int64_t n) {
  const auto group = [](std::int64_t groups) -> Function {
    return [=](const std::vector<Tensor>& in) { return torch::group_norm(in[0], groups, in[1], in[2]); };
  };
  const Function layer = [=](const std::vector<Tensor>& in) { return torch::layer_norm(in[0], {n}, in[1], in[2]); };
  const Function batch = [](const std::vector<Tensor>& in) {
    return torch::batch_norm(in[0], in[1], in[2], {}, {}, /*training=*/true, 0.1, 1e-5, /*cudnn_enabled=*/false);
  };
  const Function softmax = [](const std::vector<Tensor>& in) {
    return torch::softmax(in[0], -1) * in[1].select(0, 0) + in[2].select(0, 0);
  };
  return {{"group, features", {12, 5 * n}, 5 * n, group(5)},
          {"group, planes", {4, 5, n, 1}, 5, group(5)},
          {"group of two", {4, 6, n, 1}, 6, group(3)},
          {"layer", {3, 4, n}, n, layer},
          {"batch, planes", {1, 20, n, 1}, 20, batch},
          {"batch, features", {n, 5}, 5, batch},
          {"batch", {n, 5, 2, 2}, 5, batch},
          {"softmax", {12, n}, n, softmax}};
}

/// Of {x, weight, bias}, dy and what comes in for the backward's results: the derivatives by dy, x, weight.
std::vector<Tensor> double_backward(const Function& function, const std::vector<Tensor>& of, torch::Dtype type,
                                    bool fused) {
  std::vector<Tensor> at;
  std::transform(of.begin(), of.end(), std::back_inserter(at),
                 [&](const Tensor& tensor) { return tensor.to(type).detach(); });
  const std::vector<Tensor> inputs{at[0].requires_grad_(), at[1].requires_grad_(), at[2].requires_grad_()};
  at[3].requires_grad_();
  const microreg::FusedScope scope(fused);
  const auto first = torch::autograd::grad({function(inputs)}, inputs, {at[3]}, true, true);
  std::vector<Tensor> roots, seeds;
  for (std::size_t i = 0; i < first.size(); ++i) {
    if (first[i].requires_grad()) {
      roots.push_back(first[i]);
      seeds.push_back(at[4 + i]);
    }
  }
  auto result = torch::autograd::grad(roots, {at[3], at[0], at[1]}, seeds, std::nullopt, false, true);
  const Tensor like[] = {at[3], at[0], at[1]};
  for (std::size_t i = 0; i < result.size(); ++i) {
    result[i] = result[i].defined() ? result[i] : torch::zeros_like(like[i]);
  }
  return result;
}

/// All results together: one of them may be zero.
double error_of(const std::vector<Tensor>& found, const std::vector<Tensor>& exact) {
  double apart = 0, norm = 0;
  for (std::size_t i = 0; i < exact.size(); ++i) {
    apart = std::hypot(apart, (found[i].to(torch::kFloat64) - exact[i]).norm().item<double>());
    norm = std::hypot(norm, exact[i].norm().item<double>());
  }
  return apart / norm;
}

}  // namespace

TEST_CASE("fused: rows of few elements, or without variance, are as accurate as LibTorch's", "[fused]") {
  for (const std::int64_t n : {1, 2, 3, 5, 17}) {
    for (const Normalised& each : over_rows_of(n)) {
      for (const std::string content : {"random", "constant", "nearly constant", "zero", "incoming constant"}) {
        for (const bool channels_last : {false, true}) {
          for (const torch::Dtype type : {torch::kFloat32, torch::kBFloat16}) {
            const bool one = n == 1 && each.name != "group of two" && each.name != "batch" && each.name != "softmax";
            if ((channels_last && each.shape.size() != 4) || (one && each.name.starts_with("batch"))) {
              continue;
            }
            torch::manual_seed(3);
            std::vector<Tensor> in{torch::randn(each.shape),      torch::rand({each.channels}) + 0.5,
                                   torch::randn({each.channels}), torch::randn(each.shape) + 0.3,
                                   torch::randn(each.shape),      torch::randn({each.channels}),
                                   torch::randn({each.channels})};
            in[0] = content == "constant"          ? torch::full(each.shape, 0.7)
                    : content == "nearly constant" ? 3 + 1e-3 * in[0]
                    : content == "zero"            ? torch::zeros(each.shape)
                                                   : in[0];
            in[4] = content == "incoming constant" ? torch::full(each.shape, 0.7) : in[4];
            for (Tensor& tensor : in) {
              const bool lies = channels_last && tensor.dim() == 4;
              tensor = tensor.to(type).contiguous(lies ? torch::MemoryFormat::ChannelsLast
                                                       : torch::MemoryFormat::Contiguous);
            }
            INFO(each.name << ", rows of " << n << ", " << content << ", " << type << ", channels-last "
                           << channels_last);
            const auto exact = double_backward(each.function, in, torch::kFloat64, false);
            const double ours = error_of(double_backward(each.function, in, type, true), exact);
            const double stock = error_of(double_backward(each.function, in, type, false), exact);
            CAPTURE(stock, ours);
            CHECK(ours <= std::max(3 * stock, type == torch::kFloat32 ? 3e-6 : 2e-2));
            // What is normalised over one element is 0: nothing but the incoming derivative of the bias is left.
            CHECK((!one || ours < 1e-12));
          }
        }
      }
    }
  }
}
