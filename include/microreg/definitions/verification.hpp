/// @file
/// Definitions of verification.hpp.
#pragma once

#include <microreg/detail/config.hpp>
#include <microreg/detail/text.hpp>
#include <microreg/verification.hpp>

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdio>
#include <ostream>

namespace microreg::inline MICROREG_ABI {

namespace detail {

/// Three digits.
inline std::string rounded(double number) {
  std::array<char, 32> letters{};
  std::snprintf(letters.data(), letters.size(), "%.3g", number);
  return letters.data();
}

inline std::string with_unit(double bytes) {
  const char* unit = "bytes";
  for (const char* larger : {"kB", "MB", "GB"}) {
    if (bytes >= 1000) {
      bytes /= 1000;
      unit = larger;
    }
  }
  return text({rounded(bytes), " ", unit});
}

inline std::string in_time(double seconds) {
  return seconds < 1 ? rounded(seconds * 1000) + " ms" : rounded(seconds) + " s";
}

/// The first five, and how many more.
inline std::string listed(const std::vector<std::string>& words) {
  constexpr std::size_t most = 5;
  std::string result;
  for (std::size_t i = 0; i < words.size() && i < most; ++i) {
    result += (i == 0 ? "" : ", ") + words[i];
  }
  return words.size() > most ? text({result, " and ", words.size() - most, " more"}) : result;
}

/// "3: convolution_backward (x 2), gelu_backward", or "nothing".
inline std::string counted(const std::map<std::string, std::int64_t>& operations) {
  std::int64_t total = 0;
  std::string names;
  for (const auto& [name, count] : operations) {
    total += count;
    names += (names.empty() ? "" : ", ") + name + (count > 1 ? text({" (x ", count, ")"}) : std::string());
  }
  return total == 0 ? "nothing" : text({total, ": ", names});
}

inline std::string parameter_sentence(const std::vector<ParameterUse>& parameters) {
  std::vector<std::string> frozen, without_loss, not_selected, without_penalty;
  std::size_t trained = 0;
  for (const ParameterUse& parameter : parameters) {
    if (parameter.frozen) {
      frozen.push_back(parameter.name);
      continue;
    }
    ++trained;
    if (!parameter.loss) {
      without_loss.push_back(parameter.name);
    }
    if (!parameter.selected) {
      not_selected.push_back(parameter.name);
    }
    if (parameter.loss && parameter.penalty == false) {
      without_penalty.push_back(parameter.name);
    }
  }
  std::string result = text({trained, " trained"});
  if (without_loss.empty() && not_selected.empty() && without_penalty.empty()) {
    result += trained == 1 ? ", which takes part" : ", all of which take part";
  }
  const auto add = [&](const char* what, const std::vector<std::string>& names) {
    if (!names.empty()) {
      result += text({"; ", what, ": ", listed(names)});
    }
  };
  add("unused by the loss", without_loss);
  add("not counted by select", not_selected);
  add("not moved by the penalties", without_penalty);
  add("frozen", frozen);
  return result;
}

}  // namespace detail

MICROREG_INLINE std::string Verification::text() const {
  using detail::rounded;
  std::string result;
  const auto line = [&](const char* topic, std::initializer_list<detail::Piece> pieces) {
    std::string start(topic);
    start.resize(std::max<std::size_t>(start.size() + 1, 12), ' ');
    result += (result.empty() ? "" : "\n") + start + detail::text(pieces);
  };
  line("verify",
       {"micro-batch 0 of ", micro_batches, ", ", micro_batch_samples, " of ", samples, " samples, ", where, ": ",
        problems.empty() ? "no problem"
                         : detail::text({problems.size(), problems.size() == 1 ? " problem" : " problems"})});
  line("loss", {rounded(loss), ", norm of its gradient ", rounded(loss_gradient_norm)});
  for (const PenaltyUse& penalty : penalties) {
    line("penalty", {penalty.name, " ", penalty.value ? rounded(*penalty.value) : std::string("not known"), " (x ",
                     rounded(penalty.strength), ")",
                     penalty.gradient_norm ? detail::text({", norm of its gradient ", rounded(*penalty.gradient_norm)})
                                           : std::string()});
  }
  if (gradient_ratio) {
    line("strength", {"penalties move the gradient by ", rounded(*gradient_ratio), " of the loss gradient's norm",
                      strength_for_one ? detail::text({"; strengths for 0.1 to 1: ", rounded(*strength_for_a_tenth),
                                                       " to ", rounded(*strength_for_one)})
                                       : std::string()});
  }
  if (!exact_refusal.empty()) {
    line("exact", {"refused: ", exact_refusal});
  } else {
    line("exact",
         {"goes through",
          fused_error ? detail::text({"; fused against LibTorch's own ", rounded(*fused_error)}) : std::string(),
          other_refusal.empty() ? std::string()
                                : detail::text({"; with the other value of .fused it is refused: ", other_refusal})});
  }
  for (const MissingSecondDerivative& each : missing) {
    line("  missing", {each.operation, each.place.empty() ? "" : " " + each.place, ": ", each.remedy});
  }
  if (!difference_refusal.empty()) {
    line("difference", {difference, " refused: ", difference_refusal});
  } else {
    line("difference",
         {difference, difference_error
                          ? detail::text({" against exact ", rounded(*difference_error)})
                          : std::string(" agrees with itself at twice its displacement, exact is not to be had")});
  }
  if (!not_frozen.empty()) {
    line("  not frozen", {detail::listed(not_frozen)});
  }
  if (!functions.empty()) {
    line("  functions", {detail::listed(functions)});
  }
  line("parameters", {detail::parameter_sentence(parameters)});
  const auto against_plain = [&](const char* what, const std::optional<Cost>& cost) {
    return cost ? detail::text({", ", what, " ", detail::in_time(cost->seconds), " (x ",
                                rounded(cost->seconds / plain.seconds), ")"})
                : std::string();
  };
  line("time", {"plain ", detail::in_time(plain.seconds), against_plain("exact", exact_cost),
                against_plain(difference.c_str(), difference_cost)});
  const auto memory = [&](const char* what, const std::optional<Cost>& cost) {
    return cost ? detail::text({", ", what, " ", detail::with_unit(static_cast<double>(cost->peak_bytes)), " (x ",
                                rounded(static_cast<double>(cost->peak_bytes) /
                                        static_cast<double>(plain.peak_bytes > 0 ? plain.peak_bytes : 1)),
                                ")"})
                : std::string();
  };
  line("memory", {"plain ", detail::with_unit(static_cast<double>(plain.peak_bytes)), memory("exact", exact_cost),
                  memory(difference.c_str(), difference_cost)});
  line("fused", {detail::counted(fused)});
  line("stock", {detail::counted(stock)});
  for (const std::string& problem : problems) {
    line("problem", {problem});
  }
  for (const std::string& note : notes) {
    line("note", {note});
  }
  return result;
}

MICROREG_INLINE std::ostream& operator<<(std::ostream& out, const Verification& verification) {
  return out << verification.text();
}

}  // namespace microreg::inline MICROREG_ABI
