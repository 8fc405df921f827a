// The whole suite on another device: where the environment variable MICROREG_TEST_DEVICE names one, tensors that a test
// makes without saying where are made there. What such a run says of a test that is about the CPU means nothing.
#include "on_device.hpp"

#include "stand_in_gpu.hpp"

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/record_function.h>
#if defined(MICROREG_WITH_CUDA)
#include <c10/cuda/CUDAFunctions.h>
#endif
#include <torch/cuda.h>
#include <torch/library.h>

#include <algorithm>
#include <cstdlib>
#include <iostream>
#include <memory>
#include <optional>
#include <string>

namespace helpers {

namespace {

/// How many operations this thread is inside of, and the outermost one's name: what LibTorch's own make they make where
/// they want it.
thread_local int depth = 0;
thread_local std::string outermost;

void count_depth() {
  at::addGlobalCallback(at::RecordFunctionCallback(
                            [](const at::RecordFunction& function) -> std::unique_ptr<at::ObserverContext> {
                              if (depth++ == 0) {
                                outermost = function.name();
                              }
                              return nullptr;
                            },
                            [](const at::RecordFunction& /*function*/, at::ObserverContext* /*context*/) { --depth; })
                            .scopes({at::RecordScope::FUNCTION}));
}

/// Factory functions find their backend by the key BackendSelect; this takes the place of LibTorch's kernels for it.
void make_on_device(const c10::OperatorHandle& operation, torch::jit::Stack* stack) {
  const auto& arguments = operation.schema().arguments();
  const std::size_t first = stack->size() - arguments.size();
  std::optional<at::ScalarType> type;
  std::optional<at::Layout> layout;
  std::optional<at::Device> device;
  for (std::size_t i = 0; i < arguments.size(); ++i) {
    c10::IValue& value = (*stack)[first + i];
    const std::string& name = arguments[i].name();
    if (name == "dtype") {
      type = value.toOptional<at::ScalarType>();
    } else if (name == "layout") {
      layout = value.toOptional<at::Layout>();
    } else if (name == "device") {
      if (value.isNone()) {
        // The library's scopes call what they intercept once more.
        const bool inner = depth > 1 && outermost != operation.schema().name();
        value = inner || in_stand_in_kernel() ? at::Device(at::kCPU) : test_device();
      }
      device = value.toDevice();
    }
  }
  operation.redispatchBoxed(c10::DispatchKeySet(c10::computeDispatchKey(type, layout, device)), stack);
}

std::unique_ptr<torch::Library> make_factories_use(const char* device) {
  make_stand_in_gpu();
  if (device == nullptr) {
    return nullptr;
  }
  // So that what the tests compare is compared in full float32, and the same twice is the same.
  at::globalContext().setAllowTF32CuDNN(false);
  at::globalContext().setAllowTF32CuBLAS(false);
  at::globalContext().setDeterministicCuDNN(true);
  count_depth();
  auto library = std::make_unique<torch::Library>(torch::Library::IMPL, "aten", c10::DispatchKey::BackendSelect,
                                                  __FILE__, static_cast<std::uint32_t>(__LINE__));
  for (const c10::OperatorName& name : c10::Dispatcher::singleton().getAllOpNames()) {
    const auto operation = c10::Dispatcher::singleton().findOp(name);
    // What takes a tensor makes its result where that one lies.
    if (operation.has_value() && operation->hasSchema() && name.getNamespace() == "aten" &&
        std::none_of(operation->schema().arguments().begin(), operation->schema().arguments().end(),
                     [](const c10::Argument& argument) { return *argument.type() == *c10::TensorType::get(); }) &&
        operation->schema().argumentIndexWithName("layout").has_value() &&
        operation->schema().argumentIndexWithName("device").has_value() &&
        operation->hasKernelForDispatchKey(c10::DispatchKey::BackendSelect)) {
      const std::string text = name.name + (name.overload_name.empty() ? "" : "." + name.overload_name);
      library->impl(text.c_str(), torch::CppFunction::makeFromBoxedFunction<&make_on_device>());
    }
  }
  return library;
}

const char* const device_name = std::getenv("MICROREG_TEST_DEVICE");
const std::unique_ptr<torch::Library> factories = make_factories_use(device_name);

}  // namespace

at::Device test_device() { return device_name == nullptr ? at::Device(at::kCPU) : at::Device(device_name); }

#if defined(MICROREG_WITH_CUDA)
namespace {
void make_waits_an_error(bool errors) {
  c10::cuda::warning_state().set_sync_debug_mode(errors ? c10::cuda::SyncDebugMode::L_ERROR
                                                        : c10::cuda::SyncDebugMode::L_DISABLED);
}
}  // namespace

bool NoWaiting::is_seen() { return true; }
#else
namespace {
void make_waits_an_error(bool errors) { make_stand_in_waits_an_error(errors); }
}  // namespace

bool NoWaiting::is_seen() { return has_stand_in_gpu(); }
#endif

NoWaiting::NoWaiting() { make_waits_an_error(true); }
NoWaiting::~NoWaiting() { make_waits_an_error(false); }

bool skipped_off_the_cpu(const char* why) {
  if (test_device().is_cpu()) {
    return false;
  }
  std::cout << "skipped on " << test_device() << ": " << why << std::endl;
  return true;
}

bool no_device() {
  if (torch::cuda::is_available()) {
    return false;
  }
  std::cout << "skipped: no CUDA device" << std::endl;
  return true;
}

std::optional<at::Device> device_to_test() {
  const char* name = std::getenv("MICROREG_REHEARSE");
  if (name != nullptr) {
    return at::Device(name);
  }
  return no_device() ? std::nullopt : std::optional(at::Device(at::kCUDA));
}

at::Generator generator(std::uint64_t seed) {
  const at::Device device = test_device();
  at::Generator result =
      device.is_cpu() ? at::make_generator<at::CPUGeneratorImpl>()
                      : at::globalContext().getAcceleratorHooksInterface(device.type()).getNewGenerator(device.index());
  result.set_current_seed(seed);
  return result;
}

}  // namespace helpers
