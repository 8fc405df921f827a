#include "stand_in_gpu.hpp"

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/SparseTensorImpl.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/stack.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <ATen/native/DispatchStub.h>
#include <ATen/ops/_coalesced_native.h>
#include <ATen/ops/_indices_native.h>
#include <ATen/ops/_nnz_native.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/_values_native.h>
#include <ATen/ops/alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/dense_dim_native.h>
#include <ATen/ops/is_coalesced_native.h>
#include <ATen/ops/set_native.h>
#include <ATen/ops/sparse_dim_native.h>
#include <ATen/ops/unfold_native.h>
#include <ATen/ops/view_as_complex_native.h>
#include <ATen/ops/view_as_real_native.h>
#include <ATen/ops/view_native.h>
#include <ATen/record_function.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <sys/mman.h>
#include <torch/library.h>
#include <torch/types.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <iostream>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace helpers {

namespace {

const at::Device gpu(at::kCUDA, 0);
std::atomic<bool> exists = false;
std::atomic<bool> waits_are_errors = false;

/// Whether this thread is inside of a kernel, which makes what it needs on the CPU.
thread_local bool in_kernel = false;

/// While it lives, what this thread calls is inside of a kernel, which nobody sees into.
class InKernel {
 public:
  InKernel() : before_(std::exchange(in_kernel, true)) {}
  InKernel(const InKernel&) = delete;
  InKernel& operator=(const InKernel&) = delete;
  ~InKernel() { in_kernel = before_; }

 private:
  bool before_;
  at::DisableRecordFunctionGuard unrecorded_;
  c10::impl::ForceDispatchKeyGuard below_everything_{
      c10::default_included_set, c10::autograd_dispatch_keyset_with_ADInplaceOrView | c10::autocast_dispatch_keyset};
};

/// This thread's stream, and the one whose work is being recorded as a graph, if any: never the default one, 0.
thread_local c10::StreamId current_stream = 0;
std::atomic<c10::StreamId> recorded_stream = 0;

void wait_for(const char* what) {
  TORCH_CHECK(recorded_stream == 0, "CUDA error: operation not permitted when stream is capturing (", what, ")");
  TORCH_CHECK(!waits_are_errors, "the host waits for the device, by ", what);
}

/// A kernel on another stream than the recorded one is not in the recording.
void launch(const std::string& name) {
  TORCH_CHECK(recorded_stream == 0 || recorded_stream == current_stream, name, " runs on stream ", current_stream,
              " while another is recorded");
}

// ---- Memory. Every byte has two addresses: that of the device, which the host can neither read nor write, and one
// `shift` further, which the kernels use.

class Memory {
 public:
  static Memory& instance() {
    static auto* memory = new Memory;  // outlives all tensors
    return *memory;
  }

  void* take(std::size_t bytes) {
    const auto size = static_cast<int>(std::bit_width(std::max<std::size_t>(bytes, 64) - 1));
    const std::scoped_lock lock(mutex_);
    std::vector<std::byte*>& free = free_.at(static_cast<std::size_t>(size));
    if (free.empty()) {
      TORCH_CHECK(used_ + (std::size_t{1} << size) <= capacity, "the GPU that is none has no more memory");
      free.push_back(device_ + used_);
      used_ += std::size_t{1} << size;
    }
    std::byte* address = free.back();
    free.pop_back();
    sizes_[address] = size;
    return address;
  }

  void give_back(void* address) {
    const std::scoped_lock lock(mutex_);
    const auto found = sizes_.find(static_cast<std::byte*>(address));
    const std::size_t bytes = std::size_t{1} << found->second;
    // What is used after it was given back is not what it was.
    if (bytes >= (1U << 20U)) {
      madvise(found->first + shift_, bytes, MADV_REMOVE);
    } else {
      std::memset(found->first + shift_, 0xff, bytes);
    }
    free_.at(static_cast<std::size_t>(found->second)).push_back(found->first);
    sizes_.erase(found);
  }

  [[nodiscard]] void* to_host(const void* address) const {
    return address == nullptr ? nullptr : static_cast<std::byte*>(const_cast<void*>(address)) + shift_;
  }

 private:
  static constexpr std::size_t capacity = std::size_t{1} << 36U;

  Memory() {
    const int file = memfd_create("stand_in_gpu", 0);
    TORCH_CHECK(file >= 0 && ftruncate(file, capacity) == 0, "no memory for the GPU that is none");
    void* device = mmap(nullptr, capacity, PROT_NONE, MAP_SHARED | MAP_NORESERVE, file, 0);
    void* host = mmap(nullptr, capacity, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, file, 0);
    TORCH_CHECK(device != MAP_FAILED && host != MAP_FAILED, "no addresses for the GPU that is none");
    close(file);
    device_ = static_cast<std::byte*>(device);
    shift_ = static_cast<std::byte*>(host) - device_;
  }

  std::mutex mutex_;
  std::byte* device_ = nullptr;
  std::ptrdiff_t shift_ = 0;
  std::size_t used_ = 0;
  std::array<std::vector<std::byte*>, 64> free_;
  std::map<std::byte*, int> sizes_;
};

class Allocator final : public c10::Allocator {
 public:
  c10::DataPtr allocate(std::size_t bytes) override {
    void* address = bytes == 0 ? nullptr : Memory::instance().take(bytes);
    return {address, address, raw_deleter(), gpu};
  }
  c10::DeleterFnPtr raw_deleter() const override {
    return [](void* address) {
      if (address != nullptr) {
        Memory::instance().give_back(address);
      }
    };
  }
  void copy_data(void* to, const void* from, std::size_t bytes) const override {
    std::memcpy(Memory::instance().to_host(to), Memory::instance().to_host(from), bytes);
  }
};

Allocator allocator;

at::SparseTensorImpl* sparse(const at::Tensor& tensor) {
  return static_cast<at::SparseTensorImpl*>(tensor.unsafeGetTensorImpl());
}

/// A sparse tensor like `other`, of these indices and values.
at::Tensor sparse_like(const at::Tensor& other, const at::Tensor& indices, const at::Tensor& values) {
  const auto key = values.is_cuda() ? c10::DispatchKey::SparseCUDA : c10::DispatchKey::SparseCPU;
  at::Tensor result = at::detail::make_tensor<at::SparseTensorImpl>(c10::DispatchKeySet(key), values.dtype());
  sparse(result)->resize_(sparse(other)->sparse_dim(), sparse(other)->dense_dim(), other.sizes());
  sparse(result)->set_indices_and_values_unsafe(indices, values);
  sparse(result)->set_coalesced(sparse(other)->coalesced());
  return result;
}

/// The tensor that a kernel sees: the same memory, at the addresses that it can use.
at::Tensor seen_by_kernels(const at::Tensor& tensor) {
  if (!tensor.is_cuda()) {
    return tensor;
  }
  const InKernel scope;
  if (tensor.is_sparse()) {
    return sparse_like(tensor, seen_by_kernels(sparse(tensor)->indices()), seen_by_kernels(sparse(tensor)->values()));
  }
  const at::TensorOptions options = tensor.options().device(at::kCPU);
  void* data = Memory::instance().to_host(tensor.unsafeGetTensorImpl()->data());
  if (data == nullptr || tensor.numel() == 0) {
    return at::empty_strided(tensor.sizes(), tensor.strides(), options);
  }
  at::Tensor seen = at::from_blob(data, tensor.sizes(), tensor.strides(), options);
  seen._set_conj(tensor.is_conj());
  seen._set_neg(tensor.is_neg());
  return seen;
}

at::Tensor empty_strided(at::IntArrayRef sizes, at::IntArrayRef strides, std::optional<at::ScalarType> type,
                         std::optional<at::Layout> /*layout*/, std::optional<at::Device> /*device*/,
                         std::optional<bool> /*pin*/) {
  return at::detail::empty_strided_generic(sizes, strides, &allocator, c10::DispatchKeySet(c10::DispatchKey::CUDA),
                                           c10::dtype_or_default(type));
}

at::Tensor empty(at::IntArrayRef sizes, std::optional<at::ScalarType> type, std::optional<at::Layout> /*layout*/,
                 std::optional<at::Device> /*device*/, std::optional<bool> /*pin*/,
                 std::optional<at::MemoryFormat> format) {
  return at::detail::empty_generic(sizes, &allocator, c10::DispatchKeySet(c10::DispatchKey::CUDA),
                                   c10::dtype_or_default(type), format);
}

const at::Tensor& resize_(const at::Tensor& self, at::IntArrayRef sizes, std::optional<at::MemoryFormat> format) {
  at::TensorImpl* impl = self.unsafeGetTensorImpl();
  impl->set_sizes_contiguous(sizes);
  if (format.has_value() && *format != at::MemoryFormat::Preserve) {
    impl->empty_tensor_restride(*format);
  }
  const std::size_t bytes = at::detail::computeStorageNbytes(self.sizes(), self.strides(), self.dtype().itemsize(),
                                                             static_cast<std::size_t>(self.storage_offset()));
  const c10::Storage& storage = self.storage();
  if (bytes > storage.nbytes()) {
    TORCH_CHECK(storage.resizable(), "this storage cannot be resized");
    c10::DataPtr larger = allocator.allocate(bytes);
    if (storage.nbytes() > 0) {
      allocator.copy_data(larger.get(), storage.data(), storage.nbytes());
    }
    storage.unsafeGetStorageImpl()->set_data_ptr_noswap(std::move(larger));
    storage.unsafeGetStorageImpl()->set_nbytes(bytes);
  }
  return self;
}

at::Tensor& copy_(at::Tensor& self, const at::Tensor& source, bool non_blocking) {
  if (self.is_cpu()) {
    wait_for("a copy to the host");
  } else if (source.is_cpu() && source.dim() > 0 && !non_blocking) {
    wait_for("a copy from the host");
  }
  launch("copy_");
  const InKernel scope;
  seen_by_kernels(self).copy_(seen_by_kernels(source));
  return self;
}

at::Tensor& set_(at::Tensor& self) {
  self.set_(c10::Storage(c10::Storage::use_byte_size_t(), 0, allocator.allocate(0), &allocator, true), 0, {0}, {});
  return self;
}

// ---- Random numbers: a generator of the device, apart from the CPU's, whose state lies on the CPU. Of one seed the
// two make other numbers.

class Generator final : public c10::GeneratorImpl {
 public:
  explicit Generator(at::Generator numbers = at::make_generator<at::CPUGeneratorImpl>())
      : c10::GeneratorImpl(gpu, c10::DispatchKeySet(c10::DispatchKey::CUDA)), numbers_(std::move(numbers)) {}

  [[nodiscard]] const at::Generator& numbers() const { return numbers_; }
  void set_current_seed(std::uint64_t seed) override { numbers_.set_current_seed(seed ^ other_numbers); }
  void set_offset(std::uint64_t offset) override { numbers_.set_offset(offset); }
  std::uint64_t get_offset() const override { return numbers_.get_offset(); }
  std::uint64_t current_seed() const override { return numbers_.current_seed() ^ other_numbers; }
  std::uint64_t seed() override { return numbers_.seed() ^ other_numbers; }
  void set_state(const c10::TensorImpl& state) override {
    TORCH_CHECK(recorded_stream == 0, "a generator's state is set during a recording");
    numbers_.unsafeGetGeneratorImpl()->set_state(state);
  }
  c10::intrusive_ptr<c10::TensorImpl> get_state() const override {
    TORCH_CHECK(recorded_stream == 0, "a generator's state is read during a recording");
    return numbers_.unsafeGetGeneratorImpl()->get_state();
  }

 private:
  Generator* clone_impl() const override { return new Generator(numbers_.clone()); }

  static constexpr std::uint64_t other_numbers = 0x9e3779b9;
  mutable at::Generator numbers_;
};

const at::Generator& default_generator() {
  static const at::Generator generator = at::make_generator<Generator>();
  return generator;
}

// ---- Operations: those of the CPU, on the tensors that kernels see.

bool waits(const std::string& name) {
  for (const char* waiting : {"aten::_local_scalar_dense", "aten::nonzero", "aten::equal", "aten::masked_select",
                              "aten::_unique2", "aten::unique_dim", "aten::bincount"}) {
    if (name == waiting) {
      return true;
    }
  }
  return false;
}

/// Operations that take tensors of the CPU beside the device's.
bool may_mix(const std::string& name) {
  return name.starts_with("aten::index") || name.starts_with("aten::_index_put") ||
         name == "aten::convolution_backward" || name.starts_with("aten::_ctc_loss") ||
         name.starts_with("aten::_cudnn_ctc_loss") || name == "aten::_pack_padded_sequence";
}

/// A copy of what a kernel made.
at::Tensor to_gpu(const at::Tensor& result) {
  if (!result.defined()) {
    return result;
  }
  const InKernel scope;
  if (result.is_sparse()) {
    return sparse_like(result, to_gpu(sparse(result)->indices()), to_gpu(sparse(result)->values()));
  }
  at::Tensor copy = at::empty_strided(result.sizes(), result.strides(), result.options().device(gpu));
  seen_by_kernels(copy).copy_(result);
  return copy;
}

/// What a kernel wrote to `seen`, in place of `given`.
void write_back(const at::Tensor& given, const at::Tensor& seen) {
  if (!given.defined() || !given.is_cuda()) {
    return;
  }
  const InKernel scope;
  if (given.is_sparse()) {
    sparse(given)->resize_(sparse(seen)->sparse_dim(), sparse(seen)->dense_dim(), seen.sizes());
    sparse(given)->set_indices_and_values_unsafe(to_gpu(sparse(seen)->indices()), to_gpu(sparse(seen)->values()));
    sparse(given)->set_coalesced(sparse(seen)->coalesced());
    return;
  }
  if (!given.sizes().equals(seen.sizes())) {
    resize_(given, seen.sizes(), std::nullopt);
    given.unsafeGetTensorImpl()->set_sizes_and_strides(seen.sizes(), seen.strides());
  }
  const at::Tensor there = seen_by_kernels(given);
  if (there.numel() > 0 && there.const_data_ptr() != seen.const_data_ptr()) {
    there.copy_(seen);
  }
}

void run_on_cpu(const c10::OperatorHandle& operation, torch::jit::Stack* stack) {
  const c10::FunctionSchema& schema = operation.schema();
  const std::string& name = schema.name();
  launch(name);
  if (waits(name)) {
    wait_for(name.c_str());
  }
  const std::size_t count = schema.arguments().size();
  const std::size_t first = stack->size() - count;
  std::vector<c10::IValue> given(stack->begin() + static_cast<std::ptrdiff_t>(first), stack->end());
  bool mixed = false;
  bool with_sparse = false;
  const auto look = [&](const at::Tensor& tensor) {
    TORCH_CHECK(!tensor.defined() || tensor.is_cpu() || tensor.is_cuda(), name, " of a tensor on ", tensor.device());
    with_sparse = with_sparse || (tensor.defined() && tensor.is_sparse());
    mixed = mixed || (tensor.defined() && tensor.is_cpu() && tensor.dim() > 0);
    return tensor.defined() ? seen_by_kernels(tensor) : tensor;
  };
  for (std::size_t i = 0; i < count; ++i) {
    c10::IValue& value = (*stack)[first + i];
    const c10::Argument& argument = schema.arguments()[i];
    if (value.isTensor()) {
      const at::Tensor seen = look(value.toTensor());
      value = argument.is_out() && value.toTensor().is_cuda() ? at::empty({0}, seen.options()) : seen;
    } else if (value.isTensorList()) {
      std::vector<at::Tensor> seen;
      for (const at::Tensor& tensor : value.toTensorVector()) {
        seen.push_back(look(tensor));
      }
      value = c10::List<at::Tensor>(seen);
    } else if (value.isOptionalTensorList()) {
      c10::List<std::optional<at::Tensor>> seen;
      for (const std::optional<at::Tensor>& tensor : value.toOptionalTensorVector()) {
        seen.push_back(tensor.has_value() ? std::optional(look(*tensor)) : std::nullopt);
      }
      value = seen;
    } else if (argument.name() == "layout") {
      with_sparse = with_sparse || (!value.isNone() && value.toLayout() == at::kSparse);
    } else if (value.isDevice()) {
      value = at::Device(at::kCPU);
    } else if (argument.type()->isSubtypeOf(*c10::OptionalType::create(c10::GeneratorType::get()))) {
      const at::Generator generator = value.isNone() ? default_generator() : value.toGenerator();
      TORCH_CHECK(generator.device() == gpu, "Expected a 'cuda' device type for generator but found '",
                  generator.device(), "'");
      value = static_cast<Generator*>(generator.unsafeGetGeneratorImpl())->numbers();
    }
  }
  TORCH_CHECK(!mixed || may_mix(name),
              "Expected all tensors to be on the same device, but found at least two devices, ", "cuda:0 and cpu! (",
              name, ")");
  const std::vector<c10::IValue> seen(stack->begin() + static_cast<std::ptrdiff_t>(first), stack->end());
  {
    const InKernel scope;
    operation.redispatchBoxed(c10::DispatchKeySet(with_sparse ? c10::DispatchKey::SparseCPU : c10::DispatchKey::CPU),
                              stack);
  }

  std::vector<bool> taken(count, false);
  for (std::size_t i = 0; i < count; ++i) {
    const auto* alias = schema.arguments()[i].alias_info();
    if (alias != nullptr && alias->isWrite()) {
      if (given[i].isTensor()) {
        write_back(given[i].toTensor(), seen[i].toTensor());
      } else if (given[i].isTensorList()) {
        const std::vector<at::Tensor> to = given[i].toTensorVector();
        const std::vector<at::Tensor> from = seen[i].toTensorVector();
        for (std::size_t k = 0; k < to.size(); ++k) {
          write_back(to[k], from[k]);
        }
      }
    }
  }
  const std::size_t results = schema.returns().size();
  const std::size_t start = stack->size() - results;
  for (std::size_t r = 0; r < results; ++r) {
    c10::IValue& value = (*stack)[start + r];
    const auto* alias = schema.returns()[r].alias_info();
    if (alias != nullptr) {
      TORCH_CHECK(alias->isWrite(), "the GPU that is none has no view ", name);
      for (std::size_t i = 0; i < count; ++i) {
        const auto* other = schema.arguments()[i].alias_info();
        if (!taken[i] && other != nullptr && *other == *alias) {
          value = given[i];
          taken[i] = true;
          break;
        }
      }
    } else if (value.isTensor()) {
      value = to_gpu(value.toTensor());
    } else if (value.isTensorList()) {
      std::vector<at::Tensor> there;
      for (const at::Tensor& tensor : value.toTensorVector()) {
        there.push_back(to_gpu(tensor));
      }
      value = c10::List<at::Tensor>(there);
    }
  }
}

/// Dropout on a device is an operation of its own, which draws of the device's generator.
std::tuple<at::Tensor, at::Tensor> native_dropout(const at::Tensor& x, double p, std::optional<bool> train) {
  const InKernel scope;
  if (!train.value_or(true)) {
    return {x.clone(), at::ones_like(x, at::kBool)};
  }
  const at::Tensor kept = at::empty_like(x, at::kBool).bernoulli_(1 - p);
  return {x * kept * (p == 1 ? 0.0 : 1 / (1 - p)), kept};
}

/// The sums of batch normalisation's backward pass over all but the channels: of dy and of dy (x - mean).
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> batch_norm_backward_reduce(
    const at::Tensor& dy, const at::Tensor& x, const at::Tensor& mean, const at::Tensor& rstd,
    const std::optional<at::Tensor>& /*weight*/, bool /*input_g*/, bool /*weight_g*/, bool /*bias_g*/) {
  const InKernel scope;
  std::vector<std::int64_t> dims;
  std::vector<std::int64_t> shape(static_cast<std::size_t>(x.dim()), 1);
  shape[1] = x.size(1);
  for (std::int64_t dim = 0; dim < x.dim(); ++dim) {
    if (dim != 1) {
      dims.push_back(dim);
    }
  }
  const at::ScalarType type = mean.scalar_type();
  const at::Tensor wide = dy.to(at::kDouble);
  const at::Tensor sum = wide.sum(dims);
  const at::Tensor product = (wide * (x.to(at::kDouble) - mean.to(at::kDouble).view(shape))).sum(dims);
  return {sum.to(type), product.to(type), (product * rstd).to(type), sum.to(type)};
}

/// The CPU's takes dy for one in the input's layout, whatever it is.
std::tuple<at::Tensor, at::Tensor, at::Tensor> native_batch_norm_backward(
    const at::Tensor& dy, const at::Tensor& x, const std::optional<at::Tensor>& weight,
    const std::optional<at::Tensor>& running_mean, const std::optional<at::Tensor>& running_var,
    const std::optional<at::Tensor>& mean, const std::optional<at::Tensor>& rstd, bool train, double eps,
    std::array<bool, 3> mask) {
  const InKernel scope;
  static const auto operation = c10::Dispatcher::singleton().findSchemaOrThrow("aten::native_batch_norm_backward", "");
  torch::jit::Stack stack;
  torch::jit::push(stack, at::empty_strided(x.sizes(), x.strides(), dy.options()).copy_(dy), x, weight, running_mean,
                   running_var, mean, rstd, train, eps, c10::List<bool>({mask[0], mask[1], mask[2]}));
  run_on_cpu(operation, &stack);
  return {stack[0].toTensor(), stack[1].toTensor(), stack[2].toTensor()};
}

/// A cell of an LSTM: gates i, f, g and o.
std::tuple<at::Tensor, at::Tensor, at::Tensor> lstm_cell(const at::Tensor& of_input, const at::Tensor& of_hidden,
                                                         const at::Tensor& cell,
                                                         const std::optional<at::Tensor>& input_bias,
                                                         const std::optional<at::Tensor>& hidden_bias) {
  const InKernel scope;
  at::Tensor gates = of_input + of_hidden;
  for (const std::optional<at::Tensor>& bias : {input_bias, hidden_bias}) {
    gates = bias.has_value() && bias->defined() ? gates + *bias : gates;
  }
  const std::vector<at::Tensor> raw = gates.chunk(4, 1);
  const at::Tensor i = raw[0].sigmoid(), f = raw[1].sigmoid(), g = raw[2].tanh(), o = raw[3].sigmoid();
  const at::Tensor next = f * cell + i * g;
  return {o * next.tanh(), next, at::cat({i, f, g, o}, 1)};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> lstm_cell_backward(const std::optional<at::Tensor>& d_hidden,
                                                                  const std::optional<at::Tensor>& d_next,
                                                                  const at::Tensor& cell, const at::Tensor& next,
                                                                  const at::Tensor& gates, bool has_bias) {
  const InKernel scope;
  const std::vector<at::Tensor> all = gates.chunk(4, 1);
  const at::Tensor &i = all[0], &f = all[1], &g = all[2], &o = all[3];
  const at::Tensor tanh = next.tanh();
  const at::Tensor dh = d_hidden.has_value() && d_hidden->defined() ? *d_hidden : at::zeros_like(next);
  at::Tensor dc = dh * o * (1 - tanh * tanh);
  dc = d_next.has_value() && d_next->defined() ? dc + *d_next : dc;
  const at::Tensor d_gates =
      at::cat({dc * g * i * (1 - i), dc * cell * f * (1 - f), dc * i * (1 - g * g), dh * tanh * o * (1 - o)}, 1);
  return {d_gates, dc * f, has_bias ? d_gates.sum(0) : at::Tensor()};
}

/// In float32's sixth, whatever the type, as CUDA's.
at::Tensor& hardsigmoid_to(const at::Tensor& x, at::Tensor& out) {
  const InKernel scope;
  return out.copy_((x + 3).clamp(0, 6) * double{1.0F / 6.0F});
}
at::Tensor& hardswish_to(const at::Tensor& x, at::Tensor& out) {
  const InKernel scope;
  return out.copy_(x * (x + 3).clamp(0, 6) * double{1.0F / 6.0F});
}
at::Tensor hardswish(const at::Tensor& x) {
  at::Tensor out = at::empty_like(x);
  return hardswish_to(x, out);
}
at::Tensor& hardswish_(at::Tensor& x) { return hardswish_to(x, x); }

std::int64_t composed_attention(const at::Tensor&, const at::Tensor&, const at::Tensor&,
                                const std::optional<at::Tensor>&, double, bool, std::optional<double>, bool) {
  return 0;  // SDPBackend::math
}

// ---- What LibTorch asks of a device.

/// Streams whose work is done when it is asked for, so that events have nothing to wait for. An event is the number of
/// the stream it was recorded in, and one.
class Guard final : public c10::impl::DeviceGuardImplInterface {
 public:
  c10::DeviceType type() const override { return at::kCUDA; }
  c10::Device exchangeDevice(c10::Device /*device*/) const override { return gpu; }
  c10::Device getDevice() const override { return gpu; }
  void setDevice(c10::Device /*device*/) const override {}
  void uncheckedSetDevice(c10::Device /*device*/) const noexcept override {}
  c10::Stream getStream(c10::Device device) const noexcept override {
    return c10::Stream(c10::Stream::UNSAFE, device, current_stream);
  }
  c10::Stream getDefaultStream(c10::Device device) const override { return c10::Stream(c10::Stream::DEFAULT, device); }
  c10::Stream exchangeStream(c10::Stream stream) const noexcept override {
    return c10::Stream(c10::Stream::UNSAFE, stream.device(), std::exchange(current_stream, stream.id()));
  }
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
  bool queryStream(const c10::Stream& /*stream*/) const override { return true; }
  void synchronizeStream(const c10::Stream& /*stream*/) const override { wait_for("a stream"); }
  void record(void** event, const c10::Stream& stream, const c10::DeviceIndex /*device*/,
              const c10::EventFlag /*flag*/) const override {
    *event = reinterpret_cast<void*>(stream.id() + 1);
  }
  void block(void* event, const c10::Stream& stream) const override {
    TORCH_CHECK(recorded_stream == 0 || reinterpret_cast<c10::StreamId>(event) != recorded_stream + 1 ||
                    stream.id() == recorded_stream,
                "CUDA error: operation would make stream ", stream.id(), " depend on a capturing stream");
  }
  bool queryEvent(void* /*event*/) const override { return true; }
  void destroyEvent(void* /*event*/, const c10::DeviceIndex /*device*/) const noexcept override {}
  void recordDataPtrOnStream(const c10::DataPtr& /*data*/, const c10::Stream& /*stream*/) const override {}
};

/// None says that it overrides: some releases do not have all of these.
struct Hooks final : at::CUDAHooksInterface {
  void init() const {}
  bool isBuilt() const { return true; }  // newer releases ask; no, since older ones do not
  bool hasCUDA() const { return true; }
  bool isAvailable() const { return true; }
  int getNumGPUs() const { return 1; }
  c10::DeviceIndex deviceCount() const { return 1; }
  c10::DeviceIndex current_device() const { return 0; }
  c10::DeviceIndex getCurrentDevice() const { return 0; }
  bool hasPrimaryContext(c10::DeviceIndex /*device*/) const { return true; }
  const at::Generator& getDefaultGenerator(c10::DeviceIndex /*device*/) const { return default_generator(); }
  at::Generator getNewGenerator(c10::DeviceIndex /*device*/) const { return at::make_generator<Generator>(); }
  c10::Device getDeviceFromPtr(void* /*data*/) const { return gpu; }
  c10::Allocator* getPinnedMemoryAllocator() const { return c10::GetAllocator(at::kCPU); }
  void deviceSynchronize(c10::DeviceIndex /*device*/) const { wait_for("the device"); }
};

}  // namespace

void make_stand_in_gpu() {
  if (std::getenv("MICROREG_STAND_IN_GPU") == nullptr || exists) {
    return;
  }
  if (c10::impl::hasDeviceGuardImpl(at::kCUDA)) {
    std::cout << "skipped: no stand-in for a GPU beside LibTorch's own CUDA" << std::endl;
    std::exit(0);
  }
  static const c10::impl::DeviceGuardImplRegistrar guard(at::kCUDA, new Guard);
  c10::SetAllocator(at::kCUDA, &allocator);
  at::CUDAHooksRegistry()->Register("CUDAHooks", [](at::CUDAHooksArgs) -> std::unique_ptr<at::CUDAHooksInterface> {
    return std::make_unique<Hooks>();
  });
  static torch::Library operations(torch::Library::IMPL, "aten", c10::DispatchKey::CUDA, __FILE__, __LINE__);
  operations.impl("empty.memory_format", &empty);
  operations.impl("empty_strided", &empty_strided);
  operations.impl("as_strided", &at::native::as_strided_tensorimpl);
  operations.impl("view", static_cast<at::Tensor (*)(const at::Tensor&, at::IntArrayRef)>(&at::native::view));
  operations.impl("_reshape_alias", &at::native::_reshape_alias);
  operations.impl("unfold", &at::native::unfold);
  operations.impl("view_as_real", &at::native::view_as_real);
  operations.impl("view_as_complex", &at::native::view_as_complex);
  operations.impl("alias", &at::native::alias);
  operations.impl("resize_", &resize_);
  operations.impl("copy_", &copy_);
  operations.impl("set_", &set_);
  operations.impl(
      "set_.source_Storage_storage_offset",
      static_cast<at::Tensor& (*)(at::Tensor&, at::Storage, std::int64_t, at::IntArrayRef, at::IntArrayRef)>(
          &at::native::set_storage_cpu_));
  operations.impl("set_.source_Tensor", &at::native::set_tensor_);
  operations.impl("hardsigmoid.out", &hardsigmoid_to);
  operations.impl("hardswish.out", &hardswish_to);
  operations.impl("hardswish", &hardswish);
  operations.impl("hardswish_", &hardswish_);
  operations.impl("native_dropout", &native_dropout);
  operations.impl("batch_norm_backward_reduce", &batch_norm_backward_reduce);
  operations.impl("native_batch_norm_backward", &native_batch_norm_backward);
  operations.impl("_thnn_fused_lstm_cell", &lstm_cell);
  operations.impl("_thnn_fused_lstm_cell_backward_impl", &lstm_cell_backward);
  operations.impl("_fused_sdp_choice", &composed_attention);
  for (const char* name : {"convolution", "convolution_backward"}) {
    operations.impl(name, torch::CppFunction::makeFromBoxedFunction<&run_on_cpu>());
  }
  static torch::Library others(torch::Library::IMPL, "_", c10::DispatchKey::CUDA, __FILE__, __LINE__);
  others.fallback(torch::CppFunction::makeFromBoxedFunction<&run_on_cpu>());
  static torch::Library sparse_operations(torch::Library::IMPL, "aten", c10::DispatchKey::SparseCUDA, __FILE__,
                                          __LINE__);
  sparse_operations.impl("sparse_dim", &at::native::sparse_dim_sparse);
  sparse_operations.impl("dense_dim", &at::native::dense_dim_sparse);
  sparse_operations.impl("_nnz", &at::native::_nnz_sparse);
  sparse_operations.impl("is_coalesced", &at::native::is_coalesced_sparse);
  sparse_operations.impl("_coalesced_", &at::native::_coalesced_sparse_);
  sparse_operations.impl("_indices", &at::native::_indices_sparse);
  sparse_operations.impl("_values", &at::native::_values_sparse);
  static torch::Library sparse_others(torch::Library::IMPL, "_", c10::DispatchKey::SparseCUDA, __FILE__, __LINE__);
  sparse_others.fallback(torch::CppFunction::makeFromBoxedFunction<&run_on_cpu>());
  exists = true;
}

bool has_stand_in_gpu() { return exists; }

bool in_stand_in_kernel() { return in_kernel; }

void make_stand_in_waits_an_error(bool errors) { waits_are_errors = errors; }

RecordedOnStandIn::RecordedOnStandIn() {
  if (exists) {
    static std::atomic<c10::StreamId> last = 0;
    before_ = std::exchange(current_stream, ++last);
    recorded_stream = current_stream;
  }
}

RecordedOnStandIn::~RecordedOnStandIn() {
  if (exists) {
    current_stream = before_;
    recorded_stream = 0;
  }
}

}  // namespace helpers
