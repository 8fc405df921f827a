/// @file
/// Micro-batches side by side: the same bits as one after the other, what runs beside what, and what is refused.

#include "catch.hpp"
#include "helpers.hpp"
#include "networks.hpp"
#include "own_functions.hpp"

#include <ATen/record_function.h>
#include <torch/csrc/jit/runtime/graph_executor.h>
#include <torch/script.h>
#include <microreg/detail/threads_inside.hpp>
#include <microreg/microreg.hpp>
#include <microreg/step/turns.hpp>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <set>
#include <stdexcept>
#include <string>
#include <thread>
#include <type_traits>
#include <utility>
#include <vector>

using namespace helpers;
using microreg::detail::ThreadsInside;

namespace {

/// Batch normalisation, whose statistics move, and dropout, which draws.
struct NoisyNetImpl : torch::nn::Module {
  NoisyNetImpl() {
    register_module("convolution", convolution);
    register_module("norm", norm);
    register_module("dropout", dropout);
    register_module("output", output);
  }
  torch::Tensor forward(const torch::Tensor& x) {
    return output(dropout(torch::relu(norm(convolution(x)))).mean({2, 3}));
  }
  torch::nn::Conv2d convolution{torch::nn::Conv2dOptions(2, 8, 3)};
  torch::nn::BatchNorm2d norm{8};
  torch::nn::Dropout dropout{0.3};
  torch::nn::Linear output{8, networks::classes};
};
TORCH_MODULE(NoisyNet);

/// Divides its weight by the largest singular value, which it finds by power iteration: the derivative reads what the
/// next forward pass overwrites.
struct SpectralNetImpl : torch::nn::Module {
  SpectralNetImpl() {
    register_module("output", output);
    u = register_buffer("u", torch::nn::functional::normalize(torch::ones({networks::classes}),
                                                              torch::nn::functional::NormalizeFuncOptions().dim(0)));
  }
  torch::Tensor forward(const torch::Tensor& x) {
    torch::Tensor v;
    {
      const torch::NoGradGuard no_grad;
      v = torch::mv(output->weight.t(), u);
      v = v / v.norm();
      const torch::Tensor next = torch::mv(output->weight, v);
      u.copy_(next / next.norm());
    }
    return torch::nn::functional::linear(x, output->weight / torch::dot(u, torch::mv(output->weight, v)));
  }
  torch::nn::Linear output{6, networks::classes};
  torch::Tensor u;
};
TORCH_MODULE(SpectralNet);

/// An embedding that brings the rows that it looks up to a norm of one at most, in place.
struct RenormalisedNetImpl : torch::nn::Module {
  RenormalisedNetImpl() {
    register_module("rows", rows);
    register_module("output", output);
  }
  torch::Tensor forward(const torch::Tensor& x) { return output(torch::tanh(rows(x).flatten(1))); }
  torch::nn::Embedding rows{torch::nn::EmbeddingOptions(9, 4).max_norm(1.0)};
  torch::nn::Linear output{12, networks::classes};
};
TORCH_MODULE(RenormalisedNet);

/// Writes to a buffer that its derivative reads, in a way of the caller's.
struct WritingNetImpl : torch::nn::Module {
  explicit WritingNetImpl(std::function<void(torch::Tensor&)> how) : write(std::move(how)) {
    register_module("output", output);
    u = register_buffer("u", torch::ones({networks::classes}));
  }
  torch::Tensor forward(const torch::Tensor& x) {
    write(u);
    return output(x) * u;
  }
  std::function<void(torch::Tensor&)> write;
  torch::nn::Linear output{6, networks::classes};
  torch::Tensor u;
};
TORCH_MODULE(WritingNet);

/// Batch normalisation without a graph, whose running variance the graph behind it keeps, or does not.
struct WatchingNetImpl : torch::nn::Module {
  explicit WatchingNetImpl(bool reads_statistics = true) : reads(reads_statistics) {
    register_module("first", first);
    register_module("norm", norm);
    register_module("output", output);
  }
  torch::Tensor forward(const torch::Tensor& x) {
    const torch::Tensor hidden = torch::tanh(first(x));
    {
      const torch::NoGradGuard no_grad;
      (void)norm(hidden);
    }
    return output(reads ? hidden * norm->running_var : hidden);
  }
  bool reads;
  torch::nn::Linear first{6, 6};
  torch::nn::BatchNorm1d norm{6};
  torch::nn::Linear output{6, networks::classes};
};
TORCH_MODULE(WatchingNet);

/// Batch normalisation of the data, which needs no graph.
struct DataNormNetImpl : torch::nn::Module {
  DataNormNetImpl() {
    register_module("norm", norm);
    register_module("output", output);
  }
  torch::Tensor forward(const torch::Tensor& x) { return output(norm(x)); }
  torch::nn::BatchNorm1d norm{torch::nn::BatchNorm1dOptions(6).affine(false)};
  torch::nn::Linear output{6, networks::classes};
};
TORCH_MODULE(DataNormNet);

/// A large buffer, which is written to on some batches only.
struct BankNetImpl : torch::nn::Module {
  BankNetImpl() {
    register_module("output", output);
    bank = register_buffer("bank", torch::zeros({1 << 18}));
  }
  torch::Tensor forward(const torch::Tensor& x) {
    if (x[0][0].item<float>() > 0) {
      bank.mul_(2).add_(x[0][0].detach());
    }
    return torch::tanh(output(x));
  }
  torch::nn::Linear output{6, networks::classes};
  torch::Tensor bank;
};
TORCH_MODULE(BankNet);

/// Uses one weight twice, and takes its time in between.
struct TwiceNetImpl : torch::nn::Module {
  TwiceNetImpl() { register_module("layer", layer); }
  torch::Tensor forward(const torch::Tensor& x) {
    const torch::Tensor once = torch::tanh(layer(x));
    std::this_thread::sleep_for(std::chrono::milliseconds(5));
    return layer(once);
  }
  torch::nn::Linear layer{6, 6};
};
TORCH_MODULE(TwiceNet);

/// Holds micro-batch 1 back, once it is differentiated, until the model is called for micro-batch 2.
class HeldBack {
 public:
  HeldBack() {
    self() = this;
    handle_ = at::addGlobalCallback(at::RecordFunctionCallback(&wait).scopes({at::RecordScope::BACKWARD_FUNCTION}));
  }
  HeldBack(const HeldBack&) = delete;
  HeldBack& operator=(const HeldBack&) = delete;
  ~HeldBack() {
    at::removeCallback(handle_);
    self() = nullptr;
  }
  /// To be called by the loss.
  void note(std::int64_t micro_batch) {
    const std::lock_guard lock(mutex_);
    of_[std::this_thread::get_id()] = micro_batch;
    last_ = std::max(last_, micro_batch);
    changed_.notify_all();
  }

 private:
  static HeldBack*& self() {
    static HeldBack* one = nullptr;
    return one;
  }
  static std::unique_ptr<at::ObserverContext> wait(const at::RecordFunction& /*function*/) {
    HeldBack& held = *self();
    std::unique_lock lock(held.mutex_);
    if (held.of_[std::this_thread::get_id()] == 1) {
      held.changed_.wait_for(lock, std::chrono::seconds(2), [&] { return held.last_ >= 2; });
    }
    return nullptr;
  }

  std::mutex mutex_;
  std::condition_variable changed_;
  std::map<std::thread::id, std::int64_t> of_;
  std::int64_t last_ = 0;
  at::CallbackHandle handle_{};
};

/// Waits, in the first backward pass on any thread or on the first one that begins(), until something happens on
/// another one, but not for longer than `patience`.
class Overlap {
 public:
  explicit Overlap(bool on_any = true, std::chrono::seconds patience = std::chrono::seconds(2))
      : waits_(on_any), patience_(patience) {
    self() = this;
    handle_ = at::addGlobalCallback(
        at::RecordFunctionCallback(&tell).scopes({at::RecordScope::FUNCTION, at::RecordScope::BACKWARD_FUNCTION}));
  }
  ~Overlap() {
    at::removeCallback(handle_);
    self() = nullptr;
  }
  /// This thread's backward passes count from now on. Of several threads the first: behind the last one there may be
  /// nobody left to wait for.
  void begins() {
    const std::lock_guard lock(mutex_);
    waits_ = true;
    on_ = on_.value_or(std::this_thread::get_id());
  }
  /// Whether something else happened on another thread.
  [[nodiscard]] bool seen() const { return seen_; }

 private:
  static Overlap*& self() {
    static Overlap* one = nullptr;
    return one;
  }
  static std::unique_ptr<at::ObserverContext> tell(const at::RecordFunction& function) {
    self()->note(function.scope() == at::RecordScope::BACKWARD_FUNCTION);
    return nullptr;
  }
  void note(bool backward) {
    std::unique_lock lock(mutex_);
    const auto thread = std::this_thread::get_id();
    if (on_.value_or(thread) != thread) {  // not past it: on a busy machine all might be done before it goes on
      changed_.wait_for(lock, patience_, [&] { return waits_for_others_.has_value(); });
    }
    if (waits_for_others_.has_value() && *waits_for_others_ != thread && inside_) {
      seen_ = true;
      changed_.notify_all();
    }
    if (backward && waits_ && !waits_for_others_.has_value() && on_.value_or(thread) == thread) {
      waits_for_others_ = thread;
      inside_ = true;
      changed_.notify_all();
      changed_.wait_for(lock, patience_, [&] { return seen_; });
      inside_ = false;
    }
  }

  std::mutex mutex_;
  std::condition_variable changed_;
  bool waits_;
  std::chrono::seconds patience_;
  std::optional<std::thread::id> on_, waits_for_others_;
  bool inside_ = false;
  bool seen_ = false;
  at::CallbackHandle handle_{};
};

/// Everything that a step leaves behind.
std::vector<torch::Tensor> left_behind(const torch::nn::Module& module, const microreg::Report& report) {
  std::vector<torch::Tensor> result;
  for (const torch::Tensor& parameter : module.parameters()) {
    result.push_back(parameter.grad().defined() ? parameter.grad().clone() : torch::Tensor());
  }
  for (const torch::Tensor& buffer : module.buffers()) {
    result.push_back(buffer.clone());
  }
  result.push_back(at::globalContext().defaultGenerator(test_device()).get_state());
  result.push_back(report.loss);
  result.push_back(report.micro_batch_losses);
  result.push_back(report.gradient_norm);
  result.push_back(report.gradient_ratio);
  result.insert(result.end(), report.loss_parts.begin(), report.loss_parts.end());
  for (const microreg::PenaltyReport& penalty : report.penalties) {
    result.push_back(penalty.value);
    result.push_back(penalty.micro_batch_norms);
  }
  for (const auto& outputs : report.micro_batch_outputs) {
    result.insert(result.end(), outputs.begin(), outputs.end());
  }
  return result;
}

bool all_same_bits(const std::vector<torch::Tensor>& a, const std::vector<torch::Tensor>& b) {
  bool same = a.size() == b.size();
  for (std::size_t i = 0; same && i < a.size(); ++i) {
    if (!same_bits(a[i], b[i])) {
      UNSCOPED_INFO("tensor " << i << " of " << a.size() << " differs: " << relative_error(a[i], b[i]));
      return false;
    }
  }
  return same;
}

/// What two steps of one network leave behind.
template <class Net, class Loss, class Penalty>
std::vector<torch::Tensor> two_steps(const Loss& loss, const Penalty& penalty, microreg::RegularizerOptions options,
                                     const torch::Tensor& input, const torch::Tensor& target) {
  torch::manual_seed(3);
  Net model;
  microreg::Regularizer regularizer(model, loss, penalty, std::move(options));
  (void)regularizer.backward(input, target);
  return left_behind(*model, regularizer.backward(input, target));
}

}  // namespace

TEST_CASE("any number of workers leaves the same bits behind as one, and as none on one thread", "[workers]") {
  torch::manual_seed(1);
  const torch::Tensor input = torch::randn({22, 2, 9, 9});
  const torch::Tensor target = torch::randint(networks::classes, {22});
  const auto mean = [](const torch::Tensor& output, const torch::Tensor& labels) {
    return std::tuple(torch::cross_entropy_loss(output, labels), output.detach().square().mean());
  };
  const auto counted = [](const torch::Tensor& output, const torch::Tensor& labels) {
    return microreg::CountedLoss{torch::cross_entropy_loss(output, labels, {}, at::Reduction::Sum, /*ignore_index=*/2),
                                 (labels != 2).sum()};
  };
  const auto penalties = microreg::GradientNorm{} + 0.3 * microreg::FisherTrace{} +
                         0.2 * microreg::Unsquared{microreg::UnitJacobian{}} + 0.1 * microreg::InputJacobian{};
  const auto check = [&](const auto& loss, const microreg::RegularizerOptions& options) {
    const auto step = [&](std::int64_t workers) {
      auto with_workers = options;
      with_workers.workers = workers;
      return two_steps<NoisyNet>(loss, penalties, with_workers, input, target);
    };
    const auto one = step(1);
    for (const std::int64_t workers : {2, 3, 16, 2, 3, 16}) {
      CHECK(all_same_bits(step(workers), one));
    }
    const ThreadsInside threads(1);
    CHECK(all_same_bits(step(0), one));
  };
  SECTION("a ragged tail, outputs, parts of the loss") {
    check(mean, {.strength = 0.1, .micro_batch_size = 5, .keep_outputs = true, .gradient_ratio = true});
  }
  SECTION("one micro-batch") { check(mean, {.strength = 0.1, .micro_batch_size = 32}); }
  SECTION("a share of them penalised") {
    check(mean, {.strength = 0.1, .micro_batch_size = 3, .sampling = {.share = 0.4}});
  }
  SECTION("a loss that counts") { check(counted, {.strength = 0.1, .micro_batch_size = 5}); }
  SECTION("mixed precision, whose penalties are differentiated apart") {
    check(mean, {.strength = 0.1, .micro_batch_size = 5, .autocast = torch::kHalf, .loss_scale = 16});
  }
  SECTION("a generator for what penalties draw") {
    const at::Generator generator = helpers::generator(5);
    const auto step = [&](std::int64_t workers) {
      at::Generator(generator).set_current_seed(5);
      auto result = two_steps<NoisyNet>(
          mean, penalties, {.strength = 0.1, .micro_batch_size = 5, .generator = generator, .workers = workers}, input,
          target);
      result.push_back(generator.get_state());
      return result;
    };
    CHECK(all_same_bits(step(3), step(1)));
  }
  SECTION("a difference that displaces the parameters, which runs in order") {
    const ThreadsInside threads(1);  // a difference takes this thread's own
    const auto smooth = microreg::GradientNorm{};
    const auto step = [&](std::int64_t workers) {
      return two_steps<NoisyNet>(
          mean, smooth,
          {.strength = 0.1, .micro_batch_size = 5, .estimator = microreg::ForwardDifference{}, .workers = workers},
          input, target);
    };
    CHECK(all_same_bits(step(3), step(0)));
  }
}

TEST_CASE("a difference that leaves the parameters alone gives the same bits with any number of workers", "[workers]") {
  torch::manual_seed(1);
  const torch::Tensor input = torch::randn({22, 2, 9, 9});
  const torch::Tensor target = torch::randint(networks::classes, {22});
  const auto check = [&](const auto& penalty, const microreg::Estimator& estimator) {
    const auto step = [&](std::int64_t workers) {
      return two_steps<NoisyNet>(cross_entropy, penalty,
                                 {.strength = 0.1,
                                  .micro_batch_size = 5,
                                  .estimator = estimator,
                                  .sampling = {.share = 0.8},
                                  .gradient_ratio = true,
                                  .workers = workers},
                                 input, target);
    };
    const auto one = step(1);
    for (const std::int64_t workers : {2, 3, 16, 2, 3, 16}) {
      CHECK(all_same_bits(step(workers), one));
    }
    const auto none = step(0);  // adds the same up in another order
    REQUIRE(none.size() == one.size());
    const std::size_t count = NoisyNet()->parameters().size();
    const auto gradient = [&](const std::vector<torch::Tensor>& all) {
      std::vector<torch::Tensor> flat;
      for (std::size_t i = 0; i < count; ++i) {
        flat.push_back(all[i].flatten());
      }
      return torch::cat(flat);
    };
    CHECK(relative_error(gradient(one), gradient(none)) < 1e-3);
    for (std::size_t i = count; i < one.size(); ++i) {
      CAPTURE(i);
      CHECK((one[i].is_floating_point() ? relative_error(one[i], none[i]) < 1e-3 : same_bits(one[i], none[i])));
    }
  };
  const auto penalties = microreg::GradientNorm{} + 0.3 * microreg::FisherTrace{} +
                         0.2 * microreg::Unsquared{microreg::UnitJacobian{}} + 0.1 * microreg::InputJacobian{};
  SECTION("forward, copies") {
    check(microreg::GradientNorm{}, microreg::ForwardDifference{.displace = microreg::Displace::copies});
  }
  SECTION("central, copies, several penalties") {
    check(penalties, microreg::CentralDifference{.displace = microreg::Displace::copies});
  }
  SECTION("copies, without a proof") {
    check(penalties, microreg::ForwardDifference{.check_every = 0, .displace = microreg::Displace::copies});
  }
  SECTION("the input alone is displaced") { check(microreg::InputJacobian{}, microreg::ForwardDifference{}); }
}

TEST_CASE("a further pass that leaves a large buffer alone leaves it as others have made it", "[workers]") {
  torch::manual_seed(1);
  const torch::Tensor target = torch::arange(24).floor_divide(4);  // the number of the micro-batch
  torch::Tensor input = torch::randn({24, 6});
  input.select(1, 0).copy_(1 - 2 * target.remainder(2));  // every other one writes
  std::optional<HeldBack> held;
  const auto loss = [&](const torch::Tensor& output, const torch::Tensor& labels) {
    if (held.has_value()) {
      held->note(labels[0].item<std::int64_t>());
    }
    return torch::cross_entropy_loss(output, torch::zeros_like(labels));
  };
  for (const std::int64_t workers : {0, 1, 2, 3}) {
    BankNet model;
    microreg::Regularizer regularizer(
        model, loss, microreg::GradientNorm{},
        {.micro_batch_size = 4,
         .estimator = microreg::ForwardDifference{.check_every = 0, .displace = microreg::Displace::copies},
         .workers = workers});
    if (workers > 1) {
      held.emplace();
    }
    (void)regularizer.backward(input, target);
    held.reset();
    CAPTURE(workers);
    CHECK(model->bank.eq(7).all().item<bool>());  // 1, 2 * 1 + 1, 2 * 3 + 1
  }
}

TEST_CASE("a difference in mixed precision gives the same bits with any number of workers", "[workers]") {
  torch::manual_seed(1);
  const torch::Tensor input = torch::randn({24, 6});
  const torch::Tensor target = torch::randint(6, {24});
  const auto step = [&](std::int64_t workers) {
    return two_steps<TwiceNet>(
        cross_entropy, microreg::GradientNorm{},
        {.micro_batch_size = 4,
         .estimator =
             microreg::ForwardDifference{.step = 0.1, .check_every = 0, .displace = microreg::Displace::copies},
         .autocast = torch::kBFloat16,
         .workers = workers},
        input, target);
  };
  const auto one = step(1);
  CHECK(all_same_bits(step(2), one));
  CHECK(all_same_bits(step(3), one));
}

TEST_CASE("differences run side by side where nothing is displaced that others read", "[workers]") {
  if (skipped_off_the_cpu("workers are for the CPU")) {
    return;
  }
  torch::manual_seed(1);
  const torch::Tensor images = torch::randn({16, 2, 9, 9});
  const auto overlaps = [&](auto model, const torch::Tensor& input, const auto& penalty,
                            const microreg::Estimator& estimator) {
    microreg::Regularizer regularizer(model, cross_entropy, penalty,
                                      {.strength = 0.1, .micro_batch_size = 4, .estimator = estimator, .workers = 2});
    const torch::Tensor target = torch::randint(networks::classes, {input.size(0)});
    const Overlap overlap;
    (void)regularizer.backward(input, target);
    return overlap.seen();
  };
  const microreg::ForwardDifference unproven{.check_every = 0};  // a micro-batch that proves something runs alone
  microreg::ForwardDifference copies = unproven;
  copies.displace = microreg::Displace::copies;
  CHECK(overlaps(NoisyNet(), images, microreg::GradientNorm{}, copies));
  CHECK(overlaps(NoisyNet(), images, microreg::InputJacobian{}, unproven));
  CHECK_FALSE(overlaps(NoisyNet(), images, microreg::GradientNorm{}, unproven));
  CHECK_FALSE(overlaps(SpectralNet(), torch::randn({16, 6}), microreg::GradientNorm{}, copies));
}

TEST_CASE("an error in a further pass of a difference stops the others, and nothing has changed", "[workers]") {
  torch::manual_seed(1);
  NoisyNet model;
  const torch::Tensor input = torch::randn({24, 2, 9, 9});
  const torch::Tensor target = torch::arange(24).floor_divide(4);  // the number of the micro-batch
  std::mutex mutex;
  std::map<std::int64_t, int> calls;
  std::int64_t first = 6;
  const auto loss = [&](const torch::Tensor& output, const torch::Tensor& labels) {
    const auto part = labels[0].item<std::int64_t>();
    const std::lock_guard lock(mutex);
    if (++calls[part] == 2 && part >= first) {
      throw std::runtime_error("micro-batch " + std::to_string(part));
    }
    return torch::cross_entropy_loss(output, torch::zeros_like(labels));
  };
  for (const std::int64_t workers : {1, 2, 3, 8}) {
    microreg::Regularizer regularizer(
        model, loss, microreg::GradientNorm{},
        {.strength = 0.1,
         .micro_batch_size = 4,
         .estimator = microreg::ForwardDifference{.check_every = 0, .displace = microreg::Displace::copies},
         .workers = workers});
    for (first = 0; first < 6; ++first) {
      calls.clear();
      const Watch watch(*model);
      CHECK(message_of<std::runtime_error>([&] { (void)regularizer.backward(input, target); }) ==
            "micro-batch " + std::to_string(first));
      CHECK(watch.unchanged());
    }
  }
}

TEST_CASE("workers see the mixed precision and the gradient mode around the step", "[workers]") {
  if (skipped_off_the_cpu("workers are for the CPU")) {
    return;
  }
  torch::manual_seed(1);
  const torch::Tensor input = torch::randn({12, 2, 9, 9});
  const torch::Tensor target = torch::randint(networks::classes, {12});
  const auto step = [&](std::int64_t workers) {
    const microreg::Autocast half(torch::kCPU, torch::kHalf);
    return two_steps<NoisyNet>(cross_entropy, microreg::GradientNorm{},
                               {.strength = 0.1, .micro_batch_size = 4, .workers = workers}, input, target);
  };
  const auto with = step(2);
  const ThreadsInside threads(1);
  CHECK(all_same_bits(with, step(0)));
  const auto without = two_steps<NoisyNet>(cross_entropy, microreg::GradientNorm{},
                                           {.strength = 0.1, .micro_batch_size = 4}, input, target);
  CHECK_FALSE(all_same_bits(with, without));
}

TEST_CASE("workers see the rest of LibTorch's state of a thread", "[workers]") {
  if (skipped_off_the_cpu("workers are for the CPU")) {
    return;
  }
  torch::manual_seed(1);
  const torch::Tensor input = torch::randn({24, 6});
  const torch::Tensor target = torch::zeros({24, 6});
  // The end of a nested scope clears the cache of casts where nothing is around it.
  const auto nested = [](const torch::Tensor& output, const torch::Tensor& y) {
    {
      const microreg::Autocast again(torch::kCPU, torch::kBFloat16);
      (void)torch::mm(output, output.t());
    }
    return torch::mse_loss(output.to(torch::kFloat), y);
  };
  TwiceNet model;
  const auto twice = [&](const torch::Tensor& x) {
    const torch::Tensor once = torch::tanh(model->layer(x));
    {
      const microreg::Autocast again(torch::kCPU, torch::kBFloat16);
    }
    return model->layer(once);
  };
  microreg::FunctionModel network{twice, model->parameters()};
  const auto step = [&](std::int64_t workers) {
    clear_grad(model->parameters());
    const microreg::Autocast autocast(torch::kCPU, torch::kBFloat16);
    microreg::Regularizer regularizer(network, nested, microreg::GradientNorm{},
                                      {.strength = 0.1, .micro_batch_size = 4, .workers = workers});
    const auto report = regularizer.backward(input, target);
    return left_behind(*model, report);
  };
  const auto one = step(1);
  for (const std::int64_t workers : {2, 3, 3, 3}) {
    CHECK(all_same_bits(step(workers), one));
  }

  struct Counts final : c10::WarningHandler {
    void process(const c10::Warning& /*warning*/) override { ++count; }
    int count = 0;
  } warnings;
  std::set<std::thread::id> threads;
  std::set<bool> optimized;
  const auto warns = [&](const torch::Tensor& output, const torch::Tensor& y) {
    TORCH_WARN("once a micro-batch");
    optimized.insert(torch::jit::getGraphExecutorOptimize());
    threads.insert(std::this_thread::get_id());
    std::this_thread::sleep_for(std::chrono::milliseconds(5));
    return torch::mse_loss(output, y);
  };
  {
    const c10::WarningUtils::WarningHandlerGuard guard(&warnings);
    const torch::jit::GraphOptimizerEnabledGuard plain(false);
    microreg::Regularizer regularizer(model, warns, microreg::GradientNorm{},
                                      {.strength = 0.1, .micro_batch_size = 4, .workers = 3});
    (void)regularizer.backward(input, target);
  }
  CHECK(warnings.count == 6);
  CHECK(threads.size() > 1);
  CHECK(optimized == std::set<bool>{false});
}

TEST_CASE("a step within a worker is nested, and may not displace what others read", "[workers]") {
  if (skipped_off_the_cpu("workers are for the CPU")) {
    return;
  }
  torch::manual_seed(1);
  TwiceNet model;
  const torch::Tensor input = torch::randn({24, 6});
  const torch::Tensor target = torch::randn({24, 6});
  const auto step = [&](const microreg::Estimator& outer, std::int64_t workers, const auto& inner) {
    const auto loss = [&](const torch::Tensor& output, const torch::Tensor& y) {
      std::this_thread::sleep_for(std::chrono::milliseconds(5));
      inner();
      return torch::mse_loss(output, y);
    };
    microreg::Regularizer regularizer(model, loss, microreg::GradientNorm{},
                                      {.strength = 0.1, .micro_batch_size = 4, .estimator = outer, .workers = workers});
    (void)regularizer.backward(input, target);
  };
  const auto measures = [&] {
    (void)microreg::measure(model, torch::nn::MSELoss(), microreg::GradientNorm{}, input, target);
  };
  const auto displaces = [&] {
    microreg::Regularizer regularizer(model, torch::nn::MSELoss(), microreg::GradientNorm{},
                                      {.estimator = microreg::ForwardDifference{}});
    (void)regularizer.backward(input, target);
  };
  CHECK_NOTHROW(step(microreg::Exact{}, 2, measures));
  for (int repeat = 0; repeat < 3; ++repeat) {  // whichever thread has which micro-batch
    const Watch watch(*model);
    CHECK(has(message_of<microreg::ModelError>([&] { step(microreg::Exact{}, 2, displaces); }),
              {"nested", "side by side", "workers = 0"}));
    CHECK(watch.unchanged());
  }
  CHECK_NOTHROW(step(microreg::Exact{}, 0, displaces));
  CHECK_NOTHROW(step(microreg::Exact{}, 1, displaces));  // nothing is beside it
}

TEST_CASE("measure gives the same bits with workers, and leaves nothing behind", "[workers]") {
  torch::manual_seed(1);
  NoisyNet model;
  const torch::Tensor input = torch::randn({22, 2, 9, 9});
  const torch::Tensor target = torch::randint(networks::classes, {22});
  const auto measured = [&](std::int64_t workers) {
    torch::manual_seed(8);
    const auto report = microreg::measure(model, cross_entropy, microreg::GradientNorm{} + microreg::FisherTrace{},
                                          input, target, {.micro_batch_size = 5, .workers = workers});
    return left_behind(*model, report);
  };
  const auto one = measured(1);
  CHECK(all_same_bits(measured(2), one));
  CHECK(all_same_bits(measured(3), one));
  const ThreadsInside threads(1);
  CHECK(all_same_bits(measured(0), one));
}

TEST_CASE("a micro-batch is differentiated beside the next one, unless the two would meet", "[workers]") {
  if (skipped_off_the_cpu("on a device there is nothing to gain by it")) {
    return;
  }
  torch::manual_seed(1);
  const auto overlaps = [](auto model, const auto& loss, const torch::Tensor& input, std::int64_t workers) {
    microreg::Regularizer regularizer(model, loss, microreg::GradientNorm{},
                                      {.strength = 0.1, .micro_batch_size = 4, .workers = workers});
    const torch::Tensor target = torch::randint(networks::classes, {input.size(0)});
    const Overlap overlap;
    (void)regularizer.backward(input, target);
    return overlap.seen();
  };
  const torch::Tensor images = torch::randn({12, 2, 9, 9});
  const torch::Tensor vectors = torch::randn({12, 6});
  const auto reversed = [](const torch::Tensor& output, const torch::Tensor& target) {
    return torch::cross_entropy_loss(Reversal::apply(output), target);
  };
  const auto hooked = [](const torch::Tensor& output, const torch::Tensor& target) {
    output.register_hook([](const torch::Tensor& gradient) { return gradient * 2; });
    return torch::cross_entropy_loss(output, target);
  };
  CHECK(overlaps(NoisyNet(), cross_entropy, images, 2));
  CHECK_FALSE(overlaps(NoisyNet(), cross_entropy, images, 1));
  CHECK_FALSE(overlaps(SpectralNet(), cross_entropy, vectors, 2));
  CHECK_FALSE(overlaps(NoisyNet(), reversed, images, 2));
  CHECK_FALSE(overlaps(NoisyNet(), hooked, images, 2));
  const auto noded = [](const torch::Tensor& output, const torch::Tensor& target) {
    return torch::cross_entropy_loss(through_own_node(output), target);
  };
  CHECK_FALSE(overlaps(NoisyNet(), noded, images, 2));
  {
    NoisyNet model;
    model->output->weight.register_hook([](const torch::Tensor& gradient) { return gradient; });
    CHECK_FALSE(overlaps(model, cross_entropy, images, 2));
  }
  // Whatever else holds what is written to, and however it is written.
  const auto uncounted = [](torch::Tensor& u) { u.data().mul_(0.9); };
  const auto by_pointer = [](torch::Tensor& u) { u.mutable_data_ptr<float>()[1] += 0.5F; };
  CHECK_FALSE(overlaps(WritingNet(uncounted), cross_entropy, vectors, 2));
  CHECK_FALSE(overlaps(WritingNet(by_pointer), cross_entropy, vectors, 2));
  CHECK_FALSE(overlaps(WatchingNet(), cross_entropy, vectors, 2));
  CHECK(overlaps(WatchingNet(/*reads_statistics=*/false), cross_entropy, vectors, 2));
  CHECK(overlaps(DataNormNet(), cross_entropy, vectors, 2));
  {
    SpectralNet model;
    torch::Tensor last;
    const auto keeps = [&](const torch::Tensor& output, const torch::Tensor& target) {
      last = output;
      return torch::cross_entropy_loss(output, target);
    };
    last = model->forward(vectors);  // an older graph holds what the first forward pass writes to, and goes then
    CHECK_FALSE(overlaps(model, keeps, vectors, 2));
  }
  torch::nn::Linear encoder(6, 6);
  SpectralNet other;
  torch::nn::Linear plain(6, networks::classes);
  CHECK(overlaps(plain, cross_entropy, vectors, 2));
  microreg::Regularizer behind(plain, cross_entropy, microreg::GradientNorm{},
                               {.micro_batch_size = 4, .also_train = encoder->parameters(), .workers = 2});
  const Overlap overlap;
  (void)behind.backward(encoder(vectors), torch::randint(networks::classes, {12}));
  CHECK_FALSE(overlap.seen());
}

TEST_CASE("what operations do not tell of keeps its turn", "[workers]") {
  if (skipped_off_the_cpu("workers are for the CPU")) {
    return;
  }
  torch::manual_seed(1);
  const torch::Tensor vectors = torch::randn({24, 6});
  const torch::Tensor target = torch::randint(networks::classes, {24});
  torch::Tensor last;
  bool keeps_last = false;
  const auto loss = [&](const torch::Tensor& output, const torch::Tensor& y) {
    last = keeps_last ? output : last;
    return torch::cross_entropy_loss(output, y);
  };
  const auto overlaps = [&](auto model) {
    microreg::Regularizer regularizer(model, loss, microreg::GradientNorm{},
                                      {.strength = 0.1, .micro_batch_size = 4, .workers = 2});
    (void)regularizer.backward(vectors, target);
    if constexpr (std::is_same_v<decltype(model), torch::jit::Module>) {
      last = keeps_last ? model.forward({vectors}).toTensor() : last;
    }
    const Overlap overlap;
    (void)regularizer.backward(vectors, target);
    return overlap.seen();
  };
  {
    const at::DisableRecordFunctionGuard nobody_is_told;
    SpectralNet model;
    microreg::Regularizer regularizer(model, cross_entropy, microreg::GradientNorm{},
                                      {.strength = 0.1, .micro_batch_size = 4, .workers = 2});
    for (int i = 0; i < 5; ++i) {  // LibTorch's own check finds a graph whose tensors were overwritten
      CHECK_NOTHROW(regularizer.backward(vectors, target));
    }
  }
  // From its second call on TorchScript differentiates operations as one node, which keeps what it is handed.
  const auto scripted = [](const std::string& forward) {
    torch::jit::Module module("m");
    module.register_parameter("w", torch::randn({networks::classes, 6}).requires_grad_(), false);
    module.register_buffer("u", torch::ones({networks::classes}));
    module.define(forward);
    return module;
  };
  const std::string writing = R"(
    def forward(self, x):
        self.u.detach().mul_(0.9)
        h = torch.matmul(x, self.w.t())
        return torch.tanh(h * self.u) * self.u
  )";
  CHECK_FALSE(overlaps(scripted(writing)));
  keeps_last = true;  // an older graph goes as the new one comes: as many hold the buffer afterwards
  CHECK_FALSE(overlaps(scripted(writing)));
  keeps_last = false;
  CHECK(overlaps(scripted(R"(
    def forward(self, x):
        h = torch.matmul(x, self.w.t())
        return torch.tanh(h * self.u) * self.u
  )")));
  // Instance normalisation with statistics of its own, beside batch normalisation: written to, kept and not read.
  CHECK(overlaps(torch::nn::Sequential(
      torch::nn::Unflatten(torch::nn::UnflattenOptions(1, {2, 3})),
      torch::nn::InstanceNorm1d(torch::nn::InstanceNorm1dOptions(2).affine(true).track_running_stats(true)),
      torch::nn::Flatten(), torch::nn::Linear(6, networks::classes))));
  // On another thread of one's own.
  struct ThreadedImpl : torch::nn::Module {
    ThreadedImpl() {
      register_module("output", output);
      u = register_buffer("u", torch::ones({networks::classes}));
    }
    torch::Tensor forward(const torch::Tensor& x) {
      torch::Tensor result;
      std::thread([&] { result = output(x) * u; }).join();
      const torch::NoGradGuard no_grad;
      u.mul_(0.9);
      return result.tanh();
    }
    torch::nn::Linear output{6, networks::classes};
    torch::Tensor u;
  };
  // It is written to after the graph has kept it, so that LibTorch refuses that with and without workers.
  CHECK_THROWS(overlaps(std::make_shared<ThreadedImpl>()));
}

TEST_CASE("what a penalty reads is found on each micro-batch that is penalised", "[workers]") {
  if (skipped_off_the_cpu("workers are for the CPU")) {
    return;
  }
  torch::manual_seed(1);
  NoisyNet model;
  Overlap* watching = nullptr;
  bool reads = true;
  // Its derivative keeps the running variance, which the next forward pass moves without counting a version.
  const microreg::SquaredGradientNorm scaled([&](const auto& pass) {
    watching->begins();
    const torch::Tensor variance = model->norm->running_var.narrow(0, 0, networks::classes);
    return (pass.output.square() * (reads ? variance : variance.clone())).mean();
  });
  const auto step = [&](double share, std::int64_t seed) {
    microreg::Regularizer regularizer(model, cross_entropy, scaled,
                                      {.strength = 0.1,
                                       .micro_batch_size = 4,
                                       .sampling = {.share = share, .seed = static_cast<std::uint64_t>(seed)},
                                       .workers = 2});
    Overlap overlap(/*on_any=*/false, std::chrono::seconds(reads ? 2 : 60));  // a busy machine is slow to be seen
    watching = &overlap;
    const auto report = regularizer.backward(torch::randn({24, 2, 9, 9}), torch::randint(networks::classes, {24}));
    return std::tuple(report.penalised, overlap.seen());
  };
  int behind = 0;
  for (std::int64_t seed = 0; seed < 4; ++seed) {
    for (const bool now : {true, false}) {
      reads = now;
      // With all penalised where none may be seen: derivatives of others would be.
      const auto [penalised, seen] = step(reads ? 1 : 0.5, seed);
      behind += penalised.front() > 0 ? 1 : 0;
      CHECK(seen == !reads);
    }
  }
  CHECK(behind > 0);
}

TEST_CASE("networks that run in order give the same bits with workers", "[workers]") {
  torch::manual_seed(1);
  const auto check = [](const auto& step) {
    const auto one = step(1);
    CHECK(all_same_bits(step(3), one));
    const ThreadsInside threads(1);
    CHECK(all_same_bits(step(0), one));
  };
  const torch::Tensor target = torch::randint(networks::classes, {22});
  SECTION("spectral norm") {
    const torch::Tensor input = torch::randn({22, 6});
    check([&](std::int64_t workers) {
      return two_steps<SpectralNet>(cross_entropy, microreg::GradientNorm{},
                                    {.strength = 0.1, .micro_batch_size = 4, .workers = workers}, input, target);
    });
  }
  SECTION("an embedding that renormalises its rows") {
    const torch::Tensor input = torch::randint(9, {22, 3});
    check([&](std::int64_t workers) {
      return two_steps<RenormalisedNet>(cross_entropy, microreg::GradientNorm{},
                                        {.strength = 0.1, .micro_batch_size = 4, .workers = workers}, input, target);
    });
  }
}

TEST_CASE("model, loss and penalty are called by one worker at a time, in the order of the micro-batches",
          "[workers]") {
  torch::manual_seed(1);
  torch::nn::Linear layer(6, networks::classes);
  std::atomic<int> inside = 0, most = 0;
  std::vector<double> seen;  // what came in, in the order of the calls
  const auto visit = [&](const torch::Tensor& something) {
    most = std::max(most.load(), ++inside);
    std::this_thread::sleep_for(std::chrono::milliseconds(1));  // long enough for another to come in
    const torch::Tensor result = something * 1;
    --inside;
    return result;
  };
  const microreg::FunctionModel model{[&](const torch::Tensor& x) {
                                        seen.push_back(x[0][0].item<double>());
                                        return visit(layer->forward(x));
                                      },
                                      layer->parameters()};
  const auto loss = [&](const torch::Tensor& output, const torch::Tensor& labels) {
    return visit(torch::cross_entropy_loss(output, labels));
  };
  const microreg::SquaredGradientNorm penalty{
      [&](const torch::Tensor& output) { return visit(output.square().mean()); }};
  const torch::Tensor input = torch::arange(24.).unsqueeze(1).repeat({1, 6});
  microreg::Regularizer regularizer(model, loss, penalty, {.strength = 0.1, .micro_batch_size = 2, .workers = 4});
  (void)regularizer.backward(input, torch::zeros({24}, torch::kLong));
  CHECK(most == 1);
  REQUIRE(seen.size() == 12);
  for (std::size_t i = 0; i < seen.size(); ++i) {
    CHECK(seen[i] == 2.0 * static_cast<double>(i));
  }
}

TEST_CASE("an error in any micro-batch is that of the first one, and nothing has changed", "[workers]") {
  torch::manual_seed(1);
  NoisyNet model;
  const torch::Tensor input = torch::randn({24, 2, 9, 9});
  const torch::Tensor target = torch::randint(networks::classes, {24});
  std::atomic<int> calls{0};
  std::set<int> failing;
  const auto loss = [&](const torch::Tensor& output, const torch::Tensor& labels) {
    const int call = calls++;
    if (failing.contains(call)) {
      throw std::runtime_error("call " + std::to_string(call));
    }
    return torch::cross_entropy_loss(output, labels);
  };
  for (const std::int64_t workers : {1, 2, 3, 8}) {
    microreg::Regularizer regularizer(model, loss, microreg::GradientNorm{},
                                      {.strength = 0.1, .micro_batch_size = 4, .workers = workers});
    for (int first = 0; first < 6; ++first) {
      failing.clear();
      for (int call = first; call < 6; ++call) {
        failing.insert(call);
      }
      calls = 0;
      const Watch watch(*model);
      CHECK(message_of<std::runtime_error>([&] { (void)regularizer.backward(input, target); }) ==
            "call " + std::to_string(first));
      CHECK(calls == first + 1);
      CHECK(watch.unchanged());
      CHECK(regularizer.step() == 0);
    }
  }
}

TEST_CASE("an error while differentiating stops the others", "[workers]") {
  torch::manual_seed(1);
  NoisyNet model;
  const torch::Tensor input = torch::randn({24, 2, 9, 9});
  const torch::Tensor target = torch::randint(networks::classes, {24});
  int calls = 0;
  int from = 0;
  const auto loss = [&](const torch::Tensor& output, const torch::Tensor& labels) {
    const torch::Tensor plain = torch::cross_entropy_loss(output, labels);
    // ctc_loss has no second derivative.
    return calls++ < from
               ? plain
               : plain + torch::ctc_loss(torch::log_softmax(output, 1).unsqueeze(1), torch::ones({1, 2}, torch::kLong),
                                         torch::full({1}, output.size(0)), torch::full({1}, 2));
  };
  for (from = 0; from < 6; ++from) {
    calls = 0;
    microreg::Regularizer regularizer(model, loss, microreg::GradientNorm{},
                                      {.strength = 0.1, .micro_batch_size = 4, .workers = 3});
    const Watch watch(*model);
    CHECK(has(message_of<microreg::ModelError>([&] { (void)regularizer.backward(input, target); }),
              {"ctc_loss", "second derivative"}));
    CHECK(calls <= from + 3);
    CHECK(watch.unchanged());
  }
}

TEST_CASE("what is no std::exception comes out of a worker too", "[workers]") {
  torch::manual_seed(1);
  NoisyNet model;
  const auto loss = [](const torch::Tensor& output, const torch::Tensor& /*labels*/) {
    return output.size(0) == 4 ? output.square().mean() : throw 42;
  };
  microreg::Regularizer regularizer(model, loss, microreg::GradientNorm{}, {.micro_batch_size = 4, .workers = 2});
  const torch::Tensor input = torch::randn({11, 2, 9, 9});
  const torch::Tensor target = torch::randint(networks::classes, {11});
  const Watch watch(*model);
  CHECK_THROWS_AS(regularizer.backward(input, target), int);
  CHECK(watch.unchanged());
}

TEST_CASE("a forward pass that writes to a parameter or buffer later than the first one is refused", "[workers]") {
  if (skipped_off_the_cpu("workers are for the CPU")) {
    return;
  }
  torch::manual_seed(1);
  torch::nn::Linear model(6, networks::classes);
  const torch::Tensor scale = model->register_buffer("scale", torch::ones({networks::classes}));
  int calls = 0;
  int writes_at = 1;
  bool wait = false;
  microreg::Regularizer regularizer(model,
                                    [&](const torch::Tensor& output, const torch::Tensor& labels) {
                                      if (calls++ == writes_at) {
                                        scale.mul_(2);
                                        if (wait) {  // until the micro-batch before has failed by it
                                          std::this_thread::sleep_for(std::chrono::milliseconds(300));
                                        }
                                      }
                                      const torch::Tensor scaled = output * scale;
                                      // takes its time before the derivative reads what was written to
                                      const torch::Tensor large = scaled.mean() * torch::ones({600, 600});
                                      return torch::cross_entropy_loss(scaled, labels) + large.mm(large).mean();
                                    },
                                    microreg::GradientNorm{}, {.micro_batch_size = 4, .workers = 2});
  const torch::Tensor input = torch::randn({12, 6});
  const torch::Tensor target = torch::randint(networks::classes, {12});
  const Watch watch(*model);
  for (const bool slow : {false, true}) {
    calls = 0;
    wait = slow;
    CHECK(has(message_of<microreg::ModelError>([&] { (void)regularizer.backward(input, target); }),
              {"[5]", "workers = 0"}));
    CHECK(watch.unchanged());
  }
  calls = 0;
  writes_at = 0;  // from the first pass on: in order
  CHECK_NOTHROW(regularizer.backward(input, target));
}

TEST_CASE("a step with workers leaves the number of threads alone", "[workers]") {
  if (skipped_off_the_cpu("workers are for the CPU")) {
    return;
  }
  const int before = 3;
  const ThreadsInside threads(before);
  NoisyNet model;
  std::set<int> inside, beside;
  const auto loss = [&](const torch::Tensor& output, const torch::Tensor& labels) {
    inside.insert(at::get_num_threads());
    std::thread([&] { beside.insert(at::get_num_threads()); }).join();
    return torch::cross_entropy_loss(output, labels);
  };
  microreg::Regularizer regularizer(model, loss, microreg::GradientNorm{}, {.micro_batch_size = 4, .workers = 2});
  (void)regularizer.backward(torch::randn({12, 2, 9, 9}), torch::randint(networks::classes, {12}));
  CHECK(inside == std::set<int>{1});
  CHECK(beside == std::set<int>{before});
  CHECK(at::get_num_threads() == before);
  int elsewhere = 0;
  std::thread([&] { elsewhere = at::get_num_threads(); }).join();
  CHECK(elsewhere == before);
}

TEST_CASE("workers without a micro-batch have nothing to do, and end", "[workers]") {
  microreg::detail::in_turns(2, 0, [](std::int64_t, microreg::detail::Turns&) { FAIL("there is no piece"); });
}

TEST_CASE("a negative number of workers is refused", "[workers]") {
  torch::nn::Linear model(6, networks::classes);
  CHECK(has(message_of<microreg::OptionError>(
                [&] { (void)microreg::Regularizer(model, cross_entropy, microreg::GradientNorm{}, {.workers = -1}); }),
            {"workers is -1", "0"}));
}
