/// @file
/// What a user's shared library offers; without LibTorch in its interface.
#pragma once

/// The norm of the gradient of one regularized step.
double gradient_norm_in_library();
