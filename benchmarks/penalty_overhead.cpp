/// @file
/// What a penalty costs, against a plain step. See README.md in this folder.
#include "fused_operations.hpp"
#include "kernel_times.hpp"
#include "measure_rows.hpp"
#include "serve.hpp"
#include "system.hpp"

#include <fmt/format.h>
#include <torch/torch.h>

#include <cstdio>
#include <exception>
#include <iostream>
#include <string>
#include <thread>

namespace {

using namespace overhead;

void print_preamble(const Options& options, bool memory_kept) {
  const auto load = load_average();
  const unsigned cores = std::thread::hardware_concurrency();
  fmt::print("LibTorch {}, {}, {} threads on {} cores ({}), freed memory {}, load average {}\n", TORCH_VERSION,
             options.device, torch::get_num_threads(), cores, processor_name(),
             memory_kept ? "kept in the process" : "as the C library does",
             load.has_value() ? fmt::format("{:.2f}", *load) : "unknown");
  if (options.autocast != "float32") {
    fmt::print("Forward passes under autocast in {}, plain and penalised alike\n", options.autocast);
  }
  if (torch::Device(options.device).is_cuda()) {
    fmt::print("Products and convolutions in {}, cuDNN chooses its algorithms by trial\n",
               options.tf32 ? "TF32" : "full float32");
  }
  if (load.has_value() && *load > 0.5 * cores) {
    fmt::print("The machine is busy: expect ratios to vary from run to run.\n");
  }
  fmt::print(
      "ratio: penalised over plain step, medians over interleaved rounds. memory: peak over the plain step's. error: "
      "of the penalty's\npart of the gradient, against double backward by LibTorch alone.\n\n");
  std::fflush(stdout);
}

std::vector<SweepRow> run_sweeps(const Options& options, MemoryMeter* memory) {
  const Case common = options.single_case();
  std::vector<SweepRow> all;
  const auto run = [&](const char* what, auto&& sweep) {
    print_sweep_header(
        fmt::format("{}: {}, {}, {}, {}", what, common.model, common.layout, common.penalty, common.estimator));
    for (SweepRow& row : sweep(common, options.budget(4), memory)) {
      print_sweep_row(row);
      all.push_back(std::move(row));
    }
  };
  run("|B| grows", sweep_batch);
  run("|M| grows", sweep_micro_batch);
  run("a share of the micro-batches is penalised", sweep_share);
  return all;
}

int run(const Options& options) {
  const bool memory_kept = options.malloc == "tuned" && keep_freed_memory();
  if (options.malloc == "mapped") {
    map_large_tensors();
  }
  if (options.threads > 0) {
    torch::set_num_threads(options.threads);
  }
  // As a training program would: cuDNN tries its algorithms, also for the odd shapes of double backward.
  at::globalContext().setBenchmarkCuDNN(true);
  at::globalContext().setAllowTF32CuDNN(options.tf32);
  at::globalContext().setAllowTF32CuBLAS(options.tf32);
  if (!options.fused_operations.empty()) {
    limit_fused_operations(options.fused_operations);
  }
  if (!options.memory_of.empty()) {
    const auto bytes = peak_bytes_here(options.single_case(), options.memory_of);
    fmt::print("{}\n", bytes.has_value() ? std::to_string(*bytes) : "unknown");
    return 0;
  }
  if (options.kernels) {
    print_kernel_times(options.single_case());
    return 0;
  }
  if (options.serve) {
    serve(options.single_case(), options.state, std::cin);
    return 0;
  }
  print_preamble(options, memory_kept);
  MemoryMeter meter(torch::get_num_threads());
  MemoryMeter* memory = options.memory ? &meter : nullptr;

  // After every group, so that a run that is broken off leaves what it found; and first of all, so that a file that
  // cannot be written is known before hours have passed.
  std::vector<Row> rows;
  std::vector<SweepRow> sweeps;
  const auto write_records = [&] {
    if (!options.json.empty()) {
      write_json(options.json, rows, torch::get_num_threads());
    }
    if (!options.sweep_json.empty()) {
      write_json(options.sweep_json, sweeps, torch::get_num_threads());
    }
  };
  write_records();
  print_header();
  for (const Group& group : make_plan(options)) {
    for (Row& row : measure_group(group, options.budget(group.size()), memory)) {
      print_row(row);
      rows.push_back(std::move(row));
    }
    write_records();
  }
  if (options.sweeps.value_or(!options.quick && !options.filtered())) {
    sweeps = run_sweeps(options, memory);
    write_records();
  }
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  int exit_code = 0;
  try {
    const auto options = parse_command_line(argc, argv, exit_code);
    return options.has_value() ? run(*options) : exit_code;
  } catch (const std::exception& error) {
    std::cerr << "penalty_overhead: error: " << error.what() << '\n';
    return 1;
  }
}
