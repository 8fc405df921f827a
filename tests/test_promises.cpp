// The promises around a step: nothing is left behind, nobody's tensors are touched, `.grad` is as LibTorch leaves it,
// and batches and models of every kind are right or refused in one sentence.
#include "helpers.hpp"
#include "networks.hpp"

#include <c10/core/Allocator.h>
#include <c10/util/ThreadLocalDebugInfo.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/script.h>
#include <microreg/microreg.hpp>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <functional>
#include <limits>
#include <map>
#include <stdexcept>
#include <thread>

using namespace helpers;
using microreg::BatchError;
using microreg::Exact;
using microreg::ForwardDifference;
using microreg::FunctionModel;
using microreg::GradientNorm;
using microreg::ModelError;
using microreg::Regularizer;
using torch::Tensor;

namespace {

using Tensors = std::vector<Tensor>;

Tensor ce(const Tensor& o, const Tensor& y) { return torch::cross_entropy_loss(o, y); }
Tensor mse(const Tensor& o, const Tensor& y) { return torch::mse_loss(o, y); }
Tensor doubles(at::IntArrayRef shape) { return torch::randn(shape, torch::kFloat64); }
Tensor weights(at::IntArrayRef shape) { return doubles(shape).mul_(0.5).requires_grad_(true); }

/// Counts what LibTorch's allocator gives out.
struct Allocated : c10::MemoryReportingInfoBase {
  void reportMemoryUsage(void* /*pointer*/, std::int64_t size, std::size_t, std::size_t, c10::Device) override {
    bytes += std::max<std::int64_t>(size, 0);
  }
  [[nodiscard]] bool memoryProfilingEnabled() const override { return true; }
  std::int64_t bytes = 0;
};

/// A batch whose copies share their tensors, as modules do.
struct Handle {
  struct State {
    Tensor a, b;
  };
  std::shared_ptr<State> state = std::make_shared<State>();
};
auto microreg_fields(Handle& h) { return std::tie(h.state->a, h.state->b); }

/// A batch of references.
struct References {
  Tensor& a;
};
auto microreg_fields(References& r) { return std::tie(r.a); }

/// A batch of its own.
struct Own {
  Tensor a, b;
};
auto microreg_fields(Own& o) { return std::tie(o.a, o.b); }

struct MaskedImpl : torch::nn::Module {
  MaskedImpl() : mask(register_buffer("mask", torch::ones({1, 4}, torch::kFloat64).expand({8, 4}))) {
    register_module("l", l);
    to(torch::kFloat64);
  }
  Tensor forward(const Tensor& x) { return l(x * mask.narrow(0, 0, x.size(0))); }
  torch::nn::Linear l{4, 3};
  Tensor mask;
};
TORCH_MODULE(Masked);

/// Writes to its buffer in ways that change more than values.
struct CachingImpl : torch::nn::Module {
  enum class How { resize, replace };
  explicit CachingImpl(How way) : how(way), cache(register_buffer("cache", torch::ones({2}, torch::kFloat64))) {
    register_module("l", l);
    l->to(torch::kFloat64);
  }
  Tensor forward(const Tensor& x) {
    const torch::NoGradGuard no_grad;
    if (how == How::resize) {
      cache.resize_({x.size(0), 4}).copy_(x.detach());
    } else {
      cache.set_data(x.detach().clone());
    }
    const torch::AutoGradMode enable(true);
    return l(x);
  }
  How how;
  torch::nn::Linear l{4, 3};
  Tensor cache;
};
TORCH_MODULE(Caching);

torch::nn::Sequential normalised() {
  torch::nn::Sequential model(torch::nn::Linear(6, 8), torch::nn::BatchNorm1d(8), torch::nn::Linear(8, 3));
  model->to(torch::kFloat64);
  return model;
}

}  // namespace

TEST_CASE("a batch that refers to the user's tensors", "[promises]") {
  torch::manual_seed(1);
  const Tensor w = weights({4, 3});
  Tensor x = doubles({8, 4}), z = doubles({8, 4}), y = torch::randint(3, {8});
  const Tensor before = x.clone();
  FunctionModel model{[&](const Tensor& a, const Tensor& b) { return torch::tanh(a + b).matmul(w); }, {w}};
  const auto untouched = [&] { return x.size(0) == 8 && !x.requires_grad() && same_bits(x, before); };
  SECTION("std::tie and forward_as_tuple") {
    Regularizer r(model, ce, GradientNorm{}, {.micro_batch_size = 4});
    r.backward(std::tie(x, z), y);
    const Tensor tied = flat_grad({w});
    clear_grad({w});
    r.backward(std::forward_as_tuple(x, z), y);
    CHECK(same_bits(flat_grad({w}), tied));
    clear_grad({w});
    r.backward(std::make_tuple(x, z), y);
    CHECK(same_bits(flat_grad({w}), tied));
    CHECK(untouched());
    (void)microreg::measure(model, ce, microreg::InputJacobian{}, std::tie(x, z), y, {.micro_batch_size = 4});
    CHECK(untouched());
    Regularizer j(model, ce, microreg::InputJacobian{}, {.estimator = ForwardDifference{.step = 0.05}});
    j.backward(std::tie(x, z), y);
    CHECK(untouched());
    for (auto [part, inputs, labels] : microreg::micro_batches(4, std::tie(x, z), y)) {
      CHECK(std::get<0>(inputs).size(0) == 4);
    }
    CHECK(untouched());
    CHECK(std::get<0>(microreg::slice(std::tie(x, z), 0, 3)).size(0) == 3);
    CHECK(untouched());
    using Constant = std::tuple<const Tensor, const Tensor>;
    CHECK(std::get<1>(microreg::slice(Constant(x, z), 0, 3)).size(0) == 3);
  }
  SECTION("handles with shared state, and structs of references") {
    Handle h;
    *h.state = {x, z};
    CHECK(has(message_of<BatchError>([&] { (void)microreg::slice(h, 0, 4); }), {"field 0", "microreg_slice"}));
    CHECK(h.state->a.size(0) == 8);
    CHECK(has(message_of<BatchError>([&] { (void)microreg::slice(std::vector<References>{{x}}, 0, 4); }), {"field 0"}));
    CHECK(untouched());
    CHECK(microreg::slice(Own{x, z}, 0, 4).a.size(0) == 4);
  }
}

TEST_CASE("a list of numbers beside the batch", "[promises]") {
  const Tensor x = doubles({10, 3});
  const auto refused = [&](const auto& list) {
    return message_of<BatchError>([&] { (void)microreg::sample_count(std::make_tuple(x, list)); });
  };
  CHECK(has(refused(std::vector<double>(10, 1.0)), {"batch[1]", "10", "PerSample"}));
  CHECK(has(refused(std::vector<bool>(10, true)), {"batch[1]", "PerSample"}));
  CHECK(has(refused(std::vector<std::string>(10, "a caption")), {"PerSample"}));
  CHECK(microreg::sample_count(std::make_tuple(x, std::vector<std::int64_t>{3, 3})) == 10);
  using Cut = std::tuple<Tensor, microreg::PerSample<double>, std::vector<bool>>;
  const Cut part = microreg::slice(Cut(x, std::vector<double>(10, 1.0), {true, false}), 2, 4);
  CHECK(std::get<1>(part).size() == 4);
  CHECK(std::get<2>(part).size() == 2);
}

TEST_CASE("a penalty by the input looks into lists of one element a sample", "[promises]") {
  torch::manual_seed(2);
  const Tensor w = weights({4, 3});
  using Lists = microreg::PerSample<Tensor>;
  const auto forward = [&](const Lists& in) {
    Tensors rows;
    for (const Tensor& points : in) {
      rows.push_back(torch::tanh(points.matmul(w)).sum(0));
    }
    return torch::stack(rows);
  };
  const Lists x(Tensors{doubles({2, 4}), doubles({1, 4}), doubles({3, 4})});
  const microreg::InputJacobian penalty{.expectation = microreg::Expectation::exact};
  const auto report = microreg::measure(FunctionModel{forward, {w}}, ce, penalty, x, torch::randint(3, {3}));
  // By hand: d tanh(p w)_c / dp = (1 - tanh^2)_c w_c.
  double expected = 0;
  for (const Tensor& points : x) {
    const Tensor slope = 1 - torch::tanh(points.matmul(w)).square();
    expected += (slope.unsqueeze(1) * w).square().sum().item<double>() / 3;
  }
  CHECK(report.penalties[0].value.item<double>() == Approx(expected).epsilon(1e-12));
  CHECK_FALSE(x[0].requires_grad());
}

TEST_CASE("buffers that are expanded, resized or replaced", "[promises]") {
  torch::manual_seed(3);
  const Tensor x = doubles({8, 4}), y = torch::randint(3, {8});
  Masked masked;
  CHECK_NOTHROW((void)microreg::measure(masked, ce, GradientNorm{}, x, y));
  for (const microreg::Estimator& estimator :
       {microreg::Estimator(Exact{}), microreg::Estimator(ForwardDifference{})}) {
    Regularizer r(masked, ce, GradientNorm{}, {.micro_batch_size = 4, .estimator = estimator});
    CHECK_NOTHROW((void)r.backward(x, y));
  }
  for (const auto how : {CachingImpl::How::resize, CachingImpl::How::replace}) {
    Caching model(how);
    const Tensor buffer = model->cache;
    (void)microreg::measure(model, ce, GradientNorm{}, x, y);
    CHECK(same_bits(buffer, torch::ones({2}, torch::kFloat64)));
    const auto fails = [](const Tensor& o, const Tensor& t) -> Tensor {
      return ce(o, t).item<double>() > -1 ? throw std::domain_error("the user's") : o;
    };
    Regularizer r(model, fails, GradientNorm{});
    CHECK_THROWS_AS(r.backward(x, y), std::domain_error);
    CHECK(same_bits(buffer, torch::ones({2}, torch::kFloat64)));
    Regularizer difference(model, ce, GradientNorm{}, {.micro_batch_size = 3, .estimator = ForwardDifference{}});
    CHECK_NOTHROW((void)difference.backward(x, y));
    CHECK(buffer.sizes() == torch::IntArrayRef{2, 4});
  }
}

TEST_CASE("the user's own error arrives, and generators are put back", "[promises]") {
  Masked masked;
  int calls = 0;
  const auto loss = [&](const Tensor& o, const Tensor& y) {
    (void)torch::rand({1});
    return ++calls == 2 ? throw std::domain_error("the user's") : ce(o, y);
  };
  const auto state = [] { return at::globalContext().defaultGenerator(test_device()).get_state(); };
  const Tensor x = doubles({8, 4}), y = torch::randint(3, {8}), before = state();
  Regularizer r(masked, loss, GradientNorm{}, {.micro_batch_size = 4});
  CHECK(message_of<std::domain_error>([&] { (void)r.backward(x, y); }) == "the user's");
  CHECK(same_bits(state(), before));
}

TEST_CASE("a step that is undone gives no other thread its numbers twice", "[promises][threads]") {
  torch::manual_seed(12);
  torch::nn::Sequential model(torch::nn::Linear(4, 8), torch::nn::Dropout(0.5), torch::nn::Linear(8, 3));
  model->to(torch::kFloat64);
  const Tensor x = doubles({8, 4}), y = torch::randint(3, {8});
  std::atomic<int> drawn{0};
  const auto waits = [&](const Tensor& o, const Tensor& t) {
    for (const int before = drawn; drawn < before + 3;) {
      std::this_thread::yield();
    }
    return ce(o, t);
  };
  std::atomic<bool> stop{false};
  std::vector<double> numbers;
  std::thread loader([&] {
    while (!stop) {
      numbers.push_back(torch::rand({1}, torch::kFloat64).item<double>());
      ++drawn;
      std::this_thread::sleep_for(std::chrono::microseconds(50));
    }
  });
  for (int i = 0; i < 10; ++i) {
    (void)microreg::measure(model, waits, GradientNorm{}, x, y);
    const auto fails = [&](const Tensor& o, const Tensor& t) -> Tensor {
      return waits(o, t).defined() ? throw std::domain_error("the user's") : o;
    };
    Regularizer r(model, fails, GradientNorm{});
    CHECK_THROWS_AS(r.backward(x, y), std::domain_error);
    Regularizer skips(model, [&](const Tensor& o, const Tensor& t) { return waits(o, t) * std::nan(""); },
                      GradientNorm{}, {.non_finite = microreg::NonFinite::skip_step});
    CHECK(skips.backward(x, y).skipped);
  }
  stop = true;
  loader.join();
  std::sort(numbers.begin(), numbers.end());
  CHECK(std::adjacent_find(numbers.begin(), numbers.end()) == numbers.end());  // of 2^53: chance repeats none
  // Where nobody else draws they are put back: by the first step, by one that follows others, and by measure.
  const auto state = [] { return at::globalContext().defaultGenerator(test_device()).get_state(); };
  bool fail = true;
  const auto may_fail = [&](const Tensor& o, const Tensor& t) {
    return fail ? throw std::domain_error("x") : ce(o, t);
  };
  Regularizer r(model, may_fail, GradientNorm{});
  for (const bool now : {true, false, true, true}) {
    fail = now;
    const Tensor before = state();
    if (fail) {
      CHECK_THROWS_AS(r.backward(x, y), std::domain_error);
    } else {
      (void)r.backward(x, y);
    }
    CHECK(same_bits(state(), before) == fail);
  }
  const Tensor before = state();
  (void)microreg::measure(model, ce, GradientNorm{}, x, y);
  CHECK(same_bits(state(), before));
}

TEST_CASE("the user's own graph stays valid", "[promises]") {
  torch::manual_seed(4);
  const Tensor x = doubles({8, 6}), y = torch::randint(3, {8});
  for (int kind = 0; kind < 4; ++kind) {
    INFO(kind);
    auto model = normalised();
    const Tensor own = ce(model->forward(x), y);
    const auto expected = torch::autograd::grad({own}, model->parameters(), {}, true);
    const Watch watch(*model);
    if (kind == 0) {
      (void)microreg::measure(model, ce, GradientNorm{}, x, y);
      CHECK(watch.unchanged());
    } else if (kind == 1) {
      const auto fails = [](const Tensor& o, const Tensor&) -> Tensor {
        return o.defined() ? throw std::domain_error("the user's") : o;
      };
      Regularizer r(model, fails, GradientNorm{});
      CHECK_THROWS_AS(r.backward(x, y), std::domain_error);
      CHECK(watch.unchanged());
    } else {
      Regularizer r(model, ce, GradientNorm{},
                    {.estimator = kind == 2 ? microreg::Estimator(ForwardDifference{}) : Exact{}});
      (void)r.backward(x, y);
      model->zero_grad();
    }
    own.backward();
    CHECK(relative_error(model->parameters()[0].grad(), expected[0]) < 1e-12);
  }
}

TEST_CASE("an embedding that renormalises its rows", "[promises]") {
  torch::manual_seed(5);
  torch::nn::Embedding e(torch::nn::EmbeddingOptions(20, 6).max_norm(1.0));
  torch::nn::Linear l(6, 3);
  {
    const torch::NoGradGuard no_grad;
    e->weight.mul_(3);
  }
  FunctionModel model{[&](const Tensor& t) { return l(e(t).mean(1)); }, microreg::modules(e, l)};
  const Tensor x = torch::randint(20, {8, 4}), y = torch::randint(3, {8}), before = e->weight.detach().clone();
  (void)microreg::measure(model, ce, GradientNorm{}, x, y);
  CHECK(same_bits(e->weight.detach(), before));
  int calls = 0;
  const auto fails = [&](const Tensor& o, const Tensor& t) {
    return ++calls % 3 == 0 ? throw std::domain_error("the user's") : ce(o, t);
  };
  Regularizer r(model, fails, GradientNorm{}, {.micro_batch_size = 4});
  for (int step = 0; step < 3; ++step) {  // steps of two calls: the second fails, the first and third do not
    const Tensor now = e->weight.detach().clone();
    if (step == 1) {
      CHECK_THROWS_AS(r.backward(x, y), std::domain_error);
      CHECK(same_bits(e->weight.detach(), now));
      calls = 0;
      const torch::NoGradGuard no_grad;
      e->weight.mul_(3);
    } else {
      CHECK_NOTHROW((void)r.backward(x, y));
      CHECK(e->weight.detach().norm(2, 1).index({x}).max().item<double>() < 1.001);
    }
  }
  // A step that fails after others: what the first of them found out is still known.
  const Tensor now = e->weight.detach().mul(3).clone();
  {
    const torch::NoGradGuard no_grad;
    e->weight.copy_(now);
  }
  calls = 1;
  CHECK_THROWS_AS(r.backward(x, y), std::domain_error);
  CHECK(same_bits(e->weight.detach(), now));
}

TEST_CASE("large buffers are not copied where they do not change", "[promises]") {
  struct Queue : torch::nn::Module {
    Queue() : queue(register_buffer("queue", torch::randn({2048, 512}))) { register_module("l", l); }
    Tensor forward(const Tensor& x) {
      if (write) {
        const torch::NoGradGuard no_grad;
        queue[0].add_(1);
      }
      return l(x);
    }
    torch::nn::Linear l{8, 3};
    Tensor queue;
    bool write = false;
  };
  const auto model = std::make_shared<Queue>();
  bool fail = false;
  const auto loss = [&](const Tensor& o, const Tensor& y) { return fail ? throw std::domain_error("x") : ce(o, y); };
  const Tensor x = torch::randn({8, 8}), y = torch::randint(3, {8});
  Regularizer r(model, loss, GradientNorm{}, {.micro_batch_size = 2});
  (void)r.backward(x, y);
  const auto allocated = std::make_shared<Allocated>();
  {
    const c10::DebugInfoGuard guard(c10::DebugInfoKind::PROFILER_STATE, allocated);
    (void)r.backward(x, y);
  }
  CHECK(allocated->bytes > 0);
  // On a device they are: to find out whether they have changed would wait for it.
  const auto size = static_cast<std::int64_t>(model->queue.nbytes());
  CHECK(allocated->bytes < (test_device().is_cpu() ? size / 4 : size + size / 4));
  // And still it is put back.
  const Tensor before = model->queue.clone();
  fail = true;
  model->write = true;
  CHECK_THROWS_AS(r.backward(x, y), std::domain_error);
  CHECK(same_bits(model->queue, before));
  model->queue[1].add_(1);  // by the user, between steps
  const Tensor moved = model->queue.clone();
  CHECK_THROWS_AS(r.backward(x, y), std::domain_error);
  CHECK(same_bits(model->queue, moved));
  model->queue.variable_data().add_(1);  // in a way that no version counts
  const Tensor hidden = model->queue.clone();
  CHECK_THROWS_AS(r.backward(x, y), std::domain_error);
  CHECK(same_bits(model->queue, hidden));
}

TEST_CASE("a .grad that nothing can be added to", "[promises]") {
  torch::nn::Linear l(3, 2);
  const Tensor x = torch::randn({4, 3}), y = torch::randint(2, {4});
  const auto refused = [&](const Tensor& grad) {
    clear_grad(l->parameters());
    l->bias.mutable_grad() = grad;
    Regularizer r(l, ce, GradientNorm{});
    const std::string message = message_of<ModelError>([&] { (void)r.backward(x, y); });
    CHECK_FALSE(l->weight.grad().defined());
    return message;
  };
  CHECK(has(refused(torch::zeros({1}).expand({2})), {".grad of parameter bias", "expanded", "zero_grad"}));
  CHECK(has(refused(torch::zeros({2}).to_sparse()), {".grad of parameter bias", "sparse"}));
  Tensor inference;
  {
    const c10::InferenceMode guard;
    inference = torch::zeros({2});
  }
  CHECK(has(refused(inference), {".grad of parameter bias", "inference"}));
}

TEST_CASE(".grad has its parameter's strides", "[promises]") {
  torch::manual_seed(6);
  const Tensor w = weights({4, 6, 5});
  const Tensor transposed = doubles({5, 6}).t().requires_grad_(true);
  const Tensor x = doubles({4, 7, 5}), y = doubles({4, 7, 6});
  FunctionModel model{[&](const Tensor& in) { return at::bmm(in, w.transpose(1, 2)) + in.matmul(transposed.t()); },
                      {w, transposed}};
  for (const double strength : {0.0, 1.0}) {
    for (const microreg::Estimator& estimator :
         {microreg::Estimator(Exact{}), microreg::Estimator(ForwardDifference{})}) {
      clear_grad({w, transposed});
      Regularizer r(model, mse, GradientNorm{}, {.strength = strength, .estimator = estimator});
      (void)r.backward(x, y);
      CHECK(w.grad().strides() == w.strides());
      CHECK(transposed.grad().strides() == transposed.strides());
      CHECK_NOTHROW(w.grad().view(-1));
    }
  }
  torch::optim::LBFGS optimizer({w}, torch::optim::LBFGSOptions(0.1).max_iter(3));
  Regularizer r(model, mse, GradientNorm{}, {.strength = 0.01});
  CHECK_NOTHROW(optimizer.step([&] {
    optimizer.zero_grad();
    return r.backward(x, y).objective();
  }));
}

TEST_CASE("parameters and losses of several types", "[promises]") {
  torch::manual_seed(7);
  torch::nn::Linear front(3, 4), head(4, 2);
  head->to(torch::kFloat64);
  Tensors parameters = front->parameters();
  for (const Tensor& p : head->parameters()) {
    parameters.push_back(p);
  }
  const auto forward = [&](const Tensor& x) { return head(torch::tanh(front(x)).to(torch::kFloat64)); };
  const Tensor x = torch::randn({4, 3}), y = doubles({4, 2});
  for (const auto type : {torch::kFloat32, torch::kFloat64}) {
    const auto loss = [&](const Tensor& o, const Tensor& t) { return torch::mse_loss(o, t).to(type); };
    Tensor value = torch::zeros({}, torch::kFloat64);
    const Tensor plain = loss(forward(x), y);
    for (const Tensor& g : torch::autograd::grad({plain}, parameters, {}, true, true)) {
      value = value + g.square().sum().to(torch::kFloat64);
    }
    clear_grad(parameters);
    (plain.to(torch::kFloat64) + 0.5 * value).backward();
    const Tensor expected = flat_grad(parameters);
    clear_grad(parameters);
    FunctionModel model{forward, parameters};
    Regularizer r(model, loss, GradientNorm{}, {.strength = 0.5});
    const auto report = r.backward(x, y);
    CHECK(relative_error(flat_grad(parameters), expected) < 1e-6);
    CHECK(report.penalties[0].value.item<double>() == Approx(value.item<double>()).epsilon(1e-6));
    clear_grad(parameters);
    Regularizer zero(model, loss, GradientNorm{}, {.strength = 0});
    CHECK_NOTHROW((void)zero.backward(x, y));
    CHECK_NOTHROW((void)microreg::measure(model, loss, GradientNorm{}, x, y));
    const Tensor l = loss(forward(x), y);
    CHECK_NOTHROW((l + GradientNorm{}(l, parameters)).backward());
    CHECK_NOTHROW((void)microreg::graft(parameters, 1.0));
  }
}

TEST_CASE("sums over many micro-batches of half types go on growing", "[promises]") {
  for (const auto type : {torch::kBFloat16, torch::kHalf}) {
    const Tensor w = torch::ones({2}, type).requires_grad_(true);
    FunctionModel model{[&](const Tensor& x) { return x * w; }, {w}};
    const auto sum = [](const Tensor& o) { return o.sum(); };
    Regularizer<Tensor, microreg::NoTarget> r(model, sum, GradientNorm{}, {.strength = 0, .micro_batch_size = 1});
    (void)r.backward(torch::ones({2048, 2}, type));
    CHECK(w.grad().scalar_type() == type);
    CHECK(w.grad()[0].item<float>() == Approx(1).epsilon(0.01));
  }
}

TEST_CASE("sparse gradients and sparse inputs", "[promises]") {
  torch::manual_seed(8);
  torch::nn::Embedding e(torch::nn::EmbeddingOptions(100, 8).sparse(true));
  torch::nn::Linear l(8, 3);
  FunctionModel embedded{[&](const Tensor& t) { return l(e(t).mean(1)); }, microreg::modules(e, l)};
  const Tensor tokens = torch::randint(100, {8, 5}), labels = torch::randint(3, {8});
  for (const double strength : {0.0, 1.0}) {
    Regularizer r(embedded, ce, GradientNorm{}, {.strength = strength});
    CHECK(has(message_of<ModelError>([&] { (void)r.backward(tokens, labels); }),
              {"modules[0].weight", "sparse", ".sparse(false)"}));
    CHECK_FALSE(l->weight.grad().defined());
  }
  const Tensor w = weights({50, 3}), y = torch::randint(3, {16});
  FunctionModel model{[&](const Tensor& x) { return torch::tanh(x.matmul(w)); }, {w}};
  const Tensor dense = doubles({16, 50}).relu();
  const auto gradient = [&](const Tensor& x, std::int64_t size) {
    clear_grad({w});
    Regularizer r(model, ce, GradientNorm{}, {.micro_batch_size = size});
    (void)r.backward(x, y);
    return flat_grad({w});
  };
  for (const std::int64_t size : {16, 4}) {
    if (!has_stand_in_gpu()) {  // which does not multiply by sparse matrices
      CHECK(relative_error(gradient(dense.to_sparse(), size), gradient(dense, size)) < 1e-12);
    }
  }
  if (!has_stand_in_gpu()) {
    CHECK(has(message_of<BatchError>([&] { (void)gradient(dense.to_sparse_csr(), 4); }), {"SparseCsr", "[16, 50]"}));
  }
  const Tensor nested = at::_nested_tensor_from_tensor_list({doubles({3, 50}), doubles({2, 50})});
  CHECK(has(message_of<BatchError>([&] { (void)gradient(nested, 1); }), {"input", "nested", "PerSample"}));
}

TEST_CASE("the largest micro-batch size there is", "[promises]") {
  networks::Mlp model = networks::seeded_mlp();
  const auto batch = networks::vectors(10);
  Regularizer r(model, ce, GradientNorm{}, {.micro_batch_size = std::numeric_limits<std::int64_t>::max()});
  CHECK(r.backward(batch.input, batch.target).micro_batches() == 1);
}

TEST_CASE("the report of a step that is not penalised", "[promises]") {
  networks::Mlp model = networks::seeded_mlp();
  const auto batch = networks::vectors(10);
  Regularizer r(model, ce, GradientNorm{}, {.micro_batch_size = 5, .sampling = {.every = 2}});
  (void)r.backward(batch.input, batch.target);
  const auto report = r.backward(batch.input, batch.target);
  CHECK(report.penalised.empty());
  CHECK(report.penalties[0].micro_batch_norms.sizes() == torch::IntArrayRef{2});
  CHECK(report.penalties[0].micro_batch_norms[0].item<double>() == 0);
  CHECK(report.penalties[0].value.item<double>() == 0);
  CHECK(report.objective().item<double>() == report.loss.item<double>());
}

TEST_CASE("strengths on either side, and on sums", "[promises]") {
  const auto strengths = [](const microreg::AnyPenalty<>& penalty) {
    std::vector<double> result;
    for (const auto& term : penalty.terms()) {
      result.push_back(term.strength.at(0));
    }
    return result;
  };
  using microreg::UnitJacobian;
  CHECK(strengths(GradientNorm{} * 0.1) == std::vector<double>{0.1});
  CHECK(strengths(0.5 * (GradientNorm{} + 0.5 * UnitJacobian{})) == std::vector<double>{0.5, 0.25});
  CHECK(strengths((GradientNorm{} + UnitJacobian{} * 2) * 0.5) == std::vector<double>{0.5, 1.0});
  CHECK(strengths(2 * (0.5 * GradientNorm{})) == std::vector<double>{1.0});
  CHECK(strengths(microreg::AnyPenalty<>(GradientNorm{}) * 0.25) == std::vector<double>{0.25});
}

TEST_CASE("an AnyModule that takes two tensors, or a tuple of them", "[promises]") {
  struct Sum : torch::nn::Module {
    Sum() { register_module("l", l); }
    Tensor forward(const Tensor& a, const Tensor& b) { return l(a + b); }
    torch::nn::Linear l{3, 2};
  };
  struct SumOfTuple : torch::nn::Module {
    SumOfTuple() { register_module("l", l); }
    Tensor forward(std::tuple<Tensor, Tensor> t) { return l(std::get<0>(t) + std::get<1>(t)); }
    torch::nn::Linear l{3, 2};
  };
  using Input = std::tuple<Tensor, Tensor>;
  const Input x(torch::randn({4, 3}), torch::randn({4, 3}));
  const Tensor y = torch::randint(2, {4});
  Regularizer<Input> two(torch::nn::AnyModule(Sum()), ce, GradientNorm{});
  CHECK_NOTHROW((void)two.backward(x, y));
  Regularizer<Input> one(torch::nn::AnyModule(SumOfTuple()), ce, GradientNorm{});
  CHECK_NOTHROW((void)one.backward(x, y));
}

TEST_CASE("scripted models of dictionaries, lists and tuples", "[promises]") {
  torch::jit::Module model("m");
  const Tensor w = weights({4, 3});
  model.register_parameter("w", w, false);
  model.define(
      "def forward(self, x: Dict[str, Tensor], y: List[Tensor]):\n"
      "  return torch.matmul(x['a'] + y[0], self.w)\n");
  using Input = std::tuple<std::map<std::string, Tensor>, std::vector<Tensor>>;
  Regularizer<Input> r(model, ce, GradientNorm{}, {.micro_batch_size = 4});
  const Tensor a = doubles({8, 4}), b = doubles({8, 4}), y = torch::randint(3, {8});
  (void)r.backward(Input{{{"a", a}}, {b}}, y);
  const Tensor found = flat_grad({w});
  clear_grad({w});
  Regularizer plain(FunctionModel{[&](const Tensor& in) { return in.matmul(w); }, {w}}, ce, GradientNorm{},
                    {.micro_batch_size = 4});
  (void)plain.backward(a + b, y);
  CHECK(relative_error(found, flat_grad({w})) < 1e-12);
  torch::jit::Module two("m");
  two.register_parameter("w", w, false);
  two.define("def forward(self, x):\n  return torch.matmul(x, self.w), x\n");
  Regularizer t(two, ce, GradientNorm{});
  CHECK(has(message_of<ModelError>([&] { (void)t.backward(a, y); }), {"Tuple", "FunctionModel"}));
}

TEST_CASE("a micro-batch that plain training does not meet", "[promises]") {
  auto model = normalised();
  const Tensor x = doubles({9, 6}), y = torch::randint(3, {9});
  Regularizer r(model, ce, GradientNorm{}, {.micro_batch_size = 4});
  CHECK(has(message_of<BatchError>([&] { (void)r.backward(x, y); }),
            {"micro-batch 2 of 3", "one sample", "ShortLast::merged"}));
  const Tensor w = weights({6, 3});
  const auto ignoring = [](const Tensor& o, const Tensor& t) {
    return torch::cross_entropy_loss(o, t, {}, at::Reduction::Mean, 255);
  };
  Tensor labels = torch::randint(3, {8});
  labels.narrow(0, 4, 4).fill_(255);
  Regularizer i(FunctionModel{[&](const Tensor& in) { return in.matmul(w); }, {w}}, ignoring, GradientNorm{},
                {.micro_batch_size = 4, .check_finite = microreg::CheckFinite::always});
  CHECK(has(message_of<microreg::NonFiniteError>([&] { (void)i.backward(x.narrow(0, 0, 8), labels); }),
            {"micro-batch 1 of 2", "all labels", "255", "ignore_index"}));
}

namespace {

template <int kind>
struct Throws : torch::autograd::Function<Throws<kind>> {
  static Tensor forward(torch::autograd::AutogradContext* /*context*/, const Tensor& x) { return x.clone(); }
  static Tensors backward(torch::autograd::AutogradContext* /*context*/, const Tensors& upstream) {
    if (kind == 0) {
      throw std::runtime_error("attention mask cache was evicted");
    }
    TORCH_CHECK_WITH(OutOfMemoryError, kind != 1, "CUDA out of memory in scaled_dot_product_attention");
    TORCH_CHECK(kind != 2, "the first derivative of my_op is not implemented");
    return upstream;
  }
};

/// A library's operation that cannot be differentiated twice.
struct RoiAlignBackward : torch::autograd::Function<RoiAlignBackward> {
  static Tensor forward(torch::autograd::AutogradContext* /*context*/, const Tensor& g) { return g.clone(); }
  static Tensors backward(torch::autograd::AutogradContext* /*context*/, const Tensors& /*upstream*/) {
    TORCH_CHECK(false, "double backwards on roi_align not supported");
  }
};
struct RoiAlign : torch::autograd::Function<RoiAlign> {
  static Tensor forward(torch::autograd::AutogradContext* /*context*/, const Tensor& x) { return x.clone(); }
  static Tensors backward(torch::autograd::AutogradContext* /*context*/, const Tensors& upstream) {
    return {RoiAlignBackward::apply(upstream[0])};
  }
};

}  // namespace

TEST_CASE("errors keep their type, and name what has no second derivative", "[promises]") {
  torch::manual_seed(9);
  torch::nn::Linear a(4, 6), b(6, 3);
  const Tensor x = torch::randn({4, 4}), y = torch::randint(3, {4});
  const auto step = [&](const std::function<Tensor(const Tensor&)>& act, const microreg::Estimator& estimator) {
    FunctionModel model{[&](const Tensor& in) { return b(act(a(in))); }, microreg::modules(a, b)};
    Regularizer r(model, ce, GradientNorm{}, {.estimator = estimator});
    (void)r.backward(x, y);
  };
  CHECK(message_of<std::runtime_error>([&] { step([](const Tensor& h) { return Throws<0>::apply(h); }, Exact{}); }) ==
        "attention mask cache was evicted");
  CHECK_THROWS_AS(step([](const Tensor& h) { return Throws<1>::apply(h); }, Exact{}), c10::OutOfMemoryError);
  const std::string roi =
      message_of<ModelError>([&] { step([](const Tensor& h) { return RoiAlign::apply(h); }, Exact{}); });
  CHECK(has(roi, {"roi_align", "second derivative", "ForwardDifference", "modules[0]"}));
  const ForwardDifference difference{.own_functions = microreg::OwnFunctions::smooth};
  const std::string first =
      message_of<ModelError>([&] { step([](const Tensor& h) { return Throws<2>::apply(h); }, difference); });
  CHECK(has(first, {"my_op"}));
  CHECK(first.find("choose") == std::string::npos);
  const auto cdist = [](const Tensor& h) { return torch::cat({torch::cdist(h, h), h.narrow(1, 0, 2)}, 1); };
  if (microreg::detail::cdist_differentiates_twice) {
    CHECK_NOTHROW(step(cdist, Exact{}));
  } else {
    CHECK(has(message_of<ModelError>([&] { step(cdist, Exact{}); }), {"cdist", "modules[0]"}));
  }
}

TEST_CASE("hardsigmoid has a second derivative inside a scope: zero", "[promises]") {
  torch::manual_seed(10);
  const Tensor w = weights({4, 6}), out = weights({6, 3}), x = doubles({8, 4}), y = torch::randint(3, {8});
  const auto gradient = [&](const auto& act) {
    clear_grad({w, out});
    Regularizer r(FunctionModel{[&](const Tensor& in) { return act(in.matmul(w)).matmul(out); }, {w, out}}, ce,
                  GradientNorm{});
    (void)r.backward(x, y);
    return flat_grad({w, out});
  };
  const Tensor found = gradient([](const Tensor& h) { return torch::hardsigmoid(h); });
  const Tensor expected = gradient([](const Tensor& h) { return (h / 6 + 0.5).clamp(0, 1); });
  CHECK(relative_error(found, expected) < 1e-7);  // LibTorch's slope is a sixth in float32
}

TEST_CASE("the micro-batch of a non-finite loss in a loop of one's own", "[promises]") {
  if (skipped_off_the_cpu("values are looked at on the CPU unless asked")) {
    return;
  }
  networks::Mlp model = networks::seeded_mlp();
  auto batch = networks::vectors(6);
  batch.input[5].fill_(std::nan(""));
  microreg::Penalised penalised(model->parameters(), GradientNorm{});
  std::int64_t failed = -1;
  for (auto [part, x, y] : microreg::micro_batches(2, batch.input, batch.target)) {
    try {
      (void)penalised.backward(part, ce(model->forward(x), y));
    } catch (const microreg::NonFiniteError& error) {
      failed = error.micro_batch();
      CHECK(has(error.what(), {"micro-batch 2"}));
    }
  }
  CHECK(failed == 2);
}

TEST_CASE("a step that is undone leaves another thread's numbers alone, also where steps have drawn none",
          "[promises][threads]") {
  torch::manual_seed(12);
  torch::nn::Linear model(4, 3);
  model->to(torch::kFloat64);
  const Tensor x = doubles({8, 4}), y = torch::randint(3, {8});
  bool fails = false;
  const auto loss = [&](const Tensor& o, const Tensor& t) {
    if (fails) {
      std::thread([] { (void)torch::rand({3}); }).join();
      throw std::domain_error("the user's");
    }
    return ce(o, t);
  };
  const auto state = [] { return at::globalContext().defaultGenerator(test_device()).get_state(); };
  Regularizer r(model, loss, GradientNorm{});
  (void)r.backward(x, y);
  const Tensor before = state();
  fails = true;
  CHECK_THROWS_AS(r.backward(x, y), std::domain_error);
  CHECK_FALSE(same_bits(state(), before));
}

TEST_CASE("generators are put back whatever the steps before have drawn", "[promises]") {
  torch::manual_seed(12);
  torch::nn::Linear first(4, 8), second(8, 3);
  first->to(torch::kFloat64);
  second->to(torch::kFloat64);
  const Tensor x = doubles({8, 4}), y = torch::randint(3, {8});
  int fails = 0;
  const auto at = [&](int place) {
    if (fails == place) {
      throw std::domain_error("the user's");
    }
  };
  FunctionModel model{[&](const Tensor& in) {
                        at(1);
                        const Tensor out = second(torch::dropout(torch::relu(first(in)), 0.5, true));
                        at(2);
                        return out;
                      },
                      microreg::modules(first, second)};
  const auto state = [] { return at::globalContext().defaultGenerator(test_device()).get_state(); };
  Regularizer r(model, ce, GradientNorm{});
  const auto is_put_back = [&](int place) {
    fails = place;
    const Tensor before = state();
    CHECK_THROWS_AS(r.backward(x, y), std::domain_error);
    return same_bits(state(), before);
  };
  CHECK(is_put_back(2));
  fails = 0;
  (void)r.backward(x, y);
  CHECK(is_put_back(1));
  CHECK(is_put_back(2));
  // A penalty that draws, in every fourth step.
  torch::nn::Linear plain(4, 3);
  plain->to(torch::kFloat64);
  const auto loss = [&](const Tensor& o, const Tensor& t) {
    at(3);
    return ce(o, t);
  };
  Regularizer draws(plain, loss, microreg::FisherTrace{},
                    {.sampling = {.every = 4}, .check_finite = microreg::CheckFinite::always});
  for (int i = 0; i < 4; ++i) {
    fails = 0;
    (void)draws.backward(x, y);
  }
  const auto not_a_number = x.clone().fill_(std::nan(""));
  const Tensor before = state();
  CHECK_THROWS_AS(draws.backward(not_a_number, y), microreg::NonFiniteError);
  CHECK(same_bits(state(), before));
}

TEST_CASE("a handler of warnings that throws replaces no error", "[promises][threads]") {
  torch::manual_seed(12);
  torch::nn::Linear model(4, 3);
  model->to(torch::kFloat64);
  const Tensor x = doubles({8, 4}), y = torch::randint(3, {8});
  bool fails = false;
  Regularizer r(
      model,
      [&](const Tensor& o, const Tensor& t) {
        if (fails) {
          {
            const torch::NoGradGuard no_grad;
            model->weight.mul_(2);
          }
          std::thread([] { (void)torch::rand({3}); }).join();
          throw std::domain_error("the user's");
        }
        return ce(o, t);
      },
      GradientNorm{});
  (void)r.backward(x, y);
  fails = true;
  struct Throws final : c10::WarningHandler {
    void process(const c10::Warning& warning) override { throw std::runtime_error(warning.msg()); }
  } throws;
  const c10::WarningUtils::WarningHandlerGuard guard(&throws);
  const c10::WarningUtils::WarnAlways always;
  CHECK_THROWS_AS(r.backward(x, y), std::domain_error);
}

TEST_CASE("parameters that a forward pass writes to are put back, frozen ones too", "[promises]") {
  torch::manual_seed(12);
  struct WordsImpl : torch::nn::Module {
    WordsImpl() {
      register_module("words", words);
      register_module("output", output);
      const torch::NoGradGuard no_grad;
      words->weight.mul_(3);
      words->weight.set_requires_grad(false);
    }
    Tensor forward(const Tensor& x) {
      if (clamps) {
        const torch::NoGradGuard no_grad;
        output->weight.clamp_(-0.1, 0.1);
      }
      return output(words(x).mean(1));
    }
    torch::nn::Embedding words{torch::nn::EmbeddingOptions(10, 4).max_norm(1)};
    torch::nn::Linear output{4, 3};
    bool clamps = false;
  };
  const Tensor x = torch::randint(10, {8, 3}), y = torch::randint(3, {8});
  bool fails = true;
  const auto loss = [&](const Tensor& o, const Tensor& t) {
    return fails ? throw std::domain_error("the user's") : ce(o, t);
  };
  const auto model = std::make_shared<WordsImpl>();
  {
    const Tensor before = model->words->weight.clone();
    Regularizer r(model, loss, GradientNorm{});
    CHECK_THROWS_AS(r.backward(x, y), std::domain_error);
    CHECK(same_bits(model->words->weight, before));
    fails = false;
    (void)microreg::measure(model, loss, GradientNorm{}, x, y);
    CHECK(same_bits(model->words->weight, before));
  }
  Regularizer r(model, loss, GradientNorm{});
  (void)r.backward(x, y);
  {
    const torch::NoGradGuard no_grad;
    model->words->weight.mul_(3);
  }
  const auto is_put_back = [&](bool expected) {
    const helpers::Watch watch(*model);
    fails = true;
    std::vector<std::string> words;
    {
      struct Heard final : c10::WarningHandler {
        explicit Heard(std::vector<std::string>& to) : words(to) {}
        void process(const c10::Warning& warning) override { words.push_back(warning.msg()); }
        std::vector<std::string>& words;
      } heard(words);
      const c10::WarningUtils::WarningHandlerGuard guard(&heard);
      CHECK_THROWS_AS(r.backward(x, y), std::domain_error);
    }
    CHECK(watch.unchanged() == expected);
    REQUIRE(words.empty() == expected);
    if (!expected) {
      CHECK(has(words[0], {"output.weight", "first time"}));
    }
    fails = false;
  };
  is_put_back(true);  // known from the first step
  // One that is written to from a later step on is known afterwards; until then it is said.
  model->clamps = true;
  is_put_back(false);
  {
    const torch::NoGradGuard no_grad;
    model->output->weight.mul_(3);
  }
  is_put_back(true);
}

TEST_CASE("large running statistics, which count no version, are put back", "[promises]") {
  torch::manual_seed(12);
  constexpr std::int64_t wide = 1 << 18;  // 1 MB
  torch::nn::Sequential model(torch::nn::Linear(2, wide), torch::nn::BatchNorm1d(wide), torch::nn::Linear(wide, 3));
  const Tensor x = torch::randn({8, 2}), y = torch::randint(3, {8});
  const helpers::Watch watch(*model);
  (void)microreg::measure(model, ce, GradientNorm{}, x, y, {.micro_batch_size = 4});
  CHECK(watch.unchanged());
  bool fails = false;
  const auto loss = [&](const Tensor& o, const Tensor& t) {
    return fails ? throw std::domain_error("the user's") : ce(o, t);
  };
  Regularizer r(model, loss, GradientNorm{}, {.strength = 0.01, .micro_batch_size = 4});
  fails = true;
  CHECK_THROWS_AS(r.backward(x, y), std::domain_error);
  CHECK(watch.unchanged());
  fails = false;
  (void)r.backward(x, y);
  fails = true;
  const helpers::Watch later(*model);
  CHECK_THROWS_AS(r.backward(x, y), std::domain_error);
  CHECK(later.unchanged());
  // A difference moves them once for each micro-batch, as one pass does.
  std::vector<Tensor> moved;
  for (const microreg::Estimator& estimator :
       {microreg::Estimator(Exact{}), microreg::Estimator(ForwardDifference{})}) {
    const Tensor mean = model->named_buffers()["1.running_mean"];
    const Tensor before = mean.clone();
    Regularizer one(model, ce, GradientNorm{}, {.strength = 0.01, .micro_batch_size = 4, .estimator = estimator});
    (void)one.backward(x, y);
    moved.push_back(mean.clone());
    mean.copy_(before);
  }
  CHECK(same_bits(moved[0], moved[1]));
}

TEST_CASE("copies of a Regularizer take steps on threads of their own", "[promises][threads]") {
  torch::manual_seed(12);
  torch::nn::Linear model(4, 3);
  model->to(torch::kFloat64);
  (void)model->register_buffer("large", torch::ones({1 << 18}));
  const Tensor x = doubles({8, 4}), y = torch::randint(3, {8});
  Regularizer first(model, ce, GradientNorm{});
  std::vector<double> norms(2);
  const auto steps = [&](Regularizer<>& r, double& norm) {
    for (int i = 0; i < 20; ++i) {
      norm = r.backward(x, y).penalties[0].value.item<double>();
    }
  };
  Regularizer<> second = first;
  std::thread other([&] { steps(second, norms[1]); });
  steps(first, norms[0]);
  other.join();
  CHECK(norms[0] == norms[1]);
  CHECK(first.step() == 20);
  CHECK(second.step() == 20);
}
