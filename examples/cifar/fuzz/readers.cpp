#include "readers.hpp"

#include <torch/torch.h>

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <fstream>
#include <limits>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "binary_files.hpp"
#include "checkpoint.hpp"
#include "command_line.hpp"
#include "recorded_norms.hpp"
#include "records.hpp"
#include "run_state.hpp"
#include "tests/temporary_folder.hpp"

namespace cifar::fuzz {

namespace {

void require(bool holds, const char* what) {
  if (!holds) {
    throw std::logic_error(what);
  }
}

/// A folder in memory where there is one: a million files go through it.
const std::filesystem::path& folder() {
  static const TemporaryFolder temporary(std::filesystem::exists("/dev/shm") ? "/dev/shm"
                                                                             : std::filesystem::temp_directory_path());
  return temporary.path();
}

void write(const std::filesystem::path& file, std::string_view bytes) {
  std::ofstream stream(file, std::ios::binary | std::ios::trunc);
  stream.write(bytes.data(), static_cast<std::streamsize>(bytes.size()));
}

/// Folders with the official names, all of which are one file: rewriting it changes them all.
const std::filesystem::path& images_file() {
  static const std::filesystem::path file = [] {
    const std::filesystem::path first = folder() / "images.bin";
    write(first, "");
    const auto link = [&](const char* inside, const std::string& name) {
      std::filesystem::create_directories(folder() / inside);
      std::filesystem::create_hard_link(first, folder() / inside / name);
    };
    for (const char* number : {"1", "2", "3", "4", "5"}) {
      link("cifar-10-batches-bin", std::string("data_batch_") + number + ".bin");
    }
    link("cifar-10-batches-bin", "test_batch.bin");
    link("cifar-100-binary", "train.bin");
    link("cifar-100-binary", "test.bin");
    return first;
  }();
  return file;
}

/// A network of a few weights in place of the trainer's.
struct Tiny : ImageClassifier {
  torch::Tensor weight = register_parameter("weight", torch::ones({2, 3}));
  torch::Tensor mean = register_buffer("mean", torch::zeros({3}));
  torch::Tensor forward(torch::Tensor images) override { return images; }
};

using torch::serialize::OutputArchive;

/// The contents of a checkpoint of a Tiny, where each byte spoils one part: 0 leaves it as it is.
std::string spoiled_archive(std::string_view bytes) {
  OutputArchive archive;
  std::size_t next = 0;
  const auto choice = [&](int choices) {
    const int chosen = next < bytes.size() ? static_cast<unsigned char>(bytes[next]) % choices : 0;
    ++next;
    return chosen;
  };
  const auto write_one = [&](const char* key, const std::vector<c10::IValue>& values) {
    const auto chosen = static_cast<std::size_t>(choice(static_cast<int>(values.size()) + 2));
    if (chosen < values.size()) {
      archive.write(key, values[chosen]);
    } else if (chosen == values.size()) {
      archive.write(key, c10::IValue("text"));
    }  // else it is missing
  };
  constexpr double infinity = std::numeric_limits<double>::infinity();
  constexpr std::int64_t least = std::numeric_limits<std::int64_t>::min(),
                         most = std::numeric_limits<std::int64_t>::max();
  const std::vector<c10::IValue> counts{std::int64_t(3), std::int64_t(-1), least, most, 0.5};
  const std::vector<c10::IValue> numbers{0.5, std::nan(""), infinity, std::int64_t(3)};
  const std::vector<c10::IValue> scalars{torch::ones({}), torch::ones({2}), torch::ones({}, torch::kInt64),
                                         torch::zeros({0}), std::int64_t(3)};
  const torch::Tensor weight = torch::full({2, 3}, 2.0), mean = torch::ones({3});
  const auto list = [](std::vector<torch::Tensor> tensors) { return c10::IValue(c10::List<torch::Tensor>(tensors)); };
  const std::vector<c10::IValue> lists{list({weight, mean}),
                                       list({}),
                                       list({weight}),
                                       list({weight, mean, mean}),
                                       list({weight, torch::ones({1})}),
                                       list({weight.to(torch::kFloat64), mean}),
                                       list({weight.expand({4, 2, 3}), mean}),
                                       list({weight.to_sparse(), mean})};
  write_one("config", {c10::IValue("{}"), std::int64_t(3)});
  write_one("step", counts);
  write_one("model", lists);
  OutputArchive optimizer(archive.compilation_unit());
  switch (choice(4)) {
    case 0:
      torch::optim::SGD({weight.clone().requires_grad_()}, 0.5).save(optimizer);
      archive.write("optimizer", optimizer);
      break;
    case 1:
      torch::optim::SGD({weight.clone().requires_grad_(), mean.clone().requires_grad_()}, 0.5).save(optimizer);
      archive.write("optimizer", optimizer);
      break;
    case 2:
      archive.write("optimizer", optimizer);
      break;
    default:
      break;
  }
  write_one("best", lists);
  write_one("best_accuracy", numbers);
  write_one("best_step", counts);
  write_one("final_accuracy", numbers);
  write_one("seconds", numbers);
  write_one("step_seconds", numbers);
  for (const char* key : {"loss.count", "gradient_norm.count", "penalty.count"}) {
    write_one(key, counts);
  }
  for (const char* key : {"loss.sum", "gradient_norm.sum", "penalty.sum"}) {
    write_one(key, scalars);
  }
  write_one("metrics_bytes", counts);
  std::ostringstream stream;
  archive.save_to(stream);
  return stream.str();
}

}  // namespace

void read_images(std::string_view bytes) {
  write(images_file(), bytes);
  for (const DatasetName dataset : {DatasetName::cifar10, DatasetName::cifar100}) {
    try {
      const Data data = read_binary_files(folder(), dataset);
      const std::int64_t images = data.test.size();
      require(images > 0 && data.test.pixels.sizes() == torch::IntArrayRef({images, 3, 32, 32}), "images are missing");
      require(data.train.size() == images * (dataset == DatasetName::cifar10 ? 5 : 1), "training images are missing");
      require(data.train.labels.min().item<std::int64_t>() >= 0 &&
                  data.train.labels.max().item<std::int64_t>() < data.classes,
              "a label out of range");
    } catch (const DataError&) {
    }
  }
}

void read_checkpoint(std::string_view bytes) {
  const Checkpoints checkpoints(folder());
  checkpoints.remove();
  if (bytes.empty()) {
    return;
  }
  const int what = bytes.front();
  bytes.remove_prefix(1);
  if ((what & 1) != 0) {
    checkpoints.save(what, bytes);
  }
  const std::filesystem::path damaged[] = {checkpoints.last(), checkpoints.previous(), checkpoints.next()};
  for (int i = 0; i < 3; ++i) {
    if ((what & (2 << i)) != 0) {
      write(damaged[i], bytes);
    }
  }
  std::vector<std::string> notes;
  try {
    const auto loaded = checkpoints.load(notes);
    require(loaded.has_value() || (what & 15) == 0, "a checkpoint was overlooked");
    if ((what & 15) == 1) {
      require(loaded->step == what && loaded->bytes == bytes && notes.empty(), "a whole checkpoint changed");
    }
  } catch (const CheckpointError&) {
    require((what & 15) != 1, "a whole checkpoint was refused");
  }
}

void read_run_state(std::string_view bytes) {
  const auto model = std::make_shared<Tiny>();
  RunState state;
  state.model = model;
  state.optimizer = std::make_shared<torch::optim::SGD>(model->parameters(), 0.5);
  const bool spoiled = !bytes.empty() && bytes.front() == 's';
  const std::string text = spoiled ? spoiled_archive(bytes.substr(1)) : std::string(bytes);
  const bool whole = spoiled && bytes.find_first_not_of('\0', 1) == std::string_view::npos;
  try {
    (void)config_in(text);
  } catch (const CheckpointError&) {
  }
  try {
    restore(state, text);
    require(state.step >= 0 && state.metrics_bytes >= 0, "a negative count");
    require(state.best.empty() || state.best.size() == 2, "another network's best weights");
    require(!whole || (state.step == 3 && model->weight.eq(2).all().item<bool>()), "a whole one was read wrong");
  } catch (const CheckpointError&) {
    require(!whole, "a whole one was refused");
    require(model->weight.equal(torch::ones({2, 3})) && state.step == 0, "it has changed something");
  }
}

void read_norms(std::string_view bytes) {
  write(folder() / "metrics.jsonl", bytes);
  try {
    const RecordedNorms norms(folder());
    for (const std::int64_t step : {std::int64_t(0), norms.steps(), norms.steps() / 2}) {
      require(norms.steps() >= 0 && std::isfinite(norms.at(step)) && norms.at(step) >= 0, "not a norm");
    }
  } catch (const DataError&) {
  }
}

void read_configuration(std::string_view bytes) {
  static const Options options;
  static const std::string now = Records::config(options, "cpu", 1);
  try {
    check_same_run(std::string(bytes), now, options);
  } catch (const UsageError&) {
  }
}

void read_command_line(std::string_view bytes) {
  std::vector<std::string> arguments{"microreg_cifar"};
  for (std::size_t begin = 0; begin < bytes.size();) {
    const std::size_t end = std::min(bytes.find('\n', begin), bytes.size());
    arguments.emplace_back(bytes.substr(begin, end - begin));
    begin = end + 1;
  }
  std::vector<const char*> pointers;
  for (const std::string& argument : arguments) {
    if (argument == "--help" || argument == "-h" || argument == "--version") {
      return;  // prints
    }
    pointers.push_back(argument.c_str());
  }
  try {
    (void)parse_command_line(static_cast<int>(pointers.size()), pointers.data());
  } catch (const UsageError&) {
  }
}

}  // namespace cifar::fuzz
