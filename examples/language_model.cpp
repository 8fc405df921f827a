// A character-level language model: a small causal transformer on sentences that the program makes up. What is
// particular to sequences: LibTorch's layers take [T, B, ...], so the samples lie along dimension 1, and the classes
// along the last one.
#include <torch/torch.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <microreg/microreg.hpp>
#include <random>
#include <string>
#include <vector>

constexpr std::int64_t context = 24;  // T, characters that are read at a time
const std::string alphabet = " .abcdefghijklmnopqrstuvwxyz";

/// Sentences of a small grammar, as indices into the alphabet.
torch::Tensor make_text(int sentences) {
  std::mt19937 random(0);
  const auto one_of = [&](const std::vector<std::string>& words) { return words[random() % words.size()]; };
  std::vector<std::int64_t> text;
  for (int i = 0; i < sentences; ++i) {
    const std::string sentence = one_of({"the", "a", "one"}) + " " + one_of({"small ", "old ", "quiet ", ""}) +
                                 one_of({"cat", "dog", "bird"}) + " " + one_of({"sees", "likes", "follows"}) + " the " +
                                 one_of({"river", "garden", "moon"}) + ". ";
    for (const char character : sentence) {
      text.push_back(static_cast<std::int64_t>(alphabet.find(character)));
    }
  }
  return torch::tensor(text);
}

struct CharacterModelImpl : torch::nn::Module {
  CharacterModelImpl()
      : characters(register_module("characters", torch::nn::Embedding(alphabet.size(), 32))),
        positions(register_module("positions", torch::nn::Embedding(context, 32))),
        block(register_module("block", torch::nn::TransformerEncoderLayer(
                                           torch::nn::TransformerEncoderLayerOptions(32, 2).dim_feedforward(64)))),
        head(register_module("head", torch::nn::Linear(32, alphabet.size()))) {}

  /// Characters [T, B] to the logits of what follows each, [T, B, C].
  torch::Tensor forward(const torch::Tensor& text) {
    const auto length = text.size(0);
    const auto causal = torch::nn::TransformerImpl::generate_square_subsequent_mask(length);
    const auto embedded = characters(text) + positions(torch::arange(length)).unsqueeze(1);
    return head(block(embedded, causal));
  }

  torch::nn::Embedding characters, positions;
  torch::nn::TransformerEncoderLayer block;
  torch::nn::Linear head;
};
TORCH_MODULE(CharacterModel);

struct Result {
  double loss, fisher_trace;
};

Result train(const torch::Tensor& text, double strength) {
  torch::manual_seed(0);
  CharacterModel model;
  torch::optim::Adam optimizer(model->parameters(), torch::optim::AdamOptions(0.005));
  const auto held_out = text.size(0) / 10;
  const auto windows = [&](std::int64_t begin, std::int64_t end, std::int64_t count) {
    const auto starts = torch::randint(begin, end - context, {count});
    return text.index({torch::arange(context + 1).unsqueeze(1) + starts});  // [T + 1, B]
  };

  // [language_model]
  using Text = microreg::Along<1>;  // [T, B]: samples along dimension 1
  auto loss = [](const torch::Tensor& logits, const torch::Tensor& next) {
    return torch::nn::functional::cross_entropy(logits.flatten(0, 1), next.flatten());
  };
  microreg::FisherTrace penalty{microreg::Categorical{.class_dimension = -1}};  // of [T, B, C]
  microreg::Regularizer<Text, Text> regularizer(model, loss, penalty, {.strength = strength, .micro_batch_size = 16});
  for (int step = 0; step < 150; ++step) {
    const auto batch = windows(0, text.size(0) - held_out, 32);
    optimizer.zero_grad();
    regularizer.backward(Text(batch.slice(0, 0, context)), Text(batch.slice(0, 1)));
    optimizer.step();
  }
  // [end]

  model->eval();
  const auto batch = windows(text.size(0) - held_out, text.size(0), 64);
  const auto found = microreg::measure(model, loss, penalty, Text(batch.slice(0, 0, context)), Text(batch.slice(0, 1)),
                                       {.micro_batch_size = 16});

  const torch::NoGradGuard no_grad;
  auto written = torch::zeros({1, 1}, torch::kLong);
  std::string sample;
  for (int i = 0; i < 60; ++i) {
    const auto logits = model(written.slice(0, std::max<std::int64_t>(0, written.size(0) - context)))[-1];
    const auto next = torch::multinomial(logits.softmax(1), 1);
    written = torch::cat({written, next});
    sample += alphabet[static_cast<std::size_t>(next.item<std::int64_t>())];
  }
  const Result result{found.loss.item<double>(), found.penalties[0].value.item<double>()};
  std::printf("strength %-4g loss %.3f, Fisher trace %.5f on held-out text; writes: %s\n", strength, result.loss,
              result.fisher_trace, sample.c_str());
  return result;
}

int main() {
  const auto text = make_text(500);
  const Result plain = train(text, 0);
  const Result penalised = train(text, 0.3);
  // It has learned more than how often each character occurs, and the penalty did what it is for.
  const bool learned = plain.loss < 1 && penalised.loss < 1;
  return learned && penalised.fisher_trace < 0.85 * plain.fisher_trace ? 0 : 1;
}
