/// @file
/// What a step asks of the user's program. Behind this interface stand the user's types; before it there are tensors.
#pragma once

#include <ATen/core/Generator.h>
#include <ATen/core/Tensor.h>
#include <c10/core/Device.h>
#include <microreg/any_penalty.hpp>
#include <microreg/loss_scale.hpp>
#include <microreg/micro_batches.hpp>
#include <microreg/parameters.hpp>
#include <microreg/penalty.hpp>
#include <microreg/report.hpp>

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

namespace microreg::inline MICROREG_ABI {

struct RegularizerOptions;  // not its header, which has the estimators, which know this one
enum class Reduction;

namespace detail {

struct SnapshotMemory;  // declared only: the user's own files need no snapshots

/// One forward pass and loss of a micro-batch, with its graph.
class Evaluation {
 public:
  Evaluation() = default;
  Evaluation(const Evaluation&) = delete;
  Evaluation& operator=(const Evaluation&) = delete;
  virtual ~Evaluation() = default;

  /// The probes of penalty `term` as it gives them. `draws` may be null.
  [[nodiscard]] virtual std::vector<at::Tensor> probes(std::size_t term, Draws* draws) const = 0;

  at::Tensor loss;                     ///< L_M, a scalar
  std::vector<at::Tensor> loss_parts;  ///< what the loss returned behind it, without a graph
  std::vector<at::Tensor> inputs;      ///< the tensors of the input that require a gradient
  std::vector<at::Tensor> outputs;     ///< the tensors in what the model returned, without a graph; if they are kept
  std::optional<double> count;         ///< what the loss is a mean over, where it says so
  bool shares_graph = false;           ///< the input carries a graph, which other micro-batches need too
};

/// What decides, beside its tensors, what a micro-batch's passes do: a recording of them is for this alone.
struct RecordingTraits {
  const void* owner = nullptr;        ///< model, loss and penalties, together
  std::vector<bool> training = {};    ///< of each module of model and loss, as far as they are known
  std::int64_t micro_batch_size = 0;  ///< of a whole one
  std::optional<at::Generator> generator = std::nullopt;
};

/// What model, loss and penalties say of one mini-batch.
class MiniBatch {
 public:
  MiniBatch() = default;
  MiniBatch(const MiniBatch&) = delete;
  MiniBatch& operator=(const MiniBatch&) = delete;
  virtual ~MiniBatch() = default;

  [[nodiscard]] virtual std::vector<NamedParameter> parameters() const = 0;
  [[nodiscard]] virtual std::vector<at::Tensor> buffers() const = 0;
  /// What a Snapshot remembers from step to step, if there is something that lives as long.
  [[nodiscard]] virtual SnapshotMemory* memory() { return nullptr; }
  /// The number of penalties, and what is known of each.
  [[nodiscard]] virtual std::size_t terms() const = 0;
  [[nodiscard]] virtual const TermInfo& term(std::size_t index) const = 0;
  /// The micro-batches of this step. Throws BatchError for a batch that cannot be cut.
  [[nodiscard]] virtual std::vector<Part> parts() const = 0;
  /// Calls `visit(tensor, path)` for every tensor that is cut, which has to be on the model's device.
  virtual void for_each_tensor(const std::function<void(const at::Tensor&, const std::string&)>& visit) const = 0;
  /// Forward pass and loss of one micro-batch; `inputs`, if there are any, take the place of Evaluation::inputs.
  [[nodiscard]] virtual std::unique_ptr<Evaluation> evaluate(const Part& part,
                                                             const std::vector<at::Tensor>& inputs) = 0;

  // For recordings of a Regularizer's micro-batches.
  [[nodiscard]] virtual RecordingTraits traits() const { return {}; }
  /// Calls `visit(tensor, path)` for every tensor of one micro-batch, a view.
  virtual void for_each_tensor_of(const Part& /*part*/,
                                  const std::function<void(const at::Tensor&, const std::string&)>& /*visit*/) const {}
  /// A mini-batch of this one micro-batch, on copies of its tensors and with everything else that it needs. Throws
  /// ModelError where a batch holds more than tensors.
  [[nodiscard]] virtual std::unique_ptr<MiniBatch> copied(const Part& /*part*/) const { return nullptr; }
};

/// What is remembered from step to step of the proofs of a difference.
struct Proof {
  bool given = false;      ///< once at least
  std::int64_t since = 0;  ///< penalised steps since the last one
  double factor = 1;       ///< of the automatic step, where the first choice was found too coarse
  double moved_norm = 0;   ///< of what was displaced then; not read from a device
  /// Penalised steps until the next, doubling, where the penalties were too small beside the loss to be seen wrong, or
  /// where the factor is none of those that are right for most.
  std::int64_t gap = 0;
  std::vector<double> strengths = {};  ///< with which it was given, of each penalty the largest
};

/// Of a loss scale that follows the gradients, scalars on the model's device: replaced and never written to, so that
/// copies go ways of their own.
struct ScaleState {
  at::Tensor scale;       ///< S of the next step
  at::Tensor good_steps;  ///< in a row
  at::Tensor skipped;     ///< steps that overflowed
};

/// What a Regularizer or Penalised remembers from step to step.
struct Progress {
  std::int64_t step = 0;     ///< the next one's number
  std::int64_t skipped = 0;  ///< steps that NonFinite::skip_step left out
  Proof proof = {};
  ScaleState scale = {};

  /// All steps that were left out. Waits for the device where a loss scale follows the gradients there.
  [[nodiscard]] std::int64_t all_skipped() const;
  /// Lets a loss scale that follows the gradients go on from `number`. Throws OptionError where it does not follow
  /// them.
  void set_scale(double number, const LossScale& options);
};

/// The SnapshotMemory of one Regularizer or Penalised. A copy knows what that knew and goes on by itself: it may step
/// on another thread.
class OwnMemory {
 public:
  OwnMemory() = default;
  OwnMemory(const OwnMemory& other);
  OwnMemory(OwnMemory&&) noexcept = default;
  OwnMemory& operator=(OwnMemory other) noexcept {
    memory_.swap(other.memory_);
    return *this;
  }
  ~OwnMemory() = default;

  /// Made when it is first asked for.
  [[nodiscard]] std::shared_ptr<SnapshotMemory> shared();

 private:
  std::shared_ptr<SnapshotMemory> memory_;
};

/// Adds the gradient of the objective on the mini-batch to `.grad`; the whole of Regularizer::backward but counting the
/// step.
Report take_step(MiniBatch& batch, const RegularizerOptions& options, Progress& progress);

/// The whole of measure().
Report measure_step(MiniBatch& batch, const RegularizerOptions& options);

/// The mean loss from what the user's loss returned: checked, and divided where it was the sum over `size` samples.
at::Tensor checked_loss(const at::Tensor& value, Reduction reduction, std::int64_t size);

/// Throws ModelError if the model's output cannot have a gradient.
void check_output(const at::Tensor& output);

/// The cut into micro-batches. Throws BatchError if input and target differ in samples or there are none; `targets` is
/// -1 where there is no target.
std::vector<Part> cut(std::int64_t inputs, std::int64_t targets, const RegularizerOptions& options);

}  // namespace detail

}  // namespace microreg::inline MICROREG_ABI
