// ProcessGroupCommunicator: ranks over LibTorch's own engine, Gloo where its headers are there.
#include "rank_helpers.hpp"

#include <microreg/distributed/process_group.hpp>

#include <chrono>
#include <mutex>
#include <thread>

using namespace rank_helpers;

TEST_CASE("a process group without a backend is refused") {
  const auto group = c10::make_intrusive<c10d::ProcessGroup>(0, 1);
  CHECK(
      helpers::has(helpers::message_of<microreg::OptionError>([&] { microreg::ProcessGroupCommunicator ranks(group); }),
                   {"no backend", "setBackend()"}));
}

#if defined(MICROREG_WITH_GLOO)

TEST_CASE("Gloo over a HashStore: two and four ranks take the step of one process") {
  for (const Cut& cut : {Cut{{10, 7}}, Cut{{4, 0, 9, 2}}}) {
    const Samples all = samples_of(cut.begin(cut.count()));
    const torch::Tensor expected = textbook(cut, all, 4, 0.3, false);
    const auto errors = thread_ranks::try_gloo_ranks(cut.count(), [&](const Ranks& ranks) {
      auto model = mlp(static_cast<std::uint64_t>(1 + ranks->rank()));
      microreg::Regularizer<> regularizer(model, cross_entropy, microreg::GradientNorm{},
                                          {.strength = 0.3, .micro_batch_size = 4, .communicator = ranks});
      const Samples mine = cut.of(all, ranks);
      regularizer.backward(mine.x, mine.y);
      const std::lock_guard lock(making);
      CHECK(relative_error(helpers::flat_grad(model->parameters()), expected) < 1e-12);
    });
    for (const auto& error : errors) {
      CHECK(words_of(error).empty());
    }
  }
}

TEST_CASE("Gloo over a HashStore: buffers of types that it does not know become those of rank 0") {
  const Samples all = samples_of(8);
  for (const auto type : {torch::kInt16, torch::kBool, torch::kComplexDouble, torch::kBFloat16}) {
    INFO(type);
    const auto errors = thread_ranks::try_gloo_ranks(2, [&](const Ranks& ranks) {
      torch::nn::Sequential model(torch::nn::Linear(6, networks::classes));
      model->to(torch::kFloat64);
      const torch::Tensor buffer = model->register_buffer("b", torch::full({3}, 1 - ranks->rank()).to(type));
      const Samples mine = all.narrow(4 * ranks->rank(), 4);
      microreg::Regularizer<>(model, cross_entropy, microreg::GradientNorm{}, {.communicator = ranks})
          .backward(mine.x, mine.y);
      const std::lock_guard lock(making);
      CHECK(torch::equal(buffer, torch::ones({3}).to(type)));
    });
    CHECK(words_of(errors[0]).empty());
    CHECK(words_of(errors[1]).empty());
  }
}

TEST_CASE("Gloo over a HashStore: the rank that does not come is named, with the step") {
  const Samples all = samples_of(12);
  const auto errors = thread_ranks::try_gloo_ranks(
      3,
      [&](const Ranks& ranks) {
        auto model = mlp();
        microreg::Regularizer<> regularizer(model, cross_entropy, microreg::GradientNorm{},
                                            {.micro_batch_size = 4, .communicator = ranks});
        const Samples mine = all.narrow(4 * ranks->rank(), 4);
        regularizer.backward(mine.x, mine.y);
        if (ranks->rank() == 1) {
          std::this_thread::sleep_for(std::chrono::seconds(6));
          return;
        }
        const torch::Tensor before = helpers::flat_grad(model->parameters());
        bool thrown = false;
        try {
          regularizer.backward(mine.x, mine.y);
        } catch (const microreg::RankError&) {
          thrown = true;
        }
        {
          const std::lock_guard lock(making);
          CHECK(thrown);
          CHECK(torch::equal(helpers::flat_grad(model->parameters()), before));
        }
        regularizer.backward(mine.x, mine.y);  // and from now on always
      },
      {.timeout = std::chrono::seconds(2), .roll_call = std::chrono::seconds(2)});
  for (const std::size_t r : {0U, 2U}) {
    CHECK(is<microreg::RankError>(errors[r]));
    CHECK(helpers::has(words_of(errors[r]), {"rank 1 does not answer", "step 1"}));
  }
}

TEST_CASE("Gloo over a HashStore: a rank that gives up in the midst of a reduction says why to the others") {
  const auto errors = thread_ranks::try_gloo_ranks(3, [&](const Ranks& ranks) {
    ranks->all_reduce(torch::zeros({3}))();  // by then all are connected
    if (ranks->rank() == 2) {
      ranks->abandon("out of memory");
      return;
    }
    ranks->all_reduce(torch::zeros({3}))();
  });
  for (const std::size_t r : {0U, 1U}) {
    CHECK(is<microreg::RankError>(errors[r]));
    CHECK(helpers::has(words_of(errors[r]), {"rank 2: out of memory"}));
  }
}

#endif
