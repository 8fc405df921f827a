// What must hold of the objective whatever the network: splitting, weights, order, strengths, sums.
#include "helpers.hpp"
#include "networks.hpp"

#include <microreg/microreg.hpp>

using namespace helpers;

namespace {

struct Outcome {
  torch::Tensor grad;
  microreg::Report report;
};

template <class Model, class Loss, class Penalty>
Outcome step(Model model, const Loss& loss, const Penalty& penalty, const networks::Samples& batch,
             microreg::RegularizerOptions options) {
  clear_grad(model->parameters());
  microreg::Regularizer regularizer(model, loss, penalty, std::move(options));
  microreg::Report report = regularizer.backward(batch.input, batch.target);
  return {flat_grad(model->parameters()), std::move(report)};
}

/// The gradient of loss + strength * penalty, through the functor, of the samples [begin, begin + size).
torch::Tensor unsplit_gradient(networks::Mlp model, const networks::Samples& batch, double strength, std::int64_t begin,
                               std::int64_t size) {
  clear_grad(model->parameters());
  const torch::Tensor loss = torch::cross_entropy_loss(model->forward(batch.input.narrow(0, begin, size)),
                                                       batch.target.narrow(0, begin, size));
  (loss + strength * microreg::GradientNorm{}(loss, model->parameters())).backward();
  return flat_grad(model->parameters());
}

torch::Tensor plain_gradient(networks::Mlp model, const networks::Samples& batch) {
  clear_grad(model->parameters());
  torch::cross_entropy_loss(model->forward(batch.input), batch.target).backward();
  return flat_grad(model->parameters());
}

}  // namespace

TEST_CASE("a micro-batch of the whole batch's size, or larger, is the unsplit penalty", "[property]") {
  auto model = networks::seeded_mlp();
  const auto batch = networks::vectors(9);
  const auto size = GENERATE(9, 10, 1000000);
  const Outcome split =
      step(model, cross_entropy, microreg::GradientNorm{}, batch, {.strength = 0.4, .micro_batch_size = size});
  CHECK(split.report.micro_batches() == 1);
  CHECK(relative_error(split.grad, unsplit_gradient(model, batch, 0.4, 0, 9)) < 1e-13);
}

TEST_CASE("the order of samples inside a micro-batch does not matter", "[property]") {
  auto cnn = networks::seeded_cnn(networks::Norm::batch, networks::Activation::kinked);
  const auto batch = networks::images(8);
  // Permutes within [0, 4) and within [4, 8).
  const torch::Tensor order = helpers::tensor({2, 0, 3, 1, 7, 4, 6, 5});
  const networks::Samples shuffled{batch.input.index_select(0, order), batch.target.index_select(0, order)};
  const auto check = [&](const auto& penalty) {
    const Outcome a = step(cnn, cross_entropy, penalty, batch, {.micro_batch_size = 4, .generator = generator(1)});
    const Outcome b = step(cnn, cross_entropy, penalty, shuffled, {.micro_batch_size = 4, .generator = generator(1)});
    CHECK(relative_error(b.grad, a.grad) < 1e-12);
    CHECK(relative_error(b.report.penalties[0].micro_batch_norms, a.report.penalties[0].micro_batch_norms) < 1e-12);
  };
  check(microreg::GradientNorm{});
  check(microreg::AverageJacobian{});
  check(microreg::UnitJacobian{});
  // Across micro-batches it does matter, or the comparison above would prove nothing.
  const torch::Tensor across = helpers::tensor({0, 5, 2, 7, 4, 1, 6, 3});
  const networks::Samples mixed{batch.input.index_select(0, across), batch.target.index_select(0, across)};
  const Outcome a = step(cnn, cross_entropy, microreg::GradientNorm{}, batch, {.micro_batch_size = 4});
  const Outcome b = step(cnn, cross_entropy, microreg::GradientNorm{}, mixed, {.micro_batch_size = 4});
  CHECK(relative_error(b.grad, a.grad) > 1e-3);
}

TEST_CASE("a ragged last micro-batch counts by its samples, or fully with the reference weights", "[property]") {
  auto model = networks::seeded_mlp();
  const auto batch = networks::vectors(10);
  const torch::Tensor first = unsplit_gradient(model, batch, 0.4, 0, 4);
  const torch::Tensor second = unsplit_gradient(model, batch, 0.4, 4, 4);
  const torch::Tensor last = unsplit_gradient(model, batch, 0.4, 8, 2);
  const Outcome samples =
      step(model, cross_entropy, microreg::GradientNorm{}, batch, {.strength = 0.4, .micro_batch_size = 4});
  CHECK(relative_error(samples.grad, 0.4 * first + 0.4 * second + 0.2 * last) < 1e-13);
  const Outcome reference = step(model, cross_entropy, microreg::GradientNorm{}, batch,
                                 {.strength = 0.4, .micro_batch_size = 4, .weighting = microreg::Weighting::reference});
  CHECK(relative_error(reference.grad, (first + second + last) / 3) < 1e-13);
  CHECK(reference.report.micro_batches() == 3);
  CHECK(reference.report.samples == 10);
  // By samples, the loss is the mean over the whole batch.
  const torch::Tensor whole = torch::cross_entropy_loss(model->forward(batch.input), batch.target);
  CHECK(relative_error(samples.report.loss, whole) < 1e-14);
  CHECK(relative_error(reference.report.loss, reference.report.micro_batch_losses.mean()) < 1e-14);
}

TEST_CASE("every penalty changes the gradient, in proportion to its strength", "[property]") {
  auto model = networks::seeded_mlp();
  const auto batch = networks::vectors(10);
  const torch::Tensor plain = plain_gradient(model, batch);
  const auto check = [&](const auto& penalty) {
    const auto at = [&](double strength) {
      return step(model, cross_entropy, penalty, batch,
                  {.strength = strength, .micro_batch_size = 4, .generator = generator(2)});
    };
    CHECK(relative_error(at(1).grad, plain) > 1e-2);
    CHECK(relative_error(at(3).grad - plain, 3 * (at(1).grad - plain)) < 1e-12);
    const Outcome zero = at(0);
    CHECK(relative_error(zero.grad, plain) < 1e-13);
    // Still measured, and from the same draws.
    CHECK(relative_error(zero.report.penalties[0].value, at(1).report.penalties[0].value) < 1e-13);
  };
  check(microreg::GradientNorm{});
  check(microreg::FisherTrace{});
  check(microreg::AverageJacobian{});
  check(microreg::UnitJacobian{});
}

TEST_CASE("several penalties at once are the sum of each", "[property]") {
  auto model = networks::seeded_mlp();
  const auto batch = networks::vectors(10);
  const torch::Tensor plain = plain_gradient(model, batch);
  const auto alone = [&](const auto& penalty, double strength) {
    return step(model, cross_entropy, penalty, batch, {.strength = strength, .micro_batch_size = 4}).grad - plain;
  };
  const microreg::SquaredGradientNorm custom{[](const torch::Tensor& output) { return output.logsumexp(1).mean(); }};
  // 2.0 is the common factor, on top of each one's own strength.
  const Outcome sum =
      step(model, cross_entropy, 0.3 * microreg::GradientNorm{} + 0.02 * microreg::AverageJacobian{} + custom, batch,
           {.strength = 2.0, .micro_batch_size = 4});
  const torch::Tensor expected =
      plain + alone(microreg::GradientNorm{}, 0.6) + alone(microreg::AverageJacobian{}, 0.04) + alone(custom, 2.0);
  CHECK(relative_error(sum.grad, expected) < 1e-12);
  CHECK(sum.report.penalties.size() == 3);
  CHECK(sum.report.penalty("average_jacobian").strength == Approx(0.04));
  CHECK(sum.report.penalty("custom").strength == Approx(2.0));
  const auto& found = sum.report;
  CHECK(found.objective().item<double>() == Approx((found.loss + 0.6 * found.penalties[0].value +
                                                    0.04 * found.penalties[1].value + 2 * found.penalties[2].value)
                                                       .item<double>()));
  // The same penalty twice counts twice.
  const Outcome twice = step(model, cross_entropy, 0.1 * microreg::GradientNorm{} + 0.2 * microreg::GradientNorm{},
                             batch, {.micro_batch_size = 4});
  CHECK(relative_error(twice.grad, plain + alone(microreg::GradientNorm{}, 0.3)) < 1e-12);
}

TEST_CASE("an existing .grad is added to", "[property]") {
  auto model = networks::seeded_mlp();
  const auto batch = networks::vectors(10);
  const torch::Tensor once = step(model, cross_entropy, microreg::GradientNorm{}, batch, {.micro_batch_size = 4}).grad;
  clear_grad(model->parameters());
  model->hidden->weight.mutable_grad() = torch::full_like(model->hidden->weight, 5.0);
  const torch::Tensor given = flat_grad(model->parameters());
  const torch::Tensor handle = model->hidden->weight.grad();
  microreg::Regularizer regularizer(model, cross_entropy, microreg::GradientNorm{}, {.micro_batch_size = 4});
  const auto report = regularizer.backward(batch.input, batch.target);
  CHECK(relative_error(flat_grad(model->parameters()), given + once) < 1e-14);
  // In place, so that an optimizer's or a bucket's view of it stays valid; and gradient_norm is of what was added.
  CHECK(model->hidden->weight.grad().is_same(handle));
  CHECK(report.gradient_norm.item<double>() == Approx(once.norm().item<double>()));
  (void)regularizer.backward(batch.input, batch.target);
  CHECK(relative_error(flat_grad(model->parameters()), given + 2 * once) < 1e-13);
  CHECK_FALSE(model->output->weight.grad().requires_grad());
}

TEST_CASE("a loss that sums gives the same as one that averages", "[property]") {
  auto model = networks::seeded_mlp();
  const auto batch = networks::vectors(10);
  const torch::nn::CrossEntropyLoss sum(torch::nn::CrossEntropyLossOptions().reduction(torch::kSum));
  const auto penalty = 0.5 * microreg::GradientNorm{} + 0.1 * microreg::AverageJacobian{};
  const Outcome mean = step(model, cross_entropy, penalty, batch, {.micro_batch_size = 4});
  const Outcome summed =
      step(model, sum, penalty, batch, {.micro_batch_size = 4, .reduction = microreg::Reduction::sum});
  CHECK(relative_error(summed.grad, mean.grad) < 1e-12);
  CHECK(relative_error(summed.report.loss, mean.report.loss) < 1e-12);
  CHECK(relative_error(summed.report.penalties[0].value, mean.report.penalties[0].value) < 1e-12);
}

TEST_CASE("channels-last inputs and weights give the same gradient", "[property]") {
  auto cnn = networks::seeded_cnn(networks::Norm::batch, networks::Activation::kinked);
  const auto batch = networks::images(10);
  const Outcome contiguous = step(cnn, cross_entropy, microreg::GradientNorm{}, batch, {.micro_batch_size = 4});
  {
    const torch::NoGradGuard no_grad;
    for (torch::Tensor& parameter : cnn->parameters()) {
      if (parameter.dim() == 4) {
        parameter.set_data(parameter.contiguous(torch::MemoryFormat::ChannelsLast));
      }
    }
  }
  const networks::Samples last{batch.input.contiguous(torch::MemoryFormat::ChannelsLast), batch.target};
  const Outcome channels_last = step(cnn, cross_entropy, microreg::GradientNorm{}, last, {.micro_batch_size = 4});
  CHECK(relative_error(channels_last.grad, contiguous.grad) < 1e-12);
}
