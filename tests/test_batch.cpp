// Splitting: every kind of batch, slices, weights, and the errors of batches that cannot be split.
#include "helpers.hpp"

#include <microreg/microreg.hpp>

#include <array>
#include <cstdint>
#include <limits>
#include <map>
#include <optional>
#include <tuple>
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

/// Whether the slice [begin, begin + length) of `rows(10)` is `part`, as a view of `whole`.
bool is_view(const torch::Tensor& part, const torch::Tensor& whole, std::int64_t begin, std::int64_t length) {
  return at::equal(part, whole.narrow(0, begin, length)) && part.storage().is_alias_of(whole.storage());
}

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

TEST_CASE("the cut and its weights", "[batch]") {
  const std::int64_t samples = GENERATE(1, 4, 7, 8, 9, 100);
  const std::int64_t size = GENERATE(1, 4, 8, 1000);
  for (const auto weighting : {microreg::Weighting::samples, microreg::Weighting::reference}) {
    const microreg::MicroBatches cut(samples, size, weighting);
    std::int64_t covered = 0;
    double total = 0;
    for (std::int64_t i = 0; i < cut.count(); ++i) {
      CHECK(cut.begin(i) == covered);
      CHECK(cut.size(i) >= 1);
      CHECK(cut.size(i) <= size);
      CHECK(cut.weight(i) == Approx(weighting == microreg::Weighting::samples
                                        ? static_cast<double>(cut.size(i)) / static_cast<double>(samples)
                                        : 1.0 / static_cast<double>(cut.count())));
      covered += cut.size(i);
      total += cut.weight(i);
    }
    CHECK(covered == samples);
    CHECK(total == Approx(1.0));
    CHECK(cut.count() ==
          static_cast<std::int64_t>(std::ceil(static_cast<double>(samples) / static_cast<double>(size))));
  }
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

TEST_CASE("a loop of one's own over micro-batches", "[batch]") {
  const torch::Tensor x = rows(10);
  const torch::Tensor y = torch::arange(10);
  std::int64_t begin = 0;
  double weight = 0;
  for (const auto& [part, first, second] : microreg::micro_batches(4, x, y)) {
    CHECK(part.index == begin / 4);
    CHECK(part.count == 3);
    CHECK(part.begin == begin);
    CHECK(is_view(first, x, begin, part.size));
    CHECK(is_view(second, y, begin, part.size));
    begin += part.size;
    weight += part.weight;
  }
  CHECK(begin == 10);
  CHECK(weight == Approx(1.0));
  CHECK(microreg::micro_batches(4, x).size() == 3);
  CHECK(microreg::micro_batches(std::numeric_limits<std::int64_t>::max(), x).size() == 1);
  CHECK(has(message_of<BatchError>([&] { (void)microreg::micro_batches(4, x, y.narrow(0, 0, 9)); }), {"10", "9"}));
  CHECK(has(message_of<BatchError>([&] { (void)microreg::micro_batches(4, x.narrow(0, 0, 0)); }), {"empty"}));
  CHECK(has(message_of<microreg::OptionError>([&] { (void)microreg::micro_batches(0, x); }), {"is 0"}));
}
