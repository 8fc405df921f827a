// Exact without surprises: operations whose own second derivative is wrong, hooks, functions of the user's own,
// checkpointing, and gradients that would get lost. Right against textbook double backward, or refused by name.
#include "helpers.hpp"
#include "own_functions.hpp"

#include <torch/csrc/autograd/custom_function.h>
#include <torch/script.h>
#include <microreg/microreg.hpp>

#include <functional>

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
using Forward = std::function<Tensor(const Tensor&)>;

Tensor cross_entropy_of(const Tensor& o, const Tensor& y) { return torch::cross_entropy_loss(o, y); }

/// The gradient of loss + strength * || grad loss ||^2, composed of LibTorch's operations, and the value of the
/// penalty.
std::pair<Tensor, double> textbook(const Tensor& loss, const Tensors& parameters, double strength) {
  const Tensor value = squared_norm_by_hand(loss, parameters);
  const auto gradients = torch::autograd::grad({loss + strength * value}, parameters, {}, false, false, true);
  return {flattened(gradients, parameters), value.item<double>()};
}

/// `.grad` of one step, and the reported value of the penalty.
std::pair<Tensor, double> stepped(const Forward& forward, const Tensors& parameters, const Tensor& x, const Tensor& y,
                                  double strength, microreg::Estimator estimator = Exact{}) {
  clear_grad(parameters);
  Regularizer r(FunctionModel{forward, parameters}, cross_entropy_of, GradientNorm{},
                {.strength = strength, .estimator = estimator});
  const auto report = r.backward(x, y);
  const Tensor flat = flat_grad(parameters);
  clear_grad(parameters);
  return {flat, report.penalties[0].value.item<double>()};
}

/// The message of the ModelError that a step throws, after which no `.grad` is there.
std::string refused(const Forward& forward, const Tensors& parameters, const Tensor& x, const Tensor& y,
                    microreg::RegularizerOptions options = {}) {
  clear_grad(parameters);
  Regularizer r(FunctionModel{forward, parameters}, cross_entropy_of, GradientNorm{}, std::move(options));
  const std::string message = message_of<ModelError>([&] { (void)r.backward(x, y); });
  for (const Tensor& parameter : parameters) {
    CHECK_FALSE(parameter.grad().defined());
  }
  return message;
}

Tensor normal(at::IntArrayRef shape) { return torch::randn(shape, torch::kFloat64); }
Tensor leaf(at::IntArrayRef shape) { return normal(shape).mul_(0.5).requires_grad_(true); }

/// A scope without a Regularizer: a penalty composed by hand inside it.
Tensor functor_gradient(const Tensor& loss, const Tensors& parameters) {
  clear_grad(parameters);
  GradientNorm{}(loss, parameters).backward();
  const Tensor result = flat_grad(parameters);
  clear_grad(parameters);
  return result;
}

}  // namespace

namespace {

/// On CUDA the norms that LibTorch's weight normalisation computes are of float32 in float64 too.
bool has_coarse_norms() { return !test_device().is_cpu() && !has_stand_in_gpu(); }
double norm_bound() { return has_coarse_norms() ? 1e-7 : 1e-13; }

}  // namespace

TEST_CASE("weight normalisation of LibTorch's own", "[exact]") {
  torch::manual_seed(1);
  const Tensor x = normal({8, 6}), y = torch::randint(3, {8});
  for (const std::int64_t dim : {0, 1}) {
    const Tensor v = leaf({8, 6});
    const Tensor g = (torch::rand(dim == 0 ? at::IntArrayRef{8, 1} : at::IntArrayRef{1, 6}, torch::kFloat64) + 0.5)
                         .requires_grad_(true);
    const auto head = [&](const Tensor& w, const Tensor& in) { return torch::tanh(in.matmul(w.t())).narrow(1, 0, 3); };
    const Forward fused = [&](const Tensor& in) { return head(at::_weight_norm(v, g, dim), in); };
    const Forward by_hand = [&](const Tensor& in) { return head(g * v / v.norm(2, {1 - dim}, true), in); };
    const auto expected = textbook(cross_entropy_of(by_hand(x), y), {v, g}, 1.0);
    const auto found = stepped(fused, {v, g}, x, y, 1.0);
    CHECK(relative_error(found.first, expected.first) < norm_bound());
    CHECK(found.second == Approx(expected.second).epsilon(10 * norm_bound()));
    // Outside of a scope LibTorch's second derivative holds the norms constant: refused.
    CHECK(has(refused(fused, {v, g}, x, y, {.fused = false}), {"_weight_norm", "FusedScope"}));
    CHECK(has(message_of<ModelError>([&] { (void)GradientNorm{}(cross_entropy_of(fused(x), y), {v, g}); }),
              {"_weight_norm", "FusedScope"}));
    const microreg::FusedScope scope;
    const Tensor functor = functor_gradient(cross_entropy_of(fused(x), y), {v, g});
    const Tensor reference = functor_gradient(cross_entropy_of(by_hand(x), y), {v, g});
    CHECK(relative_error(functor, reference) < norm_bound());
  }
}

TEST_CASE("weight normalisation in a scripted module", "[exact]") {
  torch::manual_seed(2);
  torch::jit::Module scripted("m");
  const Tensor v = leaf({3, 6}), g = (torch::rand({3, 1}, torch::kFloat64) + 0.5).requires_grad_(true);
  scripted.register_parameter("v", v, false);
  scripted.register_parameter("g", g, false);
  scripted.define(
      "def forward(self, x):\n  return torch.matmul(x, torch._weight_norm(self.v, self.g, 0).t()).tanh()\n");
  const Tensor x = normal({8, 6}), y = torch::randint(3, {8});
  const Tensor by_hand = torch::tanh(x.matmul((g * v / v.norm(2, {1}, true)).t()));
  const auto expected = textbook(cross_entropy_of(by_hand, y), {v, g}, 0.5);
  Regularizer r(scripted, cross_entropy_of, GradientNorm{}, {.strength = 0.5});
  for (int i = 0; i < 3; ++i) {  // the executor profiles, then optimises
    clear_grad({v, g});
    (void)r.backward(x, y);
    CHECK(relative_error(flat_grad({v, g}), expected.first) < norm_bound());
  }
}

TEST_CASE("normalisations whose formulas read saved statistics", "[exact]") {
  torch::manual_seed(3);
  const Tensor x = normal({8, 6}), y = torch::randint(3, {8});
  const Tensor w = leaf({8, 6}), gamma = leaf({8}), beta = leaf({8}), out = leaf({3, 8});
  const auto check = [&](const char* name, const Forward& normalise, const Forward& by_hand) {
    INFO(name);
    const auto net = [&](const Forward& f) {
      return Forward([&, f](const Tensor& in) { return torch::tanh(f(in.matmul(w.t()))).matmul(out.t()); });
    };
    const auto expected = textbook(cross_entropy_of(net(by_hand)(x), y), {w, gamma, beta, out}, 1.0);
    CHECK(relative_error(stepped(net(normalise), {w, gamma, beta, out}, x, y, 1.0).first, expected.first) < 1e-12);
    const auto stock = textbook(cross_entropy_of(net(normalise)(x), y), {w, gamma, beta, out}, 1.0);
    CHECK(relative_error(stock.first, expected.first) < 1e-12);  // outside of a scope
  };
  const auto standardise = [](const Tensor& h, at::IntArrayRef dims) {
    return (h - h.mean(dims, true)) / (h.var(dims, false, true) + 1e-5).sqrt();
  };
  check(
      "layer_norm", [&](const Tensor& h) { return at::layer_norm(h, {8}, gamma, beta); },
      [&](const Tensor& h) { return standardise(h, {1}) * gamma + beta; });
  check(
      "batch_norm", [&](const Tensor& h) { return at::batch_norm(h, gamma, beta, {}, {}, true, 0.1, 1e-5, false); },
      [&](const Tensor& h) { return standardise(h, {0}) * gamma + beta; });
  check(
      "group_norm", [&](const Tensor& h) { return at::group_norm(h, 2, gamma, beta); },
      [&](const Tensor& h) { return standardise(h.view({-1, 2, 4}), {2}).view({-1, 8}) * gamma + beta; });
  check(
      "rms_norm", [&](const Tensor& h) { return at::rms_norm(h, {8}, gamma, 1e-5) + beta; },
      [&](const Tensor& h) { return h * (h.square().mean({1}, true) + 1e-5).rsqrt() * gamma + beta; });
  check(
      "normalize", [&](const Tensor& h) { return at::renorm(h, 2, 0, 1.0) * gamma + beta; },
      [&](const Tensor& h) {
        const Tensor norm = h.norm(2, {1}, true);
        return torch::where(norm > 1, h / (norm + 1e-7), h) * gamma + beta;
      });
}

TEST_CASE("operations that save what they computed, against a difference of first derivatives", "[exact]") {
  torch::manual_seed(11);
  const Tensor w = leaf({5, 5});
  const auto check = [&](const char* name, const Forward& operation) {
    INFO(name);
    const auto loss = [&] {
      const Tensor matrix = torch::tanh(w) + 2 * torch::eye(5, torch::kFloat64);
      const Tensor o = operation(matrix);
      const Tensor ramp = torch::linspace(0.5, 1.5, o.numel(), torch::kFloat64).view_as(o);
      return (torch::tanh(0.3 * o) * ramp).sum();
    };
    const auto gradient = [&] { return torch::autograd::grad({loss()}, {w})[0]; };
    const Tensor g = gradient();
    const auto moved = [&](double by) {
      const torch::NoGradGuard no_grad;
      Tensor(w).add_(g, by);
    };
    moved(1e-5);
    const Tensor above = gradient();
    moved(-2e-5);
    const Tensor below = gradient();
    moved(1e-5);
    const Tensor expected = (above - below) / 1e-5;  // 2 H g
    const microreg::FusedScope scope;
    CHECK(relative_error(functor_gradient(loss(), {w}).view_as(w), expected) < 1e-5);
  };
  const Tensor fixed = normal({5, 5}), index = helpers::tensor({0, 1, 0, 2, 1});
  check("det", [](const Tensor& m) { return at::linalg_det(m / 2); });
  check("slogdet", [](const Tensor& m) { return std::get<1>(at::linalg_slogdet(m)); });
  check("inverse", [](const Tensor& m) { return at::linalg_inv(m); });
  check("solve", [&](const Tensor& m) { return at::linalg_solve(m, fixed); });
  check("cholesky", [](const Tensor& m) { return at::linalg_cholesky(m.matmul(m.t())); });
  check("eigvalsh", [](const Tensor& m) { return at::linalg_eigvalsh(m.matmul(m.t())); });
  check("svdvals", [](const Tensor& m) { return at::linalg_svdvals(m); });
  check("qr", [](const Tensor& m) { return std::get<1>(at::linalg_qr(m)); });
  check("pinv", [](const Tensor& m) { return at::linalg_pinv(m); });
  check("matrix_exp", [](const Tensor& m) { return at::matrix_exp(m / 3); });
  check("prod", [](const Tensor& m) { return m.prod(1); });
  check("cumprod", [](const Tensor& m) { return m.cumprod(1); });
  check("logcumsumexp", [](const Tensor& m) { return m.logcumsumexp(1); });
  check("logsumexp", [](const Tensor& m) { return m.logsumexp(1); });
  check("std", [](const Tensor& m) { return m.std(1); });
  check("var_mean", [](const Tensor& m) { return std::get<0>(at::var_mean(m, 1)) * std::get<1>(at::var_mean(m, 1)); });
  check("norm", [](const Tensor& m) { return m.norm(3, {1}); });
  check("cosine_similarity", [&](const Tensor& m) { return at::cosine_similarity(m, fixed); });
  check("pairwise_distance", [&](const Tensor& m) { return at::pairwise_distance(m, fixed); });
  check("renorm", [](const Tensor& m) { return at::renorm(m, 2, 0, 0.5); });
  check("softmax", [](const Tensor& m) { return m.softmax(1); });
  check("log_sigmoid", [](const Tensor& m) { return at::log_sigmoid(m); });
  check("glu", [](const Tensor& m) { return at::glu(at::cat({m, m.t()}, 1), 1); });
  check("mish", [](const Tensor& m) { return at::mish(m); });
  check("instance_norm",
        [](const Tensor& m) { return at::instance_norm(m.unsqueeze(0), {}, {}, {}, {}, true, 0.1, 1e-5, false); });
  check("local response norm",
        [](const Tensor& m) { return torch::nn::functional::local_response_norm(m.view({1, 5, 5}), 3); });
  if (!has_coarse_norms()) {
    check("weight_norm", [](const Tensor& m) { return at::_weight_norm(m, m.narrow(1, 0, 1), 0); });
  }
  check("scatter_reduce mean",
        [&](const Tensor& m) { return at::zeros_like(m[0]).scatter_reduce(0, index, m[0], "mean"); });
  check("index_add", [&](const Tensor& m) { return m.index_add(0, index, m * m); });
  check("bilinear", [&](const Tensor& m) { return at::bilinear(m, m, fixed.view({1, 5, 5}), {}); });
  check("interpolate", [](const Tensor& m) { return at::upsample_bicubic2d(m.view({1, 1, 5, 5}), {7, 7}, false); });
  check("fft", [](const Tensor& m) { return at::fft_rfft(m).abs(); });
  check("embedding_renorm-free bag", [&](const Tensor& m) { return at::embedding(m, index).mean(0); });
  check("cdist", [&](const Tensor& m) { return (m.unsqueeze(1) - fixed).square().sum(-1).sqrt(); });
  check("lstm cell", [&](const Tensor& m) {
    const Tensor gates = at::cat({m, m, m, m}, 0);
    return std::get<0>(at::lstm_cell(fixed, {fixed.t(), fixed}, gates, gates));
  });
  check("gru cell", [&](const Tensor& m) {
    const Tensor gates = at::cat({m, m, m}, 0);
    return at::gru_cell(fixed, fixed.t(), gates, gates);
  });
}

TEST_CASE("a loss that differentiates itself over a normalisation", "[exact]") {
  torch::manual_seed(4);
  const Tensor w = leaf({8, 6}), out = leaf({1, 8}), gamma = leaf({8}), beta = leaf({8});
  const Tensors parameters{w, out, gamma, beta};
  const Tensor x = normal({8, 6});
  const auto loss_of = [&](bool batch) {
    const Tensor input = x.detach().requires_grad_(true);
    const Tensor h = torch::tanh(input.matmul(w.t()));
    const Tensor n =
        batch ? at::batch_norm(h, gamma, beta, {}, {}, true, 0.1, 1e-5, false) : at::layer_norm(h, {8}, gamma, beta);
    const Tensor o = torch::tanh(n).matmul(out.t());
    const Tensor slope = torch::autograd::grad({o.sum()}, {input}, {}, true, true)[0];
    return (o - 1).square().mean() + (slope.norm(2, 1) - 1).square().mean();
  };
  for (const bool batch : {false, true}) {
    // Outside of a scope: refused when the penalty is made, whatever the form.
    const std::string expected = "microreg::FusedScope";
    CHECK(has(message_of<ModelError>([&] { (void)GradientNorm{}(loss_of(batch), parameters); }),
              {"normalisation", expected.c_str()}));
    microreg::Penalised penalised(parameters, GradientNorm{});
    clear_grad(parameters);
    CHECK(has(message_of<ModelError>([&] { (void)penalised.backward(loss_of(batch)); }), {"normalisation"}));
    CHECK_FALSE(w.grad().defined());
    // Inside: right, against a central difference of plain gradients.
    const auto plain = [&] {
      Tensors flat;
      for (const Tensor& g : torch::autograd::grad({loss_of(batch)}, parameters)) {
        flat.push_back(g.flatten());
      }
      return torch::cat(flat);
    };
    const Tensor g = plain();
    const auto moved = [&](double by) {
      const torch::NoGradGuard no_grad;
      std::int64_t begin = 0;
      for (const Tensor& parameter : parameters) {
        Tensor(parameter).add_(g.narrow(0, begin, parameter.numel()).view_as(parameter), by);
        begin += parameter.numel();
      }
    };
    moved(1e-6);
    const Tensor above = plain();
    moved(-2e-6);
    const Tensor below = plain();
    moved(1e-6);
    clear_grad(parameters);
    (void)penalised.backward([&] { return loss_of(batch); });  // a closure runs inside the scope
    CHECK(relative_error(flat_grad(parameters) - plain().cpu(), (above - below) / 1e-6) < 1e-6);
    clear_grad(parameters);
  }
}

TEST_CASE("a hook sees the gradient itself", "[exact]") {
  torch::manual_seed(5);
  const Tensor w = leaf({16, 5}), out = leaf({3, 16});
  const Tensor x = normal({8, 5}), y = torch::randint(3, {8});
  const Forward clipped = [&](const Tensor& in) {
    const Tensor h = torch::tanh(in.matmul(w.t()));
    h.register_hook([](const Tensor& g) { return g.clamp(-1e-2, 1e-2); });
    return h.matmul(out.t());
  };
  const double value = textbook(cross_entropy_of(clipped(x), y), {w, out}, 1.0).second;
  for (const double strength : {0.0, 1e-4, 0.01, 1.0, 100.0}) {
    INFO(strength);
    const auto expected = textbook(cross_entropy_of(clipped(x), y), {w, out}, strength);
    const auto found = stepped(clipped, {w, out}, x, y, strength);
    CHECK(found.second == Approx(value).epsilon(1e-12));
    CHECK(relative_error(found.first, expected.first) < 1e-12);
  }
  const ForwardDifference unchecked{.check_every = 0, .own_functions = microreg::OwnFunctions::smooth};
  CHECK(stepped(clipped, {w, out}, x, y, 1.0, unchecked).second == Approx(value).epsilon(1e-12));
  const auto measured = microreg::measure(FunctionModel{clipped, {w, out}}, cross_entropy_of, GradientNorm{}, x, y);
  CHECK(measured.penalties[0].value.item<double>() == Approx(value).epsilon(1e-12));
}

TEST_CASE("what holds a gradient is not scaled behind its back", "[exact]") {
  torch::manual_seed(6);
  const Tensor w = leaf({16, 5}), out = leaf({3, 16});
  const Tensor x = normal({8, 5}), y = torch::randint(3, {8});
  Tensor kept;
  w.register_hook([&](const Tensor& g) { kept = kept.defined() ? kept : g; });
  const Forward net = [&](const Tensor& in) { return torch::tanh(in.matmul(w.t())).matmul(out.t()); };
  const Tensor g = torch::autograd::grad({cross_entropy_of(net(x), y)}, {w})[0].clone();
  kept = Tensor();
  const auto found = stepped(net, {w, out}, x, y, 0.7);
  REQUIRE(kept.defined());
  CHECK(relative_error(kept, g) < 1e-14);
  const auto expected = textbook(cross_entropy_of(net(x), y), {w, out}, 0.7);
  CHECK(relative_error(found.first, expected.first) < 1e-13);
  // One tensor as the gradient of two parameters.
  const Tensor a = leaf({3}), b = leaf({3});
  const Forward shared = [&](const Tensor& in) { return torch::tanh(in.narrow(1, 0, 3) + (a + b)); };
  const auto twice = textbook(cross_entropy_of(shared(x), y), {a, b}, 0.7);
  CHECK(relative_error(stepped(shared, {a, b}, x, y, 0.7).first, twice.first) < 1e-13);
}

namespace {

/// sin(x w)^2, mean, with a backward that makes new tensors without a graph.
struct LossWithoutGraph : torch::autograd::Function<LossWithoutGraph> {
  static Tensor forward(torch::autograd::AutogradContext* context, const Tensor& x, const Tensor& w) {
    context->save_for_backward({x, w});
    return (x * w).sin().square().mean();
  }
  static Tensors backward(torch::autograd::AutogradContext* context, const Tensors& upstream) {
    const torch::NoGradGuard no_grad;
    const auto saved = context->get_saved_variables();
    const Tensor z = saved[0] * saved[1];
    const Tensor by_w = upstream[0] * (2 * z.sin() * z.cos() * saved[0]).mean();
    return {Tensor(), by_w.expand_as(saved[1])};
  }
};

/// An activation whose backward computes outside of the graph.
struct SineWithoutGraph : torch::autograd::Function<SineWithoutGraph> {
  static Tensor forward(torch::autograd::AutogradContext* context, const Tensor& x) {
    context->save_for_backward({x});
    return x.sin();
  }
  static Tensors backward(torch::autograd::AutogradContext* context, const Tensors& upstream) {
    return {upstream[0].detach() * context->get_saved_variables()[0].cos().detach()};
  }
};

}  // namespace

TEST_CASE("a function whose backward has no graph", "[exact]") {
  torch::manual_seed(7);
  const Tensor x = normal({8, 4}), y = torch::randint(3, {8});
  const Tensor w = torch::full({1}, 0.7, torch::kFloat64).requires_grad_(true);
  const auto mean = [](const Tensor& o, const Tensor&) { return o.mean(); };
  SECTION("the whole loss") {
    FunctionModel model{[&](const Tensor& in) { return LossWithoutGraph::apply(in, w).expand({in.size(0)}); }, {w}};
    Regularizer r(model, mean, GradientNorm{});
    CHECK(has(message_of<ModelError>([&] { (void)r.backward(x, y); }), {"LossWithoutGraph", "graph", "second"}));
    CHECK_FALSE(w.grad().defined());
    CHECK(has(message_of<ModelError>([&] { (void)GradientNorm{}(LossWithoutGraph::apply(x, w), {w}); }),
              {"LossWithoutGraph"}));
    // Nothing is differentiated twice: fine.
    Regularizer(model, mean, GradientNorm{}, {.strength = 0}).backward(x, y);
    CHECK(w.grad().defined());
  }
  SECTION("a part in the middle") {
    const Tensor v = leaf({4, 4}), out = leaf({4, 3});
    const Forward net = [&](const Tensor& in) { return SineWithoutGraph::apply(in.matmul(v)).matmul(out); };
    CHECK(has(refused(net, {v, out}, x, y), {"SineWithoutGraph"}));
  }
  SECTION("linear functions and linear models stay silent") {
    const Tensor v = leaf({4, 3});
    const Forward net = [&](const Tensor& in) { return Reversal::apply(in.matmul(v)); };
    const auto expected = textbook(cross_entropy_of(net(x), y), {v}, 1.0);
    CHECK(relative_error(stepped(net, {v}, x, y, 1.0).first, expected.first) < 1e-13);
    Regularizer r(FunctionModel{net, {v}}, mean, GradientNorm{});  // all linear, also the loss
    CHECK_NOTHROW(r.backward(x, y));
    Regularizer plain(FunctionModel{[&](const Tensor& in) { return in.matmul(v); }, {v}}, mean, GradientNorm{});
    CHECK_NOTHROW(plain.backward(x, y));
  }
}

namespace {

/// Recomputation as people write it: the backward pass runs one of its own.
struct Checkpoint : torch::autograd::Function<Checkpoint> {
  static Tensor forward(torch::autograd::AutogradContext* context, const Tensor& x, const Forward* segment) {
    context->save_for_backward({x});
    context->saved_data["segment"] = reinterpret_cast<std::int64_t>(segment);
    const torch::NoGradGuard no_grad;
    return (*segment)(x);
  }
  static Tensors backward(torch::autograd::AutogradContext* context, const Tensors& upstream) {
    const auto* segment = reinterpret_cast<const Forward*>(context->saved_data["segment"].toInt());
    const Tensor x = context->get_saved_variables()[0].detach().requires_grad_(true);
    const torch::AutoGradMode enable(true);
    torch::autograd::backward({(*segment)(x)}, {upstream[0].detach()});
    return {x.grad(), Tensor()};
  }
};

}  // namespace

TEST_CASE("checkpointing that writes into .grad behind our back", "[exact]") {
  torch::manual_seed(8);
  const Tensor a = leaf({8, 5}), s = leaf({8, 8}), b = leaf({3, 8});
  const Forward segment = [&](const Tensor& h) { return torch::tanh(h.matmul(s.t())); };
  const Forward net = [&](const Tensor& in) {
    return Checkpoint::apply(torch::tanh(in.matmul(a.t())), &segment).matmul(b.t());
  };
  const Tensor x = normal({8, 5}), y = torch::randint(3, {8});
  for (const microreg::Estimator& estimator :
       {microreg::Estimator(Exact{}),
        microreg::Estimator(ForwardDifference{.own_functions = microreg::OwnFunctions::smooth})}) {
    for (const double strength : {0.0, 1.0}) {
      CHECK(has(refused(net, {a, s, b}, x, y, {.strength = strength, .estimator = estimator}),
                {".grad", "parameters[1]", "checkpoint"}));
    }
  }
  CHECK(has(message_of<ModelError>([&] {
              (void)microreg::measure(FunctionModel{net, {a, s, b}}, cross_entropy_of, GradientNorm{}, x, y);
            }),
            {".grad"}));
  CHECK_FALSE(s.grad().defined());
  // What the scope watched is as usual afterwards.
  cross_entropy_of(net(x), y).backward();
  CHECK(s.grad().defined());
}

TEST_CASE("an activation in place with a negative slope", "[exact]") {
  const auto gradient = [] {
    const Tensor x = torch::tensor({-1., 2.}, torch::kFloat64).requires_grad_(true);
    Tensor copy = x * 1;
    torch::leaky_relu_(copy, -0.5);
    return torch::autograd::grad({copy.sum()}, {x}, {}, true, true)[0];
  };
  CHECK_THROWS(gradient());
  const microreg::FusedScope scope;
  CHECK_THROWS(gradient());
}

TEST_CASE("an empty function as strength", "[exact]") {
  const std::function<double(std::int64_t)> none;
  CHECK(has(message_of<microreg::OptionError>([&] { microreg::Strength strength(none); }), {"strength", "empty"}));
  double (*const null)(std::int64_t) = nullptr;
  CHECK(has(message_of<microreg::OptionError>([&] { microreg::Strength strength(null); }), {"strength", "empty"}));
}

TEST_CASE("parameters that are no leaves", "[exact]") {
  const Tensor w = leaf({4, 3});
  const Tensor v = w * 2;
  CHECK(has(refused([&](const Tensor& in) { return in.matmul(v); }, {v}, normal({8, 4}), torch::randint(3, {8})),
            {"parameters[0]", "leaf", "computed"}));
}

TEST_CASE("two penalties of one name", "[exact]") {
  const Tensor w = leaf({4, 3});
  Regularizer r(FunctionModel{[&](const Tensor& in) { return in.matmul(w); }, {w}}, cross_entropy_of,
                0.1 * GradientNorm{} + 0.2 * GradientNorm{});
  const auto report = r.backward(normal({8, 4}), torch::randint(3, {8}));
  CHECK(report.penalties[0].name == "gradient_norm");
  CHECK(report.penalties[1].name == "gradient_norm#2");
  CHECK(report.penalty("gradient_norm#2").strength == 0.2);
}

TEST_CASE("gradients that would leave the parameters", "[exact]") {
  torch::manual_seed(9);
  torch::nn::Linear model(6, 2), encoder(4, 6);
  model->to(torch::kFloat64);
  encoder->to(torch::kFloat64);
  const Tensor x = normal({8, 6}), y = normal({8, 2});
  const Tensor scale = torch::zeros({2}, torch::kFloat64).requires_grad_(true);
  const auto own_scale = [&](const Tensor& o, const Tensor& t) {
    return ((-scale).exp() * (o - t).square().mean(0) + scale).sum();
  };
  const auto mse = [](const Tensor& o, const Tensor& t) { return torch::mse_loss(o, t); };
  const auto fails = [&](const auto& loss, const Tensor& input) {
    Regularizer r(model, loss, GradientNorm{});
    const std::string message = message_of<ModelError>([&] { (void)r.backward(input, y); });
    CHECK_FALSE(model->weight.grad().defined());
    return message;
  };
  CHECK(has(fails(own_scale, x), {"[2]", "no parameter", "also_train", "detach"}));
  CHECK(has(fails(mse, encoder->forward(normal({8, 4}))), {"no parameter", "also_train"}));
  // An input that the user differentiates by is no parameter.
  Regularizer r(model, mse, GradientNorm{});
  CHECK_NOTHROW(r.backward(x.clone().requires_grad_(true), y));
}
