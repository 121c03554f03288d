// What the conformance programs share: memory for operands and results on either side, and how a kernel is started.
#pragma once

#include <cstdint>
#include <cstdio>
#include <stdexcept>

#if defined(__CUDACC__)
#include <cuda_runtime_api.h>
#else
#include "emulation.h"
#endif

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace conformance {

// Operands and results of a launch, in words.
struct Work {
  const char* name;
  const uint32_t* in;
  size_t in_words;
  uint32_t* out;
  size_t out_words;
};

#if defined(__CUDACC__)

inline void raise_on_error(cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error(cudaGetErrorString(error));
}

// Memory of the device, given back at the end.
struct DeviceWords {
  uint32_t* data = nullptr;
  explicit DeviceWords(size_t words) { raise_on_error(cudaMalloc(&data, words * sizeof(uint32_t))); }
  ~DeviceWords() { cudaFree(data); }
  DeviceWords(const DeviceWords&) = delete;
  DeviceWords& operator=(const DeviceWords&) = delete;
};

template <class Shared>
__device__ inline Shared& shared_memory() {
  extern __shared__ __align__(1024) unsigned char conformance_shared[];
  return *reinterpret_cast<Shared*>(conformance_shared);
}

template <class... Parameters>
void start(const char*, void (*kernel)(Parameters...), int blocks, int threads, size_t shared_bytes,
           Parameters... arguments) {
  raise_on_error(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                      cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes)));
  kernel<<<static_cast<unsigned>(blocks), static_cast<unsigned>(threads), shared_bytes>>>(arguments...);
  raise_on_error(cudaGetLastError());
}

template <class Launch>
void with_memory(const Work& work, Launch launch) {
  DeviceWords from(work.in_words), to(work.out_words);
  const size_t out_bytes = work.out_words * sizeof(uint32_t);
  raise_on_error(cudaMemcpy(from.data, work.in, work.in_words * sizeof(uint32_t), cudaMemcpyHostToDevice));
  raise_on_error(cudaMemset(to.data, 0xff, out_bytes));
  launch(static_cast<const uint32_t*>(from.data), to.data);
  raise_on_error(cudaMemcpy(work.out, to.data, out_bytes, cudaMemcpyDeviceToHost));
}

#else

template <class Shared>
Shared& shared_memory() {
  return emulation::shared_memory<Shared>();
}

template <class... Parameters>
void start(const char* name, void (*kernel)(Parameters...), int blocks, int threads, size_t shared_bytes,
           Parameters... arguments) {
  emulation::launch(name, kernel, dim3(static_cast<unsigned>(blocks)), dim3(static_cast<unsigned>(threads)),
                    shared_bytes, nullptr, arguments...);
}

template <class Launch>
void with_memory(const Work& work, Launch launch) {
  const emulation::DeviceGuard guard(0);
  emulation::note_buffer(work.in, work.in_words * sizeof(uint32_t));
  emulation::note_buffer(work.out, work.out_words * sizeof(uint32_t));
  launch(work.in, work.out);
}

#endif

// An empty text, or what went wrong; valid until the next call.
template <class Launch>
const char* run(const Work& work, Launch launch) {
  static char report[4096];
  try {
    with_memory(work, launch);
  } catch (const std::runtime_error& error) {
    std::snprintf(report, sizeof report, "%s", error.what());
    return report;
  }
  return "";
}

}  // namespace conformance
