/// @file
/// ForwardDifference and CentralDifference, as options: two of the estimators.
#pragma once

#include <microreg/version.hpp>

#include <cstdint>

namespace microreg::inline MICROREG_ABI {

/// What happens, in the further passes of a difference, to the choices that piecewise-linear operations make (which
/// ReLUs are on, which element a max pooling takes).
enum class Gates {
  frozen,  ///< they are those of the first pass: the difference converges to the exact gradient on ReLU networks too
  free,    ///< they are made anew: on ReLU networks another regularizer, whose distance grows as the step shrinks
};

/// What a difference does where a torch::autograd::Function of the user's own, or a hook on a tensor, is in the graph.
/// Nobody but its author knows what that decides: a kink between the points of a difference would make another
/// regularizer, and so would a change to the gradient, on some micro-batches and not on others, so that no proof finds
/// it in time.
enum class OwnFunctions {
  refused,  ///< GateError, by name
  smooth,   ///< their author says that they have no kink and that hooks only look; proofs try, at longer distances too
};

/// What a difference moves in its further passes.
enum class Displace {
  parameters,  ///< the memory of the parameters, which whoever else reads them meanwhile sees displaced
  copies,      ///< copies, which all operations of the pass's thread see in place of the parameters: other threads may
               ///< read these at any time, and two parameters may share memory. Costs a boxed call an operation
};

/// The Hessian-vector product from two gradients,
///
///     H g ~ (grad s(w + e g) - grad s(w)) / e,   e = step / ||g||.
///
/// The error falls linearly with the step until rounding takes over. Cost: 2.0 plain steps for GradientNorm, 8/3 for
/// one other penalty, in exact arithmetic. Memory: that of a plain step, the gates, and three tensors per parameter.
struct ForwardDifference {
  double step = 0;  ///< norm of the displacement e g; 0: chosen from the type and the norm of the parameters
  Gates gates = Gates::frozen;  ///< in the displaced pass: those of the first, or its own
  /// The first penalised micro-batch, and one again after so many penalised steps, is differentiated by double backward
  /// too and compared: DifferenceError if they disagree. Costs one exact micro-batch each time. 0: never.
  std::int64_t check_every = 1000;
  /// How far they may be apart, relative to the penalty's gradient; 0: chosen from the type of the parameters. With
  /// Gates::free, another regularizer on networks with kinks, nothing is compared at 0.
  double tolerance = 0;
  OwnFunctions own_functions = OwnFunctions::refused;  ///< with Gates::free they are not asked for
  Displace displace = Displace::parameters;  ///< `copies` where other threads read the parameters, and for `.workers`
};

/// The Hessian-vector product from two displaced gradients,
///
///     H g ~ (grad s(w + e g / 2) - grad s(w - e g / 2)) / e,   e = step / ||g||.
///
/// The error falls with the square of the step until rounding takes over. Cost: 3.0 plain steps for GradientNorm, 11/3
/// for one other penalty, in exact arithmetic. Memory as ForwardDifference.
struct CentralDifference {
  double step = 0;  ///< norm of the displacement e g; 0: chosen from the type and the norm of the parameters
  Gates gates = Gates::frozen;  ///< in the two displaced passes: those of the first, or their own
  /// The first penalised micro-batch, and one again after so many penalised steps, is differentiated by double backward
  /// too and compared: DifferenceError if they disagree. Costs one exact micro-batch each time. 0: never.
  std::int64_t check_every = 1000;
  /// How far they may be apart, relative to the penalty's gradient; 0: chosen from the type of the parameters. With
  /// Gates::free, another regularizer on networks with kinks, nothing is compared at 0.
  double tolerance = 0;
  OwnFunctions own_functions = OwnFunctions::refused;  ///< with Gates::free they are not asked for
  Displace displace = Displace::parameters;  ///< `copies` where other threads read the parameters, and for `.workers`
};

}  // namespace microreg::inline MICROREG_ABI
