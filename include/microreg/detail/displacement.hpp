/// @file
/// Moving parameters for a while, with the promise that they come back bitwise.
#pragma once

#include <ATen/ATen.h>
#include <ATen/autocast_mode.h>
#include <ATen/core/grad_mode.h>

#include <utility>
#include <vector>

namespace microreg::detail {

/// A bitwise copy of tensors, to come back to. Subtracting a displacement again would leave rounding behind.
class Originals {
 public:
  explicit Originals(std::vector<at::Tensor> tensors) : tensors_(std::move(tensors)) {
    const at::NoGradGuard no_grad;
    copies_.reserve(tensors_.size());
    for (const at::Tensor& tensor : tensors_) {
      copies_.push_back(tensor.clone());
    }
  }

  [[nodiscard]] const std::vector<at::Tensor>& tensors() const noexcept { return tensors_; }
  [[nodiscard]] const std::vector<at::Tensor>& copies() const noexcept { return copies_; }

  void restore() const {
    const at::NoGradGuard no_grad;
    at::_foreach_copy_(tensors_, copies_);
    at::autocast::clear_cache();  // which holds parameters in half precision, as they were
  }

 private:
  std::vector<at::Tensor> tensors_;
  std::vector<at::Tensor> copies_;
};

/// While it lives, the tensors of `originals` are moved by `moves`, in place; an undefined move leaves a tensor alone.
class Displacement {
 public:
  Displacement(const Originals& originals, const std::vector<at::Tensor>& moves) : originals_(originals) {
    const at::NoGradGuard no_grad;
    std::vector<at::Tensor> into;
    std::vector<at::Tensor> by;
    for (std::size_t i = 0; i < moves.size(); ++i) {
      if (moves[i].defined()) {
        into.push_back(originals.tensors()[i]);
        by.push_back(moves[i]);
      }
    }
    at::_foreach_add_(into, by);
    at::autocast::clear_cache();
  }
  Displacement(const Displacement&) = delete;
  Displacement& operator=(const Displacement&) = delete;
  ~Displacement() { originals_.restore(); }

 private:
  const Originals& originals_;
};

}  // namespace microreg::detail
