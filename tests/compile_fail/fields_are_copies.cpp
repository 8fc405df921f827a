// expect: microreg: microreg_fields(T&) must return std::tie of the fields
#include "step.hpp"

struct Copied {
  torch::Tensor tokens;
};
auto microreg_fields(Copied& batch) { return std::tuple<torch::Tensor>(batch.tokens); }
struct CopiedModel : torch::nn::Module {
  torch::Tensor forward(const Copied& batch) { return batch.tokens; }
};

void step(CopiedModel& model) { step_with(model, microreg::GradientNorm{}, mse, Copied{torch::ones({2, 3})}); }
