#include "run_state.hpp"

#include <sstream>

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

void read(InputArchive& archive, const std::string& key, RunningMean& mean) {
  mean.count = value_in<std::int64_t>(archive, key + ".count");
  torch::Tensor sum;
  archive.read(key + ".sum", sum);
  mean.sum = mean.count > 0 ? sum : torch::Tensor();
}

std::vector<torch::Tensor> detached(std::vector<torch::Tensor> tensors) {
  for (torch::Tensor& tensor : tensors) {
    tensor = tensor.detach();
  }
  return tensors;
}

InputArchive archive_in(const std::string& bytes) {
  InputArchive archive;
  archive.load_from(bytes.data(), bytes.size());
  return archive;
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
  TORCH_CHECK(to.size() == from.size(), "the checkpoint has ", from.size(), " tensors, the network ", to.size());
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
  InputArchive archive = archive_in(bytes);
  return value_in<std::string>(archive, "config");
}

void restore(RunState& state, const std::string& bytes) {
  InputArchive archive = archive_in(bytes);
  copy_tensors(tensors_of(*state.model), value_in<c10::List<torch::Tensor>>(archive, "model").vec());
  InputArchive optimizer;
  archive.read("optimizer", optimizer);
  state.optimizer->load(optimizer);
  state.step = value_in<std::int64_t>(archive, "step");
  state.best = value_in<c10::List<torch::Tensor>>(archive, "best").vec();
  state.summary.best_accuracy = value_in<double>(archive, "best_accuracy");
  state.summary.best_step = value_in<std::int64_t>(archive, "best_step");
  state.summary.final_accuracy = value_in<double>(archive, "final_accuracy");
  state.summary.seconds = value_in<double>(archive, "seconds");
  state.step_seconds = value_in<double>(archive, "step_seconds");
  read(archive, "loss", state.loss);
  read(archive, "gradient_norm", state.gradient_norm);
  read(archive, "penalty", state.penalty);
  state.metrics_bytes = value_in<std::int64_t>(archive, "metrics_bytes");
}

}  // namespace cifar
