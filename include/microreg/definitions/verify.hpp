/// @file
/// Definitions of verify.hpp.
#pragma once

#include <ATen/ATen.h>
#include <ATen/Context.h>
#include <ATen/core/grad_mode.h>
#include <c10/core/Allocator.h>
#include <c10/util/Exception.h>
#include <c10/util/ThreadLocalDebugInfo.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/basic_ops.h>
#include <microreg/detail/config.hpp>
#include <microreg/detail/finite.hpp>
#include <microreg/detail/text.hpp>
#include <microreg/error.hpp>
#include <microreg/estimator.hpp>
#include <microreg/fused/scope.hpp>
#include <microreg/gates/unseen.hpp>
#include <microreg/options.hpp>
#include <microreg/step/active_steps.hpp>
#include <microreg/step/comparison.hpp>
#include <microreg/step/difference_passes.hpp>
#include <microreg/step/differences.hpp>
#include <microreg/step/double_backward.hpp>
#include <microreg/step/gradients.hpp>
#include <microreg/step/graph.hpp>
#include <microreg/step/guarded_gradients.hpp>
#include <microreg/step/loop.hpp>
#include <microreg/step/mini_batch.hpp>
#include <microreg/step/probes.hpp>
#include <microreg/step/recurrent.hpp>
#include <microreg/step/requirements.hpp>
#include <microreg/step/snapshot.hpp>
#include <microreg/step/tensor_lists.hpp>
#include <microreg/step/training_calls.hpp>
#include <microreg/step/untrained_leaves.hpp>
#include <microreg/step/visitor.hpp>
#include <microreg/verify.hpp>

#include <algorithm>
#include <array>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <exception>
#include <iterator>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <set>
#include <string>
#include <string_view>
#include <type_traits>
#include <unordered_set>
#include <utility>
#include <variant>
#include <vector>

namespace microreg::inline MICROREG_ABI::detail {

/// What LibTorch allocates on one kind of device while it is told of it, on any thread.
class AllocationPeak final : public c10::MemoryReportingInfoBase {
 public:
  explicit AllocationPeak(c10::DeviceType device) : device_(device) {}

  void reportMemoryUsage(void* /*pointer*/, std::int64_t bytes, std::size_t /*allocated*/, std::size_t /*reserved*/,
                         c10::Device device) override {
    if (device.type() == device_) {
      const std::lock_guard lock(mutex_);
      now_ += bytes;
      peak_ = std::max(peak_, now_);
    }
  }
  [[nodiscard]] bool memoryProfilingEnabled() const override { return true; }
  [[nodiscard]] std::int64_t bytes() const {
    const std::lock_guard lock(mutex_);
    return peak_;
  }

 private:
  c10::DeviceType device_;
  mutable std::mutex mutex_;
  std::int64_t now_ = 0;
  std::int64_t peak_ = 0;
};

/// "_cdist_backward" of "the derivative for '_cdist_backward' is not implemented.", or all of it.
inline std::string operation_in(std::string_view sentence) {
  constexpr std::string_view before = "derivative for ";
  constexpr std::string_view after = " is not implemented";
  const auto begin = sentence.find(before);
  const auto end = sentence.find(after);
  if (begin == std::string_view::npos || end == std::string_view::npos || end < begin + before.size()) {
    return std::string(sentence);
  }
  std::string operation(sentence.substr(begin + before.size(), end - begin - before.size()));
  std::erase(operation, '\'');
  return operation;
}

/// The passes of verify() over one micro-batch, each from the same state.
class Verifier {
 public:
  /// Throws before anything is changed.
  Verifier(MiniBatch& batch, const RegularizerOptions& options)
      : batch_(batch),
        options_(options),
        alone_(nullptr, 0),
        step_(batch, options, 0, alone_),
        parameters_(step_.parameters()),
        all_parameters_(Step::all_parameters(batch, options)),
        part_(step_.parts().front()),
        strengths_(step_.strengths()),
        state_(everything()) {
    part_.weight = 1;
    if (parameters_.tensors.front().is_meta()) {
      throw ModelError("the model is on the meta device, which has no values to verify; move it to a real one");
    }
  }

  Verification run() {
    try {
      const at::AutoGradMode enable_grad(true);
      const ActiveStep active(parameters_, ActiveStep::Moves::parameters, /*side_by_side=*/false);
      const GuardedGradients guard(parameters_.tensors, parameters_.names);
      describe();
      try_loss();
      try_exact();
      try_difference();
      look_for_kinks();
      weigh();
      list_parameters();
      measure_costs();
      judge();
    } catch (const SparseGradient& error) {
      state_.restore_after_error();
      step_.rethrow_named(error);
    } catch (...) {
      state_.restore_after_error();
      throw;
    }
    state_.restore();
    return std::move(found_);
  }

 private:
  using Gradient = std::vector<at::Tensor>;

  /// The gradient of the penalties by double backward, or why there is none.
  struct ExactTrial {
    std::optional<Gradient> gradient;
    std::vector<at::Tensor> squared_norms;
    std::string refusal;
    std::vector<MissingSecondDerivative> missing;
    std::map<std::string, std::int64_t> fused, stock;
  };

  Snapshot everything() const {
    std::vector<at::Tensor> others;
    for (const NamedParameter& parameter : all_parameters_) {
      others.push_back(parameter.tensor);
    }
    batch_.for_each_tensor([&](const at::Tensor& tensor, const std::string& /*path*/) { others.push_back(tensor); });
    return {batch_.buffers(), others, devices_of(parameters_.tensors), options_.generator};
  }

  [[nodiscard]] Gradient empty() const { return Gradient(parameters_.tensors.size()); }
  [[nodiscard]] bool wants_difference() const { return options_.estimator.differences() != nullptr; }
  [[nodiscard]] bool fused() const { return options_.fused && FusedScope::enabled(); }
  /// With a scale that would overflow in no network that trains, where the options have one that follows it.
  [[nodiscard]] HalfRange range() const {
    return {options_.loss_scale.dynamic.has_value() ? 1024 : options_.loss_scale.number, options_.autocast,
            parameters_};
  }

  std::unique_ptr<Evaluation> evaluate() {
    return Step::explained(part_, [&] { return batch_.evaluate(part_, {}); });
  }

  void problem(std::string sentence) { found_.problems.push_back(std::move(sentence)); }
  void note(std::string sentence) { found_.notes.push_back(std::move(sentence)); }

  void describe() {
    for (const Part& part : step_.parts()) {
      found_.samples += part.size;
    }
    found_.micro_batches = static_cast<std::int64_t>(step_.parts().size());
    found_.micro_batch_samples = part_.size;
    if (std::all_of(strengths_.begin(), strengths_.end(), [](double strength) { return strength == 0; })) {
      found_.strength_assumed = true;
      for (std::size_t i = 0; i < strengths_.size(); ++i) {
        const double own = batch_.term(i).strength.at(0);
        strengths_[i] = own > 0 ? own : 1;
      }
      note("the strength is 0 at step 0 (a warm-up, or no penalty): everything here is with strength 1 instead");
    }
    const Part& last = step_.parts().back();
    if (last.size < part_.size) {
      note(text({"the last micro-batch has ", last.size, last.size == 1 ? " sample" : " samples", " instead of ",
                 part_.size, " and counts ",
                 options_.weighting == Weighting::samples ? "by them" : "as much as the others",
                 "; .short_last can merge or drop it"}));
    }
    if (part_.size == 1) {
      note(
          "a micro-batch is one sample: the penalty is the mean over the norms of single samples, not that of a "
          "mini-batch");
    }
  }

  /// Twice, to see whether a pass repeats itself.
  void try_loss() {
    UntrainedLeaves untrained;
    {
      RecurrentCalls recurrent(step_.parts().size() > 1);
      std::optional<TrainingCalls> training(std::in_place);
      const auto evaluation = evaluate();
      recurrent.require_samples_in_batch(part_.size);
      batch_norms_ = training->batch_norms();
      dropouts_ = training->dropouts();
      training.reset();
      draws_ = state_.generators().moved();
      writes_ = state_.changes();
      found_.loss = evaluation->loss.item<double>();
      loss_type_ = evaluation->loss.scalar_type();
      found_.where = text({loss_type_, " on ", parameters_.tensors.front().device()});
      if (options_.other_leaves == OtherLeaves::refused) {
        untrained.note(batch_, *evaluation, parameters_);
      }
      loss_gradient_ = gradients({evaluation->loss}, parameters_.tensors, {}, evaluation->shares_graph,
                                 /*create_graph=*/false, "the loss");
      for (at::Tensor& each : loss_gradient_) {
        each = each.defined() ? owned(std::move(each)) : each;
      }
      found_.loss_gradient_norm = norm_of(loss_gradient_);
    }
    try {
      untrained.require_none();
    } catch (const ModelError& error) {
      problem(error.what());
    }
    state_.restore();
    const double again = evaluate()->loss.item<double>();
    state_.restore();
    const double epsilon = loss_type_ == at::kDouble ? 1e-12 : loss_type_ == at::kFloat ? 1e-4 : 5e-2;
    if (std::abs(again - found_.loss) > epsilon * std::max(std::abs(again), std::abs(found_.loss))) {
      problem(text({"the same pass made twice gives the losses ", found_.loss, " and ", again,
                    ": it draws noise that is not LibTorch's, or keeps state outside of its buffers, so a difference "
                    "would be wrong, and the comparisons here mean little"}));
    }
  }

  ExactTrial exact_trial(bool with_fused, const std::vector<double>& strengths) {
    ExactTrial result;
    const FusedScope scope(with_fused);
    const auto evaluation = evaluate();
    const auto missing = [&](const std::string& sentence) {
      result.missing.push_back({operation_in(sentence),
                                place_of(sentence, evaluation->loss, parameters_.tensors, parameters_.names),
                                remedy_of_missing(sentence, /*second=*/true)});
    };
    std::set<std::string> dead_ends;
    try {
      DoubleBackward step(*evaluation, parameters_, range(), strongest_of(strengths));
      for (std::size_t i = 0; i < strengths.size(); ++i) {
        const TermInfo& term = batch_.term(i);
        result.squared_norms.push_back(
            step.add(term, checked_probes(*evaluation, i, term), strengths[i], strengths[i] > 0));
      }
      dead_ends = count(step.roots(), evaluation->loss, result);
      Gradient sums = empty();
      add_scaled(sums, step.finish(std::nullopt));
      result.gradient = std::move(sums);
    } catch (const MissingDerivative& error) {
      dead_ends.insert(error.operation());
      std::for_each(dead_ends.begin(), dead_ends.end(), missing);
      result.refusal = text({result.missing.size(), result.missing.size() == 1 ? " operation has" : " operations have",
                             " no second derivative"});
    } catch (const Error& error) {
      result.refusal = error.what();
    } catch (const c10::Error& error) {
      result.refusal = sentence_of(error);
    }
    state_.restore();
    return result;
  }

  /// Counts the operations in the graph of the probes' gradients, and returns what LibTorch will say at those behind
  /// which there is nothing.
  std::set<std::string> count(const std::vector<at::Tensor>& roots, const at::Tensor& loss, ExactTrial& result) const {
    using torch::autograd::Node;
    std::unordered_set<const Node*> forward;
    for_each_node(nodes_of({loss}), [&](Node& node, NodeKind /*kind*/) { forward.insert(&node); });
    std::set<std::string> dead_ends;
    for_each_node(nodes_of(roots), [&](Node& node, NodeKind /*kind*/) {
      if (forward.contains(&node)) {
        return;
      }
      if (const auto* error = dynamic_cast<const torch::autograd::Error*>(&node)) {
        dead_ends.insert(error->msg);
        return;
      }
      if (const auto* delayed = dynamic_cast<const torch::autograd::DelayedError*>(&node)) {
        dead_ends.insert(delayed->msg);
        return;
      }
      const std::string name = node.name();
      constexpr std::string_view ours = "microreg::aten::";
      if (name.starts_with(ours)) {
        ++result.fused[name.substr(ours.size())];
      } else if (const auto first = name.find("Backward");
                 name.find("Backward", first + 1) != std::string::npos && !name.starts_with("microreg::")) {
        ++result.stock[name.substr(0, name.rfind("Backward"))];
      }
    });
    return dead_ends;
  }

  void try_exact() {
    ExactTrial used = exact_trial(fused(), strengths_);
    found_.exact_refusal = used.refusal;
    found_.missing = used.missing;
    found_.fused = used.fused;
    found_.stock = used.stock;
    for (std::size_t i = 0; i < batch_.terms(); ++i) {
      const TermInfo& term = batch_.term(i);
      PenaltyUse& use = found_.penalties.emplace_back();
      use.name = term.name;
      use.strength = strengths_[i];
      if (i < used.squared_norms.size()) {
        const double squared = used.squared_norms[i].item<double>();
        use.value = term.squared ? squared : std::sqrt(squared);
      }
      if (!used.gradient || strengths_[i] == 0) {
        continue;
      }
      if (batch_.terms() == 1) {
        use.gradient_norm = norm_of(*used.gradient) / strengths_[i];
        continue;
      }
      std::vector<double> alone(strengths_.size(), 0.0);
      alone[i] = 1;
      if (const ExactTrial one = exact_trial(fused(), alone); one.gradient) {
        use.gradient_norm = norm_of(*one.gradient);
      }
    }
    if (FusedScope::enabled()) {
      const ExactTrial other = exact_trial(!fused(), strengths_);
      found_.other_refusal = used.refusal.empty() ? other.refusal : std::string();
      if (used.gradient && other.gradient &&
          (is_finite(norm_of(*used.gradient)) || is_finite(norm_of(*other.gradient)))) {
        found_.fused_error = fused() ? compare(*used.gradient, *other.gradient).error()
                                     : compare(*other.gradient, *used.gradient).error();
      }
    }
    exact_ = std::move(used.gradient);
  }

  /// The options' own difference, or a forward one, frozen and proven as in training.
  Estimator chosen_difference() {
    found_.difference = "ForwardDifference";
    if (const auto* forward = std::get_if<ForwardDifference>(&options_.estimator)) {
      return Estimator(proven(*forward));
    }
    if (const auto* central = std::get_if<CentralDifference>(&options_.estimator)) {
      found_.difference = "CentralDifference";
      return Estimator(proven(*central));
    }
    return Estimator(ForwardDifference{});
  }
  template <class Difference>
  static Difference proven(Difference difference) {
    difference.check_every = 1000;
    return difference;
  }

  void try_difference() {
    estimator_ = chosen_difference();
    const bool comparable = std::visit(
        [](const auto& each) {
          if constexpr (std::is_same_v<std::decay_t<decltype(each)>, Exact>) {
            return true;
          } else {
            return each.gates == Gates::frozen || each.tolerance > 0;
          }
        },
        estimator_);
    // Without the loss gradient first, beside which a small one is lost in rounding. In training it is allowed to be.
    for (const double loss : {0.0, 1.0}) {
      if (loss == 0 && !comparable) {
        continue;
      }
      found_.difference_refusal.clear();
      Gradient sums = empty();
      proof_ = {};
      try {
        require_plain_input(batch_);
        difference_once(estimator_, loss, sums);
        if (loss > 0) {
          sums = differences(sums, loss_gradient_);
        }
        difference_ = std::move(sums);
      } catch (const Error& error) {
        found_.difference_refusal = error.what();
      } catch (const c10::Error& error) {
        found_.difference_refusal = sentence_of(error);
      }
      state_.restore();
      if (difference_) {
        break;
      }
    }
    if (difference_ && exact_) {
      found_.difference_error = compare(*difference_, *exact_).error();
    }
  }

  void difference_once(const Estimator& estimator, double loss, Gradient& sums) {
    const auto difference = estimator.differences()(
        {estimator, parameters_, proof_, options_.fused, options_.check_finite, options_.autocast});
    std::mutex calling;
    Calls calls(calling);
    const Visitor visitor{calls, [] {}, [](Evaluation& /*evaluation*/) {},
                          [](const Evaluation& /*evaluation*/, const auto& /*probes*/, bool /*through_first*/) {}};
    (void)(*difference)(batch_, part_, Weights{loss, 1, strengths_}, step_.snapshot(), sums, visitor);
    difference->finish();
  }

  void look_for_kinks() {
    std::set<std::string> unseen;
    std::set<std::string> functions;
    try {
      GateTape tape;
      std::unique_ptr<Evaluation> evaluation;
      evaluation = recorded(tape, Frozen::all, [&] { return evaluate(); });
      const auto look = [&](const at::Tensor& scalar, const std::vector<const GateTape*>& tapes) {
        const auto kinks = unseen_kinks(scalar, tapes);
        unseen.insert(kinks.begin(), kinks.end());
        const auto all = unseen_kinks(scalar, tapes, /*functions=*/true);
        std::set_difference(all.begin(), all.end(), kinks.begin(), kinks.end(),
                            std::inserter(functions, functions.end()));
      };
      look(evaluation->loss, {&tape});
      for (std::size_t i = 0; i < batch_.terms(); ++i) {
        GateTape of_probes;
        for (const at::Tensor& probe :
             recorded(of_probes, Frozen::all, [&] { return checked_probes(*evaluation, i, batch_.term(i)); })) {
          look(probe, {&tape, &of_probes});
        }
      }
    } catch (const GateError& error) {
      unseen.insert(error.what());
    } catch (const Error&) {  // of the penalty: exact has said it
    }
    state_.restore();
    found_.not_frozen.assign(unseen.begin(), unseen.end());
    found_.functions.assign(functions.begin(), functions.end());
  }

  [[nodiscard]] const std::optional<Gradient>& penalties() const { return exact_ ? exact_ : difference_; }

  /// The penalties' gradient against that of the loss.
  void weigh() {
    if (!penalties()) {
      return;
    }
    const double scale = options_.reduction == Reduction::total ? static_cast<double>(found_.samples) : 1.0;
    const double of_loss = found_.loss_gradient_norm * scale;
    const double of_penalties = norm_of(*penalties());
    if (!is_finite(of_loss) || !is_finite(of_penalties) || of_loss == 0) {
      return;
    }
    const double ratio = of_penalties / of_loss;
    found_.gradient_ratio = ratio;
    if (ratio > 0) {
      const double strength = found_.strength_assumed ? 1.0 : options_.strength.at(0);
      found_.strength_for_a_tenth = 0.1 * strength / ratio;
      found_.strength_for_one = strength / ratio;
    }
  }

  void list_parameters() {
    std::unordered_set<const c10::TensorImpl*> seen;
    const std::set<std::size_t> counted(parameters_.selected.begin(), parameters_.selected.end());
    for (const NamedParameter& parameter : all_parameters_) {
      if (!parameter.tensor.defined() || !seen.insert(parameter.tensor.unsafeGetTensorImpl()).second) {
        continue;
      }
      ParameterUse use{parameter.name, parameter.tensor.sizes().vec()};
      const auto place = std::find_if(parameters_.tensors.begin(), parameters_.tensors.end(),
                                      [&](const at::Tensor& tensor) { return tensor.is_same(parameter.tensor); });
      use.frozen = place == parameters_.tensors.end();
      if (!use.frozen) {
        const auto i = static_cast<std::size_t>(place - parameters_.tensors.begin());
        use.loss = loss_gradient_[i].defined();
        use.selected = counted.contains(i);
        if (penalties()) {
          const at::Tensor& gradient = (*penalties())[i];
          use.penalty = gradient.defined() && gradient.count_nonzero().item<std::int64_t>() > 0;
        }
      }
      found_.parameters.push_back(std::move(use));
    }
  }

  template <class Pass>
  Cost cost_of(const Pass& pass) {
    Cost result;
    const auto once = [&] {
      const auto start = std::chrono::steady_clock::now();
      (void)norm_of(pass());  // waits for a device
      const std::chrono::duration<double> took = std::chrono::steady_clock::now() - start;
      state_.restore();
      return took.count();
    };
    {
      const auto peak = std::make_shared<AllocationPeak>(parameters_.tensors.front().device().type());
      const c10::DebugInfoGuard guard(c10::DebugInfoKind::PROFILER_STATE, peak);
      (void)norm_of(pass());
      result.peak_bytes = peak->bytes();
    }
    state_.restore();
    std::array<double, 3> times{once(), once(), once()};
    std::sort(times.begin(), times.end());
    result.seconds = times[1];
    return result;
  }

  void measure_costs() {
    found_.plain = cost_of([&] {
      const auto evaluation = evaluate();
      return gradients({evaluation->loss}, parameters_.tensors, {}, evaluation->shares_graph, /*create_graph=*/false,
                       "the loss");
    });
    const Weights weights{1, 1, strengths_};
    if (exact_) {
      found_.exact_cost = cost_of([&] {
        const FusedScope scope(fused());
        const auto evaluation = evaluate();
        Gradient sums = empty();
        add_scaled(sums,
                   double_backward(batch_, *evaluation, all_probes(batch_, *evaluation), weights, parameters_, range())
                       .gradients);
        return sums;
      });
    }
    if (difference_) {
      const Estimator unproven = std::visit(
          [](auto each) {
            if constexpr (!std::is_same_v<decltype(each), Exact>) {
              each.check_every = 0;
            }
            return Estimator(each);
          },
          estimator_);
      found_.difference_cost = cost_of([&] {
        Gradient sums = empty();
        difference_once(unproven, 1, sums);
        return sums;
      });
    }
  }

  [[nodiscard]] bool finite_loss() const { return is_finite(found_.loss) && is_finite(found_.loss_gradient_norm); }

  /// What is NaN or infinite, and where that comes from: what follows of it is no fault of its own.
  void judge_finite() {
    std::string nans;
    std::string infinities;
    const auto look = [&](const std::string& name, const at::Tensor& tensor) {
      if (!tensor.defined() || tensor.layout() != at::kStrided || !tensor.is_floating_point()) {
        return;
      }
      const auto count = [](const at::Tensor& mask) { return mask.sum().item<std::int64_t>(); };
      const auto add = [&](std::string& to, std::int64_t number, const char* what) {
        if (number > 0) {
          to += text({to.empty() ? "" : ", ", name, " of shape ", tensor.sizes(), " (", number, what});
        }
      };
      add(nans, count(at::isnan(tensor)), " NaN)");
      add(infinities, count(at::isinf(tensor)), " infinite)");
    };
    batch_.for_each_tensor([&](const at::Tensor& tensor, const std::string& path) { look(path, tensor); });
    for (const NamedParameter& parameter : all_parameters_) {
      look("parameter " + parameter.name, parameter.tensor);
    }
    for (const at::Tensor& buffer : batch_.buffers()) {
      look("a buffer", buffer);
    }
    if (finite_loss()) {
      if (!nans.empty()) {
        note(text({"there is NaN in ", nans, ", of which this micro-batch's loss is not a function"}));
      }
      return;
    }
    const std::string& found = nans.empty() ? infinities : nans;
    if (found.empty()) {
      problem(text({"the loss is ", found_.loss, ", the norm of its gradient ", found_.loss_gradient_norm,
                    ": batch, parameters and buffers are finite, so it arises in the forward pass or the loss (a "
                    "division or a logarithm of 0, the root of a negative number, an overflow, which half types have "
                    "soon)"}));
    } else {
      problem(text({"the loss is ", found_.loss, ", the norm of its gradient ", found_.loss_gradient_norm,
                    ", which comes from ", found}));
    }
    // Before what follows of it.
    std::rotate(found_.problems.begin(), found_.problems.end() - 1, found_.problems.end());
  }

  /// What of all that is a problem with these options, and what one should know.
  void judge() {
    judge_finite();
    if (wants_difference()) {
      if (!found_.difference_refusal.empty()) {
        problem(text({found_.difference, " is refused: ", found_.difference_refusal}));
      }
    } else if (!found_.exact_refusal.empty()) {
      problem(text({"Exact is refused: ", found_.exact_refusal,
                    found_.difference_refusal.empty() ? "; ForwardDifference would do" : ""}));
    }
    const bool coarse = loss_type_ != at::kDouble;
    const bool half = loss_type_ != at::kDouble && loss_type_ != at::kFloat;
    const double most = half ? 0.2 : coarse ? 1e-2 : 1e-6;
    if (found_.fused_error && exceeds(*found_.fused_error, most)) {
      problem(text({"fused double backward and LibTorch's own are ", in_percent(*found_.fused_error),
                    " apart: one of them is wrong, or the gradient is lost in rounding (compare in float64); "
                    ".fused = false takes LibTorch's own"}));
    }
    if (finite_loss() && penalties() && !is_finite(norm_of(*penalties()))) {
      problem(
          "the gradient of the penalties is not finite although the loss is: an operation whose second derivative "
          "is infinite (a square root or a norm at 0), or half types that overflow");
    } else if (penalties() && norm_of(*penalties()) == 0) {
      problem(
          "the gradient of the penalties is 0: the probe's gradient does not depend on the parameters (a linear "
          "model with a linear loss), or is 0 on this micro-batch");
    } else if (found_.gradient_ratio && !found_.strength_assumed) {
      if (*found_.gradient_ratio < 1e-3) {
        note("the penalties hardly move the gradient; a ratio of 0.1 to 1 is usual");
      } else if (*found_.gradient_ratio > 10) {
        note("the penalties are nearly all of the gradient; a ratio of 0.1 to 1 is usual");
      }
    }
    note_layers();
    note_types();
  }

  void note_layers() {
    if (batch_norms_ > 0) {
      note(text({batch_norms_, batch_norms_ == 1 ? " batch normalisation takes" : " batch normalisations take",
                 " the statistics of each micro-batch of ", part_.size,
                 " samples, not of the mini-batch, and running statistics move once a micro-batch",
                 part_.size <= 3 ? "; over so few samples differences are far less exact" : ""}));
      if (step_.parts().back().size == 1 && step_.parts().size() > 1) {
        problem(
            "the last micro-batch has one sample, over which batch normalisation has no variance in training mode; "
            "set .short_last = ShortLast::merged or ShortLast::dropped");
      }
    }
    if (dropouts_ > 0) {
      note(text({dropouts_, dropouts_ == 1 ? " dropout is" : " dropouts are",
                 " on: each micro-batch has masks of its own, which its loss and penalties share"}));
    } else if (draws_) {
      note("forward pass or loss draws random numbers, which the passes of a micro-batch share");
    }
    if (writes_ > 0 && batch_norms_ == 0) {
      note(text({"the forward pass writes to ", writes_, writes_ == 1 ? " tensor" : " tensors",
                 " among buffers, parameters and batch"}));
    }
    if (!found_.functions.empty() && found_.difference_refusal.empty()) {
      note(text({"nobody knows what a function of one's own decides (", found_.functions.front(),
                 "): the proof of a difference compares it with exact on this micro-batch only"}));
    }
  }

  void note_types() {
    std::set<std::string> types;
    bool half = loss_type_ == at::kHalf || loss_type_ == at::kBFloat16;
    bool fine = false;
    for (const at::Tensor& parameter : parameters_.tensors) {
      const at::ScalarType type = parameter.scalar_type();
      types.insert(text({type}));
      half = half || type == at::kHalf || type == at::kBFloat16;
      fine = fine || type == at::kDouble;
    }
    if (half || options_.autocast.has_value()) {
      note(
          "half types: a penalty's gradient has two to three digits, and a difference is lost in rounding unless the "
          "network computes in float32");
    }
    if (types.size() > 1 || (fine && loss_type_ != at::kDouble)) {
      note("parameters and loss are of several types: a difference is as coarse as the coarsest");
    }
    if (parameters_.tensors.front().is_cuda() && loss_type_ == at::kFloat) {
      bool short_floats = false;
      try {  // where it was chosen per operation, the whole has no answer
        short_floats = at::globalContext().allowTF32CuBLAS() || at::globalContext().allowTF32CuDNN();
      } catch (const c10::Error&) {
        short_floats = true;
      }
      if (short_floats) {
        note(
            "TF32 is allowed, in which products and convolutions of float32 have three digits, and a difference "
            "fewer; compare with at::globalContext().setAllowTF32CuBLAS(false) and setAllowTF32CuDNN(false)");
      }
    }
  }

  MiniBatch& batch_;
  const RegularizerOptions& options_;
  Ranks alone_;
  Step step_;
  const Parameters& parameters_;
  std::vector<NamedParameter> all_parameters_;
  Part part_;
  std::vector<double> strengths_;
  Snapshot state_;
  Verification found_;

  at::ScalarType loss_type_ = at::kFloat;
  Gradient loss_gradient_;
  std::int64_t batch_norms_ = 0;
  std::int64_t dropouts_ = 0;
  bool draws_ = false;
  std::size_t writes_ = 0;
  std::optional<Gradient> exact_;
  Estimator estimator_;
  Proof proof_;
  std::optional<Gradient> difference_;
};

MICROREG_INLINE Verification verify_step(MiniBatch& batch, const RegularizerOptions& options) {
  return Verifier(batch, options).run();
}

}  // namespace microreg::inline MICROREG_ABI::detail
