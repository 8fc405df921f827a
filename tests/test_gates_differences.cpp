// Every operation with a decision inside, in a small network: the central difference with frozen gates against plain
// double backward, out of place and in place, on whole tensors, views and memory layouts.
#include "gates_helpers.hpp"

#include <thread>

using namespace helpers;
using microreg::GateTape;
using microreg::Keep;
using microreg::RecordGates;
using microreg::ReplayGates;
using torch::where;

namespace {

torch::Tensor flat(const Tensors& tensors, const Tensors& like) {
  Tensors parts;
  for (std::size_t i = 0; i < like.size(); ++i) {
    parts.push_back(tensors[i].defined() ? tensors[i].flatten() : torch::zeros_like(like[i]).flatten());
  }
  return torch::cat(parts);
}

/// The relative error of a central difference of the gradient with frozen gates, along the gradient.
///
/// `reference` is the same where LibTorch has no second derivative of the operation.
using Loss = std::function<torch::Tensor(const Tensors&)>;
double frozen_error(const Loss& loss, const Tensors& parameters, const Loss& reference = {}) {
  constexpr double length = 2e-5;
  const Tensors at = leaves(parameters);
  const auto gradient = [](const torch::Tensor& value, const Tensors& inputs, bool create) {
    return torch::autograd::grad({value}, inputs, {}, create, create, true);
  };
  torch::manual_seed(3);
  const Tensors first = gradient(reference ? reference(at) : loss(at), at, true);
  Tensors direction;
  Tensors differentiable;
  Tensors seeds;
  const torch::Tensor norm = flat(first, at).norm().detach();
  for (std::size_t i = 0; i < at.size(); ++i) {
    direction.push_back((first[i].defined() ? first[i] : torch::zeros_like(at[i])).detach() / norm);
    if (first[i].defined() && first[i].requires_grad()) {
      differentiable.push_back(first[i]);
      seeds.push_back(direction.back());
    }
  }
  const torch::Tensor exact = flat(torch::autograd::grad(differentiable, at, seeds, false, false, true), at);
  GateTape tape;
  {
    const RecordGates record(tape);
    torch::manual_seed(3);
    loss(at);
  }
  const auto displaced = [&](double step) {
    Tensors there;
    for (std::size_t i = 0; i < at.size(); ++i) {
      there.push_back((at[i].detach() + step * direction[i]).requires_grad_());
    }
    const ReplayGates replay(tape, Keep::yes);
    torch::manual_seed(3);
    const torch::Tensor value = loss(there);
    replay.finish();
    return flat(gradient(value, there, false), there);
  };
  return relative_error((displaced(length) - displaced(-length)) / (2 * length), exact);
}

torch::Tensor normal(const std::vector<std::int64_t>& shape, std::uint64_t seed) {
  auto draw = generator(seed);
  return torch::randn(shape, draw, torch::kFloat64);
}

using Unary = std::function<torch::Tensor(torch::Tensor)>;

/// A two-layer network with an activation of rows of 12 numbers, whose units are spread over the kinks.
double activation_error(const Unary& activation, const Unary& reference = {}) {
  const torch::Tensor x = normal({96, 8}, 1);
  const torch::Tensor y = normal({96, 4}, 2);
  const auto network = [&](const Unary& used) -> Loss {
    return [&](const Tensors& p) {
      const torch::Tensor h = used(x.matmul(p[0]) * 1.5);
      return (torch::tanh(h.reshape({96, -1}).narrow(1, 0, 12)).matmul(p[1]) - y).square().mean();
    };
  };
  return frozen_error(network(activation), {normal({8, 12}, 3) * 0.4, normal({12, 4}, 4) * 0.4},
                      reference ? network(reference) : Loss());
}

struct Named {
  const char* name;
  Unary call;
  Unary reference{};  // where LibTorch has no second derivative
};

/// In place, on every kind of tensor that may be changed in place.
void check_in_place(const Named& operation) {
  // On a device LibTorch differentiates twice only a view that somebody holds; here nobody does.
  std::vector<torch::Tensor> held;
  const auto hold = [&](const torch::Tensor& view) {
    if (!test_device().is_cpu()) {
      held.push_back(view);
    }
  };
  const std::vector<Named> places = {
      {"a whole tensor", [&](torch::Tensor h) { return operation.call(torch::tanh(h) * 3); }},
      {"a narrow view",
       [&](torch::Tensor h) {
         h = torch::tanh(h) * 3;
         hold(operation.call(h.narrow(1, 2, 5)));
         return h;
       }},
      {"a row",
       [&](torch::Tensor h) {
         h = torch::tanh(h) * 3;
         hold(operation.call(h.select(0, 3)));
         return h;
       }},
      {"a column",
       [&](torch::Tensor h) {
         h = torch::tanh(h) * 3;
         hold(operation.call(h.select(1, 3)));
         return h;
       }},
      {"every second column",
       [&](torch::Tensor h) {
         h = torch::tanh(h) * 3;
         hold(operation.call(h.slice(1, 0, 12, 2)));
         return h;
       }},
      {"a transposed tensor", [&](torch::Tensor h) { return operation.call((torch::tanh(h) * 3).t()).t(); }},
      {"a view of a whole",
       [&](torch::Tensor h) { return operation.call((torch::tanh(h) * 3).view({-1})).view_as(h); }},
  };
  for (const Named& place : places) {
    INFO(operation.name << " in place on " << place.name);
    CHECK(activation_error(place.call) < 1e-6);
  }
}

}  // namespace

TEST_CASE("activations in place on views keep the gradient of the rest", "[gates]") {
  using Bound = std::optional<torch::Scalar>;
  using Maybe = std::optional<torch::Tensor>;
  const torch::Tensor half = helpers::tensor(0.5, torch::kFloat64);
  const std::vector<Named> operations = {
      {"relu_", [](torch::Tensor h) { return h.relu_(); }},
      {"leaky_relu_", [](torch::Tensor h) { return torch::leaky_relu_(h, 0.2); }},
      {"rrelu_, evaluating", [](torch::Tensor h) { return torch::rrelu_(h, 0.1, 0.4, false); }},
      {"rrelu_, training", [](torch::Tensor h) { return torch::rrelu_(h, 0.1, 0.4, true); }},
      {"threshold_", [](torch::Tensor h) { return torch::threshold_(h, 0.3, -1); }},
      {"hardtanh_", [](torch::Tensor h) { return torch::hardtanh_(h); }},
      {"relu6_", [](torch::Tensor h) { return torch::relu6_(h); }},
      {"hardswish_", [](torch::Tensor h) { return torch::hardswish_(h.mul_(2)); }},
      {"elu_", [](torch::Tensor h) { return torch::elu_(h, 0.5); }},
      {"selu_", [](torch::Tensor h) { return torch::selu_(h); }},
      {"celu_", [](torch::Tensor h) { return torch::celu_(h, 0.7); }},
      {"abs_", [](torch::Tensor h) { return h.abs_(); }},
      {"clamp_", [](torch::Tensor h) { return h.clamp_(-0.4, 0.9); }},
      {"clamp_ below", [](torch::Tensor h) { return h.clamp_(Bound(), Bound(0.9)); }},
      {"clamp_min_", [](torch::Tensor h) { return h.clamp_min_(0.1); }},
      {"clamp_max_", [](torch::Tensor h) { return h.clamp_max_(0.1); }},
      {"clamp_ by tensors", [&](torch::Tensor h) { return h.clamp_(Maybe(-half), Maybe(half)); }},
      {"clamp_min_ by a tensor", [&](torch::Tensor h) { return h.clamp_min_(half); }},
      {"clamp_max_ by a tensor", [&](torch::Tensor h) { return h.clamp_max_(half); }},
      {"frac_", [](torch::Tensor h) { return h.frac_(); }},
      {"fmod_", [](torch::Tensor h) { return h.fmod_(0.7); }},
      {"remainder_", [](torch::Tensor h) { return h.remainder_(0.7); }},
      {"copysign_", [](torch::Tensor h) { return h.copysign_(-1); }},
  };
  for (const Named& operation : operations) {
    check_in_place(operation);
  }
}

TEST_CASE("steps in place on views are held", "[gates]") {
  const std::vector<Named> steps = {
      {"floor_", [](torch::Tensor h) { return h.floor_(); }}, {"ceil_", [](torch::Tensor h) { return h.ceil_(); }},
      {"round_", [](torch::Tensor h) { return h.round_(); }}, {"trunc_", [](torch::Tensor h) { return h.trunc_(); }},
      {"sign_", [](torch::Tensor h) { return h.sign_(); }},   {"gt_", [](torch::Tensor h) { return h.gt_(0.2); }},
  };
  for (const Named& step : steps) {
    for (const std::int64_t size : {5, 12}) {
      INFO(step.name << ", " << size << " columns");
      CHECK(activation_error([&](torch::Tensor h) {
              torch::Tensor z = torch::tanh(h) * 3;
              step.call(z.narrow(1, 0, size));
              return z + h;
            }) < 1e-6);
    }
  }
}

TEST_CASE("what users compose of decisions is frozen", "[gates]") {
  const auto one = torch::ones({}, torch::kFloat64);
  const std::vector<Named> operations = {
      {"where(x > 0)", [](torch::Tensor h) { return where(h > 0, h, 0.01 * h); }},
      {"x * (x > 0)", [](torch::Tensor h) { return h * (h > 0); }},
      {"x * (x >= 0).to", [](torch::Tensor h) { return h * (h >= 0).to(h.dtype()); }},
      {"comparison with a tensor", [](torch::Tensor h) { return where(h < h.flip(1), h, 2 * h.flip(1)); }},
      {"masked_fill", [](torch::Tensor h) { return h.masked_fill(h < 0, 0); }},
      {"index_put of a mask", [&](torch::Tensor h) { return h.clone().index_put_({h < 0}, 0.3 * one); }},
      {"a mask changed in place",
       [](torch::Tensor h) {
         torch::Tensor mask = h > 0;
         mask &= h < 1;
         return where(mask, h, h * h);
       }},
      {"gather(argmax)", [](torch::Tensor h) { return h + h.gather(1, h.argmax(1, true)); }},
      {"argmin", [](torch::Tensor h) { return h + h.gather(1, h.argmin(1, true)); }},
      {"sign(x) * x", [](torch::Tensor h) { return torch::sign(h) * h; }},
      {"sgn", [](torch::Tensor h) { return torch::sgn(h) * h * h; }},
      {"where(abs(x) < 1)", [](torch::Tensor h) { return where(h.abs() < 1, h, h * h); }},
      {"floor", [](torch::Tensor h) { return h * torch::floor(h * 2); }},
      {"ceil", [](torch::Tensor h) { return h * torch::ceil(h * 2); }},
      {"round", [](torch::Tensor h) { return h * torch::round(h * 2); }},
      {"round to decimals", [](torch::Tensor h) { return h * torch::round(h, 1); }},
      {"trunc", [](torch::Tensor h) { return h * torch::trunc(h * 2); }},
      {"frac", [](torch::Tensor h) { return torch::frac(h * 2); }},
      {"division that rounds", [](torch::Tensor h) { return h * torch::div(h, 0.3, "floor"); }},
      {"floor_divide", [](torch::Tensor h) { return h * torch::floor_divide(h.detach(), 0.3); }},
      {"straight-through rounding", [](torch::Tensor h) { return h + (torch::round(h * 4) / 4 - h).detach(); }},
      {"detach", [](torch::Tensor h) { return h * torch::sigmoid(h).detach(); }},
      {"detach_", [](torch::Tensor h) { return h * (h * h).detach_(); }},
      {"detached, then decided", [](torch::Tensor h) { return where(h.detach() * 2 > 0.3, h, h * h); }},
      {"item", [](torch::Tensor h) { return h / h.abs().max().item<double>() * 3; }},
      {"decided without a graph",
       [](torch::Tensor h) {
         torch::Tensor mask;
         {
           const torch::NoGradGuard no_grad;
           mask = h > 0.1;
         }
         return where(mask, h, h * h);
       }},
      {"conversion to integers", [](torch::Tensor h) { return h * (h * 2).to(torch::kLong); }},
      {"conversion to bool", [](torch::Tensor h) { return h * torch::relu(h).to(torch::kBool); }},
      {"heaviside", [&](torch::Tensor h) { return h * torch::heaviside(h.detach(), one); }},
      {"bucketize", [](torch::Tensor h) { return h * torch::bucketize(h, helpers::tensor({-1.0, 0.0, 1.0})); }},
      {"searchsorted",
       [](torch::Tensor h) {
         return h * torch::searchsorted(helpers::tensor({-1.0, 0.0, 1.0}, h.options().requires_grad(false)), h);
       }},
      {"nonzero",
       [](torch::Tensor h) {
         const torch::Tensor rows = torch::nonzero(h.select(1, 0) > 0).squeeze(1);
         return h.index_add(0, rows, h.index_select(0, rows));
       }},
      {"isnan", [](torch::Tensor h) { return where(torch::isnan((h + 0.5).sqrt()), h, h * h); }},
      {"logical_not", [](torch::Tensor h) { return h * torch::logical_not(torch::relu(h)); }},
      {"any", [](torch::Tensor h) { return h * torch::relu(h - 2.5).any(1, true); }},
      {"a model's routing",
       [](torch::Tensor h) {
         const torch::Tensor expert = h.narrow(1, 0, 4).argmax(1, true);
         return torch::cat(
             {h.narrow(1, 0, 4) * torch::zeros_like(h.narrow(1, 0, 4)).scatter(1, expert, 1), h.narrow(1, 4, 8)}, 1);
       }},
      {"multinomial", [](torch::Tensor h) { return h + h.gather(1, torch::multinomial(h.softmax(1), 1)); }},
      {"bernoulli", [](torch::Tensor h) { return h * torch::bernoulli(h.sigmoid()); }},
      {"gumbel softmax",
       [](torch::Tensor h) {
         return h * torch::nn::functional::gumbel_softmax(
                        h, torch::nn::functional::GumbelSoftmaxFuncOptions().hard(true).dim(1));
       }},
  };
  for (const Named& operation : operations) {
    INFO(operation.name);
    CHECK(activation_error(operation.call, operation.reference) < 1e-6);
  }
}

TEST_CASE("operations that hide a decision are frozen", "[gates]") {
  const auto scalar = [](double value) { return torch::full({}, value, torch::kFloat64); };
  const torch::Tensor index = torch::arange(12).remainder(5);
  const auto reduced = [&](torch::Tensor h, const char* how, bool include_self) {
    return torch::cat({(h.narrow(1, 0, 6) * 1.1).scatter_reduce(1, index.expand({96, 12}), h, how, include_self), h},
                      1);
  };
  const auto reduced_index = [&](torch::Tensor h, const char* how, bool include_self) {
    return torch::cat({(h.narrow(1, 0, 6) * 1.1).index_reduce(1, index, h, how, include_self), h}, 1);
  };
  const std::vector<Named> operations = {
      {"celu", [](torch::Tensor h) { return torch::celu(h, 0.7); }},
#if MICROREG_LIBTORCH >= 213  // before, LibTorch does not differentiate it
      {"aminmax",
       [](torch::Tensor h) {
         const auto [low, high] = torch::aminmax(h, 1, true);
         return h * (high - low);
       }},
      {"aminmax of all",
       [](torch::Tensor h) { return h * (std::get<1>(torch::aminmax(h)) - std::get<0>(torch::aminmax(h))); }},
#endif
      {"median", [](torch::Tensor h) { return h * std::get<0>(h.median(1, true)); }},
      {"median, squeezed", [](torch::Tensor h) { return h * std::get<0>(h.median(1)).unsqueeze(1); }},
      {"median of all", [](torch::Tensor h) { return h * h.median(); }},
      {"nanmedian", [](torch::Tensor h) { return h * h.nanmedian() + std::get<0>(h.nanmedian(1, true)); }},
      {"mode", [](torch::Tensor h) { return h * std::get<0>(h.mode(1, true)); }},
      {"kthvalue", [](torch::Tensor h) { return h * std::get<0>(h.kthvalue(3, 1, true)); }},
      {"kthvalue, squeezed", [](torch::Tensor h) { return h * std::get<0>(h.kthvalue(3, 0)); }},
      {"sort", [](torch::Tensor h) { return h * std::get<0>(h.sort(1)); }},
      {"stable sort", [](torch::Tensor h) { return h * std::get<0>(h.sort(true, 0, true)); }},
      {"argsort", [](torch::Tensor h) { return h + h.gather(1, torch::argsort(h, 1, false)) * torch::arange(12); }},
      {"topk", [](torch::Tensor h) { return torch::cat({std::get<0>(h.topk(4, 1)), h}, 1); }},
      {"topk gate",
       [](torch::Tensor h) {
         const auto [values, indices] = h.topk(3, 1);
         return torch::zeros_like(h).scatter(1, indices, values);
       }},
      {"max over a dimension, then in place",
       [](torch::Tensor h) {
         h = h * 1;
         const torch::Tensor top = std::get<0>(h.max(1, true));
         return h.mul_(2) * top;
       }},
      {"cummax", [](torch::Tensor h) { return h + std::get<0>(h.cummax(1)); }},
      {"cummin", [](torch::Tensor h) { return h + std::get<0>(h.cummin(0)); }},
      {"quantile", [](torch::Tensor h) { return h * torch::quantile(h, 0.3, 1, true); }},
      {"fmod", [](torch::Tensor h) { return torch::fmod(h, 0.7); }},
      {"fmod by a tensor", [](torch::Tensor h) { return torch::fmod(h, h.flip(1).square() + 0.5); }},
      {"remainder", [](torch::Tensor h) { return torch::remainder(h, 0.7); }},
      {"remainder by a tensor", [](torch::Tensor h) { return torch::remainder(h, h.flip(1).square() + 0.5); }},
      {"copysign", [](torch::Tensor h) { return torch::copysign(h, h.flip(1)); }},
      {"logit", [](torch::Tensor h) { return torch::logit(torch::sigmoid(h), 0.3); }},
      {"scatter_reduce amax", [&](torch::Tensor h) { return reduced(h, "amax", true); }},
      {"scatter_reduce amin", [&](torch::Tensor h) { return reduced(h, "amin", false); }},
      {"scatter_reduce sum", [&](torch::Tensor h) { return reduced(h, "sum", true); }},
      {"index_reduce amax", [&](torch::Tensor h) { return reduced_index(h, "amax", false); }},
      {"index_reduce amin", [&](torch::Tensor h) { return reduced_index(h, "amin", true); }},
      {"norm of order 1", [](torch::Tensor h) { return h / torch::norm(h, 1, {1}, true); }},
      {"norm of order 1 of all", [](torch::Tensor h) { return h * (torch::norm(h, 1) / 500); }},
      {"norm of order infinity", [](torch::Tensor h) { return h / torch::norm(h, INFINITY, {1}, true); }},
      {"vector norm",
       [](torch::Tensor h) { return h * torch::linalg_vector_norm(h, -INFINITY, at::IntArrayRef{1}, true); }},
      {"matrix norm", [](torch::Tensor h) { return h * torch::linalg_matrix_norm(h / 100, 1); }},
      {"norm of order 2", [](torch::Tensor h) { return h / torch::norm(h, 2, {1}, true); }},
      {"normalize of order 1",
       [](torch::Tensor h) {
         return torch::nn::functional::normalize(h, torch::nn::functional::NormalizeFuncOptions().p(1));
       }},
      {"dist", [](torch::Tensor h) { return h * torch::dist(h, h.flip(1), 1) / 500; }},
      {"cdist of order 1", [](torch::Tensor h) { return torch::cdist(h, h.narrow(0, 0, 20) + 0.1, 1); },
       [](torch::Tensor h) { return (h.unsqueeze(1) - h.narrow(0, 0, 20) - 0.1).abs().sum(2); }},
      {"cdist of order infinity", [](torch::Tensor h) { return torch::cdist(h, h.narrow(0, 0, 20) + 0.1, INFINITY); },
       [](torch::Tensor h) { return (h.unsqueeze(1) - h.narrow(0, 0, 20) - 0.1).abs().amax(2); }},
      {"pdist of order 1", [](torch::Tensor h) { return torch::pdist(h.narrow(0, 0, 49), 1).narrow(0, 0, 1152); },
       [](torch::Tensor h) {
         const torch::Tensor at = torch::triu_indices(49, 49, 1);
         return (h.index_select(0, at[0]) - h.index_select(0, at[1])).abs().sum(1).narrow(0, 0, 1152);
       }},
      {"hardsigmoid", [](torch::Tensor h) { return torch::hardsigmoid(h * 3); },
       [](torch::Tensor h) { return torch::clamp(h * (3 * double{1.0F / 6.0F}) + 0.5, 0, 1); }},
      {"cosine similarity", [](torch::Tensor h) { return h * torch::cosine_similarity(h, h.flip(1), 1).unsqueeze(1); }},
      {"local maximum of pixels",
       [](torch::Tensor h) { return h + torch::max_pool1d(h.unsqueeze(1), 3, 1, 1).squeeze(1); }},
      {"max pooling, then in place",
       [](torch::Tensor h) { return torch::max_pool1d(h.unsqueeze(1), 2, 1, 1).mul_(2).relu_().squeeze(1); }},
      {"fake quantisation",
       [](torch::Tensor h) {
         return torch::fake_quantize_per_tensor_affine(h.to(torch::kFloat32), 0.25, 0, -6, 6).to(torch::kFloat64);
       }},
      {"remainder of a number", [&](torch::Tensor h) { return torch::remainder(scalar(3), h.square() + 0.5); }},
  };
  for (const Named& operation : operations) {
    INFO(operation.name);
    const double tolerance = std::string(operation.name) == "fake quantisation" ? 1e-2 : 1e-6;
    CHECK(activation_error(operation.call, operation.reference) < tolerance);
  }
}

TEST_CASE("losses with kinks are frozen", "[gates]") {
  namespace F = torch::nn::functional;
  const torch::Tensor labels = torch::arange(96).remainder(4);
  const torch::Tensor signs = (torch::arange(96).remainder(2) * 2 - 1).to(torch::kFloat64);
  const torch::Tensor target = normal({96, 4}, 9);
  const torch::Tensor weight = torch::rand({4}, generator(2), torch::kFloat64);
  torch::Tensor several = torch::stack({labels, (labels + 1).remainder(4), torch::full({96}, -1), labels}, 1);
  const torch::Tensor own = torch::one_hot(labels, 4);
  const auto margins = [&](torch::Tensor o, double margin) {
    return torch::relu(margin - (o * own).sum(1, true) + o) * (1 - own);
  };
  const auto several_margins = [&](torch::Tensor o) {
    const torch::Tensor next = torch::one_hot((labels + 1).remainder(4), 4);
    const torch::Tensor others = (1 - own) * (1 - next);
    return ((torch::relu(1 - (o * own).sum(1, true) + o) + torch::relu(1 - (o * next).sum(1, true) + o)) * others)
               .sum(1) /
           4;
  };
  const std::vector<Named> losses = {
      {"l1", [&](torch::Tensor o) { return F::l1_loss(o, target) * o.square().mean(); }},
      {"smooth l1", [&](torch::Tensor o) { return torch::smooth_l1_loss(o, target, at::Reduction::Mean, 0.7); }},
      {"smooth l1 of width 0",
       [&](torch::Tensor o) { return torch::smooth_l1_loss(o.square(), target, at::Reduction::Sum, 0); }},
      {"huber", [&](torch::Tensor o) { return torch::huber_loss(o, target, at::Reduction::Mean, 0.7); }},
      {"multi margin", [&](torch::Tensor o) { return torch::multi_margin_loss(o * o, labels); },
       [&](torch::Tensor o) { return margins(o * o, 1).sum(1).mean() / 4; }},
      {"multi margin, squared and weighted",
       [&](torch::Tensor o) { return torch::multi_margin_loss(o, labels, 2, 0.8, weight, at::Reduction::Sum); },
       [&](torch::Tensor o) { return (margins(o, 0.8).square().sum(1) * weight.index_select(0, labels)).sum() / 4; }},
      {"multi margin, none",
       [&](torch::Tensor o) {
         return torch::multi_margin_loss(o, labels, 1, 1, {}, at::Reduction::None).square().mean();
       },
       [&](torch::Tensor o) { return (margins(o, 1).sum(1) / 4).square().mean(); }},
      {"multi label margin", [&](torch::Tensor o) { return torch::multilabel_margin_loss(o * o, several); },
       [&](torch::Tensor o) { return several_margins(o * o).mean(); }},
      {"multi label margin, none",
       [&](torch::Tensor o) { return torch::multilabel_margin_loss(o, several, at::Reduction::None).square().sum(); },
       [&](torch::Tensor o) { return several_margins(o).square().sum(); }},
      {"hinge embedding", [&](torch::Tensor o) { return torch::hinge_embedding_loss(o.square().sum(1), signs, 2.0); }},
      {"margin ranking",
       [&](torch::Tensor o) {
         return torch::margin_ranking_loss(o.select(1, 0).square(), o.select(1, 1), signs, 0.5);
       }},
      {"triplet margin", [&](torch::Tensor o) { return torch::triplet_margin_loss(o, target, o.flip(0), 1, 1); }},
      {"cosine embedding", [&](torch::Tensor o) { return torch::cosine_embedding_loss(o, target, signs, 0.1); }},
      {"bootstrapped target", [&](torch::Tensor o) { return (o - (target + 0.9 * o.detach())).square().mean(); }},
      {"soft margin", [&](torch::Tensor o) { return torch::soft_margin_loss(o, signs.unsqueeze(1).expand_as(o)); }},
      {"cross entropy with ignored labels",
       [&](torch::Tensor o) {
         return torch::cross_entropy_loss(o, labels.clone().masked_fill(labels == 1, -100), weight, at::Reduction::Mean,
                                          -100, 0.1);
       }},
  };
  for (const Named& loss : losses) {
    INFO(loss.name);
    const torch::Tensor x = normal({96, 8}, 1);
    const auto of = [&](const Unary& call) -> Loss {
      return [&](const Tensors& p) { return call(torch::tanh(x.matmul(p[0])).matmul(p[1])); };
    };
    CHECK(frozen_error(of(loss.call), {normal({8, 12}, 3) * 0.4, normal({12, 4}, 4) * 0.6},
                       loss.reference ? of(loss.reference) : Loss()) < 1e-6);
  }
}

TEST_CASE("memory layouts of images are frozen alike", "[gates]") {
  std::vector<torch::Tensor> held;  // on a device LibTorch differentiates only such a view twice
  const std::vector<Named> operations = {
      {"relu", [](torch::Tensor h) { return h.relu(); }},
      {"relu_", [](torch::Tensor h) { return (h * 1).relu_(); }},
      {"hardtanh_",
       [](torch::Tensor h) {
         h = h * 1;
         return torch::hardtanh_(h);
       }},
      {"clamp_ of channels",
       [](torch::Tensor h) {
         h = h * 1;
         h.narrow(1, 0, 2).clamp_(-0.3, 0.3);
         return h;
       }},
      {"leaky_relu_ of a channel",
       [&held](torch::Tensor h) {
         h = h * 1;
         torch::Tensor channel = h.select(1, 1);
         torch::leaky_relu_(channel, 0.1);
         held.push_back(channel);
         return h;
       }},
      {"abs", [](torch::Tensor h) { return h.abs(); }},
      {"max_pool2d", [](torch::Tensor h) { return torch::max_pool2d(h, 3, 1, 1); }},
      {"max_pool2d, then in place", [](torch::Tensor h) { return torch::max_pool2d(h, 3, 1, 1).add_(h).relu_(); }},
      {"adaptive_max_pool2d, then in place",
       [](torch::Tensor h) { return std::get<0>(torch::adaptive_max_pool2d(h, {5, 5})).mul_(2); }},
      {"max over channels", [](torch::Tensor h) { return h * std::get<0>(h.max(1, true)); }},
      {"amax over pixels", [](torch::Tensor h) { return h * h.amax({2, 3}, true); }},
      {"where", [](torch::Tensor h) { return where(h > 0, h, h * h); }},
      {"topk over channels", [](torch::Tensor h) { return h.narrow(1, 0, 2) * std::get<0>(h.topk(2, 1)); }},
  };
  for (const auto format : {torch::MemoryFormat::Contiguous, torch::MemoryFormat::ChannelsLast}) {
    const torch::Tensor x = normal({6, 3, 8, 8}, 1).contiguous(format);
    for (const Named& operation : operations) {
      INFO(operation.name << ", " << format);
      CHECK(frozen_error(
                [&](const Tensors& p) {
                  const torch::Tensor h = operation.call(torch::conv2d(x, p[0]).contiguous(format));
                  return torch::tanh(h.flatten(2).mean(2).matmul(p[1].narrow(0, 0, h.size(1)))).square().mean() +
                         (h * h).mean() / 10;
                },
                {normal({4, 3, 3, 3}, 3) * 0.3, normal({4, 4}, 4)}) < 1e-6);
    }
  }
}

// What differs there by rounding of a constant (LibTorch's gradient of celu takes 1 / alpha in float32), or in its
// layout (a linear layer behind it takes another way then), a difference would divide by its displacement.
TEST_CASE("a replay at the first point gives the values, gradients and layout of the first pass", "[gates]") {
  const std::vector<Named> operations = {
      {"relu", [](torch::Tensor h) { return torch::relu(h); }},
      {"leaky_relu", [](torch::Tensor h) { return torch::leaky_relu(h, 0.2); }},
      {"rrelu", [](torch::Tensor h) { return torch::rrelu(h, 0.1, 0.4, false); }},
      {"rrelu in place", [](torch::Tensor h) { return torch::rrelu_(h, 0.1, 0.4, false); }},
      {"rrelu in training", [](torch::Tensor h) { return torch::rrelu(h, 0.1, 0.4, true); }},
      {"prelu", [](torch::Tensor h) { return torch::prelu(h, torch::full({1}, 0.3, h.options())); }},
      {"threshold", [](torch::Tensor h) { return torch::threshold(h, 0.3, -1); }},
      {"hardtanh", [](torch::Tensor h) { return torch::hardtanh(h); }},
      {"relu6", [](torch::Tensor h) { return torch::relu6(h); }},
      {"hardshrink", [](torch::Tensor h) { return torch::hardshrink(h, 0.3); }},
      {"softshrink", [](torch::Tensor h) { return torch::softshrink(h, 0.3); }},
      {"hardsigmoid", [](torch::Tensor h) { return torch::hardsigmoid(h * 3); }},
      {"hardswish", [](torch::Tensor h) { return torch::hardswish(h * 3); }},
      {"elu", [](torch::Tensor h) { return torch::elu(h, 0.7, 1.1, 0.9); }},
      {"selu", [](torch::Tensor h) { return torch::selu(h); }},
      {"celu", [](torch::Tensor h) { return torch::celu(h, 0.7); }},
      {"elu in place", [](torch::Tensor h) { return torch::elu_(h, 0.7, 1.1, 0.9); }},
      {"selu in place", [](torch::Tensor h) { return torch::selu_(h); }},
      {"celu in place", [](torch::Tensor h) { return torch::celu_(h, 0.7); }},
      {"clamp", [](torch::Tensor h) { return h.clamp(-0.4, 0.9); }},
      {"clamp_min", [](torch::Tensor h) { return h.clamp_min(-0.4); }},
      {"clamp_max", [](torch::Tensor h) { return h.clamp_max(0.4); }},
      {"abs", [](torch::Tensor h) { return h.abs(); }},
      {"frac", [](torch::Tensor h) { return h.frac(); }},
  };
  torch::manual_seed(4);
  const torch::Tensor x = torch::randn({7, 5, 6}, torch::kFloat64).transpose(1, 2).requires_grad_();
  for (const Named& operation : operations) {
    INFO(operation.name);
    microreg::GateTape tape;
    const auto evaluated = [&](const auto& scope) {
      (void)scope;
      const torch::Tensor y = operation.call(x * 1);
      return std::pair(y, torch::autograd::grad({y.square().sum()}, {x})[0]);
    };
    const auto [value, gradient] = evaluated(microreg::RecordGates(tape));
    const auto [value_again, gradient_again] = evaluated(microreg::ReplayGates(tape, Keep::no));
    CHECK(helpers::relative_error(value_again.detach(), value.detach()) < 1e-15);
    CHECK(helpers::relative_error(gradient_again, gradient) < 1e-15);
    CHECK(value_again.strides() == value.strides());
  }
}
