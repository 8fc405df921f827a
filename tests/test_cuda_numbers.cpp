// What is computed on a GPU, against float64 on the CPU: formulas, gates, estimators, snapshots, half types. What only
// a device has is in test_cuda.cpp. MICROREG_REHEARSE=cpu tries these cases where there is no GPU.
#include "fused_operations.hpp"
#include "half_steps.hpp"
#include "networks.hpp"

#include <microreg/gates/scope.hpp>
#include <microreg/microreg.hpp>

#include <algorithm>
#include <functional>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

using namespace helpers;

namespace {

/// Full float32 in products and convolutions, and the same twice, or TF32; put back at the end.
class Products {
 public:
  explicit Products(bool tf32) { set({tf32, tf32, !tf32}); }
  Products(const Products&) = delete;
  Products& operator=(const Products&) = delete;
  ~Products() { set(before_); }

 private:
  struct State {
    bool cudnn, cublas, deterministic;
  };
  static void set(const State& state) {
    at::globalContext().setAllowTF32CuDNN(state.cudnn);
    at::globalContext().setAllowTF32CuBLAS(state.cublas);
    at::globalContext().setDeterministicCuDNN(state.deterministic);
  }

  State before_{at::globalContext().allowTF32CuDNN(), at::globalContext().allowTF32CuBLAS(),
                at::globalContext().deterministicCuDNN()};
};

/// A network with the same weights each time, a mini-batch, and what a step leaves.
struct Problem {
  networks::Cnn model;
  torch::Tensor x, y;

  Problem(torch::Dtype type, at::Device device, at::MemoryFormat layout = at::MemoryFormat::Contiguous)
      : model(seeded()) {
    torch::manual_seed(4);
    x = torch::randn({10, 2, 6, 6}, torch::TensorOptions(at::kCPU).dtype(torch::kFloat64)).to(device, type);
    x = x.contiguous(layout);
    y = torch::arange(10, torch::TensorOptions(at::kCPU).dtype(torch::kLong)).remainder(networks::classes).to(device);
    model->to(device, type);
    for (torch::Tensor& parameter : model->parameters()) {
      if (parameter.dim() == 4) {
        parameter.set_data(parameter.contiguous(layout));
      }
    }
  }

  /// The gradient, the buffers and the numbers of the report, in one vector of float64.
  torch::Tensor step(const microreg::AnyPenalty<>& penalty, const microreg::RegularizerOptions& options) {
    microreg::Report report;
    std::vector<torch::Tensor> parts{grad_after(*model, [&] {
      microreg::Regularizer<> regularizer(model, cross_entropy, penalty, options);
      report = regularizer.backward(x, y);
    })};
    for (const torch::Tensor& buffer : model->buffers()) {
      parts.push_back(buffer.to(torch::kCPU, torch::kFloat64).flatten());
    }
    for (const torch::Tensor& number : {report.loss, report.gradient_norm, report.penalties[0].value}) {
      CHECK(number.device().type() == x.device().type());
      parts.push_back(number.to(torch::kCPU, torch::kFloat64).reshape(1));
    }
    return torch::cat(parts);
  }

 private:
  static networks::Cnn seeded() {
    torch::manual_seed(3);
    return networks::Cnn(networks::Norm::batch, networks::Activation::kinked);
  }
};

/// Penalties that draw nothing: another device has another generator.
microreg::AnyPenalty<> undrawn_penalty(int which) {
  switch (which) {
    case 0:
      return microreg::GradientNorm{};
    case 1:
      return microreg::AverageJacobian{};
    default:
      return microreg::GradientNorm{} + 0.3 * microreg::AverageJacobian{};
  }
}

struct Kinked {
  std::string name;
  std::function<torch::Tensor(const torch::Tensor& a, const torch::Tensor& b)> function;
};

const std::vector<Kinked> kinked = {
    {"relu", [](const auto& a, const auto&) { return torch::relu(a); }},
    {"relu in place", [](const auto& a, const auto&) { return (a * 1.5).relu_(); }},
    {"leaky_relu", [](const auto& a, const auto&) { return torch::leaky_relu(a, 0.2); }},
    {"threshold", [](const auto& a, const auto&) { return torch::threshold(a, 0.25, -1); }},
    {"hardtanh", [](const auto& a, const auto&) { return torch::hardtanh(a, -0.5, 0.75); }},
    {"relu6", [](const auto& a, const auto&) { return torch::relu6(a * 9); }},
    {"hardsigmoid", [](const auto& a, const auto&) { return torch::hardsigmoid(a * 4); }},
    {"hardswish", [](const auto& a, const auto&) { return torch::hardswish(a * 4); }},
    {"elu", [](const auto& a, const auto&) { return torch::elu(a); }},
    {"selu", [](const auto& a, const auto&) { return torch::selu(a); }},
    {"prelu", [](const auto& a, const auto&) { return torch::prelu(a, torch::full({1}, 0.3, a.options())); }},
    {"abs", [](const auto& a, const auto&) { return a.abs(); }},
    {"clamp", [](const auto& a, const auto&) { return a.clamp(-0.5, 0.75); }},
    {"maximum", [](const auto& a, const auto& b) { return torch::maximum(a, b) * a; }},
    {"minimum", [](const auto& a, const auto& b) { return torch::minimum(a, b) * a; }},
    {"where", [](const auto& a, const auto& b) { return torch::where(a > b, a * a, b); }},
    {"max", [](const auto& a, const auto&) { return std::get<0>(a.max(-1)); }},
    {"amax", [](const auto& a, const auto&) { return a.amax({-1}); }},
    {"sort", [](const auto& a, const auto&) { return std::get<0>(a.sort(-1)).cumsum(-1); }},
    {"topk", [](const auto& a, const auto&) { return std::get<0>(a.topk(2)).square(); }},
    {"max_pool1d", [](const auto& a, const auto&) { return torch::max_pool1d(a.flatten(1, 2), 2); }},
    {"max_pool2d", [](const auto& a, const auto&) { return torch::max_pool2d(a, 2); }},
    {"adaptive_max_pool2d",
     [](const auto& a, const auto&) { return std::get<0>(torch::adaptive_max_pool2d(a, {2, 3})); }},
    {"l1_loss", [](const auto& a, const auto& b) { return torch::l1_loss(a, b); }},
    {"smooth_l1_loss", [](const auto& a, const auto& b) { return torch::smooth_l1_loss(a, b); }},
    {"huber_loss", [](const auto& a, const auto& b) { return torch::huber_loss(a, b); }},
};

/// Value and gradient where gates are replayed that were recorded elsewhere, in one vector of float64.
torch::Tensor replayed(const Kinked& of, torch::Dtype type, at::Device device) {
  torch::manual_seed(6);
  const auto draw = [&] {
    return torch::randn({2, 3, 4, 6}, torch::TensorOptions(at::kCPU).dtype(torch::kFloat64))
        .to(torch::kFloat32)
        .to(device, type);
  };
  const std::vector<torch::Tensor> first{draw(), draw()}, second{draw(), draw()};
  const auto evaluate = [&](const std::vector<torch::Tensor>& at) {
    const torch::Tensor a = at[0].detach().clone().requires_grad_(), b = at[1].detach().clone().requires_grad_();
    const torch::Tensor value = of.function(a, b);
    const torch::Tensor weights = torch::arange(1, value.numel() + 1, value.options()).view_as(value);
    std::vector<torch::Tensor> parts{value.variable_data()};
    for (const torch::Tensor& each : torch::autograd::grad({(value * weights).sum()}, {a, b}, {}, false, false, true)) {
      parts.push_back(each.defined() ? each : torch::zeros_like(a));
    }
    for (torch::Tensor& part : parts) {
      part = part.to(torch::kCPU, torch::kFloat64).flatten();
    }
    return torch::cat(parts);
  };
  microreg::GateTape tape;
  const torch::Tensor recorded = [&] {
    const microreg::RecordGates record(tape);
    return evaluate(first);
  }();
  CHECK(tape.size() > 0);
  CHECK(relative_error(recorded, evaluate(first)) < 1e-6);
  const microreg::ReplayGates replay(tape, microreg::Keep::no);
  torch::Tensor result = evaluate(second);
  replay.finish();
  return result;
}

}  // namespace

TEST_CASE("fused formulas on a device are as accurate as LibTorch's there", "[cuda]") {
  const auto device = device_to_test();
  if (!device) {
    return;
  }
  const Products full(false);
  const auto type = GENERATE(torch::kFloat64, torch::kFloat32, torch::kBFloat16, torch::kHalf);
  const double floor = type == torch::kFloat64 ? 1e-13 : type == torch::kFloat32 ? 1e-6 : epsilon_of(type);
  for (const FusedOperation& of : fused_operations) {
    for (const at::MemoryFormat layout : {at::MemoryFormat::Contiguous, at::MemoryFormat::ChannelsLast}) {
      for (const double offset : {0.0, 1e3}) {
        const bool half = type == torch::kBFloat16 || type == torch::kHalf;
        if ((offset != 0 && (half || !of.normalises)) || (of.mixed && !half) || !of.runs_on(*device)) {
          continue;
        }
        const DoubleBackward problem(of, type, offset);
        const torch::Tensor exact = problem.exact();
        bool ours = false;
        const double fused = relative_error(problem({type, *device, layout}, true, &ours), exact);
        const double stock = relative_error(problem({type, *device, layout}, false), exact);
        INFO(of.name << " in " << type << ", " << layout << ", offset " << offset << ": fused " << fused
                     << ", LibTorch " << stock);
        CHECK(ours == of.is_fused_on(*device));
        CHECK(fused <= std::max(2 * stock, floor));
      }
    }
  }
}

TEST_CASE("gates on a device are those of the CPU", "[cuda]") {
  const auto device = device_to_test();
  if (!device) {
    return;
  }
  for (const Kinked& of : kinked) {
    INFO(of.name);
    const torch::Tensor exact = replayed(of, torch::kFloat64, at::kCPU);
    // On CUDA the values of these two in float64 have a sixth of float32, and so have their replays.
    const double bound = of.name == "hardsigmoid" || of.name == "hardswish" ? 1e-8 : 1e-13;
    CHECK(relative_error(replayed(of, torch::kFloat64, *device), exact) < bound);
    CHECK(relative_error(replayed(of, torch::kFloat32, *device), exact) < 1e-6);
  }
}

TEST_CASE("dropout on a device makes the same choice in every pass of a difference", "[cuda]") {
  const auto device = device_to_test();
  if (!device) {
    return;
  }
  const auto step = [&](const microreg::Estimator& estimator) {
    Problem problem(torch::kFloat64, *device);
    torch::nn::Sequential model(problem.model, torch::nn::Dropout(0.5));
    torch::manual_seed(8);
    microreg::Regularizer<> regularizer(model, cross_entropy, microreg::GradientNorm{},
                                        {.strength = 0.1, .micro_batch_size = 5, .estimator = estimator});
    (void)regularizer.backward(problem.x, problem.y);
    return std::make_pair(flat_grad(model->parameters()), at::globalContext().defaultGenerator(*device).get_state());
  };
  const auto [exact, drawn] = step(microreg::Exact{});
  const auto [difference, drawn_too] = step(microreg::CentralDifference{});
  CHECK(relative_error(difference, exact) < 1e-5);
  CHECK(same_bits(drawn, drawn_too));
}

TEST_CASE("steps on a device are those of the CPU, by every estimator and in both layouts", "[cuda]") {
  const auto device = device_to_test();
  if (!device) {
    return;
  }
  const Products full(false);
  const int which = GENERATE(0, 1, 2);
  const microreg::Estimator estimator =
      GENERATE(microreg::Estimator(microreg::Exact{}), microreg::Estimator(microreg::ForwardDifference{}),
               microreg::Estimator(microreg::CentralDifference{}));
  const bool fused = GENERATE(true, false);
  CAPTURE(which, estimator.index(), fused);
  const microreg::RegularizerOptions options{
      .strength = 0.1, .micro_batch_size = 4, .estimator = estimator, .fused = fused};
  const torch::Tensor exact =
      Problem(torch::kFloat64, at::kCPU)
          .step(undrawn_penalty(which), {.strength = 0.1, .micro_batch_size = 4, .fused = false});
  const bool difference = estimator.index() != 0;
  for (const at::MemoryFormat layout : {at::MemoryFormat::Contiguous, at::MemoryFormat::ChannelsLast}) {
    CAPTURE(layout);
    Problem fine(torch::kFloat64, *device, layout);
    CHECK(relative_error(fine.step(undrawn_penalty(which), options), exact) < (difference ? 1e-5 : 1e-12));
    Problem coarse(torch::kFloat32, *device, layout);
    CHECK(relative_error(coarse.step(undrawn_penalty(which), options), exact) < (difference ? 2e-2 : 1e-4));
  }
}

TEST_CASE("a difference in TF32 is right or refused", "[cuda]") {
  const auto device = device_to_test();
  if (!device) {
    return;
  }
  const microreg::RegularizerOptions options{
      .strength = 0.1, .micro_batch_size = 4, .estimator = microreg::ForwardDifference{}};
  const torch::Tensor exact = Problem(torch::kFloat64, at::kCPU).step(microreg::GradientNorm{}, options);
  const Products coarse(true);
  Problem problem(torch::kFloat32, *device);
  const Watch watch(*problem.model);
  try {
    CHECK(relative_error(problem.step(microreg::GradientNorm{}, options), exact) < 5e-2);
  } catch (const microreg::DifferenceError& error) {
    CHECK(has(error.what(), {"off by"}));
    CHECK(watch.unchanged());
  }
}

TEST_CASE("measuring and grafting on a device are those of the CPU", "[cuda]") {
  const auto device = device_to_test();
  if (!device) {
    return;
  }
  const bool by_tensor = GENERATE(false, true);
  const auto numbers = [&](at::Device on) {
    Problem problem(torch::kFloat64, on);
    const microreg::Report report = microreg::measure(problem.model, cross_entropy, microreg::GradientNorm{}, problem.x,
                                                      problem.y, {.micro_batch_size = 4});
    std::vector<torch::Tensor> parts{report.loss.reshape(1), report.penalties[0].micro_batch_norms};
    (void)problem.step(microreg::GradientNorm{}, {.strength = 0.1, .micro_batch_size = 4});
    const std::vector<torch::Tensor> parameters = problem.model->parameters();
    parts.push_back((by_tensor ? microreg::graft(parameters, report.penalties[0].micro_batch_norms[0])
                               : microreg::graft(parameters, 0.75))
                        .reshape(1));
    for (torch::Tensor& part : parts) {
      CHECK(part.device().type() == on.type());
      part = part.cpu().to(torch::kFloat64);
    }
    parts.push_back(flat_grad(parameters));
    return torch::cat(parts);
  };
  CHECK(relative_error(numbers(*device), numbers(at::kCPU)) < 1e-11);
}

TEST_CASE("an error on a device leaves everything as it was, bit by bit", "[cuda]") {
  const auto device = device_to_test();
  if (!device) {
    return;
  }
  const Products full(false);
  const auto displace = GENERATE(microreg::Displace::parameters, microreg::Displace::copies);
  const bool difference = GENERATE(false, true);
  torch::manual_seed(3);
  torch::nn::Sequential model(torch::nn::Conv2d(torch::nn::Conv2dOptions(2, 4, 3)), torch::nn::BatchNorm2d(4),
                              torch::nn::ReLU(), torch::nn::Dropout(0.5), torch::nn::Flatten(),
                              torch::nn::Linear(64, networks::classes));
  model->to(*device);
  const torch::Tensor x = torch::randn({9, 2, 6, 6}, *device);
  const torch::Tensor y = torch::zeros({9}, x.options().dtype(torch::kLong));
  const auto state = [&] {
    std::vector<torch::Tensor> all = clones(model->parameters());
    for (const torch::Tensor& buffer : clones(model->buffers())) {
      all.push_back(buffer);
    }
    for (const torch::Tensor& parameter : model->parameters()) {
      all.push_back(parameter.grad().clone());
    }
    all.push_back(at::globalContext().defaultGenerator(*device).get_state());
    return all;
  };
  int calls = 0, last = -1;
  const auto loss = [&](const torch::Tensor& output, const torch::Tensor& target) {
    if (++calls == last) {
      throw std::runtime_error("the last micro-batch");
    }
    return torch::cross_entropy_loss(output, target);
  };
  microreg::RegularizerOptions options{.strength = 0.1, .micro_batch_size = 3};
  if (difference) {
    options.estimator = microreg::ForwardDifference{.tolerance = 0.5, .displace = displace};
  }
  microreg::Regularizer<> regularizer(model, loss, microreg::GradientNorm{}, options);
  (void)regularizer.backward(x, y);
  const auto before = state();
  const int whole = calls;
  for (last = 2; last <= whole; last += 3) {
    calls = 0;
    CHECK_THROWS_AS(regularizer.backward(x, y), std::runtime_error);
    const auto after = state();
    for (std::size_t i = 0; i < before.size(); ++i) {
      CAPTURE(last, i);
      CHECK(same_bits(before[i], after[i]));
    }
  }
}

TEST_CASE("half types on a device: sums in float32, no underflow, mixed precision", "[cuda]") {
  const auto device = device_to_test();
  if (!device) {
    return;
  }
  SECTION("sums") { check_sums_of(GENERATE(torch::kBFloat16, torch::kHalf), *device); }
  SECTION("underflow") { check_no_underflow(GENERATE(1, 1024), *device); }
  SECTION("mixed precision") {
    const Products full(false);
    const auto type = GENERATE(torch::kBFloat16, torch::kHalf);
    const microreg::AnyPenalty<> penalty = microreg::GradientNorm{};
    const microreg::RegularizerOptions options{.strength = 0.1, .micro_batch_size = 4};
    const torch::Tensor exact = Problem(torch::kFloat64, at::kCPU).step(penalty, options);
    microreg::RegularizerOptions half = options;
    half.autocast = type;
    const torch::Tensor by_option = Problem(torch::kFloat32, *device).step(penalty, half);
    CHECK(relative_error(by_option, exact) < (type == torch::kHalf ? 0.01 : 0.05));
    CHECK(relative_error(by_option, exact) > 1e-5);  // it did something
    const microreg::Autocast guard(device->type(), type);
    CHECK(relative_error(Problem(torch::kFloat32, *device).step(penalty, options), by_option) < 1e-5);
  }
}

TEST_CASE("a dynamic loss scale on a device grows, backs off and leaves steps out", "[cuda]") {
  const auto device = device_to_test();
  if (!device) {
    return;
  }
  // float16 ends at 65504, and the backward pass of this loss goes through 50 S: 1024 fits, 2048 does not.
  const torch::TensorOptions half = torch::TensorOptions(*device).dtype(torch::kHalf);
  torch::Tensor w = torch::full({1000}, 1e-4, half).requires_grad_();
  microreg::FunctionModel model{[&](const torch::Tensor& x) { return w.square() * x.sum() * 50; }, {w}};
  const auto loss = [](const torch::Tensor& output, const torch::Tensor&) { return output.to(torch::kFloat).sum(); };
  microreg::Regularizer regularizer(model, loss, microreg::GradientNorm{},
                                    {.strength = 1e-3,
                                     .micro_batch_size = 1,
                                     .check_finite = microreg::CheckFinite::never,
                                     .loss_scale = microreg::DynamicLossScale{.start = 4096, .interval = 2}});
  const torch::Tensor x = torch::ones({2}, half);
  int skipped = 0;
  for (const double scale : {4096, 2048, 1024, 1024, 2048, 1024}) {
    clear_grad({w});
    const microreg::Report report = regularizer.backward(x, torch::zeros({2}, *device));
    CHECK(report.loss_scale.device().type() == device->type());
    CHECK(report.loss_scale.item<double>() == scale);
    CHECK(report.overflow.item<bool>() == (scale > 1024));
    skipped += scale > 1024 ? 1 : 0;
    const double sum = w.grad().defined() ? w.grad().to(torch::kFloat).sum().item<double>() : 0;
    CHECK(sum == Approx(scale > 1024 ? 0.0 : 12.0).epsilon(2e-3).margin(1e-9));
  }
  CHECK(regularizer.skipped() == skipped);
}

TEST_CASE("workers have no effect on a device", "[cuda]") {
  const auto device = device_to_test();
  if (!device) {
    return;
  }
  const Products full(false);
  const auto step = [&](std::int64_t workers) {
    return Problem(torch::kFloat32, *device)
        .step(microreg::GradientNorm{}, {.strength = 0.1, .micro_batch_size = 3, .workers = workers});
  };
  CHECK(relative_error(step(2), step(0)) < 1e-5);
}
