#include "measure_rows.hpp"

#include "accuracy.hpp"

#include <functional>

namespace overhead {

namespace {

std::function<void()> plain(const Workload& workload) {
  return [workload] {
    plain_step(workload);
    synchronise(workload);
  };
}

std::function<void()> penalised(const Workload& workload, const PenalisedStep& step) {
  return [workload, step] {
    step();
    synchronise(workload);
  };
}

std::vector<SweepRow> sweep(const std::string& name, const std::vector<Case>& cases, const Budget& budget,
                            MemoryMeter* memory) {
  // Each point has its plain step just before it, in every round.
  std::vector<std::function<void()>> steps;
  for (const Case& which : cases) {
    const Workload workload = make_workload(which);
    steps.push_back(plain(workload));
    steps.push_back(penalised(workload, make_penalised_step(workload, which)));
  }
  for (const auto& step : steps) {
    step();
  }
  const Samples samples = run_rounds(steps, budget);
  std::vector<SweepRow> rows;
  for (std::size_t i = 0; i < cases.size(); ++i) {
    SweepRow row{.sweep = name,
                 .which = cases[i],
                 .plain_ms = median_time(samples, 2 * i),
                 .ratio = median_ratio(samples, 2 * i + 1, 2 * i),
                 .relative_time = median_ratio(samples, 2 * i + 1, 1),
                 .peak_memory_mb = std::nullopt,
                 .rounds = samples.size()};
    const auto bytes = memory != nullptr ? memory->peak_bytes(cases[i], "penalised") : std::nullopt;
    if (bytes.has_value()) {
      row.peak_memory_mb = static_cast<double>(*bytes) / 1e6;
    }
    rows.push_back(std::move(row));
  }
  return rows;
}

}  // namespace

std::vector<Row> measure_group(const Group& group, const Budget& budget, MemoryMeter* memory) {
  const Workload workload = make_workload(group.front());
  Case reference = group.front();
  reference.estimator = "exact";
  reference.fused = false;
  const Accuracy accuracy(workload, make_penalised_step(workload, reference));

  std::vector<Row> rows;
  std::vector<std::function<void()>> steps;
  for (const Case& which : group) {
    const PenalisedStep step = make_penalised_step(workload, which);
    Row row;
    row.which = which;
    if (which.estimator.ends_with("-graph")) {  // recorded in the second step, and repeated from the third one on
      step();
      step();
    }
    if (which.estimator != "plain-graph") {
      row.relative_error = accuracy.relative_error(step);  // warms the step up too
    }
    rows.push_back(row);
    steps.push_back(plain(workload));
    steps.push_back(penalised(workload, step));
  }
  const Samples samples = run_rounds(steps, budget);
  for (std::size_t i = 0; i < rows.size(); ++i) {
    rows[i].plain_ms = median_time(samples, 2 * i);
    rows[i].ratio = median_ratio(samples, 2 * i + 1, 2 * i);
    rows[i].rounds = samples.size();
    if (memory != nullptr) {
      rows[i].peak_memory_ratio = memory->peak_ratio(rows[i].which);
    }
  }
  return rows;
}

std::vector<SweepRow> sweep_batch(const Case& common, const Budget& budget, MemoryMeter* memory) {
  std::vector<Case> cases;
  for (const std::int64_t batch : {32, 64, 128, 256, 512}) {
    cases.push_back(common);
    cases.back().micro_batch = 32;
    cases.back().batch = batch;
  }
  return sweep("batch", cases, budget, memory);
}

std::vector<SweepRow> sweep_micro_batch(const Case& common, const Budget& budget, MemoryMeter* memory) {
  std::vector<Case> cases;
  for (const std::int64_t micro_batch : {8, 16, 32, 64, 128, 256}) {
    cases.push_back(common);
    cases.back().micro_batch = micro_batch;
    cases.back().batch = 256;
  }
  return sweep("micro_batch", cases, budget, memory);
}

std::vector<SweepRow> sweep_share(const Case& common, const Budget& budget, MemoryMeter* memory) {
  std::vector<Case> cases;
  for (const double share : {1.0, 0.5, 0.25, 0.125}) {
    cases.push_back(common);
    cases.back().micro_batch = 32;
    cases.back().batch = 256;
    cases.back().micro_batch_share = share;
  }
  return sweep("share", cases, budget, memory);
}

}  // namespace overhead
