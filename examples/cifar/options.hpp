/// @file
/// The options of a run: plain values, named as on the command line.
#pragma once

#include <array>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

namespace cifar {

enum class Method {
  sgd,
  large_batch,
  gradient_norm,
  fisher_trace,
  average_jacobian,
  unit_jacobian,
  iterative_grafting,
  external_grafting,
  normalized,
};
enum class Architecture { cnn, resnet18, vgg11, vgg16_bn };
enum class DatasetName { cifar10, cifar100 };
/// Which images say that a network is good.
enum class Split {
  holdout,    ///< the last fifth of the training images; the test images are touched once, at the end
  reference,  ///< the test images, throughout: the habit of the authors' code, flattering
};
enum class EstimatorName { exact, forward_frozen, forward_free, central_frozen, central_free };
enum class WeightingName { samples, reference };
enum class Layout { contiguous, channels_last };
/// The learning rate over the run.
enum class Schedule {
  constant,  ///< as in the paper
  cosine,    ///< down to 0 on half a cosine
  drops,     ///< a tenth after half of the steps, a hundredth after three quarters
};
enum class Monitor { fisher_trace, average_jacobian, unit_jacobian };
enum class MonitorOn {
  probe,  ///< the same training images at every record
  fresh,  ///< training images drawn anew at every record
};

/// Which launcher has started this process as one of several ranks.
enum class Distributed {
  none,
  torchrun,  ///< or whatever sets RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT: Gloo, from LibTorch
  mpi,
};

/// An enumerator and the name it goes by on the command line and in the records.
template <class Enum>
struct Named {
  Enum value;
  std::string_view name;
};

inline constexpr std::array method_names{
    Named{Method::sgd, "sgd"},
    Named{Method::large_batch, "large-batch"},
    Named{Method::gradient_norm, "gradient-norm"},
    Named{Method::fisher_trace, "fisher-trace"},
    Named{Method::average_jacobian, "average-jacobian"},
    Named{Method::unit_jacobian, "unit-jacobian"},
    Named{Method::iterative_grafting, "iterative-grafting"},
    Named{Method::external_grafting, "external-grafting"},
    Named{Method::normalized, "normalized"},
};
inline constexpr std::array architecture_names{
    Named{Architecture::cnn, "cnn"},
    Named{Architecture::resnet18, "resnet18"},
    Named{Architecture::vgg11, "vgg11"},
    Named{Architecture::vgg16_bn, "vgg16"},
};
inline constexpr std::array dataset_names{
    Named{DatasetName::cifar10, "cifar10"},
    Named{DatasetName::cifar100, "cifar100"},
};
inline constexpr std::array split_names{
    Named{Split::holdout, "holdout"},
    Named{Split::reference, "reference"},
};
inline constexpr std::array estimator_names{
    Named{EstimatorName::exact, "exact"},
    Named{EstimatorName::forward_frozen, "forward-frozen"},
    Named{EstimatorName::forward_free, "forward-free"},
    Named{EstimatorName::central_frozen, "central-frozen"},
    Named{EstimatorName::central_free, "central-free"},
};
inline constexpr std::array weighting_names{
    Named{WeightingName::samples, "samples"},
    Named{WeightingName::reference, "reference"},
};
inline constexpr std::array layout_names{
    Named{Layout::contiguous, "contiguous"},
    Named{Layout::channels_last, "channels-last"},
};
inline constexpr std::array schedule_names{
    Named{Schedule::constant, "constant"},
    Named{Schedule::cosine, "cosine"},
    Named{Schedule::drops, "drops"},
};
inline constexpr std::array monitor_names{
    Named{Monitor::fisher_trace, "fisher-trace"},
    Named{Monitor::average_jacobian, "average-jacobian"},
    Named{Monitor::unit_jacobian, "unit-jacobian"},
};
inline constexpr std::array monitor_on_names{
    Named{MonitorOn::probe, "probe"},
    Named{MonitorOn::fresh, "fresh"},
};

inline constexpr std::array distributed_names{
    Named{Distributed::none, "none"},
    Named{Distributed::torchrun, "torchrun"},
    Named{Distributed::mpi, "mpi"},
};

template <class Enum, std::size_t N>
constexpr std::string_view name_of(const std::array<Named<Enum>, N>& names, Enum value) {
  for (const auto& named : names) {
    if (named.value == value) {
      return named.name;
    }
  }
  return "?";
}

/// The name of a field in the records: `fisher-trace` is `fisher_trace` there.
[[nodiscard]] std::string field_name(std::string_view name);

/// A request that cannot be run as it stands; main() exits with 2.
class UsageError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

/// Everything that decides a run. The command line fills in split, batch_size and strength, see below.
struct Options {
  std::string data = "synthetic";  ///< "synthetic", or a folder with the official binary files
  DatasetName dataset = DatasetName::cifar10;
  Split split = Split::reference;
  std::int64_t train_size = 0;       ///< 0: four fifths of a folder's training images, 2,000 synthetic ones
  std::int64_t validation_size = 0;  ///< 0: the other fifth, 2,000 synthetic ones
  std::int64_t test_size = 0;        ///< 0: all of a folder's test images, 2,000 synthetic ones
  std::int64_t image_size = 32;
  bool augment = false;

  Architecture model = Architecture::cnn;
  std::int64_t width = 0;  ///< channels of the first stage; 0: 16 for cnn, 64 for the others

  Method method = Method::gradient_norm;
  double strength = 0.01;
  std::int64_t warm_up = 0;     ///< steps over which the strength rises from 0
  std::string norms_from = {};  ///< external grafting: the folder of the recorded run
  EstimatorName estimator = EstimatorName::exact;
  double micro_batch_share = 1.0;
  std::int64_t every = 1;
  WeightingName weighting = WeightingName::samples;
  std::int64_t batch_size = 512;
  std::int64_t micro_batch_size = 32;
  double learning_rate = 0.1;
  Schedule schedule = Schedule::constant;
  std::int64_t steps = 500;

  std::int64_t seed = 0;
  std::string device = "auto";  ///< "auto": the first CUDA device, otherwise the CPU
  int threads = 0;              ///< 0: as many as LibTorch chooses
  std::int64_t workers = -1;    ///< micro-batches at a time; -1: resolved_workers()
  Layout layout = Layout::contiguous;
  Distributed distributed = Distributed::none;

  std::int64_t log_every = 50;
  std::vector<Monitor> monitors = {};  ///< measured at every record, besides the gradient norm
  MonitorOn monitor_on = MonitorOn::probe;
  std::string output = {};  ///< folder for the records; empty: none are written
  bool overwrite = false;
  bool resume = false;
  std::int64_t checkpoint_every = 500;  ///< steps between checkpoints in `output`; 0: only when the run stops or ends
};

[[nodiscard]] constexpr bool has_penalty(Method method) noexcept {
  switch (method) {
    case Method::gradient_norm:
    case Method::fisher_trace:
    case Method::average_jacobian:
    case Method::unit_jacobian:
      return true;
    default:
      return false;
  }
}

/// holdout for files; synthetic images have no test images to be careful with.
[[nodiscard]] Split default_split(const std::string& data) noexcept;

/// The paper's strengths for ResNet-18 on CIFAR-10; 0 for the methods without a penalty.
[[nodiscard]] double default_strength(Method method) noexcept;

/// As many as threads on the CPU, where a step has several micro-batches; the networks here keep nothing outside of
/// their buffers.
[[nodiscard]] std::int64_t resolved_workers(const Options& options, bool on_cpu, int threads) noexcept;

/// sgd takes batches of one micro-batch, as the paper's small-batch SGD; all others the large batch.
[[nodiscard]] std::int64_t default_batch_size(Method method, std::int64_t micro_batch_size) noexcept;

/// The learning rate of `step`, counted from 0.
[[nodiscard]] double learning_rate_at(const Options& options, std::int64_t step) noexcept;

/// Throws UsageError, naming the option, the value and the remedy.
void validate(const Options& options);

}  // namespace cifar
