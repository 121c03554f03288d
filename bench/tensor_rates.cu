// What the units of a GPU do at most, one unit a kernel: products on tensor cores, counts of bits, exponentials. All
// operands are in registers, and in shared memory where products of warpgroups want them; nothing else is waited for.
// Prints one JSON. Built and read by tensor_rates.py; EMBEDDING_KERNELS_HOPPER adds what sm_90a alone has.
#include <cuda_runtime.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "ptx.cuh"
#if defined(EMBEDDING_KERNELS_HOPPER)
#include "warpgroup.cuh"
#endif

namespace {

namespace ptx = embedding_kernels::ptx;

constexpr int kThreads = 128;  // a warp for each of a multiprocessor's four schedulers, and a warpgroup
constexpr int kWarps = kThreads / 32;
constexpr double kMilliseconds = 10;  // of a timed launch
constexpr int kRepetitions = 5;

// Random bits: constant operands would draw less power than real ones, and let the clock rise.
__device__ inline uint32_t random_bits(uint32_t seed, uint32_t place) {
  uint32_t x = seed ^ (place * 128 + threadIdx.x) * 0x9e3779b9u;
  x = (x ^ x >> 16) * 0x85ebca6bu;
  x = (x ^ x >> 13) * 0xc2b2ae35u;
  return x ^ x >> 16;
}
// Two numbers between 1/2 and 1 of either sign.
__device__ inline uint32_t random_bfloat16(uint32_t seed, uint32_t place) {
  return (random_bits(seed, place) & 0x807f807fu) | 0x3f003f00u;
}

__device__ inline uint32_t folded(float value) { return ptx::bits_of(value); }
__device__ inline uint32_t folded(uint32_t value) { return value; }

// ---- units: begin, one round of the loop, end; a word that all results are in ----

// mma.sync, 2 × 4 tiles of sums as kernels have them, four times a round.
template <class Sum, void (*kMultiply)(Sum (&)[4], const uint32_t (&)[4], uint32_t, uint32_t),
          uint32_t (*kRandom)(uint32_t, uint32_t), int kDepth, int kEach>
struct WarpProducts {
  static constexpr int kTimes = 4;
  // of a block in a round; kEach counts a multiplication and an addition, or one bit compared
  static constexpr double kOperations = double{kWarps} * kTimes * 8 * 16 * 8 * kDepth * kEach;
  Sum sums[2][4][4] = {};
  uint32_t left[2][4], right[4][2];
  __device__ void begin(uint32_t seed) {
    for (int i = 0; i < 8; ++i) {
      left[i / 4][i % 4] = kRandom(seed, i);
      right[i / 2][i % 2] = kRandom(seed, 8 + i);
    }
  }
  __device__ void round() {
#pragma unroll
    for (int time = 0; time < kTimes; ++time) {
#pragma unroll
      for (int tile = 0; tile < 8; ++tile) {
        kMultiply(sums[tile / 4][tile % 4], left[tile / 4], right[tile % 4][0], right[tile % 4][1]);
      }
    }
  }
  __device__ void end() {}
  __device__ uint32_t digest() const {
    uint32_t all = 0;
    for (int i = 0; i < 32; ++i) all ^= folded(sums[i / 16][i / 4 % 4][i % 4]);
    return all;
  }
};
struct MultiplyBfloat16 : WarpProducts<float, ptx::multiply_bfloat16, random_bfloat16, 16, 2> {};
struct MultiplyBits : WarpProducts<uint32_t, ptx::multiply_bits, random_bits, 256, 1> {};

// An instruction of one result, each on that of eight instructions before.
template <class Value, Value (*kStep)(Value)>
struct Steps {
  static constexpr int kTimes = 8;
  static constexpr double kOperations = double{kThreads} * kTimes * 8;
  Value values[8];
  __device__ void begin(uint32_t seed) {
    for (int i = 0; i < 8; ++i) values[i] = static_cast<Value>(random_bits(seed, i));
  }
  __device__ void round() {
#pragma unroll
    for (int i = 0; i < kTimes * 8; ++i) values[i % 8] = kStep(values[i % 8]);
  }
  __device__ void end() {}
  __device__ uint32_t digest() const {
    uint32_t all = 0;
    for (int i = 0; i < 8; ++i) all ^= folded(values[i]);
    return all;
  }
};
__device__ inline float square_and_add(float x) { return ptx::fused_multiply_add(x, x, x); }
struct CountBits : Steps<uint32_t, ptx::count_bits> {};
struct Exp2 : Steps<float, ptx::exp2_near> {};
struct FusedMultiplyAdd : Steps<float, square_and_add> {};

#if defined(EMBEDDING_KERNELS_HOPPER)

namespace cuda = embedding_kernels::cuda;

// A panel of 64 rows, and four.
constexpr uint32_t kPanel = 64 * cuda::kPanelRow, kTiles = 5 * kPanel;

// wgmma: a warpgroup's sums [64, columns], four steps through the panels four times a round, and never more than one
// round under way beside the one that is begun.
template <class Kind, class Sum, int kColumns, uint32_t (*kRandom)(uint32_t, uint32_t), int kDepth, int kEach>
struct WarpgroupProducts {
  static constexpr int kTimes = 16;
  static constexpr double kOperations = double{kTimes} * 64 * kColumns * kDepth * kEach;
  Sum sums[kColumns / 8][4] = {};
  uint32_t held[4][4];  // the left factor, where it is in registers
  uint64_t left, right;
  __device__ void begin(uint32_t seed) {
    __shared__ unsigned char memory[kTiles + 1024];
    const uint32_t begins = ptx::shared_address(memory), tiles = (begins + 1023) / 1024 * 1024;
    uint32_t* words = reinterpret_cast<uint32_t*>(memory + (tiles - begins));
    for (uint32_t i = threadIdx.x; i < kTiles / 4; i += kThreads) words[i] = kRandom(seed, i);
    for (int i = 0; i < 16; ++i) held[i / 4][i % 4] = kRandom(seed, i);
    left = cuda::along_rows(tiles);
    right = Kind::kByColumns ? cuda::along_columns(tiles + kPanel, kPanel) : cuda::along_rows(tiles + kPanel);
    ptx::publish_stores();
    ptx::sync_block();
  }
  __device__ void round() {
    ptx::begin_products();
#pragma unroll
    for (int time = 0; time < kTimes; ++time) Kind::multiply(*this, time % 4);
    ptx::commit_products();
    ptx::wait_products<1>();
  }
  __device__ void end() {
    ptx::wait_products<0>();
    ptx::settle(sums);
  }
  __device__ uint32_t digest() const {
    uint32_t all = 0;
    for (int i = 0; i < kColumns / 2; ++i) all ^= folded(sums[i / 4][i % 4]);
    return all;
  }
};
struct MultiplyTilesBfloat16 : WarpgroupProducts<MultiplyTilesBfloat16, float, 128, random_bfloat16, 16, 2> {
  static constexpr bool kByColumns = false;
  template <class Products>
  __device__ static void multiply(Products& p, int step) {
    ptx::multiply_tiles_bfloat16(p.sums, cuda::further(p.left, 32 * step), cuda::further(p.right, 32 * step), 1);
  }
};
struct MultiplyHeldBfloat16 : WarpgroupProducts<MultiplyHeldBfloat16, float, 256, random_bfloat16, 16, 2> {
  static constexpr bool kByColumns = true;
  template <class Products>
  __device__ static void multiply(Products& p, int step) {
    ptx::multiply_held_bfloat16(p.sums, p.held[step], cuda::further(p.right, 16 * cuda::kPanelRow * step));
  }
};
struct CountCommonBits : WarpgroupProducts<CountCommonBits, uint32_t, 256, random_bits, 256, 1> {
  static constexpr bool kByColumns = false;
  template <class Products>
  __device__ static void multiply(Products& p, int step) {
    ptx::count_common_bits(p.sums, cuda::further(p.left, 32 * step), cuda::further(p.right, 32 * step), 1);
  }
};

#endif

// ---- the loop ----

// `never` is no digest in practice, which only who starts the kernel knows: what is computed must be.
template <class Unit>
__global__ void __launch_bounds__(kThreads)
    rate_kernel(int rounds, uint32_t seed, uint32_t never, long long* cycles, uint32_t* out) {
  Unit unit;
  unit.begin(seed);
  ptx::sync_block();
  const long long began = clock64();
#pragma unroll 1
  for (int round = 0; round < rounds; ++round) unit.round();
  unit.end();
  const long long ended = clock64();
  if (threadIdx.x == 0) cycles[blockIdx.x] = ended - began;
  if (unit.digest() == never) *out = seed;
}

__global__ void empty_kernel() {}

// ---- the host's side ----

void require(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  std::fprintf(stderr, "tensor_rates: %s: %s\n", what, cudaGetErrorString(error));
  std::exit(1);
}

double median(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  return values[values.size() / 2];
}

using Kernel = void (*)(int, uint32_t, uint32_t, long long*, uint32_t*);

struct Rate {
  const char *name, *operations_are;
  double operations;  // of a block in a round
  Kernel kernel;
};
template <class Unit>
constexpr Rate rate(const char* name, const char* operations_are) {
  return {name, operations_are, Unit::kOperations, rate_kernel<Unit>};
}

const Rate kRates[] = {
    rate<MultiplyBfloat16>("mma.sync m16n8k16 bfloat16", "bfloat16 operations"),
    rate<MultiplyBits>("mma.sync m16n8k256 b1 and.popc", "bits compared"),
#if defined(EMBEDDING_KERNELS_HOPPER)
    rate<MultiplyTilesBfloat16>("wgmma m64n128k16 bfloat16, both factors in shared memory", "bfloat16 operations"),
    rate<MultiplyHeldBfloat16>("wgmma m64n256k16 bfloat16, left factor in registers", "bfloat16 operations"),
    rate<CountCommonBits>("wgmma m64n256k256 b1 and.popc, both factors in shared memory", "bits compared"),
#endif
    rate<CountBits>("popc.b32", "words counted"),
    rate<Exp2>("ex2.approx.ftz.f32", "exponentials"),
    rate<FusedMultiplyAdd>("fma.rn.f32", "multiplications with addition"),
};

struct Device {
  int multiprocessors = 0;
  cudaEvent_t before, after;
  long long* cycles = nullptr;
  uint32_t* out = nullptr;
};

struct Launch {
  double milliseconds, cycles;  // between events; of the block that took longest
};

Launch launch(const Device& device, const Rate& rate, int blocks, int rounds) {
  require(cudaEventRecord(device.before), "recording");
  rate.kernel<<<static_cast<unsigned>(blocks), kThreads>>>(rounds, 12345, 0xdecade5au, device.cycles, device.out);
  require(cudaGetLastError(), rate.name);
  require(cudaEventRecord(device.after), "recording");
  require(cudaEventSynchronize(device.after), rate.name);
  float milliseconds = 0;
  require(cudaEventElapsedTime(&milliseconds, device.before, device.after), "timing");
  std::vector<long long> cycles(static_cast<size_t>(blocks));
  require(cudaMemcpy(cycles.data(), device.cycles, cycles.size() * sizeof(long long), cudaMemcpyDeviceToHost),
          "cycles");
  return {milliseconds, static_cast<double>(*std::max_element(cycles.begin(), cycles.end()))};
}

// The median launch by its time, and a line of the JSON.
void measure(const Device& device, const Rate& rate, int blocks_each, bool last) {
  const int blocks = blocks_each * device.multiprocessors;
  int rounds = 64;
  double once = launch(device, rate, blocks, rounds).milliseconds;
  for (; once < kMilliseconds / 8; once = launch(device, rate, blocks, rounds).milliseconds) rounds *= 4;
  rounds = std::max(1, static_cast<int>(rounds * kMilliseconds / once));
  std::vector<Launch> launches;
  for (int i = 0; i < kRepetitions; ++i) launches.push_back(launch(device, rate, blocks, rounds));
  std::sort(launches.begin(), launches.end(),
            [](const Launch& a, const Launch& b) { return a.milliseconds < b.milliseconds; });
  const Launch& middle = launches[kRepetitions / 2];
  const double operations = rate.operations * rounds * blocks;
  std::printf(
      "    {\"name\": \"%s\", \"operations_are\": \"%s\", \"warps\": %d, \"operations_per_second\": %.6g, "
      "\"operations_per_clock_and_multiprocessor\": %.2f, \"megahertz\": %.0f, \"milliseconds\": %.3f}%s\n",
      rate.name, rate.operations_are, blocks_each * kWarps, operations / middle.milliseconds * 1e3,
      operations / middle.cycles / device.multiprocessors, middle.cycles / middle.milliseconds / 1e3,
      middle.milliseconds, last ? "" : ",");
}

// An idle GPU's clock rises with work.
void warm_up(const Device& device) {
  for (double milliseconds = 0; milliseconds < 300;) {
    milliseconds += launch(device, kRates[0], device.multiprocessors, 20000).milliseconds;
  }
}

void measure_all(const Device& device) {
  for (const Rate& rate : kRates) {
    int most = 0;
    require(cudaFuncSetAttribute(rate.kernel, cudaFuncAttributePreferredSharedMemoryCarveout, 100), rate.name);
    require(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&most, rate.kernel, kThreads, 0), rate.name);
    most = std::min(most, 8);
    for (int blocks = 1; blocks <= most; blocks *= 2) {
      measure(device, rate, blocks, &rate == std::end(kRates) - 1 && blocks * 2 > most);
    }
  }
}

double microseconds_of(const Device& device, int launches) {
  require(cudaEventRecord(device.before), "recording");
  for (int i = 0; i < launches; ++i) empty_kernel<<<1, 32>>>();
  require(cudaEventRecord(device.after), "recording");
  require(cudaEventSynchronize(device.after), "empty kernels");
  float milliseconds = 0;
  require(cudaEventElapsedTime(&milliseconds, device.before, device.after), "timing");
  return milliseconds * 1e3 / launches;
}

// Empty kernels, one after the other, and each waited for by the host.
void measure_launches(const Device& device) {
  using Clock = std::chrono::steady_clock;
  std::vector<double> behind_each_other, waited_for;
  for (int i = 0; i < 11; ++i) behind_each_other.push_back(microseconds_of(device, 1000));
  for (int i = 0; i < 1000; ++i) {
    const auto began = Clock::now();
    empty_kernel<<<1, 32>>>();
    require(cudaDeviceSynchronize(), "an empty kernel");
    waited_for.push_back(std::chrono::duration<double, std::micro>(Clock::now() - began).count());
  }
  std::printf("  \"launch_microseconds\": {\"back_to_back\": %.2f, \"synchronised\": %.2f}\n",
              median(behind_each_other), median(waited_for));
}

}  // namespace

int main() {
  cudaDeviceProp properties;
  int kilohertz = 0;
  require(cudaGetDeviceProperties(&properties, 0), "the GPU");
  require(cudaDeviceGetAttribute(&kilohertz, cudaDevAttrClockRate, 0), "its clock");
  Device device;
  device.multiprocessors = properties.multiProcessorCount;
  require(cudaEventCreate(&device.before), "an event");
  require(cudaEventCreate(&device.after), "an event");
  require(cudaMalloc(&device.cycles, sizeof(long long) * 8 * static_cast<size_t>(device.multiprocessors)), "memory");
  require(cudaMalloc(&device.out, sizeof(uint32_t)), "memory");
  std::printf("{\n  \"gpu\": \"%s\", \"compute_capability\": \"%d.%d\", \"multiprocessors\": %d,\n", properties.name,
              properties.major, properties.minor, device.multiprocessors);
  std::printf("  \"megahertz_at_most\": %d, \"second_cache_bytes\": %d, \"rates\": [\n", kilohertz / 1000,
              properties.l2CacheSize);
  warm_up(device);
  measure_all(device);
  std::printf("  ],\n");
  measure_launches(device);
  std::printf("}\n");
}
