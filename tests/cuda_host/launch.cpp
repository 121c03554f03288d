// The host side: launches, tensor maps, the buffers that an operator may touch, what tests ask of the emulation.
#include <sys/mman.h>

#include <cstring>
#include <mutex>
#include <new>
#include <set>
#include <stdexcept>

#include "block.h"
#include "memory.h"

namespace emulation {

void forget_buffers();

namespace {

int operators = 0;  // that are running, one inside another
std::set<std::string> launched;

constexpr size_t kMostShared = 227 * 1024;
size_t most_shared() { return architecture() == 90 ? kMostShared : 163 * 1024; }

// Pages of its own: memory from the heap could lie where a tensor was that has been freed since it was noted.
unsigned char* shared_memory_of_blocks() {
  static unsigned char* const memory = [] {
    void* mapped = mmap(nullptr, kMostShared, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (mapped == MAP_FAILED) throw std::bad_alloc();
    return static_cast<unsigned char*>(mapped);
  }();
  return memory;
}

// Why the driver would not make a map, or null. That strides be multiples of each other, as documentation also had it,
// is left out: maps of ragged rows never keep to it, Triton's neither.
const char* why_refused(const void* map, const void* data, int element_bytes, int rank, const uint64_t* sizes,
                        const uint64_t* strides, const uint32_t* box, bool swizzled) {
  if (reinterpret_cast<uintptr_t>(map) % 64 != 0) return "a map that begins at no multiple of 64 bytes";
  if (reinterpret_cast<uintptr_t>(data) % 16 != 0) return "data that begin at no multiple of 16 bytes";
  if (data == nullptr) return "no data";
  if (rank < 1 || rank > 5) return "a rank that is not 1 to 5";
  for (int d = 0; d < rank; ++d) {
    if (sizes[d] == 0 || sizes[d] > uint64_t{1} << 32) return "a size that is not 1 to 2^32";
    if (box[d] == 0 || box[d] > 256) return "a box that does not have 1 to 256 elements in each dimension";
    if (d == 0) continue;
    // not documented for a single row; no map of ours may depend on it
    if (strides[d] == 0) return "a stride of 0";
    if (strides[d] % 16 != 0) return "a stride that is no multiple of 16 bytes";
    if (strides[d] >= uint64_t{1} << 40) return "a stride of 2^40 bytes or more";
  }
  const uint64_t row = uint64_t{box[0]} * static_cast<uint64_t>(element_bytes);
  if (row % 16 != 0) return "a box whose rows are no multiple of 16 bytes";
  if (swizzled && row > 128) return "a swizzled box whose rows have more than 128 bytes";
  return nullptr;
}

[[noreturn]] void refuse(const char* op, const std::string& why) {
  throw std::runtime_error(std::string(op) + ": launch failed: " + why);
}

}  // namespace

DeviceGuard::DeviceGuard(int) {
  if (operators++ == 0) forget_buffers();
}
DeviceGuard::~DeviceGuard() { --operators; }

int architecture() { return options().architecture; }

void copy_to_host(const char*, void* to, const void* from, size_t bytes, cudaStream_t) { std::memcpy(to, from, bytes); }
void fill_zero(const char*, void* to, size_t bytes, cudaStream_t) { std::memset(to, 0, bytes); }

void run(const char* op, const void* kernel, dim3 grid, dim3 size, size_t shared_bytes, void (*entry)(const void*),
         const void* arguments, size_t argument_bytes) {
  static std::mutex one_at_a_time;
  const std::lock_guard<std::mutex> lock(one_at_a_time);
  const auto threads = uint64_t{size.x} * size.y * size.z;
  if (threads == 0 || threads > 1024) refuse(op, "a block of " + std::to_string(threads) + " threads");
  if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.x > 0x7fffffffu || grid.y > 0xffffu || grid.z > 0xffffu) {
    refuse(op, "a grid of " + std::to_string(grid.x) + " by " + std::to_string(grid.y) + " by " +
                   std::to_string(grid.z) + " blocks");
  }
  if (shared_bytes > most_shared()) refuse(op, std::to_string(shared_bytes) + " bytes of shared memory");
  launched.insert(describe_site(reinterpret_cast<uintptr_t>(kernel) + 1));
  unsigned char* const shared = shared_memory_of_blocks();
  MemoryOfLaunch memory(arguments, argument_bytes, shared, shared_bytes);
  const uint64_t blocks = uint64_t{grid.x} * grid.y * grid.z;
  try {
    for (uint64_t i = 0; i < blocks; ++i) {
      const uint64_t place = options().order == Order::kReverse ? blocks - 1 - i : i;
      const dim3 index(static_cast<unsigned>(place % grid.x), static_cast<unsigned>(place / grid.x % grid.y),
                       static_cast<unsigned>(place / grid.x / grid.y));
      memory.begin_block();
      std::memset(shared, 0xff, shared_bytes);
      Block(index, size, grid, static_cast<uint32_t>(place + 1), shared, shared_bytes).run(entry, arguments);
    }
  } catch (const std::runtime_error& error) {
    throw std::runtime_error(std::string(op) + ": the emulation found: " + error.what());
  }
}

void encode_tensor_map(const char* op, void* map, const void* data, int element_bytes, int rank, const uint64_t* sizes,
                       const uint64_t* strides, const uint32_t* box, bool swizzled) {
  const char* const refused = why_refused(map, data, element_bytes, rank, sizes, strides, box, swizzled);
  if (refused != nullptr) {
    throw std::runtime_error(std::string(op) + ": the CUDA driver refuses a tensor map: " + refused);
  }
  BoxMap made = {};
  made.mark = BoxMap::kMark;
  made.data = reinterpret_cast<uint64_t>(data);
  made.rank = static_cast<uint8_t>(rank);
  made.element_bytes = static_cast<uint8_t>(element_bytes);
  made.swizzled = swizzled;
  for (int d = 0; d < 5; ++d) {
    const bool given = d < rank;
    made.last[d] = given ? static_cast<uint32_t>(sizes[d] - 1) : 0;
    made.box[d] = given ? static_cast<uint16_t>(box[d]) : 1;
    made.strides[d] = d == 0 ? static_cast<uint64_t>(element_bytes) : given ? strides[d] : 0;
  }
  std::memset(map, 0, 128);
  std::memcpy(map, &made, sizeof made);
}

dim3 thread_index() { return current_thread->place; }
dim3 block_index() { return current_block->index; }
dim3 block_size() { return current_block->size; }
dim3 grid_size() { return current_block->grid; }

void* shared_bytes(size_t bytes) {
  const auto site = reinterpret_cast<uintptr_t>(__builtin_return_address(0));
  if (bytes > current_block->shared_size) {
    fail("a block shares " + std::to_string(bytes) + " bytes and was launched with " +
             std::to_string(current_block->shared_size),
         {site});
  }
  return current_block->shared;
}

}  // namespace emulation

#define EXPORT extern "C" __attribute__((visibility("default")))

// The order in which threads (and blocks) run: 0 forward, 1 reverse, 2 random, 3 one warp as far as it goes.
EXPORT void embedding_kernels_emulation_options(int order, uint64_t seed, int latest) {
  emulation::Options& options = emulation::options();
  options.order = static_cast<emulation::Order>(order);
  options.seed = seed;
  options.latest = latest != 0;
}

// The compute capability that is played: 80 or 90.
EXPORT void embedding_kernels_emulation_architecture(int architecture) {
  emulation::options().architecture = architecture;
}

// Names of the kernels launched since the last call, one a line; valid until the next call.
EXPORT const char* embedding_kernels_emulation_launched() {
  static std::string text;
  text.clear();
  for (const std::string& name : emulation::launched) text += name + "\n";
  emulation::launched.clear();
  return text.c_str();
}
