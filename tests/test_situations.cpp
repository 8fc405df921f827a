// Situations that users of other programs bring along, each against double backward written by hand in float64: layers,
// losses and routing in a table, and what changes between two steps or in another thread.
#include "helpers.hpp"

#include <torch/script.h>
#include <microreg/microreg.hpp>

#include <cmath>
#include <functional>
#include <thread>
#include <utility>

using namespace helpers;
using microreg::CentralDifference;
using microreg::Exact;
using microreg::ForwardDifference;
using torch::Tensor;

namespace {

using Tensors = std::vector<Tensor>;
using Forward = std::function<Tensor(const Tensor&)>;
using Loss = std::function<Tensor(const Tensor&, const Tensor&)>;
using Model = microreg::FunctionModel<Forward>;
namespace F = torch::nn::functional;

Tensor entropy_loss(const Tensor& o, const Tensor& y) { return torch::cross_entropy_loss(o, y); }
Tensor leaf(at::IntArrayRef shape, double scale = 0.5, torch::ScalarType type = torch::kFloat64) {
  return (torch::randn(shape, torch::kFloat64) * scale).to(type).requires_grad_();
}
Tensor normal(at::IntArrayRef shape) { return torch::randn(shape, torch::kFloat64); }

/// Gradients of loss and of || grad loss ||^2, the mean over micro-batches, weighted by samples.
struct ByHand {
  Tensor of_loss, of_penalty;
};
ByHand by_hand(const Forward& forward, const Loss& loss, const Tensors& weights, const Tensor& x, const Tensor& y,
               std::int64_t size) {
  ByHand result;
  const auto add = [](Tensor& sum, const Tensor& gradients, double weight) {
    sum = (sum.defined() ? sum : torch::zeros({}, at::device(at::kCPU).dtype(at::kDouble))) + gradients * weight;
  };
  for (std::int64_t begin = 0; begin < x.size(0); begin += size) {
    const std::int64_t count = std::min(size, x.size(0) - begin);
    const double weight = static_cast<double>(count) / static_cast<double>(x.size(0));
    const Tensor value = loss(forward(x.narrow(0, begin, count)), y.narrow(0, begin, count));
    add(result.of_loss, flattened(torch::autograd::grad({value}, weights, {}, true, false, true), weights), weight);
    add(result.of_penalty, penalty_by_hand(value, weights), weight);
  }
  return result;
}

constexpr std::uint64_t draws = 11;  // seed of what a pass draws

const struct {
  const char* name;
  microreg::Estimator estimator;
  bool fused;
  double bound;
} ways[] = {{"exact", Exact{}, true, 1e-10},
            {"exact, unfused", Exact{}, false, 1e-10},
            {"forward", ForwardDifference{}, true, 1e-5},
            {"central", CentralDifference{}, true, 1e-7}};

struct Situation {
  Forward forward;
  Tensors weights;
  Tensor x, y;
  Loss loss = entropy_loss;
};

void check_situation(const char* name, const std::function<Situation()>& make) {
  CAPTURE(name);
  torch::manual_seed(3);
  const Situation s = make();
  torch::manual_seed(draws);
  const auto found = if_differentiable(name, [&] { return by_hand(s.forward, s.loss, s.weights, s.x, s.y, 4); });
  if (!found.has_value()) {
    return;
  }
  const ByHand& right = *found;
  const Tensor generator = at::globalContext().defaultGenerator(test_device()).get_state();
  REQUIRE(right.of_penalty.norm().item<double>() > 1e-6);
  for (const auto& way : ways) {
    CAPTURE(way.name);
    torch::manual_seed(draws);
    clear_grad(s.weights);
    microreg::Regularizer regularizer(
        Model{s.forward, s.weights}, s.loss, microreg::GradientNorm{},
        {.strength = 0.5, .micro_batch_size = 4, .estimator = way.estimator, .fused = way.fused});
    (void)regularizer.backward(s.x, s.y);
    CHECK(relative_error(flat_grad(s.weights) - right.of_loss, 0.5 * right.of_penalty) < way.bound);
    CHECK(same_bits(at::globalContext().defaultGenerator(test_device()).get_state(), generator));
  }
  clear_grad(s.weights);
}

/// x -> f(x w) o.
std::function<Situation()> around(const std::function<Tensor(const Tensor&)>& f) {
  return [f]() -> Situation {
    const Tensor w = leaf({6, 8}), o = leaf({8, 5});
    return {
        [=](const Tensor& x) { return f(x.matmul(w)).matmul(o); }, {w, o}, normal({10, 6}), torch::randint(5, {10})};
  };
}
std::function<Situation()> around_image(const std::function<Tensor(const Tensor&)>& f) {
  return [f]() -> Situation {
    const Tensor w = leaf({4, 2, 3, 3}), o = leaf({4, 5});
    return {[=](const Tensor& x) { return torch::tanh(f(torch::conv2d(x, w, {}, 1, 1)).flatten(2)).mean(2).matmul(o); },
            {w, o},
            normal({10, 2, 6, 6}),
            torch::randint(5, {10})};
  };
}
/// A ReLU network under this loss.
std::function<Situation()> under(std::int64_t outputs, const std::function<Tensor()>& target, const Loss& loss) {
  return [=]() -> Situation {
    const Tensor w = leaf({6, 8}), o = leaf({8, outputs});
    return {
        [=](const Tensor& x) { return torch::relu(x.matmul(w)).matmul(o); }, {w, o}, normal({10, 6}), target(), loss};
  };
}

}  // namespace

TEST_CASE("situations: layers, routing and noise", "[situations]") {
  Tensors held;  // on a device LibTorch alone differentiates only such a view twice
  const std::pair<const char*, std::function<Situation()>> all[] = {
      {"attention with a causal mask",
       []() -> Situation {
         const Tensor q = leaf({8, 8}), k = leaf({8, 8}), v = leaf({8, 5});
         return {[=](const Tensor& x) {
                   const auto head = [&](const Tensor& w) { return x.matmul(w).unsqueeze(1); };
                   return at::scaled_dot_product_attention(head(q), head(k), head(v), {}, 0.0, true).squeeze(1).mean(1);
                 },
                 {q, k, v},
                 normal({10, 6, 8}),
                 torch::randint(5, {10})};
       }},
      {"one matrix, transposed, as embedding and as output",
       []() -> Situation {
         const Tensor w = leaf({6, 11});
         return {[=](const Tensor& t) { return torch::tanh(torch::embedding(w.t(), t).mean(1)).matmul(w); },
                 {w},
                 torch::randint(11, {10, 4}),
                 torch::randint(11, {10})};
       }},
      {"a mixture of experts, routed on the host",
       []() -> Situation {
         const Tensor gate = leaf({6, 3}), experts = leaf({3, 6, 8}), o = leaf({8, 5});
         return {[=](const Tensor& x) {
                   const auto [share, expert] = x.matmul(gate).softmax(1).max(1);
                   Tensors rows;
                   for (std::int64_t i = 0; i < x.size(0); ++i) {
                     rows.push_back(torch::relu(x[i].matmul(experts[expert[i].item<std::int64_t>()])) * share[i]);
                   }
                   return torch::stack(rows).matmul(o);
                 },
                 {gate, experts, o},
                 normal({10, 6}),
                 torch::randint(5, {10})};
       }},
      {"experts with a capacity, gathered and scattered",
       []() -> Situation {
         const Tensor gate = leaf({6, 3}), experts = leaf({3, 6, 8}), o = leaf({8, 5});
         return {[=](const Tensor& x) {
                   const auto [share, expert] = x.matmul(gate).softmax(1).topk(2, 1);
                   Tensor sum = torch::zeros({x.size(0), 8}, x.options());
                   for (int k = 0; k < 3; ++k) {
                     const Tensor mine = expert == k;
                     const Tensor rows = mine.any(1).nonzero().squeeze(1).slice(0, 0, 3);
                     const Tensor factor = (share * mine).sum(1).index_select(0, rows).unsqueeze(1);
                     sum = sum.index_add(0, rows, torch::gelu(x.index_select(0, rows).matmul(experts[k])) * factor);
                   }
                   return sum.matmul(o);
                 },
                 {gate, experts, o},
                 normal({10, 6}),
                 torch::randint(5, {10})};
       }},
      {"halting that depends on the data",
       []() -> Situation {
         const Tensor w = leaf({6, 6}, .4), halt = leaf({6, 1}), o = leaf({6, 5});
         return {[=](const Tensor& x) {
                   Tensor h = x, sum = torch::zeros_like(x), running = torch::ones({x.size(0), 1}, x.options());
                   for (int t = 0; t < 4 && running.any().item<bool>(); ++t) {
                     h = torch::tanh(h.matmul(w));
                     const Tensor p = torch::sigmoid(h.matmul(halt));
                     sum = sum + h * p * running;
                     running = running * (p < .6);
                   }
                   return sum.matmul(o);
                 },
                 {w, halt, o},
                 normal({10, 6}),
                 torch::randint(5, {10})};
       }},
      {"a codebook with stop-gradients",
       []() -> Situation {
         const Tensor w = leaf({6, 8}), codes = leaf({7, 8}), o = leaf({8, 5});
         return {[=](const Tensor& x) {
                   const Tensor h = x.matmul(w);
                   const Tensor q = codes.index_select(0, (h.unsqueeze(1) - codes).square().sum(2).argmin(1));
                   return (h + (q - h).detach()).matmul(o) + (q.detach() - h).square().mean() +
                          (q - h.detach()).square().mean();
                 },
                 {w, codes, o},
                 normal({10, 6}),
                 torch::randint(5, {10}),
                 [](const Tensor& out, const Tensor& y) { return entropy_loss(out.tanh(), y) + out.square().mean(); }};
       }},
      {"a network that differentiates itself",
       []() -> Situation {
         const Tensor w = leaf({6, 8}), o = leaf({8, 5});
         return {[=](const Tensor& x) {
                   const Tensor inner = torch::relu(x.matmul(w)).matmul(o).square().mean();
                   const Tensor g = torch::autograd::grad({inner}, {w}, {}, true, true)[0];
                   return torch::relu(x.matmul(w - .5 * g)).matmul(o);
                 },
                 {w, o},
                 normal({10, 6}),
                 torch::randint(5, {10})};
       }},
      {"rectified on its diagonal", around([&held](const Tensor& h) {
         const Tensor z = h * 1;
         held.push_back(z.diagonal().relu_());
         return torch::tanh(z);
       })},
      {"clamped in a strided view", around([](const Tensor& h) {
         const Tensor z = h * 1;
         z.as_strided({h.size(0), 3}, {8, 2}, 1).clamp_(-.3, .4);
         return torch::tanh(z);
       })},
      {"filled in overlapping windows", around([](const Tensor& h) {
         const Tensor z = h * 1;
         const Tensor windows = z.unfold(1, 2, 4);
         windows.masked_fill_(windows < 0, 0.1);
         return torch::tanh(z);
       })},
      {"a mask written by out=", around([](const Tensor& h) {
         Tensor mask = torch::empty({0}, torch::kBool);
         const torch::NoGradGuard no_grad;
         torch::gt_out(mask, h, 0);
         const torch::AutoGradMode enable(true);
         return h * mask;
       })},
      {"values looked up by interval", around([](const Tensor& h) {
         const Tensor interval = torch::bucketize(h, torch::linspace(-1, 1, 5, torch::kFloat64));
         return h * torch::linspace(.1, 2, 6, torch::kFloat64).index({interval});
       })},
      {"lengths that come from the data", around([](const Tensor& h) {
         Tensors rows;
         for (std::int64_t i = 0; i < h.size(0); ++i) {
           const auto length = (h[i].detach() > 0).sum().item<std::int64_t>();
           rows.push_back(F::pad(torch::relu(h[i].narrow(0, 0, length)), F::PadFuncOptions({0, 8 - length})));
         }
         return torch::stack(rows);
       })},
      {"quantised to int8, straight through", around([](const Tensor& h) {
         const Tensor scale = h.detach().abs().max() / 127;
         const Tensor q = (h.detach() / scale).round().clamp(-127, 127).to(torch::kInt8);
         return h + (q.to(h.dtype()) * scale - h).detach();
       })},
      {"noise of four kinds", around([](const Tensor& h) {
         const Tensor noise = .1 * torch::randn_like(h) + torch::empty_like(h).uniform_(-.1, .1);
         return torch::relu(h + noise).index_select(1, torch::randperm(8)) * torch::empty_like(h).exponential_(2);
       })},
      {"stochastic depth", around([](const Tensor& h) {
         Tensor z = h;
         for (int i = 0; i < 3; ++i) {
           z = torch::rand({}).item<double>() > .4 ? z + torch::relu(z) / .6 : z;
         }
         return z;
       })},
      {"alpha dropout", around([](const Tensor& h) { return torch::alpha_dropout(torch::selu(h), .3, true); })},
      {"hard Gumbel softmax",
       around([](const Tensor& h) { return F::gumbel_softmax(h, F::GumbelSoftmaxFuncOptions().hard(true)); })},
      {"fractional max pooling", around_image([](const Tensor& h) {
         return F::fractional_max_pool2d(
             h, F::FractionalMaxPool2dFuncOptions(2).output_ratio(torch::ExpandingArray<2, double>(0.6)));
       })},
      {"max unpooling", around_image([](const Tensor& h) {
         const auto [values, indices] = torch::max_pool2d_with_indices(h, 2);
         return torch::max_unpool2d(values, indices, {6, 6});
       })},
      {"windows, rectified and folded", around_image([](const Tensor& h) {
         return F::fold(torch::relu(F::unfold(h, F::UnfoldFuncOptions({3, 3}).padding(1))),
                        F::FoldFuncOptions({6, 6}, {3, 3}).padding(1));
       })},
      {"sampled at a fixed grid", around_image([](const Tensor& h) {
         const Tensor turn = torch::eye(2, 3, torch::kFloat64).expand({h.size(0), 2, 3}) * 0.9;
         return F::grid_sample(h, F::affine_grid(turn, {h.size(0), 4, 6, 6}, false),
                               F::GridSampleFuncOptions().padding_mode(torch::kBorder).align_corners(false));
       })},
      {"a spectrum", around([](const Tensor& h) {
         const Tensor s = torch::fft::rfft(h);
         return torch::cat({s.abs(), s.angle().cos().narrow(1, 0, 3)}, 1);
       })}};
  for (const auto& [name, make] : all) {
    check_situation(name, make);
  }
}

TEST_CASE("situations: losses", "[situations]") {
  const auto signs = [] { return (torch::randint(2, {10}) * 2 - 1).to(torch::kFloat64); };
  const auto numbers = [] { return normal({10, 5}); };
  const std::pair<const char*, std::function<Situation()>> all[] = {
      {"hinge embedding", under(
                              5, [] { return (torch::randint(2, {10, 5}) * 2 - 1).to(torch::kFloat64); },
                              [](const Tensor& o, const Tensor& y) { return torch::hinge_embedding_loss(o, y); })},
      {"margin ranking", under(2, signs,
                               [](const Tensor& o, const Tensor& y) {
                                 return torch::margin_ranking_loss(o.select(1, 0), o.select(1, 1), y, .3);
                               })},
      {"triplets, swapped", under(9, signs,
                                  [](const Tensor& o, const Tensor& /*y*/) {
                                    return torch::triplet_margin_loss(o.narrow(1, 0, 3), o.narrow(1, 3, 3),
                                                                      o.narrow(1, 6, 3), 1, 2, 1e-6, true);
                                  })},
      {"cosine embedding", under(6, signs,
                                 [](const Tensor& o, const Tensor& y) {
                                   return torch::cosine_embedding_loss(o.narrow(1, 0, 3), o.narrow(1, 3, 3), y, .1);
                                 })},
      {"focal", under(
                    5, [] { return torch::randint(2, {10, 5}).to(torch::kFloat64); },
                    [](const Tensor& o, const Tensor& y) {
                      const Tensor p = torch::sigmoid(o);
                      const Tensor right = torch::where(y > .5, p, 1 - p);
                      return -((1 - right).pow(2) * right.clamp_min(1e-8).log()).mean();
                    })},
      {"contrastive, over the micro-batch", under(5, numbers,
                                                  [](const Tensor& o, const Tensor& /*y*/) {
                                                    const Tensor z = F::normalize(o);
                                                    const auto n = o.size(0);
                                                    const Tensor same = torch::eye(n, torch::kBool);
                                                    return entropy_loss((z.matmul(z.t()) / .5).masked_fill(same, -1e9),
                                                                        torch::arange(n).roll(1));
                                                  })},
      {"the hardest samples", under(
                                  5, [] { return torch::randint(5, {10}); },
                                  [](const Tensor& o, const Tensor& y) {
                                    const Tensor each = torch::cross_entropy_loss(o, y, {}, at::Reduction::None);
                                    return std::get<0>(each.topk(2)).mean();
                                  })},
      {"the nearest target", under(5, numbers,
                                   [](const Tensor& o, const Tensor& y) {
                                     const Tensor d = torch::cdist(o.unsqueeze(2), y.unsqueeze(2));
                                     return (o - y.gather(1, std::get<1>(d.min(2)))).square().mean();
                                   })},
      {"boxes by intersection over union", under(
                                               4, [] { return normal({10, 4}); },
                                               [](const Tensor& o, const Tensor& y) {
                                                 const Tensor a = o.sigmoid(), b = y.sigmoid();
                                                 const auto corner = [](const Tensor& t) { return t.narrow(1, 0, 2); };
                                                 const auto size = [](const Tensor& t) { return t.narrow(1, 2, 2); };
                                                 const Tensor low = torch::maximum(corner(a), corner(b)),
                                                              high = torch::minimum(corner(a) + size(a),
                                                                                    corner(b) + size(b));
                                                 const Tensor both = (high - low).clamp_min(0).prod(1);
                                                 return 1 - (both / (size(a).prod(1) + size(b).prod(1) - both)).mean();
                                               })}};
  for (const auto& [name, make] : all) {
    check_situation(name, make);
  }
}

TEST_CASE("situations: a displacement is proven again where what it moves has another scale", "[situations]") {
  struct Growing {
    const char* name;
    double exponent;  // the weights are of size 10^(step + exponent)
    std::function<Tensor(const Tensor& x, const Tensor& w, const Tensor& moved)> forward;
  };
  const Growing networks[] = {
      {"biases that were zero", -4,
       [](const Tensor& x, const Tensor& w, const Tensor& b) { return torch::relu(x.matmul(w) + b); }},
      {"a layer scale that was tiny", -5,
       [](const Tensor& x, const Tensor& w, const Tensor& s) { return (torch::tanh(x.matmul(w)) * s).exp(); }}};
  const std::pair<microreg::Estimator, double> estimators[] = {{ForwardDifference{}, .05}, {CentralDifference{}, .02}};
  for (const Growing& network : networks) {
    for (const auto& [estimator, bound] : estimators) {
      CAPTURE(network.name, bound);
      torch::manual_seed(5);
      const Tensor moved = torch::zeros({64}).requires_grad_();
      const Tensor w = torch::randn({32, 64}) * .2, o = torch::randn({64, 5}) * .2;
      const Tensor x = torch::randn({64, 32}), y = torch::randint(5, {64});
      const Forward forward = [&](const Tensor& in) { return network.forward(in, w, moved).matmul(o); };
      // On a device the norm of what is displaced is read where one asks.
      microreg::Regularizer regularizer(
          Model{forward, {moved}}, entropy_loss, microreg::GradientNorm{},
          {.micro_batch_size = 64,
           .estimator = estimator,
           .check_finite = test_device().is_cpu() ? microreg::CheckFinite::on_cpu : microreg::CheckFinite::always});
      int right = 0;
      for (int step = 0; step < 5; ++step) {
        CAPTURE(step);
        if (step > 0) {
          const torch::NoGradGuard no_grad;
          moved.copy_(torch::randn({64}) * std::pow(10., step + network.exponent));
        }
        const ByHand hand = by_hand(forward, entropy_loss, {moved}, x, y, 64);
        clear_grad({moved});
        try {
          (void)regularizer.backward(x, y);
          CHECK(relative_error(flat_grad({moved}) - hand.of_loss, hand.of_penalty) < bound);
          ++right;
        } catch (const microreg::DifferenceError&) {
        }
      }
      CHECK(right >= 3);
    }
  }
}

TEST_CASE("situations: a step on parameters that another thread's step moves is refused", "[situations][threads]") {
  torch::manual_seed(6);
  const Tensor w = leaf({6, 8}), o = leaf({8, 5}), other = leaf({6, 5});
  const Tensor x = normal({8, 6}), y = torch::randint(5, {8});
  const Forward plain = [&](const Tensor& in) { return torch::tanh(in.matmul(w)).matmul(o); };
  const auto step = [&](const Forward& forward, const Tensors& weights, const microreg::Estimator& estimator) {
    microreg::Regularizer regularizer(Model{forward, weights}, entropy_loss, microreg::GradientNorm{},
                                      {.micro_batch_size = 8, .estimator = estimator});
    (void)regularizer.backward(x, y);
  };
  /// What the step of another thread says that is taken while one by `estimator` runs.
  const auto meanwhile = [&](const microreg::Estimator& estimator, const std::function<void()>& work) {
    std::string said;
    bool first = true;
    step(
        [&](const Tensor& in) {
          if (std::exchange(first, false)) {
            std::thread([&] {
              try {
                work();
              } catch (const microreg::ModelError& error) {
                said = error.what();
              }
            }).join();
          }
          return plain(in);
        },
        {w, o}, estimator);
    return said;
  };
  const auto before = clones({w, o});
  const auto exact = [&] { step(plain, {w, o}, Exact{}); };
  CHECK(has(meanwhile(ForwardDifference{}, exact), {"another thread", "parameters[0]", "moves the parameters"}));
  CHECK(has(meanwhile(CentralDifference{}, [&] { step(plain, {w, o}, ForwardDifference{}); }), {"another thread"}));
  CHECK(has(meanwhile(Exact{}, [&] { step(plain, {w, o}, ForwardDifference{}); }), {"another thread"}));
  CHECK(has(
      meanwhile(ForwardDifference{},
                [&] { (void)microreg::measure(Model{plain, {w, o}}, entropy_loss, microreg::GradientNorm{}, x, y); }),
      {"another thread"}));
  CHECK(same_bits(w.detach(), before[0]));
  CHECK(same_bits(o.detach(), before[1]));

  const Forward apart = [&](const Tensor& in) { return in.matmul(other); };
  CHECK(meanwhile(ForwardDifference{}, [&] { step(apart, {other}, ForwardDifference{}); }).empty());
  clear_grad({w, o, other});
  CHECK(meanwhile(Exact{}, exact).empty());
  const ByHand hand = by_hand(plain, entropy_loss, {w, o}, x, y, 8);
  CHECK(relative_error(flat_grad({w, o}), 2 * (hand.of_loss + hand.of_penalty)) < 1e-12);
}

TEST_CASE("situations: grafting counts each parameter once, and writes nothing before an error", "[situations]") {
  torch::manual_seed(7);
  const Tensor w = leaf({6, 8}), v = leaf({3});
  w.mutable_grad() = normal({6, 8});
  (void)microreg::graft({w, w}, 2.0);
  CHECK(std::abs(w.grad().norm().item<double>() - 2) < 1e-12);

  const Tensor before = w.grad().clone();
  for (const auto& [grad, word] :
       {std::pair(normal({1}).expand({3}), "expanded"), {normal({3}).to_sparse(), "sparse"}}) {
    v.mutable_grad() = grad;
    CHECK(has(message_of<microreg::ModelError>([&] { (void)microreg::graft({w, v}, 1.0); }), {"parameters[1]", word}));
    CHECK(same_bits(w.grad(), before));
  }

  v.mutable_grad() = torch::full({3}, NAN, torch::kFloat64);
  (void)microreg::graft({w, v}, 1.0);
  CHECK(w.grad().isnan().all().item<bool>());  // not zero, which would look right
}

TEST_CASE("situations: a backward pass that writes by out= has no second derivative, and it is said", "[situations]") {
  torch::manual_seed(8);
  const Tensor w = leaf({4, 2, 3, 3});
  torch::nn::CrossMapLRN2d normalise(3);
  microreg::Regularizer regularizer(
      Model{[&](const Tensor& x) { return normalise(torch::conv2d(x, w)).mean({2, 3}); }, {w}}, entropy_loss,
      microreg::GradientNorm{}, {.micro_batch_size = 4});
  CHECK(has(message_of<microreg::ModelError>(
                [&] { (void)regularizer.backward(normal({4, 2, 6, 6}), torch::randint(4, {4})); }),
            {"second derivative", "out=", "replace this operation"}));
  CHECK_FALSE(w.grad().defined());
}

TEST_CASE("situations: a difference of a scripted model is refused by an error of ours", "[situations]") {
  torch::manual_seed(9);
  torch::jit::Module model("model");
  const Tensor w = leaf({6, 8}), o = leaf({8, 5});
  model.register_parameter("w", w, false);
  model.register_parameter("o", o, false);
  model.define(
      "def forward(self, x):\n"
      "  h = torch.dropout(torch.tanh(torch.matmul(x, self.w)), 0.3, True)\n"
      "  return torch.matmul(h, self.o)\n");
  microreg::Regularizer regularizer(model, entropy_loss, microreg::GradientNorm{},
                                    {.micro_batch_size = 4, .estimator = ForwardDifference{}});
  const Tensor x = normal({8, 6}), y = torch::randint(5, {8});
  for (int call = 0; call < 3; ++call) {  // TorchScript optimises in the second pass of the first call
    (void)message_of<microreg::GateError>([&] { (void)regularizer.backward(x, y); });
  }
  CHECK_FALSE(w.grad().defined());
}
