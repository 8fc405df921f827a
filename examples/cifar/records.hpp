/// @file
/// The records of a run: config.json, metrics.jsonl, summary.json.
#pragma once

#include "options.hpp"

#include <cstdint>
#include <filesystem>
#include <fstream>
#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace cifar {

/// One line of metrics.jsonl.
struct Metrics {
  std::int64_t step = 0;                 ///< updates done
  double train_loss = 0;                 ///< mean over the steps since the last record
  double accuracy = 0;                   ///< share of the validation images, 0 to 1
  double micro_batch_gradient_norm = 0;  ///< mean over micro-batches of the squared norm
  double gradient_norm = 0;              ///< mean norm of the objective's gradient over the steps since the last record
  double penalty = 0;                    ///< strength times penalty, mean over the steps since the last record
  double seconds = 0;                    ///< of training, measuring included
  std::vector<std::pair<std::string, double>> monitors = {};  ///< what else was measured, by name
};

/// summary.json.
struct Summary {
  std::string status = "completed";          ///< or "interrupted", "diverged"
  std::string message = {};                  ///< why it did not complete
  std::int64_t steps = 0;                    ///< updates done
  double best_accuracy = 0;                  ///< on the validation images
  std::int64_t best_step = 0;                ///< where
  double final_accuracy = 0;                 ///< on the validation images
  std::optional<double> test_accuracy = {};  ///< of the best checkpoint, on the test images
  double seconds = 0;                        ///< of training, measuring included
  double seconds_per_step = 0;               ///< of the steps alone
  std::string weights_checksum = {};         ///< of all parameters and buffers, bitwise
  int signal = 0;                            ///< that interrupted it, on whatever rank; in no file
};

/// Writes the records of one run into a folder; into none if its name is empty. Every line is on disk when append()
/// returns, files that are rewritten are replaced at once. Accuracies go by the name of the images that they are of,
/// validation_accuracy or test_accuracy. Throws std::runtime_error if something cannot be written.
class Records {
 public:
  /// Makes the folder and proves that it can be written to, so that this is known before training. Refuses a folder
  /// that holds another run's metrics, unless `overwrite` or `resume`.
  explicit Records(const Options& options);

  /// The options that decide a run and the rest of config.json, as JSON.
  [[nodiscard]] static std::string config(const Options& options, const std::string& device, int threads,
                                          std::int64_t ranks = 1);
  /// Writes config.json; a summary that is there is out of date now.
  void begin(const std::string& config) const;

  void append(const Metrics& metrics);
  void write_summary(const Summary& summary) const;

  /// Bytes of metrics.jsonl so far, all of them brought to disk.
  [[nodiscard]] std::int64_t sync();
  /// Drops what was recorded behind the first `bytes` of metrics.jsonl: the lines after a checkpoint.
  void rewind(std::int64_t bytes);

 private:
  void replace(const std::string& name, const std::string& text) const;

  std::filesystem::path folder_;
  std::string accuracy_name_;
  std::ofstream metrics_;
};

/// Throws UsageError if the run in a folder, whose config.json reads `saved`, cannot go on with the options in `now`:
/// the message names the first option that differs, and both values. More steps are fine while the learning rate is
/// constant.
void check_same_run(const std::string& saved, const std::string& now, const Options& options);

}  // namespace cifar
