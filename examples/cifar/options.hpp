/// @file
/// The options of a run: plain values, named as on the command line.
#pragma once

#include <array>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <string_view>

namespace cifar {

enum class Method { sgd, large_batch, gradient_norm, fisher_trace, average_jacobian, unit_jacobian };
enum class Architecture { cnn, resnet18, vgg11, vgg16_bn };
enum class DatasetName { cifar10, cifar100 };

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
};
inline constexpr std::array architecture_names{
    Named{Architecture::cnn, "cnn"},
    Named{Architecture::resnet18, "resnet18"},
    Named{Architecture::vgg11, "vgg11"},
    Named{Architecture::vgg16_bn, "vgg16_bn"},
};
inline constexpr std::array dataset_names{
    Named{DatasetName::cifar10, "cifar10"},
    Named{DatasetName::cifar100, "cifar100"},
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

/// A request that cannot be run as it stands; main() exits with 2.
class UsageError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

/// Everything that decides a run. The command line fills in batch_size and strength by method, see below.
struct Options {
  std::string data = "synthetic";  ///< "synthetic", or a folder with the official binary files
  DatasetName dataset = DatasetName::cifar10;
  std::int64_t train_size = 0;  ///< 0: all of a folder's images, 2,000 synthetic ones
  std::int64_t test_size = 0;   ///< as train_size
  std::int64_t image_size = 32;
  bool augment = false;

  Architecture model = Architecture::cnn;
  std::int64_t width = 0;  ///< channels of the first stage; 0: 16 for cnn, 64 for the others

  Method method = Method::gradient_norm;
  double strength = 0.01;
  std::int64_t batch_size = 512;
  std::int64_t micro_batch_size = 32;
  double learning_rate = 0.1;
  std::int64_t steps = 500;

  std::int64_t seed = 0;
  std::string device = "auto";  ///< "auto": the first CUDA device, otherwise the CPU
  int threads = 0;              ///< 0: as many as LibTorch chooses

  std::int64_t log_every = 50;
  std::string output = {};  ///< folder for the records; empty: none are written
  bool overwrite = false;
};

[[nodiscard]] constexpr bool has_penalty(Method method) noexcept {
  return method != Method::sgd && method != Method::large_batch;
}

/// The paper's strengths for ResNet-18 on CIFAR-10; 0 for the methods without a penalty.
[[nodiscard]] double default_strength(Method method) noexcept;

/// sgd takes batches of one micro-batch, as the paper's small-batch SGD; all others the large batch.
[[nodiscard]] std::int64_t default_batch_size(Method method, std::int64_t micro_batch_size) noexcept;

/// Throws UsageError, naming the option, the value and the remedy.
void validate(const Options& options);

}  // namespace cifar
