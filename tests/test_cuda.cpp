// What a device changes. Each test says "skipped: no CUDA device" where there is none, and ctest counts it as skipped.
#include "helpers.hpp"
#include "networks.hpp"

#include <ATen/SequenceNumber.h>
#include <microreg/microreg.hpp>

#if defined(MICROREG_WITH_CUDA)
#include <microreg/cuda_graph.hpp>
#endif

using namespace helpers;

namespace {

/// One step with `penalty` on `device`, from the same weights and data each time.
template <class Penalty>
std::pair<torch::Tensor, torch::Tensor> step_on(c10::Device device, networks::Norm norm, const Penalty& penalty) {
  torch::manual_seed(3);
  networks::Cnn model(norm, networks::Activation::kinked);
  const torch::Tensor x = torch::randn({10, 2, 6, 6});
  const torch::Tensor y = torch::randint(networks::classes, {10});
  model->to(device);
  microreg::Regularizer regularizer(model, cross_entropy, penalty, {.strength = 0.1, .micro_batch_size = 4});
  const microreg::Report report = regularizer.backward(x.to(device), y.to(device));
  CHECK(report.loss.device().type() == device.type());
  CHECK(report.penalties[0].value.device().type() == device.type());
  CHECK(report.gradient_norm.device().type() == device.type());
  return {flat_grad(model->parameters()), report.penalties[0].value.cpu()};
}

template <class Penalty>
void agrees(networks::Norm norm, const Penalty& penalty) {
  const auto [grad, value] = step_on(torch::kCUDA, norm, penalty);
  const auto [cpu_grad, cpu_value] = step_on(torch::kCPU, norm, penalty);
  CHECK(relative_error(grad, cpu_grad) < 1e-4);
  CHECK(relative_error(value, cpu_value) < 1e-4);
}

}  // namespace

TEST_CASE("penalties on CUDA agree with the CPU", "[cuda]") {
  if (no_device()) {
    return;
  }
  at::globalContext().setAllowTF32CuDNN(false);
  at::globalContext().setAllowTF32CuBLAS(false);
  const auto norm = GENERATE(networks::Norm::none, networks::Norm::batch);
  SECTION("gradient norm") { agrees(norm, microreg::GradientNorm{}); }
  SECTION("average Jacobian") { agrees(norm, microreg::AverageJacobian{}); }
  SECTION("Fisher trace, given labels") {
    agrees(
        norm,
        microreg::FisherTrace{microreg::Distribution{
            [](const torch::Tensor& output, const auto&) {
              return torch::arange(output.size(0), output.options().dtype(torch::kInt64));
            },
            [](const torch::Tensor& output, const torch::Tensor& y) { return torch::cross_entropy_loss(output, y); }}});
  }
  SECTION("unit Jacobian, given direction") {
    agrees(norm, microreg::SquaredGradientNorm{[](const torch::Tensor& output) {
             const torch::Tensor mean = output.mean(0);
             const torch::Tensor u = torch::arange(1, mean.size(0) + 1, mean.options().requires_grad(false));
             return mean.dot(u / u.norm());
           }});
  }
}

TEST_CASE("labels and directions come from the device's generator", "[cuda]") {
  if (no_device()) {
    return;
  }
  const auto run = [](std::uint64_t seed) {
    networks::Mlp model;
    torch::manual_seed(5);
    for (torch::Tensor& parameter : model->parameters()) {
      torch::nn::init::uniform_(parameter, -1, 1);
    }
    model->to(torch::kCUDA);
    const torch::Tensor x = torch::ones({8, 6}, torch::kCUDA);
    torch::manual_seed(seed);
    at::Generator device = at::globalContext().defaultGenerator(x.device());
    const auto before = device.get_state();
    const auto on_host = at::globalContext().defaultGenerator(at::kCPU).get_state();
    microreg::Regularizer regularizer(model, cross_entropy, microreg::FisherTrace{} + microreg::UnitJacobian{},
                                      {.micro_batch_size = 4});
    (void)regularizer.backward(x, torch::zeros({8}, x.options().dtype(torch::kInt64)));
    CHECK_FALSE(same_bits(before, device.get_state()));
    CHECK(same_bits(on_host, at::globalContext().defaultGenerator(at::kCPU).get_state()));
    return flat_grad(model->parameters());
  };
  CHECK(same_bits(run(1), run(1)));
  CHECK_FALSE(same_bits(run(1), run(2)));
}

TEST_CASE("an error on CUDA leaves the device's generator as it was", "[cuda]") {
  if (no_device()) {
    return;
  }
  networks::Mlp model;
  model->to(torch::kCUDA);
  int calls = 0;
  microreg::Regularizer regularizer(model,
                                    [&](const torch::Tensor& output, const torch::Tensor& y) {
                                      if (++calls == 2) {
                                        throw std::runtime_error("second micro-batch");
                                      }
                                      return torch::cross_entropy_loss(output, y);
                                    },
                                    microreg::FisherTrace{}, {.micro_batch_size = 4});
  const torch::Tensor x = torch::randn({8, 6}, torch::kCUDA);
  at::Generator device = at::globalContext().defaultGenerator(x.device());
  const auto before = device.get_state();
  CHECK_THROWS_AS(regularizer.backward(x, torch::zeros({8}, x.options().dtype(torch::kInt64))), std::runtime_error);
  CHECK(same_bits(before, device.get_state()));
}

TEST_CASE("a batch or a generator on another device than the model is named", "[cuda]") {
  if (no_device()) {
    return;
  }
  networks::Mlp model;
  model->to(torch::kCUDA);
  const torch::Tensor x = torch::randn({8, 6}, torch::kCPU);
  const torch::Tensor y = torch::zeros({8}, torch::TensorOptions(torch::kCPU).dtype(torch::kInt64));
  microreg::Regularizer plain(model, cross_entropy, microreg::GradientNorm{});
  CHECK(has(message_of<microreg::BatchError>([&] { (void)plain.backward(x, y); }), {"input", "cpu", "cuda", ".to("}));
  CHECK(has(message_of<microreg::BatchError>([&] { (void)plain.backward(x.cuda(), y); }), {"target", "cpu", "cuda"}));
  microreg::Regularizer drawing(model, cross_entropy, microreg::UnitJacobian{}, {.generator = generator(1)});
  CHECK(has(message_of<microreg::OptionError>([&] { (void)drawing.backward(x.cuda(), y.cuda()); }),
            {"generator", "cpu", "cuda"}));
}

TEST_CASE("equal steps on a device leave equal bits", "[cuda]") {
  if (no_device()) {
    return;
  }
  torch::manual_seed(3);
  networks::Mlp model;
  model->to(torch::kCUDA);
  const torch::Tensor x = torch::randn({10, 6}, torch::kCUDA);
  const torch::Tensor y = torch::zeros({10}, torch::TensorOptions(torch::kCUDA).dtype(torch::kLong));
  const bool fused = GENERATE(true, false);
  microreg::Regularizer regularizer(model, cross_entropy, 0.5 * microreg::GradientNorm{} + microreg::AverageJacobian{},
                                    {.strength = 0.3, .micro_batch_size = 4, .fused = fused});
  const auto step = [&] { return grad_after(*model, [&] { (void)regularizer.backward(x, y); }); };
  const torch::Tensor first = step();
  for (int i = 0; i < 40; ++i) {  // the threads of the engine do not meet alike each time
    CHECK(same_bits(step(), first));
  }
}

TEST_CASE("a step on a device is the same however its threads have numbered their nodes", "[cuda]") {
  if (no_device()) {
    return;
  }
  torch::manual_seed(3);
  const auto doubles = torch::TensorOptions(torch::kCUDA).dtype(torch::kFloat64);
  const torch::Tensor w = torch::randn({6, 8}, doubles).requires_grad_();
  const torch::Tensor x = torch::randn({5, 6}, doubles), y = torch::zeros({5}, doubles.dtype(torch::kLong));
  const auto gradient = [&](bool in_place, std::uint64_t ahead) {
    w.mutable_grad() = torch::Tensor();
    const microreg::FunctionModel model{[&, in_place, ahead](const torch::Tensor& input) {
                                          for (std::uint64_t i = 0; i < ahead; ++i) {
                                            at::sequence_number::get_and_increment();
                                          }
                                          torch::Tensor h = input.matmul(w) * 1.5;
                                          if (!in_place) {
                                            return torch::cat({h.narrow(1, 0, 3).sigmoid(), h.narrow(1, 3, 5)}, 1);
                                          }
                                          h.narrow(1, 0, 3).sigmoid_();  // LibTorch alone finds nothing left of it
                                          return h;
                                        },
                                        {w}};
    (void)microreg::Regularizer(model, cross_entropy, microreg::GradientNorm{} + microreg::AverageJacobian{})
        .backward(x, y);
    return flat_grad({w});
  };
  const torch::Tensor first = gradient(true, 0);
  CHECK(relative_error(first, gradient(false, 0)) < 1e-12);
  for (const std::uint64_t ahead : {0, 10, 1000}) {
    CHECK(same_bits(gradient(true, ahead), first));
  }
}

namespace {

microreg::AnyPenalty<> penalty_number(int which) {
  switch (which) {
    case 0:
      return microreg::GradientNorm{};
    case 1:
      return microreg::FisherTrace{};
    case 2:
      return microreg::AverageJacobian{};
    case 3:
      return microreg::UnitJacobian{};
    default:
      return microreg::InputJacobian{};
  }
}

}  // namespace

TEST_CASE("a wait for the device is seen", "[cuda]") {
  if (no_device() || !NoWaiting::is_seen()) {
    return;
  }
  const torch::Tensor one = torch::ones({}, torch::kCUDA);
  const NoWaiting errors;
  CHECK_THROWS(one.item<float>());
}

TEST_CASE("no step makes the host wait for the device", "[cuda]") {
  if (no_device() || !NoWaiting::is_seen()) {
    return;
  }
  torch::manual_seed(3);
  networks::Cnn model(networks::Norm::batch, networks::Activation::kinked);
  model->to(torch::kCUDA);
  const torch::Tensor x = torch::randn({8, 2, 6, 6}, torch::kCUDA);
  const torch::Tensor y =
      torch::randint(networks::classes, {8}, torch::TensorOptions(torch::kCUDA).dtype(torch::kLong));
  const int which = GENERATE(0, 1, 2, 3, 4);
  const microreg::Estimator estimator =
      GENERATE(microreg::Estimator(microreg::Exact{}), microreg::Estimator(microreg::ForwardDifference{}),
               microreg::Estimator(microreg::CentralDifference{}));
  const double strength = GENERATE(0.0, 0.1);
  CAPTURE(which, strength, estimator.index());
  microreg::Regularizer<> regularizer(model, cross_entropy, penalty_number(which),
                                      {.strength = strength, .micro_batch_size = 4, .estimator = estimator});
  (void)regularizer.backward(x, y);  // loads kernels, makes handles and workspaces
  const NoWaiting errors;
  microreg::Report report;
  CHECK_NOTHROW(report = regularizer.backward(x, y));
  if (report.gradient_norm.defined()) {
    CHECK_NOTHROW(microreg::graft(model->parameters(), report.gradient_norm));
  }
  CHECK_NOTHROW(microreg::graft(model->parameters(), 1.0));
}

TEST_CASE("no option of a step makes the host wait for the device", "[cuda]") {
  if (no_device() || !NoWaiting::is_seen()) {
    return;
  }
  torch::manual_seed(3);
  networks::Cnn model(networks::Norm::batch, networks::Activation::kinked);
  model->to(torch::kCUDA);
  const torch::Tensor x = torch::randn({10, 2, 6, 6}, torch::kCUDA);
  const torch::Tensor y =
      torch::randint(networks::classes, {10}, torch::TensorOptions(torch::kCUDA).dtype(torch::kLong));
  const auto options = std::vector<std::pair<const char*, microreg::RegularizerOptions>>{
      {"a dynamic loss scale", {.loss_scale = microreg::DynamicLossScale{}}},
      {"a loss scale", {.loss_scale = 128.0}},
      {"bfloat16", {.autocast = torch::kBFloat16}},
      {"float16", {.autocast = torch::kHalf, .loss_scale = microreg::DynamicLossScale{}}},
      {"a share of the micro-batches", {.sampling = {.share = 0.5}}},
      {"every second step", {.sampling = {.every = 2}}},
      {"a merged tail", {.short_last = microreg::ShortLast::merged}},
      {"outputs kept", {.keep_outputs = true}},
      {"the ratio of gradients", {.gradient_ratio = true}},
      {"some parameters", {.select = [](const std::string&, const torch::Tensor& p) { return p.dim() > 1; }}},
      {"the equations' weights", {.weighting = microreg::Weighting::reference}},
      {"a generator", {.generator = at::globalContext().defaultGenerator(torch::kCUDA).clone()}},
      {"unfused", {.fused = false}},
      {"workers", {.workers = 2}},
      {"displaced copies", {.estimator = microreg::ForwardDifference{.displace = microreg::Displace::copies}}},
  };
  const auto penalty =
      microreg::GradientNorm{} + 0.1 * microreg::Unsquared{microreg::UnitJacobian{}} + 0.1 * microreg::FisherTrace{};
  for (auto [name, option] : options) {
    INFO(name);
    option.strength = 0.1;
    option.micro_batch_size = 4;
    microreg::Regularizer<> regularizer(model, cross_entropy, penalty, option);
    for (int step = 0; step < 2; ++step) {  // loads kernels, makes handles and workspaces
      (void)regularizer.backward(x, y);
    }
    const NoWaiting errors;
    CHECK_NOTHROW(regularizer.backward(x, y));
  }
}

TEST_CASE("a loop of one's own does not make the host wait for the device", "[cuda]") {
  if (no_device() || !NoWaiting::is_seen()) {
    return;
  }
  torch::manual_seed(3);
  networks::Cnn model(networks::Norm::batch, networks::Activation::kinked);
  model->to(torch::kCUDA);
  const torch::Tensor x = torch::randn({8, 2, 6, 6}, torch::kCUDA);
  const torch::Tensor y = torch::zeros({8}, torch::TensorOptions(torch::kCUDA).dtype(torch::kLong));
  microreg::Penalised penalised(model, microreg::GradientNorm{}, {.strength = 0.1});
  const auto step = [&](bool closure) {
    for (auto [part, images, labels] : microreg::micro_batches(4, x, y)) {
      const auto loss = [&, images = images, labels = labels] {
        return torch::cross_entropy_loss(model->forward(images), labels);
      };
      (void)(closure ? penalised.backward(part, loss) : penalised.backward(part, loss()));
    }
  };
  for (const bool closure : {false, true}) {
    step(closure);
    const NoWaiting errors;
    CHECK_NOTHROW(step(closure));
  }
}

TEST_CASE("measuring does not make the host wait for the device", "[cuda]") {
  if (no_device() || !NoWaiting::is_seen()) {
    return;
  }
  networks::Cnn model(networks::Norm::batch, networks::Activation::kinked);
  model->to(torch::kCUDA);
  const torch::Tensor x = torch::randn({8, 2, 6, 6}, torch::kCUDA);
  const torch::Tensor y = torch::zeros({8}, torch::TensorOptions(torch::kCUDA).dtype(torch::kLong));
  (void)microreg::measure(model, cross_entropy, microreg::GradientNorm{}, x, y, {.micro_batch_size = 4});
  const NoWaiting errors;
  CHECK_NOTHROW((void)microreg::measure(model, cross_entropy, microreg::GradientNorm{}, x, y, {.micro_batch_size = 4}));
}

#if defined(MICROREG_WITH_CUDA)
namespace {

/// A few steps with `penalty`, with or without a graph: the parameters, running statistics and norms behind them.
std::pair<std::vector<torch::Tensor>, std::int64_t> trained(int penalty, torch::Dtype type, bool with_graph) {
  torch::manual_seed(3);
  networks::Cnn model(networks::Norm::batch, networks::Activation::kinked);
  model->to(torch::kCUDA, type);
  const torch::Tensor x = torch::randn({14, 2, 6, 6}, torch::TensorOptions(torch::kCUDA).dtype(type));
  const torch::Tensor y =
      torch::randint(networks::classes, {14}, torch::TensorOptions(torch::kCUDA).dtype(torch::kLong));
  torch::optim::SGD optimizer(model->parameters(), 0.1);
  microreg::RegularizerOptions options{.strength = microreg::LinearWarmUp{.peak = 0.1, .steps = 9},
                                       .micro_batch_size = 4};
  if (with_graph) {
    options.cuda_graph = std::make_shared<microreg::CudaGraph>(microreg::CudaGraphOptions{.check_every = 5});
  }
  microreg::Regularizer<> regularizer(model, cross_entropy, penalty_number(penalty), options);
  std::int64_t replayed = 0;
  std::vector<torch::Tensor> state;
  for (int step = 0; step < 6; ++step) {
    optimizer.zero_grad();
    const microreg::Report report = regularizer.backward(x, y);
    optimizer.step();
    replayed += report.replayed;
    state.push_back(report.penalties[0].micro_batch_norms);
  }
  for (const std::vector<torch::Tensor>& tensors : {clones(model->parameters()), clones(model->buffers())}) {
    state.insert(state.end(), tensors.begin(), tensors.end());
  }
  state.push_back(at::globalContext().defaultGenerator(x.device()).get_state());
  return {state, replayed};
}

}  // namespace

TEST_CASE("a CUDA graph gives the steps that there are without it", "[cuda]") {
  if (no_device()) {
    return;
  }
  at::globalContext().setAllowTF32CuDNN(false);
  at::globalContext().setAllowTF32CuBLAS(false);
  const int which = GENERATE(0, 1, 2, 3, 4);
  const auto type = GENERATE(torch::kFloat64, torch::kFloat32);
  CAPTURE(which, type);
  const auto [plain, none] = trained(which, type, false);
  const auto [repeated, replayed] = trained(which, type, true);
  CHECK(none == 0);
  CHECK(replayed > 8);
  REQUIRE(plain.size() == repeated.size());
  for (std::size_t i = 0; i < plain.size(); ++i) {
    CHECK((plain[i] - repeated[i]).abs().max().item<double>() <=
          (type == torch::kFloat64 ? 1e-9 : 1e-3) * (1 + plain[i].abs().max().item<double>()));
  }
}

TEST_CASE("a step by CUDA graphs does not make the host wait for the device", "[cuda]") {
  if (no_device()) {
    return;
  }
  networks::Cnn model(networks::Norm::batch, networks::Activation::kinked);
  model->to(torch::kCUDA);
  const torch::Tensor x = torch::randn({8, 2, 6, 6}, torch::kCUDA);
  const torch::Tensor y = torch::zeros({8}, torch::TensorOptions(torch::kCUDA).dtype(torch::kLong));
  microreg::Regularizer regularizer(
      model, cross_entropy, microreg::GradientNorm{},
      {.strength = 0.1, .micro_batch_size = 4, .cuda_graph = std::make_shared<microreg::CudaGraph>()});
  (void)regularizer.backward(x, y);
  (void)regularizer.backward(x, y);  // records
  const NoWaiting errors;
  microreg::Report report;
  CHECK_NOTHROW(report = regularizer.backward(x, y));
  CHECK(report.replayed == 2);
}

TEST_CASE("what a CUDA graph cannot record is named", "[cuda]") {
  if (no_device()) {
    return;
  }
  networks::Mlp model;
  model->to(torch::kCUDA);
  const auto waits = [](const torch::Tensor& output, const torch::Tensor& y) {
    return torch::cross_entropy_loss(output, y) * (output.sum().item<double>() > 1e9 ? 2 : 1);
  };
  microreg::Regularizer regularizer(model, waits, microreg::GradientNorm{},
                                    {.micro_batch_size = 4, .cuda_graph = std::make_shared<microreg::CudaGraph>()});
  const torch::Tensor x = torch::randn({8, 6}, torch::kCUDA);
  const torch::Tensor y = torch::zeros({8}, x.options().dtype(torch::kInt64));
  (void)regularizer.backward(x, y);
  CHECK(has(message_of<microreg::ModelError>([&] { (void)regularizer.backward(x, y); }),
            {"cannot be recorded as a CUDA graph", "leave cuda_graph empty"}));
  // The device goes on, and so do its random numbers and recordings.
  CHECK(torch::ones({3}, torch::kCUDA).sum().item<float>() == 3);
  CHECK(torch::randn({1000}, torch::kCUDA).abs().max().item<float>() > 1);
  microreg::Regularizer next(model, cross_entropy, microreg::FisherTrace{},
                             {.micro_batch_size = 4, .cuda_graph = std::make_shared<microreg::CudaGraph>()});
  (void)next.backward(x, y);
  (void)next.backward(x, y);
  CHECK(next.backward(x, y).replayed == 2);
  networks::Mlp on_cpu;
  microreg::Regularizer misplaced(on_cpu, cross_entropy, microreg::GradientNorm{},
                                  {.cuda_graph = std::make_shared<microreg::CudaGraph>()});
  CHECK(has(message_of<microreg::OptionError>([&] { (void)misplaced.backward(x.cpu(), y.cpu()); }),
            {"cuda_graph is set and the model is on cpu"}));
}
#endif
