/// @file
/// fmt formatters, opt-in: include this header and print a report with `fmt::print("{}\n", report)`. Printing reads the
/// numbers from the device, which synchronises it.
#pragma once

#include <fmt/format.h>
#include <microreg/report.hpp>
#include <microreg/verification.hpp>

#include <string>

/// @cond  Doxygen does not know the namespace that these stand in.

/// `step 12: loss 1.8342, gradient_norm 0.3117 (x 0.01), |grad| 0.9921, 512 samples in 4 micro-batches`.
template <>
struct fmt::formatter<microreg::Report> {
  constexpr auto parse(fmt::format_parse_context& context) { return context.begin(); }

  template <class Context>
  auto format(const microreg::Report& report, Context& context) const {
    auto out = fmt::format_to(context.out(), "step {}: loss {:.6g}", report.step, report.loss.item<double>());
    for (const microreg::PenaltyReport& penalty : report.penalties) {
      out = fmt::format_to(out, ", {} {:.6g} (x {:g})", penalty.name, penalty.value.item<double>(), penalty.strength);
    }
    if (report.gradient_norm.defined()) {
      out = fmt::format_to(out, ", |grad| {:.6g}", report.gradient_norm.item<double>());
    }
    if (report.samples == 0) {
      return out;  // a loss that Penalised was handed does not say of how many
    }
    return fmt::format_to(out, ", {} samples in {} micro-batch{}", report.samples, report.micro_batches(),
                          report.micro_batches() == 1 ? "" : "es");
  }
};

/// The lines of Verification::text().
template <>
struct fmt::formatter<microreg::Verification> {
  constexpr auto parse(fmt::format_parse_context& context) { return context.begin(); }

  template <class Context>
  auto format(const microreg::Verification& verification, Context& context) const {
    return fmt::format_to(context.out(), "{}", verification.text());
  }
};

/// @endcond
