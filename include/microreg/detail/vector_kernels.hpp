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
#include <type_traits>

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
  using Number = T;
  static constexpr std::int64_t count = 64 / static_cast<std::int64_t>(sizeof(T));
  typedef T type __attribute__((vector_size(64)));  // NOLINT(modernize-use-using): the attribute needs a typedef
};

/// bfloat16 is the upper half of float32, which is what it is calculated in.
template <>
struct Lanes<at::BFloat16> : Lanes<float> {
  typedef std::uint32_t Bits __attribute__((vector_size(64)));   // NOLINT(modernize-use-using)
  typedef std::uint16_t Upper __attribute__((vector_size(32)));  // NOLINT(modernize-use-using)
};

/// As many values as there are lanes; loads and stores need no alignment. By reference: a vector argument by value
/// would depend on the instruction set that the caller was compiled for.
template <class T>
MICROREG_ALWAYS_INLINE void load(typename Lanes<T>::type& lanes, const T* from) {
  if constexpr (std::is_same_v<T, at::BFloat16>) {
    typename Lanes<T>::Upper upper;
    std::memcpy(&upper, from, sizeof(upper));
    const auto bits = __builtin_convertvector(upper, typename Lanes<T>::Bits) << 16;
    std::memcpy(&lanes, &bits, sizeof(lanes));
  } else {
    std::memcpy(&lanes, from, sizeof(lanes));
  }
}

/// Rounds to nearest, ties to even, where T is narrower than the lanes; a NaN stays one.
template <class T>
MICROREG_ALWAYS_INLINE void store(T* to, const typename Lanes<T>::type& lanes) {
  if constexpr (std::is_same_v<T, at::BFloat16>) {
    typename Lanes<T>::Bits bits;
    std::memcpy(&bits, &lanes, sizeof(bits));
    const auto is_nan = (bits & 0x7fffffffU) > 0x7f800000U;  // by its bits, which -ffast-math leaves alone
    const auto rounded = (bits + 0x7fffU + ((bits >> 16) & 1U)) >> 16;
    const auto upper = __builtin_convertvector(is_nan ? (bits >> 16) | 0x40U : rounded, typename Lanes<T>::Upper);
    std::memcpy(to, &upper, sizeof(upper));
  } else {
    std::memcpy(to, &lanes, sizeof(lanes));
  }
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
