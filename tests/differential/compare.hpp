/// @file
/// One random network by every way to differentiate, against plain double backward by hand in float64.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

namespace differential {

/// What came out of many cases.
struct Tally {
  std::int64_t networks = 0;
  std::int64_t gradients = 0;                   ///< that were compared
  std::map<std::string, std::int64_t> refused;  ///< differences that refused, by the begin of their message
  std::map<std::string, std::int64_t> skipped;  ///< cases that LibTorch itself cannot compute, and why
  std::map<std::string, double> largest;        ///< error of each way, relative to the penalties' gradient
  std::vector<std::string> failures;
};

/// Adds the case of `seed`; `say` prints it.
void compare(std::uint64_t seed, bool say, Tally& tally);

}  // namespace differential
