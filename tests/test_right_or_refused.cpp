// Inputs of the kinds that went wrong in silence once, each by every estimator: right against double backward by hand,
// or refused by an error of ours, and nothing moved. Which of both is said where it matters.
#include "helpers.hpp"

#include <torch/csrc/autograd/custom_function.h>
#include <torch/script.h>
#include <microreg/microreg.hpp>

#include <cmath>
#include <cstdlib>
#include <functional>
#include <random>
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
/// A model in its first state: what it keeps between calls is new.
using MakeModel = std::function<Model()>;

Tensor entropy_loss(const Tensor& o, const Tensor& y) { return torch::cross_entropy_loss(o, y); }
Tensor square_loss(const Tensor& o, const Tensor& y) { return (o - y).square().mean(); }
Tensor random_leaf(at::IntArrayRef shape, double scale = 0.5, torch::ScalarType type = torch::kFloat64) {
  return (torch::randn(shape, torch::kFloat64) * scale).to(type).requires_grad_();
}

/// grad_w of || grad_w loss ||^2, composed of LibTorch's operations.
Tensor written_by_hand(const MakeModel& make, const Loss& loss, const Tensor& x, const Tensor& y) {
  const Model model = make();
  torch::manual_seed(11);
  return penalty_by_hand(loss(model.function(x.clone()), y.clone()), model.parameters);
}

/// The penalty's part of .grad by one estimator.
Tensor part_of(const MakeModel& make, const Loss& loss, const Tensor& x, const Tensor& y,
               const microreg::Estimator& estimator, bool fused) {
  Tensor parts[2];
  for (const int strength : {0, 1}) {
    const Model model = make();
    clear_grad(model.parameters);
    torch::manual_seed(11);
    microreg::Regularizer r(
        model, loss, microreg::GradientNorm{},
        {.strength = double(strength), .micro_batch_size = 1000, .estimator = estimator, .fused = fused});
    try {
      (void)r.backward(x.clone(), y.clone());
    } catch (...) {
      clear_grad(model.parameters);
      throw;
    }
    parts[strength] = flat_grad(model.parameters);
    clear_grad(model.parameters);
  }
  return parts[1] - parts[0];
}

enum Which { exactly = 1, differences = 2, all = 3 };
struct Bounds {
  double exact = 1e-9;
  double difference = 1e-4;
};

/// Right or refused, by each estimator; the estimators in `right` are right, those in `refused` refused, with these
/// words.
void check_right_or_refused(const char* name, const MakeModel& make, const Loss& loss, const Tensor& x, const Tensor& y,
                            int right = 0, int refused = 0, std::initializer_list<const char*> words = {},
                            Bounds bounds = {}) {
  INFO(name);
  const Tensor expected = written_by_hand(make, loss, x, y);
  const struct {
    const char* name;
    microreg::Estimator estimator;
    bool fused;
    Which which;
  } ways[] = {{"exact", Exact{}, true, exactly},
              {"exact, unfused", Exact{}, false, exactly},
              {"forward", ForwardDifference{}, true, differences},
              {"central", CentralDifference{}, true, differences}};
  for (const auto& way : ways) {
    INFO(way.name);
    Tensors before;
    for (const Tensor& parameter : make().parameters) {
      before.push_back(parameter.detach().clone());
    }
    double error = -1;
    std::string message;
    try {
      error = relative_error(part_of(make, loss, x, y, way.estimator, way.fused), expected);
    } catch (const microreg::Error& e) {
      message = e.what();
    } catch (const std::exception& e) {
      message = e.what();
      FAIL_CHECK("not an error of ours: " << message.substr(0, 300));
    }
    if (std::getenv("SAY") != nullptr) {
      std::printf("%-40s %-15s %10.2g %s\n", name, way.name, error, message.substr(0, 400).c_str());
    }
    INFO(message);
    const double bound = way.which == exactly ? bounds.exact : bounds.difference;
    CHECK((!message.empty() || error <= bound));
    if ((right & way.which) != 0) {
      CHECK(message.empty());
    }
    if ((refused & way.which) != 0) {
      CHECK_FALSE(message.empty());
      CHECK(has(message, words));
    }
    const Tensors after = make().parameters;
    for (std::size_t i = 0; i < after.size(); ++i) {
      CHECK(same_bits(after[i].detach(), before[i]));
    }
  }
}

/// 6-16-5, float64.
struct Net {
  Tensor a = random_leaf({6, 16}), b = random_leaf({16, 5}), x = torch::randn({12, 6}, torch::kFloat64),
         y = torch::randint(5, {12});
  [[nodiscard]] Tensors weights() const { return {a, b}; }
  [[nodiscard]] MakeModel with(const Forward& forward) const {
    return [*this, forward] { return Model{forward, weights()}; };
  }
  [[nodiscard]] Tensor hidden(const Tensor& in) const { return torch::tanh(in.matmul(a)); }
};

/// Recomputation that is differentiable, as people write it.
struct Recompute : torch::autograd::Function<Recompute> {
  static Tensor forward(torch::autograd::AutogradContext* context, const Tensor& x, const Tensor& w,
                        const std::function<Tensor(const Tensor&, const Tensor&)>* segment) {
    context->save_for_backward({x, w});
    context->saved_data["segment"] = reinterpret_cast<std::int64_t>(segment);
    const torch::NoGradGuard no_grad;
    return (*segment)(x, w);
  }
  static Tensors backward(torch::autograd::AutogradContext* context, const Tensors& upstream) {
    const auto* segment = reinterpret_cast<const std::function<Tensor(const Tensor&, const Tensor&)>*>(
        context->saved_data["segment"].toInt());
    const auto saved = context->get_saved_variables();
    const bool twice = at::GradMode::is_enabled();
    const torch::AutoGradMode enable(true);
    const Tensor x = twice && saved[0].requires_grad() ? saved[0] : saved[0].detach().requires_grad_(true);
    const Tensor w = twice ? saved[1] : saved[1].detach().requires_grad_(true);
    auto result = torch::autograd::grad({(*segment)(x, w)}, {x, w}, {upstream[0]}, twice, twice);
    result.emplace_back();
    return result;
  }
};

}  // namespace

TEST_CASE("right or refused: state between passes", "[right_or_refused]") {
  torch::manual_seed(2);
  const Net n;
  const auto stateful = [&](const std::function<Forward()>& fresh) -> MakeModel {
    return [&n, fresh] { return Model{fresh(), n.weights()}; };
  };
  check_right_or_refused("a weight scale cached on the first call", stateful([&] {
                           return [&n, cached = Tensor()](const Tensor& x) mutable {
                             if (!cached.defined()) {
                               const torch::NoGradGuard no_grad;
                               cached = n.a.std();
                             }
                             return torch::tanh(x.matmul(n.a / cached)).matmul(n.b);
                           };
                         }),
                         entropy_loss, n.x, n.y);
  check_right_or_refused("standardised weights cached every second call", stateful([&] {
                           return [&n, cached = Tensor(), calls = 0](const Tensor& x) mutable {
                             if (calls++ % 2 == 0) {
                               cached = ((n.a - n.a.mean(0)) / n.a.std(0)).detach();
                             }
                             return torch::tanh(x.matmul(cached) + x.matmul(n.a)).matmul(n.b);
                           };
                         }),
                         entropy_loss, n.x, n.y);
  check_right_or_refused("a slow drift of a temperature", stateful([&] {
                           return [&n, calls = 0](const Tensor& x) mutable {
                             return n.hidden(x).matmul(n.b) * (1 + 1e-3 * calls++);
                           };
                         }),
                         entropy_loss, n.x, n.y, exactly);
  check_right_or_refused("noise of std::mt19937", stateful([&] {
                           return [&n, engine = std::mt19937(3)](const Tensor& x) mutable {
                             Tensor noise = torch::empty({16}, torch::kFloat64);
                             for (int i = 0; i < 16; ++i) {
                               noise[i] = std::normal_distribution<double>(0, 0.01)(engine);
                             }
                             return (n.hidden(x) + noise).matmul(n.b);
                           };
                         }),
                         entropy_loss, n.x, n.y, exactly, differences);
  check_right_or_refused("stochastic depth by std::mt19937", stateful([&] {
                           return [&n, engine = std::mt19937(3)](const Tensor& x) mutable {
                             const Tensor h = n.hidden(x);
                             return (engine() % 2 == 0 ? torch::relu(h) : h).matmul(n.b);
                           };
                         }),
                         entropy_loss, n.x, n.y, exactly, differences);
  check_right_or_refused("stochastic depth by torch::rand", stateful([&] {
                           return [&n](const Tensor& x) {
                             const Tensor h = n.hidden(x);
                             return (torch::rand({1}).item<float>() < 0.5F ? torch::relu(h) : h).matmul(n.b);
                           };
                         }),
                         entropy_loss, n.x, n.y, all);
  const auto buffered = [&](const std::function<Forward(Tensor&)>& fresh) -> MakeModel {
    return [&n, fresh] {
      auto buffer = std::make_shared<Tensor>(torch::zeros({5}, torch::kFloat64));
      const Forward forward = fresh(*buffer);
      return Model{[forward, buffer](const Tensor& x) { return forward(x); }, n.weights(), {*buffer}};
    };
  };
  check_right_or_refused("an average that is moved into a buffer", buffered([&](Tensor& buffer) {
                           return [&n, &buffer](const Tensor& x) {
                             const Tensor o = n.hidden(x).matmul(n.b);
                             Tensor next = 0.9 * buffer + 0.1 * o.detach().mean(0);
                             buffer = std::move(next);
                             return o / (1 + buffer.square());
                           };
                         }),
                         entropy_loss, n.x, n.y, exactly);
  check_right_or_refused("an average that is written to a buffer", buffered([&](Tensor& buffer) {
                           return [&n, &buffer](const Tensor& x) {
                             const Tensor o = n.hidden(x).matmul(n.b);
                             buffer.mul_(0.9).add_(o.detach().mean(0), 0.1);
                             return o / (1 + buffer.square());
                           };
                         }),
                         entropy_loss, n.x, n.y, exactly);
  check_right_or_refused("an average with a graph", buffered([&](Tensor& buffer) {
                           return [&n, &buffer](const Tensor& x) {
                             const Tensor o = n.hidden(x).matmul(n.b);
                             buffer = 0.9 * buffer + 0.1 * o.mean(0);
                             return o / (1 + buffer.square());
                           };
                         }),
                         entropy_loss, n.x, n.y, exactly);
}

TEST_CASE("right or refused: values without a graph", "[right_or_refused]") {
  torch::manual_seed(3);
  const Net n;
  const Tensor target = torch::randn({12, 5}, torch::kFloat64);
  check_right_or_refused("a teacher of the same weights, no_grad", n.with([&](const Tensor& x) {
    Tensor teacher;
    {
      const torch::NoGradGuard no_grad;
      teacher = torch::relu(n.hidden(x) - 0.1).matmul(n.b);
    }
    return n.hidden(x).matmul(n.b) * torch::sigmoid(teacher);
  }),
                         entropy_loss, n.x, n.y, exactly);
  check_right_or_refused("values read by pointer", n.with([&](const Tensor& x) {
    const Tensor h = n.hidden(x), on_host = h.cpu();
    double sum = 0;
    for (std::int64_t i = 0; i < h.numel(); ++i) {
      sum += std::abs(on_host.data_ptr<double>()[i]);
    }
    return h.matmul(n.b) * (100 / sum);
  }),
                         entropy_loss, n.x, n.y, exactly);
  check_right_or_refused("weights through data()",
                         n.with([&](const Tensor& x) { return n.hidden(x).matmul(n.b) * n.b.data().square().mean(); }),
                         entropy_loss, n.x, n.y, exactly);
  check_right_or_refused("a scale by variable_data() and item()", n.with([&](const Tensor& x) {
    return n.hidden(x).matmul(n.b) / n.b.variable_data().norm().item<double>();
  }),
                         entropy_loss, n.x, n.y, exactly);
  check_right_or_refused(
      "a spectral norm by power iteration",
      [&]() -> Model {
        auto u = std::make_shared<Tensor>(torch::ones({16}, torch::kFloat64) / 4);
        return {[&n, u](const Tensor& x) {
                  Tensor v;
                  {
                    const torch::NoGradGuard no_grad;
                    v = torch::nn::functional::normalize(n.b.t().matmul(*u),
                                                         torch::nn::functional::NormalizeFuncOptions().dim(0));
                    u->copy_(torch::nn::functional::normalize(n.b.matmul(v),
                                                              torch::nn::functional::NormalizeFuncOptions().dim(0)));
                  }
                  const Tensor sigma = u->clone().dot(n.b.matmul(v));
                  return n.hidden(x).matmul(n.b / sigma);
                },
                n.weights(),
                {*u}};
      },
      entropy_loss, n.x, n.y, exactly);
  check_right_or_refused(
      "an embedding with padding_idx, tied",
      [&]() -> Model {
        static const Tensor table = random_leaf({11, 6});
        return {[](const Tensor& t) {
                  const Tensor h = torch::embedding(table, t, 0).mean(1);
                  return torch::tanh(h).matmul(table.t());
                },
                {table}};
      },
      entropy_loss, torch::randint(11, {8, 4}), torch::randint(11, {8}), exactly);
  check_right_or_refused("a hard gumbel softmax", n.with([&](const Tensor& x) {
    return torch::nn::functional::gumbel_softmax(n.hidden(x),
                                                 torch::nn::functional::GumbelSoftmaxFuncOptions().hard(true).dim(1))
        .matmul(n.b);
  }),
                         entropy_loss, n.x, n.y, all);
  const MakeModel plain = n.with([&](const Tensor& x) { return n.hidden(x).matmul(n.b); });
  check_right_or_refused(
      "a bootstrapped target, no_grad", plain,
      [](const Tensor& o, const Tensor& t) {
        const torch::NoGradGuard no_grad;
        const Tensor aim = t + 0.9 * torch::relu(o);
        const torch::AutoGradMode enable(true);
        return (o - aim).square().mean();
      },
      n.x, target, exactly);
}

TEST_CASE("right or refused: changes in place", "[right_or_refused]") {
  torch::manual_seed(4);
  const Net n;
  const auto changed = [&](const std::function<void(Tensor)>& change) {
    return n.with([&n, change](const Tensor& x) {
      const Tensor h = x.matmul(n.a) * 1.0;
      change(h);
      return torch::tanh(h).matmul(n.b);
    });
  };
  const std::vector<std::pair<const char*, std::function<void(Tensor)>>> changes = {
      {"relu_ on a view of a view", [](Tensor h) { h.narrow(1, 2, 8).narrow(1, 1, 4).relu_(); }},
      {"clamp_ on a row of columns", [](Tensor h) { h.narrow(1, 2, 8).select(0, 3).clamp_(-.2, .2); }},
      {"hardtanh_ on a reshaped half",
       [](Tensor h) {
         Tensor v = h.view({12, 4, 4}).select(1, 2);
         torch::hardtanh_(v, -.2, .2);
       }},
      {"leaky_relu_ on a diagonal",
       [](Tensor h) {
         Tensor v = h.narrow(1, 0, 12).diagonal();
         torch::leaky_relu_(v, .1);
       }},
      {"abs_ on a slice", [](Tensor h) { h.slice(1, 4, 8).abs_(); }},
      {"masked_fill_ on columns", [](Tensor h) { h.narrow(1, 0, 3).masked_fill_(h.narrow(1, 4, 3) > 0, 0.2); }},
      {"copy_ of a relu to columns", [](Tensor h) { h.narrow(1, 0, 3).copy_(torch::relu(h.narrow(1, 4, 3))); }},
      {"index_put_ with a mask", [](Tensor h) { h.index_put_({h > 0.3}, 0.1); }},
      {"columns swapped in place", [](Tensor h) { h.copy_(torch::where(h > 0, h.flip(1), h).clone()); }},
      {"mul_ by a mask in place", [](Tensor h) { h.narrow(1, 0, 8).mul_((h.narrow(1, 0, 8) > 0).to(h.dtype())); }},
      {"sort, then written back", [](Tensor h) { h.copy_(std::get<0>(h.sort(1))); }},
      {"a maximum, then its operand",
       [](Tensor h) {
         const Tensor largest = std::get<0>(h.max(1, true));
         h.mul_(0.5).add_(largest);
       }},
  };
  for (const auto& [name, change] : changes) {
    check_right_or_refused(name, changed(change), entropy_loss, n.x, n.y, all);
  }
}

TEST_CASE("right or refused: max pooling, then in place", "[right_or_refused]") {
  torch::manual_seed(18);
  const Net n;
  namespace F = torch::nn::functional;
  const std::vector<std::pair<const char*, std::function<Tensor(const Tensor&)>>> poolings = {
      {"max_pool1d", [](const Tensor& h) { return torch::max_pool1d(h.unsqueeze(1), 2); }},
      {"max_pool2d", [](const Tensor& h) { return torch::max_pool2d(h.view({12, 1, 4, 4}), 2); }},
      {"max_pool3d", [](const Tensor& h) { return torch::max_pool3d(h.view({12, 1, 4, 2, 2}), {2, 1, 1}); }},
      {"adaptive_max_pool1d",
       [](const Tensor& h) { return std::get<0>(torch::adaptive_max_pool1d(h.unsqueeze(1), 5)); }},
      {"adaptive_max_pool2d",
       [](const Tensor& h) { return std::get<0>(torch::adaptive_max_pool2d(h.view({12, 1, 4, 4}), {2, 3})); }},
      {"adaptive_max_pool3d",
       [](const Tensor& h) { return std::get<0>(torch::adaptive_max_pool3d(h.view({12, 1, 4, 2, 2}), {2, 2, 1})); }},
      {"fractional_max_pool2d", [](const Tensor& h) {
         return F::fractional_max_pool2d(
             h.view({12, 1, 4, 4}), F::FractionalMaxPool2dFuncOptions(2).output_size(std::vector<std::int64_t>{2, 3}));
       }}};
  const std::vector<std::pair<const char*, std::function<void(Tensor)>>> changes = {
      {"relu_", [](Tensor p) { p.relu_(); }},
      {"mul_", [](Tensor p) { p.mul_(1.5); }},
      {"add_", [](Tensor p) { p += p.detach().square(); }},
      {"dropout_", [](Tensor p) { torch::dropout_(p, 0.3, true); }},
      {"a slice", [](Tensor p) { p.select(-1, 0).clamp_(-0.2, 0.2); }}};
  for (const auto& [pooling, pool] : poolings) {
    for (const auto& [name, change] : changes) {
      check_right_or_refused((std::string(pooling) + ", then " + name).c_str(),
                             n.with([&n, p = pool, c = change](const Tensor& x) {
                               const Tensor h = x.matmul(n.a);
                               const Tensor pooled = p(h);
                               c(pooled);
                               return torch::cat({pooled.flatten(1), h}, 1).narrow(1, 0, 16).matmul(n.b);
                             }),
                             entropy_loss, n.x, n.y, all);
    }
  }
}

TEST_CASE("right or refused: indices and branches", "[right_or_refused]") {
  torch::manual_seed(5);
  const Net n;
  const auto activated = [&](const std::function<Tensor(const Tensor&)>& activation) {
    return n.with([&n, activation](const Tensor& x) { return activation(x.matmul(n.a)).matmul(n.b); });
  };
  const std::vector<std::pair<const char*, std::function<Tensor(const Tensor&)>>> kinds = {
      {"where with a safe untaken branch",
       [](const Tensor& h) {
         const Tensor safe = torch::where(h > 0, h, torch::ones_like(h));
         return torch::where(h > 0, safe.sqrt(), h);
       }},
      {"gather at a computed index",
       [](const Tensor& h) { return h + h.gather(1, (h.select(1, 0) * 3).abs().to(torch::kLong).unsqueeze(1) % 16); }},
      {"scatter_add at computed indices",
       [](const Tensor& h) {
         return torch::zeros_like(h).scatter_add(1, (h.detach() * 5).abs().to(torch::kLong) % 16, torch::tanh(h));
       }},
      {"index_select of the largest",
       [](const Tensor& h) { return h * h.index_select(1, h.detach().norm(2, 0).argmax().reshape({1})); }},
      {"searchsorted interpolation",
       [](const Tensor& h) {
         const Tensor knots = torch::linspace(-3, 3, 9, torch::kFloat64);
         const Tensor at = torch::searchsorted(knots, h.detach().contiguous()).clamp(1, 8);
         const Tensor low = knots.index({at - 1});
         return (h - low) * (knots.sin().index({at}) - knots.sin().index({at - 1})) + knots.sin().index({at - 1});
       }},
      {"a loop that data ends",
       [](Tensor h) {
         for (int i = 0; i < 5 && h.abs().max().item<double>() > 0.5; ++i) {
           h = h / 2 + torch::relu(h) / 4;
         }
         return h;
       }},
      {"empty columns", [](const Tensor& h) { return torch::cat({h, torch::relu(h.narrow(1, 0, 0))}, 1); }},
      {"empty rows", [](const Tensor& h) { return h + torch::relu(h.narrow(0, 0, 0)).sum(0); }},
      {"ties", [](const Tensor& h) { return h + torch::stack({h, h, -h}, 2).amax(2); }},
      {"a rounding of the index", [](const Tensor& h) { return h * torch::round(h.detach() * 2) / 2; }},
      {"unique",
       [](const Tensor& h) { return h * std::get<0>(torch::_unique2(torch::round(h.detach()))).size(0) / 4; }},
      {"std::max of two numbers read",
       [](const Tensor& h) { return h * std::max(h[0][0].item<double>(), h[0][1].item<double>()); }},
  };
  for (const auto& [name, activation] : kinds) {
    check_right_or_refused(name, activated(activation), entropy_loss, n.x, n.y, exactly);
  }
}

TEST_CASE("right or refused: shared, frozen and empty parameters", "[right_or_refused]") {
  torch::manual_seed(6);
  const Net n;
  const Tensor nothing = random_leaf({0, 5});
  check_right_or_refused(
      "a parameter without elements",
      [&]() -> Model {
        return {[&](const Tensor& x) {
                  const Tensor h = n.hidden(x);
                  return h.matmul(n.b) + torch::relu(h.narrow(1, 0, 0)).matmul(nothing);
                },
                {n.a, n.b, nothing}};
      },
      entropy_loss, n.x, n.y, all);
  const Tensor frozen = random_leaf({16, 16}).requires_grad_(false);
  check_right_or_refused("a frozen layer between",
                         n.with([&](const Tensor& x) { return torch::relu(n.hidden(x).matmul(frozen)).matmul(n.b); }),
                         entropy_loss, n.x, n.y, all);
  check_right_or_refused("one layer twice", n.with([&](const Tensor& x) {
    return torch::relu(torch::relu(x.matmul(n.a)).matmul(n.a.t()).matmul(n.a)).matmul(n.b);
  }),
                         entropy_loss, n.x, n.y, all);
  check_right_or_refused(
      "weights in the loss", n.with([&](const Tensor& x) { return n.hidden(x).matmul(n.b); }),
      [&](const Tensor& o, const Tensor& y) {
        return entropy_loss(o, y) + 0.01 * n.a.abs().sum() + n.b.square().sum() * 0.1 +
               0.01 * torch::relu(n.b - 0.1).square().sum();
      },
      n.x, n.y, all);
  check_right_or_refused("complex intermediates, whose absolute values are smooth", n.with([&](const Tensor& x) {
    return torch::relu(torch::fft_rfft(x.matmul(n.a)).abs() - 0.3).narrow(1, 0, 5);
  }),
                         entropy_loss, n.x, n.y, exactly);
  check_right_or_refused(
      "parameters that the loss does not reach",
      [&]() -> Model {
        return {[&](const Tensor& x) { return torch::relu(x.matmul(n.a)).narrow(1, 0, 5); }, {n.a, n.b}};
      },
      entropy_loss, n.x, n.y, all);
}

TEST_CASE("right or refused: derivatives inside of the pass", "[right_or_refused]") {
  torch::manual_seed(7);
  const Net n;
  const Tensor target = torch::randn({12, 5}, torch::kFloat64);
  check_right_or_refused("an inner step of gradient descent", n.with([&](const Tensor& x) {
    const Tensor inner = torch::relu(n.hidden(x)).matmul(n.b).square().mean();
    const auto g = torch::autograd::grad({inner}, {n.a, n.b}, {}, true, true);
    return torch::relu(torch::tanh(x.matmul(n.a - 0.1 * g[0])) - 0.1).matmul(n.b - 0.1 * g[1]);
  }),
                         entropy_loss, n.x, n.y, exactly);
  check_right_or_refused("an inner step without a graph", n.with([&](const Tensor& x) {
    const Tensor inner = torch::relu(n.hidden(x)).matmul(n.b).square().mean();
    const auto g = torch::autograd::grad({inner}, {n.a, n.b});
    return torch::tanh(x.matmul(n.a - 0.1 * g[0])).matmul(n.b - 0.1 * g[1]);
  }),
                         entropy_loss, n.x, n.y, exactly);
  check_right_or_refused("a gradient penalty by the input", n.with([&](const Tensor& x) {
    const Tensor leaf = x.detach().requires_grad_(true);
    const Tensor o = torch::relu(leaf.matmul(n.a)).matmul(n.b);
    const auto g = torch::autograd::grad({o.square().sum()}, {leaf}, {}, true, true)[0];
    return torch::cat({o, g}, 1).narrow(1, 0, 5) + (g.norm(2, 1, true) - 1).abs();
  }),
                         square_loss, n.x, target, exactly);
  check_right_or_refused("a kept gradient of a hidden layer", n.with([&](const Tensor& x) {
    const Tensor h = n.hidden(x);
    h.retain_grad();
    return h.matmul(n.b);
  }),
                         entropy_loss, n.x, n.y, exactly);
}

TEST_CASE("right or refused: passes that the scope does not see", "[right_or_refused][threads]") {
  torch::manual_seed(8);
  const Net n;
  const std::function<Tensor(const Tensor&, const Tensor&)> smooth = [](const Tensor& h, const Tensor& w) {
    return torch::tanh(h.matmul(w));
  };
  const std::function<Tensor(const Tensor&, const Tensor&)> kinked = [](const Tensor& h, const Tensor& w) {
    return torch::relu(h.matmul(w));
  };
  check_right_or_refused("recomputation of a smooth segment",
                         n.with([&](const Tensor& x) { return Recompute::apply(x, n.a, &smooth).matmul(n.b); }),
                         entropy_loss, n.x, n.y);
  check_right_or_refused("recomputation of a segment with kinks",
                         n.with([&](const Tensor& x) { return Recompute::apply(x, n.a, &kinked).matmul(n.b); }),
                         entropy_loss, n.x, n.y);
  check_right_or_refused("a smooth layer in a thread",
                         n.with([&](const Tensor& x) { return in_thread([&] { return n.hidden(x); }).matmul(n.b); }),
                         entropy_loss, n.x, n.y, all);
  check_right_or_refused("detach in a thread", n.with([&](const Tensor& x) {
    return in_thread([&] {
             const Tensor h = n.hidden(x);
             return h * h.detach().square();
           })
        .matmul(n.b);
  }),
                         entropy_loss, n.x, n.y, exactly, differences, {"MulBackward0", "another thread"});
  check_right_or_refused("a where in a thread", n.with([&](const Tensor& x) {
    return in_thread([&] {
             const Tensor h = x.matmul(n.a);
             return torch::where(h > 0, h, 0.1 * h);
           })
        .matmul(n.b);
  }),
                         entropy_loss, n.x, n.y, exactly, differences, {"WhereBackward0", "another thread"});
  check_right_or_refused("a product with a mask in a thread", n.with([&](const Tensor& x) {
    return in_thread([&] {
             const Tensor h = x.matmul(n.a);
             return h * (h > 0).to(h.dtype());
           })
        .matmul(n.b);
  }),
                         entropy_loss, n.x, n.y, exactly, differences, {"MulBackward0", "another thread"});
  check_right_or_refused("a mask of at::parallel_for", n.with([&](const Tensor& x) {
    const Tensor h = x.matmul(n.a), on_host = h.cpu();
    Tensor mask = torch::zeros_like(on_host);
    const double* from = on_host.data_ptr<double>();
    double* to = mask.mutable_data_ptr<double>();
    at::parallel_for(0, h.numel(), 1, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t i = begin; i < end; ++i) {
        to[i] = from[i] > 0 ? 1 : 0.1;
      }
    });
    return (h * mask.to(h.device())).matmul(n.b);
  }),
                         entropy_loss, n.x, n.y, exactly);
  for (const char* activation : {"relu", "tanh", "hardtanh"}) {
    torch::jit::Module scripted("scripted");
    scripted.register_parameter("a", n.a, false);
    scripted.register_parameter("b", n.b, false);
    scripted.define(std::string("def forward(self, x):\n  return torch.matmul(torch.") + activation +
                    "(torch.matmul(x, self.a)), self.b)\n");
    auto run = [scripted](const Tensor& x) mutable { return scripted.forward({x}).toTensor(); };
    for (int i = 0; i < 3; ++i) {
      (void)run(n.x);  // until it is optimised
    }
    check_right_or_refused((std::string("a scripted ") + activation).c_str(), n.with(run), entropy_loss, n.x, n.y,
                           exactly);
  }
}

TEST_CASE("right or refused: few samples", "[right_or_refused]") {
  for (const std::int64_t samples : {2, 3}) {
    for (const auto type : {torch::kFloat64, torch::kFloat32}) {
      torch::manual_seed(9);
      const Tensor a = random_leaf({6, 16}, 0.5, type), b = random_leaf({16, 5}, 0.5, type);
      const Tensor x = torch::randn({samples, 6}, torch::kFloat64).to(type), y = torch::randint(5, {samples});
      for (const bool kinked : {false, true}) {
        check_right_or_refused(
            "BatchNorm over 2 and 3 samples",
            [&]() -> Model {
              return {[&, kinked](const Tensor& in) {
                        Tensor h = in.matmul(a);
                        h = torch::batch_norm(h, {}, {}, {}, {}, true, 0.1, 1e-5, false);
                        return (kinked ? torch::relu(h) : torch::tanh(h)).matmul(b);
                      },
                      {a, b}};
            },
            entropy_loss, x, y, exactly, 0, {}, type == torch::kFloat64 ? Bounds{1e-8, 2e-3} : Bounds{5e-3, 0.05});
      }
    }
  }
}

TEST_CASE("right or refused: fine parameters of a coarse loss", "[right_or_refused]") {
  torch::manual_seed(10);
  const Net n;
  const MakeModel plain = n.with([&](const Tensor& x) { return n.hidden(x).matmul(n.b); });
  check_right_or_refused("a float32 loss", plain,
                         [](const Tensor& o, const Tensor& y) { return entropy_loss(o.to(torch::kFloat32), y); }, n.x,
                         n.y, exactly, 0, {}, {1e-5, 0.02});
  check_right_or_refused("a loss that is cast to float32", plain,
                         [](const Tensor& o, const Tensor& y) { return entropy_loss(o, y).to(torch::kFloat32); }, n.x,
                         n.y, exactly, 0, {}, {1e-5, 0.02});
  check_right_or_refused(
      "a loss of one element", plain, [](const Tensor& o, const Tensor& y) { return entropy_loss(o, y).reshape({1}); },
      n.x, n.y);
}

TEST_CASE("right or refused: the step adapts where it can", "[right_or_refused]") {
  torch::manual_seed(6);
  const Tensor a = torch::randn({32, 128}) / 5, b = torch::randn({128, 10}) / 11;
  const Tensor bias = torch::full({128}, 1e-4).requires_grad_();
  const Tensor head = torch::zeros({128, 10}).requires_grad_();
  const Tensor scale = torch::full({10}, 1e-6).requires_grad_();
  const Tensor x = torch::randn({256, 32}), y = torch::randint(10, {256});
  const auto one = [](const Tensor& parameter, const Forward& forward) -> MakeModel {
    return [=] { return Model{forward, {parameter}}; };
  };
  const Bounds bounds{1e-3, 0.05};
  check_right_or_refused("biases only",
                         one(bias, [=](const Tensor& in) { return torch::tanh(in.matmul(a) + bias).matmul(b); }),
                         entropy_loss, x, y, all, 0, {}, bounds);
  check_right_or_refused("a head of zeros",
                         one(head, [=](const Tensor& in) { return torch::tanh(in.matmul(a)).matmul(head); }),
                         entropy_loss, x, y, all, 0, {}, bounds);
  check_right_or_refused(
      "a layer scale",
      one(scale, [=](const Tensor& in) { return torch::tanh(in.matmul(a)).matmul(b) + in.narrow(1, 0, 10) * scale; }),
      entropy_loss, x, y, all, 0, {}, bounds);
}

TEST_CASE("right or refused: several regularizers on one model", "[right_or_refused]") {
  torch::manual_seed(12);
  const Net n;
  const Model model{[&](const Tensor& x) { return torch::relu(n.hidden(x)).matmul(n.b); }, n.weights()};
  const auto gradient = [&](bool first, bool second, const microreg::Estimator& estimator) {
    clear_grad(n.weights());
    microreg::Regularizer one(model, entropy_loss, microreg::GradientNorm{}, {.strength = 2., .estimator = estimator});
    microreg::Regularizer other(model, entropy_loss, microreg::JacobianNorm{},
                                {.strength = .5, .micro_batch_size = 5, .estimator = estimator});
    for (std::uint64_t i = 0; i < 3; ++i) {
      if (first) {
        (void)one.backward(n.x, n.y);
      }
      torch::manual_seed(i);
      if (second) {
        (void)other.backward(n.x, n.y);
      }
    }
    return flat_grad(n.weights());
  };
  const Tensor expected = gradient(true, false, Exact{}) + gradient(false, true, Exact{});
  CHECK(relative_error(gradient(true, true, Exact{}), expected) < 1e-13);
  CHECK(relative_error(gradient(true, true, ForwardDifference{}), expected) < 1e-6);
  CHECK(relative_error(gradient(true, true, CentralDifference{}), expected) < 1e-6);
  clear_grad(n.weights());
}

TEST_CASE("right or refused: strengths of every size", "[right_or_refused]") {
  torch::manual_seed(13);
  const Net n;
  const MakeModel plain = n.with([&](const Tensor& x) { return torch::relu(x.matmul(n.a)).matmul(n.b); });
  const Tensor right = written_by_hand(plain, entropy_loss, n.x, n.y);
  for (const microreg::Estimator& estimator : {microreg::Estimator(Exact{}), microreg::Estimator(ForwardDifference{}),
                                               microreg::Estimator(CentralDifference{})}) {
    for (const double strength : {0., 1e-300, 1e-12, 1e6, 1e30, 1e100}) {
      CAPTURE(strength);
      clear_grad(n.weights());
      microreg::Regularizer r(plain(), entropy_loss, microreg::GradientNorm{},
                              {.strength = strength, .estimator = estimator});
      (void)r.backward(n.x, n.y);
      const auto loss = torch::autograd::grad({entropy_loss(plain().function(n.x), n.y)}, n.weights());
      const Tensor whole = flattened(loss, n.weights()) + strength * right;
      const double norm = whole.abs().max().item<double>();
      CHECK(relative_error(flat_grad(n.weights()) / norm, whole / norm) < 1e-6);
    }
  }
  clear_grad(n.weights());
}

TEST_CASE("right or refused: outputs that the loss changes in place", "[right_or_refused]") {
  torch::manual_seed(14);
  const Net n;
  const Model model{[&](const Tensor& x) { return n.hidden(x).matmul(n.b); }, n.weights()};
  const auto gradient = [&](const Loss& loss, const microreg::Estimator& estimator) {
    clear_grad(n.weights());
    torch::manual_seed(1);
    microreg::Regularizer r(model, loss, microreg::JacobianNorm{}, {.strength = 1., .estimator = estimator});
    (void)r.backward(n.x, torch::zeros({12, 5}, torch::kFloat64));
    return flat_grad(n.weights());
  };
  const Loss in_place = [](Tensor o, const Tensor& y) { return o.mul_(3).sub_(y).square().mean(); };
  const Loss out_of_place = [](const Tensor& o, const Tensor& y) { return (o * 3 - y).square().mean(); };
  const Tensor right = gradient(out_of_place, Exact{});
  for (const microreg::Estimator& estimator : {microreg::Estimator(Exact{}), microreg::Estimator(ForwardDifference{}),
                                               microreg::Estimator(CentralDifference{})}) {
    Tensor found;
    std::string message;
    try {
      found = gradient(in_place, estimator);
    } catch (const microreg::Error& error) {
      message = error.what();
    }
    CHECK(has(message, {"jacobian_norm", "output", "in place", "clone()"}));
  }
  (void)right;
  clear_grad(n.weights());
}

TEST_CASE("right or refused: a penalty that grows after the proof", "[right_or_refused]") {
  torch::manual_seed(15);
  const Net n;
  int calls = 0;
  const Model held{[&](const Tensor& x) {
                     ++calls;
                     return n.hidden(x).matmul(n.b) + n.hidden(x).matmul(n.b.data());
                   },
                   n.weights()};
  const auto steps = [&](const microreg::Strength& strength, int count) {
    clear_grad(n.weights());
    microreg::Regularizer r(held, entropy_loss, microreg::GradientNorm{},
                            {.strength = strength, .estimator = ForwardDifference{}});
    calls = 0;
    for (int i = 0; i < count; ++i) {
      (void)r.backward(n.x, n.y);
    }
  };
  // Too small to be seen wrong beside the loss: proven now and then.
  steps(1e-12, 20);
  CHECK(calls == 20 * 2 + 5);
  CHECK(has(message_of<microreg::DifferenceError>([&] { steps([](auto step) { return step < 5 ? 1e-12 : 1.; }, 6); }),
            {"off by"}));
  CHECK(calls == 5 * 2 + 3 + 9);
  // Nothing to be seen in a first batch without a gradient.
  microreg::Regularizer r(held, [](const Tensor& o, const Tensor& y) { return (o * y).square().mean(); },
                          microreg::GradientNorm{}, {.estimator = ForwardDifference{}});
  (void)r.backward(n.x, torch::zeros({12, 1}, torch::kFloat64));
  CHECK(has(message_of<microreg::DifferenceError>([&] {
              for (int i = 0; i < 2; ++i) {
                (void)r.backward(n.x, torch::ones({12, 1}, torch::kFloat64));
              }
            }),
            {"off by"}));
  clear_grad(n.weights());
}

TEST_CASE("right or refused: losses without a second derivative", "[right_or_refused]") {
  for (const auto type : {torch::kFloat64, torch::kFloat32}) {
    torch::manual_seed(16);
    const Tensors w = {random_leaf({10, 64}, .4, type), random_leaf({64, 64}, .2, type),
                       random_leaf({64, 4}, .3, type)};
    const Tensor x = torch::randn({128, 10}, torch::kFloat64).to(type), y = torch::randint(4, {128});
    const MakeModel net = [&]() -> Model {
      return {[&](const Tensor& in) { return torch::relu(torch::relu(in.matmul(w[0])).matmul(w[1])).matmul(w[2]); }, w};
    };
    const Tensor own = torch::one_hot(y, 4).to(type);
    const struct {
      const char* name;
      Loss loss, composed;
    } losses[] = {
        {"multi_margin_loss", [](const Tensor& o, const Tensor& t) { return torch::multi_margin_loss(o, t); },
         [&](const Tensor& o, const Tensor&) {
           return (torch::relu(1 - (o * own).sum(1, true) + o) * (1 - own)).sum(1).mean() / 4;
         }},
        {"cdist of order 1", [](const Tensor& o, const Tensor&) { return torch::cdist(o, o.detach() + 1, 1).mean(); },
         [](const Tensor& o, const Tensor&) { return (o.unsqueeze(1) - (o.detach() + 1)).abs().sum(2).mean(); }},
        {"cdist of order infinity",
         [&](const Tensor& o, const Tensor&) { return torch::cdist(o, own, INFINITY).mean(); },
         [&](const Tensor& o, const Tensor&) { return (o.unsqueeze(1) - own).abs().amax(2).mean(); }}};
    for (const auto& [name, loss, composed] : losses) {
      CAPTURE(name, type);
      const Tensor right = written_by_hand(net, composed, x, y);
      if (has(name, {"cdist"}) && microreg::detail::cdist_differentiates_twice) {
        CHECK(relative_error(part_of(net, loss, x, y, Exact{}, true), right) <
              (type == torch::kFloat64 ? 1e-10 : 1e-3));
      } else {
        CHECK_THROWS_AS(part_of(net, loss, x, y, Exact{}, true), microreg::ModelError);
      }
      for (const microreg::Estimator& estimator :
           {microreg::Estimator(ForwardDifference{}), microreg::Estimator(CentralDifference{})}) {
        CHECK(relative_error(part_of(net, loss, x, y, estimator, true), right) <
              (type == torch::kFloat64 ? 1e-5 : 0.02));
      }
    }
  }
}
