// What a .cu file sees when g++ compiles it for the host emulation: CUDA's keywords, the launch, and PTX by its text.
// Everything here runs in instrumented code, so it is kept to calls into the emulation proper.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <type_traits>

#if defined(EMBEDDING_KERNELS_CUDA_HOST)
#include <torch/csrc/stable/tensor.h>
#endif

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __grid_constant__

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
using cudaStream_t = void*;

#define threadIdx (::emulation::thread_index())
#define blockIdx (::emulation::block_index())
#define blockDim (::emulation::block_size())
#define gridDim (::emulation::grid_size())

namespace emulation {

// Of the thread that runs.
dim3 thread_index();
dim3 block_index();
dim3 block_size();
dim3 grid_size();
void* shared_bytes(size_t bytes);

// Memory that kernels may touch until the outermost operator ends; parts may overlap.
void note_buffer(const void* data, size_t bytes);

// The compute capability that is played, 80 or 90: how much shared memory there is, which kernels there are.
int architecture();
// Writes a map for copies of boxes; throws std::runtime_error for what the driver would refuse.
void encode_tensor_map(const char* op, void* map, const void* data, int element_bytes, int rank, const uint64_t* sizes,
                       const uint64_t* strides, const uint32_t* box, bool swizzled);

// Runs a grid, block after block; throws std::runtime_error with what the emulation found.
void run(const char* op, const void* kernel, dim3 grid, dim3 block, size_t shared_bytes, void (*entry)(const void*),
         const void* arguments, size_t argument_bytes);

template <class Shared>
Shared& shared_memory() {
  return *static_cast<Shared*>(shared_bytes(sizeof(Shared)));
}

template <class... Parameters>
void launch(const char* op, void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t,
            std::type_identity_t<Parameters>... arguments) {
  const auto body = [=] { kernel(arguments...); };
  using Body = decltype(body);
  run(
      op, reinterpret_cast<const void*>(kernel), grid, block, shared_bytes,
      [](const void* held) { (*static_cast<std::add_pointer_t<Body>>(held))(); }, &body, sizeof(body));
}

// ---- PTX ----

// An operand of an instruction: its value, and where a new value goes.
struct Operand {
  enum Kind : uint8_t { kU16, kU32, kU64 };
  void* target;
  uint64_t value;
  Kind kind;
};

// Parses the text once and obeys it; operands are numbered outputs first, as in the text.
void execute(const char* text, std::initializer_list<Operand> outputs, std::initializer_list<Operand> inputs);

inline Operand in_u32(uint32_t value) { return {nullptr, value, Operand::kU32}; }
inline Operand in_f32(float value) { return {nullptr, __builtin_bit_cast(uint32_t, value), Operand::kU32}; }

#define EK_LIST(...) __VA_ARGS__
#define EK_PTX(text, outputs, inputs) ::emulation::execute(text, {EK_LIST outputs}, {EK_LIST inputs})
#define EK_PTX_PURE EK_PTX
#define EK_OUT_U16(x) (::emulation::Operand{&(x), 0, ::emulation::Operand::kU16})
#define EK_OUT_U32(x) (::emulation::Operand{&(x), 0, ::emulation::Operand::kU32})
#define EK_OUT_F32(x) (::emulation::Operand{&(x), 0, ::emulation::Operand::kU32})
#define EK_OUT_U64(x) (::emulation::Operand{&(x), 0, ::emulation::Operand::kU64})
#define EK_CHANGE_U32(x) (::emulation::Operand{&(x), (x), ::emulation::Operand::kU32})
#define EK_CHANGE_F32(x) (::emulation::Operand{&(x), __builtin_bit_cast(uint32_t, x), ::emulation::Operand::kU32})
#define EK_IN_U16(x) (::emulation::Operand{nullptr, (x), ::emulation::Operand::kU16})
#define EK_IN_U32(x) (::emulation::in_u32(x))
#define EK_IN_I32(x) (::emulation::in_u32(static_cast<uint32_t>(x)))
#define EK_IN_U64(x) (::emulation::Operand{nullptr, (x), ::emulation::Operand::kU64})
#define EK_IN_F32(x) (::emulation::in_f32(x))
#define EK_SUM_F32(x) (::emulation::Operand{&(x), 0, ::emulation::Operand::kU32})
#define EK_SUM_U32 EK_SUM_F32
#define EK_HELD_U32(x) (::emulation::Operand{const_cast<uint32_t*>(&(x)), 0, ::emulation::Operand::kU32})
#define EK_IN_POINTER(x) (::emulation::Operand{nullptr, reinterpret_cast<uint64_t>(x), ::emulation::Operand::kU64})
#define EK_IN_CONSTANT(x) (::emulation::Operand{nullptr, static_cast<uint64_t>(x), ::emulation::Operand::kU64})

// ---- host side of operators ----

// Buffers are forgotten when the outermost operator begins.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device);
  ~DeviceGuard();
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;
};

void copy_to_host(const char* op, void* to, const void* from, size_t bytes, cudaStream_t stream);
void fill_zero(const char* op, void* to, size_t bytes, cudaStream_t stream);

#if defined(EMBEDDING_KERNELS_CUDA_HOST)
using torch::stable::Tensor;

inline cudaStream_t current_stream(const Tensor&) { return nullptr; }
// few, so that loops over a grid take more than one turn
inline int multiprocessors(const Tensor&) { return 3; }
inline int capability(const Tensor&) { return architecture() / 10; }

inline void note_tensor(const Tensor& tensor) {
  if (tensor.numel() == 0) return;
  int64_t last = 0;
  for (int64_t d = 0; d < tensor.dim(); ++d) last += (tensor.size(d) - 1) * tensor.stride(d);
  note_buffer(tensor.const_data_ptr(), static_cast<size_t>((last + 1) * static_cast<int64_t>(tensor.element_size())));
}
template <class T>
const T* pointer(const Tensor& tensor) {
  note_tensor(tensor);
  return static_cast<const T*>(tensor.const_data_ptr());
}
template <class T>
T* mutable_pointer(Tensor& tensor) {
  note_tensor(tensor);
  return static_cast<T*>(tensor.mutable_data_ptr());
}
#endif

}  // namespace emulation
