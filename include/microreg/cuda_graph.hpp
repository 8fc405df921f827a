/// @file
/// CudaGraph: steps of a Regularizer whose micro-batches are repeated from CUDA graphs. Needs CUDA's runtime headers
/// and LibTorch's libtorch_cuda and libc10_cuda; not in microreg.hpp.
#pragma once

#if !__has_include(<cuda_runtime_api.h>)
#error "microreg/cuda_graph.hpp needs cuda_runtime_api.h: add the include folder of a CUDA toolkit to the include path"
#endif

#include <ATen/core/CachingHostAllocator.h>
#include <ATen/core/Generator.h>
#include <ATen/cuda/CUDAGraph.h>
#include <c10/core/Device.h>
#include <c10/core/StreamGuard.h>
#include <c10/cuda/CUDACachingAllocator.h>
#include <c10/cuda/CUDAFunctions.h>
#include <c10/cuda/CUDAStream.h>
#include <microreg/detail/finite.hpp>
#include <microreg/detail/libtorch.hpp>
#include <microreg/detail/text.hpp>
#include <microreg/error.hpp>
#include <microreg/step/recordings.hpp>

#include <cstdint>
#include <exception>
#include <functional>
#include <memory>
#include <vector>

namespace microreg::inline MICROREG_ABI {

/// How much a CudaGraph records, and how its recordings are checked.
struct CudaGraphOptions {
  /// How many kinds of micro-batch are recorded: shapes, with and without penalties, of each model. Each keeps the
  /// memory of one micro-batch. What comes when there are so many is done operation by operation.
  std::int64_t shapes = 4;
  /// A recording is compared with the same micro-batch done operation by operation when it is made, and again after so
  /// many replays, at the cost of that micro-batch and of waiting for the device. 0: when it is made alone.
  std::int64_t check_every = 1000;
  /// How far they may be apart, relative to the gradient; 0: 1e-9 in float64, 1e-3 in float32, 1e-2 with TF32, 5e-2 in
  /// bfloat16.
  double tolerance = 0;
};

/// Records the work of a micro-batch (forward pass, loss, probes, double backward) as a CUDA graph in its second step,
/// and repeats that from then on: one call starts what took hundreds. For networks whose kernels are shorter than it
/// takes the host to start one.
///
/// ```cpp
/// microreg::Regularizer regularizer(
///     model, torch::nn::CrossEntropyLoss(), microreg::GradientNorm{},
///     {.strength = 0.01, .micro_batch_size = 32, .cuda_graph = std::make_shared<microreg::CudaGraph>()});
/// ```
///
/// Gradients, report, buffers and random numbers are those of the same steps without it, to rounding. Strengths and
/// weights may change from step to step, they are scalars on the device. Micro-batches of another number of samples (a
/// ragged last one) and the first step are done operation by operation; Report::replayed says how many were not.
///
/// What is recorded are kernels, not the program. A model in another mode (train(), eval()), parameters or buffers in
/// other memory, and other shapes are seen, and recorded anew; what a model, loss or penalty reads on the host (a
/// schedule, a counter) is not, and refused with a ModelError when it makes a difference where a recording is compared.
///
/// Throws OptionError with a model on another device, estimators other than Exact, float16 and loss scales; ModelError
/// where an operation cannot be recorded, for a CountedLoss, inputs with a graph and batches with more than tensors.
/// Memory: that of one micro-batch for each recording, kept. Not for two threads at a time: they take turns. While one
/// records, no other thread may use the parameters.
///
/// Source: CUDA Graphs, Nvidia, CUDA C++ Programming Guide; torch.cuda.CUDAGraph.
class CudaGraph final : public detail::Recordings {
 public:
  /// Throws OptionError for `shapes` below 1, `check_every` below 0, or a `tolerance` below 0 or not
  /// finite. Touches no device.
  explicit CudaGraph(CudaGraphOptions options = {})
      : Recordings({options.shapes, options.check_every, options.tolerance}) {
    if (options.shapes < 1) {
      throw OptionError(detail::text({"CudaGraphOptions::shapes is ", options.shapes, "; it must be at least 1"}));
    }
    if (options.check_every < 0) {
      throw OptionError(detail::text({"CudaGraphOptions::check_every is ", options.check_every,
                                      "; it must be a number of replays, or 0 for no comparison but the first"}));
    }
    if (!detail::is_finite(options.tolerance) || options.tolerance < 0) {
      throw OptionError(detail::text({"CudaGraphOptions::tolerance is ", options.tolerance,
                                      "; it must be a finite number above 0, or 0 for an automatic choice"}));
    }
  }

 private:
  class Captured final : public detail::Recording {
   public:
    at::cuda::CUDAGraph graph;
    void replay() override { graph.replay(); }
  };

  void require_device(c10::Device device) const override {
    if (!device.is_cuda()) {
      throw OptionError(detail::text({"cuda_graph is set and the model is on ", device,
                                      "; move the model to CUDA, or leave cuda_graph empty there"}));
    }
  }

  std::unique_ptr<detail::Recording> record(const std::function<void()>& work,
                                            const std::vector<at::Generator>& generators) override {
    // Not a CUDAStreamGuard, which would have to be linked with CUDA's runtime.
    const c10::StreamGuard on_side(c10::cuda::getStreamFromPool().unwrap());
    c10::cuda::device_synchronize();
    for (int i = 0; i < warm_ups; ++i) {
      work();
    }
    c10::cuda::device_synchronize();
    auto captured = std::make_unique<Captured>();
    capture(captured->graph, work, generators);
    c10::cuda::device_synchronize();
    return captured;
  }

  static void capture(at::cuda::CUDAGraph& graph, const std::function<void()>& work,
                      const std::vector<at::Generator>& generators) {
    const c10::DeviceIndex device = c10::cuda::current_device();
    const auto pool = at::cuda::graph_pool_handle();  // named, so that it can be given back after a failure
    bool whole = false;
    try {
      begin(graph, pool, generators);
      work();
      whole = true;
      graph.capture_end();
    } catch (...) {
      quietly([&] {  // a stream stays in capture until that is ended
        graph.capture_end();
        whole = true;
      });
      if constexpr (detail::failed_captures_stay) {
        give_back(device, pool, !whole);
        quietly([&] { capture_nothing(generators); });
      }
      throw;
    }
  }

  template <class Pool>
  static void begin(at::cuda::CUDAGraph& graph, const Pool& pool, const std::vector<at::Generator>& generators) {
    for (const at::Generator& generator : generators) {
      detail::draws_from(generator, graph);
    }
    graph.capture_begin(pool);
  }

  /// Takes the allocators out of a capture that has failed. A graph whose capture has ended releases its pool itself.
  template <class Pool>
  static void give_back(c10::DeviceIndex device, const Pool& pool, bool release) noexcept {
    quietly([&] { c10::cuda::CUDACachingAllocator::endAllocateToPool(device, pool); });
    if (release) {
      quietly([&] { c10::cuda::CUDACachingAllocator::releasePool(device, pool); });
    }
#if MICROREG_LIBTORCH >= 211  // which has pools of pinned memory
    quietly([&] { at::getHostAllocator(at::kCUDA)->end_allocate_to_pool(pool); });
    if (release) {
      quietly([&] { at::getHostAllocator(at::kCUDA)->release_pool(pool); });
    }
#endif
  }

  template <class Call>
  static void quietly(const Call& call) noexcept {
    try {
      call();
    } catch (const std::exception&) {
    }
  }

  /// A capture that succeeds takes generators out of one that did not.
  static void capture_nothing(const std::vector<at::Generator>& generators) {
    const c10::StreamGuard on_side(c10::cuda::getStreamFromPool().unwrap());
    const at::Tensor scalar = at::zeros({}, at::TensorOptions(at::kCUDA));
    c10::cuda::device_synchronize();
    at::cuda::CUDAGraph graph;
    begin(graph, at::cuda::graph_pool_handle(), generators);
    scalar.zero_();
    graph.capture_end();
  }

  static constexpr int warm_ups = 3;  // libraries choose kernels and make their workspaces
};

}  // namespace microreg::inline MICROREG_ABI
