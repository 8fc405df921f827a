// reduced(): the report of a step that several ranks took together.
#include "rank_helpers.hpp"

#include <microreg/distributed/report.hpp>

#include <mutex>
#include <string>
#include <tuple>

using namespace rank_helpers;

TEST_CASE("The reduced report is that of one process, and grafting by it too") {
  const Cut cut{{8, 4, 0, 5}};
  const Samples all = samples_of(17);
  const auto with_parts = [](const torch::Tensor& o, const torch::Tensor& y) {
    return std::make_tuple(cross_entropy(o, y), (o.argmax(1) == y).to(torch::kFloat64).mean());
  };
  const auto penalty = microreg::GradientNorm{} + 0.5 * microreg::AverageJacobian{};
  for (const double share : {1.0, 0.5}) {
    microreg::RegularizerOptions options{
        .strength = 0.1, .micro_batch_size = 4, .sampling = {.share = share}, .gradient_ratio = true};
    auto one = mlp();
    microreg::Regularizer<> alone(one, with_parts, penalty, options);
    const microreg::Report expected = alone.backward(all.x, all.y);
    microreg::graft(one->parameters(), expected.penalties[0].micro_batch_norms[0]);
    run_ranks(4, [&](const Ranks& ranks) {
      auto model = mlp();
      auto own = options;
      own.communicator = ranks;
      microreg::Regularizer<> regularizer(model, with_parts, penalty, own);
      const Samples mine = cut.of(all, ranks);
      const microreg::Report here = regularizer.backward(mine.x, mine.y);
      const microreg::Report report = microreg::reduced(here, *ranks);
      microreg::graft(model->parameters(), report.penalties[0].micro_batch_norms[0]);
      const microreg::Report measured =
          microreg::reduced(microreg::measure(model, with_parts, penalty, mine.x, mine.y,
                                              {.strength = 0.1, .micro_batch_size = 4, .communicator = ranks}),
                            *ranks);
      const std::lock_guard lock(making);
      CHECK(here.samples == cut.sizes[static_cast<std::size_t>(ranks->rank())]);
      CHECK(here.all_micro_batches == 5);
      CHECK(report.samples == 17);
      CHECK(report.penalised == expected.penalised);
      CHECK(relative_error(report.micro_batch_losses, expected.micro_batch_losses) < 1e-12);
      CHECK(report.loss.item<double>() == Approx(expected.loss.item<double>()));
      CHECK(report.loss_parts[0].item<double>() == Approx(expected.loss_parts[0].item<double>()));
      CHECK(report.gradient_norm.item<double>() == Approx(expected.gradient_norm.item<double>()));
      CHECK(report.gradient_ratio.item<double>() == Approx(expected.gradient_ratio.item<double>()));
      for (std::size_t p = 0; p < 2; ++p) {
        CHECK(report.penalties[p].value.item<double>() == Approx(expected.penalties[p].value.item<double>()));
        CHECK(relative_error(report.penalties[p].micro_batch_norms, expected.penalties[p].micro_batch_norms) < 1e-12);
      }
      CHECK(relative_error(helpers::flat_grad(model->parameters()), helpers::flat_grad(one->parameters())) < 1e-12);
      CHECK(measured.loss.item<double>() == Approx(expected.loss.item<double>()));
    });
  }
}

TEST_CASE("A report that is reduced on one rank alone, or of another step, is refused, and the next step goes on") {
  const Samples all = samples_of(8);
  run_ranks(2, [&](const Ranks& ranks) {
    microreg::Regularizer<> regularizer(mlp(), cross_entropy, microreg::GradientNorm{},
                                        {.micro_batch_size = 4, .communicator = ranks});
    const Samples mine = all.narrow(4 * ranks->rank(), 4);
    const microreg::Report first = regularizer.backward(mine.x, mine.y);
    const auto thrown = [](const auto& work) {
      try {
        work();
      } catch (const microreg::OptionError& error) {
        return std::string(error.what());
      }
      return std::string();
    };
    const std::string alone = thrown([&] {
      if (ranks->rank() == 0) {
        static_cast<void>(microreg::reduced(first, *ranks));
      } else {
        regularizer.backward(mine.x, mine.y);
      }
    });
    const microreg::Report second = regularizer.backward(mine.x, mine.y);
    const std::string other =
        thrown([&] { static_cast<void>(microreg::reduced(ranks->rank() == 0 ? first : second, *ranks)); });
    const microreg::Report both = microreg::reduced(second, *ranks);
    const std::string twice = thrown([&] { static_cast<void>(microreg::reduced(both, *ranks)); });
    const std::string foreign = thrown([&] {
      microreg::Regularizer<> of_one(mlp(), cross_entropy, microreg::GradientNorm{}, {.micro_batch_size = 4});
      static_cast<void>(microreg::reduced(of_one.backward(mine.x, mine.y), *ranks));
    });
    const std::lock_guard lock(making);
    CHECK(helpers::has(alone, {"rank 1 calls backward() where rank 0 calls reduced()"}));
    CHECK(helpers::has(other, {"rank 0 of step 0, another one of step 1"}));
    CHECK(both.samples == 8);
    CHECK(helpers::has(twice, {"4 micro-batches together and their step has 2", "reduced already"}));
    CHECK(helpers::has(foreign, {"2 micro-batches together and their step has 1", "without this communicator"}));
  });
}
