#include "system.hpp"

#include <cstdlib>
#include <fstream>
#if defined(__GLIBC__)
#include <malloc.h>
#endif

namespace overhead {

bool keep_freed_memory() {
#if defined(__GLIBC__)
  // The mapping threshold itself cannot be raised above 32 MB, which is one activation of a wide network.
  return mallopt(M_MMAP_MAX, 0) == 1 && mallopt(M_TRIM_THRESHOLD, -1) == 1;
#else
  return false;
#endif
}

void map_large_tensors() {
#if defined(__GLIBC__)
  mallopt(M_MMAP_THRESHOLD, 128 * 1024);
#endif
}

std::optional<double> load_average() {
  double average = 0;
  if (getloadavg(&average, 1) != 1) {
    return std::nullopt;
  }
  return average;
}

std::string processor_name() {
  std::ifstream info("/proc/cpuinfo");
  for (std::string line; std::getline(info, line);) {
    if (line.rfind("model name", 0) == 0) {
      return line.substr(line.find(':') + 2);
    }
  }
  return "unknown processor";
}

}  // namespace overhead
