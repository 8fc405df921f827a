/// @file
/// What one row of the benchmark measures, and the names that the command line and the records use.
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <string_view>

namespace overhead {

inline constexpr std::array<std::string_view, 2> layout_names{"nchw", "channels_last"};
inline constexpr std::array<std::string_view, 4> penalty_names{"gradient_norm", "fisher_trace", "average_jacobian",
                                                               "unit_jacobian"};

inline constexpr std::array<std::string_view, 3> autocast_names{"float32", "bfloat16", "float16"};

/// How the penalty is differentiated. make_penalised_step() gives each name its meaning. -graph: by CUDA graphs, only
/// where it is asked for; plain-graph is the step without a penalty.
struct Estimator {
  std::string_view name;
  bool fused_differs;  ///< whether it has a double backward at all, so that fused and stock are two rows
};
inline constexpr std::array estimators{
    Estimator{"exact", true},           Estimator{"forward-frozen", false}, Estimator{"forward-free", false},
    Estimator{"central-frozen", false}, Estimator{"central-free", false},   Estimator{"exact-graph", true},
    Estimator{"plain-graph", false},
};

/// One step: a network, its data, and a penalty on it.
struct Case {
  std::string model = "resnet18_w16";
  std::string layout = "nchw";
  std::int64_t micro_batch = 32;
  std::int64_t batch = 0;  ///< samples in the mini-batch; 0: one micro-batch
  std::string penalty = "gradient_norm";
  std::string estimator = "exact";
  bool fused = true;
  double micro_batch_share = 1;
  std::int64_t workers = 0;
  std::string device = "cpu";
  std::string autocast = "float32";  ///< the type of Autocast around plain and penalised steps; float32: none

  [[nodiscard]] std::int64_t batch_size() const { return batch > 0 ? batch : micro_batch; }
};

}  // namespace overhead
