#include "options.hpp"

#include "networks.hpp"

#include <fmt/format.h>

#include <CLI/CLI.hpp>

#include <algorithm>

namespace overhead {

namespace {

template <class Range, class Name>
std::vector<std::string> names_in(const Range& range, Name name) {
  std::vector<std::string> result;
  for (const auto& item : range) {
    result.emplace_back(name(item));
  }
  return result;
}

void set_if_given(std::string& value, const std::vector<std::string>& given) {
  if (!given.empty()) {
    value = given.front();
  }
}

}  // namespace

Case Options::single_case() const {
  Case which;
  set_if_given(which.model, models);
  set_if_given(which.layout, layouts);
  set_if_given(which.penalty, penalties);
  set_if_given(which.estimator, estimators);
  if (!micro_batches.empty()) {
    which.micro_batch = micro_batches.front();
  }
  which.batch = batch;
  which.micro_batch_share = micro_batch_share;
  which.workers = workers;
  which.fused = fused != "off";
  which.device = device;
  which.autocast = autocast;
  return which;
}

Budget Options::budget(std::size_t rows) const {
  return {.rounds = rounds, .seconds = seconds.value_or(quick ? 3 : 20) * static_cast<double>(rows)};
}

std::vector<std::string> arguments_of(const Case& which) {
  return {"--model",       which.model,
          "--layout",      which.layout,
          "--penalty",     which.penalty,
          "--estimator",   which.estimator,
          "--device",      which.device,
          "--autocast",    which.autocast,
          "--fused",       which.fused ? "on" : "off",
          "--batch",       fmt::format("{}", which.batch),
          "--share",       fmt::format("{}", which.micro_batch_share),
          "--workers",     fmt::format("{}", which.workers),
          "--micro-batch", fmt::format("{}", which.micro_batch)};
}

std::optional<Options> parse_command_line(int argc, const char* const* argv, int& exit_code) {
  Options options;
  CLI::App app{
      "What a penalty costs: the time and the memory of a step with a penalty, as ratios to a plain step of the same "
      "micro-batch size. Plain and penalised steps alternate in one process; the ratios are medians over rounds."};
  app.name("penalty_overhead");
  app.get_formatter()->column_width(38);

  const auto self = [](const auto& name) { return name; };
  auto* what = app.add_option_group("What", "Each may be given several times; without any: the full plan");
  what->add_flag("--quick", options.quick, "Within a minute: GradientNorm on ResNet-18 of width 16, both layouts");
  what->add_option("--model", options.models, "Networks")
      ->check(CLI::IsMember(names_in(networks(), [](const Network& item) { return item.name; })))
      ->type_name("NAME");
  what->add_option("--layout", options.layouts, "nchw or channels_last")
      ->check(CLI::IsMember(names_in(layout_names, self)))
      ->type_name("NAME");
  what->add_option("--penalty", options.penalties, "Penalties")
      ->check(CLI::IsMember(names_in(penalty_names, self)))
      ->type_name("NAME");
  what->add_option("--estimator", options.estimators, "How the penalty is differentiated")
      ->check(CLI::IsMember(names_in(estimators, [](const Estimator& item) { return item.name; })))
      ->type_name("NAME");
  what->add_option("--micro-batch", options.micro_batches, "Samples in a micro-batch")
      ->check(CLI::PositiveNumber)
      ->type_name("N");
  what->add_option("--fused", options.fused, "Fused double backward: on, off or both")
      ->check(CLI::IsMember({"on", "off", "both"}))
      ->type_name("on|off|both");
  what->add_option("--fused-operations", options.fused_operations, "Fuse these operations of ATen alone")
      ->delimiter(',')
      ->type_name("NAME,...");
  what->add_flag("--sweep,!--no-sweep", options.sweeps, "Time and memory as the batch and the micro-batch grow");

  auto* how = app.add_option_group("How");
  how->add_option("--threads", options.threads, "CPU threads; 0: LibTorch's choice")
      ->check(CLI::NonNegativeNumber)
      ->type_name("N");
  how->add_option("--device", options.device, "cpu, cuda or cuda:N")->type_name("NAME");
  how->add_option("--autocast", options.autocast, "Mixed precision in forward passes, for plain and penalised steps")
      ->check(CLI::IsMember(names_in(autocast_names, self)))
      ->type_name("TYPE");
  how->add_flag("--tf32", options.tf32, "On CUDA: products and convolutions in TF32; else in full float32");
  how->add_option("--malloc", options.malloc,
                  "tuned: keep freed memory in the process; default: as the C library does; mapped: every large tensor "
                  "on its own")
      ->check(CLI::IsMember({"tuned", "default", "mapped"}))
      ->type_name("tuned|default|mapped");
  how->add_option("--rounds", options.rounds, "Exactly so many rounds instead of a time")
      ->check(CLI::PositiveNumber)
      ->type_name("N");
  how->add_option("--seconds", options.seconds, "Time for a row [20; 3 with --quick]; at least three rounds")
      ->check(CLI::PositiveNumber)
      ->type_name("S");
  how->add_flag("!--no-memory", options.memory, "Skip the peak memory, which takes processes of its own");

  how->add_flag("--kernels", options.kernels,
                "Only list what a plain and a penalised step take: kernels on CUDA, else operators");

  auto* records = app.add_option_group("Records");
  records->add_option("--json", options.json, "Write the rows as an array of objects")->type_name("FILE");
  records->add_option("--sweep-json", options.sweep_json, "Write the sweeps as an array of objects")->type_name("FILE");

  app.add_option("--batch", options.batch, "")->group("")->check(CLI::NonNegativeNumber);
  app.add_option("--share", options.micro_batch_share, "")->group("");
  app.add_option("--workers", options.workers, "")->group("")->check(CLI::NonNegativeNumber);
  app.add_flag("--serve", options.serve, "")->group("");
  app.add_option("--state", options.state, "")->group("");
  app.add_option("--memory-of", options.memory_of, "")->group("")->check(CLI::IsMember({"plain", "penalised"}));

  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& error) {
    const bool help = error.get_exit_code() == static_cast<int>(CLI::ExitCodes::Success);
    app.exit(error);
    exit_code = help ? 0 : 2;
    return std::nullopt;
  }
  return options;
}

}  // namespace overhead
