#include "serve.hpp"

#include "penalised_step.hpp"
#include "rounds.hpp"

#include <fmt/format.h>

#include <cstdio>
#include <istream>
#include <stdexcept>

namespace overhead {

namespace {

double gradient_norm(const Workload& workload) {
  double squared = 0;
  for (const auto& parameter : workload.model->parameters()) {
    if (parameter.grad().defined()) {
      const auto norm = parameter.grad().norm().item<double>();
      squared += norm * norm;
    }
  }
  return std::sqrt(squared);
}

void answer(const std::string& line) {
  fmt::print("{}\n", line);
  std::fflush(stdout);
}

}  // namespace

void serve(const Case& which, const std::string& state, std::istream& orders) {
  const Workload workload = make_workload(which);
  const PenalisedStep penalised = make_penalised_step(workload, which);
  if (!state.empty()) {
    write_state(workload, state);
  }
  answer("ready");
  for (std::string order; std::getline(orders, order);) {
    torch::Tensor loss;
    const double ms = time_ms([&] {
      if (order == "plain") {
        loss = plain_step(workload);
      } else if (order == "penalised") {
        loss = penalised().loss;
      } else {
        throw std::invalid_argument("an order is plain or penalised, not '" + order + "'");
      }
      synchronise(workload);
    });
    answer(fmt::format("{} {} {}", ms, loss.item<double>(), gradient_norm(workload)));
  }
}

}  // namespace overhead
