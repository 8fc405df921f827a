/// @file
/// The one place that knows how versions of LibTorch differ, and which of them the library is for: 2.6 to 2.15.
#pragma once

#include <ATen/core/TensorBase.h>
#include <c10/core/ScalarType.h>
#include <c10/core/Storage.h>
#include <c10/util/Exception.h>
#include <c10/util/intrusive_ptr.h>
#include <torch/csrc/autograd/function.h>
#include <torch/version.h>
#include <microreg/version.hpp>

#include <memory>
#include <type_traits>
#include <utility>

#define MICROREG_LIBTORCH (TORCH_VERSION_MAJOR * 100 + TORCH_VERSION_MINOR)

#if MICROREG_LIBTORCH < 206
#error "microreg needs LibTorch 2.6 or newer. Install one, such as pip install torch==2.13.0."
#elif MICROREG_LIBTORCH > 215 && !defined(MICROREG_ANY_LIBTORCH)
#error \
    "microreg was tested with LibTorch 2.6 to 2.15. Define MICROREG_ANY_LIBTORCH to try this newer one; run the tests."
#endif

namespace microreg::inline MICROREG_ABI::detail {

/// Whether the derivative of hardswish at -3 and 3 exactly is that of the middle, neither side's, or an outer one, as
/// an element happens to be computed in a vector or alone: mended in 2.8 (pytorch #147801). A difference with frozen
/// gates has to take the same.
inline constexpr bool hardswish_kinks_vary = MICROREG_LIBTORCH < 208;

/// Whether clamp, fmax and fmin have the smallest of the derivatives at a kink, from 2.14 on (pytorch #191142): at a
/// bound that is a number 0, at one that is a tensor, and where the two of fmax are equal, a half for each. Before, a
/// value at a bound passes, and the first of two that are equal.
inline constexpr bool clamp_shares_ties = MICROREG_LIBTORCH >= 214;

/// Whether cdist has a second derivative for every order, from 2.14 on; before, for order 2 by products alone.
inline constexpr bool cdist_differentiates_twice = MICROREG_LIBTORCH >= 214;

/// Whether a CUDA graph whose capture has failed leaves the allocator's pool and the generators as they are in one, so
/// that no random number can be drawn any more; before 2.14.
inline constexpr bool failed_captures_stay = MICROREG_LIBTORCH < 214;

/// A pointer that owns a node of autograd's graph: counted by the node itself from 2.13 on, before by std::shared_ptr.
using NodePointer = decltype(torch::autograd::Edge::function);

/// One that does not own it.
using WeakNodePointer =
    std::conditional_t<std::is_same_v<NodePointer, std::shared_ptr<torch::autograd::Node>>,
                       std::weak_ptr<torch::autograd::Node>, c10::weak_intrusive_ptr<torch::autograd::Node>>;

template <class Node, class... Args>
NodePointer make_node(Args&&... args) {
  if constexpr (std::is_same_v<NodePointer, std::shared_ptr<torch::autograd::Node>>) {
    return std::make_shared<Node>(std::forward<Args>(args)...);
  } else {
    return NodePointer(c10::make_intrusive<Node>(std::forward<Args>(args)...));
  }
}

/// The values of a tensor of type T. Its own const_data_ptr<T>() is constrained in LibTorch 2.6 in a way that clang 18
/// and newer mangle otherwise than the library's compiler did, so that they do not link it.
template <class T>
const T* values_of(const at::TensorBase& tensor) {
  TORCH_INTERNAL_ASSERT_DEBUG_ONLY(tensor.scalar_type() == c10::CppTypeToScalarType<T>::value);
  return static_cast<const T*>(tensor.const_data_ptr());
}

/// Two storages of one size and one allocator trade their memory; every tensor on them sees the other's values.
/// Storage::swap_data_ptr, which came with 2.12.
inline void swap_memory(const c10::Storage& one, const c10::Storage& other) {
  one.set_data_ptr_noswap(other.set_data_ptr(one.set_data_ptr(c10::DataPtr())));
}

/// Tells a CUDA graph, before it is captured, which generator it will draw from: LibTorch finds out by itself from 2.14
/// on.
template <class Graph, class Generator>
void draws_from(const Generator& generator, Graph& graph) {
  if constexpr (requires { graph.register_generator_state(generator); }) {
    graph.register_generator_state(generator);
  }
}

/// The store of a process group; none in 2.7 and older, which do not tell it.
template <class Store, class Group>
c10::intrusive_ptr<Store> store_of(Group& group) {
  if constexpr (requires { group.getStore(); }) {
    return group.getStore();
  } else {
    return {};
  }
}

}  // namespace microreg::inline MICROREG_ABI::detail
