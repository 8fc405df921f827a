/// @file
/// The official binary files of CIFAR-10 and CIFAR-100.
///
/// A record is one label byte (CIFAR-100: a coarse and a fine one) and 3,072 pixel bytes: a red, a green and a blue
/// plane, each 32 rows of 32 pixels.
#pragma once

#include "data.hpp"

#include <filesystem>

namespace cifar {

/// Reads `folder`, which is cifar-10-batches-bin (cifar-100-binary) or its parent. CIFAR-100 by its fine labels.
///
/// A file may hold fewer records than the official one, which leaves a note. Throws DataError for a missing folder or
/// file, a file that is empty, larger than the official one or does not end with a whole record, and a label out of
/// range.
[[nodiscard]] Data read_binary_files(const std::filesystem::path& folder, DatasetName dataset);

}  // namespace cifar
