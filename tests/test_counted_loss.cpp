// CountedLoss: micro-batches that count by what the loss is a mean over.
#include "penalty_helpers.hpp"

using namespace helpers;
using penalty_helpers::TanhNetwork;
using torch::Tensor;

TEST_CASE("a mean over weights by hand", "[counted_loss]") {
  // Sample x weighs |y_x0|, so that L_M = sum over x of |y_x0| (output . y)_x / sum over x of |y_x0|.
  const TanhNetwork network;
  network.y.narrow(0, 4, 4).zero_();  // a whole micro-batch without a weight
  const auto weights = [](const Tensor& y) { return y.select(1, 0).abs(); };
  const auto loss = [&](const Tensor& o, const Tensor& y) {
    return microreg::CountedLoss{((o * y).sum(1) * weights(y)).sum(), weights(y).sum()};
  };
  microreg::Regularizer regularizer(network.model(), loss, microreg::GradientNorm{},
                                    {.strength = 0.7, .micro_batch_size = 4});
  const auto report = regularizer.backward(network.x, network.y);
  const double all = weights(network.y).sum().item<double>();
  double value = 0;
  Tensor grad = torch::zeros_like(network.w);
  for (const auto& [begin, size] : {std::pair{0, 4}, {8, 2}}) {
    const Tensor x = network.x.narrow(0, begin, size), y = network.y.narrow(0, begin, size);
    const double count = weights(y).sum().item<double>();
    const Tensor b = network.of_loss(y) * weights(y).unsqueeze(1) * (size / count);
    const auto penalty = network.squared_norm(x, {b});
    value += count / all * penalty.value.item<double>();
    grad += count / all * (network.gradient(x, b) + 0.7 * penalty.slope);
  }
  CHECK(relative_error(network.w.grad(), grad) < 1e-12);
  CHECK(report.penalties[0].value.item<double>() == Approx(value).epsilon(1e-12));
  const Tensor sums = (network.forward(network.x) * network.y).sum(1) * weights(network.y);
  CHECK(report.loss.item<double>() == Approx(sums.sum().item<double>() / all).epsilon(1e-12));
}

TEST_CASE("a loss that says what it is a mean over", "[counted_loss]") {
  networks::Mlp model = networks::seeded_mlp();
  const auto batch = networks::vectors(10);
  Tensor labels = batch.target.clone();
  labels.narrow(0, 0, 2).fill_(-100);
  labels.narrow(0, 4, 4).fill_(-100);  // a whole micro-batch
  const auto counted = [](const Tensor& o, const Tensor& y) {
    return microreg::CountedLoss{torch::cross_entropy_loss(o, y, {}, at::Reduction::Sum, -100), (y != -100).sum()};
  };
  const auto sum = [&](std::int64_t begin, std::int64_t size) {
    return torch::cross_entropy_loss(model->forward(batch.input.narrow(0, begin, size)), labels.narrow(0, begin, size),
                                     {}, at::Reduction::Sum, -100);
  };
  for (const microreg::Estimator& estimator :
       {microreg::Estimator(microreg::Exact{}), microreg::Estimator(microreg::CentralDifference{}),
        microreg::Estimator(microreg::ForwardDifference{})}) {
    model->zero_grad();
    microreg::Regularizer r(model, counted, microreg::GradientNorm{},
                            {.strength = 0.5, .micro_batch_size = 4, .estimator = estimator});
    const auto report = r.backward(batch.input, labels);
    const Tensor expected =
        step_by_hand({sum(0, 4) / 2, sum(8, 2) / 2}, {0.5, 0.5}, {0.5, 0.5}, 0.5, model->parameters());
    CHECK(relative_error(flat_grad(model->parameters()), expected) < 1e-6);
    CHECK(report.loss.item<double>() == Approx(sum(0, 10).item<double>() / 4).epsilon(1e-12));
  }
  microreg::Regularizer alike(model, counted, microreg::GradientNorm{},
                              {.micro_batch_size = 4, .weighting = microreg::Weighting::reference});
  CHECK(has(message_of<microreg::OptionError>([&] { (void)alike.backward(batch.input, labels); }),
            {"Weighting::reference", "CountedLoss"}));
  labels.fill_(-100);
  microreg::Regularizer r(model, counted, microreg::GradientNorm{}, {.micro_batch_size = 4});
  CHECK(has(message_of<microreg::ModelError>([&] { (void)r.backward(batch.input, labels); }), {"counts", "0"}));
}

TEST_CASE("a counted loss that is none is refused", "[counted_loss]") {
  const TanhNetwork network;
  const auto message = [&](const auto& loss) {
    microreg::Regularizer regularizer(network.model(), loss, microreg::GradientNorm{}, {.micro_batch_size = 4});
    const std::string text =
        message_of<microreg::ModelError>([&] { (void)regularizer.backward(network.x, network.y); });
    CHECK_FALSE(network.w.grad().defined());
    return text;
  };
  const auto counting = [](const Tensor& count) {
    return [=](const Tensor& o, const Tensor&) { return microreg::CountedLoss{o.sum(), count}; };
  };
  CHECK(has(message(counting({})), {"sum and a count", "one value"}));
  CHECK(has(message(counting(torch::ones({2}))), {"sum and a count", "one value"}));
  CHECK(has(message(counting(torch::full({}, -1.0))), {"count", "-1", "at least 0"}));
  CHECK(has(message(counting(torch::full({}, std::numeric_limits<double>::infinity()))), {"count", "inf", "finite"}));
}
