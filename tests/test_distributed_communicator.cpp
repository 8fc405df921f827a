// Communicator: what a step asks of an engine of one's own, in five functions.
#include "rank_helpers.hpp"

#include <microreg/distributed/communicator.hpp>

#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

using namespace rank_helpers;

namespace {

/// What it is handed, in order, and how often its sums were waited for.
class Engine final : public microreg::Communicator {
 public:
  explicit Engine(Ranks inner) : inner_(std::move(inner)) {}
  [[nodiscard]] std::int64_t rank() const override { return inner_->rank(); }
  [[nodiscard]] std::int64_t size() const override { return inner_->size(); }
  void abandon(const std::string& why) noexcept override { inner_->abandon(why); }

  std::vector<torch::Tensor> handed;
  std::vector<int> waited;

 private:
  std::function<void()> begin_all_reduce(const torch::Tensor& flat) override {
    handed.push_back(flat);
    waited.push_back(0);
    return [this, i = waited.size() - 1, wait = inner_->all_reduce(flat)] {
      ++waited[i];
      wait();
    };
  }
  void do_broadcast(const torch::Tensor& flat, std::int64_t root) override {
    handed.push_back(flat);
    inner_->broadcast(flat, root);
  }

  Ranks inner_;
};

}  // namespace

static_assert(!std::is_copy_constructible_v<Engine> && !std::is_copy_assignable_v<Engine>);

TEST_CASE("all_reduce() and broadcast() reach the engine, and count their bytes") {
  run_ranks(3, [](const Ranks& inner) {
    Engine ranks(inner);
    const auto own = static_cast<double>(ranks.rank());
    const torch::Tensor sum = torch::full({5}, own, torch::kFloat64), from_one = torch::full({3}, own);
    const auto wait = ranks.all_reduce(sum);
    const int waited = ranks.waited[0];
    wait();
    ranks.broadcast(from_one, 1);
    const std::lock_guard lock(making);
    CHECK(waited == 0);
    CHECK(ranks.waited[0] == 1);
    CHECK(torch::equal(sum, torch::full({5}, 3.0, torch::kFloat64)));
    CHECK(torch::equal(from_one, torch::ones({3})));
    CHECK(ranks.bytes() == 5 * 8 + 3 * 4);
  });
}

TEST_CASE("A step hands an engine flat tensors, alike on all ranks, and waits once for each sum") {
  const Cut cut{{8, 0, 5}};
  const Samples all = samples_of(13);
  const torch::Tensor expected = textbook(cut, all, 4, 0.3, false);
  std::vector<std::vector<std::string>> handed(3);
  run_ranks(3, [&](const Ranks& inner) {
    const auto ranks = std::make_shared<Engine>(inner);
    auto model = mlp();
    microreg::Regularizer<> regularizer(model, cross_entropy, microreg::GradientNorm{},
                                        {.strength = 0.3, .micro_batch_size = 4, .communicator = ranks});
    const Samples mine = cut.of(all, ranks);
    regularizer.backward(mine.x, mine.y);
    const std::lock_guard lock(making);
    CHECK(relative_error(helpers::flat_grad(model->parameters()), expected) < 1e-12);
    std::uint64_t bytes = 0;
    for (const torch::Tensor& flat : ranks->handed) {
      CHECK(flat.dim() == 1);
      CHECK(flat.is_contiguous());
      bytes += flat.nbytes();
      handed[static_cast<std::size_t>(ranks->rank())].push_back(c10::str(flat.scalar_type(), flat.sizes()));
    }
    CHECK(ranks->bytes() == bytes);
    for (const int count : ranks->waited) {
      CHECK(count == 1);
    }
  });
  CHECK(handed[0] == handed[1]);
  CHECK(handed[0] == handed[2]);
}
