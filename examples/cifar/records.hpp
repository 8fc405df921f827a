/// @file
/// The records of a run: config.json, metrics.jsonl, summary.json.
#pragma once

#include "options.hpp"

#include <cstdint>
#include <filesystem>
#include <fstream>
#include <string>

namespace cifar {

/// One line of metrics.jsonl.
struct Metrics {
  std::int64_t step = 0;                 ///< updates done
  double train_loss = 0;                 ///< mean over the steps since the last record
  double test_accuracy = 0;              ///< share of the test images, 0 to 1
  double micro_batch_gradient_norm = 0;  ///< mean over micro-batches of the squared norm, on a fixed set of images
  double penalty = 0;                    ///< strength times penalty, mean over the steps since the last record
  double seconds = 0;                    ///< since training began, measuring included
};

/// summary.json.
struct Summary {
  std::string status = "completed";  ///< or "diverged"
  std::string message = {};          ///< why it diverged
  std::int64_t steps = 0;            ///< updates done
  double best_test_accuracy = 0;
  std::int64_t best_step = 0;
  double final_test_accuracy = 0;
  double seconds = 0;           ///< of training, measuring included
  double seconds_per_step = 0;  ///< of the steps alone
};

/// Writes the records of one run into a folder; into none if its name is empty. Every line is on disk when append()
/// returns, files that are rewritten are replaced at once. Throws std::runtime_error if something cannot be written.
class Records {
 public:
  /// Makes the folder and proves that it can be written to, so that this is known before training. Refuses a folder
  /// that holds another run's metrics, unless `overwrite`.
  Records(std::filesystem::path folder, bool overwrite);

  void write_config(const Options& options, const std::string& device, int threads);
  void append(const Metrics& metrics);
  void write_summary(const Summary& summary);

 private:
  void replace(const std::string& name, const std::string& text) const;

  std::filesystem::path folder_;
  std::ofstream metrics_;
};

}  // namespace cifar
