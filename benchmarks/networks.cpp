#include "networks.hpp"

#include <algorithm>
#include <array>
#include <stdexcept>
#include <string>

namespace overhead {

namespace {

constexpr std::array all_networks{
    Network{"resnet18_w16", true, true, [] { return cifar::make_resnet18({.width = 16}); }},
    Network{"resnet18_w64", true, true, [] { return cifar::make_resnet18({.width = 64}); }},
    Network{"vgg11", false, true, [] { return cifar::make_vgg11({}); }},
    Network{"vgg16_bn", true, true, [] { return cifar::make_vgg16_bn({}); }},
    Network{"cnn", false, true, [] { return cifar::make_cnn({}); }},
    Network{"vit", false, false, make_vit},
    Network{"mlp", false, false, make_mlp},
    Network{"mlp_small", false, false, make_small_mlp},
};

}  // namespace

std::span<const Network> networks() { return all_networks; }

const Network& network(std::string_view name) {
  const auto* found = std::find_if(all_networks.begin(), all_networks.end(),
                                   [&](const Network& candidate) { return candidate.name == name; });
  if (found == all_networks.end()) {
    throw std::invalid_argument("no network is called " + std::string(name));
  }
  return *found;
}

}  // namespace overhead
