// Every kind of situation in which a number was wrong in silence once, by each estimator at its defaults: a first step,
// which proves a difference on two samples, and a second one between proofs, on many, where units lie on both sides of
// their kinks. Right against double backward by hand, or refused. The table in docs/estimators.md says which.
#include "helpers.hpp"
#include "own_functions.hpp"

#include <torch/csrc/autograd/custom_function.h>
#include <torch/script.h>
#include <microreg/microreg.hpp>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <memory>
#include <random>
#include <thread>

using namespace helpers;
using microreg::CentralDifference;
using microreg::Exact;
using microreg::ForwardDifference;
using torch::Tensor;
namespace F = torch::nn::functional;

namespace {

using Tensors = std::vector<Tensor>;
using Forward = std::function<Tensor(const Tensor&)>;
using Loss = std::function<Tensor(const Tensor&, const Tensor&)>;

/// Model and loss in their first state, with weights of their own.
struct Setup {
  microreg::FunctionModel<Forward> model;
  Loss loss;
};
using Fresh = std::function<Setup()>;

Tensor entropy(const Tensor& o, const Tensor& y) { return torch::cross_entropy_loss(o, y); }

/// An MLP 32-128-128-10 with `activation` after both of its hidden layers.
struct Weights {
  explicit Weights(torch::ScalarType type = torch::kFloat) {
    torch::manual_seed(7);
    for (const auto& [rows, columns] : std::vector<std::pair<int, int>>{{32, 128}, {128, 128}, {128, 10}}) {
      w.push_back((torch::randn({rows, columns}) * std::sqrt(2. / rows)).to(type).requires_grad_());
    }
  }
  [[nodiscard]] Forward with(const Forward& activation) const {
    return [w = w, activation](const Tensor& x) {
      return activation(activation(x.to(w[0].scalar_type()).matmul(w[0])).matmul(w[1])).matmul(w[2]);
    };
  }
  Tensors w;
};
Fresh activated(const Forward& activation, const Loss& loss = entropy) {
  return [=] {
    const Weights net;
    return Setup{{net.with(activation), net.w}, loss};
  };
}
/// The same where the activation has a state.
Fresh stateful(const std::function<Forward()>& activation) {
  return [=] {
    const Weights net;
    return Setup{{net.with(activation()), net.w}, entropy};
  };
}
/// A model of its own, of the weights.
Fresh built(const std::function<Forward(const Tensors&)>& forward, const Loss& loss = entropy,
            torch::ScalarType type = torch::kFloat) {
  return [=] {
    const Weights net(type);
    return Setup{{forward(net.w), net.w}, loss};
  };
}

struct Batch {
  Tensor x, y;
};
std::vector<Batch> batches() {
  torch::manual_seed(5);
  std::vector<Batch> result;
  for (const std::int64_t size : {2, 128}) {
    result.push_back({torch::randn({size, 32}), torch::randint(10, {size})});
  }
  return result;
}

/// grad_w of || grad_w loss ||^2 in the second step, by LibTorch's operations.
Tensor written_by_hand(const Fresh& fresh) {
  const auto data = batches();
  const Setup s = fresh();
  torch::manual_seed(11);
  (void)s.loss(s.model.function(data[0].x.clone()), data[0].y.clone());
  return penalty_by_hand(s.loss(s.model.function(data[1].x.clone()), data[1].y.clone()), s.model.parameters);
}

/// The penalty's part of .grad in the second step.
Tensor stepped(const Fresh& fresh, const microreg::Estimator& estimator) {
  const auto data = batches();
  Tensor parts[2];
  for (const int strength : {0, 1}) {
    const Setup s = fresh();
    torch::manual_seed(11);
    microreg::Regularizer r(s.model, s.loss, microreg::GradientNorm{},
                            {.strength = double(strength), .micro_batch_size = 1000, .estimator = estimator});
    (void)r.backward(data[0].x.clone(), data[0].y.clone());
    clear_grad(s.model.parameters);
    (void)r.backward(data[1].x.clone(), data[1].y.clone());
    parts[strength] = flat_grad(s.model.parameters);
  }
  return parts[1] - parts[0];
}

enum class Then { right, refused, either };

/// What becomes of one kind with Exact, and with either difference. `composed` is the same of operations that LibTorch
/// can differentiate twice, where it needs to be another.
void check_kind(const char* name, const Fresh& fresh, Then exact, Then difference, const Fresh& composed = {},
                double exact_bound = 1e-4) {
  INFO(name);
  const auto by_hand = if_differentiable(name, [&] { return written_by_hand(composed ? composed : fresh); });
  if (!by_hand.has_value()) {
    return;
  }
  const Tensor& expected = *by_hand;
  const struct {
    const char* name;
    microreg::Estimator estimator;
    Then then;
    double bound;
  } ways[] = {{"Exact", Exact{}, exact, exact_bound},
              {"ForwardDifference", ForwardDifference{}, difference, 0.03},
              {"CentralDifference", CentralDifference{}, difference, 0.03}};
  for (const auto& way : ways) {
    INFO(way.name);
    std::string message;
    double error = -1;
    try {
      error = relative_error(stepped(fresh, way.estimator), expected);
    } catch (const microreg::Error& e) {
      message = e.what();
    }
    if (std::getenv("SAY") != nullptr) {
      std::printf("%-44s %-18s %10.2g %s\n", name, way.name, error, message.substr(0, 200).c_str());
    }
    INFO(message);
    CHECK((!message.empty() || error <= way.bound));
    CHECK((way.then != Then::right || message.empty()));
    CHECK((way.then != Then::refused || !message.empty()));
  }
}

/// 1 where positive and a tenth elsewhere, by pointers.
Tensor mask_by_pointer(const Tensor& h) {
  const Tensor from = h.detach().contiguous().cpu();
  Tensor mask = torch::empty_like(from);
  for (std::int64_t i = 0; i < from.numel(); ++i) {
    mask.mutable_data_ptr<float>()[i] = from.data_ptr<float>()[i] > 0 ? 1.F : 0.1F;
  }
  return mask.to(h.device());
}

}  // namespace

TEST_CASE("defaults: decisions", "[defaults]") {
  const std::vector<std::pair<const char*, Forward>> kinds = {
      {"clamp_ on columns",
       [](const Tensor& h) {
         Tensor c = h * 1;
         c.narrow(1, 0, 64).clamp_(-.3, .3);
         return c;
       }},
      {"where", [](const Tensor& h) { return torch::where(h > 0, h, 0.01 * h); }},
      {"a product with a comparison", [](const Tensor& h) { return h * (h > 0); }},
      {"masked_fill", [](const Tensor& h) { return h.masked_fill(h < 0, 0.); }},
      {"index_put of a mask", [](const Tensor& h) { return h.index_put({h < 0}, torch::zeros({})); }},
      {"gather of argmax", [](const Tensor& h) { return h + h.gather(1, h.argmax(1, true)); }},
      {"sign", [](const Tensor& h) { return torch::sign(h) * h; }},
      {"where of an absolute value",
       [](const Tensor& h) { return torch::where(h.abs() < 1, h.square(), 2 * h.abs() - 1); }},
      {"floor, straight-through", [](const Tensor& h) { return h + (h.floor() - h).detach(); }},
      {"aminmax", [](const Tensor& h) { return h - std::get<0>(torch::aminmax(h, 1, true)); }},
      {"a gate of topk",
       [](const Tensor& h) { return h * torch::zeros_like(h).scatter(1, std::get<1>(h.detach().topk(40, 1)), 1.); }},
      {"cummax", [](const Tensor& h) { return std::get<0>(h.cummax(1)); }},
      {"sort", [](const Tensor& h) { return std::get<0>(h.sort(1)); }},
      {"topk", [](const Tensor& h) { return torch::cat({std::get<0>(h.topk(64, 1)), h.narrow(1, 0, 64)}, 1); }},
      {"kthvalue", [](const Tensor& h) { return h - std::get<0>(h.kthvalue(40, 1, true)); }},
      {"median", [](const Tensor& h) { return h - std::get<0>(h.median(1, true)); }},
      {"fmod", [](const Tensor& h) { return torch::fmod(h, 0.7); }},
      {"scatter_reduce amax",
       [](const Tensor& h) {
         const Tensor index = (torch::arange(128) % 8).expand(h.sizes());
         return h + torch::zeros({h.size(0), 8}).scatter_reduce(1, index, h, "amax").repeat({1, 16});
       }},
      {"index_reduce amax",
       [](const Tensor& h) {
         return h + torch::zeros({h.size(0), 8}).index_reduce(1, torch::arange(128) % 8, h, "amax").repeat({1, 16});
       }},
      {"norm of order 1", [](const Tensor& h) { return h / (1 + torch::norm(h, 1, 1, true) / 100); }},
      {"normalize of order 1",
       [](const Tensor& h) { return 100 * F::normalize(h, F::NormalizeFuncOptions().p(1).dim(1)); }},
      {"fake_quantize", [](const Tensor& h) { return torch::fake_quantize_per_tensor_affine(h, 0.05, 0, -40, 40); }},
      {"max pooling and an operation in place",
       [](const Tensor& h) { return torch::max_pool1d(h.unsqueeze(1), 3, 1, 1).relu_().squeeze(1); }},
      {"a mask by pointers", [](const Tensor& h) { return h * mask_by_pointer(h); }},
      {"an index by pointers",
       [](const Tensor& h) {
         const Tensor mask = mask_by_pointer(h) > 0.5;
         return torch::where(mask, h, 0.1 * h);
       }},
      {"a branch on item()",
       [](const Tensor& h) { return h.sum().item<double>() > 0 ? torch::relu(h) : torch::relu(h) - 0.1 * h; }},
      {"a teacher under NoGradGuard",
       [](const Tensor& h) {
         Tensor teacher;
         {
           const torch::NoGradGuard no_grad;
           teacher = torch::relu(h - 0.1);
         }
         return h * torch::sigmoid(teacher);
       }},
      {"detach", [](const Tensor& h) { return h * torch::sigmoid(h.detach()); }},
  };
  for (const auto& [name, activation] : kinds) {
    check_kind(name, activated(activation), Then::right, Then::right);
  }
}

TEST_CASE("defaults: losses with kinks", "[defaults]") {
  const Forward relu = [](const Tensor& h) { return torch::relu(h); };
  const auto own = [](const Tensor& o, const Tensor& y) { return torch::one_hot(y, 10).to(o.scalar_type()); };
  check_kind("multi_margin_loss",
             activated(relu, [](const Tensor& o, const Tensor& y) { return torch::multi_margin_loss(o, y); }),
             Then::refused, Then::right, activated(relu, [=](const Tensor& o, const Tensor& y) {
               const Tensor mine = own(o, y);
               return (torch::relu(1 - (o * mine).sum(1, true) + o) * (1 - mine)).sum(1).mean() / 10;
             }));
  check_kind("multilabel_margin_loss",
             activated(relu,
                       [](const Tensor& o, const Tensor& y) {
                         const Tensor list = torch::cat({y.unsqueeze(1), torch::full({y.size(0), 9}, -1)}, 1);
                         return torch::multilabel_margin_loss(o, list);
                       }),
             Then::refused, Then::right, activated(relu, [=](const Tensor& o, const Tensor& y) {
               const Tensor mine = own(o, y);
               return (torch::relu(1 - (o * mine).sum(1, true) + o) * (1 - mine)).sum(1).mean() / 10;
             }));
  for (const double p : {1., double(INFINITY)}) {
    check_kind("cdist",
               activated(relu, [=](const Tensor& o, const Tensor& y) { return torch::cdist(o, own(o, y), p).mean(); }),
               microreg::detail::cdist_differentiates_twice ? Then::right : Then::refused, Then::right,
               activated(relu, [=](const Tensor& o, const Tensor& y) {
                 const Tensor apart = (o.unsqueeze(1) - own(o, y)).abs();
                 return (p == 1 ? apart.sum(2) : apart.amax(2)).mean();
               }));
  }
  check_kind("a bootstrapped target",
             activated(relu, [=](const Tensor& o,
                                 const Tensor& y) { return (o - (own(o, y) + 0.9 * o.detach())).square().mean(); }),
             Then::right, Then::right);
  check_kind("grid_sample with a grid that moves", activated([](const Tensor& h) {
               const Tensor image = torch::linspace(0, 1, 64).view({1, 1, 8, 8}).sin().expand({h.size(0), 1, 8, 8});
               const Tensor grid = torch::tanh(h).view({h.size(0), 8, 8, 2});
               return torch::cat({torch::grid_sampler(image, grid, 0, 0, false).flatten(1), h.narrow(1, 0, 64)}, 1);
             }),
             Then::either, Then::refused);
}

TEST_CASE("defaults: what the passes do not share", "[defaults][threads]") {
  const auto refused = [](const char* name, const Fresh& fresh) {
    check_kind(name, fresh, Then::right, Then::refused);
  };
  refused("noise of one's own", stateful([] {
            return [engine = std::make_shared<std::mt19937>(3)](const Tensor& h) {
              const double noise = std::normal_distribution<double>(0, 0.1)(*engine);
              return torch::tanh(h) * (1 + noise);
            };
          }));
  refused("an average in a member", stateful([] {
            return [ema = std::make_shared<Tensor>()](const Tensor& h) {
              const Tensor mean = h.detach().square().mean(0);
              *ema = ema->defined() ? 0.5 * *ema + 0.5 * mean : mean;
              return torch::tanh(h) / (1 + *ema);
            };
          }));
  refused("a hidden state in a member", stateful([] {
            return [state = std::make_shared<Tensor>(torch::zeros({128}))](const Tensor& h) {
              const Tensor o = torch::tanh(h + *state);
              *state = o.detach().mean(0);
              return o;
            };
          }));
  refused("a moving centre in the loss", [] {
    const Weights net;
    return Setup{{net.with([](const Tensor& h) { return torch::tanh(h); }), net.w},
                 [centre = std::make_shared<Tensor>(torch::zeros({10}))](const Tensor& o, const Tensor& y) {
                   const Tensor loss = torch::cross_entropy_loss(o - *centre, y);
                   *centre = 0.5 * *centre + 0.5 * o.detach().mean(0);
                   return loss;
                 }};
  });
  refused("an input changed in place", built([](const Tensors& w) {
            return [w](const Tensor& x) {
              Tensor h = x;
              return torch::tanh(h.sub_(.5).mul_(2).matmul(w[0])).matmul(w[1]).matmul(w[2]);
            };
          }));
  refused("weights clamped without a graph", built([](const Tensors& w) {
            return [w](const Tensor& x) {
              {
                const torch::NoGradGuard no_grad;
                Tensor(w[0]).clamp_(-.2, .2);
              }
              return torch::tanh(x.matmul(w[0])).matmul(w[1]).matmul(w[2]);
            };
          }));
  refused("hooks that scale", built([](const Tensors& w) {
            w[0].register_hook([](const Tensor& g) { return g * 0.1; });
            return [w](const Tensor& x) { return torch::tanh(x.matmul(w[0])).matmul(w[1]).matmul(w[2]); };
          }));
  refused("relu in a thread", activated([](const Tensor& h) { return in_thread([&] { return torch::relu(h); }); }));
  check_kind("tanh in a thread", activated([](const Tensor& h) { return in_thread([&] { return torch::tanh(h); }); }),
             Then::right, Then::right);
  check_kind("dropout", activated([](const Tensor& h) { return torch::dropout(torch::relu(h), 0.3, true); }),
             Then::right, Then::right);
  check_kind("a hard gumbel softmax", activated([](const Tensor& h) {
               return h * F::gumbel_softmax(h, F::GumbelSoftmaxFuncOptions().hard(true).dim(1));
             }),
             Then::right, Then::right);
}

TEST_CASE("defaults: functions of one's own", "[defaults]") {
  check_kind("one with a kink", activated([](const Tensor& h) { return OwnKink::apply(h); }), Then::right,
             Then::refused);
  check_kind("gradient reversal", built([](const Tensors& w) {
               return [w](const Tensor& x) {
                 return Reversal::apply(torch::tanh(x.matmul(w[0]))).matmul(w[1]).tanh().matmul(w[2]);
               };
             }),
             Then::right, Then::refused);
}

TEST_CASE("defaults: parameters", "[defaults]") {
  check_kind(
      "an Embedding with max_norm",
      [] {
        const Weights net;
        const Tensor table = (torch::randn({20, 32}) * 3).requires_grad_();
        Tensors all = net.w;
        all.push_back(table);
        return Setup{
            {[net, table](const Tensor& x) {
               const Tensor t = (x.narrow(1, 0, 4) * 5).abs().to(torch::kLong).clamp_max(19);
               const auto options = F::EmbeddingFuncOptions().max_norm(1.0);
               return net.with([](const Tensor& h) { return torch::relu(h); })(F::embedding(t, table, options).mean(1));
             },
             all},
            entropy};
      },
      Then::right, Then::right);
  check_kind(
      "tied weights as two leaves",
      [] {
        const Weights net;
        const Tensor twin = net.w[1].detach().requires_grad_();
        return Setup{
            {[net, twin](const Tensor& x) {
               return torch::tanh(torch::tanh(x.matmul(net.w[0])).matmul(net.w[1])).matmul(twin).matmul(net.w[2]);
             },
             {net.w[0], net.w[1], twin, net.w[2]}},
            entropy};
      },
      Then::right, Then::refused);
  check_kind(
      "biases alone",
      [] {
        const Weights net;
        const Tensor bias = torch::full({128}, 1e-4).requires_grad_();
        const Tensors w = clones(net.w);
        return Setup{
            {[w, bias](const Tensor& x) { return torch::tanh(x.matmul(w[0]) + bias).matmul(w[1]).matmul(w[2]); },
             {bias}},
            entropy};
      },
      Then::right, Then::right);
  check_kind("float64 parameters over a float32 network",
             built(
                 [](const Tensors& w) {
                   return [w](const Tensor& x) {
                     Tensor h = x.to(torch::kFloat);
                     for (const Tensor& each : w) {
                       h = torch::tanh(h.matmul(each.to(torch::kFloat)));
                     }
                     return h;
                   };
                 },
                 entropy, torch::kDouble),
             Then::right, Then::either);
  check_kind("float32 parameters over a bfloat16 network", built([](const Tensors& w) {
               return [w](const Tensor& x) {
                 Tensor h = x.to(torch::kBFloat16);
                 for (const Tensor& each : w) {
                   h = torch::tanh(h.matmul(each.to(torch::kBFloat16)));
                 }
                 return h.to(torch::kFloat);
               };
             }),
             Then::right, Then::either, {}, 0.05);
  check_kind("a spectral norm", built([](const Tensors& w) {
               return [w, u = std::make_shared<Tensor>(torch::ones({128}) / std::sqrt(128.))](const Tensor& x) {
                 Tensor v;
                 {
                   const torch::NoGradGuard no_grad;
                   v = F::normalize(w[1].t().matmul(*u), F::NormalizeFuncOptions().dim(0));
                   *u = F::normalize(w[1].matmul(v), F::NormalizeFuncOptions().dim(0));
                 }
                 const Tensor sigma = u->dot(w[1].matmul(v));
                 return torch::tanh(torch::tanh(x.matmul(w[0])).matmul(w[1] / sigma)).matmul(w[2]);
               };
             }),
             Then::right, Then::either);
}

TEST_CASE("defaults: scripted models", "[defaults]") {
  for (const char* activation : {"relu", "leaky_relu", "hardtanh", "hardswish"}) {
    check_kind(
        activation,
        [=] {
          const Weights net;
          torch::jit::Module m("m");
          for (int i = 0; i < 3; ++i) {
            m.register_parameter("w" + std::to_string(i), net.w[static_cast<std::size_t>(i)], false);
          }
          const std::string act = std::string("torch.nn.functional.") + activation;
          (void)act;
          m.define(std::string("def forward(self, x):\n  h = torch.") + activation +
                   "(torch.matmul(x, self.w0))\n  h = torch." + activation +
                   "(torch.matmul(h, self.w1))\n  return torch.matmul(h, self.w2)\n");
          return Setup{{[m](const Tensor& x) mutable { return m.forward({x}).toTensor(); }, net.w}, entropy};
        },
        Then::right, Then::either);
  }
}
