/// @file
/// Definitions of model.hpp.
#pragma once

#include <microreg/detail/config.hpp>
#include <microreg/detail/text.hpp>
#include <microreg/error.hpp>
#include <microreg/model.hpp>

#include <exception>
#include <string_view>
#include <utility>

namespace microreg::inline MICROREG_ABI {

MICROREG_INLINE Modules::Modules(std::vector<std::shared_ptr<torch::nn::Module>> modules)
    : modules_(std::move(modules)) {
  for (std::size_t i = 0; i < modules_.size(); ++i) {
    if (modules_[i] == nullptr) {
      throw ModelError(detail::text({"module ", i, " given to modules() is a null pointer; construct it first"}));
    }
  }
}

MICROREG_INLINE std::vector<NamedParameter> Modules::parameters() const {
  std::vector<NamedParameter> result;
  for (std::size_t i = 0; i < modules_.size(); ++i) {
    for (auto& [name, tensor] : detail::named_parameters_of(*modules_[i])) {
      result.push_back({detail::text({"modules[", i, "].", name}), tensor});
    }
  }
  return result;
}

MICROREG_INLINE std::vector<at::Tensor> Modules::buffers() const {
  std::vector<at::Tensor> result;
  for (const auto& module : modules_) {
    const std::vector<at::Tensor> buffers = module->buffers();
    result.insert(result.end(), buffers.begin(), buffers.end());
  }
  return result;
}

MICROREG_INLINE void Modules::add_modes(std::vector<bool>& modes) const {
  for (const auto& module : modules_) {
    detail::add_modes_of(*module, modes);
  }
}

namespace detail {

MICROREG_INLINE void add_modes_of(const torch::nn::Module& module, std::vector<bool>& modes) {
  module.apply([&](const torch::nn::Module& each) { modes.push_back(each.is_training()); });
}

MICROREG_INLINE std::vector<NamedParameter> named_parameters_of(const torch::nn::Module& module) {
  std::vector<NamedParameter> result;
  for (const auto& item : module.named_parameters()) {
    result.push_back({item.key(), item.value()});
  }
  return result;
}

MICROREG_INLINE std::vector<NamedParameter> named_parameters_of(const torch::jit::Module& module) {
  std::vector<NamedParameter> result;
  for (const auto& item : module.named_parameters()) {
    result.push_back({item.name, item.value});
  }
  return result;
}

MICROREG_INLINE std::vector<NamedParameter> named_parameters_of(const std::vector<at::Tensor>& tensors) {
  std::vector<NamedParameter> result;
  for (std::size_t i = 0; i < tensors.size(); ++i) {
    result.push_back({text({"parameters[", i, "]"}), tensors[i]});
  }
  return result;
}

MICROREG_INLINE c10::IValue ScriptHandle::run(std::vector<c10::IValue> arguments) {
  try {
    return module_.forward(std::move(arguments));
  } catch (const Error&) {
    throw;
  } catch (const std::exception& error) {
    const std::string_view message = error.what();
    for (const std::string_view ours :
         {"the second pass does not repeat the first", "has a kink that cannot be frozen"}) {
      if (const auto at = message.rfind(ours); at != std::string_view::npos) {
        const auto begin =
            message.find_last_of('\n', at) == std::string_view::npos ? 0 : message.find_last_of('\n', at) + 1;
        throw GateError(text({"in a scripted model, which TorchScript may optimise between two passes: ",
                              message.substr(begin, message.find('\n', at) - begin),
                              "; use Exact, or Gates::free where the difference may be another regularizer"}));
      }
    }
    throw;
  }
}

MICROREG_INLINE std::vector<at::Tensor> buffers_of(const torch::jit::Module& module) {
  std::vector<at::Tensor> result;
  for (const auto& buffer : module.buffers()) {
    result.push_back(buffer);
  }
  return result;
}

}  // namespace detail

}  // namespace microreg::inline MICROREG_ABI
