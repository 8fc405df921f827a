#include <cstdio>
#include <exception>

#include "command_line.hpp"
#include "signals.hpp"
#include "trainer.hpp"

int main(int argc, char** argv) {
  try {
    if (const auto options = cifar::parse_command_line(argc, argv)) {
      cifar::Progress progress;
      if (cifar::train(*options, progress).status == "interrupted") {
        return 128 + cifar::StopSignals::received();  // as shells say it
      }
    }
    return 0;
  } catch (const cifar::UsageError& error) {
    std::fprintf(stderr, "microreg_cifar: error: %s\n", error.what());
    return 2;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "microreg_cifar: error: %s\n", error.what());
    return 1;
  }
}
