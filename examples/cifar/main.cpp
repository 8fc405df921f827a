#include <microreg/distributed/communicator.hpp>

#include <cstdio>
#include <exception>
#include <memory>

#include "command_line.hpp"
#include "ranks.hpp"
#include "trainer.hpp"

namespace {

/// The exit code. An error of one of several ranks is told to the others.
int run(const cifar::Options& options) {
  std::shared_ptr<microreg::Communicator> ranks;
  try {
    ranks = cifar::join_ranks(options.distributed);
    cifar::Progress progress;
    const cifar::Summary summary = cifar::train(options, progress, ranks);
    return summary.status == "interrupted" ? 128 + summary.signal : 0;  // as shells say it
  } catch (const std::exception& error) {
    const bool usage = dynamic_cast<const cifar::UsageError*>(&error) != nullptr;
    std::fprintf(stderr, "microreg_cifar: error: %s\n", error.what());
    if (ranks != nullptr) {
      ranks->abandon(error.what());
    }
    return usage && ranks == nullptr ? 2 : 1;
  }
}

}  // namespace

int main(int argc, char** argv) {
  try {
    if (const auto options = cifar::parse_command_line(argc, argv)) {
      const int code = run(*options);
      cifar::leave_ranks(options->distributed, code);
      return code;
    }
    return 0;
  } catch (const cifar::UsageError& error) {
    std::fprintf(stderr, "microreg_cifar: error: %s\n", error.what());
    return 2;
  }
}
