// FusedScope as a citizen: what it leaves alone, nesting, threads, exceptions, and Regularizer's use of it.
#include "fused_helpers.hpp"
#include "networks.hpp"

#include <c10/util/Exception.h>
#include <microreg/detail/interceptors.hpp>
#include <microreg/detail/plain_tensors.hpp>
#include <microreg/microreg.hpp>

#include <cstdlib>
#include <filesystem>
#include <memory>
#include <string>
#include <thread>

using namespace helpers;

namespace {

/// A network with convolution and batch normalisation, and a batch for it; the same for the same seed.
struct Problem {
  networks::Cnn model = nullptr;
  networks::Samples samples;

  explicit Problem(std::uint64_t seed) {
    torch::manual_seed(seed);
    model = networks::Cnn(networks::Norm::batch, networks::Activation::smooth);
    model->to(torch::kFloat64);
    samples = networks::images(10);
  }
};

torch::Tensor cross_entropy_of(Problem& problem) {
  return torch::nn::functional::cross_entropy(problem.model->forward(problem.samples.input), problem.samples.target);
}

struct Convolution {
  torch::Tensor x;
  torch::Tensor w;

  explicit Convolution(torch::TensorOptions options = {})
      : x(torch::randn({2, 3, 6, 6}, options).requires_grad_()),
        w(torch::randn({4, 3, 3, 3}, options).requires_grad_()) {}

  /// Whether a backward pass now is recorded by us.
  [[nodiscard]] bool is_fused() const {
    const auto y = torch::conv2d(x, w);
    return graph_has(torch::autograd::grad({y.pow(2).sum()}, {x, w}, {}, true, true), "microreg");
  }
};

class Warnings : public c10::WarningHandler {
 public:
  void process(const c10::Warning& warning) override { messages.push_back(warning.msg()); }
  std::vector<std::string> messages;
};

}  // namespace

TEST_CASE("a scope ends where it ends, nested ones too", "[fused]") {
  const Convolution convolution;
  CHECK_FALSE(convolution.is_fused());
  {
    const microreg::FusedScope outer;
    CHECK(convolution.is_fused());
    {
      const microreg::FusedScope inner;
      CHECK(convolution.is_fused());
    }
    CHECK(convolution.is_fused());
  }
  CHECK_FALSE(convolution.is_fused());
}

TEST_CASE("scopes that end in another order than they began, InferenceMode between", "[fused]") {
  const Convolution convolution;
  auto first = std::make_unique<microreg::FusedScope>();
  {
    const c10::InferenceMode inference;
    auto second = std::make_unique<microreg::FusedScope>();
    first.reset();
  }
  auto third = std::make_unique<microreg::FusedScope>();
  auto fourth = std::make_unique<microreg::FusedScope>();
  CHECK(convolution.is_fused());
  third.reset();
  fourth.reset();
  CHECK_FALSE(convolution.is_fused());
  {
    const microreg::FusedScope scope;
    CHECK(convolution.is_fused());
  }
  CHECK_FALSE(convolution.is_fused());
}

TEST_CASE("an exception leaves the scope as its end does", "[fused]") {
  const Convolution convolution;
  try {
    const microreg::FusedScope scope;
    throw std::runtime_error("inside");
  } catch (const std::runtime_error&) {
  }
  CHECK_FALSE(convolution.is_fused());
}

TEST_CASE("a scope entered and left ten thousand times warns about nothing", "[fused]") {
  Warnings warnings;
  const c10::WarningUtils::WarningHandlerGuard guard(&warnings);
  const Convolution convolution;
  for (int i = 0; i < 10000; ++i) {
    const microreg::FusedScope scope;
  }
  CHECK_FALSE(convolution.is_fused());
  {
    const microreg::FusedScope scope;
    CHECK(convolution.is_fused());
  }
  CHECK(warnings.messages.empty());
}

TEST_CASE("a scope is its own thread's", "[fused]") {
  const Convolution convolution;
  const microreg::FusedScope scope;
  bool other = true;
  std::thread([&] { other = convolution.is_fused(); }).join();
  CHECK_FALSE(other);
  CHECK(convolution.is_fused());
}

TEST_CASE("threads that step at once get what one thread gets", "[fused]") {
  const auto step = [](Problem& problem) {
    microreg::Regularizer regularizer(problem.model, torch::nn::CrossEntropyLoss(), microreg::GradientNorm{},
                                      {.strength = 0.1, .micro_batch_size = 4});
    for (int i = 0; i < 5; ++i) {
      regularizer.backward(problem.samples.input, problem.samples.target);
    }
    return flat_grad(problem.model->parameters());
  };
  std::vector<Problem> problems;
  std::vector<torch::Tensor> alone;
  for (std::uint64_t seed = 0; seed < 4; ++seed) {
    Problem problem(seed);
    alone.push_back(step(problem));
    problems.emplace_back(seed);
  }
  std::vector<torch::Tensor> together(4);
  std::vector<std::thread> threads;
  for (std::size_t i = 0; i < 4; ++i) {
    threads.emplace_back([&, i] { together[i] = step(problems[i]); });
  }
  for (std::thread& thread : threads) {
    thread.join();
  }
  for (std::size_t i = 0; i < 4; ++i) {
    CHECK(relative_error(together[i], alone[i]) < 1e-10);
  }
}

TEST_CASE("half types are ours too, other devices get LibTorch's own result", "[fused]") {
  const microreg::FusedScope scope;
  CHECK(Convolution(torch::kFloat32).is_fused());
  CHECK(Convolution(torch::kFloat64).is_fused());
  CHECK(Convolution(torch::kBFloat16).is_fused());
  // LibTorch has no convolution on the meta device outside Python, so ask the gate itself.
  const auto on = [](torch::Device device) {
    return torch::empty({2}, torch::TensorOptions(device).requires_grad(true));
  };
  CHECK(microreg::detail::should_fuse({on(torch::kCPU)}, microreg::detail::HalfTypes::as_they_are));
  CHECK_FALSE(microreg::detail::should_fuse({on(torch::kMeta)}, microreg::detail::HalfTypes::as_they_are));
}

TEST_CASE("without create_graph nothing is intercepted", "[fused]") {
  const Convolution convolution;
  const auto gradient = [&] {
    return torch::autograd::grad({torch::conv2d(convolution.x, convolution.w).pow(2).sum()}, {convolution.w})[0];
  };
  const auto stock = gradient();
  const microreg::FusedScope scope;
  CHECK(same_bits(gradient(), stock));
}

namespace {

torch::Tensor gradient_of_step(bool fused) {
  const Problem problem(1);
  microreg::Regularizer regularizer(problem.model, torch::nn::CrossEntropyLoss(), microreg::GradientNorm{},
                                    {.strength = 0.1, .micro_batch_size = 4, .fused = fused});
  regularizer.backward(problem.samples.input, problem.samples.target);
  return flat_grad(problem.model->parameters());
}

}  // namespace

TEST_CASE("Regularizer fuses by default, and the option turns it off", "[fused]") {
  const auto stock = gradient_of_step(false);
  const auto fused = gradient_of_step(true);
  CHECK(relative_error(fused, stock) < 1e-9);
  CHECK_FALSE(same_bits(fused, stock));  // Another order of summation: the fused kernels did run.
}

TEST_CASE("where MICROREG_FUSED=0 nothing is fused", "[.][environment]") {
  if (std::getenv("MICROREG_FUSED") == nullptr) {  // NOLINT(concurrency-mt-unsafe)
    SUCCEED("for a process that has it");
    return;
  }
  REQUIRE_FALSE(microreg::FusedScope::enabled());
  CHECK(same_bits(gradient_of_step(true), gradient_of_step(false)));
}

TEST_CASE("MICROREG_FUSED turns scopes off when the process begins", "[fused]") {
  // It is read once, so the test above needs a process of its own.
  const std::string command = "MICROREG_FUSED=0 '" + std::filesystem::read_symlink("/proc/self/exe").string() +
                              "' 'where MICROREG_FUSED=0 nothing is fused' > /dev/null";
  CHECK(std::system(command.c_str()) == 0);  // NOLINT(concurrency-mt-unsafe)
}

TEST_CASE("the functor inside a scope equals the functor outside", "[fused]") {
  const auto gradient = [](bool fused) {
    const microreg::FusedScope scope(fused);
    Problem problem(1);
    const auto loss = cross_entropy_of(problem);
    (loss + 0.1 * microreg::GradientNorm{}(loss, problem.model->parameters())).backward();
    return flat_grad(problem.model->parameters());
  };
  CHECK(relative_error(gradient(true), gradient(false)) < 1e-9);
}

TEST_CASE("a penalty of the functor inside a scope has a third derivative, and outside it is refused", "[fused]") {
  const auto penalty = [](Problem& problem) {
    return microreg::GradientNorm{}(cross_entropy_of(problem), problem.model->parameters());
  };
  Problem problem(1);
  const auto parameters = problem.model->parameters();
  torch::Tensor third;
  {
    const microreg::FusedScope scope;
    const auto second = torch::autograd::grad({penalty(problem)}, parameters, {}, true, /*create_graph=*/true);
    third = torch::autograd::grad({second[0].pow(2).sum()}, {parameters[0]})[0];
  }
  // Against a central difference of LibTorch's second derivative.
  const torch::Tensor direction = torch::randn_like(parameters[0]);
  const auto moved = [&](double step) {
    const torch::NoGradGuard no_graph;
    parameters[0].add_(direction, step);
    const torch::AutoGradMode graph(true);
    return torch::autograd::grad({penalty(problem)}, {parameters[0]})[0].pow(2).sum().item<double>();
  };
  const double step = 1e-5;
  const double difference = (moved(step) - moved(-2 * step)) / (2 * step);
  CHECK((third * direction).sum().item<double>() == Approx(difference).epsilon(1e-6));

  CHECK(has(message_of<microreg::ModelError>(
                [&] { std::ignore = torch::autograd::grad({penalty(problem)}, parameters, {}, true, true); }),
            {"third derivative", "create_graph", "FusedScope"}));
}

TEST_CASE("an operation that this LibTorch does not have, or has otherwise, is left to it by name", "[fused]") {
  struct Refuses final : c10::OperatorKernel {
    void operator()(const c10::OperatorHandle&, c10::DispatchKeySet, torch::jit::Stack*) { FAIL("it was registered"); }
  };
  using microreg::detail::Interceptors;
  Warnings warnings;
  const c10::WarningUtils::WarningHandlerGuard guard(&warnings);
  Interceptors interceptors;
  const auto add = [&](const std::string& operation, bool fits) {
    const microreg::detail::Registering registering;
    const char* why =
        interceptors.add(operation, [=](const c10::FunctionSchema&) { return fits; }, std::make_unique<Refuses>());
    Interceptors::report(operation, why);
    return std::string(why == nullptr ? "" : why);
  };
  CHECK(add("aten::no_such_operation", true) == "is unknown to it");
  CHECK(add("aten::erfinv", false) == "has other arguments there");
  // Nor one that may not be intercepted: this one is in another library than the kernels are.
  CHECK(add("microreg::version", true) == "lets nobody in front of it");
  REQUIRE(warnings.messages.size() == 3);
  CHECK(has(warnings.messages[0], {"aten::no_such_operation", "is unknown to it"}));
  CHECK(has(warnings.messages[1], {"aten::erfinv", "has other arguments there"}));
  CHECK(has(warnings.messages[2], {"microreg::version", "lets nobody in front of it"}));

  // Such an operation runs as it is, in a scope as outside of one.
  const torch::Tensor x = torch::full({3}, 0.3, torch::kFloat64).requires_grad_();
  const auto second = [&](bool fused) {
    const microreg::FusedScope scope(fused);
    const torch::Tensor first = torch::autograd::grad({torch::erfinv(x).sum()}, {x}, {}, true, true)[0];
    return torch::autograd::grad({first.sum()}, {x})[0];
  };
  CHECK(second(true).equal(second(false)));
}
