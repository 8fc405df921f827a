/// @file
/// One step: its loop, the agreement with other ranks, and what it writes when nothing can fail any more.
#pragma once

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>
#include <microreg/detail/config.hpp>
#include <microreg/detail/finite.hpp>
#include <microreg/fused/scope.hpp>
#include <microreg/options.hpp>
#include <microreg/parameters.hpp>
#include <microreg/report.hpp>
#include <microreg/step/differences.hpp>
#include <microreg/step/exact.hpp>
#include <microreg/step/grad_update.hpp>
#include <microreg/step/loop.hpp>
#include <microreg/step/mini_batch.hpp>
#include <microreg/step/non_finite.hpp>
#include <microreg/step/probes.hpp>
#include <microreg/step/ranks.hpp>
#include <microreg/step/replay.hpp>
#include <microreg/step/requirements.hpp>
#include <microreg/step/sampling.hpp>
#include <microreg/step/scaling.hpp>
#include <microreg/step/snapshot.hpp>
#include <microreg/step/tensor_lists.hpp>
#include <microreg/step/visitor.hpp>

#include <algorithm>
#include <cstdint>
#include <exception>
#include <memory>
#include <stdexcept>
#include <utility>
#include <vector>

namespace microreg::inline MICROREG_ABI::detail {

inline Report step_once(MiniBatch& batch, const RegularizerOptions& options, Progress& progress, Ranks& ranks,
                        bool without_penalties) {
  ranks.expect_lists(options.gradient_ratio ? 2 : 1);
  Step loop(batch, options, progress.step, ranks, without_penalties);
  Progress next = progress;
  return loop.guarded([&] {
    const Parameters& parameters = loop.parameters();
    const Scale scale = scale_of(options.loss_scale, next.scale, parameters.tensors.front().device());
    std::vector<at::Tensor>& sums = loop.sums().objective;
    std::vector<at::Tensor>& loss_sums = loop.sums().loss;
    std::unique_ptr<Differences> difference;
    if (options.estimator.differences() != nullptr) {
      require_plain_input(batch);
      difference = options.estimator.differences()(
          {options.estimator, parameters, next.proof, options.fused, options.check_finite, options.autocast});
    }
    const FusedScope fused(options.fused && difference == nullptr);
    const ExactTask exact{parameters, HalfRange(scale, options.autocast, parameters), options.gradient_ratio};
    const bool side_by_side = loop.workers() > 0;
    Report report = loop.run(
        choose_penalised(options.sampling, progress.step, loop.count()),
        [&](const Part& part, const Weights& weights, const Visitor& visitor) -> Estimated {
          if (difference != nullptr && weights.penalty != 0) {
            Estimated result;
            const Visitor also_ratio{visitor.calls, visitor.begin, visitor.keep,
                                     [&](const Evaluation& evaluation, const auto& probes, bool through_first) {
                                       visitor.go_on(evaluation, probes, through_first);
                                       if (options.gradient_ratio) {
                                         result.loss_gradient = {loss_gradient(evaluation.loss, weights.loss, scale,
                                                                               parameters, /*retain_graph=*/true)};
                                       }
                                     }};
            if (!side_by_side) {
              result.squared_norms = (*difference)(batch, part, weights, loop.snapshot(), sums, also_ratio);
            } else {  // the sums have an order
              std::vector<at::Tensor> own(sums.size());
              result.squared_norms = (*difference)(batch, part, weights, loop.snapshot(), own, also_ratio);
              result.gradients = {{std::move(own)}};
            }
            return result;
          }
          return options.cuda_graph != nullptr
                     ? options.cuda_graph->estimate(exact, batch, part, weights, visitor, loop.snapshot())
                     : exact_estimate(exact, batch, part, weights, visitor);
        });
    report.penalty_skipped = without_penalties;
    if (without_penalties) {
      report.penalised.clear();  // measured, maybe as infinite, and of no effect
      for (PenaltyReport& penalty : report.penalties) {
        penalty.value = at::zeros_like(penalty.value);
        penalty.micro_batch_norms = at::zeros_like(penalty.micro_batch_norms);
      }
    }
    std::vector<std::vector<at::Tensor>*> lists{&sums};
    if (options.gradient_ratio) {
      lists.push_back(&loss_sums);
    }
    const auto scale_sums = [&](double factor) {
      const at::NoGradGuard no_grad;
      for (auto* list : lists) {
        if (const auto there = defined(*list); factor != 1 && !there.empty()) {
          at::_foreach_mul_(there, factor);
        }
      }
    };
    const auto skipped = [&] {
      loop.restore();
      report.skipped = true;
      ++progress.skipped;
      return report;
    };
    const auto finish = [&] {
      if (difference != nullptr) {
        difference->finish();
      }
    };
    std::vector<at::Tensor> merged;
    const auto write_buffers = [&] {
      const at::NoGradGuard no_grad;
      for (std::size_t i = 0; i < merged.size(); ++i) {
        if (merged[i].defined()) {
          without_repetitions(loop.buffers()[i].detach()).copy_(merged[i]);
        }
      }
    };

    Ranks::Outcome outcome = loop.outcome(lists);
    const bool counted = outcome.counts.has_value();
    if (!ranks.alone()) {  // what is wrong on this rank is said before anything is added up
      outcome.fared = check_own(report, batch, options, loop.parts(), outcome.overflowed);
      outcome.factor = next.proof.factor;
      finish();
      scale_sums(loop.own_scale());
    }
    if (ranks.agree(outcome)) {
      return skipped();
    }
    next.proof.factor = ranks.alone() ? next.proof.factor : outcome.factor;
    ranks.add_up(lists, parameters.tensors);
    merged = ranks.merged(loop.buffers(), loop.snapshot(), outcome.moved, options.rank_buffers);
    ranks.check();
    scale_sums(loop.scale(counted || ranks.counts() > 0));
    if (counted) {
      report.share = ranks.alone() ? 1 : *outcome.counts / ranks.counts();
    }
    const at::TensorOptions scalar = report.loss.options();
    report.gradient_norm = squared_norm(sums, scalar).sqrt();
    if (outcome.overflowed) {
      report.gradient_norm = at::full_like(report.gradient_norm, unbounded());
    }
    if (options.gradient_ratio) {
      // Infinite where the loss gradient alone is 0, and 0 where both are.
      const at::Tensor penalties = squared_norm(differences(sums, loss_sums), scalar).sqrt();
      report.gradient_ratio = at::where(penalties == 0, penalties, penalties / squared_norm(loss_sums, scalar).sqrt());
    }
    if (options.loss_scale.dynamic.has_value()) {
      follow(*options.loss_scale.dynamic, next.scale, sums, report);
      // Where the loss itself is infinite, no scale helps.
      if (looks_for_non_finite(report, options) && report.loss.isfinite().item<bool>() &&
          report.overflow.item<bool>()) {
        ranks.commit(Fared::well);
        write_buffers();  // which such a step moves, as in plain training
        report.skipped = true;
        progress.scale = next.scale;
        return report;
      }
    }
    const Fared fared = check_finite(report, batch, options, loop.parts());
    if (ranks.alone() && fared == Fared::well) {
      finish();
    }
    GradUpdate update(parameters.tensors, sums);
    if (ranks.commit(fared)) {
      return skipped();
    }
    write_buffers();
    update.write();
    progress.proof = next.proof;  // and no more: a callable may have set or replaced the rest
    progress.scale = next.scale;
    return report;
  });
}

/// What `work()` returns; the other ranks hear of what it throws.
template <class Work>
Report on_all_ranks(Ranks& ranks, const Work& work) {
  try {
    return work();
  } catch (const NonFiniteError& error) {
    ranks.leave(error, true);
    throw;
  } catch (const std::exception& error) {
    ranks.leave(error, false);
    throw;
  } catch (...) {
    ranks.leave(std::runtime_error("something was thrown that is no std::exception"), false);
    throw;
  }
}

MICROREG_INLINE Report take_step(MiniBatch& batch, const RegularizerOptions& options, Progress& progress) {
  Ranks ranks(options.communicator.get(), progress.step);
  return on_all_ranks(ranks, [&] {
    if (options.non_finite == NonFinite::skip_penalty) {
      try {
        return step_once(batch, options, progress, ranks, /*without_penalties=*/false);
      } catch (const NonFiniteError& error) {
        if (!ranks.leave(error, true)) {
          throw;
        }
        ranks.begin_again();
      }
      return step_once(batch, options, progress, ranks, /*without_penalties=*/true);
    }
    return step_once(batch, options, progress, ranks, /*without_penalties=*/false);
  });
}

MICROREG_INLINE std::int64_t Progress::all_skipped() const {
  return skipped + (scale.skipped.defined() ? scale.skipped.item<std::int64_t>() : 0);
}

MICROREG_INLINE void Progress::set_scale(double number, const LossScale& options) {
  if (!options.dynamic.has_value()) {
    throw OptionError("set_loss_scale() is for a DynamicLossScale; a constant one is the option loss_scale");
  }
  if (!(is_finite(number) && number > 0)) {
    throw OptionError(text({"set_loss_scale() is called with ", number, "; it must be a finite number above 0"}));
  }
  scale.scale = at::full({}, number, at::kFloat);
  scale.good_steps.reset();
}

MICROREG_INLINE OwnMemory::OwnMemory(const OwnMemory& other)
    : memory_(other.memory_ == nullptr ? nullptr : std::make_shared<SnapshotMemory>(*other.memory_)) {}

MICROREG_INLINE std::shared_ptr<SnapshotMemory> OwnMemory::shared() {
  if (memory_ == nullptr) {
    memory_ = std::make_shared<SnapshotMemory>();
  }
  return memory_;
}

MICROREG_INLINE Report measure_step(MiniBatch& batch, const RegularizerOptions& options) {
  Ranks ranks(options.communicator.get(), 0);
  ranks.expect_lists(0);
  return on_all_ranks(ranks, [&] {
    Step loop(batch, options, 0, ranks);
    return loop.guarded([&] {
      Report report =
          loop.run(all_penalised(loop.count()),
                   [&](const Part& part, const Weights& /*weights*/, const Visitor& visitor) -> Estimated {
                     visitor.begin();
                     const auto evaluation = batch.evaluate(part, {});
                     visitor.keep(*evaluation);
                     const auto probes = all_probes(batch, *evaluation);
                     visitor.go_on(*evaluation, probes, /*through_first=*/false);
                     return {squared_norms(batch, *evaluation, probes, loop.parameters(), options.loss_scale.number)};
                   });
      Ranks::Outcome outcome = loop.outcome({});
      ranks.agree(outcome);
      loop.restore();
      ranks.check();
      if (outcome.counts.has_value()) {
        static_cast<void>(loop.scale(true));  // throws where there is none
        report.share = *outcome.counts / ranks.counts();
      }
      ranks.commit(Fared::well);
      return report;
    });
  });
}

}  // namespace microreg::inline MICROREG_ABI::detail
