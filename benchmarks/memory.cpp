#include "memory.hpp"

#include "options.hpp"
#include "penalised_step.hpp"
#include "process.hpp"

#include <c10/core/CachingDeviceAllocator.h>
#include <fmt/format.h>
#include <microreg/detail/libtorch.hpp>

#include <fstream>
#include <functional>

namespace overhead {

namespace {

/// A line of /proc/self/status such as "VmHWM:   123456 kB", in bytes.
std::optional<std::int64_t> status_bytes(const std::string& key) {
  std::ifstream status("/proc/self/status");
  for (std::string line; std::getline(status, line);) {
    if (line.rfind(key + ":", 0) == 0) {
      return 1024 * std::stoll(line.substr(key.size() + 1));
    }
  }
  return std::nullopt;
}

/// Makes VmHWM start again from the present resident set. Where that is not allowed, VmHWM still holds the peak since
/// the start, which the first step exceeds.
void reset_peak() { std::ofstream("/proc/self/clear_refs") << 5 << std::flush; }

/// Nothing before LibTorch 2.9, whose allocators cannot be asked by device.
std::optional<std::int64_t> peak_on_cuda([[maybe_unused]] const torch::Device& device,
                                         [[maybe_unused]] const std::function<void()>& step) {
#if MICROREG_LIBTORCH >= 209
  const auto index = static_cast<c10::DeviceIndex>(device.has_index() ? device.index() : 0);
  step();  // workspaces that stay, such as cuBLAS's, are not the step's
  auto* allocator = c10::getDeviceAllocator(device.type());
  constexpr auto all = static_cast<std::size_t>(c10::CachingAllocator::StatType::AGGREGATE);
  const auto before = allocator->getDeviceStats(index).allocated_bytes[all].current;
  allocator->resetPeakStats(index);
  step();
  return allocator->getDeviceStats(index).allocated_bytes[all].peak - before;
#else
  return std::nullopt;
#endif
}

}  // namespace

std::optional<std::int64_t> peak_bytes_here(const Case& which, const std::string& step) {
  const Workload workload = make_workload(which);
  const PenalisedStep penalised = make_penalised_step(workload, which);
  const std::function<void()> run = [&] {
    if (step == "plain") {
      plain_step(workload);
    } else {
      penalised();
    }
    synchronise(workload);
    workload.model->zero_grad();
  };
  if (workload.images.is_cuda()) {
    return peak_on_cuda(torch::Device(which.device), run);
  }
  const auto before = status_bytes("VmRSS");
  reset_peak();
  run();
  const auto peak = status_bytes("VmHWM");
  if (!before.has_value() || !peak.has_value()) {
    return std::nullopt;
  }
  return *peak - *before;
}

std::optional<std::int64_t> MemoryMeter::peak_bytes(const Case& which, const std::string& step) {
  std::vector<std::string> arguments = arguments_of(which);
  if (step == "plain") {  // whatever the penalty
    arguments = arguments_of({.model = which.model,
                              .layout = which.layout,
                              .micro_batch = which.micro_batch,
                              .batch = which.batch,
                              .device = which.device});
  }
  for (const std::string& argument : {std::string("--memory-of"), step, std::string("--malloc"), std::string("mapped"),
                                      std::string("--threads"), fmt::format("{}", threads_)}) {
    arguments.push_back(argument);
  }
  std::string key;
  for (const std::string& argument : arguments) {
    key += argument + " ";
  }
  const auto found = known_.find(key);
  if (found != known_.end()) {
    return found->second;
  }
  const std::string answer = run_this_program(arguments);
  std::optional<std::int64_t> bytes;
  if (answer != "unknown\n") {
    bytes = std::stoll(answer);
  }
  known_.emplace(key, bytes);
  return bytes;
}

std::optional<double> MemoryMeter::peak_ratio(const Case& which) {
  const auto plain = peak_bytes(which, "plain");
  const auto penalised = peak_bytes(which, "penalised");
  if (!plain.has_value() || !penalised.has_value() || *plain <= 0) {
    return std::nullopt;
  }
  return static_cast<double>(*penalised) / static_cast<double>(*plain);
}

}  // namespace overhead
