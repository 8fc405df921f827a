// The cut of a mini-batch into micro-batches: sizes and weights, a short last one, and a loop over them.
#include "helpers.hpp"
#include "networks.hpp"

#include <microreg/microreg.hpp>

#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

using namespace helpers;
using microreg::BatchError;
using microreg::ShortLast;

TEST_CASE("the cut and its weights", "[micro-batches]") {
  const std::int64_t samples = GENERATE(1, 4, 7, 8, 9, 100);
  const std::int64_t size = GENERATE(1, 4, 8, 1000);
  for (const auto weighting : {microreg::Weighting::samples, microreg::Weighting::reference}) {
    const microreg::MicroBatches cut(samples, size, weighting);
    std::int64_t covered = 0;
    double total = 0;
    for (std::int64_t i = 0; i < cut.count(); ++i) {
      CHECK(cut.begin(i) == covered);
      CHECK(cut.size(i) >= 1);
      CHECK(cut.size(i) <= size);
      CHECK(cut.weight(i) == Approx(weighting == microreg::Weighting::samples
                                        ? static_cast<double>(cut.size(i)) / static_cast<double>(samples)
                                        : 1.0 / static_cast<double>(cut.count())));
      covered += cut.size(i);
      total += cut.weight(i);
    }
    CHECK(covered == samples);
    CHECK(total == Approx(1.0));
    CHECK(cut.count() ==
          static_cast<std::int64_t>(std::ceil(static_cast<double>(samples) / static_cast<double>(size))));
  }
}

TEST_CASE("a short last micro-batch is kept, merged or dropped", "[micro-batches]") {
  networks::Mlp model = networks::seeded_mlp();
  const auto batch = networks::vectors(9);
  const auto gradient = [&](ShortLast last, std::vector<std::int64_t> sizes) {
    model->zero_grad();
    microreg::Regularizer r(model, cross_entropy, microreg::GradientNorm{},
                            {.strength = 0.5, .micro_batch_size = 4, .short_last = last});
    const auto report = r.backward(batch.input, batch.target);
    CHECK(report.micro_batches() == static_cast<std::int64_t>(sizes.size()));
    std::int64_t used = 0;
    for (const std::int64_t size : sizes) {
      used += size;
    }
    CHECK(report.samples == used);
    std::vector<torch::Tensor> losses;
    std::vector<double> weights;
    std::int64_t begin = 0;
    for (const std::int64_t size : sizes) {
      losses.push_back(torch::cross_entropy_loss(model->forward(batch.input.narrow(0, begin, size)),
                                                 batch.target.narrow(0, begin, size)));
      weights.push_back(static_cast<double>(size) / static_cast<double>(used));
      begin += size;
    }
    const torch::Tensor expected = step_by_hand(losses, weights, weights, 0.5, model->parameters());
    CHECK(relative_error(flat_grad(model->parameters()), expected) < 1e-13);
  };
  gradient(ShortLast::kept, {4, 4, 1});
  gradient(ShortLast::merged, {4, 5});
  gradient(ShortLast::dropped, {4, 4});
  // Fewer samples than a micro-batch are one in any case.
  for (const ShortLast last : {ShortLast::kept, ShortLast::merged, ShortLast::dropped}) {
    CHECK(microreg::MicroBatches(3, 4, microreg::Weighting::samples, last).size(0) == 3);
    CHECK(microreg::MicroBatches(8, 4, microreg::Weighting::samples, last).count() == 2);
  }
}

TEST_CASE("a loop of one's own over micro-batches", "[micro-batches]") {
  const torch::Tensor x = torch::arange(20, torch::kFloat32).view({10, 2});
  const torch::Tensor y = torch::arange(10);
  std::int64_t begin = 0;
  double weight = 0;
  for (const auto& [part, first, second] : microreg::micro_batches(4, x, y)) {
    CHECK(part.index == begin / 4);
    CHECK(part.count == 3);
    CHECK(part.begin == begin);
    CHECK(is_view(first, x, begin, part.size));
    CHECK(is_view(second, y, begin, part.size));
    begin += part.size;
    weight += part.weight;
  }
  CHECK(begin == 10);
  CHECK(weight == Approx(1.0));
  CHECK(microreg::micro_batches(4, x).size() == 3);
  CHECK(microreg::micro_batches(std::numeric_limits<std::int64_t>::max(), x).size() == 1);
  CHECK(has(message_of<BatchError>([&] { (void)microreg::micro_batches(4, x, y.narrow(0, 0, 9)); }), {"10", "9"}));
  CHECK(has(message_of<BatchError>([&] { (void)microreg::micro_batches(4, x.narrow(0, 0, 0)); }), {"empty"}));
  CHECK(has(message_of<microreg::OptionError>([&] { (void)microreg::micro_batches(0, x); }), {"is 0"}));
}
