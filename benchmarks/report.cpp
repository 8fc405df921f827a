#include "report.hpp"

#include "networks.hpp"

#include <fmt/format.h>

#include <nlohmann/json.hpp>

#include <cstdio>
#include <fstream>
#include <stdexcept>
#include <utility>

namespace overhead {

namespace {

using Json = nlohmann::ordered_json;

std::string number_or_dash(const std::optional<double>& value, int digits) {
  return value.has_value() ? fmt::format("{:.{}f}", *value, digits) : "-";
}

Json number_or_null(const std::optional<double>& value) { return value.has_value() ? Json(*value) : Json(nullptr); }

void print_line(const std::string& line) {
  fmt::print("{}\n", line);
  std::fflush(stdout);  // a row is news when it is there
}

void write(const std::string& file, const Json& json) {
  std::ofstream stream(file);
  stream << json.dump(2) << '\n';
  if (!stream.flush()) {
    throw std::runtime_error("cannot write " + file);
  }
}

/// An array of one object a row: what was run, and what `measured(row)` says of it.
template <class AnyRow, class Measured>
void write_objects(const std::string& file, const std::vector<AnyRow>& rows, int threads, const Measured& measured) {
  Json array = Json::array();
  for (const AnyRow& row : rows) {
    const Case& c = row.which;
    Json object{{"model", c.model},     {"layout", c.layout},       {"micro_batch", c.micro_batch},
                {"penalty", c.penalty}, {"estimator", c.estimator}, {"fused", c.fused},
                {"threads", threads},   {"device", c.device},       {"autocast", c.autocast}};
    object.update(measured(row));
    array.push_back(std::move(object));
  }
  write(file, array);
}

}  // namespace

void print_header() {
  print_line(fmt::format("{:<13} {:<14} {:>4}  {:<17} {:<14} {:<6} {:>9} {:>7} {:>7} {:>9} {:>7}", "model", "layout",
                         "|M|", "penalty", "estimator", "fused", "plain ms", "ratio", "memory", "error", "rounds"));
}

void print_row(const Row& row) {
  const Case& c = row.which;
  print_line(fmt::format(
      "{:<13} {:<14} {:>4}  {:<17} {:<14} {:<6} {:>9.1f} {:>7.2f} {:>7} {:>9} {:>7}", c.model, c.layout, c.micro_batch,
      c.penalty, c.estimator, c.fused ? "yes" : "no", row.plain_ms, row.ratio, number_or_dash(row.peak_memory_ratio, 2),
      row.relative_error.has_value() ? fmt::format("{:.1e}", *row.relative_error) : "-", row.rounds));
}

void print_sweep_header(const std::string& title) {
  print_line(fmt::format("\n{}\n{:>5} {:>5} {:>6} {:>10} {:>7} {:>14} {:>15}", title, "|B|", "|M|", "share", "plain ms",
                         "ratio", "relative time", "peak memory MB"));
}

void print_sweep_row(const SweepRow& row) {
  print_line(fmt::format("{:>5} {:>5} {:>6g} {:>10.1f} {:>7.2f} {:>14.2f} {:>15}", row.which.batch_size(),
                         row.which.micro_batch, row.which.micro_batch_share, row.plain_ms, row.ratio, row.relative_time,
                         number_or_dash(row.peak_memory_mb, 1)));
}

void write_json(const std::string& file, const std::vector<Row>& rows, int threads) {
  write_objects(file, rows, threads, [](const Row& row) {
    return Json{{"batch_norm", network(row.which.model).batch_norm},
                {"plain_ms", row.plain_ms},
                {"ratio", row.ratio},
                {"peak_memory_ratio", number_or_null(row.peak_memory_ratio)},
                {"relative_error", number_or_null(row.relative_error)}};
  });
}

void write_json(const std::string& file, const std::vector<SweepRow>& rows, int threads) {
  write_objects(file, rows, threads, [](const SweepRow& row) {
    return Json{{"sweep", row.sweep},
                {"batch", row.which.batch_size()},
                {"micro_batch_share", row.which.micro_batch_share},
                {"plain_ms", row.plain_ms},
                {"ratio", row.ratio},
                {"relative_time", row.relative_time},
                {"peak_memory_mb", number_or_null(row.peak_memory_mb)}};
  });
}

}  // namespace overhead
