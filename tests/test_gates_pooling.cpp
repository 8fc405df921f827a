// Max pooling of every kind: the elements of the first pass, found by hand with loops over windows.
#include "gates_helpers.hpp"

#include <array>

using namespace helpers;

namespace {

using Three = std::array<std::int64_t, 3>;

struct Window {
  Three begin;
  Three step;
  Three count;
};

/// For every plane of `first` (its leading dimensions flattened) and every output position, the largest element of the
/// window there, and what `second` holds at the same place.
torch::Tensor pool_by_hand(const torch::Tensor& first, const torch::Tensor& second, std::int64_t dimensions,
                           torch::IntArrayRef output_shape, const std::function<Window(Three)>& window) {
  Three in{1, 1, 1};
  Three out{1, 1, 1};
  for (std::int64_t d = 0; d < dimensions; ++d) {
    in[static_cast<std::size_t>(2 - d)] = first.size(-1 - d);
    out[static_cast<std::size_t>(2 - d)] = output_shape[output_shape.size() - 1 - static_cast<std::size_t>(d)];
  }
  const std::int64_t volume = in[0] * in[1] * in[2];
  const torch::Tensor flat =
      first.detach().contiguous().to(torch::kCPU, torch::kFloat64).view({-1, volume}).contiguous();
  std::vector<std::int64_t> taken;
  for (std::int64_t plane = 0; plane < flat.size(0); ++plane) {
    const double* const values = flat.data_ptr<double>() + plane * volume;
    for (Three o{}; o[0] < out[0]; ++o[0]) {
      for (o[1] = 0; o[1] < out[1]; ++o[1]) {
        for (o[2] = 0; o[2] < out[2]; ++o[2]) {
          const Window w = window(o);
          std::int64_t best = -1;
          for (Three k{}; k[0] < w.count[0]; ++k[0]) {
            for (k[1] = 0; k[1] < w.count[1]; ++k[1]) {
              for (k[2] = 0; k[2] < w.count[2]; ++k[2]) {
                std::int64_t at = 0;
                bool inside = true;
                for (std::size_t d = 0; d < 3; ++d) {
                  const std::int64_t x = w.begin[d] + k[d] * w.step[d];
                  inside = inside && x >= 0 && x < in[d];
                  at = at * in[d] + x;
                }
                if (inside && (best < 0 || values[at] > values[best])) {
                  best = at;
                }
              }
            }
          }
          taken.push_back(plane * volume + best);
        }
      }
    }
  }
  return second.flatten().index_select(0, helpers::tensor(taken)).view(output_shape);
}

struct Geometry {
  std::int64_t kernel;
  std::int64_t stride;
  std::int64_t padding;
  std::int64_t dilation;
  bool ceil;
};

std::vector<Tensors> two_points(const std::vector<std::int64_t>& shape, torch::Dtype type,
                                torch::MemoryFormat format = torch::MemoryFormat::Contiguous) {
  std::vector<Tensors> result;
  for (const std::uint64_t seed : {1U, 2U}) {
    auto draw = generator(seed);
    torch::Tensor x = torch::randn(shape, draw, torch::kFloat64).to(type);
    result.push_back({format == torch::MemoryFormat::Contiguous ? x : x.contiguous(format)});
  }
  return result;
}

void check_max_pool(std::int64_t dimensions, const std::vector<std::int64_t>& shape, Geometry g, torch::Dtype type,
                    torch::MemoryFormat format = torch::MemoryFormat::Contiguous) {
  INFO(dimensions << "d, shape " << shape << ", kernel " << g.kernel << ", stride " << g.stride << ", padding "
                  << g.padding << ", dilation " << g.dilation << ", ceil " << g.ceil << ", " << format);
  const auto pool = [=](const Tensors& at) {
    switch (dimensions) {
      case 1:
        return torch::max_pool1d(at[0], g.kernel, g.stride, g.padding, g.dilation, g.ceil);
      case 2:
        return torch::max_pool2d(at[0], g.kernel, g.stride, g.padding, g.dilation, g.ceil);
      default:
        return torch::max_pool3d(at[0], g.kernel, g.stride, g.padding, g.dilation, g.ceil);
    }
  };
  const auto where_to = two_points(shape, type, format);
  const torch::Tensor stock = pool(where_to[0]);
  const auto window = [=](Three o) {
    Window w{{0, 0, 0}, {1, 1, 1}, {1, 1, 1}};
    for (std::size_t d = static_cast<std::size_t>(3 - dimensions); d < 3; ++d) {
      w.begin[d] = o[d] * g.stride - g.padding;
      w.step[d] = g.dilation;
      w.count[d] = g.kernel;
    }
    return w;
  };
  const char* const name = dimensions == 3 ? "max_pool3d_with_indices" : "max_pool2d_with_indices";
  check_gates({name, where_to, pool,
               [=](const Tensors& first, const Tensors& second) {
                 return pool_by_hand(first[0], second[0], dimensions, stock.sizes(), window);
               }},
              8);
  microreg::GateTape tape;
  {
    const microreg::RecordGates record(tape);
    pool(where_to[0]);
  }
  const microreg::ReplayGates replay(tape, microreg::Keep::no);
  CHECK(pool(leaves(where_to[1])).strides() == stock.strides());
}

const std::vector<Geometry> geometries = {
    {2, 2, 0, 1, false}, {3, 2, 1, 1, false}, {3, 1, 1, 1, true}, {2, 3, 0, 2, true}, {3, 2, 0, 1, true}};

}  // namespace

TEST_CASE("gates of max pooling in one, two and three dimensions", "[gates]") {
  for (const Geometry& geometry : geometries) {
    for (const torch::Dtype type : {torch::kFloat64, torch::kFloat32}) {
      check_max_pool(1, {3, 4, 11}, geometry, type);
      check_max_pool(1, {4, 11}, geometry, type);
      check_max_pool(2, {2, 3, 9, 8}, geometry, type);
      check_max_pool(2, {3, 9, 8}, geometry, type);
      check_max_pool(2, {2, 3, 9, 8}, geometry, type, torch::MemoryFormat::ChannelsLast);
      check_max_pool(3, {2, 3, 5, 7, 6}, geometry, type);
      check_max_pool(3, {2, 5, 7, 6}, geometry, type);
      check_max_pool(3, {2, 3, 5, 7, 6}, geometry, type, torch::MemoryFormat::ChannelsLast3d);
    }
  }
}

TEST_CASE("gates of adaptive max pooling in one, two and three dimensions", "[gates]") {
  const Three in{5, 8, 7};
  for (const torch::Dtype type : {torch::kFloat64, torch::kFloat32}) {
    for (const std::int64_t size : {1, 2, 3, 5}) {
      for (const std::int64_t dimensions : {1, 2, 3}) {
        for (const bool batched : {false, true}) {
          INFO(dimensions << "d to " << size << ", batched " << batched);
          std::vector<std::int64_t> shape{4};
          if (batched) {
            shape.insert(shape.begin(), 2);
          }
          for (std::int64_t d = 3 - dimensions; d < 3; ++d) {
            shape.push_back(in[static_cast<std::size_t>(d)]);
          }
          const std::vector<std::int64_t> sizes(static_cast<std::size_t>(dimensions), size);
          const auto pool = [=](const Tensors& at) {
            switch (dimensions) {
              case 1:
                return std::get<0>(torch::adaptive_max_pool1d(at[0], sizes));
              case 2:
                return std::get<0>(torch::adaptive_max_pool2d(at[0], sizes));
              default:
                return std::get<0>(torch::adaptive_max_pool3d(at[0], sizes));
            }
          };
          const auto window = [=](Three o) {
            Window w{{0, 0, 0}, {1, 1, 1}, {1, 1, 1}};
            for (auto d = static_cast<std::size_t>(3 - dimensions); d < 3; ++d) {
              w.begin[d] = o[d] * in[d] / size;
              w.count[d] = ((o[d] + 1) * in[d] + size - 1) / size - w.begin[d];
            }
            return w;
          };
          std::vector<std::int64_t> output_shape(shape.begin(), shape.end() - dimensions);
          output_shape.insert(output_shape.end(), sizes.begin(), sizes.end());
          check_gates({dimensions == 3 ? "adaptive_max_pool3d" : "adaptive_max_pool2d", two_points(shape, type), pool,
                       [=](const Tensors& first, const Tensors& second) {
                         return pool_by_hand(first[0], second[0], dimensions, output_shape, window);
                       }},
                      8);
        }
      }
    }
  }
}

TEST_CASE("gates of fractional max pooling", "[gates]") {
  const auto where_to = two_points({2, 3, 9, 9}, torch::kFloat64);
  const torch::Tensor samples = torch::rand({2, 3, 2}, generator(6), torch::kFloat64);
  const auto pool = [=](const Tensors& at) { return torch::fractional_max_pool2d(at[0], {2, 2}, {5, 5}, samples); };
  const torch::Tensor indices = std::get<1>(pool(where_to[0]));
  check_gates(
      {"fractional_max_pool2d", where_to, [=](const Tensors& at) { return std::get<0>(pool(at)); },
       [=](const Tensors& /*first*/, const Tensors& second) {
         const torch::Tensor planes = torch::arange(6).view({6, 1}) * 81;
         return second[0].flatten().index_select(0, (indices.view({6, -1}) + planes).flatten()).view_as(indices);
       }});
  const auto in_space = two_points({2, 3, 6, 6, 6}, torch::kFloat64);
  const torch::Tensor more = torch::rand({2, 3, 3}, generator(6), torch::kFloat64);
  const auto pool3 = [=](const Tensors& at) { return torch::fractional_max_pool3d(at[0], {2, 2, 2}, {3, 3, 3}, more); };
  const torch::Tensor there = std::get<1>(pool3(in_space[0]));
  check_gates({"fractional_max_pool3d", in_space, [=](const Tensors& at) { return std::get<0>(pool3(at)); },
               [=](const Tensors& /*first*/, const Tensors& second) {
                 const torch::Tensor planes = torch::arange(6).view({6, 1}) * 216;
                 return second[0].flatten().index_select(0, (there.view({6, -1}) + planes).flatten()).view_as(there);
               }});
}

TEST_CASE("max pooling without a gradient has gates too", "[gates]") {
  const auto where_to = two_points({2, 3, 10}, torch::kFloat64);
  const auto window = [](Three o) { return Window{{0, 0, o[2] * 2}, {1, 1, 1}, {1, 1, 2}}; };
  microreg::GateTape tape;
  {
    const microreg::RecordGates record(tape);
    CHECK(same_bits(torch::max_pool1d(where_to[0][0], 2),
                    pool_by_hand(where_to[0][0], where_to[0][0], 1, {2, 3, 5}, window)));
  }
  const microreg::ReplayGates replay(tape, microreg::Keep::no);
  CHECK(same_bits(torch::max_pool1d(where_to[1][0], 2),
                  pool_by_hand(where_to[0][0], where_to[1][0], 1, {2, 3, 5}, window)));
}

TEST_CASE("replayed max pooling returns the indices of the first pass", "[gates]") {
  const auto where_to = two_points({2, 3, 10, 10}, torch::kFloat64);
  const torch::Tensor first = std::get<1>(torch::max_pool2d_with_indices(where_to[0][0], 2));
  REQUIRE_FALSE(same_bits(first, std::get<1>(torch::max_pool2d_with_indices(where_to[1][0], 2))));
  microreg::GateTape tape;
  {
    const microreg::RecordGates record(tape);
    CHECK(same_bits(std::get<1>(torch::max_pool2d_with_indices(where_to[0][0], 2)), first));
  }
  const microreg::ReplayGates replay(tape, microreg::Keep::no);
  CHECK(same_bits(std::get<1>(torch::max_pool2d_with_indices(where_to[1][0], 2)), first));
}
