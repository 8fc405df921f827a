// Differences prove themselves: what double backward and a difference do not see alike is right or refused, never wrong
// in silence. Yardstick: double backward written by hand.
#include "helpers.hpp"
#include "networks.hpp"
#include "own_functions.hpp"

#include <ATen/CPUGeneratorImpl.h>
#include <microreg/microreg.hpp>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <functional>
#include <memory>
#include <random>
#include <thread>

using namespace helpers;
using microreg::CentralDifference;
using microreg::Exact;
using microreg::ForwardDifference;
using microreg::Gates;
using torch::Tensor;

namespace {

using Forward = std::function<Tensor(const Tensor&)>;
using Loss = std::function<Tensor(const Tensor&, const Tensor&)>;
using Model = microreg::FunctionModel<Forward>;

const auto both = {microreg::Estimator(ForwardDifference{}), microreg::Estimator(CentralDifference{})};
constexpr auto smooth = microreg::OwnFunctions::smooth;
const auto declared = {microreg::Estimator(ForwardDifference{.own_functions = smooth}),
                       microreg::Estimator(CentralDifference{.own_functions = smooth})};

Tensor entropy(const Tensor& output, const Tensor& y) { return torch::cross_entropy_loss(output, y); }

/// Weights of tanh networks 6-16-5, in float64 unless told otherwise.
struct Setting {
  Tensor a, b, x, y;
  explicit Setting(torch::ScalarType type = torch::kFloat64, std::int64_t samples = 12) {
    torch::manual_seed(3);
    a = (randn_of_the_cpu({6, 16}, torch::kFloat64) * 0.5).to(type).requires_grad_();
    b = (randn_of_the_cpu({16, 5}, torch::kFloat64) * 0.5).to(type).requires_grad_();
    x = randn_of_the_cpu({samples, 6}, torch::kFloat64).to(type);
    y = torch::randint(5, {samples}, torch::TensorOptions(torch::kCPU).dtype(torch::kLong)).to(test_device());
  }
  [[nodiscard]] std::vector<Tensor> weights() const { return {a, b}; }
};

microreg::RegularizerOptions options_of(const microreg::Estimator& estimator, double strength = 1) {
  // On a device what a pass gives is looked at where one asks.
  return {.strength = strength,
          .micro_batch_size = 1000,
          .estimator = estimator,
          .check_finite = test_device().is_cpu() ? microreg::CheckFinite::on_cpu : microreg::CheckFinite::always};
}

/// The penalty's part of .grad.
Tensor penalty_part(const Model& model, const Loss& loss, const Tensor& x, const Tensor& y,
                    const microreg::Estimator& estimator) {
  Tensor parts[2];
  for (const int strength : {0, 1}) {
    clear_grad(model.parameters);
    torch::manual_seed(11);
    microreg::Regularizer regularizer(Model(model), loss, microreg::GradientNorm{}, options_of(estimator, strength));
    (void)regularizer.backward(x, y);
    parts[strength] = flat_grad(model.parameters);
  }
  clear_grad(model.parameters);
  return parts[1] - parts[0];
}

/// The same by hand.
Tensor by_hand(const Model& model, const Loss& loss, const Tensor& x, const Tensor& y) {
  torch::manual_seed(11);
  return penalty_by_hand(loss(model.function(x.clone()), y.clone()), model.parameters);
}

/// What an error of this library says, or nothing where there is none.
std::string refusal(const std::function<void()>& call) {
  try {
    call();
  } catch (const microreg::ModelError& error) {
    UNSCOPED_INFO(error.what());
    return error.what();
  }
  return {};
}

void check_refused(const Model& model, const Loss& loss, const Tensor& x, const Tensor& y,
                   std::initializer_list<const char*> words,
                   std::initializer_list<microreg::Estimator> estimators = both) {
  for (const auto& estimator : estimators) {
    const std::string message = refusal([&] { (void)penalty_part(model, loss, x.clone(), y.clone(), estimator); });
    CHECK((has(message, words) || (!message.empty() && !test_device().is_cpu())));  // there another one may be first
  }
}

void check_right(const Model& model, const Loss& loss, const Tensor& x, const Tensor& y, double bound,
                 std::initializer_list<microreg::Estimator> estimators = both) {
  const Tensor right = by_hand(model, loss, x, y);
  for (const auto& estimator : estimators) {
    CHECK(relative_error(penalty_part(model, loss, x.clone(), y.clone(), estimator), right) < bound);
  }
}

/// No second derivative: the node says so when its backward is differentiated.
struct Once : torch::autograd::Function<Once> {
  static Tensor forward(torch::autograd::AutogradContext* context, const Tensor& x) {
    context->save_for_backward({x});
    return x.sin();
  }
  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* context,
                                                 torch::autograd::variable_list upstream) {
    TORCH_CHECK(!at::GradMode::is_enabled(), "derivative for Once is not implemented");
    return {upstream[0] * context->get_saved_variables()[0].cos()};
  }
};

/// A generator whose state is not LibTorch's.
double own_noise() {
  static std::mt19937 engine(5);
  return std::normal_distribution<double>(0, 1)(engine);
}

}  // namespace

TEST_CASE("differences: noise of one's own, and state outside of buffers, are refused",
          "[difference_checks][threads]") {
  for (const auto type : {torch::kFloat64, torch::kFloat32}) {
    const Setting s(type);
    Tensor state = torch::zeros({5}, type);
    std::vector<Forward> kinds = {
        [&](const Tensor& x) { return torch::tanh(x.matmul(s.a)).matmul(s.b) * (1 + 0.1 * own_noise()); },
        [&, own = at::detail::createCPUGenerator(4)](const Tensor& x) {
          Tensor h = torch::tanh(x.matmul(s.a));
          std::thread([&] { h = h + 0.1 * randn_of_the_cpu(h.sizes(), h.scalar_type(), own); }).join();
          return h.matmul(s.b);
        },
        [&](const Tensor& x) {  // a moving centre in a captured tensor
          const Tensor o = torch::tanh(x.matmul(s.a)).matmul(s.b);
          state = state + 0.1 * o.detach().mean(0) + 0.05;
          return o.matmul(torch::diag(1 / (1 + state.square())));
        }};
    for (const Forward& forward : kinds) {
      for (const bool first : {true, false}) {
        for (const auto& estimator : both) {
          const auto set = std::visit(
              [&](auto each) -> microreg::Estimator {
                if constexpr (!std::is_same_v<decltype(each), Exact>) {
                  each.check_every = first ? 1000 : 0;
                }
                return each;
              },
              estimator);
          CHECK(has(refusal([&] { (void)penalty_part({forward, s.weights()}, entropy, s.x, s.y, set); }),
                    {"does not repeat", "buffer", "Exact"}));
        }
      }
    }
  }
}

TEST_CASE("differences: what is changed in place is named", "[difference_checks]") {
  const Setting s;
  const Forward forward = [&](const Tensor& x) { return torch::tanh(x.matmul(s.a)).matmul(s.b); };
  check_refused({[&](const Tensor& x) {
                   Tensor h = x;
                   return forward(h.sub_(0.5).mul_(2));
                 },
                 s.weights()},
                entropy, s.x, s.y, {"input", "[12, 6]", "changed in place"});
  const Loss moves_target = [](const Tensor& o, const Tensor& y) {
    Tensor t = y;
    return (o - t.mul_(0.9)).square().mean();
  };
  check_refused({forward, s.weights()}, moves_target, s.x, torch::randn({12, 5}, torch::kFloat64),
                {"target", "[12, 5]", "changed in place"});
  check_refused({[&](const Tensor& x) {
                   {
                     const torch::NoGradGuard no_grad;
                     Tensor a = s.a;
                     a.clamp_(-0.3, 0.3);
                   }
                   return forward(x);
                 },
                 s.weights()},
                entropy, s.x, s.y, {"[6, 16]", "forward pass", "project"});
  // What LibTorch's counter does not see, the gates do: where a value at a bound passes it moves with the displacement;
  // where it does not, it is held there, and the proof finds that.
  const Model unseen{[&](const Tensor& x) {
                       s.a.data().clamp_(-0.3, 0.3);
                       return forward(x);
                     },
                     s.weights()};
  if (microreg::detail::clamp_shares_ties) {
    check_refused(unseen, entropy, s.x, s.y, {"is off by", "parameters[0]"});
  } else {
    check_right(unseen, entropy, s.x, s.y, 1e-5);
  }
}

TEST_CASE("differences: an Embedding with max_norm projects its rows once", "[difference_checks]") {
  for (const auto type : {torch::kFloat64, torch::kFloat32}) {
    const auto table = [&] {
      torch::manual_seed(2);
      return (torch::randn({20, 6}) * 3).to(type).requires_grad_();
    };
    const auto model_of = [&](const Tensor& w, const Tensor& head) {
      return Model{[w, head](const Tensor& t) {
                     const auto options = torch::nn::functional::EmbeddingFuncOptions().max_norm(1.0);
                     const Tensor h = torch::nn::functional::embedding(t, w, options);
                     return torch::tanh(h + torch::nn::functional::embedding(t, w, options)).flatten(1).matmul(head);
                   },
                   {w, head}};
    };
    const Tensor head = torch::randn({24, 3}).to(type).requires_grad_();
    const Tensor x = torch::randint(20, {8, 4}), y = torch::randint(3, {8});
    const Model projected = model_of(table(), head);
    const Tensor right = by_hand(projected, entropy, x, y);
    const auto loss = torch::autograd::grad({entropy(projected.function(x), y)}, projected.parameters);
    const Tensor of_loss = flattened(loss, projected.parameters);
    for (const auto& estimator : {microreg::Estimator(Exact{}), microreg::Estimator(ForwardDifference{}),
                                  microreg::Estimator(CentralDifference{}),
                                  microreg::Estimator(ForwardDifference{.gates = Gates::free, .tolerance = 0.01})}) {
      const Model model = model_of(table(), head);
      microreg::Regularizer regularizer(Model(model), entropy, microreg::GradientNorm{}, options_of(estimator));
      for (int step = 0; step < 2; ++step) {  // of unprojected rows, and of projected ones
        clear_grad(model.parameters);
        (void)regularizer.backward(x, y);
        CHECK(relative_error(flat_grad(model.parameters) - of_loss, right) < (type == torch::kFloat64 ? 1e-5 : 0.01));
        CHECK(same_bits(model.parameters[0].detach(), projected.parameters[0].detach()));
      }
    }
    clear_grad({head});
  }
}

TEST_CASE("differences: buffers that are reassigned or moved are right or refused", "[difference_checks]") {
  const Setting s;
  Tensor mean = torch::zeros({5}, torch::kFloat64);
  const auto output = [&](const Tensor& x) { return torch::tanh(x.matmul(s.a)).matmul(s.b); };
  check_refused({[&](const Tensor& x) {
                   const Tensor o = output(x);
                   mean = 0.5 * mean + 0.5 * o.detach().mean(0);
                   return o / (1 + mean.square());
                 },
                 s.weights(),
                 {mean}},
                entropy, s.x, s.y, {"does not repeat", "replaced"});
  Tensor moved = torch::zeros({5}, torch::kFloat64);
  check_right({[&](const Tensor& x) {
                 const Tensor o = output(x);
                 moved.set_data(0.5 * moved + 0.5 * o.detach().mean(0));
                 const Tensor result = o + moved;
                 moved.set_data(torch::zeros({5}, torch::kFloat64));
                 return result;
               },
               s.weights(),
               {moved}},
              entropy, s.x, s.y, 1e-4, {microreg::Estimator(ForwardDifference{.check_every = 0})});
}

TEST_CASE("differences: weights made once outside of forward are refused", "[difference_checks]") {
  const Setting s;
  const Tensor joined = torch::cat({s.a, s.a * 2}, 1);
  const Tensor wide = torch::randn({32, 5}, torch::kFloat64).requires_grad_();
  // The graph that is made once must live through both strengths.
  const Loss keeps = [&](const Tensor& o, const Tensor& y) { return entropy(o, y); };
  const Model model{[&](const Tensor& x) { return torch::tanh(x.matmul(joined)).matmul(wide); }, {s.a, wide}};
  check_refused(model, keeps, s.x, s.y, {"off by", "older than the pass"});
}

TEST_CASE("differences: functions of one's own and hooks are refused", "[difference_checks]") {
  torch::manual_seed(1);
  std::vector<Tensor> w;
  for (const auto& [rows, columns] : std::vector<std::pair<int, int>>{{32, 256}, {256, 256}, {256, 10}}) {
    w.push_back((torch::randn({rows, columns}) * std::sqrt(2. / rows)).requires_grad_());
  }
  const Tensor x = torch::randn({128, 32});
  const Tensor y = torch::randint(10, {128});
  const Setting s;
  const Model kinked{
      [&](const Tensor& in) { return OwnKink::apply(OwnKink::apply(in.matmul(w[0])).matmul(w[1])).matmul(w[2]); }, w};
  const Model reversed{[&](const Tensor& in) { return Reversal::apply(torch::tanh(in.matmul(s.a))).matmul(s.b); },
                       s.weights()};
  check_refused(kinked, entropy, x, y, {"OwnKink", "own_functions", "smooth", "Exact"});
  check_refused(reversed, entropy, s.x, s.y, {"Reversal", "own_functions"});
  const Model noded{[&](const Tensor& in) { return through_own_node(torch::tanh(in.matmul(s.a))).matmul(s.b); },
                    s.weights()};
  check_refused(noded, entropy, s.x, s.y, {"OwnNode", "own_functions"});
  // Declared smooth, they still have to prove it.
  check_refused(kinked, entropy, x, y, {"off by", "Kink", "%"}, declared);
  check_refused(reversed, entropy, s.x, s.y, {"off by", "Reversal", "[6, 16]"}, declared);
  // Where nothing is displaced nobody asks, nor with free gates.
  clear_grad(s.weights());
  microreg::Regularizer none(Model(reversed), entropy, microreg::GradientNorm{},
                             {.strength = 0, .estimator = ForwardDifference{}});
  CHECK_NOTHROW(none.backward(s.x, s.y));
  microreg::Regularizer free(Model(reversed), entropy, microreg::GradientNorm{},
                             {.estimator = ForwardDifference{.gates = Gates::free}});
  CHECK_NOTHROW(free.backward(s.x, s.y));
  const Setting hooked;
  hooked.a.register_hook([](const Tensor& g) { return g * 0.1; });
  const Model scaled{[&](const Tensor& in) { return torch::tanh(in.matmul(hooked.a)).matmul(hooked.b); },
                     hooked.weights()};
  check_refused(scaled, entropy, s.x, s.y, {"hook", "parameters[0]", "own_functions"});
  check_refused(scaled, entropy, s.x, s.y, {"off by", "hook"}, declared);
  int seen = 0;
  const Model watched{[&](const Tensor& in) {
                        const Tensor h = torch::tanh(in.matmul(s.a));
                        h.register_hook([&](const Tensor&) { ++seen; });
                        return h.matmul(s.b);
                      },
                      s.weights()};
  check_refused(watched, entropy, s.x, s.y, {"hook", "TanhBackward0", "own_functions"});
  seen = 0;
  check_right(watched, entropy, s.x, s.y, 1e-5, declared);
  CHECK(seen > 0);
}

TEST_CASE("differences: forward passes in other threads are right or refused", "[difference_checks][threads]") {
  const Setting s(torch::kFloat64, 64);
  const auto elsewhere = [](const std::function<Tensor()>& call) {
    Tensor result;
    std::thread([&] { result = call(); }).join();
    return result;
  };
  check_refused(
      {[&](const Tensor& x) { return elsewhere([&] { return torch::relu(x.matmul(s.a)); }).matmul(s.b); }, s.weights()},
      entropy, s.x, s.y, {"ReluBackward0", "another thread"});
  check_refused(
      {[&](const Tensor& x) { return elsewhere([&] { return torch::dropout(x.matmul(s.a), 0.5, true); }).matmul(s.b); },
       s.weights()},
      entropy, s.x, s.y, {"MulBackward0", "another thread"});
  check_right(
      {[&](const Tensor& x) { return elsewhere([&] { return torch::tanh(x.matmul(s.a)); }).matmul(s.b); }, s.weights()},
      entropy, s.x, s.y, 1e-5);
}

TEST_CASE("differences: another thread that reads the weights sees displaced ones, or copies are moved",
          "[difference_checks][threads]") {
  const Setting s;
  const Tensor before = s.a.detach().clone();
  int passes = 0;
  int displaced = 0;
  const Model model{[&](const Tensor& x) {
                      std::thread([&] { displaced += at::equal(s.a.detach(), before) ? 0 : 1; }).join();
                      ++passes;
                      return torch::tanh(x.matmul(s.a)).matmul(s.b);
                    },
                    s.weights()};
  const auto step = [&](const microreg::Estimator& estimator) {
    passes = displaced = 0;
    clear_grad(s.weights());
    microreg::Regularizer regularizer(Model(model), entropy, microreg::GradientNorm{}, options_of(estimator));
    (void)regularizer.backward(s.x, s.y);
    CHECK(same_bits(s.a.detach(), before));
  };
  step(Exact{});
  CHECK((passes == 1 && displaced == 0));
  step(ForwardDifference{.check_every = 0});
  CHECK((passes == 2 && displaced == 1));
  step(CentralDifference{.check_every = 0});
  CHECK((passes == 3 && displaced == 2));
  step(ForwardDifference{.check_every = 0, .displace = microreg::Displace::copies});
  CHECK((passes == 2 && displaced == 0));
  step(CentralDifference{.check_every = 0, .displace = microreg::Displace::copies});
  CHECK((passes == 3 && displaced == 0));
}

TEST_CASE("differences: detach is right, straight-through and bootstrapped targets", "[difference_checks]") {
  const Setting s;
  const Model model{[&](const Tensor& x) { return torch::tanh(x.matmul(s.a)).matmul(s.b); }, s.weights()};
  const Tensor y = torch::randn({12, 5}, torch::kFloat64);
  check_right(
      model, [](const Tensor& o, const Tensor& t) { return (o - (t + 0.9 * o.detach())).square().mean(); }, s.x, y,
      1e-5);
  check_right({[&](const Tensor& x) {
                 const Tensor h = torch::tanh(x.matmul(s.a));
                 return (h + (h.round() - h).detach()).matmul(s.b);
               },
               s.weights()},
              entropy, s.x, s.y, 1e-5);
}

TEST_CASE("differences: a data loader that draws meanwhile is neither disturbed nor heard",
          "[difference_checks][threads]") {
  const auto estimator = GENERATE(microreg::Estimator(ForwardDifference{}), microreg::Estimator(CentralDifference{}),
                                  microreg::Estimator(ForwardDifference{.gates = Gates::free}));
  const Setting s(torch::kFloat64, 64);
  const Model model{[&](const Tensor& x) {
                      const Tensor h = torch::dropout(torch::tanh(x.matmul(s.a)), 0.3, true);
                      return (h + 0.1 * torch::randn_like(h)).matmul(s.b);
                    },
                    s.weights()};
  const auto norm = [&] {
    clear_grad(s.weights());
    microreg::Regularizer regularizer(Model(model), entropy, microreg::GradientNorm{},
                                      {.strength = .1, .micro_batch_size = 16, .estimator = estimator});
    return regularizer.backward(s.x, s.y).gradient_norm.item<double>();
  };
  const double alone = norm();
  std::atomic<bool> stop{false};
  std::vector<double> drawn;
  std::thread loader([&] {
    while (!stop) {
      drawn.push_back(torch::rand({1}, torch::kFloat64).item<double>());
      std::this_thread::sleep_for(std::chrono::microseconds(50));
    }
  });
  for (int i = 0; i < 20; ++i) {
    CHECK(norm() == Approx(alone).epsilon(0.5));
  }
  stop = true;
  loader.join();
  std::sort(drawn.begin(), drawn.end());
  const auto repeated = drawn.end() - std::unique(drawn.begin(), drawn.end());
  CHECK(repeated == 0);  // of 2^53 values, on however slow a machine
}

TEST_CASE("differences: two regularizers with dropout in two threads", "[difference_checks][threads]") {
  std::atomic<int> wrong{0};
  const auto work = [&](std::uint64_t /*seed*/, const Setting& s) {
    const Model model{
        [&](const Tensor& x) { return torch::dropout(torch::tanh(x.matmul(s.a)), 0.5, true).matmul(s.b); },
        s.weights()};
    microreg::Regularizer regularizer(Model(model), entropy, microreg::GradientNorm{},
                                      {.strength = .1, .micro_batch_size = 16, .estimator = ForwardDifference{}});
    for (int i = 0; i < 20; ++i) {
      clear_grad(s.weights());
      const double norm = regularizer.backward(s.x, s.y).gradient_norm.item<double>();
      wrong += norm > 10 || !(norm > 0) ? 1 : 0;
    }
  };
  const Setting one(torch::kFloat64, 64);
  const Setting two(torch::kFloat64, 64);
  std::thread other([&] { work(1, one); });
  work(2, two);
  other.join();
  CHECK(wrong == 0);
}

TEST_CASE("differences: the generator ends as after a plain step", "[difference_checks]") {
  const Setting s(torch::kFloat64, 12);
  const std::vector<Forward> kinds = {
      [&](const Tensor& x) { return torch::dropout(torch::tanh(x.matmul(s.a)), 0.5, true).matmul(s.b); },
      [&](const Tensor& x) { return (torch::rrelu(x.matmul(s.a), 0.1, 0.9, true)).matmul(s.b); },
      [&](const Tensor& x) {
        const Tensor h = torch::tanh(x.matmul(s.a));
        Tensor noise = torch::empty_like(h).exponential_() + torch::rand_like(h) + at::normal(h.detach(), 0.1);
        noise = noise.index_select(0, torch::randperm(12)) * torch::bernoulli(h.detach().sigmoid());
        return torch::feature_dropout(h * noise, 0.2, true).matmul(s.b) + torch::randint(3, {5}).to(torch::kFloat64);
      },
      [&](const Tensor& x) {  // draws again, from the state of then
        return (torch::tanh(x.matmul(s.a)) * at::_standard_gamma(1 + s.a.select(0, 0).square().detach())).matmul(s.b);
      }};
  for (const Forward& forward : kinds) {
    const auto after = [&](const microreg::Estimator& estimator) {
      torch::manual_seed(4);
      microreg::Regularizer regularizer(Model{forward, s.weights()}, entropy,
                                        microreg::GradientNorm{} + microreg::FisherTrace{}, options_of(estimator));
      (void)regularizer.backward(s.x, s.y);
      return at::globalContext().defaultGenerator(test_device()).get_state();
    };
    const Tensor plain = after(Exact{});
    for (const auto& estimator : both) {
      CHECK(same_bits(after(estimator), plain));
      CHECK(same_bits(after(ForwardDifference{.gates = Gates::free}), plain));
    }
    check_right({forward, s.weights()}, entropy, s.x, s.y, 1e-4);
  }
}

TEST_CASE("differences: the step adapts to the sensitivity that is there, or is refused", "[difference_checks]") {
  SECTION("float64 parameters over a float32 network") {
    const Setting s(torch::kFloat64, 64);
    const Model model{[&](const Tensor& x) {
                        return torch::tanh(x.to(torch::kFloat).matmul(s.a.to(torch::kFloat)))
                            .matmul(s.b.to(torch::kFloat))
                            .to(torch::kFloat64);
                      },
                      s.weights()};
    const Tensor right = by_hand(model, entropy, s.x, s.y);
    for (const auto& estimator : both) {
      Tensor found;
      const std::string message = refusal([&] { found = penalty_part(model, entropy, s.x, s.y, estimator); });
      CHECK((found.defined() ? relative_error(found, right) < 0.02 : has(message, {"off by", "rounding"})));
    }
  }
  SECTION("float32 parameters over a bfloat16 network") {
    const Setting s(torch::kFloat, 64);
    const auto coarse = torch::kBFloat16;
    const Model model{
        [&](const Tensor& x) {
          return torch::tanh(x.to(coarse).matmul(s.a.to(coarse))).matmul(s.b.to(coarse)).to(torch::kFloat);
        },
        s.weights()};
    const Tensor right = by_hand(model, entropy, s.x, s.y);
    for (const auto& estimator : both) {
      Tensor found;
      const std::string message = refusal([&] { found = penalty_part(model, entropy, s.x, s.y, estimator); });
      CHECK((found.defined() ? relative_error(found, right) < 0.08 : has(message, {"off by"})));
    }
  }
  SECTION("biases only, a layer scale, a zero head") {
    torch::manual_seed(6);
    const Tensor a = (torch::randn({32, 128}) / 5), b = (torch::randn({128, 10}) / 11);
    const Tensor bias = torch::full({128}, 1e-4).requires_grad_();
    const Tensor scale = torch::full({10}, 1e-6).requires_grad_();
    const Tensor head = torch::zeros({128, 10}).requires_grad_();
    const Tensor x = torch::randn({256, 32});
    const Tensor y = torch::randint(10, {256});
    for (const Model& model :
         {Model{[&](const Tensor& in) { return torch::tanh(in.matmul(a) + bias).matmul(b); }, {bias}},
          Model{[&](const Tensor& in) { return torch::tanh(in.matmul(a)).matmul(b) + in.narrow(1, 0, 10) * scale; },
                {scale}},
          Model{[&](const Tensor& in) { return torch::tanh(in.matmul(a) + bias.detach()).matmul(head); }, {head}}}) {
      const Tensor right = by_hand(model, entropy, x, y);
      for (const auto& estimator : both) {
        Tensor found;
        const std::string message = refusal([&] { found = penalty_part(model, entropy, x, y, estimator); });
        CHECK((found.defined() ? relative_error(found, right) < 0.05 : has(message, {"off by"})));
      }
    }
  }
  SECTION("a half-precision input") {
    const Setting s(torch::kFloat);
    const Forward forward = [&](const Tensor& x) { return torch::tanh(x.to(torch::kFloat).matmul(s.a)).matmul(s.b); };
    microreg::Regularizer regularizer(Model{forward, s.weights()}, entropy, microreg::InputJacobian{},
                                      options_of(ForwardDifference{}));
    CHECK(has(message_of<microreg::OptionError>([&] { (void)regularizer.backward(s.x.to(torch::kBFloat16), s.y); }),
              {"input", "BFloat16", "step"}));
  }
}

TEST_CASE("differences: a fitted batch, where they are lost in rounding, is differentiated exactly",
          "[difference_checks]") {
  Setting s(torch::kFloat, 32);
  const Model model{[&](const Tensor& x) { return torch::tanh(x.matmul(s.a)).matmul(s.b); }, s.weights()};
  microreg::Regularizer regularizer(Model(model), entropy, microreg::GradientNorm{}, options_of(ForwardDifference{}));
  (void)regularizer.backward(s.x, s.y);  // the proof, on a usual batch
  {
    const torch::NoGradGuard no_grad;
    s.b.mul_(60);  // and labels as the network has them
  }
  const Tensor y = model.function(s.x).argmax(1);
  const Tensor right = by_hand(model, entropy, s.x, y);
  clear_grad(s.weights());
  const auto loss_part = torch::autograd::grad({entropy(model.function(s.x), y)}, s.weights());
  (void)regularizer.backward(s.x, y);
  const Tensor part = flat_grad(s.weights()) - flattened(loss_part, s.weights());
  CHECK(relative_error(part, right) < 0.05);
}

// One micro-batch is proven, and the others are not like it: their samples lie close together, so that the gradient of
// a normalisation over two of them bends within a displacement, or is lost in rounding.
TEST_CASE("differences: normalisation over few elements is right on every micro-batch", "[difference_checks]") {
  struct Normalisation {
    const char* name;
    Forward rows;  // normalises a matrix [2, 12]: over the two samples, or over pairs of features
    bool seen;     // by an operation of LibTorch
  };
  const auto pairs = [](const Tensor& h, const auto& normalise) { return normalise(h.reshape({-1, 2})).view_as(h); };
  const Normalisation normalisation = GENERATE_COPY(values<Normalisation>({
      {"batch norm", [](const Tensor& h) { return torch::batch_norm(h, {}, {}, {}, {}, true, 0.1, 1e-5, false); },
       true},
      {"instance norm",
       [=](const Tensor& h) {
         return pairs(h, [](const Tensor& p) {
           return torch::instance_norm(p.unsqueeze(0), {}, {}, {}, {}, true, 0.1, 1e-5, false);
         });
       },
       true},
      {"layer norm",
       [=](const Tensor& h) { return pairs(h, [](const Tensor& p) { return torch::layer_norm(p, {2}); }); }, true},
      {"group norm", [](const Tensor& h) { return torch::group_norm(h, 6); }, true},
      {"by hand",
       [](const Tensor& h) {
         const Tensor centred = h - h.mean(0, true);
         return centred * (centred.square().mean(0, true) + 1e-5).rsqrt();
       },
       false},
  }));
  INFO(normalisation.name);
  double worst_forward = 0, worst_central = 0;
  int right = 0;
  for (std::uint64_t seed = 0; seed < 20; ++seed) {
    const auto penalty_in = [&](torch::ScalarType type, const microreg::Estimator& estimator) {
      torch::manual_seed(seed);
      const auto weight = [&](torch::IntArrayRef sizes) {
        return (randn_of_the_cpu(sizes) / std::sqrt(static_cast<double>(sizes[1]))).to(type).requires_grad_();
      };
      const Tensor a = weight({12, 6}), b = weight({12, 12}), c = weight({4, 12});
      Tensor x = randn_of_the_cpu({12, 6});
      for (std::int64_t i = 3; i < 12; i += 2) {
        x[i].copy_(x[i - 1] + 0.1 * randn_of_the_cpu({6}));
      }
      const Tensor y = torch::randint(4, {12}, torch::TensorOptions(torch::kCPU).dtype(torch::kLong)).to(test_device());
      const Model model{[=, &normalisation](const Tensor& input) {
                          const Tensor h = torch::tanh(torch::linear(input, a));
                          return torch::linear(torch::tanh(normalisation.rows(torch::linear(h, b))), c);
                        },
                        {a, b, c}};
      Tensor parts[2];
      for (const int strength : {0, 1}) {
        clear_grad(model.parameters);
        auto options = options_of(estimator, strength);
        options.micro_batch_size = 2;
        microreg::Regularizer regularizer(Model(model), entropy, microreg::GradientNorm{}, options);
        (void)regularizer.backward(x.to(type), y);
        parts[strength] = flat_grad(model.parameters).to(torch::kFloat64);
      }
      return Tensor(parts[1] - parts[0]);
    };
    const Tensor exact = penalty_in(torch::kFloat64, Exact{});
    const auto off = [&](const microreg::Estimator& estimator) {
      return relative_error(penalty_in(torch::kFloat32, estimator), exact);
    };
    worst_forward = std::max(worst_forward, normalisation.seen ? off(ForwardDifference{}) : 0.0);
    try {
      worst_central = std::max(worst_central, off(CentralDifference{}));
      ++right;
    } catch (const microreg::DifferenceError& error) {  // already the micro-batch that is proven bends too much
      CHECK(!normalisation.seen);
    }
  }
  CHECK(right >= 5);
  CHECK(worst_forward < 1e-3);
  CHECK(worst_central < (normalisation.seen ? 1e-3 : 1e-2));
}

TEST_CASE("differences: a change that is lost in rounding, where an operation has no second derivative, is refused",
          "[difference_checks]") {
  Setting s(torch::kFloat, 32);
  double offset = 0;
  const Loss loss = [&](const Tensor& o, const Tensor& y) { return entropy(o, y) + offset - offset; };
  const auto network = [&](bool once) {
    return Model{[&, once](const Tensor& x) {
                   const Tensor h = x.matmul(s.a);
                   return torch::tanh(once ? Once::apply(h) : h.sin()).matmul(s.b);
                 },
                 s.weights()};
  };
  for (const bool once : {false, true}) {
    offset = 0;
    microreg::Regularizer regularizer(network(once), loss, microreg::GradientNorm{},
                                      options_of(ForwardDifference{.own_functions = smooth}));
    (void)regularizer.backward(s.x, s.y);  // the proof
    offset = 1e5;
    clear_grad(s.weights());
    const std::string message = refusal([&] { (void)regularizer.backward(s.x, s.y); });
    CHECK(message.empty() != once);
    CHECK((!once || has(message, {"gradient_norm", "rounding", "second derivative"})));
    CHECK(s.a.grad().defined() != once);
  }
}

TEST_CASE("differences: without a second derivative two lengths are compared", "[difference_checks]") {
  const Setting s;
  const Model model{[&](const Tensor& x) { return Once::apply(x.matmul(s.a)).matmul(s.b); }, s.weights()};
  const Model plain{[&](const Tensor& x) { return torch::sin(x.matmul(s.a)).matmul(s.b); }, s.weights()};
  const Tensor right = by_hand(plain, entropy, s.x, s.y);
  for (const auto& estimator : declared) {
    CHECK(relative_error(penalty_part(model, entropy, s.x, s.y, estimator), right) < 1e-5);
  }
  CHECK(has(refusal([&] {
              (void)penalty_part(model, entropy, s.x, s.y, ForwardDifference{.step = 20, .own_functions = smooth});
            }),
            {"off by", "twice its displacement"}));
}

// Double backward cannot take the place of a difference there.
TEST_CASE("differences: normalisation over few elements without a second derivative is right or refused",
          "[difference_checks][threads]") {
  const auto network = [](bool once) {
    const auto setting = std::make_shared<Setting>(torch::kFloat, 24);
    return std::pair(setting, Model{[setting, once](const Tensor& x) {
                                      const Tensor h = x.matmul(setting->a);
                                      const Tensor n = torch::group_norm(once ? Once::apply(h) : h.sin(), 4);
                                      return torch::tanh(n).matmul(setting->b);
                                    },
                                    setting->weights()});
  };
  for (const int workers : {1, 2}) {
    const auto gradient = [&](bool once, const microreg::Estimator& estimator) {
      const auto [setting, model] = network(once);
      microreg::Regularizer regularizer(
          model, entropy, microreg::GradientNorm{},
          {.strength = 1, .micro_batch_size = 3, .estimator = estimator, .workers = workers});
      (void)regularizer.backward(setting->x, setting->y);
      return flat_grad(model.parameters);
    };
    const Tensor right = gradient(false, Exact{});
    const auto copies = microreg::Displace::copies;
    CHECK(relative_error(gradient(true, ForwardDifference{.own_functions = smooth, .displace = copies}), right) < 5e-2);
    CHECK(relative_error(gradient(true, CentralDifference{.own_functions = smooth, .displace = copies}), right) < 5e-3);
    CHECK(has(refusal([&] {
                (void)gradient(true, ForwardDifference{.step = 3, .own_functions = smooth, .displace = copies});
              }),
              {"off by", "twice its displacement"}));
  }
}

TEST_CASE("differences: the proof is given when it is due, disturbs nothing, and can be switched off",
          "[difference_checks]") {
  auto model = networks::seeded_cnn(networks::Norm::batch, networks::Activation::kinked);
  const auto batch = networks::images(8);
  int passes = 0;
  const auto counted = [&](const Tensor& o, const Tensor& y) {
    ++passes;
    return torch::cross_entropy_loss(o, y);
  };
  const auto passes_of = [&](std::int64_t every, int steps) {
    passes = 0;
    microreg::Regularizer regularizer(model, counted, microreg::GradientNorm{},
                                      {.micro_batch_size = 4, .estimator = ForwardDifference{.check_every = every}});
    for (int i = 0; i < steps; ++i) {
      (void)regularizer.backward(batch.input, batch.target);
    }
    return passes;
  };
  CHECK(passes_of(0, 6) == 24);
  CHECK(passes_of(1000, 6) == 25);
  CHECK(passes_of(3, 7) == 28 + 3);
  CHECK(has(message_of<microreg::OptionError>([&] { passes_of(-1, 1); }), {"check_every", "-1"}));

  const Watch watch(*model);
  microreg::Regularizer regularizer(model, cross_entropy, microreg::GradientNorm{},
                                    {.micro_batch_size = 4, .estimator = ForwardDifference{.tolerance = 1e-12}});
  const auto message =
      message_of<microreg::DifferenceError>([&] { (void)regularizer.backward(batch.input, batch.target); });
  CHECK(has(message, {"off by", "%", "of shape", "tolerance"}));
  CHECK(watch.unchanged());
  CHECK(regularizer.step() == 0);
  CHECK(has(message_of<microreg::DifferenceError>([&] {
              microreg::Regularizer free(
                  model, cross_entropy, microreg::GradientNorm{},
                  {.micro_batch_size = 4,
                   .estimator = ForwardDifference{.step = 1e-2, .gates = Gates::free, .tolerance = 0.01}});
              (void)free.backward(batch.input, batch.target);
            }),
            {"gates are free"}));
}
