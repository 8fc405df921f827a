#include "plan.hpp"

#include <array>
#include <utility>

namespace differential {

namespace {

enum class Layout { contiguous, channels_last, strided, permuted, sliced };

constexpr std::array layout_names{"contiguous", "channels-last", "every other element", "permuted", "a slice"};
constexpr std::array loss_names{"cross entropy",
                                "cross entropy with label smoothing",
                                "cross entropy with class weights",
                                "counted cross entropy",
                                "mse",
                                "smooth l1",
                                "l1",
                                "binary cross entropy",
                                "log_softmax and nll"};
constexpr std::array penalty_names{"GradientNorm",  "Unsquared GradientNorm", "AverageJacobian",
                                   "UnitJacobian",  "JacobianNorm",           "FisherTrace",
                                   "InputJacobian", "SquaredGradientNorm"};

Tensor with_layout(const Tensor& tensor, Layout layout) {
  switch (layout) {
    case Layout::channels_last:
      return tensor.dim() == 4   ? tensor.contiguous(at::MemoryFormat::ChannelsLast)
             : tensor.dim() == 5 ? tensor.contiguous(at::MemoryFormat::ChannelsLast3d)
                                 : tensor;
    case Layout::strided:
      return torch::stack({tensor, tensor}, -1).select(-1, 0);
    case Layout::permuted:
      return tensor.transpose(0, -1).contiguous().transpose(0, -1);
    case Layout::sliced:
      return torch::cat({tensor, tensor}, -1).narrow(-1, 0, tensor.size(-1));
    case Layout::contiguous:
      break;
  }
  return tensor;
}

Tensor cross_entropy(const Tensor& output, const Tensor& y, at::Reduction::Reduction reduction) {
  return torch::cross_entropy_loss(output, y, {}, reduction);
}

void choose_batch(Random& random, Plan& plan) {
  const std::int64_t samples = random.between(2, 12);
  auto sizes = plan.network.input.sizes().vec();
  sizes[0] = samples;
  const bool tokens = !plan.network.input.is_floating_point();
  const auto layout = random.of({Layout::contiguous, Layout::contiguous, Layout::channels_last, Layout::channels_last,
                                 Layout::strided, Layout::permuted, Layout::sliced});
  plan.input =
      tokens ? torch::randint(11, sizes) : with_layout(torch::randn(sizes, torch::kFloat64).to(plan.type), layout);
  plan.options.micro_batch_size = random.between(1, 8);
  plan.options.short_last = random.of({microreg::ShortLast::kept, microreg::ShortLast::kept,
                                       microreg::ShortLast::merged, microreg::ShortLast::dropped});
  plan.description = c10::str(plan.network.description, "\n  ", samples, " samples ", torch::toString(plan.type), ", ",
                              layout_names[static_cast<std::size_t>(layout)], ", micro-batches of ",
                              plan.options.micro_batch_size, ", short last ", int(plan.options.short_last));
}

void choose_loss(Random& random, Plan& plan) {
  plan.loss = random.of({LossName::cross_entropy, LossName::cross_entropy, LossName::cross_entropy, LossName::smoothed,
                         LossName::weighted_classes, LossName::counted, LossName::mse, LossName::smooth_l1,
                         LossName::l1, LossName::bce, LossName::nll});
  plan.options.reduction = random.of({microreg::Reduction::mean, microreg::Reduction::mean, microreg::Reduction::mean,
                                      microreg::Reduction::sum, microreg::Reduction::total});
  const bool dense = plan.network.kind == Kind::map;
  if (plan.loss == LossName::counted || plan.loss == LossName::weighted_classes || dense) {
    plan.options.reduction = microreg::Reduction::mean;
  }
  const torch::NoGradGuard no_grad;
  State state = plan.network.state;
  for (Tensor& buffer : state.buffers) {
    buffer = buffer.clone();
  }
  auto sizes = plan.network(plan.network.input, state).sizes().vec();
  sizes[0] = plan.input.size(0);
  const Tensor values = torch::randn(sizes, torch::kFloat64).to(plan.type);
  sizes.erase(sizes.begin() + 1);
  const Tensor labels = torch::randint(plan.network.classes, sizes);
  switch (plan.loss) {
    case LossName::mse:
    case LossName::smooth_l1:
    case LossName::l1:
      plan.target = values;
      break;
    case LossName::bce:
      plan.target = values.sigmoid();
      break;
    case LossName::counted:
      plan.target = torch::where(torch::rand(sizes) < 0.3, torch::full_like(labels, -100), labels);
      break;
    default:
      plan.target = labels;
  }
  plan.description +=
      c10::str(", ", loss_names[static_cast<std::size_t>(plan.loss)], ", reduction ", int(plan.options.reduction));
}

void choose_penalties(Random& random, Plan& plan) {
  const std::int64_t count = random.once_in(4) ? 2 : 1;
  for (std::int64_t i = 0; i < count; ++i) {
    PenaltyTerm term{random.once_in(2) ? PenaltyName::gradient_norm
                                       : static_cast<PenaltyName>(random.below(std::size(penalty_names))),
                     count == 1 ? 1.0 : random.of({0.1, 1.0, 3.0})};
    constexpr std::int64_t most_probes = 12;  // one for each output
    if ((term.name == PenaltyName::input_jacobian && !plan.input.is_floating_point()) ||
        (term.name == PenaltyName::jacobian_norm && plan.network.outputs > most_probes)) {
      term.name = PenaltyName::average_jacobian;
    }
    plan.penalties.push_back(term);
    plan.description +=
        c10::str(i == 0 ? ", " : " + ", term.factor, " ", penalty_names[static_cast<std::size_t>(term.name)]);
  }
  plan.ratio = random.of({0.3, 1.0, 3.0});
}

void choose_parameters(Random& random, Plan& plan) {
  const std::size_t count = plan.network.state.parameters.size();
  plan.select = random.once_in(6);
  const bool freeze = random.once_in(6), also = random.once_in(6);
  for (std::size_t i = 0; i < count; ++i) {
    plan.frozen.push_back(freeze && i + 1 < count && random.once_in(3));
    plan.selected.push_back(!plan.select || plan.network.state.parameters[i].dim() > 1);
    plan.outside.push_back(also && !plan.frozen.back() && i + 1 < count && random.once_in(3));
  }
  plan.channels_last_weights = random.once_in(4);
  plan.description +=
      c10::str(plan.select ? ", matrices selected" : "", freeze ? ", some frozen" : "", also ? ", some also_train" : "",
               plan.channels_last_weights ? ", weights channels-last" : "");
}

}  // namespace

microreg::CountedLoss Plan::evaluate_loss(const Tensor& output, const Tensor& y) const {
  const bool mean = options.reduction == microreg::Reduction::mean;
  const auto samples = static_cast<double>(output.size(0));
  // A sum over samples of what the mean would average over everything.
  const auto summed = [&](const Tensor& value) { return mean ? value : value * samples; };
  switch (loss) {
    case LossName::cross_entropy:
      return {cross_entropy(output, y, mean ? at::Reduction::Mean : at::Reduction::Sum), {}};
    case LossName::smoothed:
      return {summed(torch::cross_entropy_loss(output, y, {}, at::Reduction::Mean, -100, 0.1)), {}};
    case LossName::weighted_classes:
      return {torch::cross_entropy_loss(output, y, torch::linspace(0.5, 2, network.classes, output.options())), {}};
    case LossName::counted:
      return {cross_entropy(output, y, at::Reduction::Sum), (y != -100).sum()};
    case LossName::mse:
      return {summed(torch::mse_loss(output, y.to(output))), {}};
    case LossName::smooth_l1:
      return {summed(torch::smooth_l1_loss(output, y.to(output))), {}};
    case LossName::l1:
      return {summed(torch::l1_loss(output, y.to(output))), {}};
    case LossName::bce:
      return {summed(torch::binary_cross_entropy_with_logits(output, y.to(output))), {}};
    case LossName::nll:
      return {summed(torch::nll_loss_nd(torch::log_softmax(output, 1), y)), {}};
  }
  return {};
}

Plan make_plan(std::uint64_t seed) {
  Random random(seed);
  torch::manual_seed(seed);
  Plan plan;
  plan.network = random_network(random);
  plan.type = random.of({torch::kFloat64, torch::kFloat64, torch::kFloat64, torch::kFloat32, torch::kFloat32});
  choose_batch(random, plan);
  choose_loss(random, plan);
  choose_penalties(random, plan);
  choose_parameters(random, plan);
  plan.options.weighting =
      plan.options.reduction != microreg::Reduction::total && plan.loss != LossName::counted && random.once_in(4)
          ? microreg::Weighting::reference
          : microreg::Weighting::samples;
  plan.options.gradient_ratio = random.once_in(6);
  plan.options.keep_outputs = random.once_in(6);
  plan.options.loss_scale = random.once_in(6) ? 1024 : 1;
  plan.description += c10::str(
      ", weighting ", int(plan.options.weighting), plan.options.gradient_ratio ? ", gradient ratio" : "",
      plan.options.keep_outputs ? ", keep outputs" : "", plan.options.loss_scale.number != 1 ? ", loss scale" : "");
  return plan;
}

}  // namespace differential
