/// @file
/// A step that compiles, into which each case puts one wrong thing.
#pragma once

#include <microreg/microreg.hpp>

inline constexpr auto mse = [](const torch::Tensor& output, const torch::Tensor& target) {
  return at::mse_loss(output, target);
};

template <class Model, class Penalty, class Loss, class Input>
void step_with(Model&& model, Penalty penalty, Loss loss, const Input& input) {
  microreg::Regularizer regularizer(std::forward<Model>(model), loss, penalty);
  regularizer.backward(input, torch::ones({2, 2}));
}
