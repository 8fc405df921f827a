/// @file
/// Loops compiled for several instruction sets and chosen at run time, so that nobody has to ask for -march.
///
/// A kernel is a template `template <class Lanes> static void run(arguments...)`, written with the fixed-width vectors
/// below, that is inlined into one wrapper per instruction set.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/grad_mode.h>
#include <microreg/version.hpp>

#include <cstdint>
#include <cstring>

#if defined(__GNUC__) && (defined(__x86_64__) || defined(__i386__))
#define MICROREG_MULTIVERSION 1
#else
#define MICROREG_MULTIVERSION 0
#endif

#define MICROREG_ALWAYS_INLINE inline __attribute__((always_inline))

namespace microreg::inline MICROREG_ABI::detail {

/// 64 bytes of T: one register with AVX-512, several with less.
template <class T>
struct Lanes {
  static constexpr std::int64_t count = 64 / static_cast<std::int64_t>(sizeof(T));
  typedef T type __attribute__((vector_size(64)));  // NOLINT(modernize-use-using): the attribute needs a typedef
};

/// How many lanes fit; loads and stores need no alignment. By reference: a vector argument by value would depend on the
/// instruction set that the caller was compiled for.
template <class T>
MICROREG_ALWAYS_INLINE void load(typename Lanes<T>::type& lanes, const T* from) {
  std::memcpy(&lanes, from, sizeof(lanes));
}
template <class T>
MICROREG_ALWAYS_INLINE void store(T* to, const typename Lanes<T>::type& lanes) {
  std::memcpy(to, &lanes, sizeof(lanes));
}

/// Zero in the first `skip` lanes.
template <class T>
MICROREG_ALWAYS_INLINE void drop_first(typename Lanes<T>::type& lanes, std::int64_t skip) {
  typename Lanes<T>::type number;
  for (std::int64_t lane = 0; lane < Lanes<T>::count; ++lane) {
    number[lane] = static_cast<T>(lane);
  }
  const typename Lanes<T>::type zero{};
  lanes = number < zero + static_cast<T>(skip) ? zero : lanes;
}

/// The sum of all lanes, in float64.
MICROREG_ALWAYS_INLINE double total(const Lanes<double>::type& lanes) {
  typedef double Half __attribute__((vector_size(32)));     // NOLINT(modernize-use-using)
  typedef double Quarter __attribute__((vector_size(16)));  // NOLINT(modernize-use-using)
  Half halves[2];  // NOLINT(modernize-avoid-c-arrays): std::array ignores the alignment
  std::memcpy(&halves, &lanes, sizeof(halves));
  const Half half = halves[0] + halves[1];
  Quarter quarters[2];  // NOLINT(modernize-avoid-c-arrays)
  std::memcpy(&quarters, &half, sizeof(quarters));
  const Quarter quarter = quarters[0] + quarters[1];
  return quarter[0] + quarter[1];
}
MICROREG_ALWAYS_INLINE double total(const Lanes<float>::type& lanes) {
  typedef float Half __attribute__((vector_size(32)));  // NOLINT(modernize-use-using)
  Half low, high;
  std::memcpy(&low, &lanes, sizeof(low));
  std::memcpy(&high, reinterpret_cast<const char*>(&lanes) + sizeof(low), sizeof(high));
  return total(__builtin_convertvector(low, Lanes<double>::type) + __builtin_convertvector(high, Lanes<double>::type));
}

#if MICROREG_MULTIVERSION
template <class Kernel, class... Arguments>
__attribute__((target("avx512f,avx512vl,avx512dq,fma"))) void run_avx512(Arguments... arguments) {
  Kernel::run(arguments...);
}
template <class Kernel, class... Arguments>
__attribute__((target("avx2,fma"))) void run_avx2(Arguments... arguments) {
  Kernel::run(arguments...);
}
#endif

/// The widest instruction set that kernels are compiled for and this processor has: 2 for AVX-512, 1 for AVX2, and
/// anywhere but on x86; 0: none. Processors without AVX2, of before 2013, take the ATen forms: the same loops for them
/// would cost every user's compiler seconds.
inline int vector_level() {
#if MICROREG_MULTIVERSION
  static const int level = [] {
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")) {
      return 2;
    }
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") ? 1 : 0;
  }();
  return level;
#else
  return 1;
#endif
}

/// Whether to take the kernels: without a graph, on the CPU, and on a processor that they are compiled for.
inline bool runs_kernels(const at::Tensor& x) {
  return !at::GradMode::is_enabled() && x.is_cpu() && vector_level() > 0;
}

/// Calls Kernel::run with the widest instruction set. Where vector_level() is 0 it must not be called.
template <class Kernel, class... Arguments>
void run_widest(Arguments... arguments) {
#if MICROREG_MULTIVERSION
  return vector_level() == 2 ? run_avx512<Kernel, Arguments...>(arguments...)
                             : run_avx2<Kernel, Arguments...>(arguments...);
#else
  Kernel::run(arguments...);
#endif
}

}  // namespace microreg::inline MICROREG_ABI::detail
