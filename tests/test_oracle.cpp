// Every penalty, through Regularizer and through the functor, against Python's autograd (oracle/generate.py).
#include "helpers.hpp"
#include "networks.hpp"
#include "oracle_file.hpp"

#include <microreg/microreg.hpp>

#include <cstdlib>
#include <memory>

using namespace helpers;

namespace {

constexpr std::int64_t micro_batch_size = 4;
constexpr std::int64_t micro_batch_count = 3;
constexpr std::uint64_t direction_seed = 11;

const OracleFile& oracle() {
  // The variable is for a program that runs on another machine than it was built on.
  const char* elsewhere = std::getenv("MICROREG_TESTS_DIR");
  static const OracleFile file(std::string(elsewhere != nullptr ? elsewhere : MICROREG_TESTS_DIR) +
                               "/oracle/penalties.txt");
  return file;
}

/// Labels that stand in the file, [draws, samples], instead of drawn ones: handed out micro-batch by micro-batch, and
/// within one draw by draw.
auto given_labels(const torch::Tensor& labels) {
  auto calls = std::make_shared<std::int64_t>(0);
  return microreg::Distribution{
      [labels, calls](const torch::Tensor& output, const auto&) {
        const std::int64_t draw = *calls % labels.size(0);
        const std::int64_t begin = *calls / labels.size(0) % micro_batch_count * micro_batch_size;
        ++*calls;
        return labels[draw].narrow(0, begin, output.size(0));
      },
      [](const torch::Tensor& output, const torch::Tensor& y) { return torch::cross_entropy_loss(output, y); }};
}

template <class Model>
struct Case {
  std::string network;
  Model model;
  torch::ScalarType type;
  microreg::Weighting weighting;

  [[nodiscard]] double tolerance() const { return type == torch::kFloat64 ? 1e-10 : 1e-4; }
  [[nodiscard]] std::vector<torch::Tensor> parameters() const { return model->parameters(); }

  void load() {
    const torch::NoGradGuard no_grad;
    model->to(type);
    for (auto& item : model->named_parameters()) {
      item.value().copy_(oracle().at(network + "/" + item.key()));
    }
  }

  void compare_gradient(const std::string& key) const {
    std::vector<torch::Tensor> expected;
    for (const auto& item : model->named_parameters()) {
      expected.push_back(oracle().at(key + "/grad/" + item.key()).flatten());
    }
    CHECK(relative_error(flat_grad(parameters()), torch::cat(expected)) < tolerance());
  }
};

struct Pass {
  torch::Tensor input, output, loss;
};

/// `functor(pass)` is the penalty in the form that users compose with; `pass` has input, output and loss.
template <class Model, class Penalty, class Functor>
void check(Case<Model>& test, const std::string& penalty_name, double strength, const Penalty& penalty,
           const Functor& functor) {
  const std::string weighting = test.weighting == microreg::Weighting::samples ? "samples" : "reference";
  const std::string values = test.network + "/" + penalty_name;
  const std::string key = values + "/" + weighting;
  INFO(key << " in " << test.type);
  const torch::Tensor data = oracle().at(test.network + "/data").to(test.type);
  const torch::Tensor targets = oracle().at("targets").to(torch::kInt64);

  clear_grad(test.parameters());
  microreg::Regularizer regularizer(test.model, cross_entropy, penalty,
                                    {.strength = strength,
                                     .micro_batch_size = micro_batch_size,
                                     .weighting = test.weighting,
                                     .generator = generator(direction_seed)});
  const microreg::Report report = regularizer.backward(data, targets);
  test.compare_gradient(key);
  CHECK(relative_error(report.loss, oracle().at(key + "/loss")) < test.tolerance());
  CHECK(relative_error(report.penalties[0].value, oracle().at(key + "/value")) < test.tolerance());
  const torch::Tensor norms = report.penalties[0].micro_batch_norms;
  CHECK(relative_error(microreg::detail::is_squared<Penalty> ? norms.square() : norms,
                       oracle().at(values + "/micro_batch_values")) < test.tolerance());
  CHECK(penalty_name.rfind(report.penalties[0].name, 0) == 0);

  clear_grad(test.parameters());
  const std::int64_t samples = data.size(0);
  const std::int64_t count = (samples + micro_batch_size - 1) / micro_batch_size;
  torch::Tensor objective = torch::zeros({}, test.type);
  torch::Tensor value = torch::zeros({}, test.type);
  for (std::int64_t begin = 0; begin < samples; begin += micro_batch_size) {
    const std::int64_t size = std::min(micro_batch_size, samples - begin);
    Pass pass;
    pass.input = data.narrow(0, begin, size).clone().requires_grad_(true);
    pass.output = test.model->forward(pass.input);
    pass.loss = torch::cross_entropy_loss(pass.output, targets.narrow(0, begin, size));
    const torch::Tensor penalty_value = functor(pass);
    const double weight = test.weighting == microreg::Weighting::samples
                              ? static_cast<double>(size) / static_cast<double>(samples)
                              : 1.0 / static_cast<double>(count);
    objective = objective + weight * (pass.loss + strength * penalty_value);
    value = value + weight * penalty_value.detach();
  }
  objective.backward();
  test.compare_gradient(key);
  CHECK(relative_error(value, oracle().at(key + "/value")) < test.tolerance());
}

/// Whether a seed gives the directions that Python's generator for the CPU drew.
bool draws_as_python() { return test_device().is_cpu(); }

/// The paper's penalties.
template <class Model>
void check_paper(Case<Model> test) {
  test.load();
  const auto parameters = test.parameters();
  check(test, "gradient_norm", 0.3, microreg::GradientNorm{},
        [&](const Pass& pass) { return microreg::GradientNorm{}(pass.loss, parameters); });
  const torch::Tensor drawn = oracle().at("drawn").to(torch::kInt64).unsqueeze(0);
  check(test, "fisher_trace", 0.2, microreg::FisherTrace{given_labels(drawn)},
        [&, fisher = microreg::FisherTrace{given_labels(drawn)}](const Pass& pass) {
          return fisher(pass.output, parameters);
        });
  check(test, "average_jacobian", 0.05, microreg::AverageJacobian{},
        [&](const Pass& pass) { return microreg::AverageJacobian{}(pass.output, parameters); });
  if (!draws_as_python()) {
    return;
  }
  check(test, "unit_jacobian", 0.4, microreg::UnitJacobian{},
        [&, directions = generator(direction_seed)](const Pass& pass) {
          return microreg::UnitJacobian{}(pass.output, parameters, directions);
        });
}

/// Those beyond the paper.
template <class Model>
void check_beyond(Case<Model> test) {
  test.load();
  const auto parameters = test.parameters();
  const torch::Tensor drawn = oracle().at("drawn_more").to(torch::kInt64);
  const auto drawing = [&] { return microreg::FisherTrace{given_labels(drawn), drawn.size(0)}; };
  check(test, "fisher_trace_draws", 0.2, drawing(),
        [&, fisher = drawing()](const Pass& pass) { return fisher(pass.output, parameters); });
  const microreg::FisherTrace<> expected{.expectation = microreg::Expectation::exact};
  check(test, "fisher_trace_exact", 0.2, expected, [&](const Pass& pass) { return expected(pass.output, parameters); });
  if (draws_as_python()) {
    const microreg::UnitJacobian directions{.directions = 2, .scale_by_outputs = true};
    check(test, "unit_jacobian_directions", 0.1, directions, [&, from = generator(direction_seed)](const Pass& pass) {
      return directions(pass.output, parameters, from);
    });
  }
  check(test, "jacobian_norm", 0.1, microreg::JacobianNorm{},
        [&](const Pass& pass) { return microreg::JacobianNorm{}(pass.output, parameters); });
  const microreg::InputJacobian exact{.expectation = microreg::Expectation::exact};
  check(test, "input_jacobian_exact", 0.1, exact, [&](const Pass& pass) { return exact(pass.output, {pass.input}); });
  if (draws_as_python() &&
      test.type == torch::kFloat64) {  // From the same seed LibTorch draws other directions in float32.
    const microreg::InputJacobian projected{.projections = 2};
    check(test, "input_jacobian_projections", 0.1, projected, [&, from = generator(direction_seed)](const Pass& pass) {
      return projected(pass.output, {pass.input}, from);
    });
  }
  const microreg::Unsquared unsquared{microreg::GradientNorm{}};
  check(test, "unsquared_gradient_norm", 0.3, unsquared,
        [&](const Pass& pass) { return unsquared(pass.loss, parameters); });
}

}  // namespace

TEST_CASE("penalties agree with Python's autograd", "[oracle]") {
  const auto type = GENERATE(torch::kFloat64, torch::kFloat32);
  const auto check_on = [&](const std::string& network, const auto& model) {
    using Model = std::decay_t<decltype(model)>;
    check_paper(Case<Model>{network, model, type, microreg::Weighting::samples});
    check_paper(Case<Model>{network, model, type, microreg::Weighting::reference});
    check_beyond(Case<Model>{network, model, type, microreg::Weighting::samples});
  };
  SECTION("MLP") { check_on("mlp", networks::Mlp()); }
  SECTION("CNN") { check_on("cnn", networks::Cnn(networks::Norm::none)); }
  SECTION("CNN with BatchNorm") { check_on("cnn_batch_norm", networks::Cnn(networks::Norm::batch)); }
}

TEST_CASE("the oracle's directions are what UnitJacobian draws from the same seed", "[oracle]") {
  if (skipped_off_the_cpu("a generator of the CPU's")) {
    return;
  }
  at::Generator directions = generator(direction_seed);
  const torch::Tensor stored = oracle().at("directions");
  for (std::int64_t k = 0; k < stored.size(0); ++k) {
    const torch::Tensor w = torch::ones({networks::classes}, torch::dtype(torch::kFloat64).requires_grad(true));
    // With output = w, a single sample, the probe's gradient is the direction itself.
    const torch::Tensor value = microreg::UnitJacobian{}((w * w / 2).unsqueeze(0), {w}, directions);
    CHECK(value.item<double>() == Approx(1.0).epsilon(1e-12));
    // R(w) = sum of (u_c w_c)^2, so dR/dw_c at 1 is 2 u_c^2.
    value.backward();
    CHECK(relative_error(w.grad(), 2 * stored[k].square()) < 1e-12);
  }
}
