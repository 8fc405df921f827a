// Differences that displace copies: right wherever those that displace the parameters are, while nothing is written to
// the parameters.
#include "helpers.hpp"
#include "networks.hpp"

#include <microreg/microreg.hpp>

#include <atomic>
#include <functional>
#include <string>
#include <thread>
#include <vector>

using namespace helpers;
using microreg::CentralDifference;
using microreg::Displace;
using microreg::ForwardDifference;
using torch::Tensor;
namespace nn = torch::nn;

namespace {

using Forward = std::function<Tensor(const Tensor&)>;
using Model = microreg::FunctionModel<Forward>;

const auto copies = {microreg::Estimator(ForwardDifference{.check_every = 0, .displace = Displace::copies}),
                     microreg::Estimator(CentralDifference{.check_every = 0, .displace = Displace::copies})};

/// The penalty's part of .grad.
Tensor penalty_part(const Model& model, const Tensor& x, const Tensor& y, const microreg::Estimator& estimator) {
  Tensor parts[2];
  for (const int strength : {0, 1}) {
    clear_grad(model.parameters);
    torch::manual_seed(11);
    microreg::Regularizer regularizer(Model(model), cross_entropy, microreg::GradientNorm{},
                                      {.strength = static_cast<double>(strength), .estimator = estimator});
    (void)regularizer.backward(x, y);
    parts[strength] = flat_grad(model.parameters);
  }
  clear_grad(model.parameters);
  return parts[1] - parts[0];
}

/// `composed`: the same, where LibTorch's own second derivative is wrong.
void check_right(const std::string& name, const Model& model, const Tensor& x, const Tensor& y,
                 const Forward& composed = {}) {
  INFO(name);
  torch::manual_seed(11);
  const Forward& by_hand = composed ? composed : model.function;
  const Tensor right = penalty_by_hand(torch::cross_entropy_loss(by_hand(x), y), model.parameters);
  const std::vector<Tensor> before = clones(model.parameters);
  std::vector<const void*> memory;
  std::vector<std::int64_t> versions;
  for (const Tensor& parameter : model.parameters) {
    memory.push_back(parameter.const_data_ptr());
    versions.push_back(parameter._version());
  }
  for (const microreg::Estimator& estimator : copies) {
    CHECK(relative_error(penalty_part(model, x, y, estimator), right) < 1e-5);
  }
  for (std::size_t i = 0; i < memory.size(); ++i) {
    CHECK(same_bits(model.parameters[i].detach(), before[i]));
    CHECK(model.parameters[i].const_data_ptr() == memory[i]);
    CHECK(model.parameters[i]._version() == versions[i]);
  }
}

template <class Module>
Model model_of(Module module, const std::function<Tensor(Module&, const Tensor&)>& forward) {
  module->to(torch::kFloat64);
  return {[=](const Tensor& x) mutable { return forward(module, x); }, module->parameters()};
}

}  // namespace

TEST_CASE("displaced copies: networks of every kind are right, and no parameter is written to", "[displaced_copies]") {
  torch::manual_seed(5);
  const Tensor labels = torch::randint(5, {6});
  const Tensor rows = torch::randn({6, 8}, torch::kFloat64);
  const Tensor images = torch::randn({6, 3, 8, 8}, torch::kFloat64);
  const Tensor tokens = torch::randint(7, {6, 4});

  nn::Sequential convolution(nn::Conv2d(nn::Conv2dOptions(3, 6, 3).padding(1)), nn::BatchNorm2d(6), nn::ReLU(),
                             nn::MaxPool2d(2), nn::GroupNorm(2, 6), nn::Flatten(), nn::Dropout(0.3), nn::Linear(96, 5));
  check_right("convolution",
              model_of<nn::Sequential>(convolution, [](auto& m, const Tensor& x) { return m->forward(x); }), images,
              labels);
  {
    const WithoutCudnn composed;
    nn::LSTM lstm(nn::LSTMOptions(3, 5).batch_first(true).num_layers(2));
    check_right("LSTM, whose weights go in a list",
                model_of<nn::LSTM>(lstm,
                                   [](auto& m, const Tensor& x) {
                                     return std::get<0>(m->forward(x.flatten(2).transpose(1, 2))).select(1, -1);
                                   }),
                images, labels);
  }
  {
    nn::TransformerEncoderLayer layer(nn::TransformerEncoderLayerOptions(8, 2).dim_feedforward(16).dropout(0.1));
    check_right(
        "attention",
        model_of<nn::TransformerEncoderLayer>(
            layer, [](auto& m, const Tensor& x) { return m->forward(x.unsqueeze(0)).select(0, 0).narrow(1, 0, 5); }),
        rows, labels);
  }
  {
    nn::Embedding embedding(7, 5);
    embedding->to(torch::kFloat64);
    check_right("tied weights",
                Model{[=](const Tensor& t) mutable {
                        return torch::tanh(embedding(t)).sum(1).matmul(embedding->weight.t()).narrow(1, 0, 5);
                      },
                      embedding->parameters()},
                tokens, labels);
    const Tensor second = embedding->weight.detach().requires_grad_();
    check_right("two leaves on one memory",
                Model{[=](const Tensor& t) mutable {
                        return torch::tanh(embedding(t)).sum(1).matmul(second.t()).narrow(1, 0, 5);
                      },
                      {embedding->weight, second}},
                tokens, labels);
  }
  {
    const auto leaf = [](at::IntArrayRef shape) { return torch::randn(shape, torch::kFloat64).requires_grad_(); };
    const Tensor a = leaf({8, 6}), b = leaf({6, 5}), c = leaf({8, 6}), g = leaf({6, 1});
    const Tensor expanded = torch::randn({1, 6}, torch::kFloat64).expand({8, 6}).detach().requires_grad_();
    check_right("an expanded leaf",
                Model{[=](const Tensor& x) { return torch::tanh(x.matmul(expanded)).matmul(b); }, {expanded, b}}, rows,
                labels);
    std::vector<Tensor> held;  // on a device LibTorch differentiates only a view that somebody holds twice
    check_right("lists, views, and what writes in place",
                Model{[=, &held](const Tensor& x) {
                        Tensor h = x.matmul(torch::stack({a, c}).sum(0)) + torch::cat({g, g}).t().narrow(1, 3, 6);
                        held.push_back(h.narrow(1, 0, 3).mul_(g.flatten().narrow(0, 0, 3)).tanh_());
                        return h.matmul(b.t().contiguous().t());
                      },
                      {a, b, c, g}},
                rows, labels);
    const auto with = [=](const Tensor& x, const Tensor& weight) { return torch::tanh(x.matmul(weight)).matmul(b); };
    check_right("weight normalisation",
                Model{[=](const Tensor& x) { return with(x, at::_weight_norm(a.t(), g, 0).t()); }, {a, b, g}}, rows,
                labels, [=](const Tensor& x) { return with(x, (g * a.t() / a.t().norm(2, {1}, true)).t()); });
    check_right(
        "a loss that reads values past the graph",
        Model{[=](const Tensor& x) { return torch::tanh(x.matmul(a)).matmul(b) * (1 + 0.1 * a.detach().mean()); },
              {a, b}},
        rows, labels);
  }
}

TEST_CASE("displaced copies: every penalty, and the parameters that are selected", "[displaced_copies]") {
  torch::manual_seed(6);
  nn::Sequential model(nn::Linear(6, 8), nn::ReLU(), nn::Linear(8, 5));
  model->to(torch::kFloat64);
  const Tensor x = torch::randn({8, 6}, torch::kFloat64), y = torch::randint(5, {8});
  const auto grad = [&](const microreg::Estimator& estimator, const auto& penalty) {
    clear_grad(model->parameters());
    microreg::Regularizer regularizer(
        model, cross_entropy, penalty,
        {.strength = 0.3,
         .micro_batch_size = 4,
         .estimator = estimator,
         .select = [](const std::string& name, const Tensor& /*parameter*/) { return name == "2.weight"; },
         .generator = generator(3)});
    (void)regularizer.backward(x, y);
    return flat_grad(model->parameters());
  };
  const auto check = [&](const auto& penalty) {
    const Tensor right = grad(microreg::Exact{}, penalty);
    for (const microreg::Estimator& estimator : copies) {
      CHECK(relative_error(grad(estimator, penalty), right) < 1e-6);
    }
  };
  check(microreg::GradientNorm{});
  check(microreg::FisherTrace{});
  check(microreg::UnitJacobian{});
  check(microreg::InputJacobian{});
  check(microreg::Unsquared{microreg::GradientNorm{}});
}

TEST_CASE("displaced copies: another thread may read the parameters at any time", "[displaced_copies][threads]") {
  torch::manual_seed(7);
  nn::Sequential model(nn::Linear(64, 256), nn::Tanh(), nn::Linear(256, 256), nn::Tanh(), nn::Linear(256, 5));
  const Tensor x = torch::randn({64, 64}), y = torch::randint(5, {64});
  const std::vector<Tensor> before = clones(model->parameters());
  std::atomic<bool> stop = false;
  std::atomic<int> reads = 0;
  std::atomic<int> others = 0;
  std::thread average([&] {
    const torch::NoGradGuard no_grad;
    while (!stop) {
      for (std::size_t i = 0; i < before.size(); ++i) {
        others += at::equal(model->parameters()[i], before[i]) ? 0 : 1;
      }
      ++reads;
    }
  });
  microreg::Regularizer regularizer(
      model, cross_entropy, microreg::GradientNorm{},
      {.strength = 0.1, .micro_batch_size = 16, .estimator = ForwardDifference{.displace = Displace::copies}});
  for (int step = 0; step < 10 || reads < 10; ++step) {
    model->zero_grad();
    (void)regularizer.backward(x, y);
  }
  stop = true;
  average.join();
  CHECK(reads >= 10);
  CHECK(others == 0);
}

TEST_CASE("displaced copies: what they do not reach is refused", "[displaced_copies][threads]") {
  torch::manual_seed(8);
  const auto leaf = [](at::IntArrayRef shape) { return torch::randn(shape, torch::kFloat64).requires_grad_(); };
  const Tensor a = leaf({6, 8}), b = leaf({8, 5});
  const Tensor x = torch::randn({8, 6}, torch::kFloat64), y = torch::randint(5, {8});
  const auto refused = [&](const Forward& forward) {
    for (const auto& estimator : {microreg::Estimator(ForwardDifference{.displace = Displace::copies}),
                                  microreg::Estimator(CentralDifference{.displace = Displace::copies})}) {
      clear_grad({a, b});
      microreg::Regularizer regularizer(Model{forward, {a, b}}, cross_entropy, microreg::GradientNorm{},
                                        {.estimator = estimator});
      CHECK_THROWS_AS(regularizer.backward(x, y), microreg::Error);
      CHECK_FALSE(a.grad().defined());
    }
  };
  refused([&](const Tensor& in) {  // a layer in another thread
    Tensor h;
    std::thread([&] { h = torch::tanh(in.matmul(a)); }).join();
    return h.matmul(b);
  });
  Tensor kept;
  refused([&](const Tensor& in) {  // a view that is made once
    kept = kept.defined() ? kept : a * 2;
    return torch::tanh(in.matmul(kept)).matmul(b);
  });
}

TEST_CASE("displaced copies: a step on another model inside of a pass leaves them in place", "[displaced_copies]") {
  torch::manual_seed(9);
  const auto leaf = [](at::IntArrayRef shape) { return torch::randn(shape, torch::kFloat64).requires_grad_(); };
  const Tensor a = leaf({6, 8}), b = leaf({8, 5}), c = leaf({4, 4});
  const Tensor x = torch::randn({8, 6}, torch::kFloat64), y = torch::randint(5, {8});
  const Tensor other = torch::randn({6, 4}, torch::kFloat64);
  const auto loss = [](const Tensor& output, const Tensor& target) { return torch::mse_loss(output, target); };
  microreg::Regularizer inner(Model{[=](const Tensor& in) { return torch::tanh(in.matmul(c)); }, {c}}, loss,
                              microreg::GradientNorm{}, {.estimator = ForwardDifference{.displace = Displace::copies}});
  const Model plain{[=](const Tensor& in) { return torch::tanh(in.matmul(a)).matmul(b); }, {a, b}};
  const Model nested{[&](const Tensor& in) {
                       const Tensor h = torch::tanh(in.matmul(a));
                       (void)inner.backward(other, other);
                       return h.matmul(b);
                     },
                     {a, b}};
  const Tensor right = penalty_by_hand(torch::cross_entropy_loss(plain.function(x), y), {a, b});
  for (const microreg::Estimator& estimator : copies) {
    CHECK(relative_error(penalty_part(nested, x, y, estimator), right) < 1e-5);
  }
}
