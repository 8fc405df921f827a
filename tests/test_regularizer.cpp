#include "catch.hpp"

#include <microreg/format.hpp>
#include <microreg/microreg.hpp>

TEST_CASE("a report prints through fmt", "[regularizer]") {
  torch::nn::Linear model(3, 2);
  microreg::Regularizer regularizer(model, torch::nn::CrossEntropyLoss(), microreg::GradientNorm{},
                                    {.strength = 0.01, .micro_batch_size = 4});
  const auto report = regularizer.backward(torch::randn({10, 3}), torch::randint(2, {10}));
  const std::string text = fmt::format("{}", report);
  CHECK(text.find("step 0: loss ") == 0);
  CHECK(text.find("10 samples in 3 micro-batches") != std::string::npos);
}
