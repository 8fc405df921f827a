/// @file
/// Definitions of batch.hpp.
#pragma once

#include <ATen/ATen.h>
#include <microreg/batch.hpp>
#include <microreg/detail/config.hpp>

namespace microreg::inline MICROREG_ABI::detail {

MICROREG_INLINE void SampleCounter::add(const at::Tensor& tensor, const std::string& path, std::int64_t dimension) {
  if (!tensor.defined()) {
    throw BatchError(text({path, " is an undefined tensor; assign it, or make it a std::optional that is empty"}));
  }
  if (tensor.is_nested()) {
    throw BatchError(text({path,
                           " is a nested tensor, which cannot be cut; pass the list of its tensors as "
                           "PerSample<torch::Tensor>, or a padded tensor and a mask"}));
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
  for (const auto& [values, path] : values_) {
    if (values == count_) {
      throw BatchError(text({path, " is a std::vector of ", values,
                             " values, as many as there are samples, and would go "
                             "along uncut; make it a PerSample<...>, whose elements are cut, or a tensor, or a "
                             "std::array if it belongs to the whole batch"}));
    }
  }
  return count_;
}

MICROREG_INLINE void SampleCounter::note_values(std::size_t values, const std::string& path) {
  if (values > 1) {
    values_.emplace_back(static_cast<std::int64_t>(values), path);
  }
}

MICROREG_INLINE void cut(at::Tensor& tensor, std::int64_t begin, std::int64_t length, std::int64_t dimension) {
  if (begin == 0 && length == tensor.size(dimension)) {
    return;
  }
  if (tensor.layout() == at::kStrided) {
    tensor = tensor.narrow(dimension, begin, length);
  } else if (tensor.is_sparse()) {
    tensor = tensor.index_select(dimension, at::arange(begin, begin + length, tensor.device()));
  } else {
    throw BatchError(text({"a tensor of layout ", c10::str(tensor.layout()), " and shape ", tensor.sizes(),
                           " in the batch cannot be cut into micro-batches; use to_sparse() (COO) or to_dense(), or a "
                           "micro_batch_size of at least the mini-batch"}));
  }
}

MICROREG_INLINE void throw_shared_fields(const std::string& path) {
  throw BatchError(text({path,
                         " of a copy of the batch is that of the batch itself, so cutting it would cut yours: give "
                         "the type a copy constructor that copies the tensors' handles, or functions "
                         "microreg_size and microreg_slice"}));
}

}  // namespace microreg::inline MICROREG_ABI::detail
