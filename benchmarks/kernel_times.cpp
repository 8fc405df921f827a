#include "kernel_times.hpp"

#include "penalised_step.hpp"
#include "workload.hpp"

#include <fmt/format.h>
#include <torch/csrc/autograd/profiler_kineto.h>

#include <algorithm>
#include <functional>
#include <map>
#include <stdexcept>
#include <string>
#include <vector>

namespace overhead {

namespace {

struct Time {
  double milliseconds = 0;
  int calls = 0;
};

/// A kernel's name without arguments and the middle of its templates' ones: enough to tell kinds apart.
std::string short_name(const std::string& name) {
  constexpr std::size_t longest = 110;
  return name.size() <= longest ? name : name.substr(0, longest / 2) + " ... " + name.substr(name.size() - longest / 2);
}

/// The kernels of one step, after three to warm up.
std::map<std::string, Time> kernels_of(const std::function<void()>& step) {
  for (int i = 0; i < 3; ++i) {
    step();
  }
  using torch::profiler::impl::ActivityType;
  const torch::profiler::impl::ProfilerConfig config(torch::profiler::impl::ProfilerState::KINETO);
  const std::set<ActivityType> activities{ActivityType::CPU, ActivityType::CUDA};
  torch::autograd::profiler::prepareProfiler(config, activities);
  torch::autograd::profiler::enableProfiler(config, activities);
  step();
  const auto profiled = torch::autograd::profiler::disableProfiler();  // which the events belong to
  std::map<std::string, Time> result;
  for (const auto& event : profiled->events()) {
    if (event.deviceType() == c10::DeviceType::CUDA) {
      Time& time = result[short_name(event.name())];
      time.milliseconds += static_cast<double>(event.durationNs()) / 1e6;
      ++time.calls;
    }
  }
  return result;
}

void print(const char* what, const std::map<std::string, Time>& kernels) {
  std::vector<std::pair<std::string, Time>> sorted(kernels.begin(), kernels.end());
  std::sort(sorted.begin(), sorted.end(),
            [](const auto& a, const auto& b) { return a.second.milliseconds > b.second.milliseconds; });
  Time all;
  for (const auto& [name, time] : sorted) {
    all.milliseconds += time.milliseconds;
    all.calls += time.calls;
  }
  fmt::print("{}: {:.2f} ms in {} kernels\n", what, all.milliseconds, all.calls);
  constexpr std::size_t rows = 30;
  for (std::size_t i = 0; i < std::min(rows, sorted.size()); ++i) {
    fmt::print("{:9.3f} ms {:5} x  {}\n", sorted[i].second.milliseconds, sorted[i].second.calls, sorted[i].first);
  }
}

}  // namespace

void print_kernel_times(const Case& which) {
  const Workload workload = make_workload(which);
  if (!workload.images.is_cuda()) {
    throw std::invalid_argument("--kernels needs --device cuda: it lists the kernels of a device");
  }
  const PenalisedStep penalised = make_penalised_step(workload, which);
  print("plain step", kernels_of([&] {
          plain_step(workload);
          synchronise(workload);
        }));
  print("penalised step", kernels_of([&] {
          penalised();
          synchronise(workload);
        }));
}

}  // namespace overhead
