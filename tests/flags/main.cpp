/// @file
/// What a user's compiler flags might break, in one small program without a test framework: numbers against a formula,
/// checks for NaN, gates, threads and errors. tests/check_flags.sh builds and runs it with each of them.
#include <torch/nn/modules/activation.h>
#include <torch/nn/modules/batchnorm.h>
#include <torch/nn/modules/container/sequential.h>
#include <torch/nn/modules/dropout.h>
#include <torch/nn/modules/linear.h>
#include <microreg/detail/finite.hpp>
#include <microreg/gates/scope.hpp>
#include <microreg/grafting.hpp>
#include <microreg/microreg.hpp>
#include <microreg/verify.hpp>

#include <cstdio>
#include <cstdlib>
#include <string>

#if defined(_OPENMP)
#include <omp.h>
#endif

namespace {

int checks = 0;
int failures = 0;

void check(bool holds, const char* what) {
  ++checks;
  if (!holds) {
    std::printf("not so: %s\n", what);
    ++failures;
  }
}

// LibTorch makes them: what a compiler with -ffast-math makes of such a constant is anybody's guess.
torch::Tensor endless() { return at::full({}, 1.0, at::kDouble).div(0); }
double nan() { return endless().sub(endless()).item<double>(); }

template <class Wanted, class Function>
bool throws(const Function& function) {
  try {
    function();
  } catch (const Wanted&) {
    return true;
  } catch (const std::exception& other) {
    std::printf("another error: %s\n", other.what());
  }
  return false;
}

torch::Tensor numbers(at::IntArrayRef shape) {
  return at::arange(at::zeros(shape).numel(), at::kDouble).mul(1.7).sin().view(shape);
}

torch::Tensor squared_error(const torch::Tensor& output, const torch::Tensor& target) {
  return (output - target).pow(2).mean();
}

/// Two layers with a ReLU between them.
struct Network {
  torch::nn::Linear first{3, 4}, second{4, 2};
  torch::nn::Sequential layers{first, torch::nn::ReLU(), second};
  torch::Tensor x = numbers({6, 3}), y = numbers({6, 2});

  Network() {
    layers->to(at::kDouble);
    const at::NoGradGuard guard;
    for (torch::Tensor& parameter : layers->parameters()) {
      parameter.copy_(numbers(parameter.sizes()));
    }
  }

  /// What a step adds to .grad, all of it in one row.
  torch::Tensor step(const microreg::RegularizerOptions& options) {
    layers->zero_grad();
    microreg::Regularizer regularizer(layers, squared_error, microreg::GradientNorm{}, options);
    regularizer.backward(x, y);
    return gradient();
  }

  torch::Tensor gradient() const {
    std::vector<torch::Tensor> rows;
    for (const torch::Tensor& parameter : layers->parameters()) {
      rows.push_back(parameter.grad().flatten());
    }
    return at::cat(rows);
  }

  /// The same by LibTorch alone, micro-batch by micro-batch.
  torch::Tensor textbook(double strength, std::int64_t size) {
    layers->zero_grad();
    for (std::int64_t begin = 0; begin < x.size(0); begin += size) {
      const torch::Tensor loss = squared_error(layers->forward(x.narrow(0, begin, size)), y.narrow(0, begin, size));
      torch::Tensor objective = loss;
      for (const torch::Tensor& g : torch::autograd::grad({loss}, layers->parameters(), {}, true, true)) {
        objective = objective + strength * g.pow(2).sum();
      }
      (objective * (static_cast<double>(size) / static_cast<double>(x.size(0)))).backward();
    }
    return gradient();
  }
};

bool near(const torch::Tensor& found, const torch::Tensor& right, double share) {
  return (found - right).norm().item<double>() < share * right.norm().item<double>();
}

void check_numbers() {
  Network network;
  check(microreg::verify(network.layers, squared_error, microreg::GradientNorm{}, network.x, network.y,
                         {.strength = 0.3, .micro_batch_size = 2})
            .ok(),
        "verify finds nothing wrong");
  const torch::Tensor right = network.textbook(0.3, 2);
  check(near(network.step({.strength = 0.3, .micro_batch_size = 2}), right, 1e-9),
        "Exact gives the textbook's gradient");
  check(near(network.step({.strength = 0.3, .micro_batch_size = 2, .estimator = microreg::CentralDifference{}}), right,
             1e-4),
        "a central difference comes near to it");
}

void check_not_finite() {
  using microreg::NonFiniteError;
  Network network;
  network.x[3][1] = nan();
  check(throws<NonFiniteError>([&] { network.step({.strength = 0.3, .micro_batch_size = 2}); }), "NaN is refused");
  check(throws<NonFiniteError>([&] {
          network.step({.strength = 0.3, .micro_batch_size = 2, .estimator = microreg::ForwardDifference{}});
        }),
        "NaN is refused under a difference, as such");
  check(!network.layers->parameters()[0].grad().defined(), "nothing has reached .grad");
  const auto take = [](double strength) { Network().step({.strength = strength, .micro_batch_size = 2}); };
  check(throws<microreg::OptionError>([&] { take(nan()); }), "a strength of NaN is refused");
  check(throws<microreg::OptionError>([&] { take(endless().item<double>()); }), "an infinite strength is refused");
  check(throws<microreg::OptionError>(
            [] { Network().step({.strength = 0.3, .micro_batch_size = 2, .sampling = {.share = nan()}}); }),
        "a share of NaN is refused");
  check(!microreg::verify(network.layers, squared_error, microreg::GradientNorm{}, network.x.narrow(0, 2, 2),
                          network.y.narrow(0, 2, 2), {.strength = 0.3, .micro_batch_size = 2})
             .ok(),
        "verify sees NaN");
  check(microreg::detail::exceeds(nan(), 1) && microreg::detail::exceeds(endless().item<double>(), 1) &&
            !microreg::detail::exceeds(0.5, 1),
        "an error of NaN exceeds what is allowed");
  check(throws<microreg::OptionError>([] { (void)microreg::Gaussian{nan()}.sample({}, {}); }),
        "a standard deviation of NaN is refused");
  Network other;
  other.step({.strength = 0.3, .micro_batch_size = 2});
  check(throws<microreg::Error>([&] { microreg::graft(other.layers->parameters(), nan()); }),
        "grafting onto NaN is refused");
}

/// What is known of a network by the operations that it calls.
void check_watches() {
  torch::manual_seed(1);
  torch::nn::Sequential layers(torch::nn::Linear(3, 4), torch::nn::BatchNorm1d(4), torch::nn::Dropout(0.5),
                               torch::nn::Linear(4, 2));
  const torch::Tensor x = at::randn({8, 3}), y = at::randn({8, 2});
  const std::string said =
      microreg::verify(layers, squared_error, microreg::GradientNorm{}, x, y, {.micro_batch_size = 4}).text();
  check(said.find("1 batch normalisation takes") != std::string::npos, "verify sees batch normalisation");
  check(said.find("1 dropout is on") != std::string::npos, "verify sees dropout");

  // Two workers, of a network whose graph reads what its next forward pass writes to.
  torch::nn::Linear layer(3, 2);
  layer->register_buffer("u", at::ones({2}));
  const auto step = [&](std::int64_t workers) {
    layer->zero_grad();
    torch::Tensor u = layer->named_buffers()["u"];
    u.fill_(1);
    const microreg::FunctionModel model{[&](const torch::Tensor& input) {
                                          {
                                            const at::NoGradGuard no_grad;
                                            u.mul_(1.25);
                                          }
                                          return layer->forward(input) * u.as_strided({2}, {1});
                                        },
                                        layer->parameters(),
                                        {u}};
    microreg::Regularizer regularizer(model, squared_error, microreg::GradientNorm{},
                                      {.strength = 0.3, .micro_batch_size = 1, .workers = workers});
    regularizer.backward(x, y);
    return at::cat({layer->weight.grad().flatten(), layer->bias.grad()});
  };
  const torch::Tensor right = step(1);
  bool same = true;
  for (int repeat = 0; repeat < 20; ++repeat) {
    same = same && at::equal(step(2), right);
  }
  check(same, "workers wait where a graph reads what is written to");
}

std::size_t gates_of(const torch::Tensor& x, const at::Scalar& order) {
  microreg::GateTape tape;
  const microreg::RecordGates record(tape);
  (void)at::linalg_vector_norm(x, order);
  return tape.size();
}

void check_gates() {
  const torch::Tensor x = numbers({5}).requires_grad_();
  check(gates_of(x, endless().item()) > 0, "a maximum norm has gates");
  check(gates_of(x, 1) > 0, "a norm of order 1 has gates");

  const torch::Tensor expected = at::where(x.gt(0.1), x + 0.5, at::full({}, 0.1, at::kDouble));
  microreg::GateTape tape;
  {
    const microreg::RecordGates record(tape);
    (void)x.clamp_min(0.1);
  }
  torch::Tensor moved;
  {
    const microreg::ReplayGates replay(tape, microreg::Keep::no);
    moved = (x + 0.5).clamp_min(0.1);
  }
  check(moved.allclose(expected), "a clamp without an upper bound is frozen at its lower one");
}

#if defined(_OPENMP)
/// The penalty's gradient through loops that are long enough for LibTorch's own threads.
torch::Tensor through_long_loops() {
  const torch::Tensor w = numbers({1 << 17}).requires_grad_();
  const microreg::FusedScope scope;
  const torch::Tensor loss = at::gelu(w).view({1 << 10, 1 << 7}).softmax(1).square().sum();
  return torch::autograd::grad({microreg::GradientNorm{}(loss, {w})}, {w})[0];
}

/// Steps in the user's own parallel region, whatever runs it, and loops on LibTorch's threads before and inside of it.
void check_threads() {
  at::set_num_threads(2);
  Network network;
  const torch::Tensor right = network.textbook(0.3, 2);
  const torch::Tensor right_of_loops = through_long_loops();
  int good = 0, ran = 0;
#pragma omp parallel num_threads(2) reduction(+ : good, ran)
  {
    Network own;
    ++ran;
    const bool step = near(own.step({.strength = 0.3, .micro_batch_size = 2}), right, 1e-9);
    good += step && near(through_long_loops(), right_of_loops, 1e-12) ? 1 : 0;
  }
  check(ran == 2 && good == ran, "a step on each thread of a parallel region is right");
  check(near(through_long_loops(), right_of_loops, 1e-12), "LibTorch's threads work behind the region as before");
}
#endif

}  // namespace

int main() {
  std::setvbuf(stdout, nullptr, _IONBF, 0);  // what was found before a crash
  check_numbers();
  check_not_finite();
  check_watches();
  check_gates();
#if defined(_OPENMP)
  check_threads();
#endif
  std::printf("%d of %d checks passed\n", checks - failures, checks);
  return failures == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}
