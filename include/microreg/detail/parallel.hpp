/// @file
/// Loops on LibTorch's own threads, in files compiled without OpenMP too.
#pragma once

#include <ATen/EmptyTensor.h>
#include <ATen/Parallel.h>
#include <ATen/TensorIterator.h>
#include <c10/util/FunctionRef.h>
#include <microreg/version.hpp>

#include <algorithm>
#include <cstdint>

namespace microreg::inline MICROREG_ABI::detail {

/// Calls body(from, to) for parts of [begin, end) of about `grain` elements or more, one for each thread at most. The
/// cut depends on the number of threads alone. Within another parallel region there is one part.
///
/// at::parallel_for is a template, and serial, without a word, wherever the file that calls it is compiled without
/// OpenMP. TensorIterator's loop is compiled in LibTorch: here it runs over a tensor of one byte for each part, of
/// which nothing but the addresses is used. Costs some two microseconds.
inline void parallel_for(std::int64_t begin, std::int64_t end, std::int64_t grain,
                         c10::function_ref<void(std::int64_t, std::int64_t)> body) {
  if (begin >= end) {
    return;
  }
  const std::int64_t count = end - begin;
  const std::int64_t parts =
      at::in_parallel_region() ? 1 : std::min<std::int64_t>(at::get_num_threads(), at::divup(count, grain));
  if (parts <= 1) {
    return body(begin, end);
  }
  const at::TensorBase bytes = at::detail::empty_cpu({parts}, at::kByte);
  const auto* const first = static_cast<const char*>(bytes.const_data_ptr());
  at::TensorIterator::borrowing_nullary_op(bytes).for_each(
      [&](char** addresses, const std::int64_t* /*strides*/, std::int64_t size, std::int64_t /*one*/) {
        const std::int64_t part = addresses[0] - first;
        body(begin + count * part / parts, begin + count * (part + size) / parts);
      },
      /*grain_size=*/1);
}

}  // namespace microreg::inline MICROREG_ABI::detail
