/// @file
/// Which samples of a mini-batch, and which random numbers, are those of a rank.
#pragma once

#include <microreg/distributed/communicator.hpp>
#include <microreg/micro_batches.hpp>

#include <cstdint>

namespace microreg::inline MICROREG_ABI {

/// The samples [begin, begin + size) of a mini-batch.
struct Shard {
  std::int64_t begin = 0;  ///< its first sample, counted from 0
  std::int64_t size = 0;   ///< 0 on some ranks where there are fewer micro-batches than ranks
};

/// The samples that this rank takes of a mini-batch of `samples`: whole micro-batches, as evenly as they divide, so
/// that all ranks together have the micro-batches that one process would have. Throws OptionError for a size below 1.
///
/// ```cpp
/// const auto [begin, size] = microreg::shard(images.size(0), 16, *ranks);  // the part of this rank
/// ```
[[nodiscard]] Shard shard(std::int64_t samples, std::int64_t micro_batch_size, const Communicator& communicator,
                          ShortLast short_last = ShortLast::kept);

/// A seed for this rank, a function of `seed` and the rank: `seed` itself on rank 0, unrelated ones on the others.
[[nodiscard]] std::uint64_t rank_seed(std::uint64_t seed, const Communicator& communicator);

/// Seeds LibTorch's default generators, of all devices, with rank_seed(): labels, directions and dropout are then
/// independent between the ranks and a function of `seed` and the number of ranks. To be called before the model is
/// made, whose weights differ between the ranks then until the first step: they become rank 0's.
void manual_seed(std::uint64_t seed, const Communicator& communicator);

}  // namespace microreg::inline MICROREG_ABI

#if !defined(MICROREG_COMPILED)
#include <microreg/definitions/distributed.hpp>
#endif
