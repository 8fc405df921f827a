// Several ranks, as threads of this process, against what one process makes of the same samples.
#include "helpers.hpp"
#include "networks.hpp"
#include "own_functions.hpp"
#include "rank_helpers.hpp"

#include <microreg/distributed/report.hpp>
#include <microreg/microreg.hpp>
#include <microreg/verify.hpp>

#include <mutex>

using namespace rank_helpers;

namespace {

/// .grad on every rank after steps 0 to `steps`, which have to agree bitwise; that of the last step.
torch::Tensor grad_on_ranks(const Cut& cut, const Samples& all, const microreg::AnyPenalty<>& penalty,
                            const microreg::RegularizerOptions& options, std::int64_t step = 0) {
  std::mutex mutex;
  std::vector<torch::Tensor> grads;
  run_ranks(cut.count(), [&](const Ranks& ranks) {
    auto model = mlp();
    auto own = options;
    own.communicator = ranks;
    own.generator = seeded(100 + static_cast<std::uint64_t>(ranks->rank()));
    microreg::Regularizer<> regularizer(model, cross_entropy, penalty, own);
    regularizer.set_step(step);
    const Samples mine = cut.of(all, ranks);
    regularizer.backward(mine.x, mine.y);
    const std::lock_guard lock(mutex);
    grads.push_back(helpers::flat_grad(model->parameters()));
  });
  for (const torch::Tensor& grad : grads) {
    CHECK(torch::equal(grad, grads.front()));
  }
  return grads.front();
}

/// The same of one process that has the samples of rank r alone, scaled to what they count, and added up.
torch::Tensor grad_of_shards(const Cut& cut, const Samples& all, const microreg::AnyPenalty<>& penalty,
                             const microreg::RegularizerOptions& options) {
  torch::Tensor sum;
  for (std::int64_t r = 0; r < cut.count(); ++r) {
    const std::int64_t size = cut.sizes[static_cast<std::size_t>(r)];
    if (size == 0) {
      continue;
    }
    auto model = mlp();
    auto own = options;
    own.generator = seeded(100 + static_cast<std::uint64_t>(r));
    microreg::Regularizer<> regularizer(model, cross_entropy, penalty, own);
    const Samples mine = all.narrow(cut.begin(r), size);
    regularizer.backward(mine.x, mine.y);
    const torch::Tensor part =
        helpers::flat_grad(model->parameters()) * (static_cast<double>(size) / static_cast<double>(all.x.size(0)));
    sum = sum.defined() ? sum + part : part;
  }
  return sum;
}

/// One process on all samples.
torch::Tensor grad_of_one(const Samples& all, const microreg::AnyPenalty<>& penalty,
                          const microreg::RegularizerOptions& options, std::int64_t step = 0) {
  auto model = mlp();
  microreg::Regularizer<> regularizer(model, cross_entropy, penalty, options);
  regularizer.set_step(step);
  regularizer.backward(all.x, all.y);
  return helpers::flat_grad(model->parameters());
}

}  // namespace

TEST_CASE("Several ranks take the step of one process: shards that are unequal, ragged, or empty") {
  for (const Cut& cut : {Cut{{16, 8}}, Cut{{10, 7, 0, 5}}, Cut{{0, 1, 3}}}) {
    const Samples all = samples_of(cut.begin(cut.count()));
    for (const auto weighting : {microreg::Weighting::samples, microreg::Weighting::reference}) {
      const torch::Tensor grad = grad_on_ranks(cut, all, microreg::GradientNorm{},
                                               {.strength = 0.3, .micro_batch_size = 4, .weighting = weighting});
      CHECK(relative_error(grad, textbook(cut, all, 4, 0.3, weighting == microreg::Weighting::reference)) < 1e-12);
    }
  }
}

TEST_CASE("Several ranks take the step of one process: every penalty and estimator") {
  const Cut cut{{12, 5, 8}};
  const Samples all = samples_of(25);
  const std::vector<microreg::AnyPenalty<>> penalties{
      microreg::GradientNorm{},    microreg::FisherTrace{},
      microreg::AverageJacobian{}, microreg::UnitJacobian{},
      microreg::InputJacobian{},   0.1 * microreg::GradientNorm{} + 0.01 * microreg::UnitJacobian{}};
  for (std::size_t i = 0; i < penalties.size(); ++i) {
    INFO("penalty " << i);
    const microreg::RegularizerOptions options{.strength = 0.2, .micro_batch_size = 4};
    CHECK(relative_error(grad_on_ranks(cut, all, penalties[i], options),
                         grad_of_shards(cut, all, penalties[i], options)) < 1e-12);
  }
  for (const microreg::Estimator& estimator :
       {microreg::Estimator(microreg::ForwardDifference{}), microreg::Estimator(microreg::CentralDifference{})}) {
    for (const auto& penalty : {penalties[0], penalties[1], penalties[5]}) {
      const microreg::RegularizerOptions options{.strength = 0.2, .micro_batch_size = 4, .estimator = estimator};
      CHECK(relative_error(grad_on_ranks(cut, all, penalty, options), grad_of_shards(cut, all, penalty, options)) <
            1e-12);
    }
  }
}

TEST_CASE("Several ranks draw the penalised share over the micro-batches of all") {
  const Cut cut{{12, 4, 8}};
  const Samples all = samples_of(24);
  for (std::int64_t step = 0; step < 6; ++step) {
    INFO("step " << step);
    const microreg::RegularizerOptions options{
        .strength = 0.2, .micro_batch_size = 4, .sampling = {.share = 0.4, .every = 2, .seed = 3}};
    CHECK(relative_error(grad_on_ranks(cut, all, microreg::GradientNorm{}, options, step),
                         grad_of_one(all, microreg::GradientNorm{}, options, step)) < 1e-12);
  }
}

TEST_CASE("Several ranks make the loss that one process makes: sums, and counts of their own") {
  const Cut cut{{9, 0, 4}};
  const Samples all = samples_of(13);
  const auto sum = [](const torch::Tensor& o, const torch::Tensor& y) {
    return torch::nll_loss(o.log_softmax(1), y, {}, at::Reduction::Sum);
  };
  const auto counted = [](const torch::Tensor& o, const torch::Tensor& y) {
    return microreg::CountedLoss{torch::nll_loss(o.log_softmax(1), y, {}, at::Reduction::Sum, 2), (y != 2).sum()};
  };
  for (const auto reduction : {microreg::Reduction::sum, microreg::Reduction::total, microreg::Reduction::mean}) {
    const auto make = [&](networks::Mlp model, const Ranks& ranks) {
      microreg::RegularizerOptions options{
          .strength = 0.2, .micro_batch_size = 3, .reduction = reduction, .communicator = ranks};
      if (reduction == microreg::Reduction::mean) {
        return microreg::Regularizer<>(model, counted, microreg::GradientNorm{}, options);
      }
      return microreg::Regularizer<>(model, sum, microreg::GradientNorm{}, options);
    };
    auto one = mlp();
    const microreg::Report expected = make(one, nullptr).backward(all.x, all.y);
    run_ranks(3, [&](const Ranks& ranks) {
      auto model = mlp();
      auto regularizer = make(model, ranks);
      const Samples mine = cut.of(all, ranks);
      const microreg::Report report = microreg::reduced(regularizer.backward(mine.x, mine.y), *ranks);
      const std::lock_guard lock(making);
      CHECK(relative_error(helpers::flat_grad(model->parameters()), helpers::flat_grad(one->parameters())) < 1e-12);
      CHECK(report.loss.item<double>() == Approx(expected.loss.item<double>()));
      CHECK(report.penalties[0].value.item<double>() == Approx(expected.penalties[0].value.item<double>()));
    });
  }
}

TEST_CASE("A parameter that takes part on one rank alone has the same gradient on all; on none, no gradient") {
  const Samples all = samples_of(8);
  run_ranks(2, [&](const Ranks& ranks) {
    const torch::Tensor w = torch::full({6, networks::classes}, 0.1, torch::kFloat64).requires_grad_();
    const torch::Tensor here = torch::full({networks::classes}, 0.2, torch::kFloat64).requires_grad_();
    const torch::Tensor nowhere = torch::zeros({3}, torch::kFloat64).requires_grad_();
    microreg::FunctionModel model{[&](const torch::Tensor& x) {
                                    const torch::Tensor o = x.matmul(w).tanh();
                                    return ranks->rank() == 1 ? o * here : o;
                                  },
                                  {w, here, nowhere}};
    microreg::Regularizer<> regularizer(model, cross_entropy, microreg::GradientNorm{},
                                        {.micro_batch_size = 4, .communicator = ranks});
    const Samples mine = all.narrow(4 * ranks->rank(), 4);
    regularizer.backward(mine.x, mine.y);
    const torch::Tensor expected = [&] {  // rank 1 counts a half
      const torch::Tensor loss = cross_entropy(all.x.narrow(0, 4, 4).matmul(w).tanh() * here, all.y.narrow(0, 4, 4));
      const auto g = torch::autograd::grad({loss}, {w, here}, {}, true, true);
      return torch::autograd::grad({(loss + g[0].square().sum() + g[1].square().sum()) / 2}, {here})[0];
    }();
    const std::lock_guard lock(making);
    CHECK(relative_error(here.grad(), expected) < 1e-12);
    CHECK(w.grad().defined());
    CHECK_FALSE(nowhere.grad().defined());
  });
}

TEST_CASE("The first step makes the ranks equal, and training keeps them so; running statistics are merged") {
  const Cut cut{{8, 4}};
  auto generator = seeded(5);
  const Samples all{torch::randn({12, 2, 6, 6}, generator, torch::kFloat64),
                    torch::randint(0, networks::classes, {12}, generator, torch::kInt64)};
  const auto cnn = [](std::uint64_t seed) {
    const std::lock_guard lock(making);
    torch::manual_seed(seed);
    networks::Cnn model(networks::Norm::batch);
    model->to(torch::kFloat64);
    return model;
  };
  for (const auto how : {microreg::RankBuffers::averaged, microreg::RankBuffers::first_rank}) {
    // Each rank's own statistics after one step, from one process that has its samples alone.
    std::vector<std::vector<torch::Tensor>> alone;
    for (std::int64_t r = 0; r < 2; ++r) {
      auto model = cnn(1);
      microreg::Regularizer<> regularizer(model, cross_entropy, microreg::GradientNorm{}, {.micro_batch_size = 4});
      const Samples mine = all.narrow(cut.begin(r), cut.sizes[static_cast<std::size_t>(r)]);
      regularizer.backward(mine.x, mine.y);
      alone.push_back(model->buffers());
    }
    std::vector<torch::Tensor> weights(2);
    run_ranks(2, [&](const Ranks& ranks) {
      auto model = cnn(static_cast<std::uint64_t>(1 + ranks->rank()));
      torch::optim::SGD optimizer(model->parameters(), 0.1);
      microreg::Regularizer<> regularizer(model, cross_entropy, microreg::GradientNorm{},
                                          {.micro_batch_size = 4, .communicator = ranks, .rank_buffers = how});
      const Samples mine = cut.of(all, ranks);
      for (int step = 0; step < 3; ++step) {
        optimizer.zero_grad();
        regularizer.backward(mine.x, mine.y);
        if (step == 0) {
          const std::lock_guard lock(making);
          for (std::size_t i = 0; i < alone[0].size(); ++i) {
            const torch::Tensor is = model->buffers()[i];
            if (!is.is_floating_point() || how == microreg::RankBuffers::first_rank) {
              CHECK(torch::allclose(is, alone[0][i], 1e-12, 1e-12));
            } else {
              CHECK(torch::allclose(is, (2 * alone[0][i] + alone[1][i]) / 3, 1e-12, 1e-12));
            }
          }
        }
        optimizer.step();
      }
      weights[static_cast<std::size_t>(ranks->rank())] =
          torch::cat({torch::nn::utils::parameters_to_vector(model->parameters()).detach(),
                      model->named_buffers()["norm1.running_mean"]});
    });
    CHECK(torch::equal(weights[0], weights[1]));
  }
}

TEST_CASE("The first step makes frozen parameters equal too; ranks that freeze different ones are refused") {
  const Samples all = samples_of(8);
  const auto frozen = [](std::uint64_t seed) {
    auto model = mlp(seed);
    model->parameters().front().set_requires_grad(false);
    return model;
  };
  auto one = frozen(1);
  microreg::Regularizer<>(one, cross_entropy, microreg::GradientNorm{}, {.micro_batch_size = 4}).backward(all.x, all.y);
  run_ranks(2, [&](const Ranks& ranks) {
    auto model = frozen(static_cast<std::uint64_t>(1 + ranks->rank()));
    microreg::Regularizer<> regularizer(model, cross_entropy, microreg::GradientNorm{},
                                        {.micro_batch_size = 4, .communicator = ranks});
    const Samples mine = all.narrow(4 * ranks->rank(), 4);
    regularizer.backward(mine.x, mine.y);
    const std::lock_guard lock(making);
    CHECK(relative_error(helpers::flat_grad(model->parameters()), helpers::flat_grad(one->parameters())) < 1e-12);
  });
  const auto errors = try_ranks(2, [&](const Ranks& ranks) {
    const torch::Tensor a = torch::eye(6, torch::kFloat64), b = 2 * a;  // of one shape
    (ranks->rank() == 0 ? a : b).set_requires_grad(true);
    microreg::FunctionModel model{[&](const torch::Tensor& x) { return x.matmul(a).tanh().matmul(b); }, {a, b}};
    microreg::Regularizer<>(model, cross_entropy, microreg::GradientNorm{}, {.communicator = ranks})
        .backward(all.x, all.y);
  });
  CHECK(is<microreg::ModelError>(errors[0]));
  CHECK(is<microreg::ModelError>(errors[1]));
  CHECK(helpers::has(words_of(errors[0]), {"rank 1 has parameters or buffers of other number, name"}));
}

TEST_CASE("What goes wrong on one rank goes wrong on all, and nothing has changed; the next step goes on") {
  const Cut cut{{8, 4}};
  const Samples all = samples_of(12);
  enum class Wrong { batch, loss, nan, parameter_frozen };
  for (const Wrong wrong : {Wrong::batch, Wrong::loss, Wrong::nan, Wrong::parameter_frozen}) {
    INFO("case " << static_cast<int>(wrong));
    const auto errors = try_ranks(2, [&](const Ranks& ranks) {
      auto model = mlp();
      bool throwing = false;
      const auto loss = [&](const torch::Tensor& o, const torch::Tensor& y) {
        if (throwing && wrong == Wrong::loss) {
          throw std::runtime_error("the loss of rank 1");
        }
        return cross_entropy(o, y) * (throwing && wrong == Wrong::nan ? std::nan("") : 1.0);
      };
      microreg::Regularizer<> regularizer(
          model, loss, microreg::GradientNorm{},
          {.micro_batch_size = 4, .check_finite = microreg::CheckFinite::always, .communicator = ranks});
      const Samples mine = cut.of(all, ranks);
      regularizer.backward(mine.x, mine.y);
      const torch::Tensor before = helpers::flat_grad(model->parameters());
      throwing = ranks->rank() == 1;
      if (throwing && wrong == Wrong::parameter_frozen) {
        model->parameters().front().set_requires_grad(false);
      }
      std::exception_ptr error;
      try {
        regularizer.backward(mine.x, throwing && wrong == Wrong::batch ? mine.y.narrow(0, 0, 3) : mine.y);
      } catch (const microreg::Error&) {
        error = std::current_exception();
      } catch (const std::runtime_error&) {
        error = std::current_exception();
      }
      {
        const std::lock_guard lock(making);
        CHECK(error != nullptr);
        CHECK(regularizer.step() == 1);
        CHECK(torch::equal(helpers::flat_grad(model->parameters()), before));
      }
      throwing = false;
      model->parameters().front().set_requires_grad(true);
      regularizer.backward(mine.x, mine.y);
      {
        const std::lock_guard lock(making);
        CHECK(relative_error(helpers::flat_grad(model->parameters()), 2 * before) < 1e-12);
      }
      std::rethrow_exception(error);
    });
    switch (wrong) {
      case Wrong::batch:
        CHECK(is<microreg::BatchError>(errors[1]));
        CHECK(helpers::has(words_of(errors[0]), {"rank 1 has failed in step 1", "target has 3"}));
        break;
      case Wrong::loss:
        CHECK(words_of(errors[1]) == "the loss of rank 1");
        CHECK(is<microreg::RankError>(errors[0]));
        CHECK(helpers::has(words_of(errors[0]), {"rank 1", "step 1", "the loss of rank 1"}));
        break;
      case Wrong::nan:
        CHECK(is<microreg::NonFiniteError>(errors[0]));
        CHECK(is<microreg::NonFiniteError>(errors[1]));
        CHECK(helpers::has(words_of(errors[0]), {"on rank 1", "nan", "micro-batch 2"}));
        break;
      case Wrong::parameter_frozen:
        CHECK(is<microreg::ModelError>(errors[0]));
        CHECK(is<microreg::ModelError>(errors[1]));
        CHECK(helpers::has(words_of(errors[0]), {"rank 1", "parameters"}));
        break;
    }
  }
}

TEST_CASE("NaN on one rank: the penalty, or the step, is left out on all") {
  const Cut cut{{8, 4}};
  const Samples all = samples_of(12);
  const torch::Tensor unpenalised = textbook(cut, all, 4, 0, false);
  for (const auto how : {microreg::NonFinite::skip_penalty, microreg::NonFinite::skip_step}) {
    run_ranks(2, [&](const Ranks& ranks) {
      auto model = mlp();
      const bool here = ranks->rank() == 1;
      // A penalty that is infinite on rank 1, or a loss that is.
      microreg::SquaredGradientNorm penalty{[&](const torch::Tensor& o) {
        return how == microreg::NonFinite::skip_penalty && here ? o.sum() * 1e308 * 1e308 : o.sum();
      }};
      const auto loss = [&](const torch::Tensor& o, const torch::Tensor& y) {
        return cross_entropy(o, y) * (how == microreg::NonFinite::skip_step && here ? std::nan("") : 1.0);
      };
      microreg::Regularizer<> regularizer(model, loss, penalty,
                                          {.micro_batch_size = 4, .non_finite = how, .communicator = ranks});
      const Samples mine = cut.of(all, ranks);
      const microreg::Report report = regularizer.backward(mine.x, mine.y);
      const std::lock_guard lock(making);
      if (how == microreg::NonFinite::skip_penalty) {
        CHECK(report.penalty_skipped);
        CHECK(relative_error(helpers::flat_grad(model->parameters()), unpenalised) < 1e-12);
      } else {
        CHECK(report.skipped);
        CHECK(helpers::flat_grad(model->parameters()).abs().sum().item<double>() == 0);
      }
    });
  }
}

TEST_CASE("Ranks that are not about the same thing say so") {
  const Samples all = samples_of(8);
  const auto message = [&](const std::function<void(microreg::Regularizer<>&, networks::Mlp&, bool)>& change,
                           microreg::AnyPenalty<> penalty = microreg::GradientNorm{}, bool same_draws = false) {
    const auto errors = try_ranks(2, [&](const Ranks& ranks) {
      auto model = mlp();
      microreg::RegularizerOptions options{.micro_batch_size = 4, .communicator = ranks};
      options.generator = seeded(same_draws ? 1 : 1 + static_cast<std::uint64_t>(ranks->rank()));
      microreg::Regularizer<> regularizer(model, cross_entropy, penalty, options);
      const Samples mine = all.narrow(4 * ranks->rank(), 4);
      if (!same_draws) {
        regularizer.backward(mine.x, mine.y);
      }
      change(regularizer, model, ranks->rank() == 1);
      regularizer.backward(mine.x, mine.y);
    });
    CHECK(words_of(errors[0]) == words_of(errors[1]));
    return words_of(errors[0]);
  };
  CHECK(message([](auto&, auto&, bool) {}).empty());
  CHECK(message([](auto&, auto&, bool) {}, microreg::FisherTrace{}).empty());
  CHECK(helpers::has(message([](auto& regularizer, auto&, bool here) { regularizer.set_step(here ? 5 : 1); }),
                     {"rank 1 takes step 5 where rank 0 takes step 1"}));
  CHECK(helpers::has(message([](auto&, auto& model, bool here) {
                       torch::NoGradGuard no_grad;
                       if (here) {
                         model->hidden->weight.add_(0.01);
                       }
                     }),
                     {"rank 1 are no longer those of rank 0 in step 1", "reduced()"}));
  for (const auto type : {torch::kBFloat16, torch::kHalf}) {
    const auto changed = try_ranks(2, [&](const Ranks& ranks) {
      const torch::Tensor w = torch::ones({6, networks::classes}, type).requires_grad_();
      microreg::FunctionModel model{[&](const torch::Tensor& x) { return x.matmul(w.to(torch::kFloat64)); }, {w}};
      microreg::Regularizer<> regularizer(model, cross_entropy, microreg::GradientNorm{}, {.communicator = ranks});
      regularizer.backward(all.x, all.y);
      w.detach().add_(ranks->rank());
      regularizer.backward(all.x, all.y);
    });
    CHECK(helpers::has(words_of(changed[0]), {"rank 1 are no longer those of rank 0 in step 1"}));
  }
  CHECK(helpers::has(message([](auto&, auto&, bool) {}, microreg::FisherTrace{}, true),
                     {"ranks 0 and 1 draw the same random numbers in step 0", "manual_seed"}));
  const auto errors = try_ranks(2, [&](const Ranks& ranks) {
    microreg::Regularizer<> regularizer(mlp(), cross_entropy, microreg::GradientNorm{},
                                        {.strength = ranks->rank() == 0 ? 0.1 : 0.2, .communicator = ranks});
    regularizer.backward(all.x, all.y);
  });
  CHECK(helpers::has(words_of(errors[0]), {"rank 1", "rank 0 in step 0", "other strength: 0.2 where rank 0 has 0.1"}));
  const auto empty = try_ranks(2, [&](const Ranks& ranks) {
    microreg::Regularizer<> regularizer(mlp(), cross_entropy, microreg::GradientNorm{}, {.communicator = ranks});
    regularizer.backward(all.x.narrow(0, 0, 0), all.y.narrow(0, 0, 0));
  });
  CHECK(is<microreg::BatchError>(empty[0]));
  CHECK(is<microreg::BatchError>(empty[1]));
}

namespace {

/// Another communicator, whose all-reduces go through `change`.
class ChangedCommunicator final : public microreg::Communicator {
 public:
  using Change = std::function<std::function<void()>(microreg::Communicator& inner, const torch::Tensor& flat)>;
  ChangedCommunicator(Ranks inner, Change change) : inner_(std::move(inner)), change_(std::move(change)) {}
  [[nodiscard]] std::int64_t rank() const override { return inner_->rank(); }
  [[nodiscard]] std::int64_t size() const override { return inner_->size(); }
  void abandon(const std::string& why) noexcept override { inner_->abandon(why); }

 private:
  std::function<void()> begin_all_reduce(const torch::Tensor& flat) override { return change_(*inner_, flat); }
  void do_broadcast(const torch::Tensor& flat, std::int64_t root) override { inner_->broadcast(flat, root); }

  Ranks inner_;
  Change change_;
};

}  // namespace

TEST_CASE("Sums go in buckets of 25 MiB, the last parameters first") {
  run_ranks(2, [&](const Ranks& inner) {
    std::vector<std::int64_t> sizes;
    const Ranks ranks =
        std::make_shared<ChangedCommunicator>(inner, [&](microreg::Communicator& c, const torch::Tensor& flat) {
          sizes.push_back(flat.numel());
          return c.all_reduce(flat);
        });
    const torch::Tensor a = torch::ones({4'000'000}, torch::kFloat64).requires_grad_();  // 32 MB: a bucket alone
    const torch::Tensor b = torch::ones({3}, torch::kFloat64).requires_grad_();
    const torch::Tensor c = torch::ones({2, 2}).requires_grad_();  // another type
    const torch::Tensor d = torch::ones({5}).requires_grad_();
    microreg::FunctionModel model{[&](const torch::Tensor& x) { return x * (a.mean() + b.sum() + c.sum() + d.sum()); },
                                  {a, b, c, d}};
    microreg::Regularizer<torch::Tensor, microreg::NoTarget> regularizer(
        model, [](const torch::Tensor& o) { return o.mean(); }, microreg::GradientNorm{}, {.communicator = ranks});
    regularizer.backward(torch::full({3, 1}, 1.0 + static_cast<double>(ranks->rank()), torch::kFloat64));
    const std::lock_guard lock(making);
    CHECK(ranks->bytes() == 2 * (32'000'000 + 24 + 16 + 20) + 2 * 8 + 4 + 8 * (55 * 2 + 4));
    // Two exchanges, four sums in three buckets that end with a 1 each, and the last exchange: 55 numbers a rank.
    CHECK(sizes == std::vector<std::int64_t>{40 * 2, 12 * 2 + 4, 10, 4, 4'000'001, 3 * 2});
    CHECK(torch::allclose(b.grad(), torch::full({3}, 1.5, torch::kFloat64)));
    CHECK(torch::allclose(c.grad(), torch::full({2, 2}, 1.5)));
    CHECK(torch::allclose(a.grad(), torch::full({4'000'000}, 1.5 / 4'000'000, torch::kFloat64)));
  });
}

namespace {

/// The step of `options` on two ranks of which the second one does something else; what each of them threw. Before it,
/// both took a step, whose gradient has to be left alone.
std::vector<std::exception_ptr> errors_of_second_rank(
    const std::function<torch::Tensor(const torch::Tensor& output, bool wrong)>& change,
    const microreg::RegularizerOptions& options = {.micro_batch_size = 4}) {
  const Cut cut{{8, 4}};
  const Samples all = samples_of(12);
  return try_ranks(2, [&](const Ranks& ranks) {
    auto net = mlp();
    bool wrong = false;
    microreg::FunctionModel model{[&](const torch::Tensor& x) { return change(net->forward(x), wrong); },
                                  net->parameters()};
    auto own = options;
    own.communicator = ranks;
    microreg::Regularizer<> regularizer(model, cross_entropy, microreg::GradientNorm{}, own);
    const Samples mine = cut.of(all, ranks);
    regularizer.backward(mine.x, mine.y);
    const torch::Tensor before = helpers::flat_grad(net->parameters());
    wrong = ranks->rank() == 1;
    std::exception_ptr error;
    try {
      regularizer.backward(mine.x, mine.y);
    } catch (...) {
      error = std::current_exception();
    }
    const std::lock_guard lock(making);
    CHECK(error != nullptr);
    CHECK(regularizer.step() == 1);
    CHECK(torch::equal(helpers::flat_grad(net->parameters()), before));
    if (error) {
      std::rethrow_exception(error);
    }
  });
}

/// The identity, whose derivative throws.
struct ThrowingDerivative : torch::autograd::Function<ThrowingDerivative> {
  static torch::Tensor forward(torch::autograd::AutogradContext* /*context*/, const torch::Tensor& x) {
    return x.clone();
  }
  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* /*context*/,
                                                 const torch::autograd::variable_list& /*gradients*/) {
    throw std::runtime_error("the derivative of rank 1");
  }
};

/// Fails in the all-reduce number `at`, as where memory runs out.
Ranks failing(Ranks inner, int at) {
  return std::make_shared<ChangedCommunicator>(
      std::move(inner), [at](microreg::Communicator& c, const torch::Tensor& flat) mutable {
        return at-- == 0 ? throw std::runtime_error("no memory for a bucket") : c.all_reduce(flat);
      });
}

}  // namespace

TEST_CASE("What is thrown in a forward pass, in a derivative, or as no exception of the standard's") {
  for (const std::int64_t workers : {0, 2}) {
    INFO("workers " << workers);
    const microreg::RegularizerOptions options{.micro_batch_size = 4, .workers = workers};
    auto errors = errors_of_second_rank(
        [](const torch::Tensor& output, bool wrong) {
          return wrong ? throw std::runtime_error("the forward pass of rank 1") : output;
        },
        options);
    CHECK(words_of(errors[1]) == "the forward pass of rank 1");
    CHECK(helpers::has(words_of(errors[0]), {"rank 1 has failed in step 1: the forward pass of rank 1"}));
    errors = errors_of_second_rank(
        [](const torch::Tensor& output, bool wrong) { return wrong ? ThrowingDerivative::apply(output) : output; },
        options);
    CHECK(helpers::has(words_of(errors[1]), {"the derivative of rank 1"}));
    CHECK(helpers::has(words_of(errors[0]), {"rank 1 has failed in step 1", "the derivative of rank 1"}));
    errors = errors_of_second_rank([](const torch::Tensor& output, bool wrong) { return wrong ? throw 42 : output; },
                                   options);
    CHECK(is<int>(errors[1]));
    CHECK(helpers::has(words_of(errors[0]), {"rank 1 has failed in step 1", "no std::exception"}));
  }
}

TEST_CASE("A difference that is refused on one rank is refused on all") {
  double calls = 0;  // of rank 1
  const auto errors = errors_of_second_rank(
      [&](const torch::Tensor& output, bool wrong) { return wrong ? output * (1 + 0.3 * ++calls) : output; },
      {.micro_batch_size = 4, .estimator = microreg::ForwardDifference{.check_every = 1}});
  CHECK(is<microreg::DifferenceError>(errors[1]));
  CHECK(is<microreg::RankError>(errors[0]));
  CHECK(helpers::has(words_of(errors[0]), {"rank 1 has failed in step 1"}));
}

TEST_CASE("What fails in the midst of a reduction ends the step of all, and .grad is what it was") {
  const Samples all = samples_of(8);
  // Of the second step: enter, agree, two buckets (of two types), commit.
  for (const int at : {5, 6, 7, 8, 9}) {
    INFO("collective " << at);
    std::vector<std::string> words(2);
    const auto errors = try_ranks(2, [&](const Ranks& inner) {
      const Ranks ranks = inner->rank() == 1 ? failing(inner, at) : inner;
      const torch::Tensor a = torch::full({6, networks::classes}, 0.1, torch::kFloat64).requires_grad_();
      const torch::Tensor b = torch::ones({networks::classes}).requires_grad_();
      microreg::FunctionModel model{[&](const torch::Tensor& x) { return x.matmul(a) * b; }, {a, b}};
      microreg::Regularizer<> regularizer(model, cross_entropy, microreg::GradientNorm{},
                                          {.micro_batch_size = 4, .communicator = ranks});
      const Samples mine = all.narrow(4 * ranks->rank(), 4);
      regularizer.backward(mine.x, mine.y);
      const torch::Tensor before = a.grad().clone();
      try {
        regularizer.backward(mine.x, mine.y);
      } catch (const std::exception& error) {
        const std::lock_guard lock(making);
        words[static_cast<std::size_t>(ranks->rank())] = error.what();
        CHECK(torch::equal(a.grad(), before));
        throw;
      }
    });
    CHECK(words[1] == "no memory for a bucket");
    CHECK(helpers::has(words[0], {"rank 1: no memory for a bucket (step 1)"}));
  }
}

TEST_CASE("An engine that does not add up is refused on all ranks, and .grad is what it was") {
  const Samples all = samples_of(8);
  const auto averaging = [](microreg::Communicator& c, const torch::Tensor& flat) {
    c.all_reduce(flat)();
    return [flat] { flat.div_(2); };
  };
  std::vector<std::pair<ChangedCommunicator::Change, bool>> changes{{averaging, false}};
  for (int at : {0, 1, 2, 3}) {  // loses one, on all ranks or on one alone: enter, agree, a bucket, commit
    changes.emplace_back(
        [at](microreg::Communicator& c, const torch::Tensor& flat) mutable {
          return at-- == 0 ? std::function<void()>([] {}) : c.all_reduce(flat);
        },
        false);
    changes.emplace_back(
        [at](microreg::Communicator& c, const torch::Tensor& flat) mutable {
          return c.all_reduce(at-- == 0 ? flat.clone() : flat);
        },
        true);
  }
  for (const auto& [change, one_alone] : changes) {
    const auto errors = try_ranks(2, [&](const Ranks& inner) {
      const Ranks ranks =
          one_alone && inner->rank() == 0 ? inner : std::make_shared<ChangedCommunicator>(inner, change);
      auto model = mlp();
      microreg::Regularizer<> regularizer(model, cross_entropy, microreg::GradientNorm{},
                                          {.micro_batch_size = 4, .communicator = ranks});
      const Samples mine = all.narrow(4 * ranks->rank(), 4);
      try {
        regularizer.backward(mine.x, mine.y);
      } catch (const std::exception&) {
        const std::lock_guard lock(making);
        CHECK_FALSE(model->parameters().front().grad().defined());
        throw;
      }
    });
    CHECK(is<microreg::RankError>(errors[1]));
    CHECK(helpers::has(words_of(errors[1]), {"has not added up what 2 ranks handed in, in step 0"}));
  }
}

TEST_CASE("A number that is not finite is found in one micro-batch by all ranks") {
  const Cut cut{{8, 8}};
  Samples all = samples_of(16);
  all.x[13].fill_(std::nan(""));  // micro-batch 3, on rank 1
  std::vector<std::int64_t> found(2);
  const auto errors = try_ranks(2, [&](const Ranks& ranks) {
    const Samples mine = cut.of(all, ranks);
    microreg::Regularizer<> regularizer(
        mlp(), cross_entropy, microreg::GradientNorm{},
        {.micro_batch_size = 4, .check_finite = microreg::CheckFinite::always, .communicator = ranks});
    try {
      regularizer.backward(mine.x, mine.y);
    } catch (const microreg::NonFiniteError& error) {
      found[static_cast<std::size_t>(ranks->rank())] = error.micro_batch();
    }
  });
  CHECK(words_of(errors[0]).empty());
  CHECK(words_of(errors[1]).empty());
  CHECK(found == std::vector<std::int64_t>{3, 3});
}

microreg::RegularizerOptions dynamically_scaled(const Ranks& ranks) {
  return {.micro_batch_size = 4,
          .check_finite = microreg::CheckFinite::always,  // or a device is not asked whether a step is left out
          .loss_scale = microreg::DynamicLossScale{.start = 1024},
          .communicator = ranks};
}

/// A penalty whose probe is too large for float64 while `overflows`.
auto overflowing_while(const bool& overflows) {
  return microreg::SquaredGradientNorm{
      [&overflows](const torch::Tensor& o) { return overflows ? o.sum() * 1e300 * 1e300 : o.mean(); }};
}

TEST_CASE("A dynamic loss scale that overflows on one rank leaves the step out on all, and falls on all") {
  const Cut cut{{8, 4}};
  const Samples all = samples_of(12);
  run_ranks(2, [&](const Ranks& ranks) {
    auto model = mlp();
    bool overflows = false;
    const auto penalty = overflowing_while(overflows);
    microreg::Regularizer<> regularizer(model, cross_entropy, penalty, dynamically_scaled(ranks));
    const Samples mine = cut.of(all, ranks);
    const microreg::Report good = regularizer.backward(mine.x, mine.y);
    const torch::Tensor before = helpers::flat_grad(model->parameters());
    overflows = ranks->rank() == 1;
    const microreg::Report bad = regularizer.backward(mine.x, mine.y);
    const torch::Tensor after = helpers::flat_grad(model->parameters());
    overflows = false;
    regularizer.backward(mine.x, mine.y);
    const std::lock_guard lock(making);
    CHECK_FALSE(good.skipped);
    CHECK(bad.skipped);
    CHECK(bad.overflow.item<bool>());
    CHECK(torch::equal(after, before));
    CHECK(regularizer.skipped() == 1);
    CHECK(regularizer.loss_scale().item<double>() == 512);
    CHECK(relative_error(helpers::flat_grad(model->parameters()), 2 * before) < 1e-12);
  });
  // A norm that overflows, and gradients that do not: those of a linear probe.
  run_ranks(2, [&](const Ranks& ranks) {
    const torch::Tensor w = torch::full({6, networks::classes}, 0.1, torch::kFloat64).requires_grad_();
    microreg::FunctionModel model{[&](const torch::Tensor& x) { return x.matmul(w); }, {w}};
    const microreg::SquaredGradientNorm penalty{
        [&](const torch::Tensor& o) { return ranks->rank() == 1 ? o.sum() * 1e200 : o.sum(); }};
    microreg::Regularizer<> regularizer(model, cross_entropy, penalty, dynamically_scaled(ranks));
    const Samples mine = cut.of(all, ranks);
    const microreg::Report report = regularizer.backward(mine.x, mine.y);
    const std::lock_guard lock(making);
    CHECK(report.skipped);
    CHECK_FALSE(w.grad().defined());
    CHECK(regularizer.loss_scale().item<double>() == 512);
  });
}

TEST_CASE("A step that a dynamic loss scale leaves out moves running statistics alike on all ranks") {
  auto generator = seeded(5);
  const torch::Tensor x = torch::randn({12, 6}, generator, torch::kFloat64);
  const torch::Tensor y = torch::randint(0, networks::classes, {12}, generator, torch::kInt64);
  run_ranks(2, [&](const Ranks& ranks) {
    torch::nn::BatchNorm1d norm(6);
    torch::nn::Sequential model(norm, torch::nn::Linear(6, networks::classes));
    model->to(torch::kFloat64);
    bool overflows = false;
    const auto penalty = overflowing_while(overflows);
    microreg::Regularizer<> regularizer(model, cross_entropy, penalty, dynamically_scaled(ranks));
    const auto step = [&] {
      const std::int64_t size = ranks->rank() == 0 ? 8 : 4;
      return regularizer.backward(x.narrow(0, 8 * ranks->rank(), size), y.narrow(0, 8 * ranks->rank(), size));
    };
    static_cast<void>(step());
    const torch::Tensor before = norm->running_mean.clone();
    overflows = ranks->rank() == 1;
    const bool skipped = step().skipped;
    const torch::Tensor own = norm->running_mean.clone(), first = own.clone();
    overflows = false;
    static_cast<void>(step());  // and they are still those of rank 0
    ranks->broadcast(first, 0);
    const std::lock_guard lock(making);
    CHECK(skipped);
    CHECK(torch::equal(own, first));
    CHECK_FALSE(torch::equal(own, before));
  });
}

TEST_CASE("Ranks work on their micro-batches side by side, by workers, to the same bits") {
  const Cut cut{{16, 7, 0, 12}};
  const Samples all = samples_of(35);
  for (const auto& penalty : {microreg::AnyPenalty<>(microreg::GradientNorm{}),
                              microreg::AnyPenalty<>(microreg::FisherTrace{} + 0.1 * microreg::UnitJacobian{})}) {
    microreg::RegularizerOptions options{.strength = 0.3, .micro_batch_size = 4, .sampling = {.share = 0.7}};
    options.workers = 1;
    const torch::Tensor one = grad_on_ranks(cut, all, penalty, options);
    options.workers = 3;
    CHECK(torch::equal(grad_on_ranks(cut, all, penalty, options), one));
    options.workers = 0;
    CHECK(relative_error(one, grad_on_ranks(cut, all, penalty, options)) < 1e-12);
  }
}

TEST_CASE("One rank alone is one process; half types are added up in float32") {
  const Samples all = samples_of(13);
  const microreg::RegularizerOptions options{.strength = 0.3, .micro_batch_size = 4};
  CHECK(torch::equal(grad_on_ranks({{13}}, all, microreg::GradientNorm{}, options),
                     grad_of_one(all, microreg::GradientNorm{}, options)));
  const auto in_half = [&](const Ranks& ranks) {
    auto model = mlp();
    model->to(torch::kBFloat16);
    auto own = options;
    own.communicator = ranks;
    microreg::Regularizer<> regularizer(model, cross_entropy, microreg::GradientNorm{}, own);
    const Samples mine = ranks ? all.narrow(8 * ranks->rank(), ranks->rank() == 0 ? 8 : 5) : all;
    regularizer.backward(mine.x.to(torch::kBFloat16), mine.y);
    return helpers::flat_grad(model->parameters()).to(torch::kFloat64);
  };
  const torch::Tensor alone = in_half(nullptr);
  run_ranks(2, [&](const Ranks& ranks) {
    const torch::Tensor grad = in_half(ranks);
    const std::lock_guard lock(making);
    CHECK(relative_error(grad, alone) < 0.01);
  });
}

TEST_CASE("Running statistics are those of the ranks that have samples") {
  auto generator = seeded(5);
  const torch::Tensor x = torch::randn({8, 2, 6, 6}, generator, torch::kFloat64);
  const torch::Tensor y = torch::randint(0, networks::classes, {8}, generator, torch::kInt64);
  const auto cnn = [] {
    const std::lock_guard lock(making);
    torch::manual_seed(1);
    networks::Cnn model(networks::Norm::batch);
    model->to(torch::kFloat64);
    return model;
  };
  auto one = cnn();
  microreg::Regularizer<>(one, cross_entropy, microreg::GradientNorm{}, {.micro_batch_size = 4}).backward(x, y);
  for (const auto how : {microreg::RankBuffers::averaged, microreg::RankBuffers::first_rank}) {
    run_ranks(3, [&](const Ranks& ranks) {
      auto model = cnn();
      microreg::Regularizer<> regularizer(model, cross_entropy, microreg::GradientNorm{},
                                          {.micro_batch_size = 4, .communicator = ranks, .rank_buffers = how});
      const std::int64_t size = ranks->rank() == 1 ? 8 : 0;
      regularizer.backward(x.narrow(0, 0, size), y.narrow(0, 0, size));
      const std::lock_guard lock(making);
      for (std::size_t i = 0; i < one->buffers().size(); ++i) {
        CHECK(torch::allclose(model->buffers()[i], one->buffers()[i], 1e-12, 1e-12));
      }
      CHECK(relative_error(helpers::flat_grad(model->parameters()), helpers::flat_grad(one->parameters())) < 1e-12);
    });
  }
}

TEST_CASE("Two regularizers share a communicator, one is moved meanwhile, and verify() asks nobody") {
  const Cut cut{{8, 4}};
  const Samples all = samples_of(12);
  const torch::Tensor expected = textbook(cut, all, 4, 0.3, false) + textbook(cut, all, 2, 0.1, false);
  run_ranks(2, [&](const Ranks& ranks) {
    auto model = mlp();
    const auto make = [&](double strength, std::int64_t size) {
      return microreg::Regularizer<>(model, cross_entropy, microreg::GradientNorm{},
                                     {.strength = strength, .micro_batch_size = size, .communicator = ranks});
    };
    microreg::Regularizer<> first = make(0.3, 4), second = make(0.1, 2);
    const Samples mine = cut.of(all, ranks);
    for (int step = 0; step < 3; ++step) {
      model->zero_grad();
      first.backward(mine.x, mine.y);
      microreg::Regularizer<> moved(std::move(first));
      first = std::move(moved);
      second.backward(mine.x, mine.y);
      if (ranks->rank() == 1) {
        const auto found = microreg::verify(model, cross_entropy, microreg::GradientNorm{}, mine.x, mine.y,
                                            {.micro_batch_size = 4, .communicator = ranks});
        const std::lock_guard lock(making);
        CHECK(found.problems.empty());
      }
    }
    const std::lock_guard lock(making);
    CHECK(first.step() == 3);
    CHECK(relative_error(helpers::flat_grad(model->parameters()), expected) < 1e-12);
  });
}

TEST_CASE("Each option that has to be the same on all ranks is named where it is not") {
  using Options = microreg::RegularizerOptions;
  const std::vector<std::pair<std::string, std::function<void(Options&)>>> changes{
      {"micro_batch_size: 3 where rank 0 has 4", [](Options& o) { o.micro_batch_size = 3; }},
      {"other strength: 2 where rank 0 has 1", [](Options& o) { o.strength = 2; }},
      {"other parameters in select",
       [](Options& o) {
         o.select = [](const std::string& name, const at::Tensor& /*parameter*/) { return name.starts_with("output"); };
       }},
      {"other estimator", [](Options& o) { o.estimator = microreg::ForwardDifference{}; }},
      {"sampling.share: 0.5 where rank 0 has 1", [](Options& o) { o.sampling.share = 0.5; }},
      {"sampling.every: 2 where rank 0 has 1", [](Options& o) { o.sampling.every = 2; }},
      {"sampling.seed", [](Options& o) { o.sampling.seed = 1; }},
      {"weighting", [](Options& o) { o.weighting = microreg::Weighting::reference; }},
      {"reduction", [](Options& o) { o.reduction = microreg::Reduction::sum; }},
      {"short_last", [](Options& o) { o.short_last = microreg::ShortLast::merged; }},
      {"non_finite", [](Options& o) { o.non_finite = microreg::NonFinite::skip_step; }},
      {"check_finite", [](Options& o) { o.check_finite = microreg::CheckFinite::never; }},
      {"autocast", [](Options& o) { o.autocast = torch::kBFloat16; }},
      {"loss_scale: 8 where rank 0 has 1", [](Options& o) { o.loss_scale = 8; }},
      {"gradient_ratio", [](Options& o) { o.gradient_ratio = true; }},
      {"rank_buffers", [](Options& o) { o.rank_buffers = microreg::RankBuffers::first_rank; }},
      {"advance", [](Options& o) { o.advance = false; }}};
  const Samples all = samples_of(8);
  for (const auto& [words, change] : changes) {
    INFO(words);
    const auto errors = try_ranks(2, [&](const Ranks& ranks) {
      Options options{.micro_batch_size = 4, .communicator = ranks};
      if (ranks->rank() == 1) {
        change(options);
      }
      const Samples mine = all.narrow(4 * ranks->rank(), 4);
      microreg::Regularizer<>(mlp(), cross_entropy, microreg::GradientNorm{}, options).backward(mine.x, mine.y);
    });
    for (const auto& error : errors) {
      CHECK(is<microreg::OptionError>(error));
      CHECK(helpers::has(words_of(error), {"rank 1", "rank 0 in step 0", words.c_str()}));
    }
  }
  const auto errors = try_ranks(2, [&](const Ranks& ranks) {
    auto model = mlp();
    if (ranks->rank() == 1) {
      static_cast<void>(microreg::measure(model, cross_entropy, microreg::GradientNorm{}, all.x, all.y,
                                          {.micro_batch_size = 4, .communicator = ranks}));
    } else {
      microreg::Regularizer<>(model, cross_entropy, microreg::GradientNorm{},
                              {.micro_batch_size = 4, .communicator = ranks})
          .backward(all.x, all.y);
    }
  });
  CHECK(helpers::has(words_of(errors[0]), {"rank 1 calls measure() where rank 0 calls backward()"}));
  CHECK(words_of(errors[0]) == words_of(errors[1]));
}
