// Micro-batches side by side: the time of a step by workers and threads, on a quiet machine and beside busy processes.
//
//     worker_study [--model resnet18_w16] [--micro-batch 32] [--micro-batches 4] [--workers 2] [--busy 0] [--busy 1]
//                  [--estimator exact|forward|central]
//
// Every round takes one step of each kind in turn: one micro-batch after the other with one thread, the same with all
// of LibTorch's threads, and with 1, 2, .. workers. Printed are medians over the rounds, as the speed-up over one
// thread of the same load. `--busy N` measures beside N processes that do nothing but count. Differences displace the
// parameters without workers, and copies of them with workers.
#include "case.hpp"
#include "networks.hpp"
#include "rounds.hpp"
#include "workload.hpp"

#include <fmt/format.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>
#include <microreg/microreg.hpp>

#include <CLI/CLI.hpp>

#include <cstdint>
#include <functional>
#include <stdexcept>
#include <string>
#include <vector>

namespace {

/// Processes that keep a core busy each while this lives.
class BusyProcesses {
 public:
  explicit BusyProcesses(int count) {
    for (int i = 0; i < count; ++i) {
      const pid_t child = fork();
      if (child < 0) {
        throw std::runtime_error("no process can be started");
      }
      if (child == 0) {
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        volatile std::uint64_t count_up = 0;
        while (true) {
          count_up = count_up + 1;
        }
      }
      children_.push_back(child);
    }
  }
  BusyProcesses(const BusyProcesses&) = delete;
  BusyProcesses& operator=(const BusyProcesses&) = delete;
  ~BusyProcesses() {
    for (const pid_t child : children_) {
      kill(child, SIGKILL);
      waitpid(child, nullptr, 0);
    }
  }

 private:
  std::vector<pid_t> children_;
};

struct Kind {
  std::string name;
  int threads;
  std::int64_t workers;
};

microreg::Estimator estimator_called(const std::string& name, std::int64_t workers) {
  const auto displace = workers > 0 ? microreg::Displace::copies : microreg::Displace::parameters;
  if (name == "forward") {
    return microreg::ForwardDifference{.displace = displace};
  }
  if (name == "central") {
    return microreg::CentralDifference{.displace = displace};
  }
  return microreg::Exact{};
}

std::function<void()> step_of(const overhead::Workload& workload, const std::string& estimator, const Kind& kind) {
  microreg::Regularizer regularizer(workload.model, torch::nn::CrossEntropyLoss(), microreg::GradientNorm{},
                                    {.strength = 1.0,
                                     .micro_batch_size = workload.micro_batch,
                                     .estimator = estimator_called(estimator, kind.workers),
                                     .workers = kind.workers});
  return [workload, regularizer, threads = kind.threads]() mutable {
    torch::set_num_threads(threads);
    workload.model->zero_grad();
    (void)regularizer.backward(workload.images, workload.labels);
  };
}

}  // namespace

int main(int argc, char** argv) {
  std::vector<std::string> models{"cnn", "resnet18_w16"};
  std::vector<int> busy{0, 1};
  std::int64_t micro_batch = 32;
  std::int64_t micro_batches = 4;
  std::int64_t most_workers = torch::get_num_threads();
  double seconds = 20;
  std::string estimator = "exact";
  CLI::App app{"The time of a gradient-norm step by workers and threads, beside busy processes too"};
  app.add_option("--model", models, "Networks")->type_name("NAME");
  app.add_option("--micro-batch", micro_batch, "Samples in a micro-batch")->type_name("N");
  app.add_option("--micro-batches", micro_batches, "Micro-batches in a step")->type_name("N");
  app.add_option("--workers", most_workers, "The largest number of workers")->type_name("N");
  app.add_option("--busy", busy, "Busy processes beside it")->type_name("N");
  app.add_option("--estimator", estimator, "How the penalty is differentiated")
      ->check(CLI::IsMember({"exact", "forward", "central"}));
  app.add_option("--seconds", seconds, "Time for a table")->type_name("S");
  CLI11_PARSE(app, argc, argv);

  const int all_threads = torch::get_num_threads();
  std::vector<Kind> kinds{{"1 thread", 1, 0}};
  if (all_threads > 1) {
    kinds.push_back({fmt::format("{} threads", all_threads), all_threads, 0});
  }
  for (std::int64_t workers = 1; workers <= most_workers; workers *= 2) {
    kinds.push_back({fmt::format("{} worker{}", workers, workers == 1 ? "" : "s"), all_threads, workers});
  }
  for (const std::string& model : models) {
    overhead::Case which;
    which.model = model;
    which.micro_batch = micro_batch;
    which.batch = micro_batch * micro_batches;
    const overhead::Workload workload = overhead::make_workload(which);
    std::vector<std::function<void()>> steps;
    for (const Kind& kind : kinds) {
      steps.push_back(step_of(workload, estimator, kind));
    }
    for (const int count : busy) {
      const BusyProcesses processes(count);
      (void)overhead::run_rounds(steps, {.rounds = 1, .seconds = 0});  // the warm-up
      const overhead::Samples samples = overhead::run_rounds(steps, {.rounds = {}, .seconds = seconds});
      fmt::print("{}, {}, {} micro-batches of {}, beside {} busy processes, {} rounds\n", model, estimator,
                 micro_batches, micro_batch, count, samples.size());
      for (std::size_t i = 0; i < kinds.size(); ++i) {
        fmt::print("  {:<12}{:>10.1f} ms{:>8.2f}\n", kinds[i].name, overhead::median_time(samples, i),
                   overhead::median_ratio(samples, 0, i));
      }
      std::fflush(stdout);
    }
  }
}
