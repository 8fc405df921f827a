#include "by_hand.hpp"

#include <cmath>
#include <utility>

namespace differential {

namespace {

struct Part {
  std::int64_t begin, size;
  double weight;
};

std::vector<Part> cut(const Plan& plan) {
  const std::int64_t samples = plan.input.size(0), most = std::min(plan.options.micro_batch_size, samples);
  std::vector<Part> parts;
  std::int64_t all = 0;
  for (std::int64_t begin = 0; begin < samples; begin += most) {
    const std::int64_t size = std::min(most, samples - begin);
    if (size < most && plan.options.short_last == microreg::ShortLast::dropped) {
      break;
    }
    if (size < most && plan.options.short_last == microreg::ShortLast::merged) {
      parts.back().size += size;
    } else {
      parts.push_back({begin, size, 0});
    }
    all += size;
  }
  double counts = 0;
  const auto count_of = [&](const Part& part) {
    return (plan.target.narrow(0, part.begin, part.size) != -100).sum().item<double>();
  };
  for (const Part& part : parts) {
    counts += plan.loss == LossName::counted ? count_of(part) : 0;
  }
  for (Part& part : parts) {
    part.weight = plan.options.weighting == microreg::Weighting::reference ? 1 / static_cast<double>(parts.size())
                  : plan.loss == LossName::counted                         ? count_of(part) / counts
                                                   : static_cast<double>(part.size) / static_cast<double>(all);
  }
  return parts;
}

/// The scalars whose squared gradient norms are the penalty.
Tensors probes_of(PenaltyName name, const Plan& plan, const Tensor& loss, const Tensor& output) {
  const Tensor mean = output.flatten(1).mean(0);
  const auto like = [&](const Tensor& t) { return torch::empty_like(t.detach(), t.options().dtype(plan.type)); };
  switch (name) {
    case PenaltyName::gradient_norm:
    case PenaltyName::unsquared:
      return {loss};
    case PenaltyName::average_jacobian:
      return {mean.sum()};
    case PenaltyName::unit_jacobian: {
      const Tensor normal = like(mean).normal_();
      return {(mean * (normal / normal.norm()).to(mean)).sum()};
    }
    case PenaltyName::jacobian_norm:
      return mean.unbind();
    case PenaltyName::fisher_trace: {
      const Tensor labels = (output.detach() - like(output).exponential_().log_().to(output)).argmax(1);
      return {torch::cross_entropy_loss(output, labels)};
    }
    case PenaltyName::input_jacobian: {
      const Tensor values = output.flatten(1);
      const Tensor normal = like(values).normal_();
      const Tensor direction = (normal / normal.norm(2, 1, true)).to(values);
      return {(values * direction).sum() *
              std::sqrt(static_cast<double>(values.size(1)) / static_cast<double>(values.size(0)))};
    }
    case PenaltyName::custom:
      return {custom_probe(output)};
  }
  return {};
}

Tensor sum_of_squares(const Tensors& gradients) {
  Tensor sum;
  for (const Tensor& g : gradients) {
    if (g.defined()) {
      sum = sum.defined() ? sum + g.square().sum() : g.square().sum();
    }
  }
  return sum;
}

}  // namespace

State state_in(const Plan& plan, torch::Dtype type) {
  State state;
  for (std::size_t i = 0; i < plan.network.state.parameters.size(); ++i) {
    // Rounded to the plan's type first, so that all start from the same values.
    Tensor value = plan.network.state.parameters[i].to(plan.type).to(type).clone();
    if (plan.channels_last_weights && value.dim() == 4) {
      value = value.contiguous(at::MemoryFormat::ChannelsLast);
    }
    state.parameters.push_back(value.requires_grad_(!plan.frozen[i]));
  }
  for (const Tensor& buffer : plan.network.state.buffers) {
    state.buffers.push_back(buffer.to(type).clone());
  }
  return state;
}

Tensor flat(const Plan& plan, const State& state, const std::function<Tensor(std::size_t)>& gradient) {
  Tensors parts;
  for (std::size_t i = 0; i < state.parameters.size(); ++i) {
    if (!plan.frozen[i]) {
      const Tensor g = gradient(i);
      parts.push_back(
          (g.defined() ? g.detach() : torch::zeros_like(state.parameters[i].detach())).to(torch::kFloat64).flatten());
    }
  }
  return torch::cat(parts);
}

Outcome by_hand(const Plan& plan, torch::Dtype type) {
  State state = state_in(plan, type);
  state.by_libtorch = state.by_hand = true;
  Tensors trained, selected;
  std::vector<std::size_t> places(state.parameters.size());
  for (std::size_t i = 0; i < state.parameters.size(); ++i) {
    if (!plan.frozen[i]) {
      places[i] = trained.size();
      trained.push_back(state.parameters[i]);
      if (plan.selected[i]) {
        selected.push_back(state.parameters[i]);
      }
    }
  }
  torch::manual_seed(11);
  Outcome outcome;
  outcome.penalties.assign(plan.penalties.size(), 0);
  const auto add = [&](Tensor& sum, const Tensors& gradients) {
    const Tensor all = flat(plan, state, [&](std::size_t i) { return gradients[places[i]]; });
    sum = sum.defined() ? sum + all : all;
  };
  for (const Part& part : cut(plan)) {
    Tensor x = plan.input.narrow(0, part.begin, part.size);
    const Tensor y = plan.target.narrow(0, part.begin, part.size);
    x = x.is_floating_point() ? x.to(type) : x;
    bool by_input = false;
    for (const PenaltyTerm& term : plan.penalties) {
      by_input = by_input || term.name == PenaltyName::input_jacobian;
    }
    if (by_input) {
      x = x.detach().requires_grad_(true);
    }
    const Tensor output = plan.network(x, state);
    const microreg::CountedLoss value = plan.evaluate_loss(output, y);
    Tensor loss = value.sum;
    if (value.count.defined()) {
      loss = value.count.item<double>() > 0 ? loss / value.count : loss;
    } else if (plan.options.reduction != microreg::Reduction::mean) {
      loss = loss / static_cast<double>(part.size);
    }
    Tensor penalty;
    for (std::size_t k = 0; k < plan.penalties.size(); ++k) {
      const PenaltyTerm& term = plan.penalties[k];
      Tensor squares;
      for (const Tensor& probe : probes_of(term.name, plan, loss, output)) {
        const Tensors by = term.name == PenaltyName::input_jacobian ? Tensors{x} : selected;
        const Tensor square = sum_of_squares(torch::autograd::grad({probe}, by, {}, true, true, true));
        if (square.defined()) {
          squares = squares.defined() ? squares + square : square;
        }
      }
      if (!squares.defined()) {
        continue;
      }
      const Tensor r = term.name == PenaltyName::unsquared ? squares.sqrt() : squares;
      outcome.penalties[k] += part.weight * r.item<double>();
      const Tensor weighted = r * (term.factor * part.weight);
      penalty = penalty.defined() ? penalty + weighted : weighted;
    }
    add(outcome.penalty_gradient, penalty.defined() && penalty.requires_grad()
                                      ? torch::autograd::grad({penalty}, trained, {}, true, false, true)
                                      : Tensors(trained.size()));
    const double weight =
        plan.options.reduction == microreg::Reduction::total ? static_cast<double>(part.size) : part.weight;
    add(outcome.loss_gradient, torch::autograd::grad({loss * weight}, trained, {}, false, false, true));
    outcome.loss += weight * loss.item<double>();
  }
  for (const Tensor& buffer : state.buffers) {
    outcome.buffers.push_back(buffer.to(torch::kFloat64));
  }
  outcome.generator = at::globalContext().defaultGenerator(torch::kCPU).get_state();
  return outcome;
}

}  // namespace differential
