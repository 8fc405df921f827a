#include "network.hpp"

#include <algorithm>
#include <utility>

#include "libtorch_bugs.hpp"

namespace differential {

namespace {

using Sizes = std::vector<std::int64_t>;

Tensor weight_norm(const Tensor& v, const Tensor& g, const State& state) {
  return state.by_hand ? libtorch_bugs::weight_norm(v, g) : torch::_weight_norm(v, g, 0);
}

/// Adds layers to a network, each tried on two samples: where LibTorch refuses it, it is left out.
class Builder {
 public:
  explicit Builder(Random& random) : random_(random) {}

  Network build() {
    input();
    const std::int64_t layers = random_.between(1, 6);
    for (std::int64_t i = 0; i < layers; ++i) {
      any_layer();
    }
    head();
    network_.kind = kind_;
    network_.classes = x_.size(1);
    network_.outputs = x_.numel() / x_.size(0);
    return std::move(network_);
  }

 private:
  // --- parts ---

  [[nodiscard]] Tensor parameter(const Sizes& sizes, double scale, double offset = 0) {
    Tensor value = torch::randn(sizes, torch::kFloat64) * scale + offset;
    network_.state.parameters.push_back(value);
    return value;
  }
  /// The place of a new parameter.
  [[nodiscard]] std::size_t weight(const Sizes& sizes, double scale, double offset = 0) {
    (void)parameter(sizes, scale, offset);
    return network_.state.parameters.size() - 1;
  }
  [[nodiscard]] std::size_t matrix(std::int64_t out, std::int64_t in) {
    return weight({out, in}, 1 / std::sqrt(static_cast<double>(in)));
  }

  /// Tries the layer, and takes back what was added to the state since `state` if it does not fit.
  bool add(const std::string& name, Layer layer, const std::pair<std::size_t, std::size_t>& state) {
    Tensor y;
    State copy = network_.state;
    for (Tensor& buffer : copy.buffers) {
      buffer = buffer.clone();
    }
    try {
      y = layer(x_.clone(), copy);
    } catch (const std::exception&) {
    }
    if (!y.defined() || y.numel() > 20000 || y.numel() == 0) {
      network_.state.parameters.resize(state.first);
      network_.state.buffers.resize(state.second);
      return false;
    }
    x_ = y;
    network_.layers.push_back(std::move(layer));
    network_.description += (network_.description.empty() ? "" : ", ") + name;
    return true;
  }
  [[nodiscard]] std::pair<std::size_t, std::size_t> mark() const {
    return {network_.state.parameters.size(), network_.state.buffers.size()};
  }
  [[nodiscard]] std::int64_t spatial() const { return x_.dim() - 2; }

  // --- input and head ---

  void input() {
    const std::int64_t what = random_.below(10);
    if (what < 2) {
      kind_ = Kind::features;
      x_ = torch::randn({2, random_.between(2, 9)}, torch::kFloat64);
    } else if (what < 8) {
      kind_ = Kind::map;
      const std::int64_t dimensions = random_.of<std::int64_t>({1, 2, 2, 2, 2, 3});
      Sizes sizes{2, random_.of<std::int64_t>({1, 2, 3, 4, 8, 16})};
      for (std::int64_t d = 0; d < dimensions; ++d) {
        sizes.push_back(random_.between(dimensions == 3 ? 2 : 3, dimensions == 3 ? 4 : 8));
      }
      x_ = torch::randn(sizes, torch::kFloat64);
    } else if (what < 9) {
      kind_ = Kind::sequence;
      x_ = torch::randn({2, random_.between(2, 6), random_.of<std::int64_t>({2, 4, 6, 8})}, torch::kFloat64);
    } else {
      kind_ = Kind::sequence;
      constexpr std::int64_t words = 11;
      x_ = torch::randint(words, {2, random_.between(2, 6)});
      network_.input = x_;
      const auto before = mark();
      const std::size_t table = weight({words, random_.of<std::int64_t>({4, 6, 8})}, 1);
      const std::int64_t padding = random_.once_in(3) ? 0 : -1;
      add(
          padding == 0 ? "embedding with padding" : "embedding",
          [=](const Tensor& x, const State& s) { return torch::embedding(s.parameters[table], x, padding); }, before);
      return;
    }
    network_.input = x_;
    network_.description = c10::str("input ", x_.sizes());
  }

  void head() {
    const std::int64_t classes = random_.between(2, 5);
    const auto before = mark();
    if (kind_ == Kind::map && random_.once_in(4)) {  // dense: the classes of every position
      const std::size_t w = matrix(classes, x_.size(1));
      add(
          "head at every position",
          [=](const Tensor& x, const State& s) { return torch::einsum("mc...,kc->mk...", {x, s.parameters[w]}); },
          before);
      return;
    }
    if (kind_ == Kind::sequence && random_.once_in(4)) {
      const std::size_t w = matrix(classes, x_.size(2));
      kind_ = Kind::map;
      add(
          "head at every place",
          [=](const Tensor& x, const State& s) { return torch::linear(x, s.parameters[w]).transpose(1, 2); }, before);
      return;
    }
    flatten();
    linear(classes);
  }

  void flatten() {
    if (kind_ == Kind::sequence) {
      const bool last = random_.once_in(2);
      add(
          last ? "last place" : "mean over places",
          [=](const Tensor& x, const State&) { return last ? x.select(1, -1) : x.mean(1); }, mark());
    } else if (kind_ == Kind::map) {
      const bool flat = random_.once_in(3);
      add(
          flat ? "flatten" : "mean over positions",
          [=](const Tensor& x, const State&) { return flat ? x.flatten(1) : x.flatten(2).mean(2); }, mark());
    }
    kind_ = Kind::features;
  }

  // --- layers ---

  void any_layer() {
    switch (random_.below(8)) {
      case 0:
      case 1:
        return activation();
      case 2:
        return normalisation();
      case 3:
        return random_.once_in(3) ? regularisation() : composition();
      default:
        break;
    }
    switch (kind_) {
      case Kind::features:
        return linear(random_.of<std::int64_t>({3, 5, 8, 12}));
      case Kind::sequence:
        return sequence_layer();
      case Kind::map:
        return random_.once_in(4) ? pooling() : convolution();
    }
  }

  void linear(std::int64_t out) {
    const auto before = mark();
    const std::size_t w = matrix(out, x_.size(-1));
    const bool bias = !random_.once_in(3);
    const std::size_t b = bias ? weight({out}, 0.1) : 0;
    switch (random_.below(5)) {
      case 0:
        if (bias && x_.dim() == 2) {
          add(
              c10::str("addmm ", out),
              [=](const Tensor& x, const State& s) { return torch::addmm(s.parameters[b], x, s.parameters[w].t()); },
              before);
          return;
        }
        break;
      case 1: {
        const std::size_t g = weight({out, 1}, 0.2, 1);
        network_.stock_refuses = true;
        add(
            c10::str("linear with weight norm ", out),
            [=](const Tensor& x, const State& s) {
              return torch::linear(x, weight_norm(s.parameters[w], s.parameters[g], s),
                                   bias ? s.parameters[b] : Tensor());
            },
            before);
        return;
      }
      default:
        break;
    }
    add(
        c10::str("linear ", out, bias ? "" : " without bias"),
        [=](const Tensor& x, const State& s) {
          return torch::linear(x, s.parameters[w], bias ? s.parameters[b] : Tensor());
        },
        before);
  }

  struct Convolution {
    Sizes weight, stride, padding, dilation, output_padding;
    bool transposed = false;
    std::int64_t groups = 1;
  };

  void convolution() {
    const auto before = mark();
    const auto d = static_cast<std::size_t>(spatial());
    Convolution c;
    std::int64_t in = x_.size(1), out = random_.of<std::int64_t>({2, 3, 4, 8, 16});
    c.transposed = random_.once_in(6);
    for (const std::int64_t groups : {in, std::int64_t(2)}) {
      if (in % groups == 0 && out % groups == 0 && random_.once_in(5)) {
        c.groups = groups;
        break;
      }
    }
    c.weight = c.transposed ? Sizes{in, out / c.groups} : Sizes{out, in / c.groups};
    const std::int64_t kernel = random_.of<std::int64_t>({1, 2, 3, 3, 3});
    const bool uneven = random_.once_in(5);
    for (std::size_t i = 0; i < d; ++i) {
      c.weight.push_back(uneven ? random_.between(1, 3) : kernel);
      c.stride.push_back(uneven ? random_.between(1, 2) : 0);
      c.padding.push_back(uneven ? random_.between(0, 1) : 0);
      c.output_padding.push_back(0);
      c.dilation.push_back(1);
    }
    if (!uneven) {
      c.stride.assign(d, random_.of<std::int64_t>({1, 1, 1, 2, 3}));
      c.padding.assign(d, random_.between(0, kernel / 2));
      c.dilation.assign(d, random_.of<std::int64_t>({1, 1, 1, 2}));
      if (c.transposed && c.stride[0] > 1) {
        c.output_padding.assign(d, random_.between(0, 1));
      }
    }
    if (libtorch_bugs::pointwise_strided_convolution(c.weight, c.stride)) {
      in = x_.size(1);
      if ((c.transposed ? out : in) % 8 != 0 || c.groups != 1) {
        return;
      }
    }
    double fan_in = 1;
    for (std::size_t i = 1; i < c.weight.size(); ++i) {
      fan_in *= static_cast<double>(c.weight[i]);
    }
    const std::size_t w = weight(c.weight, 1 / std::sqrt(fan_in));
    const bool bias = !random_.once_in(3);
    const std::size_t b = bias ? weight({out}, 0.1) : 0;
    const bool normed = random_.once_in(8);
    network_.stock_refuses = network_.stock_refuses || normed;
    const std::size_t g = normed ? weight(
                                       [&] {
                                         Sizes sizes(c.weight.size(), 1);
                                         sizes[0] = c.weight[0];
                                         return sizes;
                                       }(),
                                       0.2, 1)
                                 : 0;
    add(
        c10::str(c.transposed ? "transposed convolution " : "convolution ", c10::IntArrayRef(c.weight), " stride ",
                 c10::IntArrayRef(c.stride), " padding ", c10::IntArrayRef(c.padding), " dilation ",
                 c10::IntArrayRef(c.dilation), " groups ", c.groups, bias ? "" : " without bias",
                 normed ? " weight norm" : ""),
        [=](const Tensor& x, const State& s) {
          const Tensor kernels = normed ? weight_norm(s.parameters[w], s.parameters[g], s) : s.parameters[w];
          return torch::convolution(x, kernels, bias ? s.parameters[b] : Tensor(), c.stride, c.padding, c.dilation,
                                    c.transposed, c.output_padding, c.groups);
        },
        before);
  }

  void pooling() {
    const auto d = static_cast<std::size_t>(spatial());
    const Sizes kernel(d, random_.between(2, 3)), stride(d, random_.between(1, 3)), padding(d, random_.between(0, 1)),
        one(d, random_.of<std::int64_t>({1, 1, 2}));
    const bool ceil = random_.once_in(3);
    const auto name = [&](const char* what) {
      return c10::str(what, " ", kernel[0], " stride ", stride[0], " padding ", padding[0], ceil ? " ceil" : "");
    };
    switch (random_.below(5)) {
      case 0:
      case 1:
        add(
            name("max pool") + c10::str(" dilation ", one[0]),
            [=](const Tensor& x, const State&) {
              return libtorch_bugs::pooled(d == 1   ? torch::max_pool1d(x, kernel, stride, padding, one, ceil)
                                           : d == 2 ? torch::max_pool2d(x, kernel, stride, padding, one, ceil)
                                                    : torch::max_pool3d(x, kernel, stride, padding, one, ceil));
            },
            mark());
        return;
      case 2:
        add(
            name("average pool"),
            [=](const Tensor& x, const State&) {
              return d == 1   ? torch::avg_pool1d(x, kernel, stride, padding, ceil)
                     : d == 2 ? torch::avg_pool2d(x, kernel, stride, padding, ceil)
                              : torch::avg_pool3d(x, kernel, stride, padding, ceil);
            },
            mark());
        return;
      case 3: {
        const bool max = random_.once_in(2);
        const Sizes size(d, random_.between(1, 3));
        add(
            c10::str(max ? "adaptive max pool " : "adaptive average pool ", size[0]),
            [=](const Tensor& x, const State&) {
              if (max) {
                return std::get<0>(d == 1   ? torch::adaptive_max_pool1d(x, size)
                                   : d == 2 ? torch::adaptive_max_pool2d(x, size)
                                            : torch::adaptive_max_pool3d(x, size));
              }
              return d == 1   ? torch::adaptive_avg_pool1d(x, size)
                     : d == 2 ? torch::adaptive_avg_pool2d(x, size)
                              : torch::adaptive_avg_pool3d(x, size);
            },
            mark());
        return;
      }
      default:
        resampling();
    }
  }

  void resampling() {
    if (spatial() != 2) {
      return;
    }
    const Sizes size{x_.size(2) + 2, x_.size(3) + 1};
    switch (random_.below(4)) {
      case 0:
        add(
            "nearest neighbours", [=](const Tensor& x, const State&) { return torch::upsample_nearest2d(x, size); },
            mark());
        return;
      case 1:
        add(
            "bilinear", [=](const Tensor& x, const State&) { return torch::upsample_bilinear2d(x, size, false); },
            mark());
        return;
      case 2:
        add(
            "reflection", [=](const Tensor& x, const State&) { return torch::reflection_pad2d(x, {1, 1, 1, 0}); },
            mark());
        return;
      default:
        add("pixels to channels", [=](const Tensor& x, const State&) { return torch::pixel_unshuffle(x, 2); }, mark());
    }
  }

  void normalisation() {
    const auto before = mark();
    const std::int64_t channels = x_.size(kind_ == Kind::sequence ? 2 : 1);
    const bool affine = !random_.once_in(4);
    const double eps = random_.of({1e-5, 1e-3, 1e-2});
    const auto scale = [&](const Sizes& sizes) { return affine ? weight(sizes, 0.3, 1) : std::size_t(0); };
    const auto shift = [&](const Sizes& sizes) { return affine ? weight(sizes, 0.3) : std::size_t(0); };
    const auto of = [affine](const State& s, std::size_t place) { return affine ? s.parameters[place] : Tensor(); };
    const char* suffix = affine ? "" : " without weights";
    std::int64_t which = random_.below(5);
    if (kind_ == Kind::sequence) {
      which = 3 + random_.below(2);
    }
    if (which == 0 || (which == 1 && kind_ == Kind::features)) {
      const std::size_t w = scale({channels}), b = shift({channels});
      const bool tracked = !random_.once_in(4), training = !tracked || !random_.once_in(5);
      const std::size_t m = network_.state.buffers.size();
      if (tracked) {
        network_.state.buffers.push_back(torch::zeros({channels}, torch::kFloat64));
        network_.state.buffers.push_back(torch::ones({channels}, torch::kFloat64));
      }
      add(
          c10::str("batch norm", suffix, tracked ? "" : " untracked", training ? "" : " in evaluation mode"),
          [=](const Tensor& x, const State& s) {
            const Tensor y = torch::batch_norm(x, of(s, w), of(s, b), tracked ? s.buffers[m] : Tensor(),
                                               tracked ? s.buffers[m + 1] : Tensor(), training, 0.1, eps, true);
            return s.by_libtorch ? libtorch_bugs::normalised(y, x) : y;
          },
          before);
    } else if (which == 1) {
      const std::size_t w = scale({channels}), b = shift({channels});
      add(
          c10::str("instance norm", suffix),
          [=](const Tensor& x, const State& s) {
            const Tensor y = torch::instance_norm(x, of(s, w), of(s, b), {}, {}, true, 0.1, eps, true);
            return s.by_libtorch ? libtorch_bugs::normalised(y, x.detach().contiguous().clone()) : y;
          },
          before);
    } else if (which == 2) {
      const std::int64_t groups = channels % 2 == 0 && random_.once_in(2) ? 2 : random_.once_in(3) ? channels : 1;
      const std::size_t w = scale({channels}), b = shift({channels});
      add(
          c10::str("group norm ", groups, suffix),
          [=](const Tensor& x, const State& s) {
            const auto group_norm = [&](const Tensor& in) {
              return torch::group_norm(in, groups, of(s, w), of(s, b), eps);
            };
            return s.by_libtorch ? libtorch_bugs::group_normalised(x, group_norm) : group_norm(x);
          },
          before);
    } else {
      const bool all = kind_ == Kind::map || random_.once_in(4);
      const Sizes shape = all ? x_.sizes().slice(1).vec() : Sizes{x_.size(-1)};
      const std::size_t w = scale(shape), b = shift(shape);
      if (which == 4) {
        add(
            c10::str("root-mean-square norm", suffix),
            [=](const Tensor& x, const State& s) { return torch::rms_norm(x, shape, of(s, w), eps); }, before);
      } else {
        add(
            c10::str("layer norm", suffix),
            [=](const Tensor& x, const State& s) { return torch::layer_norm(x, shape, of(s, w), of(s, b), eps); },
            before);
      }
    }
  }

  void activation() {
    struct Named {
      const char* name;
      Tensor (*function)(const Tensor&);
    };
    static constexpr Named all[] = {
        {"relu", [](const Tensor& x) { return torch::relu(x); }},
        {"relu in place",
         [](const Tensor& x) {
           Tensor y = x * 1;
           return torch::relu_(y);
         }},
        {"leaky relu", [](const Tensor& x) { return torch::leaky_relu(x, 0.1); }},
        {"relu6", [](const Tensor& x) { return torch::relu6(x * 3); }},
        {"hardtanh", [](const Tensor& x) { return torch::hardtanh(x, -0.7, 1.1); }},
        {"hardswish", [](const Tensor& x) { return torch::hardswish(2 * x); }},
        {"threshold", [](const Tensor& x) { return torch::threshold(x, 0.2, -0.1); }},
        {"softshrink", [](const Tensor& x) { return torch::softshrink(x, 0.2); }},
        {"hardshrink", [](const Tensor& x) { return torch::hardshrink(x, 0.2); }},
        {"abs", [](const Tensor& x) { return x.abs(); }},
        {"clamp", [](const Tensor& x) { return x.clamp(-0.5, 0.8); }},
        {"clamp_min", [](const Tensor& x) { return x.clamp_min(-0.1); }},
        {"maximum", [](const Tensor& x) { return torch::maximum(x, 0.3 * x.flip(1)); }},
        {"where", [](const Tensor& x) { return torch::where(x > 0, x, 0.3 * x); }},
        {"elu", [](const Tensor& x) { return torch::elu(x); }},
        {"selu", [](const Tensor& x) { return torch::selu(x); }},
        {"celu", [](const Tensor& x) { return torch::celu(x, 0.7); }},
        {"gelu", [](const Tensor& x) { return torch::gelu(x); }},
        {"gelu tanh", [](const Tensor& x) { return torch::gelu(x, "tanh"); }},
        {"silu", [](const Tensor& x) { return torch::silu(x); }},
        {"mish", [](const Tensor& x) { return torch::mish(x); }},
        {"softplus", [](const Tensor& x) { return torch::softplus(x, 2); }},
        {"logsigmoid", [](const Tensor& x) { return torch::log_sigmoid(x); }},
        {"tanh", [](const Tensor& x) { return torch::tanh(x); }},
        {"sigmoid", [](const Tensor& x) { return torch::sigmoid(x); }},
        {"square", [](const Tensor& x) { return x.square() * 0.5; }},
        {"sin", [](const Tensor& x) { return x.sin(); }},
        {"softmax", [](const Tensor& x) { return torch::softmax(x, 1) * 3; }},
        {"log_softmax", [](const Tensor& x) { return torch::log_softmax(x, 1); }},
        {"softmax of the last", [](const Tensor& x) { return torch::softmax(2 * x, -1) * 3; }},
        {"glu", [](const Tensor& x) { return torch::glu(x, 1); }},
    };
    if (random_.once_in(20)) {
      network_.stock_refuses = true;
      add(
          "hardsigmoid",
          [](const Tensor& x, const State& s) {
            return s.by_hand ? libtorch_bugs::hardsigmoid(2 * x) : torch::hardsigmoid(2 * x);
          },
          mark());
      return;
    }
    if (random_.once_in(20)) {
      const auto before = mark();
      const std::size_t slope = weight({1}, 0.1, 0.25);
      add("prelu", [=](const Tensor& x, const State& s) { return torch::prelu(x, s.parameters[slope]); }, before);
      return;
    }
    // The most common one as often as all others.
    const Named& chosen = random_.once_in(3) ? all[0] : all[random_.below(std::size(all))];
    add(chosen.name, [function = chosen.function](const Tensor& x, const State&) { return function(x); }, mark());
  }

  void regularisation() {
    const bool whole = kind_ == Kind::map && random_.once_in(2);
    add(
        whole ? "feature dropout" : "dropout",
        [=](const Tensor& x, const State&) {
          return whole ? torch::feature_dropout(x, 0.2, true) : torch::dropout(x, 0.2, true);
        },
        mark());
  }

  /// Residual connections, concatenations, changes of layout.
  void composition() {
    switch (random_.below(5)) {
      case 0:
        if (x_.dim() >= 4) {
          add(
              "to channels-last",
              [](const Tensor& x, const State&) {
                return x.contiguous(x.dim() == 4 ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::ChannelsLast3d);
              },
              mark());
          return;
        }
        break;
      case 1:
        if (x_.dim() >= 3) {
          add("transpose", [](const Tensor& x, const State&) { return x.transpose(-1, -2); }, mark());
          return;
        }
        break;
      case 2:
        add("flip", [](const Tensor& x, const State&) { return x.flip(1) + 0.5 * x; }, mark());
        return;
      default:
        break;
    }
    // The layers added inside are taken out again, and run as one.
    const std::size_t first = network_.layers.size();
    const auto before = mark();
    const Tensor x = x_;
    const Kind kind = kind_;
    network_.description += "; (";
    const std::int64_t inside = random_.between(1, 3);
    for (std::int64_t i = 0; i < inside && depth_ < 2; ++i) {
      ++depth_;
      any_layer();
      --depth_;
    }
    const std::vector<Layer> branch(network_.layers.begin() + static_cast<std::ptrdiff_t>(first),
                                    network_.layers.end());
    network_.layers.resize(first);
    const bool sum = x_.sizes() == x.sizes();
    x_ = x;
    kind_ = kind;
    const bool added = !branch.empty() && add(
                                              sum ? ") added" : ") concatenated",
                                              [=](const Tensor& in, const State& s) {
                                                Tensor y = in;
                                                for (const Layer& layer : branch) {
                                                  y = layer(y, s);
                                                }
                                                return sum ? in + y : torch::cat({in, y}, 1);
                                              },
                                              before);
    if (!added) {
      network_.description += ") left out";
    }
  }

  void sequence_layer() {
    const auto before = mark();
    const std::int64_t features = x_.size(2);
    switch (random_.below(4)) {
      case 0:
        return linear(random_.of<std::int64_t>({4, 6, 8}));
      case 1: {
        const std::size_t in = matrix(3 * features, features), out = matrix(features, features);
        const std::int64_t heads = features % 2 == 0 ? 2 : 1;
        const bool causal = random_.once_in(2), library = random_.once_in(2);
        add(
            c10::str(library ? "scaled_dot_product_attention" : "attention", causal ? " causal" : ""),
            [=](const Tensor& x, const State& s) {
              const auto parts = torch::linear(x, s.parameters[in]).chunk(3, -1);
              const auto split = [&](const Tensor& t) {
                return t.unflatten(2, {heads, features / heads}).transpose(1, 2);
              };
              Tensor y;
              if (library) {
                y = std::get<0>(torch::_scaled_dot_product_attention_math(split(parts[0]), split(parts[1]),
                                                                          split(parts[2]), {}, 0.0, causal));
              } else {
                Tensor scores = torch::matmul(split(parts[0]), split(parts[1]).transpose(2, 3));
                if (causal) {
                  const Tensor later = torch::ones(scores.sizes().slice(2), torch::kBool).triu(1);
                  scores = scores.masked_fill(later, -std::numeric_limits<double>::infinity());
                }
                y = torch::matmul(torch::softmax(scores, -1), split(parts[2]));
              }
              return x + torch::linear(y.transpose(1, 2).flatten(2), s.parameters[out]);
            },
            before);
        return;
      }
      case 2:
        return recurrent();
      default: {
        const std::size_t w = weight({features, features, 3}, 1 / std::sqrt(3.0 * static_cast<double>(features)));
        add(
            "convolution over places",
            [=](const Tensor& x, const State& s) {
              return torch::conv1d(x.transpose(1, 2), s.parameters[w], {}, 1, 1).transpose(1, 2);
            },
            before);
      }
    }
  }

  void recurrent() {
    const auto before = mark();
    const std::int64_t in = x_.size(2), hidden = random_.of<std::int64_t>({3, 4}), which = random_.below(3);
    const bool both = random_.once_in(3);
    const std::int64_t gates = which == 0 ? 4 : which == 1 ? 3 : 1;
    const std::size_t first = network_.state.parameters.size();
    for (int direction = 0; direction < (both ? 2 : 1); ++direction) {
      (void)matrix(gates * hidden, in);
      (void)matrix(gates * hidden, hidden);
      (void)weight({gates * hidden}, 0.1);
      (void)weight({gates * hidden}, 0.1);
    }
    const std::size_t last = network_.state.parameters.size();
    add(
        c10::str(which == 0   ? "lstm "
                 : which == 1 ? "gru "
                              : "rnn ",
                 hidden, both ? " both ways" : ""),
        [=](const Tensor& x, const State& s) {
          const Tensors weights(s.parameters.begin() + static_cast<std::ptrdiff_t>(first),
                                s.parameters.begin() + static_cast<std::ptrdiff_t>(last));
          const Tensor zero = torch::zeros({both ? 2 : 1, x.size(0), hidden}, x.options());
          if (which == 0) {
            return std::get<0>(torch::lstm(x, {zero, zero}, weights, true, 1, 0, true, both, true));
          }
          return std::get<0>(which == 1 ? torch::gru(x, zero, weights, true, 1, 0, true, both, true)
                                        : torch::rnn_tanh(x, zero, weights, true, 1, 0, true, both, true));
        },
        before);
  }

  Random& random_;
  Network network_;
  Tensor x_;
  Kind kind_ = Kind::features;
  int depth_ = 0;
};

}  // namespace

Tensor Network::operator()(const Tensor& x, const State& of) const {
  Tensor y = x;
  for (const Layer& layer : layers) {
    y = layer(y, of);
  }
  return y;
}

Network random_network(Random& random) { return Builder(random).build(); }

}  // namespace differential
