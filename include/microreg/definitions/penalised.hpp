/// @file
/// Definitions of penalised.hpp: one pass that the user's loop has made, or makes when it is asked, as a mini-batch.
#pragma once

#include <microreg/definitions/objective.hpp>
#include <microreg/definitions/step.hpp>
#include <microreg/detail/config.hpp>
#include <microreg/detail/finite.hpp>
#include <microreg/detail/text.hpp>
#include <microreg/error.hpp>
#include <microreg/penalised.hpp>
#include <microreg/step/mini_batch.hpp>

#include <memory>
#include <variant>

namespace microreg::inline MICROREG_ABI {

namespace detail {

class GivenEvaluation final : public Evaluation {
 public:
  GivenEvaluation(const AnyPenalty<>& penalty, const RegularizerOptions& options, PassTensors pass)
      : penalty_(penalty), generator_(options.generator), pass_(std::move(pass)) {
    loss = checked_loss(pass_.loss, Reduction::mean, 1);
    if (pass_.input.defined()) {
      inputs.push_back(pass_.input);
    }
    for (const TermInfo& term : penalty.terms()) {
      if (term.by_input && pass_.input.defined() && !pass_.input.requires_grad()) {
        throw ModelError(text({"penalty ", term.name,
                               " counts the gradient by the input, and PassTensors.input does not require one: call "
                               "input.requires_grad_() before the forward pass"}));
      }
    }
  }

  [[nodiscard]] std::vector<at::Tensor> probes(std::size_t term, Draws* draws) const override {
    return penalty_.terms()[term].probes({pass_.input, pass_.output, none_, loss, generator_, draws});
  }

 private:
  const AnyPenalty<>& penalty_;
  const std::optional<at::Generator>& generator_;
  PassTensors pass_;
  at::Tensor none_;
};

class GivenPass final : public MiniBatch {
 public:
  GivenPass(const std::function<std::vector<NamedParameter>()>& parameters,
            const std::function<std::vector<at::Tensor>()>& buffers, const AnyPenalty<>& penalty,
            const RegularizerOptions& options, const Part& part, const std::function<PassTensors()>& pass,
            bool keeps_graph, SnapshotMemory& memory)
      : parameters_(parameters),
        buffers_(buffers),
        penalty_(penalty),
        options_(options),
        part_(part),
        pass_(pass),
        keeps_graph_(keeps_graph),
        memory_(memory) {}

  [[nodiscard]] std::vector<NamedParameter> parameters() const override { return parameters_(); }
  [[nodiscard]] std::vector<at::Tensor> buffers() const override {
    return buffers_ ? buffers_() : std::vector<at::Tensor>();
  }
  [[nodiscard]] SnapshotMemory* memory() override { return &memory_; }
  [[nodiscard]] std::size_t terms() const override { return penalty_.size(); }
  [[nodiscard]] const TermInfo& term(std::size_t index) const override { return penalty_.terms()[index]; }
  [[nodiscard]] std::vector<Part> parts() const override { return {part_}; }
  void for_each_tensor(const std::function<void(const at::Tensor&, const std::string&)>& /*visit*/) const override {}

  [[nodiscard]] std::unique_ptr<Evaluation> evaluate(const Part& /*part*/,
                                                     const std::vector<at::Tensor>& inputs) override {
    if (!inputs.empty()) {
      throw OptionError(
          "a difference of a penalty by the input needs the model called at another input, which Penalised cannot do; "
          "use Exact, or a Regularizer");
    }
    auto result = std::make_unique<GivenEvaluation>(penalty_, options_, pass_());
    result->shares_graph = keeps_graph_;
    return result;
  }

 private:
  const std::function<std::vector<NamedParameter>()>& parameters_;
  const std::function<std::vector<at::Tensor>()>& buffers_;
  const AnyPenalty<>& penalty_;
  const RegularizerOptions& options_;
  Part part_;
  const std::function<PassTensors()>& pass_;
  bool keeps_graph_;
  SnapshotMemory& memory_;
};

}  // namespace detail

MICROREG_INLINE Penalised::Penalised(std::vector<at::Tensor> parameters, AnyPenalty<> penalty, PenalisedOptions options)
    : named_parameters_([parameters = std::move(parameters)] { return detail::named_parameters_of(parameters); }),
      penalty_(std::move(penalty)),
      options_{.strength = std::move(options.strength),
               .estimator = options.estimator,
               .sampling = options.sampling,
               .select = std::move(options.select),
               .generator = std::move(options.generator),
               .other_leaves = options.other_leaves,
               .non_finite = options.non_finite,
               .check_finite = options.check_finite,
               .fused = options.fused,
               .loss_scale = options.loss_scale,
               .gradient_ratio = options.gradient_ratio,
               .advance = options.advance} {
  detail::validate(options_);
}

MICROREG_INLINE Report Penalised::backward(const Part& part, const PassTensors& pass) {
  if (!std::holds_alternative<Exact>(options_.estimator)) {
    throw OptionError(
        "a difference needs the forward pass again: call backward([&] { return loss; }) with a closure that computes "
        "the loss, or use Exact");
  }
  // The step may be made again, of the same graph.
  return run(part, [&pass] { return pass; }, options_.non_finite == NonFinite::skip_penalty);
}

MICROREG_INLINE Report Penalised::run(const Part& part, const std::function<PassTensors()>& pass, bool keeps_graph) {
  if (!std::holds_alternative<Exact>(options_.estimator) && !buffers_) {
    throw OptionError(
        "a difference runs the closure again and has to put buffers (BatchNorm statistics) back, which a list of "
        "parameters does not tell: make the Penalised with the model, or modules(), instead of its parameters");
  }
  if (part.index < 0 || part.index >= part.count) {
    throw OptionError(
        detail::text({"part ", part.index, " of ", part.count, " is none; take it from micro_batches()"}));
  }
  if (options_.loss_scale.dynamic.has_value() && part.count > 1) {
    throw OptionError(
        detail::text({"loss_scale is dynamic, and this is part ", part.index, " of ", part.count,
                      ": a part that overflows cannot be left out of a step alone; use a number, or Regularizer"}));
  }
  if (options_.non_finite == NonFinite::skip_step && part.count > 1) {
    throw OptionError(
        detail::text({"non_finite is NonFinite::skip_step, and this is part ", part.index, " of ", part.count,
                      ": a part that is left out leaves the others' share of the step in .grad; use "
                      "NonFinite::error or skip_penalty, or Regularizer"}));
  }
  if (!(detail::is_finite(part.weight) && part.weight > 0)) {
    throw OptionError(detail::text({"part.weight is ", part.weight, "; it must be a finite number above 0"}));
  }
  // Held, in case the closure assigns to this Penalised meanwhile.
  const auto parameters = named_parameters_;
  const auto buffers = buffers_;
  const AnyPenalty<> penalty = penalty_;
  const RegularizerOptions options = options_;
  const auto memory = memory_.shared();
  detail::GivenPass batch(parameters, buffers, penalty, options, part, pass, keeps_graph, *memory);
  Report report = detail::take_step(batch, options, progress_);
  progress_.step += options.advance && part.index + 1 == part.count ? 1 : 0;
  return report;
}

}  // namespace microreg::inline MICROREG_ABI
