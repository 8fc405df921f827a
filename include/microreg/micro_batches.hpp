/// @file
/// The cut of a mini-batch into micro-batches, for Regularizer and for loops of one's own.
#pragma once

#include <microreg/batch.hpp>
#include <microreg/error.hpp>

#include <algorithm>
#include <cstdint>
#include <string>
#include <tuple>
#include <utility>

namespace microreg::inline MICROREG_ABI {

/// How much each micro-batch M of a mini-batch B counts.
enum class Weighting {
  samples,    ///< |M| / |B|: the loss is exactly the mean over B, a ragged last micro-batch counts by its samples.
  reference,  ///< 1 / ceil(|B| / |M|), as in the authors' code, where a short micro-batch gets full weight.
};

/// What becomes of a last micro-batch that is shorter than the others. Over one sample alone batch normalisation fails,
/// and over a few it is another network than the one that plain training knows.
enum class ShortLast {
  kept,     ///< it is one of its own
  merged,   ///< its samples join the one before
  dropped,  ///< its samples are left out of this step
};

/// Which micro-batch of its mini-batch one is, and how much it counts.
struct Part {
  std::int64_t index = 0;  ///< counted from 0
  std::int64_t count = 1;  ///< K, the micro-batches of the mini-batch
  std::int64_t begin = 0;  ///< its first sample
  std::int64_t size = 0;   ///< |M|, its samples; 0: not known
  double weight = 1;       ///< weight(M); all of them add up to 1
};

namespace detail {
/// weight(M) of a micro-batch of `size` samples, of the `samples` in the `count` micro-batches of a mini-batch.
[[nodiscard]] inline double weight_of(Weighting weighting, std::int64_t size, std::int64_t samples,
                                      std::int64_t count) noexcept {
  return weighting == Weighting::samples ? static_cast<double>(size) / static_cast<double>(samples)
                                         : 1.0 / static_cast<double>(count);
}
}  // namespace detail

/// The cut of `samples` samples into micro-batches of at most `micro_batch_size` (more for the last one, if a short one
/// is merged), the last one possibly shorter. Fewer samples than that are one micro-batch.
class MicroBatches {
 public:
  /// 0 samples make no micro-batch. `micro_batch_size` must be at least 1, which is not checked here.
  MicroBatches(std::int64_t samples, std::int64_t micro_batch_size, Weighting weighting,
               ShortLast short_last = ShortLast::kept) noexcept
      : samples_(samples), micro_batch_size_(std::min(micro_batch_size, samples)), weighting_(weighting) {
    if (samples == 0) {
      return;
    }
    const std::int64_t whole = samples / micro_batch_size_;
    count_ = whole + (short_last == ShortLast::kept && samples % micro_batch_size_ != 0 ? 1 : 0);
    samples_ = short_last == ShortLast::dropped ? whole * micro_batch_size_ : samples;
  }

  [[nodiscard]] std::int64_t count() const noexcept { return count_; }  ///< K; 0 where there are no samples
  /// Those in all micro-batches together.
  [[nodiscard]] std::int64_t samples() const noexcept { return samples_; }
  /// The first sample of micro-batch `index`, which is counted from 0 and not checked.
  [[nodiscard]] std::int64_t begin(std::int64_t index) const noexcept { return index * micro_batch_size_; }
  /// |M|, the samples of micro-batch `index`: of the last one, all that are left.
  [[nodiscard]] std::int64_t size(std::int64_t index) const noexcept {
    return index + 1 == count_ ? samples_ - begin(index) : micro_batch_size_;
  }
  /// Micro-batch `index` with all of that.
  [[nodiscard]] Part part(std::int64_t index) const noexcept {
    return {index, count(), begin(index), size(index), weight(index)};
  }
  /// weight(M), the factor of both the loss and the penalty of micro-batch `index`.
  [[nodiscard]] double weight(std::int64_t index) const noexcept {
    return detail::weight_of(weighting_, size(index), samples_, count());
  }

 private:
  std::int64_t samples_;
  std::int64_t micro_batch_size_;
  Weighting weighting_;
  std::int64_t count_ = 0;
};

/// Micro-batches of batches that are cut alike, each as {Part, slice of the first, slice of the second, ...}, for a
/// range-based for loop. The slices are views.
template <Batch... B>
class MicroBatchRange {
 public:
  /// Every batch must have the samples of `cut`, which micro_batches() checks.
  MicroBatchRange(MicroBatches cut, B... batches) : cut_(cut), batches_(std::move(batches)...) {}

  /// Stands at one micro-batch, and cuts it when it is read.
  class Iterator {
   public:
    /// At micro-batch `index` of `range`, which must outlive it.
    Iterator(const MicroBatchRange& range, std::int64_t index) : range_(&range), index_(index) {}
    std::tuple<Part, B...> operator*() const { return range_->at(index_); }  ///< part and slices, cut at each call
    /// On to the next micro-batch, or behind the last one.
    Iterator& operator++() {
      ++index_;
      return *this;
    }
    bool operator==(const Iterator& other) const noexcept { return index_ == other.index_; }  ///< in one range

   private:
    const MicroBatchRange* range_;
    std::int64_t index_;
  };

  [[nodiscard]] Iterator begin() const { return {*this, 0}; }                ///< at micro-batch 0
  [[nodiscard]] Iterator end() const { return {*this, cut_.count()}; }       ///< behind the last micro-batch
  [[nodiscard]] std::int64_t size() const noexcept { return cut_.count(); }  ///< K, the number of micro-batches

 private:
  [[nodiscard]] std::tuple<Part, B...> at(std::int64_t i) const {
    return std::apply(
        [&](const B&... batch) {
          return std::tuple<Part, B...>(cut_.part(i), slice(batch, cut_.begin(i), cut_.size(i))...);
        },
        batches_);
  }

  MicroBatches cut_;
  std::tuple<B...> batches_;
};

/// Cuts batches of the same samples into micro-batches of `micro_batch_size`, for the body of a loop of one's own.
///
/// ```cpp
/// for (auto [part, x, y] : microreg::micro_batches(16, images, labels)) {
///   penalised.backward(part, criterion(model->forward(x), y));
/// }
/// ```
///
/// Throws OptionError for a size below 1, BatchError where the batches are empty or differ in samples.
template <Batch First, Batch... More>
[[nodiscard]] MicroBatchRange<detail::Owned<First>, detail::Owned<More>...> micro_batches(std::int64_t micro_batch_size,
                                                                                          const First& first,
                                                                                          const More&... more) {
  if (micro_batch_size < 1) {
    throw OptionError(detail::text({"micro_batch_size is ", micro_batch_size, "; it must be at least 1"}));
  }
  const std::int64_t samples = sample_count(std::tuple<detail::Owned<First>, detail::Owned<More>...>(first, more...));
  if (samples == 0) {
    throw BatchError("the mini-batch is empty; skip empty batches in the data loader");
  }
  return {MicroBatches(samples, micro_batch_size, Weighting::samples), first, more...};
}

}  // namespace microreg::inline MICROREG_ABI
