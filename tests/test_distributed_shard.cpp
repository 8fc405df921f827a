// shard(), rank_seed(), manual_seed(): which samples and random numbers are those of a rank.
#include "rank_helpers.hpp"

#include <microreg/distributed/shard.hpp>

#include <cstdint>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

using namespace rank_helpers;

TEST_CASE("shard() gives the ranks the micro-batches of one process; rank_seed() is a function of seed and rank") {
  for (const std::int64_t samples : {0, 1, 7, 8, 20, 23}) {
    for (const auto last : {microreg::ShortLast::kept, microreg::ShortLast::merged, microreg::ShortLast::dropped}) {
      std::vector<microreg::Shard> shards(3);
      run_ranks(3, [&](const Ranks& ranks) {
        shards[static_cast<std::size_t>(ranks->rank())] = microreg::shard(samples, 4, *ranks, last);
      });
      const microreg::MicroBatches one(samples, 4, microreg::Weighting::samples, last);
      std::int64_t end = 0, count = 0;
      for (const microreg::Shard& shard : shards) {
        CHECK(shard.begin == end);
        CHECK(shard.begin % 4 == 0);
        end += shard.size;
        count += microreg::MicroBatches(shard.size, 4, microreg::Weighting::samples, last).count();
      }
      CHECK(end == one.samples());
      CHECK(count == one.count());
    }
  }
  std::vector<std::uint64_t> seeds(3);
  run_ranks(
      3, [&](const Ranks& ranks) { seeds[static_cast<std::size_t>(ranks->rank())] = microreg::rank_seed(17, *ranks); });
  CHECK(seeds[0] == 17);
  CHECK(seeds[1] != seeds[2]);
  CHECK(seeds[1] != 18);
}

TEST_CASE("shard() takes whole micro-batches, as evenly as they divide") {
  // Seven micro-batches of 4 and 2 samples over three ranks: two, two and three.
  const std::vector<std::pair<std::int64_t, std::int64_t>> expected{{0, 8}, {8, 8}, {16, 10}};
  run_ranks(3, [&](const Ranks& ranks) {
    const auto [begin, size] = microreg::shard(26, 4, *ranks);
    const auto empty = microreg::shard(4, 4, *ranks);  // a micro-batch for three
    std::string words;
    try {
      static_cast<void>(microreg::shard(26, 0, *ranks));
    } catch (const microreg::OptionError& error) {
      words = error.what();
    }
    const std::lock_guard lock(making);
    CHECK(std::pair(begin, size) == expected[static_cast<std::size_t>(ranks->rank())]);
    CHECK(empty.size == (ranks->rank() == 2 ? 4 : 0));
    CHECK(helpers::has(words, {"micro_batch_size is 0", "at least 1"}));
  });
}

TEST_CASE("manual_seed() seeds the default generator of each rank by its own seed") {
  run_ranks(3, [&](const Ranks& ranks) {
    const std::lock_guard lock(making);
    microreg::manual_seed(17, *ranks);
    const torch::Tensor drawn = torch::rand({5});
    torch::manual_seed(microreg::rank_seed(17, *ranks));
    CHECK(torch::equal(drawn, torch::rand({5})));
  });
}
