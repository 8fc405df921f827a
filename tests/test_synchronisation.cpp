// Reading a number from a tensor is what makes the host wait for a device. A step must not do it: seen here on the CPU,
// by recording every operation that LibTorch dispatches.
#include "helpers.hpp"
#include "networks.hpp"

#include <ATen/record_function.h>
#include <microreg/format.hpp>
#include <microreg/microreg.hpp>

#include <mutex>
#include <set>

using namespace helpers;

namespace {

std::mutex names_mutex;
std::set<std::string> names;

/// The names of all operations that `call` dispatches, those of the backward passes included.
template <class Call>
std::set<std::string> operations_of(const Call& call) {
  names.clear();
  const auto handle = at::addGlobalCallback(
      at::RecordFunctionCallback([](const at::RecordFunction& function) -> std::unique_ptr<at::ObserverContext> {
        const std::scoped_lock lock(names_mutex);
        names.insert(function.name());
        return nullptr;
      }).scopes({at::RecordScope::FUNCTION}));
  call();
  at::removeCallback(handle);
  const std::scoped_lock lock(names_mutex);
  return names;
}

bool synchronises(const std::set<std::string>& operations) {
  for (const char* name : {"aten::item", "aten::_local_scalar_dense", "aten::is_nonzero", "aten::nonzero",
                           "aten::equal", "aten::masked_select", "aten::multinomial"}) {
    if (operations.contains(name)) {
      UNSCOPED_INFO("dispatched: " << name);
      return true;
    }
  }
  return false;
}

}  // namespace

TEST_CASE("a step reads no number from a tensor unless asked", "[synchronisation]") {
  auto model = networks::seeded_cnn(networks::Norm::batch, networks::Activation::kinked);
  const auto batch = networks::images(10);
  const auto estimator =
      GENERATE(microreg::Estimator(microreg::Exact{}), microreg::Estimator(microreg::ForwardDifference{}),
               microreg::Estimator(microreg::CentralDifference{}));
  const double share = GENERATE(1.0, 0.5);
  const auto step = [&](microreg::CheckFinite check_finite) {
    microreg::Regularizer regularizer(
        model, cross_entropy,
        microreg::GradientNorm{} + microreg::FisherTrace{} + microreg::AverageJacobian{} + microreg::UnitJacobian{} +
            microreg::InputJacobian{} + microreg::Unsquared{microreg::JacobianNorm{}},
        {.micro_batch_size = 4, .estimator = estimator, .sampling = {.share = share}, .check_finite = check_finite});
    (void)regularizer.backward(batch.input, batch.target);  // in which a difference is compared with double backward
    return operations_of([&] {
      (void)regularizer.backward(batch.input, batch.target);
      (void)regularizer.backward(batch.input, batch.target);
    });
  };
  const auto operations = step(microreg::CheckFinite::never);
  CHECK_FALSE(synchronises(operations));
  // The recording sees the passes at all, backward ones too, and sees a read.
  CHECK(operations.contains("aten::convolution_backward"));
  CHECK((operations.contains("aten::native_batch_norm_backward") ||
         operations.contains("aten::cudnn_batch_norm_backward")));
  CHECK(synchronises(operations_of([] { (void)torch::ones({}).item<float>(); })));
}

TEST_CASE("measure reads no number from a tensor; printing does", "[synchronisation]") {
  auto model = networks::seeded_mlp();
  const auto batch = networks::vectors(10);
  microreg::Report report;
  CHECK_FALSE(synchronises(operations_of([&] {
    report = microreg::measure(model, cross_entropy, microreg::GradientNorm{} + microreg::FisherTrace{}, batch.input,
                               batch.target, {.micro_batch_size = 4});
    (void)report.objective();
  })));
  CHECK(synchronises(operations_of([&] { (void)fmt::format("{}", report); })));
}

TEST_CASE("the functors read no number from a tensor", "[synchronisation]") {
  auto model = networks::seeded_mlp();
  const auto batch = networks::vectors(10);
  const auto parameters = model->parameters();
  CHECK_FALSE(synchronises(operations_of([&] {
    const torch::Tensor output = model->forward(batch.input);
    const torch::Tensor loss = torch::cross_entropy_loss(output, batch.target);
    (loss + microreg::GradientNorm{}(loss, parameters) + microreg::FisherTrace{}(output, parameters) +
     microreg::AverageJacobian{}(output, parameters) + microreg::UnitJacobian{}(output, parameters))
        .backward();
  })));
}
