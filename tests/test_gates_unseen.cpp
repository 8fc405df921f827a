// What the scopes did not see: the graph of the loss against the tape. And what they refuse.
#include "gates_helpers.hpp"
#include "own_functions.hpp"

#include <microreg/gates/unseen.hpp>

#include <thread>

using namespace helpers;
using microreg::GateTape;
using microreg::Keep;
using microreg::RecordGates;
using microreg::ReplayGates;
using microreg::detail::unseen_kinks;

namespace {

torch::Tensor leaf(const std::vector<std::int64_t>& shape) {
  return torch::randn(shape, generator(1), torch::kFloat64).requires_grad_();
}

std::vector<std::string> unseen(const std::function<torch::Tensor()>& loss, bool functions = false) {
  GateTape tape;
  torch::Tensor value;
  {
    const RecordGates record(tape);
    value = loss();
  }
  return unseen_kinks(value, tape, functions);
}

using Names = std::vector<std::string>;

}  // namespace

TEST_CASE("nothing is unseen in a pass on the scope's thread", "[gates]") {
  const torch::Tensor x = leaf({2, 3, 8, 8});
  CHECK(unseen([&] {
          torch::Tensor h = torch::relu(x * 2);
          h = torch::leaky_relu(h, 0.1) + torch::clamp(h, -1, 1) + torch::hardswish(h).abs() + torch::frac(h);
          h = torch::max_pool2d(h, 2).relu_();
          h.narrow(1, 0, 2).clamp_(-0.3, 0.3);
          h.select(1, 0).relu_();
          torch::hardtanh_(h);
          h = h.floor() + std::get<0>(h.topk(2, 3)).sum() + h.amax({1}, true) + h.max() + std::get<0>(h.sort(1));
          h = torch::prelu(h, torch::ones({3}, h.options()).requires_grad_());
          return torch::smooth_l1_loss(h, torch::zeros_like(h)) + torch::norm(h, 1) + torch::norm(h);
        }).empty());
}

TEST_CASE("what another thread decides is unseen", "[gates]") {
  const torch::Tensor x = leaf({4, 6});
  const auto elsewhere = [](const std::function<torch::Tensor()>& call) {
    torch::Tensor result;
    std::thread([&] { result = call(); }).join();
    return result;
  };
  CHECK(unseen([&] { return elsewhere([&] { return torch::relu(x * 2); }).sum() + torch::relu(x).sum(); }) ==
        Names{"ReluBackward0"});
  CHECK(unseen([&] {
          torch::Tensor h = x * 2;
          elsewhere([&] { return h.narrow(1, 0, 2).clamp_(-1, 1); });
          return h.sum();
        }) == Names{"ClampBackward1"});
  CHECK(unseen([&] {
          const torch::Tensor h = elsewhere([&] { return torch::max_pool1d(x.unsqueeze(0), 2); });
          return h.sum() + elsewhere([&] { return std::get<0>(x.max(1)); }).abs().sum();
        }) == Names{"MaxBackward0", "MaxPool2DWithIndicesBackward0"});
  CHECK(unseen([&] { return elsewhere([&] { return torch::tanh(x).norm(); }); }).empty());
}

TEST_CASE("functions of one's own may be asked for", "[gates]") {
  const torch::Tensor x = leaf({4, 6});
  const auto loss = [&] { return OwnKink::apply(x).sum(); };
  CHECK(unseen(loss).empty());
  const Names names = unseen(loss, true);
  REQUIRE(names.size() == 1);
  CHECK(has(names[0], {"OwnKink"}));
}

TEST_CASE("a kink without a gate is refused by name", "[gates]") {
  GateTape tape;
  const RecordGates record(tape);
  const torch::Tensor image = leaf({1, 2, 5, 5});
  const torch::Tensor grid = torch::rand({1, 4, 4, 2}, generator(2), torch::kFloat64);
  CHECK_NOTHROW(torch::grid_sampler(image, grid, 0, 0, false));  // linear in the image
  const auto moving = [&] { torch::grid_sampler(image, grid.clone().requires_grad_(), 0, 0, false); };
  CHECK(has(message_of<microreg::GateError>(moving), {"grid_sampler_2d", "kink", "Exact", "Gates::free"}));
  CHECK(has(message_of<microreg::GateError>([&] { torch::renorm(leaf({3, 4}), 2, 0, 1); }), {"renorm"}));
  const auto bag = [&](std::int64_t mode) {
    torch::embedding_bag(leaf({9, 4}), torch::arange(6), helpers::tensor({0, 3}), false, mode);
  };
  CHECK_NOTHROW(bag(1));
  CHECK(has(message_of<microreg::GateError>([&] { bag(2); }), {"_embedding_bag"}));
  CHECK_NOTHROW(torch::renorm(leaf({3, 4}).detach(), 2, 0, 1));
}

TEST_CASE("decisions without a gradient may be made once, others not", "[gates]") {
  const torch::Tensor x = leaf({4, 6});
  GateTape tape;
  {
    const RecordGates record(tape);
    (void)(x.detach().softmax(1).argmax(1));  // samples are drawn once
    (void)torch::relu(x).sum().item<double>();
    (void)x.sum().detach();
  }
  {
    const ReplayGates replay(tape, Keep::yes);
    torch::relu(x);
    CHECK_NOTHROW(replay.finish());
  }
  {
    const ReplayGates replay(tape, Keep::yes);
    torch::relu(x);
    CHECK(has(message_of<microreg::GateError>([&] { (void)(x > 0); }), {"gt", "[4, 6]"}));
  }
  {
    const ReplayGates replay(tape, Keep::yes);
    torch::relu(x);
    CHECK_NOTHROW(x.variable_data() > 0);
  }
}

TEST_CASE("what a replay hands out may be changed", "[gates]") {
  const torch::Tensor x = leaf({4, 6});
  const auto mask = [&] {
    torch::Tensor result = x > 0;
    result &= x < 1;
    return result;
  };
  GateTape tape;
  const torch::Tensor first = [&] {
    const RecordGates record(tape);
    return mask();
  }();
  for (const Keep keep : {Keep::yes, Keep::yes, Keep::no}) {
    const ReplayGates replay(tape, keep);
    CHECK(torch::equal(mask(), first));
    replay.finish();
  }
}
