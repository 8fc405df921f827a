#include "synthetic.hpp"

#include "random_streams.hpp"

namespace cifar {

namespace {

constexpr std::int64_t classes = 10;
constexpr std::int64_t side = 32;
constexpr double wrong_label_share = 0.15;
constexpr double pi = 3.14159265358979323846;

/// Draws [count, 1, 1], one number an image.
class Draw {
 public:
  Draw(std::int64_t count, at::Generator generator) : count_(count), generator_(std::move(generator)) {}

  torch::Tensor uniform(double low, double high) {
    return torch::empty({count_, 1, 1}).uniform_(low, high, generator_);
  }
  torch::Tensor normal(std::vector<std::int64_t> shape) { return torch::empty(shape).normal_(0, 1, generator_); }
  torch::Tensor integers(std::int64_t low, std::int64_t high) {
    return torch::randint(low, high, {count_}, generator_, torch::kInt64);
  }

 private:
  std::int64_t count_;
  at::Generator generator_;
};

/// The five patterns at once, picked by label / 2; label % 2 says coarse or fine. Values in [-1, 1], [N, S, S].
torch::Tensor pattern(const torch::Tensor& labels, const torch::Tensor& u, const torch::Tensor& v, Draw& draw) {
  const torch::Tensor fine = (labels % 2).to(torch::kFloat).view({-1, 1, 1});
  const torch::Tensor wavelength = (10.0 - 4.0 * fine) * draw.uniform(0.85, 1.15);
  const torch::Tensor wave = 2 * pi / wavelength;
  const torch::Tensor phase = draw.uniform(0, 2 * pi);
  const torch::Tensor stripes_u = (wave * u + phase).cos();
  const torch::Tensor stripes_v = (wave * v + phase).cos();
  const torch::Tensor rings = (wave * (u.square() + v.square()).sqrt() + phase).cos();
  const torch::Tensor rays = ((4 + 4 * fine) * torch::atan2(v, u) + phase).cos();
  const torch::Tensor all = torch::stack({stripes_v, stripes_u, stripes_u * stripes_v, rings, rays}, 1);
  const torch::Tensor kind = labels.div(2, "floor").view({-1, 1, 1, 1}).expand({-1, 1, side, side});
  return all.gather(1, kind).squeeze(1);
}

/// Each pattern has a favourite hue, which varies too much to tell the classes apart by colour alone: the easy part,
/// which a network learns first. [N, 3, 1, 1], of mean zero over the channels.
torch::Tensor hue_of(const torch::Tensor& labels, Draw& draw) {
  const torch::Tensor favourite = labels.div(2, "floor").to(torch::kFloat).view({-1, 1, 1, 1}) * (2 * pi / 5);
  const torch::Tensor angle = favourite + 0.8 * draw.normal({labels.size(0), 1, 1, 1});
  return (angle + torch::arange(3, torch::kFloat).view({1, 3, 1, 1}) * (2 * pi / 3)).cos();
}

/// A pattern in a random colour over a blob of the pattern's hue, in a soft round window: [N, 3, S, S].
torch::Tensor patch(const torch::Tensor& labels, double contrast, Draw& draw) {
  const torch::Tensor line = torch::arange(side, torch::kFloat);
  const torch::Tensor x = line.view({1, 1, side}) - draw.uniform(11, 21);
  const torch::Tensor y = line.view({1, side, 1}) - draw.uniform(11, 21);
  const torch::Tensor tilt = draw.uniform(-0.2, 0.2);
  const torch::Tensor u = x * tilt.cos() + y * tilt.sin();
  const torch::Tensor v = y * tilt.cos() - x * tilt.sin();
  const torch::Tensor radius = draw.uniform(7, 11);
  const torch::Tensor window = (-(x.square() + y.square()) / (2 * radius.square())).exp().unsqueeze(1);
  const torch::Tensor colour = torch::nn::functional::normalize(draw.normal({labels.size(0), 3, 1, 1}));
  const torch::Tensor strength = draw.uniform(0.6, 1.0).unsqueeze(1);
  const torch::Tensor waves = strength * pattern(labels, u, v, draw).unsqueeze(1);
  return contrast * window * (colour * waves + 0.5 * hue_of(labels, draw));
}

Images images_of(std::int64_t count, double wrong_share, const at::Generator& generator) {
  Draw draw(count, generator);
  torch::Tensor labels = draw.integers(0, classes);
  const torch::Tensor other = (labels + draw.integers(1, classes)) % classes;
  torch::Tensor image = 0.5 + patch(labels, 0.5, draw);  // One draw a statement: their order decides the images.
  image += patch(other, 0.3, draw);
  image += 0.1 * draw.normal({count, 3, 1, 1}) * torch::linspace(-1, 1, side).view({1, 1, side, 1});
  image += 0.2 * draw.normal({count, 3, side, side});
  const torch::Tensor wrong = draw.uniform(0, 1).view({-1}) < wrong_share;
  labels = torch::where(wrong, draw.integers(0, classes), labels);
  return {(image.clamp_(0, 1) * 255).round_().to(torch::kUInt8), labels};
}

}  // namespace

Data synthetic_data(std::int64_t train_size, std::int64_t test_size, std::int64_t seed) {
  const torch::NoGradGuard no_grad;
  Data data;
  data.classes = classes;
  data.normalization = {{0.5, 0.5, 0.5}, {0.25, 0.25, 0.25}};
  data.train = images_of(train_size, wrong_label_share, stream_generator(torch::kCPU, seed, Stream::synthetic_train));
  data.test = images_of(test_size, 0, stream_generator(torch::kCPU, seed, Stream::synthetic_test));
  return data;
}

}  // namespace cifar
