/// @file
/// What verify() found out about a model, its loss and its penalties: numbers on the host, and words.
#pragma once

#include <microreg/version.hpp>

#include <cstdint>
#include <iosfwd>
#include <map>
#include <optional>
#include <string>
#include <vector>

namespace microreg::inline MICROREG_ABI {

/// An operation that exact double backward cannot pass.
struct MissingSecondDerivative {
  std::string operation;  ///< as LibTorch names it: "_cdist_backward", or its whole sentence
  std::string place;      ///< "behind parameter features.3.weight"; empty if that cannot be told
  std::string remedy;     ///< what to do: take other operations, another setting, or a difference
};

/// A parameter, and who uses it.
struct ParameterUse {
  std::string name;                      ///< as NamedParameter::name
  std::vector<std::int64_t> shape = {};  ///< empty for a scalar
  bool frozen = false;                   ///< requires no gradient: nothing else is known of it then
  bool loss = false;                     ///< the loss is a function of it
  bool selected = false;                 ///< it counts in the norm, as the option select says
  std::optional<bool> penalty = {};      ///< the penalties have a gradient by it that is not zero; empty: not known
};

/// One penalty on the micro-batch that was tried.
struct PenaltyUse {
  std::string name;                          ///< what its name() gives
  double strength = 0;                       ///< the factor in the objective
  std::optional<double> value = {};          ///< R_M, without the strength; empty where it could not be had
  std::optional<double> gradient_norm = {};  ///< of R_M, without the strength; empty where it could not be had
};

/// What one micro-batch takes, optimizer step excluded.
struct Cost {
  double seconds = 0;           ///< the median of three
  std::int64_t peak_bytes = 0;  ///< allocated by LibTorch at the peak, on the model's kind of device
};

/// The outcome of verify(). Printed by text(), operator<<, or, with microreg/format.hpp, by fmt.
struct Verification {
  std::int64_t samples = 0;              ///< |B|
  std::int64_t micro_batches = 0;        ///< K
  std::int64_t micro_batch_samples = 0;  ///< |M| of the one that was tried, the first
  std::string where;                     ///< type of the loss and device: "float32 on cpu"

  double loss = 0;                    ///< L_M of the micro-batch that was tried
  double loss_gradient_norm = 0;      ///< || grad L_M ||, by all parameters that are trained
  std::vector<PenaltyUse> penalties;  ///< in the order of the sum
  bool strength_assumed = false;      ///< it is 0 at step 0; all here is with strength 1 instead
  /// Of strength times penalties, over the norm of the loss gradient; empty where one of them could not be had.
  std::optional<double> gradient_ratio;
  /// The option strength by which that ratio would be 0.1; empty where it is not known, or 0.
  std::optional<double> strength_for_a_tenth, strength_for_one;  ///< and by which it would be 1

  /// Why exact double backward is refused; empty where it goes through.
  std::string exact_refusal;
  std::vector<MissingSecondDerivative> missing;  ///< the operations, where that is the reason
  /// Exact with the fused double backward against LibTorch's own, relative; empty where one of them is not to be had.
  std::optional<double> fused_error;
  /// Where exact goes through: why it would not with the other value of the option fused.
  std::string other_refusal;

  std::string difference;  ///< "ForwardDifference": the one that was tried, the options' own if they have one
  /// Why it is refused; empty where it agrees with exact.
  std::string difference_refusal;
  std::optional<double> difference_error;  ///< against exact, relative
  std::vector<std::string> not_frozen;     ///< nodes with a kink that a difference cannot freeze, or its refusal
  std::vector<std::string> functions;      ///< functions of one's own, of which nobody knows what they decide

  std::vector<ParameterUse> parameters;  ///< of model and loss, and also_train; each tensor once

  Cost plain;  ///< forward pass, loss and its gradient
  /// With the penalties by double backward; empty where that is refused.
  std::optional<Cost> exact_cost, difference_cost;  ///< by the difference, its proof not counted; empty where refused

  /// Operations in the gradient's graph that are differentiated by the fused formulas, with how often. What is
  /// differentiated as in a forward pass (products, sums) is neither here nor in `stock`.
  std::map<std::string, std::int64_t> fused, stock;  ///< those by LibTorch's own second derivatives, with how often

  std::vector<std::string> problems;  ///< what should be mended before training with these options
  std::vector<std::string> notes;     ///< what should be known

  /// Whether there are no problems.
  [[nodiscard]] bool ok() const noexcept { return problems.empty(); }

  /// All of it in a dozen lines, without a line break at the end.
  [[nodiscard]] std::string text() const;
};

/// Writes text().
std::ostream& operator<<(std::ostream& out, const Verification& verification);

}  // namespace microreg::inline MICROREG_ABI

#if !defined(MICROREG_COMPILED)
#include <microreg/definitions/verification.hpp>
#endif
