// expect: microreg: the input is not a batch
#include "step.hpp"

struct Sentences {
  torch::Tensor tokens;
};
struct SentenceModel : torch::nn::Module {
  torch::Tensor forward(const Sentences& sentences) { return sentences.tokens; }
};

void step(SentenceModel& model) { step_with(model, microreg::GradientNorm{}, mse, Sentences{torch::ones({2, 3})}); }
