/// @file
/// The options of Regularizer and of measure().
#pragma once

#include <ATen/core/Generator.h>
#include <ATen/core/Tensor.h>
#include <c10/core/ScalarType.h>
#include <microreg/check_finite.hpp>
#include <microreg/estimator.hpp>
#include <microreg/loss_scale.hpp>
#include <microreg/micro_batches.hpp>
#include <microreg/parameters.hpp>
#include <microreg/strength.hpp>

#include <cstdint>
#include <memory>
#include <optional>
#include <vector>

namespace microreg::inline MICROREG_ABI {

class Communicator;  // distributed/communicator.hpp
namespace detail {
class Replay;
}

/// How the user's loss reduces over the samples of a micro-batch.
enum class Reduction {
  mean,   ///< the mean over samples, LibTorch's default
  sum,    ///< the sum over samples; microreg divides it by |M|
  total,  ///< the sum over samples, whose scale is kept: the objective is the sum of the loss over B, plus the
          ///< penalties of the mean loss
};

/// What a step does that meets NaN or infinity. All but `error` look for them in every step, which synchronises a CUDA
/// device.
enum class NonFinite {
  error,         ///< NonFiniteError, as CheckFinite says, and nothing has changed
  skip_penalty,  ///< the step is made again without penalties; an error if the loss is not finite either
  skip_step,     ///< buffers are put back, `.grad` is left alone, and Report::skipped and skipped() say so
};

/// Penalising a part of the micro-batches or steps, with weights that keep the gradient unbiased.
struct Sampling {
  /// q, the share of the micro-batches that is penalised, in (0, 1]. A random subset each step, with a weight that
  /// keeps the gradient unbiased: a step costs 1 + 2q plain steps instead of 3.
  double share = 1.0;
  /// Penalise every k-th step only, with k times the weight, at least 1.
  std::int64_t every = 1;
  /// Seed of the choice that `share` makes. The choice is a function of seed and step alone.
  std::uint64_t seed = 0;
};

/// What is done about tensors that require a gradient, that the loss depends on, and that are not among the parameters:
/// those of another network, of a loss, of an encoder in front.
enum class OtherLeaves {
  refused,  ///< ModelError, since `loss.backward()` would have trained them
  ignored,  ///< they get no gradient, as the discriminator's in a generator's step
};

/// What becomes of buffers (the running statistics of batch normalisation) that a step has moved on each of several
/// ranks. Those that are no floating-point numbers are always of the first rank that had samples.
enum class RankBuffers {
  averaged,    ///< the mean over the ranks, each by its share of the samples
  first_rank,  ///< those of the first rank that had samples
};

/// The options of Regularizer. Every member has a default; set those you need by name.
struct RegularizerOptions {
  /// Factor on the penalty, or on each of several: a number or a schedule over steps. Finite, at least 0. At 0 the
  /// penalty is measured but not differentiated.
  Strength strength = 1.0;
  /// |M|, samples in a micro-batch, at least 1. A mini-batch of fewer samples is one micro-batch.
  std::int64_t micro_batch_size = 128;
  /// How the penalty is differentiated: Exact, ForwardDifference or CentralDifference.
  Estimator estimator = Exact{};
  /// Which micro-batches and steps are penalised; all of them by default.
  Sampling sampling = {};
  /// How much each micro-batch counts.
  Weighting weighting = Weighting::samples;
  /// What the loss callable does over the samples it is given.
  Reduction reduction = Reduction::mean;
  /// Which parameters count in the penalty; all of them if empty. All trainable ones receive the gradient.
  ParameterSelection select = {};
  /// Where labels and directions are drawn from; the default generator of the output's device if empty.
  std::optional<at::Generator> generator = std::nullopt;
  /// Leaves beside the model's parameters (and those of a loss that is a module) that are trained too: they receive the
  /// gradient, and count in the penalties as also_train[0], also_train[1], ... unless `select` says otherwise.
  std::vector<at::Tensor> also_train = {};
  /// What to do where the loss depends on still other leaves.
  OtherLeaves other_leaves = OtherLeaves::refused;
  /// What becomes of a last micro-batch that is shorter than the others.
  ShortLast short_last = ShortLast::kept;
  /// What to do about NaN and infinity.
  NonFinite non_finite = NonFinite::error;
  /// When to look for NaN and infinity.
  CheckFinite check_finite = CheckFinite::on_cpu;
  /// Use the fast double backward of microreg/fused, where it applies. The environment variable MICROREG_FUSED=0 turns
  /// it off too.
  bool fused = true;
  /// Mixed precision for forward pass, loss and probes: kBFloat16 or kHalf, as an Autocast around them; see there.
  std::optional<at::ScalarType> autocast = std::nullopt;
  /// S, where backward passes of Exact start instead of 1, divided out again in float32: for float16, whose gradients
  /// vanish below 6e-8 otherwise, a power of two such as 1024 or 65536. Where it is too large, gradients become
  /// infinite (see `non_finite`); a DynamicLossScale finds the largest that is not. Seeds of penalties need none: in
  /// half types they are taken apart by themselves.
  LossScale loss_scale = 1;
  /// Keep what the model returned, for Report::output(): accuracy, hidden states, pictures. Takes the memory of the
  /// outputs of all micro-batches.
  bool keep_outputs = false;
  /// Report the norm of the penalties' gradient over that of the loss gradient, by which a strength is chosen: a tenth
  /// to one is usual. Costs one backward pass more for each micro-batch.
  bool gradient_ratio = false;
  /// How many micro-batches are worked on at a time, each by one thread, the calling one among them, on which LibTorch
  /// runs its operations on one thread. 0: one after the other, on this thread, with LibTorch's threads inside of each
  /// operation. On the CPU operations of small networks do not fill several cores, and micro-batches do, also beside
  /// other processes.
  ///
  /// - Numbers: every N >= 1 gives the same bits, in `.grad`, report, buffers and random number generators, whatever
  ///   the timing: sums are taken in the order of the micro-batches. 0 gives them too where torch::get_num_threads() is
  ///   1, with a difference to rounding.
  /// - Memory: that of N micro-batches instead of one.
  /// - Safety: model, loss and penalties are called in order (displaced passes of a difference anywhere in between), by
  ///   one thread at a time (not always the same one), and micro-batches are differentiated beside that. Networks whose
  ///   derivatives read what their forward pass writes to (spectral norms), and functions and hooks of one's own in the
  ///   graph, run in order, N = 1. A model that writes, in its forward pass, to tensors that are no buffers and that
  ///   graphs keep, needs 0.
  /// - A difference has to leave the parameters alone, which all micro-batches read: `.displace = Displace::copies`, or
  ///   penalties by the input's gradient only. Otherwise all is as with 0.
  /// - No effect on other devices, which have a parallelism of their own.
  std::int64_t workers = 0;
  /// A CudaGraph (microreg/cuda_graph.hpp), which records a micro-batch on CUDA once and repeats it. Null: none.
  std::shared_ptr<detail::Replay> cuda_graph = nullptr;
  /// Whether each call that succeeds counts as a step of the schedules. False where an iteration calls several times
  /// (the two networks of a GAN, an optimizer with a closure): call advance() once an iteration then.
  bool advance = true;
  /// The processes that take each step together, each on its own part of the mini-batch, as if it were one process:
  /// see microreg/distributed and docs/distributed.md. Null: this one alone.
  std::shared_ptr<Communicator> communicator = nullptr;
  /// What becomes of buffers that ranks have moved apart.
  RankBuffers rank_buffers = RankBuffers::averaged;
};

/// The options of measure(), each as in RegularizerOptions.
struct MeasureOptions {
  Strength strength = 1.0;                                ///< for the report; a schedule is asked for step 0
  std::int64_t micro_batch_size = 128;                    ///< |M|, at least 1
  Weighting weighting = Weighting::samples;               ///< how much each micro-batch counts in the averages
  Reduction reduction = Reduction::mean;                  ///< of the loss callable, over the samples it is given
  ParameterSelection select = {};                         ///< which parameters count in the norms; all of them if empty
  std::optional<at::Generator> generator = std::nullopt;  ///< of labels and directions; put back afterwards
  std::optional<at::ScalarType> autocast = std::nullopt;  ///< kBFloat16 or kHalf for forward pass, loss and probes
  double loss_scale = 1;                            ///< where the probes' backward passes start, divided out again
  bool keep_outputs = false;                        ///< for Report::output(); takes their memory
  std::vector<at::Tensor> also_train = {};          ///< leaves beside the model's that count in the norms too
  OtherLeaves other_leaves = OtherLeaves::refused;  ///< what to do where the loss depends on still others
  ShortLast short_last = ShortLast::kept;           ///< what becomes of a last micro-batch that is shorter
  std::int64_t workers = 0;                         ///< micro-batches at a time, on the CPU; 0: one after the other
  std::shared_ptr<Communicator> communicator = nullptr;  ///< the ranks that measure together; null: this one alone
};

namespace detail {
/// Throws OptionError with the field, its value and the remedy.
void validate(const RegularizerOptions& options);
/// What a step takes for those of measure(), validated.
RegularizerOptions options_of(MeasureOptions options);
}  // namespace detail

}  // namespace microreg::inline MICROREG_ABI

#if !defined(MICROREG_COMPILED)
#include <microreg/definitions/options.hpp>
#endif
