#include "run_state.hpp"

#include <fmt/format.h>

#include <cmath>
#include <sstream>

#include "checkpoint.hpp"

namespace cifar {

namespace {

using torch::serialize::InputArchive;
using torch::serialize::OutputArchive;

void write(OutputArchive& archive, const std::string& key, const RunningMean& mean) {
  archive.write(key + ".count", c10::IValue(mean.count));
  archive.write(key + ".sum", mean.sum.defined() ? mean.sum : torch::zeros({}));
}

template <class T>
T value_in(InputArchive& archive, const std::string& key) {
  c10::IValue value;
  archive.read(key, value);
  return value.to<T>();
}

std::int64_t count_in(InputArchive& archive, const std::string& key) {
  const auto value = value_in<std::int64_t>(archive, key);
  if (value < 0) {
    throw CheckpointError(fmt::format("{} is {}; it must be at least 0", key, value));
  }
  return value;
}

double number_in(InputArchive& archive, const std::string& key) {
  const auto value = value_in<double>(archive, key);
  if (!std::isfinite(value)) {
    throw CheckpointError(fmt::format("{} is {}; it must be a finite number", key, value));
  }
  return value;
}

RunningMean mean_in(InputArchive& archive, const std::string& key) {
  RunningMean mean;
  mean.count = count_in(archive, key + ".count");
  torch::Tensor sum;
  archive.read(key + ".sum", sum);
  if (!sum.defined() || sum.numel() != 1 || !sum.is_floating_point()) {
    throw CheckpointError(key + ".sum is no scalar");
  }
  mean.sum = mean.count > 0 ? sum : torch::Tensor();
  return mean;
}

/// A list of tensors that are like `wanted`, one by one.
std::vector<torch::Tensor> tensors_in(InputArchive& archive, const std::string& key,
                                      const std::vector<torch::Tensor>& wanted) {
  std::vector<torch::Tensor> tensors = value_in<c10::List<torch::Tensor>>(archive, key).vec();
  if (tensors.size() != wanted.size()) {
    throw CheckpointError(fmt::format("{} has {} tensors, the network {}", key, tensors.size(), wanted.size()));
  }
  for (std::size_t i = 0; i < tensors.size(); ++i) {
    if (!tensors[i].defined() || tensors[i].sizes() != wanted[i].sizes() ||
        tensors[i].scalar_type() != wanted[i].scalar_type() || tensors[i].layout() != wanted[i].layout()) {
      throw CheckpointError(fmt::format("tensor {} of {} is not like that of the network", i, key));
    }
  }
  return tensors;
}

std::vector<torch::Tensor> detached(std::vector<torch::Tensor> tensors) {
  for (torch::Tensor& tensor : tensors) {
    tensor = tensor.detach();
  }
  return tensors;
}

/// What `read` makes of the archive in `bytes`. Throws CheckpointError for whatever LibTorch's reader throws.
template <class Read>
auto from_archive(const std::string& bytes, const Read& read) {
  const auto refuse = [](const std::string& why) -> CheckpointError {
    return CheckpointError(fmt::format(
        "the checkpoint's contents are not those of this run ({}); start anew with --overwrite instead of --resume",
        why.substr(0, why.find('\n'))));
  };
  try {
    InputArchive archive;
    archive.load_from(bytes.data(), bytes.size());
    return read(archive);
  } catch (const c10::Error& error) {
    throw refuse(error.what_without_backtrace());
  } catch (const std::exception& error) {
    throw refuse(error.what());
  }
}

}  // namespace

void RunningMean::add(const torch::Tensor& value) {
  sum = sum.defined() ? sum + value : value;
  ++count;
}

void RunningMean::gather(microreg::Communicator& ranks) {
  if (count > 0) {
    torch::Tensor all = sum.detach().to(torch::kCPU, torch::kFloat64).reshape({1});
    ranks.all_reduce(all)();
    sum = (ranks.rank() == 0 ? all : torch::zeros_like(all)).reshape({}).to(sum.options());
  }
}

double RunningMean::take() {
  const double mean = sum.item<double>() / static_cast<double>(count);
  *this = {};
  return mean;
}

std::vector<torch::Tensor> tensors_of(const torch::nn::Module& module) {
  std::vector<torch::Tensor> tensors = module.parameters();
  const std::vector<torch::Tensor> buffers = module.buffers();
  tensors.insert(tensors.end(), buffers.begin(), buffers.end());
  return tensors;
}

std::vector<torch::Tensor> copies_of(const torch::nn::Module& module) {
  std::vector<torch::Tensor> copies = detached(tensors_of(module));
  for (torch::Tensor& tensor : copies) {
    tensor = tensor.clone();
  }
  return copies;
}

void copy_tensors(const std::vector<torch::Tensor>& to, const std::vector<torch::Tensor>& from) {
  const torch::NoGradGuard no_grad;
  TORCH_INTERNAL_ASSERT(to.size() == from.size());
  for (std::size_t i = 0; i < to.size(); ++i) {
    to[i].copy_(from[i]);
  }
}

std::string serialized(const RunState& state, const std::string& config) {
  OutputArchive archive;
  archive.write("config", c10::IValue(config));
  archive.write("step", c10::IValue(state.step));
  archive.write("model", c10::IValue(c10::List<torch::Tensor>(detached(tensors_of(*state.model)))));
  OutputArchive optimizer(archive.compilation_unit());
  state.optimizer->save(optimizer);
  archive.write("optimizer", optimizer);
  archive.write("best", c10::IValue(c10::List<torch::Tensor>(state.best)));
  archive.write("best_accuracy", c10::IValue(state.summary.best_accuracy));
  archive.write("best_step", c10::IValue(state.summary.best_step));
  archive.write("final_accuracy", c10::IValue(state.summary.final_accuracy));
  archive.write("seconds", c10::IValue(state.summary.seconds));
  archive.write("step_seconds", c10::IValue(state.step_seconds));
  write(archive, "loss", state.loss);
  write(archive, "gradient_norm", state.gradient_norm);
  write(archive, "penalty", state.penalty);
  archive.write("metrics_bytes", c10::IValue(state.metrics_bytes));
  std::ostringstream stream;
  archive.save_to(stream);
  return stream.str();
}

std::string config_in(const std::string& bytes) {
  return from_archive(bytes, [](InputArchive& archive) { return value_in<std::string>(archive, "config"); });
}

void restore(RunState& state, const std::string& bytes) {
  const std::vector<torch::Tensor> wanted = tensors_of(*state.model);
  std::vector<torch::Tensor> tensors;
  InputArchive optimizer;
  // All of it is read before anything is set.
  RunState read = from_archive(bytes, [&](InputArchive& archive) {
    tensors = tensors_in(archive, "model", wanted);
    archive.read("optimizer", optimizer);
    torch::optim::SGD(state.model->parameters(), 1).load(optimizer);
    RunState result;
    result.model = state.model;
    result.optimizer = state.optimizer;
    result.step = count_in(archive, "step");
    result.best = value_in<c10::List<torch::Tensor>>(archive, "best").empty() ? std::vector<torch::Tensor>()
                                                                              : tensors_in(archive, "best", wanted);
    result.summary = state.summary;
    result.summary.best_accuracy = number_in(archive, "best_accuracy");
    result.summary.best_step = count_in(archive, "best_step");
    result.summary.final_accuracy = number_in(archive, "final_accuracy");
    result.summary.seconds = number_in(archive, "seconds");
    result.step_seconds = number_in(archive, "step_seconds");
    result.loss = mean_in(archive, "loss");
    result.gradient_norm = mean_in(archive, "gradient_norm");
    result.penalty = mean_in(archive, "penalty");
    result.metrics_bytes = count_in(archive, "metrics_bytes");
    return result;
  });
  copy_tensors(wanted, tensors);
  state.optimizer->load(optimizer);
  state = std::move(read);
}

}  // namespace cifar
