// Steps whose micro-batches are repeated from recordings (RegularizerOptions::cuda_graph), with a recorder that does
// the work again where a device would repeat its kernels: all but the capture itself, which test_cuda.cpp is about.
#include "helpers.hpp"
#include "networks.hpp"

#include <microreg/microreg.hpp>
#include <microreg/step/recordings.hpp>

#include <functional>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

using namespace helpers;

namespace {

using Work = std::function<void()>;

/// Does the work again. `disturb` stands for what could go wrong: it is called in place of it, with it.
class Again : public microreg::detail::Recordings {
 public:
  using Disturb = std::function<void(const Work&)>;

  explicit Again(Settings settings = {.shapes = 4, .check_every = 1000, .tolerance = 0}, Disturb disturb = nullptr)
      : Recordings(settings), disturb_(std::move(disturb)) {}

  /// The nodes in which graphs of these tensors end, null where there is none; and what they were when it recorded.
  static std::vector<const void*> ends_of(const std::vector<torch::Tensor>& tensors) {
    std::vector<const void*> result;
    for (const torch::Tensor& tensor : tensors) {
      result.push_back(torch::autograd::impl::try_get_grad_accumulator(tensor).get());
    }
    return result;
  }
  std::vector<torch::Tensor> watched;
  std::vector<const void*> at_record;

 protected:
  void require_device(c10::Device /*device*/) const override {}
  std::unique_ptr<microreg::detail::Recording> record(const Work& work,
                                                      const std::vector<at::Generator>& /*generators*/) override {
    const RecordedOnStandIn scope;
    at_record = ends_of(watched);
    for (int i = 0; i < 3; ++i) {  // as the warm-ups of a device
      work();
    }
    return std::make_unique<Repeated>(work, disturb_);
  }

 private:
  class Repeated final : public microreg::detail::Recording {
   public:
    Repeated(Work work, Disturb disturb) : work_(std::move(work)), disturb_(std::move(disturb)) {}
    void replay() override { disturb_ ? disturb_(work_) : work_(); }

   private:
    Work work_;
    Disturb disturb_;
  };

  Disturb disturb_;
};

/// A network with running statistics and dropout.
struct NetImpl : torch::nn::Module {
  torch::Tensor forward(const torch::Tensor& x) {
    const torch::Tensor h = torch::tanh(norm->forward(first->forward(x)));
    return last->forward(torch::dropout(h, 0.3, is_training()));
  }
  torch::nn::Linear first = register_module("first", torch::nn::Linear(6, 7));
  torch::nn::BatchNorm1d norm = register_module("norm", torch::nn::BatchNorm1d(7));
  torch::nn::Linear last = register_module("last", torch::nn::Linear(7, networks::classes));
};
TORCH_MODULE(Net);

Net net() {
  torch::manual_seed(4);
  Net result;
  result->to(torch::kFloat64);
  return result;
}

/// What a few steps of training leave, whose last micro-batch is short.
struct Trained {
  std::vector<torch::Tensor> state, norms, losses;
  torch::Tensor random;
  std::int64_t replayed = 0;
};

template <class Penalty>
Trained trained(const Penalty& penalty, microreg::RegularizerOptions options, int steps = 5,
                std::int64_t samples = 14) {
  Net model = net();
  const networks::Samples all = networks::vectors(samples);
  torch::optim::SGD optimizer(model->parameters(), 0.1);
  options.micro_batch_size = 4;
  microreg::Regularizer regularizer(model, cross_entropy, penalty, std::move(options));
  Trained result;
  for (int step = 0; step < steps; ++step) {
    optimizer.zero_grad();
    const microreg::Report report = regularizer.backward(all.input, all.target);
    optimizer.step();
    result.losses.push_back(report.micro_batch_losses);
    for (const microreg::PenaltyReport& each : report.penalties) {
      result.norms.push_back(each.micro_batch_norms);
    }
    if (report.gradient_ratio.defined()) {
      result.norms.push_back(report.gradient_ratio);
    }
    for (const auto& outputs : report.micro_batch_outputs) {
      result.norms.push_back(outputs.front());
    }
    result.replayed += report.replayed;
  }
  result.state = clones(model->parameters());
  for (const torch::Tensor& buffer : model->buffers()) {
    result.state.push_back(buffer.clone());
  }
  result.random = at::globalContext().defaultGenerator(test_device()).get_state();
  return result;
}

/// Those of a recording and those without it are the same, to rounding, and most micro-batches were repeated.
template <class Penalty>
void agrees(const Penalty& penalty, const microreg::RegularizerOptions& options, std::int64_t replayed = 11) {
  const Trained plain = trained(penalty, options);
  microreg::RegularizerOptions with_graph = options;
  with_graph.cuda_graph = std::make_shared<Again>();
  const Trained repeated = trained(penalty, with_graph);
  CHECK(plain.replayed == 0);
  CHECK(repeated.replayed == replayed);
  const auto same = [](const std::vector<torch::Tensor>& a, const std::vector<torch::Tensor>& b) {
    REQUIRE(a.size() == b.size());
    for (std::size_t i = 0; i < a.size(); ++i) {
      CHECK((a[i] - b[i]).abs().max().item<double>() <= 1e-12 * (1 + b[i].abs().max().item<double>()));
    }
  };
  same(repeated.state, plain.state);
  same(repeated.norms, plain.norms);
  same(repeated.losses, plain.losses);
  CHECK(same_bits(repeated.random, plain.random));
}

const networks::Samples& samples() {
  static const networks::Samples all = [] {
    torch::manual_seed(9);
    return networks::vectors(14);
  }();
  return all;
}

/// The message of the second step, in which recordings are made; nothing has changed after it.
template <class Error, class M, class Loss, class Penalty>
std::string refusal(M& model, const Loss& loss, const Penalty& penalty, microreg::RegularizerOptions options,
                    const torch::Tensor& x = samples().input) {
  options.micro_batch_size = 4;
  options.cuda_graph = std::make_shared<Again>();
  microreg::Regularizer regularizer(model, loss, penalty, options);
  (void)regularizer.backward(x, samples().target);
  const Watch watch(*model);
  const std::string message = message_of<Error>([&] { (void)regularizer.backward(x, samples().target); });
  CHECK(watch.unchanged());
  CHECK(regularizer.step() == 1);
  return message;
}

}  // namespace

TEST_CASE("Recorded micro-batches give the steps that they give otherwise") {
  // Three whole micro-batches and a ragged one a step. The first step records nothing, the second one makes the
  // recording with its first micro-batch.
  SECTION("gradient norm") { agrees(microreg::GradientNorm{}, {.strength = 0.1}); }
  SECTION("labels") { agrees(microreg::FisherTrace{}, {.strength = 0.1}); }
  SECTION("directions") { agrees(microreg::UnitJacobian{}, {.strength = 0.1}); }
  SECTION("average Jacobian") { agrees(microreg::AverageJacobian{}, {.strength = 0.1}); }
  SECTION("by the input") { agrees(microreg::InputJacobian{}, {.strength = 0.1}); }
  SECTION("unsquared") { agrees(microreg::Unsquared{microreg::GradientNorm{}}, {.strength = 0.1}); }
  SECTION("a sum with schedules") {
    const microreg::LinearWarmUp warm_up{.peak = 0.5, .steps = 7};
    agrees(warm_up * microreg::GradientNorm{} + 0.2 * microreg::AverageJacobian{}, {.strength = 0.3});
  }
  SECTION("strength 0") { agrees(microreg::GradientNorm{}, {.strength = 0.0}); }
  SECTION("a share of the micro-batches") {
    const Trained plain = trained(microreg::GradientNorm{}, {.strength = 0.1, .sampling = {.share = 0.5}}, 8);
    const Trained repeated =
        trained(microreg::GradientNorm{},
                {.strength = 0.1, .sampling = {.share = 0.5}, .cuda_graph = std::make_shared<Again>()}, 8);
    CHECK(repeated.replayed == 7 * 3 - 2);
    CHECK(relative_error(repeated.state.front(), plain.state.front()) < 1e-12);
  }
  SECTION("some parameters") {
    agrees(microreg::GradientNorm{},
           {.strength = 0.1, .select = [](const std::string& name, const torch::Tensor& /*parameter*/) {
              return name.starts_with("last");
            }});
  }
  SECTION("a sum over samples") {
    agrees(microreg::GradientNorm{}, {.strength = 0.1, .reduction = microreg::Reduction::total});
  }
  SECTION("the ratio, and outputs") {
    agrees(microreg::GradientNorm{}, {.strength = 0.1, .keep_outputs = true, .gradient_ratio = true});
  }
  SECTION("a generator of one's own") {
    const auto run = [](bool with_graph) {
      microreg::RegularizerOptions options{.strength = 0.1, .generator = generator(5)};
      options.cuda_graph = with_graph ? std::make_shared<Again>() : nullptr;
      Trained result = trained(microreg::UnitJacobian{}, options);
      result.random = options.generator->get_state();
      return result;
    };
    const Trained plain = run(false), repeated = run(true);
    CHECK(repeated.replayed == 11);
    CHECK(relative_error(repeated.state.front(), plain.state.front()) < 1e-12);
    CHECK(same_bits(repeated.random, plain.random));
  }
  SECTION("under autocast, the user's and the option's") {
    Net model = net();
    model->to(torch::kFloat32);
    model->eval();
    const torch::Tensor x = samples().input.to(torch::kFloat32);
    const auto run = [&](bool with_graph, bool by_option) {
      microreg::RegularizerOptions options{.strength = 0.1, .micro_batch_size = 4};
      if (by_option) {
        options.autocast = torch::kBFloat16;
      }
      options.cuda_graph = with_graph ? std::make_shared<Again>() : nullptr;
      microreg::Regularizer regularizer(model, cross_entropy, microreg::GradientNorm{}, options);
      for (int i = 0; i < 3; ++i) {
        std::optional<microreg::Autocast> half;
        if (!by_option) {
          half.emplace(torch::kCPU);
        }
        model->zero_grad();
        (void)regularizer.backward(x, samples().target);
        const torch::NoGradGuard no_grad;
        model->first->weight.mul_(1.01);  // what was cast before is of other weights
      }
      model->first->weight.data().div_(1.01 * 1.01 * 1.01);
      return flat_grad(model->parameters());
    };
    const bool by_option = GENERATE(true, false);
    const torch::Tensor plain = run(false, by_option);
    CHECK(relative_error(run(true, by_option), plain) < 1e-2);
  }
  SECTION("stock") { agrees(microreg::GradientNorm{}, {.strength = 0.1, .fused = false}); }
}

TEST_CASE("What a recording was not made for is recorded anew, or done operation by operation") {
  Net model = net();
  const auto graph = std::make_shared<Again>(Again::Settings{.shapes = 3, .check_every = 1000, .tolerance = 0});
  microreg::Regularizer regularizer(model, cross_entropy, microreg::GradientNorm{},
                                    {.strength = 0.1, .micro_batch_size = 4, .cuda_graph = graph});
  const networks::Samples& all = samples();
  const auto step = [&] {
    model->zero_grad();
    const std::int64_t replayed = regularizer.backward(all.input, all.target).replayed;
    const torch::Tensor with = flat_grad(model->parameters());
    // The same step without, from the same random numbers and statistics: dropout is off, so only the mode counts.
    return std::pair(with, replayed);
  };
  const auto plain = [&] {
    model->zero_grad();
    microreg::Regularizer other(model, cross_entropy, microreg::GradientNorm{},
                                {.strength = 0.1, .micro_batch_size = 4});
    (void)other.backward(all.input, all.target);
    return flat_grad(model->parameters());
  };
  (void)step();
  CHECK(step().second == 2);
  CHECK(step().second == 3);
  CHECK(graph->recordings() == 1);
  model->eval();  // a mode of its own
  {
    const auto [gradient, replayed] = step();
    CHECK(replayed == 2);
    CHECK(relative_error(gradient, plain()) < 1e-12);
  }
  CHECK(graph->recordings() == 2);
  {
    const torch::NoGradGuard no_grad;
    model->first->weight.set_data(model->first->weight * 2);  // other memory
  }
  {
    const auto [gradient, replayed] = step();
    CHECK(replayed == 2);
    CHECK(relative_error(gradient, plain()) < 1e-12);
  }
  CHECK(graph->recordings() == 3);
  model->first->weight.requires_grad_(false);  // no room for a fourth
  {
    const auto [gradient, replayed] = step();
    CHECK(replayed == 0);
    CHECK(relative_error(gradient, plain()) < 1e-12);
  }
  CHECK(graph->recordings() == 3);
  graph->reset();
  CHECK(step().second == 2);
  CHECK(graph->recordings() == 1);
}

TEST_CASE("One object serves several Regularizers, and outlives them") {
  const auto graph = std::make_shared<Again>();
  const auto run = [&](double slope) {
    Net model = net();
    model->eval();
    microreg::Regularizer regularizer(
        model, [=](const torch::Tensor& o, const torch::Tensor& y) { return slope * torch::cross_entropy_loss(o, y); },
        microreg::GradientNorm{}, {.strength = 0.1, .micro_batch_size = 4, .cuda_graph = graph});
    (void)regularizer.backward(samples().input, samples().target);
    microreg::Regularizer copy = regularizer;  // knows that one step was taken, and may replay in its first
    for (microreg::Regularizer<>* each : {&regularizer, &copy}) {
      model->zero_grad();
      (void)each->backward(samples().input, samples().target);
    }
    const torch::Tensor with = flat_grad(model->parameters());
    model->zero_grad();
    microreg::Regularizer plain(
        model, [=](const torch::Tensor& o, const torch::Tensor& y) { return slope * torch::cross_entropy_loss(o, y); },
        microreg::GradientNorm{}, {.strength = 0.1, .micro_batch_size = 4});
    (void)plain.backward(samples().input, samples().target);
    CHECK(relative_error(with, flat_grad(model->parameters())) < 1e-12);
  };
  run(1);
  run(3);
  CHECK(graph->recordings() == 2);
  CHECK(graph->replays() > 8);
}

TEST_CASE("A recording that repeats something else is refused, and nothing has changed") {
  Net model = net();
  const networks::Samples& all = samples();
  const auto refused = [&](Again::Disturb disturb) {
    microreg::Regularizer regularizer(
        model, cross_entropy, microreg::GradientNorm{},
        {.strength = 0.1,
         .micro_batch_size = 4,
         .cuda_graph = std::make_shared<Again>(Again::Settings{.shapes = 4, .check_every = 0, .tolerance = 0},
                                               std::move(disturb))});
    (void)regularizer.backward(all.input, all.target);
    const Watch watch(*model);
    const std::string message =
        message_of<microreg::ModelError>([&] { (void)regularizer.backward(all.input, all.target); });
    CHECK(watch.unchanged());
    CHECK(has(message, {"what the CUDA graph repeats is", "% off", "cuda_graph empty"}));
  };
  SECTION("nothing is repeated: the gradients are those of the warm-up's dropout") {
    refused([](const Work&) {});
  }
  SECTION("other random numbers") {
    refused([](const Work& work) {
      torch::manual_seed(0);
      work();
    });
  }
}

TEST_CASE("A value on the host that changes is found where the recording is compared") {
  Net model = net();
  double slope = 1;
  microreg::FunctionModel function{[&](const torch::Tensor& x) { return model->forward(x) * slope; },
                                   microreg::modules(model)};
  const auto with_old_slope = [&](const Work& work) {  // as the kernels have it
    const double now = std::exchange(slope, 1);
    work();
    slope = now;
  };
  microreg::Regularizer regularizer(
      function, cross_entropy, microreg::GradientNorm{},
      {.strength = 0.1,
       .micro_batch_size = 4,
       .cuda_graph =
           std::make_shared<Again>(Again::Settings{.shapes = 4, .check_every = 2, .tolerance = 0}, with_old_slope)});
  for (int i = 0; i < 2; ++i) {
    (void)regularizer.backward(samples().input, samples().target);
  }
  slope = 1.5;
  const Watch watch(*model);
  CHECK(has(message_of<microreg::ModelError>([&] { (void)regularizer.backward(samples().input, samples().target); }),
            {"what the CUDA graph repeats is", "% off", "value on the host"}));
  CHECK(watch.unchanged());
}

TEST_CASE("What cannot be recorded is refused by name") {
  Net model = net();
  const auto gradient_norm = microreg::GradientNorm{};
  SECTION("differences") {
    CHECK(has(message_of<microreg::OptionError>([&] {
                microreg::Regularizer regularizer(
                    model, cross_entropy, gradient_norm,
                    {.estimator = microreg::ForwardDifference{}, .cuda_graph = std::make_shared<Again>()});
              }),
              {"cuda_graph is set and the estimator is a difference"}));
  }
  SECTION("parameters that the forward pass writes to") {
    torch::nn::Embedding table(torch::nn::EmbeddingOptions(9, 6).max_norm(0.1));
    table->to(torch::kFloat64);
    torch::nn::Linear last(6, networks::classes);
    last->to(torch::kFloat64);
    microreg::FunctionModel function{[&](const torch::Tensor& x) { return last->forward(table->forward(x)); },
                                     microreg::modules(table, last)};
    microreg::Regularizer regularizer(function, cross_entropy, gradient_norm,
                                      {.micro_batch_size = 4, .cuda_graph = std::make_shared<Again>()});
    const torch::Tensor x = torch::randint(9, {8}), y = torch::randint(networks::classes, {8});
    (void)regularizer.backward(x, y);
    CHECK(has(message_of<microreg::ModelError>([&] { (void)regularizer.backward(x, y); }),
              {"the forward pass writes to parameters", "cuda_graph"}));
  }
  SECTION("a loss scale") {
    microreg::Regularizer regularizer(model, cross_entropy, gradient_norm,
                                      {.loss_scale = 16, .cuda_graph = std::make_shared<Again>()});
    CHECK(has(message_of<microreg::OptionError>([&] { (void)regularizer.backward(samples().input, samples().target); }),
              {"cuda_graph", "loss_scale"}));
  }
  SECTION("counts") {
    const auto counted = [](const torch::Tensor& o, const torch::Tensor& y) {
      return microreg::CountedLoss{torch::nll_loss(o.log_softmax(1), y, {}, at::Reduction::Sum), y.ge(0).sum()};
    };
    microreg::Regularizer regularizer(model, counted, gradient_norm, {.cuda_graph = std::make_shared<Again>()});
    CHECK(has(message_of<microreg::ModelError>([&] { (void)regularizer.backward(samples().input, samples().target); }),
              {"CountedLoss", "cuda_graph"}));
  }
  SECTION("an input with a graph") {
    const torch::Tensor w = torch::ones({6}, torch::kFloat64).requires_grad_();
    CHECK(has(refusal<microreg::ModelError>(model, cross_entropy, gradient_norm,
                                            {.also_train = {w}, .other_leaves = microreg::OtherLeaves::ignored},
                                            samples().input * w),
              {"input carries a graph, which a recording does not repeat"}));
  }
  SECTION("a batch with more than tensors") {
    microreg::FunctionModel function{
        [&](const std::tuple<torch::Tensor, double>& x) { return model->forward(std::get<0>(x) * std::get<1>(x)); },
        microreg::modules(model)};
    microreg::Regularizer<std::tuple<torch::Tensor, double>> regularizer(
        function, cross_entropy, gradient_norm, {.micro_batch_size = 4, .cuda_graph = std::make_shared<Again>()});
    const std::tuple<torch::Tensor, double> x{samples().input, 2.0};
    (void)regularizer.backward(x, samples().target);
    CHECK(has(message_of<microreg::ModelError>([&] { (void)regularizer.backward(x, samples().target); }),
              {"the input holds more than tensors"}));
  }
  SECTION("an operation that waits, by its name") {
    class Waiting final : public Again {
      std::unique_ptr<microreg::detail::Recording> record(const Work& work,
                                                          const std::vector<at::Generator>& generators) override {
        (void)Again::record(work, generators);
        torch::ones({3}).nonzero();
        throw std::runtime_error("CUDA error: operation not permitted when stream is capturing\nbacktrace");
      }
    };
    microreg::Regularizer regularizer(model, cross_entropy, gradient_norm,
                                      {.micro_batch_size = 4, .cuda_graph = std::make_shared<Waiting>()});
    (void)regularizer.backward(samples().input, samples().target);
    const Watch watch(*model);
    const std::string message =
        message_of<microreg::ModelError>([&] { (void)regularizer.backward(samples().input, samples().target); });
    CHECK(has(message, {"cannot be recorded as a CUDA graph", "not permitted when stream is capturing (at or behind",
                        "nonzero"}));
    CHECK_FALSE(has(message, {"backtrace"}));
    CHECK(watch.unchanged());
  }
}

TEST_CASE("A step that fails behind a recorded micro-batch leaves nothing") {
  if (skipped_off_the_cpu("values are looked at on the CPU unless asked")) {
    return;
  }
  Net model = net();
  microreg::Regularizer regularizer(model, cross_entropy, microreg::FisherTrace{},
                                    {.strength = 0.1, .micro_batch_size = 4, .cuda_graph = std::make_shared<Again>()});
  (void)regularizer.backward(samples().input, samples().target);
  (void)regularizer.backward(samples().input, samples().target);
  torch::Tensor y = samples().target.clone();
  y[13] = networks::classes;  // no class, in the ragged micro-batch
  const Watch watch(*model);
  CHECK_THROWS(regularizer.backward(samples().input, y));
  CHECK(watch.unchanged());
  torch::Tensor x = samples().input.clone();
  x[6].fill_(std::nan(""));  // in a recorded one
  CHECK_THROWS_AS(regularizer.backward(x, samples().target), microreg::NonFiniteError);
  CHECK(watch.unchanged());
}

TEST_CASE("No recording is made of a micro-batch that is not finite") {
  if (skipped_off_the_cpu("values are looked at on the CPU unless asked")) {
    return;
  }
  Net model = net();
  const auto graph = std::make_shared<Again>();
  microreg::Regularizer regularizer(model, cross_entropy, microreg::GradientNorm{},
                                    {.strength = 0.1, .micro_batch_size = 4, .cuda_graph = graph});
  const torch::Tensor four = samples().input.narrow(0, 0, 4), labels = samples().target.narrow(0, 0, 4);
  (void)regularizer.backward(four, labels);
  const Watch watch(*model);
  CHECK_THROWS_AS(regularizer.backward(torch::full_like(four, std::nan("")), labels), microreg::NonFiniteError);
  CHECK(watch.unchanged());
  CHECK(graph->recordings() == 0);
  CHECK(regularizer.backward(four, labels).replayed == 0);
  CHECK(graph->recordings() == 1);
  CHECK(regularizer.backward(four, labels).replayed == 1);
}

TEST_CASE("Recordings are apart from graphs that are held elsewhere") {
  Net model = net();
  const torch::Tensor held = model->forward(samples().input);  // as a loss of the step before is
  const std::vector<const void*> before = Again::ends_of(model->parameters());
  CHECK(before.front() != nullptr);
  const auto graph = std::make_shared<Again>();
  graph->watched = model->parameters();
  microreg::Regularizer regularizer(model, cross_entropy, microreg::GradientNorm{},
                                    {.micro_batch_size = 7, .cuda_graph = graph});
  (void)regularizer.backward(samples().input, samples().target);
  CHECK(regularizer.backward(samples().input, samples().target).replayed == 1);
  CHECK(graph->at_record == std::vector<const void*>(before.size(), nullptr));
  CHECK(Again::ends_of(model->parameters()) == before);
  CHECK_NOTHROW(held.sum().backward());
}
