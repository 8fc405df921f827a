// Hands the files of a folder to the readers: those in CORPUS/images to read_images, and so on.
//
//     microreg_replay CORPUS
#include "readers.hpp"

#include <cstdio>
#include <exception>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <string>

int main(int argc, char** argv) {
  if (argc != 2) {
    std::fprintf(stderr, "usage: %s CORPUS\n", argv[0]);
    return 2;
  }
  int failures = 0;
  for (const cifar::fuzz::Reader& reader : cifar::fuzz::readers) {
    int files = 0;
    for (const auto& entry : std::filesystem::directory_iterator(std::filesystem::path(argv[1]) / reader.name)) {
      std::ifstream stream(entry.path(), std::ios::binary);
      const std::string bytes{std::istreambuf_iterator<char>(stream), {}};
      try {
        reader.read(bytes);
      } catch (const std::exception& error) {
        std::printf("FAILED %s: %s\n", entry.path().c_str(), error.what());
        ++failures;
      }
      ++files;
    }
    std::printf("%.*s: %d files\n", static_cast<int>(reader.name.size()), reader.name.data(), files);
    failures += files == 0 ? 1 : 0;
  }
  return failures == 0 ? 0 : 1;
}
