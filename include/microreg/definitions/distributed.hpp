/// @file
/// Definitions of distributed/report.hpp and distributed/shard.hpp.
#pragma once

#include <ATen/ATen.h>
#include <ATen/Context.h>
#include <ATen/core/grad_mode.h>
#include <microreg/detail/config.hpp>
#include <microreg/detail/libtorch.hpp>
#include <microreg/detail/text.hpp>
#include <microreg/distributed/report.hpp>
#include <microreg/distributed/shard.hpp>
#include <microreg/error.hpp>
#include <microreg/step/ranks.hpp>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <utility>
#include <vector>

namespace microreg::inline MICROREG_ABI {

namespace detail {

/// Numbers of one rank, in a row, that are added up over all of them and read in the same order.
class ReducedRow {
 public:
  void write(const at::Tensor& values) { parts_.push_back(values.detach().to(at::kCPU, at::kDouble).reshape({-1})); }
  void write(double value) { write(zeros(1).fill_(value)); }
  [[nodiscard]] static at::Tensor zeros(std::int64_t count) {
    return at::zeros({count}, at::device(at::kCPU).dtype(at::kDouble));
  }

  void reduce(Communicator& communicator) {
    row_ = at::cat(parts_);
    communicator.all_reduce(row_)();
  }

  at::Tensor read(std::int64_t count) { return row_.narrow(0, std::exchange(position_, position_ + count), count); }
  double read() { return read(1).item<double>(); }

 private:
  std::vector<at::Tensor> parts_;
  at::Tensor row_;
  std::int64_t position_ = 0;
};

}  // namespace detail

MICROREG_INLINE Report reduced(const Report& report, Communicator& communicator) {
  const at::NoGradGuard no_grad;
  const at::TensorOptions scalar = report.loss.options();
  const std::int64_t all = report.all_micro_batches;
  const std::int64_t here = report.micro_batches();
  std::int64_t parts = 0;
  for (const at::Tensor& part : report.loss_parts) {
    parts += part.numel();
  }
  detail::Ranks ranks(&communicator, report.step);
  const auto shapes = ranks.meet_for_report({static_cast<double>(report.step), static_cast<double>(all),
                                             static_cast<double>(report.penalties.size()), static_cast<double>(parts),
                                             static_cast<double>(here)});
  std::int64_t all_parts = 0;  // which a rank without a sample does not know
  double micro_batches = 0;
  for (const std::vector<double>& shape : shapes) {
    if (!std::equal(shape.begin(), shape.begin() + 3, shapes.front().begin())) {
      throw OptionError(detail::text({"the ranks have reports of different steps (rank 0 of step ", shapes.front()[0],
                                      ", another one of step ", shape[0],
                                      "); call reduced() with the reports of one step on every rank"}));
    }
    all_parts = std::max(all_parts, static_cast<std::int64_t>(shape[3]));
    micro_batches += shape[4];
  }
  if (micro_batches != static_cast<double>(all)) {
    throw OptionError(
        detail::text({"the reports have ", micro_batches, " micro-batches together and their step has ", all,
                      ": they are of a Regularizer without this communicator, or reduced already; call "
                      "reduced() once, with what backward() returned on each rank"}));
  }

  detail::ReducedRow row;
  row.write(static_cast<double>(report.samples));
  row.write(report.loss.to(at::kDouble) * report.share);
  for (const at::Tensor& part : report.loss_parts) {
    row.write(part.to(at::kDouble) * report.share);
  }
  if (parts < all_parts) {
    row.write(row.zeros(all_parts - parts));
  }
  at::Tensor losses = row.zeros(all);
  losses.narrow(0, report.first_micro_batch, here).copy_(report.micro_batch_losses);
  row.write(losses);
  at::Tensor penalised = row.zeros(all);
  for (const std::int64_t i : report.penalised) {
    penalised[report.first_micro_batch + i] = 1;
  }
  row.write(penalised);
  for (const PenaltyReport& penalty : report.penalties) {
    row.write(penalty.value.to(at::kDouble) * report.share);
    at::Tensor norms = row.zeros(all);
    for (std::size_t i = 0; i < report.penalised.size(); ++i) {
      norms[report.first_micro_batch + report.penalised[i]] = penalty.micro_batch_norms[static_cast<std::int64_t>(i)];
    }
    row.write(norms);
  }
  row.reduce(communicator);

  Report result = report;
  result.first_micro_batch = 0;
  result.share = 1;
  result.samples = static_cast<std::int64_t>(row.read());
  result.loss = row.read(1).reshape({}).to(scalar);
  if (parts < all_parts) {
    result.loss_parts = row.read(all_parts).to(scalar).unbind();
  } else {
    for (at::Tensor& part : result.loss_parts) {
      part = row.read(part.numel()).reshape(part.sizes()).to(part.options());
    }
  }
  result.micro_batch_losses = row.read(all).to(scalar);
  const at::Tensor chosen = row.read(all).nonzero().reshape({-1});
  result.penalised.assign(detail::values_of<std::int64_t>(chosen),
                          detail::values_of<std::int64_t>(chosen) + chosen.numel());
  for (PenaltyReport& penalty : result.penalties) {
    penalty.value = row.read(1).reshape({}).to(penalty.value.options());
    const at::Tensor norms = row.read(all);
    penalty.micro_batch_norms =
        (chosen.numel() == 0 ? norms : norms.index_select(0, chosen)).to(penalty.micro_batch_norms.options());
  }
  return result;
}

MICROREG_INLINE Shard shard(std::int64_t samples, std::int64_t micro_batch_size, const Communicator& communicator,
                            ShortLast short_last) {
  if (micro_batch_size < 1) {
    throw OptionError(detail::text({"micro_batch_size is ", micro_batch_size, "; it must be at least 1"}));
  }
  const MicroBatches cut(samples, micro_batch_size, Weighting::samples, short_last);
  const auto begin_of = [&](std::int64_t rank) {
    const std::int64_t first = rank * cut.count() / communicator.size();
    return first < cut.count() ? cut.begin(first) : cut.samples();
  };
  const std::int64_t begin = begin_of(communicator.rank());
  return {begin, begin_of(communicator.rank() + 1) - begin};
}

MICROREG_INLINE std::uint64_t rank_seed(std::uint64_t seed, const Communicator& communicator) {
  if (communicator.rank() == 0) {
    return seed;
  }
  // splitmix64 (Steele, Lea, Flood 2014)
  std::uint64_t mixed = seed + static_cast<std::uint64_t>(communicator.rank()) * 0x9e3779b97f4a7c15U;
  mixed = (mixed ^ (mixed >> 30)) * 0xbf58476d1ce4e5b9U;
  mixed = (mixed ^ (mixed >> 27)) * 0x94d049bb133111ebU;
  return mixed ^ (mixed >> 31);
}

MICROREG_INLINE void manual_seed(std::uint64_t seed, const Communicator& communicator) {
  at::manual_seed(rank_seed(seed, communicator));
}

}  // namespace microreg::inline MICROREG_ABI
