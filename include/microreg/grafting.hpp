/// @file
/// Grafting: a step in the direction of one gradient with the norm of another.
#pragma once

#include <ATen/core/Tensor.h>
#include <microreg/version.hpp>

#include <vector>

namespace microreg::inline MICROREG_ABI {

/// Scales the gradients of `parameters` in place, all by one factor, so that their joint norm becomes `norm`:
///
///     grad <- norm * grad / ||grad||,   ||grad||^2 = sum over the parameters of || parameter.grad ||^2.
///
/// Call it between `backward` and `optimizer.step()`. With plain SGD the step then has the length learning rate * norm.
/// The paper (arXiv:2211.15853) takes the direction from a large batch, and the norm
/// - iteratively, from one micro-batch of the same batch: `report.penalties[0].micro_batch_norms[0]` of GradientNorm;
/// - externally, from the record of a small-batch run;
/// - or fixed ("normalized").
///
/// `norm` is a scalar tensor; no device is synchronised. Parameters without a gradient are passed over, one that stands
/// there several times counts once; a gradient of zero stays zero, and NaN makes all of them NaN. Returns the norm that
/// was there before, a scalar. Cost: two passes over the gradients. Throws, before anything is scaled, ModelError if no
/// parameter has a gradient or one cannot be written to (sparse, expanded), OptionError if `norm` is no scalar.
///
/// ```cpp
/// auto report = regularizer.backward(images, labels);  // GradientNorm with strength 0: measured, not penalised
/// microreg::graft(model->parameters(), report.penalties[0].micro_batch_norms[0]);
/// optimizer.step();
/// ```
at::Tensor graft(const std::vector<at::Tensor>& parameters, const at::Tensor& norm);

/// The same with a fixed norm. Throws OptionError if it is not a finite number, at least 0.
///
/// ```cpp
/// microreg::graft(model->parameters(), 1.0);  // the learning rate becomes the length of the step
/// ```
at::Tensor graft(const std::vector<at::Tensor>& parameters, double norm);

}  // namespace microreg::inline MICROREG_ABI

#if !defined(MICROREG_COMPILED)
#include <microreg/definitions/grafting.hpp>
#endif
