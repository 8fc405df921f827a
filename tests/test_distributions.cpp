// Labels drawn by each distribution follow the model's probabilities, and carry no graph; FisherTrace's gradient with
// its own labels is that of plain autograd.
#include "helpers.hpp"

#include <microreg/microreg.hpp>

#include <cmath>

using namespace helpers;

namespace {

/// Whether `count` successes in `draws` trials of probability `p` lie within 5 standard deviations.
bool plausible(double count, double draws, double p) {
  return std::abs(count - draws * p) < 5 * std::sqrt(draws * p * (1 - p)) + 1;
}

/// R and its gradient by plain autograd, for labels drawn from a generator of the same seed, against FisherTrace.
template <class D, class Nll>
void check_gradient(const D& distribution, const torch::Tensor& x, torch::nn::Sequential model, const Nll& nll) {
  const auto parameters = model->parameters();
  const torch::Tensor output = model->forward(x);
  const torch::Tensor labels = distribution.sample(output, generator(5));
  CHECK_FALSE(labels.requires_grad());
  torch::Tensor exact = torch::zeros({}, output.options().requires_grad(false));
  for (const torch::Tensor& g : torch::autograd::grad({nll(output, labels)}, parameters, {}, true, true)) {
    exact = exact + g.square().sum();
  }
  clear_grad(parameters);
  exact.backward({}, /*retain_graph=*/true);
  const torch::Tensor expected = flat_grad(parameters);
  clear_grad(parameters);
  const torch::Tensor value = microreg::FisherTrace{distribution}(output, parameters, generator(5));
  value.backward();
  CHECK(relative_error(value, exact) < 1e-12);
  CHECK(relative_error(flat_grad(parameters), expected) < 1e-12);
}

torch::nn::Sequential dense_network(std::int64_t channels) {
  torch::nn::Sequential model(torch::nn::Linear(4, 6), torch::nn::Tanh(), torch::nn::Linear(6, channels));
  model->to(torch::kFloat64);
  return model;
}

torch::nn::Sequential image_network() {
  torch::nn::Sequential model(torch::nn::Conv2d(2, 3, 3), torch::nn::Softplus(), torch::nn::Conv2d(3, 4, 1));
  model->to(torch::kFloat64);
  return model;
}

}  // namespace

TEST_CASE("categorical labels follow the softmax of the logits", "[distributions]") {
  torch::manual_seed(71);
  const auto type = GENERATE(torch::kFloat64, torch::kFloat32, torch::kBFloat16);
  const torch::Tensor p = helpers::tensor({0.5, 0.3, 0.15, 0.05}, torch::kFloat64);
  constexpr std::int64_t draws = 40000;
  const torch::Tensor logits = (p.log() + 3).to(type);
  SECTION("[M, C]") {
    const torch::Tensor labels = microreg::Categorical{}.sample(logits.unsqueeze(0).expand({draws, 4}), generator(1));
    REQUIRE(labels.sizes() == torch::IntArrayRef{draws});
    CHECK(labels.scalar_type() == torch::kInt64);
    const torch::Tensor counts = torch::bincount(labels, {}, 4);
    const torch::Tensor exact = torch::softmax(logits.to(torch::kFloat64), 0);
    for (int c = 0; c < 4; ++c) {
      CHECK(plausible(static_cast<double>(counts[c].item<std::int64_t>()), draws, exact[c].item<double>()));
    }
  }
  SECTION("[M, C, H, W]: each position by its own probabilities") {
    // Opposite preferences at the two positions.
    const torch::Tensor dense = torch::stack({logits, logits.flip(0)}, 1).view({1, 4, 1, 2}).expand({draws, 4, 1, 2});
    const torch::Tensor labels = microreg::Categorical{}.sample(dense, generator(2));
    REQUIRE(labels.sizes() == torch::IntArrayRef({draws, 1, 2}));
    const torch::Tensor exact = torch::softmax(logits.to(torch::kFloat64), 0);
    for (int c = 0; c < 4; ++c) {
      CHECK(plausible(labels.select(2, 0).eq(c).sum().item<double>(), draws, exact[c].item<double>()));
      CHECK(plausible(labels.select(2, 1).eq(3 - c).sum().item<double>(), draws, exact[c].item<double>()));
    }
  }
}

TEST_CASE("Bernoulli and Gaussian labels follow their outputs", "[distributions]") {
  constexpr std::int64_t draws = 40000;
  const torch::Tensor p = helpers::tensor({0.1, 0.5, 0.8}, torch::kFloat64);
  const torch::Tensor logits = (p / (1 - p)).log().expand({draws, 3});
  const torch::Tensor binary = microreg::Bernoulli{}.sample(logits, generator(1));
  CHECK(binary.scalar_type() == torch::kFloat64);
  for (int c = 0; c < 3; ++c) {
    CHECK(plausible(binary.select(1, c).sum().item<double>(), draws, p[c].item<double>()));
  }

  const torch::Tensor mean = helpers::tensor({-2.0, 0.0, 5.0}, torch::kFloat64).expand({draws, 3});
  const torch::Tensor real = microreg::Gaussian{.standard_deviation = 0.3}.sample(mean, generator(2));
  const torch::Tensor offset = real - mean;
  CHECK(offset.mean().item<double>() == Approx(0.0).margin(5 * 0.3 / std::sqrt(3.0 * draws)));
  CHECK(offset.std().item<double>() == Approx(0.3).epsilon(0.02));
}

TEST_CASE("FisherTrace of every distribution against plain autograd", "[distributions]") {
  torch::manual_seed(72);
  const torch::Tensor x = torch::randn({5, 4}, torch::kFloat64);
  const torch::Tensor images = torch::randn({3, 2, 5, 6}, torch::kFloat64);
  // Each negative log-likelihood is written out, sum over the event and mean over samples.
  const auto categorical = [](const torch::Tensor& logits, const torch::Tensor& y) {
    return -(logits - logits.exp().sum(1, true).log()).gather(1, y.unsqueeze(1)).mean();
  };
  const auto bernoulli = [](const torch::Tensor& logits, const torch::Tensor& y) {
    const torch::Tensor p = 1 / (1 + (-logits).exp());
    return -(y * p.log() + (1 - y) * (1 - p).log()).sum(1).mean();
  };
  SECTION("categorical") { check_gradient(microreg::Categorical{}, x, dense_network(3), categorical); }
  SECTION("categorical, dense") { check_gradient(microreg::Categorical{}, images, image_network(), categorical); }
  SECTION("Bernoulli") { check_gradient(microreg::Bernoulli{}, x, dense_network(3), bernoulli); }
  SECTION("Bernoulli, dense") { check_gradient(microreg::Bernoulli{}, images, image_network(), bernoulli); }
  SECTION("Gaussian") {
    check_gradient(microreg::Gaussian{.standard_deviation = 0.5}, x, dense_network(3),
                   [](const torch::Tensor& mean, const torch::Tensor& y) {
                     return ((y - mean).square().sum(1) / (2 * 0.5 * 0.5)).mean();
                   });
  }
  SECTION("a distribution of one's own") {
    const microreg::Distribution poisson{
        [](const torch::Tensor& log_rate, const std::optional<at::Generator>& from) {
          return torch::poisson(log_rate.exp(), from);
        },
        [](const torch::Tensor& log_rate, const torch::Tensor& y) { return (log_rate.exp() - y * log_rate).mean(); }};
    check_gradient(poisson, x, dense_network(1), [](const torch::Tensor& log_rate, const torch::Tensor& y) {
      return log_rate.exp().mean() - (y * log_rate).mean();
    });
  }
}

TEST_CASE("one logit a sample is one event", "[distributions]") {
  const torch::Tensor logits = helpers::tensor({0.5, -1.0, 2.0}, torch::kFloat64);
  const torch::Tensor labels = helpers::tensor({1.0, 0.0, 1.0}, torch::kFloat64);
  const double flat = microreg::Bernoulli{}.negative_log_likelihood(logits, labels).item<double>();
  const double column =
      microreg::Bernoulli{}.negative_log_likelihood(logits.unsqueeze(1), labels.unsqueeze(1)).item<double>();
  CHECK(flat == Approx(column));
}

TEST_CASE("distributions reject what they cannot read", "[distributions]") {
  CHECK(has(message_of<microreg::ModelError>([] { (void)microreg::Categorical{}.sample(torch::ones({4}), {}); }),
            {"Categorical", "[4]", "Bernoulli"}));
  // Of one class every label is certain: the trace would be 0, whatever the network.
  CHECK(has(message_of<microreg::ModelError>([] { (void)microreg::Categorical{}.sample(torch::ones({4, 1}), {}); }),
            {"Categorical", "[4, 1]", "Bernoulli"}));
  for (const double deviation : {0.0, -1.0, std::nan("")}) {
    CHECK(has(
        message_of<microreg::OptionError>([&] { (void)microreg::Gaussian{deviation}.sample(torch::ones({4}), {}); }),
        {"standard_deviation", c10::str(deviation).c_str(), "positive"}));
  }
}

TEST_CASE("classes that lie last", "[distributions]") {
  torch::manual_seed(5);
  const torch::Tensor w = torch::randn({5, 10}, torch::kFloat64).requires_grad_(true);
  microreg::FunctionModel last{[&](const torch::Tensor& x) { return x.matmul(w); }, {w}};
  microreg::FunctionModel second{[&](const torch::Tensor& x) { return x.matmul(w).transpose(1, 2); }, {w}};
  const torch::Tensor x = torch::randn({4, 6, 5}, torch::kFloat64), y = torch::randint(10, {4, 6});
  const auto transposed = [](const torch::Tensor& o, const torch::Tensor& t) {
    return torch::cross_entropy_loss(o.transpose(1, 2), t);
  };
  using microreg::Categorical;
  using microreg::FisherTrace;
  CHECK(has(message_of<microreg::ModelError>([&] { (void)microreg::measure(last, transposed, FisherTrace{}, x, y); }),
            {"[4, 6, 10]", "[4, 6]", "class_dimension = -1"}));
  const auto value = [&](const auto& model, const auto& loss, std::int64_t dimension,
                         microreg::Expectation expectation) {
    return microreg::measure(model, loss, FisherTrace{Categorical{.class_dimension = dimension}, 1, expectation}, x, y,
                             {.generator = generator(3)})
        .penalties[0]
        .value.template item<double>();
  };
  const auto exact = microreg::Expectation::exact;
  CHECK(value(last, transposed, -1, exact) == Approx(value(second, cross_entropy, 1, exact)).epsilon(1e-12));
  CHECK(value(last, transposed, 2, microreg::Expectation::sampled) > 0);
  CHECK_THROWS_AS(value(last, transposed, 3, exact), microreg::ModelError);
}
