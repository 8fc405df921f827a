// The scopes of the gates: what is recorded and what is not, what a second pass must repeat, and what it is for.
#include "gates_helpers.hpp"

#include <microreg/fused/scope.hpp>

#include <thread>

using namespace helpers;
using microreg::GateTape;
using microreg::Keep;
using microreg::RecordGates;
using microreg::ReplayGates;

namespace {

torch::Tensor normal(const std::vector<std::int64_t>& shape, std::uint64_t seed) {
  auto draw = generator(seed);
  return torch::randn(shape, draw, torch::kFloat64);
}

/// A tape of one relu on two rows of three and one abs on three numbers.
void record_two(GateTape& tape) {
  const RecordGates record(tape);
  torch::relu(normal({2, 3}, 1));
  torch::abs(normal({3}, 2));
}

bool contains(const std::string& text, std::initializer_list<const char*> parts) { return has(text, parts); }

}  // namespace

TEST_CASE("a second pass with another operation is an error that names both", "[gates]") {
  GateTape tape;
  record_two(tape);
  const ReplayGates replay(tape, Keep::no);
  torch::relu(normal({2, 3}, 3));
  const auto message = message_of<microreg::GateError>([&] { torch::max_pool2d(normal({1, 1, 4, 4}, 4), 2); });
  CHECK(contains(message, {"operation 1", "max_pool2d_with_indices", "[1, 1, 4, 4]", "abs", "[3]"}));
}

TEST_CASE("a second pass with another shape is an error that names both", "[gates]") {
  GateTape tape;
  record_two(tape);
  const ReplayGates replay(tape, Keep::no);
  const auto message = message_of<microreg::GateError>([&] { torch::relu(normal({3, 2}, 3)); });
  CHECK(contains(message, {"operation 0", "relu", "[3, 2]", "[2, 3]"}));
}

TEST_CASE("a second pass with more operations is an error", "[gates]") {
  GateTape tape;
  record_two(tape);
  const ReplayGates replay(tape, Keep::no);
  torch::relu(normal({2, 3}, 3));
  torch::abs(normal({3}, 3));
  const auto message = message_of<microreg::GateError>([&] { torch::hardswish(normal({5}, 3)); });
  CHECK(contains(message, {"operation 2", "hardswish", "[5]", "2 such operations"}));
}

TEST_CASE("a second pass with fewer operations is an error when it finishes", "[gates]") {
  GateTape tape;
  record_two(tape);
  const ReplayGates replay(tape, Keep::no);
  CHECK(contains(message_of<microreg::GateError>([&] { replay.finish(); }), {"0 of 2", "relu", "[2, 3]"}));
  torch::relu(normal({2, 3}, 3));
  CHECK(contains(message_of<microreg::GateError>([&] { replay.finish(); }), {"1 of 2", "abs", "[3]"}));
  torch::abs(normal({3}, 3));
  CHECK_NOTHROW(replay.finish());
}

TEST_CASE("a GateError is a ModelError", "[gates]") {
  GateTape tape;
  const ReplayGates replay(tape, Keep::no);
  CHECK_THROWS_AS(torch::relu(normal({2}, 1)), microreg::ModelError);
}

TEST_CASE("gates that an earlier replay released cannot be replayed, kept ones can", "[gates]") {
  GateTape tape;
  record_two(tape);
  for (const Keep keep : {Keep::yes, Keep::yes, Keep::no}) {
    const ReplayGates replay(tape, keep);
    torch::relu(normal({2, 3}, 3));
    torch::abs(normal({3}, 3));
    replay.finish();
  }
  for (const auto& entry : tape.entries()) {
    CHECK(entry.gates.empty());
  }
  const ReplayGates replay(tape, Keep::no);
  CHECK(contains(message_of<microreg::GateError>([&] { torch::relu(normal({2, 3}, 3)); }), {"relu", "Keep::yes"}));
}

TEST_CASE("an output that was overwritten after it was recorded is noticed", "[gates]") {
  GateTape tape;
  {
    const RecordGates record(tape);
    torch::Tensor y = torch::relu(normal({4}, 1).requires_grad_());
    const torch::NoGradGuard no_grad;
    y.add_(1);
  }
  const ReplayGates replay(tape, Keep::no);
  CHECK(contains(message_of<microreg::GateError>([&] { torch::relu(normal({4}, 2)); }), {"relu", "in place"}));
}

TEST_CASE("where nothing is differentiated outputs may be overwritten", "[gates]") {
  GateTape tape;
  const torch::Tensor first = normal({50}, 1);
  const torch::Tensor second = normal({50}, 2);
  {
    const RecordGates record(tape);
    torch::relu(first).add_(1);
  }
  const ReplayGates replay(tape, Keep::no);
  CHECK(same_bits(torch::relu(second), torch::where(first > 0, second, torch::zeros_like(second))));
}

TEST_CASE("gates of a parameter stay when the parameter moves", "[gates]") {
  const std::vector<std::function<torch::Tensor(const torch::Tensor&)>> operations = {
      [](const torch::Tensor& w) { return torch::clamp(w, -0.5, 0.5); },
      [](const torch::Tensor& w) { return torch::leaky_relu(w, 0.1); },
      [](const torch::Tensor& w) { return torch::hardtanh(w.view({4, 5})); },
      [](const torch::Tensor& w) { return torch::threshold(w.t(), 0, 1); },
      [](const torch::Tensor& w) { return torch::hardswish(w); },
      [](const torch::Tensor& w) { return torch::prelu(w, torch::ones({1}, w.options())); },
      [](const torch::Tensor& w) { return torch::relu(w); },
      [](const torch::Tensor& w) {
        const torch::NoGradGuard no_grad;
        return torch::hardtanh(w);
      },
  };
  for (std::size_t i = 0; i < operations.size(); ++i) {
    INFO("operation " << i);
    const torch::Tensor weight = normal({2, 10}, 1).requires_grad_();
    const torch::Tensor first = operations[i](weight).detach();
    GateTape tape;
    {
      const RecordGates record(tape);
      operations[i](weight);
    }
    {
      const torch::NoGradGuard no_grad;
      weight.add_(normal({2, 10}, 2));
      weight.sub_(normal({2, 10}, 2));
    }
    const ReplayGates replay(tape, Keep::no);
    const torch::Tensor second = operations[i](weight).variable_data();
    CHECK((second - first).pow(2).sum().item<double>() < 1e-28);
  }
}

TEST_CASE("the modules of torch::nn have gates", "[gates]") {
  namespace nn = torch::nn;
  const torch::Tensor signal = normal({2, 3, 12}, 1).to(torch::kFloat32).requires_grad_();
  const torch::Tensor image = normal({2, 3, 8, 8}, 1).to(torch::kFloat32).requires_grad_();
  const torch::Tensor volume = normal({2, 3, 6, 6, 6}, 1).to(torch::kFloat32).requires_grad_();
  const auto all = [&] {
    for (const bool in_place : {false, true}) {
      nn::ReLU(nn::ReLUOptions(in_place))(image.clone());
      nn::ReLU6(nn::ReLU6Options().inplace(in_place))(image.clone());
      nn::LeakyReLU(nn::LeakyReLUOptions().inplace(in_place))(image.clone());
      nn::Hardtanh(nn::HardtanhOptions().inplace(in_place))(image.clone());
      nn::Threshold(nn::ThresholdOptions(0, 1).inplace(in_place))(image.clone());
      nn::SELU(nn::SELUOptions(in_place))(image.clone());
      nn::RReLU rrelu(nn::RReLUOptions().inplace(in_place));
      rrelu->eval();
      rrelu(image.clone());
    }
    nn::PReLU()(image);
    nn::Hardshrink()(image);
    nn::Softshrink()(image);
    nn::MaxPool1d(2)(signal);
    nn::MaxPool2d(2)(image);
    nn::MaxPool3d(2)(volume);
    nn::AdaptiveMaxPool1d(2)(signal);
    nn::AdaptiveMaxPool2d(2)(image);
    nn::AdaptiveMaxPool3d(2)(volume);
    nn::L1Loss()(image, torch::zeros_like(image));
  };
  GateTape tape;
  {
    const RecordGates record(tape);
    all();
  }
  CHECK(tape.size() == 2 * 7 + 10);
  const ReplayGates replay(tape, Keep::no);
  all();
  CHECK_NOTHROW(replay.finish());
}

TEST_CASE("smooth operations are LibTorch's", "[gates]") {
  const std::vector<std::function<torch::Tensor(const torch::Tensor&)>> smooth = {
      [](const torch::Tensor& x) { return torch::gelu(x); },
      [](const torch::Tensor& x) { return torch::silu(x); },
      [](const torch::Tensor& x) { return torch::softplus(x); },
      [](const torch::Tensor& x) { return torch::tanh(x); },
      [](const torch::Tensor& x) { return torch::log_softmax(x, 1); },
      [](const torch::Tensor& x) { return torch::avg_pool2d(x, 2); },
      [](const torch::Tensor& x) { return torch::layer_norm(x, x.size(-1)); },
      [](const torch::Tensor& x) { return torch::conv2d(x, torch::ones({2, 3, 3, 3}, x.options())); },
      [](const torch::Tensor& x) { return torch::matmul(x, x); },
      [](const torch::Tensor& x) { return torch::logsumexp(x, 1); },
  };
  const torch::Tensor first = normal({2, 3, 6, 6}, 1);
  const torch::Tensor second = normal({2, 3, 6, 6}, 2);
  for (std::size_t i = 0; i < smooth.size(); ++i) {
    INFO("operation " << i);
    const auto function = [&](const Tensors& at) { return smooth[i](at[0]); };
    const Evaluation stock = evaluate(function, {second});
    GateTape tape;
    {
      const RecordGates record(tape);
      evaluate(function, {first});
    }
    CHECK(tape.empty());
    const ReplayGates replay(tape, Keep::no);
    const Evaluation replayed = evaluate(function, {second});
    CHECK(same_bits(replayed.value, stock.value));
    CHECK(same_bits(replayed.gradients[0], stock.gradients[0]));
  }
}

TEST_CASE("integers have no gates", "[gates]") {
  GateTape tape;
  const RecordGates record(tape);
  const torch::Tensor labels = helpers::tensor({3, -1, 2});
  CHECK(at::equal(torch::clamp(labels, 0, 2), helpers::tensor({2, 0, 2})));
  torch::max(labels);
  torch::relu(labels);
  CHECK(tape.empty());
}

TEST_CASE("composite operations are recorded once", "[gates]") {
  GateTape tape;
  const RecordGates record(tape);
  const torch::Tensor x = normal({2, 3, 8}, 1).requires_grad_();
  torch::relu6(x);
  torch::max_pool1d(x, 2);
  torch::adaptive_max_pool1d(x, 2);
  torch::selu(x);
  torch::nn::functional::l1_loss(x, torch::zeros_like(x));
  torch::rrelu(x);
  torch::nn::functional::prelu(x, torch::ones({3}, torch::kFloat64));
  torch::clip(x, 0, 1);
  torch::max(x, x);
  std::string names;
  for (const auto& entry : tape.entries()) {
    names += std::string(entry.operation) + " ";
  }
  CHECK(names ==
        "hardtanh max_pool2d_with_indices adaptive_max_pool2d elu abs rrelu_with_noise _prelu_kernel clamp maximum ");
}

TEST_CASE("outside of the scopes nothing is recorded and nothing replayed", "[gates]") {
  GateTape tape;
  record_two(tape);
  torch::relu(normal({4}, 1));
  CHECK(tape.size() == 2);
  const torch::Tensor x = normal({2, 3}, 9);
  {
    const ReplayGates replay(tape, Keep::no);
    const torch::Tensor expected = torch::where(normal({2, 3}, 1) > 0, x, torch::zeros_like(x));
    CHECK(same_bits(torch::relu(x), expected));
  }
  CHECK(same_bits(torch::relu(x), x.clamp_min(0)));
}

TEST_CASE("scopes nest: the innermost holds, and the outer one goes on", "[gates]") {
  GateTape outer;
  GateTape inner;
  const RecordGates record(outer);
  torch::relu(normal({1}, 1));
  {
    const RecordGates nested(inner);
    torch::abs(normal({2}, 1));
    {
      const ReplayGates replay(inner, Keep::yes);
      torch::abs(normal({2}, 1));
      replay.finish();
    }
    torch::relu(normal({3}, 1));
  }
  torch::hardswish(normal({4}, 1));
  REQUIRE(inner.size() == 2);
  CHECK(inner.entries()[1].sizes == std::vector<std::int64_t>{3});
  REQUIRE(outer.size() == 2);
  CHECK(outer.entries()[1].sizes == std::vector<std::int64_t>{4});
}

TEST_CASE("a scope that an exception leaves is over", "[gates]") {
  GateTape tape;
  const torch::Tensor x = normal({5}, 1);
  try {
    const RecordGates record(tape);
    torch::relu(x);
    torch::relu(x).matmul(normal({3, 3}, 1));  // throws
  } catch (const c10::Error&) {
  }
  CHECK(tape.size() == 2);
  torch::relu(x);
  CHECK(tape.size() == 2);
  CHECK_FALSE(c10::impl::tls_is_dispatch_key_included(microreg::detail::interception_key));
}

TEST_CASE("an operation that throws is not recorded", "[gates]") {
  GateTape tape;
  const RecordGates record(tape);
  CHECK_THROWS(torch::max_pool2d(normal({1, 1, 2, 2}, 1), 5));
  CHECK(tape.empty());
}

TEST_CASE("recording anew empties the tape", "[gates]") {
  GateTape tape;
  record_two(tape);
  record_two(tape);
  CHECK(tape.size() == 2);
}

TEST_CASE("threads record and replay tapes of their own", "[gates]") {
  std::vector<std::thread> threads;
  std::vector<int> good(4, 0);
  for (std::size_t t = 0; t < good.size(); ++t) {
    threads.emplace_back([t, &good] {
      for (std::int64_t round = 1; round <= 50; ++round) {
        GateTape tape;
        const auto size = static_cast<std::int64_t>(t) + 1;
        const torch::Tensor first = normal({size, round}, t);
        const torch::Tensor second = normal({size, round}, t + 10);
        {
          const RecordGates record(tape);
          torch::relu(first);
          torch::abs(first);
        }
        const ReplayGates replay(tape, Keep::no);
        const bool relu = same_bits(torch::relu(second), torch::where(first > 0, second, torch::zeros_like(second)));
        const bool abs = at::equal(torch::abs(second), second * first.sign());
        replay.finish();
        good[t] += relu && abs ? 1 : 0;
      }
    });
  }
  GateTape mine;
  {
    const RecordGates record(mine);
    for (std::thread& thread : threads) {
      thread.join();
    }
  }
  CHECK(mine.empty());
  CHECK(good == std::vector<int>(good.size(), 50));
}

TEST_CASE("a backward pass inside the scope records nothing", "[gates]") {
  GateTape tape;
  const torch::Tensor x = normal({6}, 1).requires_grad_();
  const RecordGates record(tape);
  const torch::Tensor y = torch::norm(torch::relu(x), 3.0);  // the gradient of this norm calls abs
  const std::size_t before = tape.size();
  torch::autograd::grad({y}, {x}, {}, true, true);
  CHECK(tape.size() == before);
}

TEST_CASE("FusedScope and the gates share their key", "[gates]") {
  GateTape tape;
  const torch::Tensor x = normal({6}, 1);
  {
    const microreg::FusedScope fused;
    torch::relu(x);
    {
      const RecordGates record(tape);
      torch::relu(x);
    }
    torch::relu(x);
  }
  CHECK(tape.size() == 1);
}

namespace {

/// Convolutions with ReLU, max pooling and a linear layer, in float64, as a function of its parameters.
struct Network {
  Tensors parameters = {normal({6, 3, 3, 3}, 1) * 0.3, normal({6}, 2) * 0.3, normal({8, 6, 3, 3}, 3) * 0.2,
                        normal({8}, 4) * 0.3, normal({4, 128}, 5) * 0.2};
  torch::Tensor x = normal({128, 3, 16, 16}, 6);
  torch::Tensor y = torch::arange(128).remainder(4);

  [[nodiscard]] torch::Tensor loss(const Tensors& at) const {
    torch::Tensor h = torch::conv2d(x, at[0], at[1], 1, 1);
    h = torch::max_pool2d(torch::relu(h), 2);
    h = torch::conv2d(h, at[2], at[3], 1, 1);
    h = torch::max_pool2d(torch::relu_(h), 2);
    return torch::nn::functional::cross_entropy(h.flatten(1).matmul(at[4].t()), y);
  }
};

}  // namespace

TEST_CASE("with frozen gates differences of the gradient converge to double backward", "[gates]") {
  const Network network;
  const Tensors at = leaves(network.parameters);
  const Tensors gradient = torch::autograd::grad({network.loss(at)}, at, {}, true, true);
  const torch::Tensor norm = flat(gradient).norm().detach();
  Tensors direction;
  for (const torch::Tensor& part : gradient) {
    direction.push_back(part.detach() / norm);
  }
  const torch::Tensor exact = flat(torch::autograd::grad(gradient, at, direction));

  GateTape tape;
  const auto moved = [&](double step) {
    Tensors there;
    for (std::size_t i = 0; i < at.size(); ++i) {
      there.push_back((at[i].detach() + step * direction[i]).requires_grad_());
    }
    return there;
  };
  const torch::Tensor here = [&] {
    torch::Tensor loss;
    {
      const RecordGates record(tape);
      loss = network.loss(at);
    }
    return flat(torch::autograd::grad({loss}, at));
  }();
  CHECK(same_bits(here, flat(gradient).detach()));
  CHECK(tape.size() == 4);

  const auto frozen = [&](double step) {
    const ReplayGates replay(tape, Keep::yes);
    const Tensors there = moved(step);
    const torch::Tensor loss = network.loss(there);
    replay.finish();
    return flat(torch::autograd::grad({loss}, there));
  };
  const auto ordinary = [&](double step) {
    const Tensors there = moved(step);
    return flat(torch::autograd::grad({network.loss(there)}, there));
  };
  const auto forward_error = [&](const auto& gradient_at, double step) {
    return relative_error((gradient_at(step) - here) / step, exact);
  };
  const auto central_error = [&](const auto& gradient_at, double step) {
    return relative_error((gradient_at(step) - gradient_at(-step)) / (2 * step), exact);
  };
  CHECK(forward_error(frozen, 1e-3) < 1e-2);
  CHECK(forward_error(frozen, 1e-4) < 1e-3);
  CHECK(forward_error(frozen, 1e-3) / forward_error(frozen, 1e-4) == Approx(10).epsilon(0.05));
  CHECK(central_error(frozen, 1e-2) / central_error(frozen, 1e-3) == Approx(100).epsilon(0.05));
  CHECK(central_error(frozen, 1e-4) < 1e-6);
  // Ordinary differences see gates flip, the more so the shorter the step.
  CHECK(forward_error(ordinary, 1e-3) > 0.05);
  CHECK(central_error(ordinary, 1e-3) > 0.05);
}
