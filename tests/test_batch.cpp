// Splitting: every kind of batch, slices, and the errors of batches that cannot be split.
#include "helpers.hpp"

#include <microreg/microreg.hpp>

#include <array>
#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

using namespace helpers;
using microreg::BatchError;

namespace custom {

enum class Language { english };

/// A user's type, with one function beside it.
struct Sentences {
  torch::Tensor tokens, mask;
  Language language = Language::english;
};
auto microreg_fields(Sentences& s) { return std::tie(s.tokens, s.mask, s.language); }

struct NotABatch {
  torch::Tensor tensor;
};

}  // namespace custom

static_assert(microreg::Batch<torch::Tensor>);
static_assert(microreg::Batch<const std::vector<torch::Tensor>&>);
static_assert(microreg::Batch<std::tuple<torch::Tensor, int, std::string>>);
static_assert(microreg::Batch<std::map<std::string, std::optional<torch::Tensor>>>);
static_assert(microreg::Batch<std::pair<custom::Sentences, std::array<torch::Tensor, 2>>>);
static_assert(!microreg::Batch<custom::NotABatch>);
static_assert(!microreg::Batch<std::vector<custom::NotABatch>>);
static_assert(!microreg::Batch<torch::Tensor*>);

namespace {

torch::Tensor rows(std::int64_t count) { return torch::arange(count * 2, torch::kFloat32).view({count, 2}); }

/// The gradient of a model that reads its batch through `read`, cut into micro-batches of 4, 4 and 2.
template <class Input, class Read>
torch::Tensor gradient(const Input& input, const Read& read) {
  torch::manual_seed(61);
  torch::nn::Linear layer(2, 3);
  microreg::Regularizer regularizer(
      microreg::FunctionModel{[&](const Input& in) { return layer(read(in)).tanh(); }, layer->parameters()},
      [](const torch::Tensor& output, const torch::Tensor& y) { return torch::mse_loss(output, y); },
      microreg::GradientNorm{}, {.micro_batch_size = 4});
  (void)regularizer.backward(input, torch::ones({10, 3}));
  return flat_grad(layer->parameters());
}

}  // namespace

TEST_CASE("slices are views, and other values go along", "[batch]") {
  const torch::Tensor x = rows(10);
  CHECK(is_view(microreg::slice(x, 4, 3), x, 4, 3));
  CHECK(microreg::slice(x, 0, 10).is_same(x));

  const auto [tensor, number, text] = microreg::slice(std::tuple{x, 7, std::string("seven")}, 8, 2);
  CHECK(is_view(tensor, x, 8, 2));
  CHECK(number == 7);
  CHECK(text == "seven");

  const custom::Sentences sentences{x, x.gt(3)};
  const custom::Sentences part = microreg::slice(sentences, 2, 4);
  CHECK(is_view(part.tokens, x, 2, 4));
  CHECK(part.mask.size(0) == 4);
  CHECK(sentences.tokens.size(0) == 10);

  const std::map<std::string, std::vector<std::optional<torch::Tensor>>> nested{{"a", {x, std::nullopt}}, {"b", {x}}};
  const auto cut = microreg::slice(nested, 5, 5);
  CHECK(is_view(*cut.at("a")[0], x, 5, 5));
  CHECK_FALSE(cut.at("a")[1].has_value());
  CHECK(is_view(*cut.at("b")[0], x, 5, 5));
  CHECK(nested.at("b")[0]->size(0) == 10);
}

TEST_CASE("every kind of batch gives the same gradient", "[batch]") {
  const torch::Tensor x = rows(10) / 20;
  const torch::Tensor exact = gradient(x, [](const torch::Tensor& in) { return in; });
  const auto agrees = [&](const auto& input, const auto& read) {
    CHECK(relative_error(gradient(input, read), exact) < 1e-6);
  };
  agrees(std::vector{x, x}, [](const auto& in) { return in[1]; });
  agrees(std::array{x, x}, [](const auto& in) { return in[0]; });
  agrees(std::pair{x, x}, [](const auto& in) { return in.second; });
  agrees(std::tuple{x, 2.0}, [](const auto& in) { return std::get<0>(in) * std::get<1>(in) / 2; });
  agrees(std::optional{x}, [](const auto& in) { return *in; });
  agrees(std::map<std::string, torch::Tensor>{{"x", x}}, [](const auto& in) { return in.at("x"); });
  agrees(custom::Sentences{x, x.gt(-1)}, [](const auto& in) { return in.tokens * in.mask; });
  agrees(std::pair{std::vector{custom::Sentences{x, x}}, std::optional<torch::Tensor>()},
         [](const auto& in) { return in.first[0].tokens; });
}

TEST_CASE("targets of any kind reach the loss", "[batch]") {
  const torch::Tensor x = rows(10) / 20;
  torch::nn::Linear layer(2, 3);
  std::vector<std::int64_t> sizes;
  microreg::Regularizer regularizer(layer,
                                    [&](const torch::Tensor& output, const std::pair<torch::Tensor, torch::Tensor>& y) {
                                      sizes.push_back(y.first.size(0));
                                      return ((output - y.first).square() * y.second).mean();
                                    },
                                    microreg::GradientNorm{}, {.micro_batch_size = 4});
  (void)regularizer.backward(x, std::pair{torch::ones({10, 3}), torch::ones({10, 1})});
  CHECK(sizes == std::vector<std::int64_t>{4, 4, 2});
}

TEST_CASE("a batch that cannot be split names the tensor and the remedy", "[batch]") {
  const torch::Tensor x = rows(10);
  const auto message = [](const auto& batch) {
    return message_of<BatchError>([&] { (void)microreg::sample_count(batch, "input"); });
  };
  CHECK(microreg::sample_count(std::tuple{x, 3, std::optional<torch::Tensor>()}) == 10);
  CHECK(microreg::sample_count(rows(0)) == 0);
  CHECK(has(message(std::pair{x, rows(9)}),
            {"first dimensions differ", "input[0] has 10", "input[1] has 9", "[9, 2]", "sample dimension"}));
  CHECK(has(message(std::map<std::string, torch::Tensor>{{"a", x}, {"mask", rows(3)}}), {"input[mask] has 3"}));
  CHECK(has(message(custom::Sentences{x, rows(2)}), {"input.field 1 has 2"}));
  CHECK(has(message(std::tuple{x, helpers::tensor(1.0)}), {"input[1]", "scalar", "pass a number"}));
  CHECK(has(message(std::vector{x, torch::Tensor()}), {"input[1]", "undefined", "std::optional"}));
  CHECK(has(message(std::vector<torch::Tensor>{}), {"input", "no tensor"}));
  CHECK(has(message(3), {"input", "no tensor"}));
}

namespace custom {

/// What only its own functions can count and cut.
struct Graphs {
  std::vector<torch::Tensor> nodes;
};
std::int64_t microreg_size(const Graphs& graphs) { return static_cast<std::int64_t>(graphs.nodes.size()); }
Graphs microreg_slice(const Graphs& graphs, std::int64_t begin, std::int64_t length) {
  return {{graphs.nodes.begin() + begin, graphs.nodes.begin() + begin + length}};
}

}  // namespace custom

TEST_CASE("samples that do not lie along the first dimension", "[batch]") {
  const torch::Tensor x = rows(10) / 20;
  const torch::Tensor exact = gradient(x, [](const torch::Tensor& in) { return in; });
  const auto agrees = [&](const auto& input, const auto& read) {
    CHECK(relative_error(gradient(input, read), exact) < 1e-6);
  };
  agrees(microreg::Along<1>(x.t()), [](const auto& in) { return in.t(); });
  agrees(std::pair{x, microreg::Whole(torch::full({3, 4}, 2.0))},
         [](const auto& in) { return in.first * in.second[2][3] / 2; });
  agrees(std::pair{x, microreg::OnHost(torch::ones({10}))},
         [](const auto& in) { return in.first * in.second.unsqueeze(1); });
  agrees(microreg::PerSample<torch::Tensor>(x.unbind()), [](const auto& in) { return torch::stack(in); });
  agrees(custom::Graphs{x.unbind()}, [](const auto& in) { return torch::stack(in.nodes); });
  agrees(std::tuple{custom::Graphs{x.unbind()}, x}, [](const auto& in) { return std::get<1>(in); });

  const auto message = [](const auto& batch) {
    return message_of<BatchError>([&] { (void)microreg::sample_count(batch, "input"); });
  };
  CHECK(has(message(std::pair{x, microreg::PerSample<torch::Tensor>(x.unbind().size() - 1)}),
            {"input[0] has 10", "input[1] has 9"}));
  CHECK(has(message(std::pair{x, microreg::Along<1>(x)}), {"input[1] has 2"}));
  CHECK(has(message(microreg::Along<2>(x)), {"[10, 2]", "no dimension 2"}));
  CHECK(has(message(microreg::Whole(x)), {"no tensor"}));
}

namespace {

struct TaggerImpl : torch::nn::Module {
  explicit TaggerImpl(bool first) : lstm(torch::nn::LSTMOptions(6, 8).batch_first(first)) {
    register_module("lstm", lstm);
    register_module("out", out);
    to(torch::kFloat64);
  }
  torch::Tensor forward(const torch::Tensor& x) { return out(std::get<0>(lstm(x))); }
  torch::nn::LSTM lstm;
  torch::nn::Linear out{8, 5};
};
TORCH_MODULE(Tagger);

}  // namespace

TEST_CASE("sequences that are cut along time", "[batch]") {
  const WithoutCudnn composed;
  torch::manual_seed(4);
  const auto loss = [](const torch::Tensor& o, const torch::Tensor& y) {
    return torch::cross_entropy_loss(o.flatten(0, 1), y.flatten());
  };
  Tagger model(false);
  const torch::Tensor x = torch::randn({12, 8, 6}, torch::kFloat64), y = torch::randint(5, {12, 8});  // [T, N, F]
  microreg::Regularizer r(model, loss, microreg::GradientNorm{}, {.micro_batch_size = 4});
  CHECK(has(message_of<BatchError>([&] { (void)r.backward(x, y); }), {"lstm", "[4, 8, 6]", "time", "Along<1>"}));
  CHECK_FALSE(model->out->weight.grad().defined());
  using Sequences = microreg::Along<1>;
  microreg::Regularizer<Sequences, Sequences> along(model, loss, microreg::GradientNorm{}, {.micro_batch_size = 4});
  CHECK_NOTHROW((void)along.backward(Sequences(x), Sequences(y)));
  Tagger first(true);
  microreg::Regularizer f(first, loss, microreg::GradientNorm{}, {.micro_batch_size = 4});
  CHECK_NOTHROW((void)f.backward(x, y));  // [N, T, F]
  microreg::FunctionModel transposing{
      [&](const torch::Tensor& in) { return model->forward(in.transpose(0, 1)).transpose(0, 1); }, model->parameters()};
  microreg::Regularizer t(transposing, loss, microreg::GradientNorm{}, {.micro_batch_size = 4});
  CHECK_NOTHROW((void)t.backward(x, y));
  microreg::FunctionModel unnamed{[&](const torch::Tensor& in) { return model->forward(in); }, model->parameters()};
  CHECK_THROWS_AS(microreg::measure(unnamed, loss, microreg::GradientNorm{}, x, y, {.micro_batch_size = 4}),
                  BatchError);
}
