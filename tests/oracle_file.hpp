/// @file
/// Reads the text file that oracle/generate.py writes.
#pragma once

#include "on_device.hpp"

#include <torch/torch.h>

#include <fstream>
#include <map>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

namespace helpers {

class OracleFile {
 public:
  explicit OracleFile(const std::string& path) {
    std::ifstream file(path);
    std::string head;
    std::string body;
    while (std::getline(file, head) && std::getline(file, body)) {
      std::istringstream words(head);
      std::string name;
      words >> name;
      std::vector<std::int64_t> shape;
      for (std::int64_t size = 0; words >> size;) {
        shape.push_back(size);
      }
      std::istringstream numbers(body);
      std::vector<double> values;
      for (double value = 0; numbers >> value;) {
        values.push_back(value);
      }
      tensors_[name] = helpers::tensor(at::ArrayRef<double>(values), torch::kFloat64).view(shape);
    }
  }

  /// The tensor called `name`, float64; throws if there is none.
  [[nodiscard]] torch::Tensor at(const std::string& name) const {
    const auto found = tensors_.find(name);
    if (found == tensors_.end()) {
      throw std::runtime_error("the oracle file has no tensor " + name + "; write it anew with oracle/generate.py");
    }
    return found->second;
  }

 private:
  std::map<std::string, torch::Tensor> tensors_;
};

}  // namespace helpers
