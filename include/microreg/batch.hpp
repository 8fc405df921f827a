/// @file
/// What a mini-batch may be, how many samples it has, and how it is cut.
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
///
/// Samples lie along the first dimension of every tensor. Where they do not, the type says so: Along<1>, Whole, OnHost
/// and PerSample. What is no collection of tensors, a list of graphs for instance, is counted and cut by two functions
/// of yours: `std::int64_t microreg_size(const Graphs&)` and `Graphs microreg_slice(const Graphs&, std::int64_t begin,
/// std::int64_t length)`.
#pragma once

#include <ATen/core/Tensor.h>
#include <microreg/detail/text.hpp>
#include <microreg/error.hpp>

#include <algorithm>
#include <array>
#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

namespace microreg::inline MICROREG_ABI {

/// A tensor whose samples lie along `Dimension`: Along<1> for [T, B, F] sequences or [layers, B, H] states.
template <std::int64_t Dimension>
struct Along : at::Tensor {
  Along() = default;
  /// Shares the memory. Without such a dimension it is a BatchError as soon as samples are counted.
  Along(at::Tensor tensor) : at::Tensor(std::move(tensor)) {}  // NOLINT(google-explicit-constructor)
};

/// A tensor that goes along whole with every micro-batch, on any device: an adjacency matrix, a table.
struct Whole : at::Tensor {
  Whole() = default;
  /// Shares the memory. Any shape and device, since its samples are not counted.
  Whole(at::Tensor tensor) : at::Tensor(std::move(tensor)) {}  // NOLINT(google-explicit-constructor)
};

/// A tensor of one value a sample that stays on the CPU wherever the model is: lengths of packed sequences.
struct OnHost : at::Tensor {
  OnHost() = default;
  /// Shares the memory. Counted and cut along the first dimension.
  OnHost(at::Tensor tensor) : at::Tensor(std::move(tensor)) {}  // NOLINT(google-explicit-constructor)
};

/// A list with one element a sample, a tensor of boxes for each image for instance, or a weight. (The tensors in a
/// plain std::vector are cut along their first dimension; a plain std::vector of numbers goes along uncut, and is
/// refused where it has one for each sample.)
template <class T>
struct PerSample : std::vector<T> {
  using std::vector<T>::vector;
  /// Element i is that of sample i; as many as the tensors beside it have samples.
  PerSample(std::vector<T> elements) : std::vector<T>(std::move(elements)) {}  // NOLINT(google-explicit-constructor)

  friend std::int64_t microreg_size(const PerSample& list) { return static_cast<std::int64_t>(list.size()); }
  friend PerSample microreg_slice(const PerSample& list, std::int64_t begin, std::int64_t length) {
    return std::vector<T>(list.begin() + begin, list.begin() + begin + length);
  }
};

/// The target of a Regularizer whose loss takes the output alone.
struct NoTarget {
  friend std::tuple<> microreg_fields(NoTarget& /*none*/) { return {}; }
};

namespace detail {

template <class T>
inline constexpr bool is_tensor = std::is_base_of_v<at::Tensor, T>;

/// Types that have nothing to cut and are handed on as they are.
template <class T>
inline constexpr bool is_plain_value = std::is_arithmetic_v<T> || std::is_enum_v<T> || std::is_same_v<T, std::string>;

template <class T>
concept HasFields = requires(T& batch) { microreg_fields(batch); };

template <class T>
concept HasSlices = requires(const T& batch) {
  { microreg_size(batch) } -> std::convertible_to<std::int64_t>;
  { microreg_slice(batch, std::int64_t{}, std::int64_t{}) } -> std::convertible_to<T>;
};

template <class T>
concept TupleLike = requires { std::tuple_size<T>::value; };

template <class T>
struct IsVector : std::false_type {};
template <class T, class A>
struct IsVector<std::vector<T, A>> : std::true_type {};
/// A list of numbers, which is not looked into.
template <class T>
inline constexpr bool is_value_list = false;
template <class T, class A>
inline constexpr bool is_value_list<std::vector<T, A>> = is_plain_value<T>;
template <class T>
struct IsPerSample : std::false_type {};
template <class T>
struct IsPerSample<PerSample<T>> : std::true_type {};
template <class T>
struct IsOptional : std::false_type {};
template <class T>
struct IsOptional<std::optional<T>> : std::true_type {};
template <class T>
struct IsMap : std::false_type {};
template <class K, class V, class C, class A>
struct IsMap<std::map<K, V, C, A>> : std::true_type {};

/// A batch that holds its tensors itself: of a tuple or pair of references (std::tie), one of values.
template <class T>
struct OwnedBatch {
  using type = T;
};
template <class T>
using Owned = typename OwnedBatch<std::remove_cvref_t<T>>::type;
template <class... T>
struct OwnedBatch<std::tuple<T...>> {
  using type = std::tuple<Owned<T>...>;
};
template <class A, class B>
struct OwnedBatch<std::pair<A, B>> {
  using type = std::pair<Owned<A>, Owned<B>>;
};

/// microreg_fields must tie, not copy: what is cut are the fields themselves.
template <class Fields>
inline constexpr bool ties_fields = false;
template <class... Field>
inline constexpr bool ties_fields<std::tuple<Field...>> = (std::is_lvalue_reference_v<Field> && ...);

/// The types in what is looked into, as something like a tuple; of a type with microreg_fields, its fields.
template <class T>
auto elements_of() {
  if constexpr (HasFields<T>) {
    return std::type_identity<decltype(microreg_fields(std::declval<T&>()))>{};
  } else if constexpr (IsVector<T>::value || IsOptional<T>::value) {
    return std::type_identity<std::tuple<typename T::value_type>>{};
  } else if constexpr (IsMap<T>::value) {
    return std::type_identity<std::tuple<typename T::mapped_type>>{};
  } else {
    return std::type_identity<T>{};
  }
}

/// Whether holds.operator()<E>() for each of them.
template <class T, class Predicate>
constexpr bool all_elements(Predicate holds) {
  using Elements = typename decltype(elements_of<T>())::type;
  return [&]<std::size_t... I>(std::index_sequence<I...>) {
    return (holds.template operator()<std::remove_cvref_t<std::tuple_element_t<I, Elements>>>() && ...);
  }(std::make_index_sequence<std::tuple_size_v<Elements>>{});
}

template <class T>
constexpr bool is_batch() {
  if constexpr (is_tensor<T> || is_plain_value<T> || HasSlices<T>) {
    return true;
  } else if constexpr (HasFields<T>) {
    static_assert(ties_fields<decltype(microreg_fields(std::declval<T&>()))>,
                  "microreg: microreg_fields(T&) must return std::tie of the fields, references to them");
    return true;
  } else if constexpr (IsVector<T>::value || IsOptional<T>::value || IsMap<T>::value || TupleLike<T>) {
    return all_elements<T>([]<class E>() { return is_batch<E>(); });
  } else {
    return false;
  }
}

/// Whether `T` holds types of the user's own, with microreg_fields.
template <class T>
constexpr bool has_own_types() {
  if constexpr (is_tensor<T> || is_plain_value<T> || HasSlices<T>) {
    return false;
  } else if constexpr (HasFields<T>) {
    return true;
  } else {
    return !all_elements<T>([]<class E>() { return !has_own_types<E>(); });
  }
}

/// Whether all that is in `T` is tensors, but for those that stay on the host.
template <class T>
constexpr bool holds_tensors_alone() {
  if constexpr (is_tensor<T>) {
    return !std::is_base_of_v<OnHost, T>;
  } else if constexpr (is_plain_value<T> || HasSlices<T>) {
    return false;
  } else {
    return all_elements<T>([]<class E>() { return holds_tensors_alone<E>(); });
  }
}

template <class From, class To, std::size_t... I>
constexpr bool all_keep_cut(std::index_sequence<I...>);

/// Whether what `From` says of where samples lie (Along, Whole, OnHost, PerSample) is said by `To` as well, which it is
/// converted to.
template <class From, class To>
constexpr bool keeps_cut() {
  if constexpr (std::is_same_v<From, To>) {
    return true;
  } else if constexpr (is_tensor<From>) {
    return std::is_same_v<From, at::Tensor>;
  } else if constexpr (HasSlices<From>) {
    return false;
  } else if constexpr (IsOptional<From>::value && IsOptional<To>::value) {
    return keeps_cut<typename From::value_type, typename To::value_type>();
  } else if constexpr (TupleLike<From> && TupleLike<To>) {
    return std::tuple_size_v<From> == std::tuple_size_v<To> &&
           all_keep_cut<From, To>(std::make_index_sequence<std::tuple_size_v<From>>{});
  } else {
    return true;
  }
}

template <class From, class To, std::size_t... I>
constexpr bool all_keep_cut(std::index_sequence<I...>) {
  return (keeps_cut<std::remove_cvref_t<std::tuple_element_t<I, From>>,
                    std::remove_cvref_t<std::tuple_element_t<I, To>>>() &&
          ...);
}

/// Calls `visit(part, path)` for every tensor and everything with microreg_slice in `batch`; `path` reads like
/// `input[1]`.
template <class Batch, class Visit>
void for_each_part(Batch& batch, const std::string& path, const Visit& visit) {
  const auto elements = [&](auto&... element) {
    std::size_t index = 0;
    (for_each_part(element, text({path, HasFields<Batch> ? ".field " : "[", index++, HasFields<Batch> ? "" : "]"}),
                   visit),
     ...);
  };
  if constexpr (is_tensor<Batch> || HasSlices<Batch> || is_value_list<std::remove_const_t<Batch>>) {
    visit(batch, path);
  } else if constexpr (is_plain_value<std::remove_const_t<Batch>>) {
    // Nothing to visit.
  } else if constexpr (HasFields<Batch>) {
    auto fields = microreg_fields(batch);
    std::apply(elements, fields);
  } else if constexpr (IsVector<Batch>::value) {
    for (std::size_t i = 0; i < batch.size(); ++i) {
      for_each_part(batch[i], text({path, "[", i, "]"}), visit);
    }
  } else if constexpr (IsOptional<Batch>::value) {
    if (batch.has_value()) {
      for_each_part(*batch, path, visit);
    }
  } else if constexpr (IsMap<Batch>::value) {
    for (auto& [key, value] : batch) {
      for_each_part(value, text({path, "[", key, "]"}), visit);
    }
  } else {
    std::apply(elements, batch);
  }
}

/// Calls `visit(tensor, path)` for every tensor in `batch`, also for those in lists of one element a sample.
template <class Batch, class Visit>
void for_each_tensor(Batch& batch, const std::string& path, const Visit& visit) {
  for_each_part(batch, path, [&]<class Part>(Part& part, const std::string& where) {
    if constexpr (is_tensor<Part>) {
      visit(part, where);
    } else if constexpr (IsPerSample<std::remove_const_t<Part>>::value) {
      if constexpr (is_batch<typename Part::value_type>() && !is_plain_value<typename Part::value_type>) {
        for (std::size_t i = 0; i < part.size(); ++i) {
          for_each_tensor(part[i], text({where, "[", i, "]"}), visit);
        }
      }
    }
  });
}

/// Counts the samples of one batch and holds its parts against one another.
class SampleCounter {
 public:
  void add(const Whole& /*tensor*/, const std::string& /*path*/) {}
  void add(const at::Tensor& tensor, const std::string& path) { add(tensor, path, 0); }
  template <std::int64_t Dimension>
  void add(const Along<Dimension>& tensor, const std::string& path) {
    add(tensor, path, Dimension);
  }
  template <class T>
    requires is_value_list<T>
  void add(const T& values, const std::string& path) {
    note_values(values.size(), path);
  }
  template <HasSlices T>
  void add(const T& part, const std::string& path) {
    add(static_cast<std::int64_t>(microreg_size(part)), path, "");
  }

  /// The number of samples. Throws if nothing had any.
  [[nodiscard]] std::int64_t count(const std::string& name) const;

 private:
  void add(const at::Tensor& tensor, const std::string& path, std::int64_t dimension);
  void add(std::int64_t samples, const std::string& path, const std::string& shape);

  void note_values(std::size_t values, const std::string& path);

  std::int64_t count_ = -1;
  std::string first_;
  std::vector<std::pair<std::int64_t, std::string>> values_;
};

inline void cut(Whole& /*tensor*/, std::int64_t /*begin*/, std::int64_t /*length*/) {}
void cut(at::Tensor& tensor, std::int64_t begin, std::int64_t length, std::int64_t dimension = 0);
[[noreturn]] void throw_shared_fields(const std::string& path);
template <std::int64_t Dimension>
void cut(Along<Dimension>& tensor, std::int64_t begin, std::int64_t length) {
  cut(tensor, begin, length, Dimension);
}
template <class T>
  requires is_value_list<T>
void cut(T& /*values*/, std::int64_t /*begin*/, std::int64_t /*length*/) {}
template <HasSlices T>
void cut(T& part, std::int64_t begin, std::int64_t length) {
  part = microreg_slice(part, begin, length);
}

}  // namespace detail

/// What `Regularizer::backward` takes as input and as target.
template <class T>
concept Batch = detail::is_batch<std::remove_cvref_t<T>>();

/// Number of samples: the first dimension that all tensors of `batch` share. `name` stands for the batch in messages.
/// Throws BatchError for a batch without tensors, an undefined tensor, a scalar, or first dimensions that differ.
template <Batch B>
[[nodiscard]] std::int64_t sample_count(const B& batch, const std::string& name = "batch") {
  detail::SampleCounter counter;
  detail::Owned<B> handles = batch;  // Fields are visited through non-const references; tensors are handles.
  detail::for_each_part(handles, name, [&](const auto& part, const std::string& path) { counter.add(part, path); });
  return counter.count(name);
}

/// The samples [begin, begin + length) of `batch`, as views: no data is copied. Of a tuple of references (std::tie) it
/// makes one of values. Throws BatchError for a type whose copies share their fields with the original, which cutting
/// would change.
template <Batch B>
[[nodiscard]] detail::Owned<B> slice(const B& batch, std::int64_t begin, std::int64_t length) {
  detail::Owned<B> part = batch;
  if constexpr (detail::has_own_types<detail::Owned<B>>()) {
    std::vector<const void*> originals;
    // Fields are tied through non-const references; nothing is written.
    detail::for_each_part(const_cast<B&>(batch), "batch", [&](auto& field, const std::string& /*path*/) {
      originals.push_back(static_cast<const void*>(std::addressof(field)));
    });
    detail::for_each_part(part, "batch", [&](auto& field, const std::string& path) {
      if (std::find(originals.begin(), originals.end(), static_cast<const void*>(std::addressof(field))) !=
          originals.end()) {
        detail::throw_shared_fields(path);
      }
    });
  }
  detail::for_each_part(part, "batch",
                        [&](auto& tensor, const std::string& /*path*/) { detail::cut(tensor, begin, length); });
  return part;
}

}  // namespace microreg::inline MICROREG_ABI

#if !defined(MICROREG_COMPILED)
#include <microreg/definitions/batch.hpp>
#endif
