#include "kernel_times.hpp"

#include "penalised_step.hpp"
#include "workload.hpp"

#include <fmt/format.h>
#include <torch/csrc/autograd/profiler_kineto.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <set>
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

using Events = std::vector<torch::autograd::profiler::KinetoEvent>;

std::map<std::string, Time> kernels_among(const Events& events) {
  std::map<std::string, Time> result;
  for (const auto& event : events) {
    if (event.deviceType() == c10::DeviceType::CUDA) {
      Time& time = result[short_name(event.name())];
      time.milliseconds += static_cast<double>(event.durationNs()) / 1e6;
      ++time.calls;
    }
  }
  return result;
}

/// The CPU's operators, each with its own time: without that of the operators that it calls.
std::map<std::string, Time> operators_among(const Events& events) {
  std::map<std::uint64_t, std::vector<const torch::autograd::profiler::KinetoEvent*>> threads;
  for (const auto& event : events) {
    threads[event.startThreadId()].push_back(&event);
  }
  std::map<std::string, Time> result;
  for (auto& [thread, calls] : threads) {
    std::stable_sort(calls.begin(), calls.end(), [](const auto* a, const auto* b) {
      return a->startNs() != b->startNs() ? a->startNs() < b->startNs() : a->endNs() > b->endNs();
    });
    std::vector<const torch::autograd::profiler::KinetoEvent*> open;
    for (const auto* call : calls) {
      while (!open.empty() && open.back()->endNs() <= call->startNs()) {
        open.pop_back();
      }
      const double milliseconds = static_cast<double>(call->durationNs()) / 1e6;
      if (!open.empty()) {
        result[short_name(open.back()->name())].milliseconds -= milliseconds;
      }
      Time& time = result[short_name(call->name())];
      time.milliseconds += milliseconds;
      ++time.calls;
      open.push_back(call);
    }
  }
  return result;
}

/// The kernels of one step on a device, or its operators on the CPU, after three steps to warm up.
std::map<std::string, Time> kernels_of(bool cuda, const std::function<void()>& step) {
  for (int i = 0; i < 3; ++i) {
    step();
  }
  using torch::profiler::impl::ActivityType;
  const torch::profiler::impl::ProfilerConfig config(torch::profiler::impl::ProfilerState::KINETO);
  std::set<ActivityType> activities{ActivityType::CPU};
  if (cuda) {
    activities.insert(ActivityType::CUDA);
  }
  torch::autograd::profiler::prepareProfiler(config, activities);
  torch::autograd::profiler::enableProfiler(config, activities);
  step();
  const auto profiled = torch::autograd::profiler::disableProfiler();  // which the events belong to
  return cuda ? kernels_among(profiled->events()) : operators_among(profiled->events());
}

void print(const char* what, const char* unit, const std::map<std::string, Time>& kernels) {
  std::vector<std::pair<std::string, Time>> sorted(kernels.begin(), kernels.end());
  std::sort(sorted.begin(), sorted.end(),
            [](const auto& a, const auto& b) { return a.second.milliseconds > b.second.milliseconds; });
  Time all;
  for (const auto& [name, time] : sorted) {
    all.milliseconds += time.milliseconds;
    all.calls += time.calls;
  }
  fmt::print("{}: {:.2f} ms in {} {}\n", what, all.milliseconds, all.calls, unit);
  constexpr std::size_t rows = 30;
  for (std::size_t i = 0; i < std::min(rows, sorted.size()); ++i) {
    fmt::print("{:9.3f} ms {:5} x  {}\n", sorted[i].second.milliseconds, sorted[i].second.calls, sorted[i].first);
  }
}

}  // namespace

void print_kernel_times(const Case& which) {
  const Workload workload = make_workload(which);
  const bool cuda = workload.images.is_cuda();
  const char* unit = cuda ? "kernels" : "operators";
  const PenalisedStep penalised = make_penalised_step(workload, which);
  print("plain step", unit, kernels_of(cuda, [&] {
          plain_step(workload);
          synchronise(workload);
        }));
  print("penalised step", unit, kernels_of(cuda, [&] {
          penalised();
          synchronise(workload);
        }));
}

}  // namespace overhead
