#include "command_line.hpp"

#include <fmt/format.h>

#include <CLI/CLI.hpp>
#include <microreg/version.hpp>

#include <algorithm>
#include <iostream>
#include <vector>

namespace cifar {

namespace {

template <class Enum, std::size_t N>
std::vector<std::string> strings(const std::array<Named<Enum>, N>& names) {
  std::vector<std::string> result;
  std::transform(names.begin(), names.end(), std::back_inserter(result),
                 [](const auto& named) { return std::string(named.name); });
  return result;
}

template <class Enum, std::size_t N>
Enum value_of(const std::array<Named<Enum>, N>& names, const std::string& text) {
  return std::find_if(names.begin(), names.end(), [&](const auto& named) { return named.name == text; })->value;
}

/// An option whose value is one of `names`.
template <class Enum, std::size_t N>
CLI::Option* add_choice(CLI::App* group, const std::string& option, Enum& value,
                        const std::array<Named<Enum>, N>& names, const std::string& description) {
  return group
      ->add_option_function<std::string>(
          option, [&value, &names](const std::string& text) { value = value_of(names, text); }, description)
      ->type_name("")
      ->check(CLI::IsMember(strings(names)))
      ->default_str(std::string(name_of(names, value)));
}

/// An option whose value is a list of `names`, with commas between them.
template <class Enum, std::size_t N>
CLI::Option* add_choices(CLI::App* group, const std::string& option, std::vector<Enum>& values,
                         const std::array<Named<Enum>, N>& names, const std::string& description) {
  return group
      ->add_option_function<std::vector<std::string>>(
          option,
          [&values, &names](const std::vector<std::string>& texts) {
            for (const std::string& text : texts) {
              values.push_back(value_of(names, text));
            }
          },
          description)
      ->type_name("")
      ->delimiter(',')
      ->check(CLI::IsMember(strings(names)))
      ->default_str("none");
}

}  // namespace

std::optional<Options> parse_command_line(int argc, const char* const* argv) {
  Options options;
  std::optional<double> strength;
  std::optional<std::int64_t> batch_size;
  std::optional<Split> split;

  CLI::App app{"Trains a small network on CIFAR with large batches, with or without an explicit regularizer."};
  app.name("microreg_cifar");
  app.option_defaults()->always_capture_default();
  app.set_version_flag("--version", std::string("microreg_cifar ") + microreg::version);
  app.get_formatter()->column_width(38);

  auto* data = app.add_option_group("Data");
  data->add_option("--data", options.data,
                   "'synthetic', or a folder with the official binary files (or its parent folder)")
      ->type_name("synthetic|DIR");
  add_choice(data, "--dataset", options.dataset, dataset_names, "Which files to read from the folder");
  data->add_option_function<std::string>(
          "--split", [&split](const std::string& text) { split = value_of(split_names, text); },
          "What the best checkpoint is chosen on: a held-out fifth of the training images, or, as in the authors' "
          "code, the test images [holdout; synthetic: reference]")
      ->type_name("")
      ->check(CLI::IsMember(strings(split_names)))
      ->always_capture_default(false);
  data->add_option("--train-size", options.train_size, "Training images; 0: all but the fifth (synthetic: 2000)")
      ->type_name("N");
  data->add_option("--validation-size", options.validation_size, "Held-out images; 0: the fifth (synthetic: 2000)")
      ->type_name("N");
  data->add_option("--test-size", options.test_size, "Test images; 0: all (synthetic: 2000)")->type_name("N");
  data->add_option("--image-size", options.image_size, "32, or 16 to pool the images by 2")
      ->type_name("PIXELS")
      ->check(CLI::IsMember({16, 32}));
  data->add_flag("--augment,!--no-augment", options.augment, "Random crop (padding an eighth) and horizontal flip");

  auto* training = app.add_option_group("Training");
  add_choice(training, "--model", options.model, architecture_names, "Network");
  add_choice(training, "--method", options.method, method_names, "What is added to SGD, see below");
  training->add_option("--width", options.width, "Channels of the first stage; 0: 16 for cnn, 64 for the others")
      ->type_name("N");
  training
      ->add_option("--strength", strength,
                   "Factor on the penalty [0.01 gradient-norm, fisher-trace; 0.001 the Jacobians]")
      ->type_name("LAMBDA");
  training->add_option("--warm-up", options.warm_up, "Steps over which the strength rises from 0")->type_name("N");
  add_choice(training, "--estimator", options.estimator, estimator_names, "How the penalty is differentiated");
  training
      ->add_option("--micro-batch-share", options.micro_batch_share, "Share of the micro-batches penalised, unbiased")
      ->type_name("Q");
  training->add_option("--every", options.every, "Penalise every N-th step, with N times the weight")->type_name("N");
  add_choice(training, "--weighting", options.weighting, weighting_names,
             "How a ragged last micro-batch counts: by its samples, or fully as in the authors' code");
  training->add_option("--norms-from", options.norms_from, "external-grafting: the --output folder of an sgd run")
      ->type_name("DIR")
      ->always_capture_default(false);
  training->add_option("--batch-size", batch_size, "Samples in a step [512; sgd: the micro-batch size]")
      ->type_name("N");
  training->add_option("--micro-batch-size", options.micro_batch_size, "Samples in a micro-batch")->type_name("N");
  training->add_option("--learning-rate", options.learning_rate, "Without momentum or weight decay")->type_name("ETA");
  add_choice(training, "--schedule", options.schedule, schedule_names,
             "Learning rate over the run: constant, half a cosine to 0, or a tenth after 1/2 and after 3/4");
  training->add_option("--steps", options.steps, "Updates of the weights")->type_name("N");

  auto* run = app.add_option_group("Run");
  run->add_option("--seed", options.seed, "Same seed, device and threads: the same run")->type_name("N");
  run->add_option("--device", options.device, "cpu, cuda, cuda:1, or auto: cuda where there is one")->type_name("NAME");
  run->add_option("--threads", options.threads, "CPU threads; 0: LibTorch's choice")->type_name("N");
  run->add_option(
         "--workers", options.workers,
         "Micro-batches at a time, each on one CPU thread; 0: one, on all threads; -1: as many as threads where "
         "a step has several")
      ->type_name("N");
  add_choice(run, "--layout", options.layout, layout_names, "Memory layout of images and convolutions");

  run->add_option_function<std::string>(
         "--distributed",
         [&options](const std::string& text) {
           const bool named = std::any_of(distributed_names.begin(), distributed_names.end(),
                                          [&](const auto& each) { return each.name == text; });
           options.distributed =
               named ? value_of(distributed_names, text) : Distributed::torchrun;  // --distributed alone
         },
         "One of several processes, started by torchrun --no-python, or by mpirun with 'mpi'")
      ->type_name("[torchrun|mpi]")
      ->expected(0, 1)
      ->check(CLI::IsMember({"", "true", "none", "torchrun", "mpi"}))
      ->always_capture_default(false);

  auto* records = app.add_option_group("Records");
  records->add_option("--log-every", options.log_every, "Steps between records")->type_name("N");
  add_choices(records, "--monitor", options.monitors, monitor_names,
              "What to measure at every record besides the gradient norm, without a trace in the training");
  add_choice(records, "--monitor-on", options.monitor_on, monitor_on_names,
             "Measure on the same training images each time, or on fresh ones");
  records->add_option("--output", options.output, "Folder for records and checkpoints; without it nothing is written")
      ->type_name("DIR")
      ->always_capture_default(false);
  records->add_flag("--overwrite", options.overwrite, "Replace the run in DIR");
  records->add_flag("--resume", options.resume,
                    "Go on with the run in DIR, bitwise as if it had not stopped; give the same options");
  records
      ->add_option("--checkpoint-every", options.checkpoint_every,
                   "Steps between checkpoints; 0: only when the run stops or ends")
      ->type_name("N");

  app.footer(
      "Methods:\n"
      "  sgd                 small-batch SGD: one micro-batch a step\n"
      "  large-batch         SGD with the large batch\n"
      "  gradient-norm       large batch, penalises the norm of each micro-batch's loss gradient\n"
      "  fisher-trace        large batch, as gradient-norm with labels drawn from the model\n"
      "  average-jacobian    large batch, penalises the gradient of the summed mean output\n"
      "  unit-jacobian       large batch, penalises the gradient along a random output direction\n"
      "  iterative-grafting  large batch's direction, norm of one of its micro-batches' gradients\n"
      "  external-grafting   large batch's direction, norms recorded by another run (--norms-from)\n"
      "  normalized          large batch's direction, norm 1: the learning rate is the step's length\n"
      "\n"
      "Example:\n"
      "  microreg_cifar --method gradient-norm --image-size 16 --steps 300 --output runs/gradient-norm");

  // CLI11 2.1 takes one for the name of an option group, which has none, and never ends.
  if (std::any_of(argv, argv + argc, [](const char* argument) { return *argument == '\0'; })) {
    throw UsageError("an argument is empty; leave it out, with the option before it if it is that one's value");
  }
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& error) {
    if (error.get_exit_code() == static_cast<int>(CLI::ExitCodes::Success)) {
      app.exit(error);  // Prints the help or the version.
      return std::nullopt;
    }
    throw UsageError(std::string(error.what()) + "\nRun with --help for all options.");
  }
  options.strength = strength.value_or(default_strength(options.method));
  options.batch_size = batch_size.value_or(default_batch_size(options.method, options.micro_batch_size));
  options.split = split.value_or(default_split(options.data));
  validate(options);
  return options;
}

}  // namespace cifar
