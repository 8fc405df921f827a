/// @file
/// Which of the faults of docs/libtorch-bugs.md this LibTorch has, each tried in a process of its own:
///
///     operation | seen, crash (it ended by a signal), refused (by an error) or no
///
/// For tests/check_versions.sh --faults. ONEDNN_MAX_CPU_ISA=AVX2 lets a processor with AVX-512 try the first one too.
#include <torch/torch.h>

#include <sys/wait.h>
#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <exception>
#include <functional>
#include <utility>
#include <vector>

namespace {

using torch::Tensor;

bool differ(const Tensor& one, const Tensor& other, double tolerance) {
  return !torch::allclose(one.to(torch::kFloat64), other.to(torch::kFloat64), tolerance, tolerance);
}

Tensor channels_last(const Tensor& x) { return x.contiguous(torch::MemoryFormat::ChannelsLast); }

Tensor gradient(const Tensor& y, const Tensor& x) { return torch::autograd::grad({y}, {x}, {}, true, true)[0]; }

bool pointwise_strided_convolution() {
  for (const std::int64_t channels : {3, 4, 5}) {
    const auto gradients = [&](torch::ScalarType type) {
      torch::manual_seed(1);
      const Tensor x = torch::randn({4, channels, 8, 8}).to(type);
      const Tensor w = channels_last(torch::randn({10, channels, 1, 1}).to(type)).requires_grad_();
      return torch::autograd::grad({torch::conv2d(channels_last(x).requires_grad_(), w, {}, 2).square().sum()}, {w})[0];
    };
    if (differ(gradients(torch::kFloat32), gradients(torch::kFloat64), 1e-2)) {
      return true;
    }
  }
  return false;
}

bool group_norm_of_a_first_layer() {
  const Tensor weight = torch::ones({4}, torch::requires_grad());
  torch::group_norm(channels_last(torch::randn({2, 4, 3, 3})), 2, weight).square().sum().backward();
  return false;
}

bool batch_norm_of_one_sample() {
  const Tensor x = torch::randn({1, 2, 8, 7});
  const Tensor w = torch::ones({2});
  const auto made = torch::native_batch_norm(x, w, {}, {}, {}, true, 0.1, 1e-5);
  const Tensor g = torch::randn({1, 8, 7, 2}).permute({0, 3, 1, 2}).as_strided({1, 2, 8, 7}, {2, 1, 14, 2});
  const auto of_weight = [&](const Tensor& each) {
    return std::get<1>(torch::native_batch_norm_backward(each, x, w, {}, {}, std::get<1>(made), std::get<2>(made), true,
                                                         1e-5, {true, true, true}));
  };
  return differ(of_weight(g), of_weight(g.contiguous()), 1e-3);
}

bool window_without_an_element() {
  const auto [value, index] = torch::max_pool2d_with_indices(torch::zeros({1, 1, 1, 1}), 2, 1, 1, 2);
  return value.isneginf().any().item<bool>() || index.ne(0).any().item<bool>();
}

bool weight_norm() {
  const Tensor v = torch::randn({3, 4}, torch::kFloat64).requires_grad_();
  const Tensor g = torch::rand({3, 1}, torch::kFloat64);
  const auto second = [&](const Tensor& w) { return gradient(gradient(w.pow(3).sum(), v).square().sum(), v); };
  return differ(second(torch::_weight_norm(v, g, 0)), second(v * (g / v.norm(2, {1}, true))), 1e-6);
}

bool hardsigmoid_without_a_second_derivative() {
  const Tensor x = torch::randn({5}, torch::kFloat64).requires_grad_();
  try {
    const Tensor first = gradient(torch::hardsigmoid(x).square().sum(), x);
    return differ(gradient(first.sum(), x), torch::full({5}, 2.0 / 36.0).to(torch::kFloat64) * (x.abs() < 3), 1e-6);
  } catch (const std::exception&) {
    return true;
  }
}

bool celu_with_a_rounded_constant() {
  const Tensor x = torch::full({3}, -1.0, torch::kFloat64).requires_grad_();
  return differ(gradient(torch::celu(x, 0.7).sum(), x), (x / 0.7).exp(), 1e-12);
}

/// The first derivative in float32 of groups of two elements, beside the centred formula in float32.
bool group_norm_over_few_elements() {
  const Tensor values = torch::randn({64, 8}) + 3;
  const Tensor direction = torch::randn({64, 8});
  const auto derivative = [&](torch::ScalarType type, bool by_hand) {
    const Tensor x = values.to(type).requires_grad_();
    const Tensor groups = x.view({64, 4, 2});
    const Tensor centred = groups - groups.mean({2}, true);
    const Tensor y =
        by_hand ? (centred * (centred.square().mean({2}, true) + 1e-5).rsqrt()).view({64, 8}) : torch::group_norm(x, 4);
    return torch::autograd::grad({(y * direction.to(type)).sum()}, {x})[0].to(torch::kFloat64);
  };
  const Tensor right = derivative(torch::kFloat64, true);
  const auto error = [&](bool by_hand) { return (derivative(torch::kFloat32, by_hand) - right).norm().item<double>(); };
  return error(false) > 2 * error(true);
}

bool hardswish_at_its_kinks() {
  for (const double kink : {-3.0, 3.0}) {
    const Tensor x = torch::full({19}, kink).requires_grad_();
    const Tensor g = torch::autograd::grad({torch::hardswish(x).sum()}, {x})[0];
    if (g.eq(-0.5).any().item<bool>() || g.eq(1.5).any().item<bool>()) {
      return true;
    }
  }
  return false;
}

/// Of a normalisation over the dimension, beside the same by elementary operations.
bool third_derivative(const std::function<Tensor(const Tensor&)>& normalised, std::int64_t dimension) {
  const Tensor x = torch::randn({6, 5}, torch::kFloat64).requires_grad_();
  const Tensor u = torch::randn({6, 5}, torch::kFloat64);
  const auto third = [&](const Tensor& y) {
    Tensor result = y.pow(3).sum();
    for (int order = 0; order < 3; ++order) {
      result = (gradient(result, x) * u).sum();
    }
    return result;
  };
  const Tensor centred = x - x.mean({dimension}, true);
  return differ(third(normalised(x)), third(centred * (centred.square().mean({dimension}, true) + 1e-5).rsqrt()), 1e-6);
}

bool third_derivative_of_layer_norm() {
  return third_derivative([](const Tensor& x) { return torch::layer_norm(x, {5}); }, 1);
}

bool third_derivative_of_batch_norm() {
  return third_derivative([](const Tensor& x) { return torch::batch_norm(x, {}, {}, {}, {}, true, 0.1, 1e-5, false); },
                          0);
}

const char* outcome(bool (*is_seen)()) {
  const pid_t child = fork();
  if (child == 0) {
    alarm(60);  // some hang
    torch::manual_seed(0);
    try {
      _exit(is_seen() ? 1 : 0);
    } catch (const std::exception&) {
      _exit(2);
    }
  }
  int status = 0;
  waitpid(child, &status, 0);
  return WIFSIGNALED(status)        ? "crash"
         : WEXITSTATUS(status) == 0 ? "no"
         : WEXITSTATUS(status) == 1 ? "seen"
                                    : "refused";
}

}  // namespace

int main() {
  const std::vector<std::pair<const char*, bool (*)()>> faults{
      {"1x1 convolution with a stride", pointwise_strided_convolution},
      {"group_norm that needs no input gradient", group_norm_of_a_first_layer},
      {"batch normalisation of one sample", batch_norm_of_one_sample},
      {"max pooling without an element", window_without_an_element},
      {"_weight_norm", weight_norm},
      {"hardsigmoid", hardsigmoid_without_a_second_derivative},
      {"celu", celu_with_a_rounded_constant},
      {"hardswish", hardswish_at_its_kinks},
      {"group_norm over few elements", group_norm_over_few_elements},
      {"third derivative of layer normalisation", third_derivative_of_layer_norm},
      {"third derivative of batch normalisation", third_derivative_of_batch_norm}};
  for (const auto& [name, is_seen] : faults) {
    std::printf("%s | %s\n", name, outcome(is_seen));
    std::fflush(stdout);
  }
}
