/// @file
/// Definitions of batch.hpp.
#pragma once

#include <microreg/batch.hpp>
#include <microreg/detail/config.hpp>

namespace microreg::detail {

MICROREG_INLINE void SampleCounter::add(const at::Tensor& tensor, const std::string& path, std::int64_t dimension) {
  if (!tensor.defined()) {
    throw BatchError(text({path, " is an undefined tensor; assign it, or make it a std::optional that is empty"}));
  }
  if (tensor.dim() == 0) {
    throw BatchError(text({path,
                           " is a scalar tensor, it has no first dimension to split; pass a number instead, or expand "
                           "it to one value per sample"}));
  }
  if (dimension < 0 || dimension >= tensor.dim()) {
    throw BatchError(text({path, " has shape ", tensor.sizes(), ", and no dimension ", dimension, " for its samples"}));
  }
  add(tensor.size(dimension), path, text({" (shape ", tensor.sizes(), ")"}));
}

MICROREG_INLINE void SampleCounter::add(std::int64_t samples, const std::string& path, const std::string& shape) {
  if (count_ < 0) {
    count_ = samples;
    first_ = path;
  } else if (samples != count_) {
    throw BatchError(
        text({"first dimensions differ: ", first_, " has ", count_, " samples, ", path, " has ", samples, shape,
              "; the first dimension of every tensor must be the sample dimension (see Along, Whole and "
              "PerSample where it is not)"}));
  }
}

MICROREG_INLINE std::int64_t SampleCounter::count(const std::string& name) const {
  if (count_ < 0) {
    throw BatchError(text({name, " holds no tensor, so there is nothing to split into micro-batches"}));
  }
  return count_;
}

MICROREG_INLINE void cut(at::Tensor& tensor, std::int64_t begin, std::int64_t length, std::int64_t dimension) {
  if (begin != 0 || length != tensor.size(dimension)) {
    tensor = tensor.narrow(dimension, begin, length);
  }
}

}  // namespace microreg::detail
