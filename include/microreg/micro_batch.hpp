/// @file
/// Splitting a mini-batch into micro-batches along the first dimension.
///
/// A batch is a tensor, or a `std::tuple`, `std::pair`, `std::array`, `std::vector`, `std::optional` or `std::map` of
/// batches, nested as you like; numbers, strings and enumerations inside go along unchanged. A type of your own
/// becomes a batch by one function beside it, found by argument-dependent lookup:
///
/// ```cpp
/// struct Sentences {
///   torch::Tensor tokens, mask;
/// };
/// auto microreg_fields(Sentences& s) { return std::tie(s.tokens, s.mask); }
/// ```
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/StringUtil.h>
#include <microreg/error.hpp>

#include <algorithm>
#include <array>
#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

namespace microreg {

namespace detail {

template <class T>
inline constexpr bool is_tensor = std::is_base_of_v<at::Tensor, T>;

/// Types that have nothing to split and are handed on as they are.
template <class T>
inline constexpr bool is_plain_value = std::is_arithmetic_v<T> || std::is_enum_v<T> || std::is_same_v<T, std::string>;

template <class T>
concept HasFields = requires(T& batch) { microreg_fields(batch); };

template <class T>
concept TupleLike = requires { std::tuple_size<T>::value; };

template <class T>
struct IsVector : std::false_type {};
template <class T, class A>
struct IsVector<std::vector<T, A>> : std::true_type {};
template <class T>
struct IsOptional : std::false_type {};
template <class T>
struct IsOptional<std::optional<T>> : std::true_type {};
template <class T>
struct IsMap : std::false_type {};
template <class K, class V, class C, class A>
struct IsMap<std::map<K, V, C, A>> : std::true_type {};

template <class T>
constexpr bool is_batch();

template <class T, std::size_t... I>
constexpr bool all_elements_are_batches(std::index_sequence<I...>) {
  return (is_batch<std::remove_cvref_t<std::tuple_element_t<I, T>>>() && ...);
}

template <class T>
constexpr bool is_batch() {
  if constexpr (is_tensor<T> || is_plain_value<T> || HasFields<T>) {
    return true;
  } else if constexpr (IsVector<T>::value || IsOptional<T>::value) {
    return is_batch<typename T::value_type>();
  } else if constexpr (IsMap<T>::value) {
    return is_batch<typename T::mapped_type>();
  } else if constexpr (TupleLike<T>) {
    return all_elements_are_batches<T>(std::make_index_sequence<std::tuple_size_v<T>>{});
  } else {
    return false;
  }
}

/// Calls `visit(tensor, path)` for every tensor in `batch`; `path` reads like `input[1]`.
template <class Batch, class Visit>
void for_each_tensor(Batch& batch, const std::string& path, const Visit& visit) {
  if constexpr (is_tensor<Batch>) {
    visit(batch, path);
  } else if constexpr (is_plain_value<Batch>) {
    // Nothing to visit.
  } else if constexpr (HasFields<Batch>) {
    auto fields = microreg_fields(batch);
    std::apply(
        [&](auto&... field) {
          std::size_t index = 0;
          (for_each_tensor(field, c10::str(path, ".field ", index++), visit), ...);
        },
        fields);
  } else if constexpr (IsVector<Batch>::value) {
    for (std::size_t i = 0; i < batch.size(); ++i) {
      for_each_tensor(batch[i], c10::str(path, "[", i, "]"), visit);
    }
  } else if constexpr (IsOptional<Batch>::value) {
    if (batch.has_value()) {
      for_each_tensor(*batch, path, visit);
    }
  } else if constexpr (IsMap<Batch>::value) {
    for (auto& [key, value] : batch) {
      for_each_tensor(value, c10::str(path, "[", key, "]"), visit);
    }
  } else {
    std::apply(
        [&](auto&... element) {
          std::size_t index = 0;
          (for_each_tensor(element, c10::str(path, "[", index++, "]"), visit), ...);
        },
        batch);
  }
}

}  // namespace detail

/// What `Regularizer::backward` takes as input and as target.
template <class T>
concept Batch = detail::is_batch<std::remove_cvref_t<T>>();

namespace detail {

/// The concept's message, where a constraint on a template parameter would only say that no function matches.
template <class Input, class Target>
constexpr void assert_batches() {
  static_assert(Batch<Input>,
                "microreg: the input is not a batch: pass a tensor, a tuple, pair, array, vector, optional or map of "
                "batches, or give your type a function microreg_fields(T&) that returns std::tie of its fields");
  static_assert(Batch<Target>,
                "microreg: the target is not a batch: pass a tensor, a tuple, pair, array, vector, optional or map of "
                "batches, or give your type a function microreg_fields(T&) that returns std::tie of its fields");
}

}  // namespace detail

/// Number of samples: the first dimension that all tensors of `batch` share. `name` stands for the batch in messages.
/// Throws BatchError for a batch without tensors, an undefined tensor, a scalar, or first dimensions that differ.
template <Batch B>
[[nodiscard]] std::int64_t sample_count(const B& batch, const std::string& name = "batch") {
  std::int64_t count = -1;
  std::string first;
  B handles = batch;  // Fields are visited through non-const references; tensors are handles, so this copies no data.
  detail::for_each_tensor(handles, name, [&](const at::Tensor& tensor, const std::string& path) {
    if (!tensor.defined()) {
      throw BatchError(c10::str(path, " is an undefined tensor; assign it, or make it a std::optional that is empty"));
    }
    if (tensor.dim() == 0) {
      throw BatchError(c10::str(path,
                                " is a scalar tensor, it has no first dimension to split; pass a number instead, "
                                "or expand it to one value per sample"));
    }
    if (count < 0) {
      count = tensor.size(0);
      first = path;
    } else if (tensor.size(0) != count) {
      throw BatchError(c10::str("first dimensions differ: ", first, " has ", count, " samples, ", path, " has ",
                                tensor.size(0), " (shape ", tensor.sizes(),
                                "); the first dimension of every tensor "
                                "must be the sample dimension"));
    }
  });
  if (count < 0) {
    throw BatchError(c10::str(name, " holds no tensor, so there is nothing to split into micro-batches"));
  }
  return count;
}

/// The samples [begin, begin + length) of `batch`, as views: no data is copied.
template <Batch B>
[[nodiscard]] B slice(const B& batch, std::int64_t begin, std::int64_t length) {
  B part = batch;
  detail::for_each_tensor(part, "batch", [&](at::Tensor& tensor, const std::string&) {
    if (begin != 0 || length != tensor.size(0)) {
      tensor = tensor.narrow(0, begin, length);
    }
  });
  return part;
}

/// How much each micro-batch M of a mini-batch B counts.
enum class Weighting {
  samples,    ///< |M| / |B|: the loss is exactly the mean over B, a ragged last micro-batch counts by its samples.
  reference,  ///< 1 / ceil(|B| / |M|), as in the authors' code, where a short micro-batch gets full weight.
};

/// The cut of `samples` samples into micro-batches of at most `micro_batch_size`, the last one possibly shorter.
class MicroBatches {
 public:
  MicroBatches(std::int64_t samples, std::int64_t micro_batch_size, Weighting weighting) noexcept
      : samples_(samples), micro_batch_size_(micro_batch_size), weighting_(weighting) {}

  [[nodiscard]] std::int64_t count() const noexcept { return (samples_ + micro_batch_size_ - 1) / micro_batch_size_; }
  [[nodiscard]] std::int64_t begin(std::int64_t index) const noexcept { return index * micro_batch_size_; }
  [[nodiscard]] std::int64_t size(std::int64_t index) const noexcept {
    return std::min(micro_batch_size_, samples_ - begin(index));
  }
  /// weight(M), the factor of both the loss and the penalty of micro-batch `index`.
  [[nodiscard]] double weight(std::int64_t index) const noexcept {
    return weighting_ == Weighting::samples ? static_cast<double>(size(index)) / static_cast<double>(samples_)
                                            : 1.0 / static_cast<double>(count());
  }

 private:
  std::int64_t samples_;
  std::int64_t micro_batch_size_;
  Weighting weighting_;
};

}  // namespace microreg
