#include "plan.hpp"

#include "networks.hpp"

#include <algorithm>

namespace overhead {

namespace {

template <class T, class U>
bool allows(const std::vector<T>& filter, const U& value) {
  return filter.empty() || std::find(filter.begin(), filter.end(), value) != filter.end();
}

Group make_group(const Options& options, const Case& common) {
  Group group;
  for (const Estimator& estimator : estimators) {
    const bool left_out =
        estimator.name.ends_with("-graph") || (options.quick && estimator.name.starts_with("central"));
    if (options.estimators.empty() ? left_out : !allows(options.estimators, estimator.name)) {
      continue;
    }
    for (const bool fused : {true, false}) {
      const bool wanted = options.fused == "both" || (options.fused == "on") == fused;
      if (estimator.fused_differs ? wanted : !fused) {
        Case which = common;
        which.estimator = estimator.name;
        which.fused = fused;
        group.push_back(which);
      }
    }
  }
  return group;
}

}  // namespace

std::vector<Group> make_plan(const Options& options) {
  std::vector<std::int64_t> micro_batches = options.micro_batches;
  if (micro_batches.empty()) {
    micro_batches = options.quick ? std::vector<std::int64_t>{32} : std::vector<std::int64_t>{32, 128};
  }
  std::vector<Group> plan;
  for (const Network& net : networks()) {
    if (!allows(options.models, net.name) || (options.quick && options.models.empty() && net.name != "resnet18_w16")) {
      continue;
    }
    for (const std::int64_t micro_batch : micro_batches) {
      for (const std::string_view layout : layout_names) {
        const bool distinct = net.convolutional || layout == layout_names.front();
        if (!allows(options.layouts, layout) || (!distinct && options.layouts.empty())) {
          continue;
        }
        for (const std::string_view penalty : penalty_names) {
          const bool first = penalty == penalty_names.front();
          const bool chosen = first || (!options.quick && (micro_batch <= 32 || options.filtered()));
          if (!allows(options.penalties, penalty) || (options.penalties.empty() && !chosen)) {
            continue;
          }
          Group group = make_group(options, {.model = std::string(net.name),
                                             .layout = std::string(layout),
                                             .micro_batch = micro_batch,
                                             .penalty = std::string(penalty),
                                             .device = options.device,
                                             .autocast = options.autocast});
          if (!group.empty()) {
            plan.push_back(std::move(group));
          }
        }
      }
    }
  }
  return plan;
}

}  // namespace overhead
