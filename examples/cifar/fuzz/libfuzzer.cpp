// The entry of libFuzzer. The environment variable MICROREG_READER says which reader gets what it makes.
#include "readers.hpp"

#include <torch/torch.h>

#include <cstdio>
#include <cstdlib>
#include <string_view>

namespace {
const cifar::fuzz::Reader* chosen = nullptr;
}

extern "C" int LLVMFuzzerInitialize(int* /*argc*/, char*** /*argv*/) {
  torch::set_num_threads(1);
  const char* name = std::getenv("MICROREG_READER");
  for (const cifar::fuzz::Reader& reader : cifar::fuzz::readers) {
    if (name != nullptr && reader.name == name) {
      chosen = &reader;
      return 0;
    }
  }
  std::fprintf(stderr, "set MICROREG_READER to one of:");
  for (const cifar::fuzz::Reader& reader : cifar::fuzz::readers) {
    std::fprintf(stderr, " %.*s", static_cast<int>(reader.name.size()), reader.name.data());
  }
  std::fprintf(stderr, "\n");
  std::exit(2);
}

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  chosen->read({reinterpret_cast<const char*>(data), size});
  return 0;
}
