#include "compare.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <utility>

#include "by_hand.hpp"

namespace differential {

namespace {

/// What one way made of a plan.
struct Ours {
  Tensor gradient;  // flat, float64
  std::optional<microreg::Report> report;
  Tensors buffers;
  Tensor generator;
  std::string error;      // the message, if it threw
  bool untouched = true;  // nothing had changed after it
};

microreg::AnyPenalty<> penalty_of(const Plan& plan) {
  microreg::AnyPenalty<> sum;
  for (const PenaltyTerm& term : plan.penalties) {
    const auto one = [&]() -> microreg::AnyPenalty<> {
      switch (term.name) {
        case PenaltyName::unsquared:
          return microreg::Unsquared{microreg::GradientNorm{}};
        case PenaltyName::average_jacobian:
          return microreg::AverageJacobian{};
        case PenaltyName::unit_jacobian:
          return microreg::UnitJacobian{};
        case PenaltyName::jacobian_norm:
          return microreg::JacobianNorm{};
        case PenaltyName::fisher_trace:
          return microreg::FisherTrace{};
        case PenaltyName::input_jacobian:
          return microreg::InputJacobian{};
        case PenaltyName::custom:
          return microreg::SquaredGradientNorm{custom_probe};
        case PenaltyName::gradient_norm:
          break;
      }
      return microreg::GradientNorm{};
    };
    sum += term.factor * one();
  }
  return sum;
}

Tensor generator_state() { return at::globalContext().defaultGenerator(torch::kCPU).get_state(); }

/// What a way makes of the model and its state, which it is handed fresh.
using Way = std::function<microreg::Report(const Plan& plan, const State& state)>;

Ours run(const Plan& plan, const Way& way) {
  const State state = state_in(plan, plan.type);
  const auto copies = [](const Tensors& tensors) {
    Tensors result;
    for (const Tensor& t : tensors) {
      result.push_back(t.detach().clone());
    }
    return result;
  };
  const Tensors parameters = copies(state.parameters), buffers = copies(state.buffers);
  torch::manual_seed(11);
  const Tensor generator = generator_state();
  Ours ours;
  const auto same = [](const Tensors& a, const Tensors& b) {
    return std::equal(a.begin(), a.end(), b.begin(), [](const Tensor& x, const Tensor& y) { return x.equal(y); });
  };
  try {
    ours.report = way(plan, state);
    ours.untouched = same(state.parameters, parameters);
  } catch (const std::exception& error) {
    ours.error = error.what();
    ours.error = ours.error.substr(0, ours.error.find('\n'));
    ours.untouched = same(state.parameters, parameters) && same(state.buffers, buffers) &&
                     generator_state().equal(generator) &&
                     std::none_of(state.parameters.begin(), state.parameters.end(),
                                  [](const Tensor& p) { return p.grad().defined(); });
    if (dynamic_cast<const microreg::Error*>(&error) == nullptr) {
      ours.error = "not an error of microreg: " + ours.error;
    }
    return ours;
  }
  ours.gradient = flat(plan, state, [&](std::size_t i) { return state.parameters[i].grad(); });
  ours.buffers = copies(state.buffers);
  ours.generator = generator_state();
  return ours;
}

/// The model of a state, without the parameters that are handed in by also_train.
auto model_of(const Plan& plan, const State& state, std::vector<Tensor>& outside) {
  Tensors inside;
  for (std::size_t i = 0; i < state.parameters.size(); ++i) {
    (plan.outside[i] ? outside : inside).push_back(state.parameters[i]);
  }
  return microreg::FunctionModel{
      std::function<Tensor(const Tensor&)>([&plan, state](const Tensor& x) { return plan.network(x, state); }), inside,
      state.buffers};
}

microreg::RegularizerOptions options_of(const Plan& plan, double strength) {
  microreg::RegularizerOptions options = plan.options;
  options.strength = strength;
  if (plan.select) {
    options.select = [](const std::string&, const Tensor& p) { return p.dim() > 1; };
  }
  return options;
}

Way regularizer(double strength, microreg::Estimator estimator, bool fused) {
  return [=](const Plan& plan, const State& state) {
    microreg::RegularizerOptions options = options_of(plan, strength);
    options.estimator = estimator;
    options.fused = fused;
    if (options.estimator.differences() != nullptr) {
      options.loss_scale = 1;
    }
    State own = state;
    own.by_libtorch = !fused || options.estimator.differences() != nullptr;
    const auto model = model_of(plan, own, options.also_train);
    if (plan.loss == LossName::counted) {
      return microreg::Regularizer<>(
                 model, [&](const Tensor& o, const Tensor& y) { return plan.evaluate_loss(o, y); }, penalty_of(plan),
                 options)
          .backward(plan.input, plan.target);
    }
    return microreg::Regularizer<>(
               model, [&](const Tensor& o, const Tensor& y) { return plan.evaluate_loss(o, y).sum; }, penalty_of(plan),
               options)
        .backward(plan.input, plan.target);
  };
}

/// The same as a loop of one's own; the loss is the mean over samples.
Way penalised(double strength) {
  return [=](const Plan& plan, const State& state) {
    const microreg::RegularizerOptions options = options_of(plan, strength);
    microreg::Penalised step(state.parameters, penalty_of(plan),
                             {.strength = options.strength, .select = options.select});
    microreg::Report last;
    for (auto [part, x, y] : microreg::micro_batches(options.micro_batch_size, plan.input, plan.target)) {
      const auto pass = [&, &input = x, &target = y]() -> std::pair<Tensor, Tensor> {
        const Tensor output = plan.network(input, state);
        return {plan.evaluate_loss(output, target).sum, output};
      };
      last = step.backward(part, pass);
    }
    return last;
  };
}

/// Whether a loop of one's own says the same: what is left to the Regularizer plays no part.
bool fits_penalised(const Plan& plan) {
  return plan.options.reduction == microreg::Reduction::mean && plan.loss != LossName::counted &&
         plan.options.weighting == microreg::Weighting::samples &&
         plan.options.short_last == microreg::ShortLast::kept &&
         std::none_of(plan.penalties.begin(), plan.penalties.end(),
                      [](const PenaltyTerm& term) { return term.name == PenaltyName::input_jacobian; });
}

double relative(const Tensor& a, const Tensor& b, double scale) { return (a - b).norm().item<double>() / scale; }

class Case {
 public:
  Case(std::uint64_t seed, bool say, Tally& tally) : seed_(seed), say_(say), tally_(tally), plan_(make_plan(seed)) {
    if (say_) {
      fmt::print("seed {}: {}\n", seed_, plan_.description);
    }
  }

  void operator()() {
    ++tally_.networks;
    Outcome exact, plain;
    try {
      exact = by_hand(plan_, torch::kFloat64);
      plain = plan_.type == torch::kFloat64 ? exact : by_hand(plan_, plan_.type);
    } catch (const std::exception& error) {
      return skip(first_line(error.what()));
    }
    const double loss = exact.loss_gradient.norm().item<double>();
    const double penalty = exact.penalty_gradient.norm().item<double>();
    if (!std::isfinite(loss + penalty)) {
      return skip("NaN or infinity");
    }
    if (penalty < 1e-9 * loss || loss < 1e-12) {
      return skip("no gradient");
    }
    strength_ = plan_.ratio * loss / penalty;
    scale_ = strength_ * penalty;
    expected_ = exact.loss_gradient + strength_ * exact.penalty_gradient;
    const double noise = relative(plain.loss_gradient + strength_ * plain.penalty_gradient, expected_, scale_);
    if (noise > 0.05) {
      return skip("ill-conditioned in float32");
    }
    const bool doubles = plan_.type == torch::kFloat64;
    const double bound = doubles ? 1e-8 : std::max(1e-3, 10 * noise);
    check("exact, fused", regularizer(strength_, microreg::Exact{}, true), bound, plain, false);
    check("exact, stock", regularizer(strength_, microreg::Exact{}, false), bound, plain, plan_.network.stock_refuses);
    check("central, frozen", regularizer(strength_, microreg::CentralDifference{}, true), doubles ? 1e-3 : 5e-2, plain,
          true);
    // Twice what the proof, which is of one micro-batch, lets pass in float32.
    check("forward, frozen", regularizer(strength_, microreg::ForwardDifference{}, true), doubles ? 1e-2 : 0.1, plain,
          true);
    if (fits_penalised(plan_)) {
      check("Penalised", penalised(strength_), bound, plain, false);
    }
  }

 private:
  static std::string first_line(const std::string& text) { return text.substr(0, text.find('\n')); }

  void skip(const std::string& why) {
    ++tally_.skipped[why.substr(0, 80)];
    if (say_) {
      fmt::print("  skipped: {}\n", why);
    }
  }

  void fail(const std::string& what) {
    tally_.failures.push_back(fmt::format("seed {}: {}\n  {}", seed_, what, plan_.description));
    fmt::print("FAILED {}\n", tally_.failures.back());
  }

  void check(const char* name, const Way& way, double bound, const Outcome& plain, bool may_refuse) {
    const Ours ours = run(plan_, way);
    if (!ours.untouched) {
      fail(fmt::format("{}: it changed what it must leave alone {}", name, ours.error));
    }
    if (!ours.error.empty()) {
      if (may_refuse && ours.error.rfind("not an error", 0) != 0) {
        ++tally_.refused[ours.error.substr(0, 60)];
        if (say_) {
          fmt::print("  {}: refused: {}\n", name, ours.error);
        }
      } else {
        fail(fmt::format("{}: {}", name, ours.error));
      }
      return;
    }
    ++tally_.gradients;
    const double error = relative(ours.gradient, expected_, scale_);
    double& largest = tally_.largest[fmt::format("{}, {}", name, torch::toString(plan_.type))];
    largest = std::max(largest, error);
    if (say_) {
      fmt::print("  {}: error {:.2g}\n", name, error);
    }
    if (!(error <= bound)) {
      fail(fmt::format("{}: the gradient is off by {:.3g} of the penalties' gradient, {:.3g} allowed", name, error,
                       bound));
    }
    const double rounding = plan_.type == torch::kFloat64 ? 1e-9 : 1e-3;
    const auto same = [&](const char* what, double value, double wanted) {
      if (!(std::abs(value - wanted) <= rounding * std::max(std::abs(wanted), 1e-6))) {
        fail(fmt::format("{}: {} is {}, by hand {}", name, what, value, wanted));
      }
    };
    const bool whole = ours.report->micro_batches() > 1 || ours.report->samples == plan_.input.size(0);
    if (plan_.options.reduction != microreg::Reduction::total && whole) {
      same("the loss in the report", ours.report->loss.item<double>(), plain.loss);
    }
    for (std::size_t k = 0; k < plan_.penalties.size() && whole; ++k) {
      same("a penalty in the report", ours.report->penalties[k].value.item<double>(), plain.penalties[k]);
    }
    for (std::size_t i = 0; i < ours.buffers.size(); ++i) {
      // Over one value a variance is NaN, ours as LibTorch's.
      const Tensor own = ours.buffers[i].to(torch::kFloat64), other = plain.buffers[i];
      same("a running statistic",
           own.isnan().equal(other.isnan()) ? 1 + relative(own.nan_to_num(), other.nan_to_num(), 1) : 0, 1);
    }
    if (!ours.generator.equal(plain.generator)) {
      fail(fmt::format("{}: the random numbers go on elsewhere than after one pass", name));
    }
  }

  std::uint64_t seed_;
  bool say_;
  Tally& tally_;
  Plan plan_;
  double strength_ = 0, scale_ = 1;
  Tensor expected_;
};

}  // namespace

void compare(std::uint64_t seed, bool say, Tally& tally) { Case(seed, say, tally)(); }

}  // namespace differential
