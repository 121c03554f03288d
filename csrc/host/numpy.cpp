// The Hamming family for NumPy, on std::thread, and facts about the build: an extension module that needs no torch.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <atomic>
#include <exception>
#include <mutex>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "../cpu/hamming.h"
#include "../cpu/hamming_driver.h"
#include "../cpu/isa.h"

namespace py = pybind11;
using namespace embedding_kernels;

namespace {

// The drivers' parallel_for on threads of its own; the first exception of a task is raised in the caller.
class ThreadParallelFor {
 public:
  explicit ThreadParallelFor(int64_t threads) : threads_(threads) {}

  template <class Task>
  void operator()(int64_t count, const Task& task) const {
    std::atomic<int64_t> next{0};
    std::exception_ptr failure;
    std::mutex guard;
    const auto work = [&] {
      try {
        for (int64_t i; (i = next++) < count;) task(i);
      } catch (...) {
        const std::lock_guard<std::mutex> lock(guard);
        if (!failure) failure = std::current_exception();
        next = count;
      }
    };
    std::vector<std::thread> others;
    for (int64_t t = 1; t < std::min(threads_, count); ++t) others.emplace_back(work);
    work();
    for (std::thread& other : others) other.join();
    if (failure) std::rethrow_exception(failure);
  }

 private:
  int64_t threads_;
};

using Bytes = py::array_t<uint8_t, py::array::c_style>;

int64_t thread_count(int64_t threads) {
  return threads > 0 ? threads : std::max<int64_t>(1, std::thread::hardware_concurrency());
}

Codes codes_of(const Bytes& array) { return {array.data(), array.shape(0), array.shape(1), array.shape(1)}; }

Bytes pack_bits(const py::array& x, int64_t threads) {
  const Dtype dtype = x.itemsize() == 4 ? kFloat32 : kFloat16;
  const int64_t rows = x.shape(0), dim = x.shape(1), bytes = (dim + 7) / 8, stride = x.strides(0);
  Bytes out({rows, bytes});
  const auto* from = static_cast<const uint8_t*>(x.data());
  uint8_t* to = out.mutable_data();
  const auto pack = hamming_loops().pack_bits[dtype];
  const py::gil_scoped_release release;
  const int64_t parts = rows * dim < (1 << 16) ? 1 : thread_count(threads);
  ThreadParallelFor{parts}(parts, [&](int64_t part) {
    for (int64_t n = rows * part / parts; n < rows * (part + 1) / parts; ++n)
      pack(from + n * stride, dim, to + n * bytes);
  });
  return out;
}

py::array_t<int32_t> distance(const Bytes& queries, const Bytes& codes, int64_t threads) {
  py::array_t<int32_t> out({queries.shape(0), codes.shape(0)});
  const Codes from = codes_of(queries), to = codes_of(codes);
  int32_t* data = out.mutable_data();
  const py::gil_scoped_release release;
  const int64_t count = thread_count(threads);
  hamming_distance(hamming_loops(), from, to, data, count, ThreadParallelFor(count));
  return out;
}

py::tuple topk(const Bytes& queries, const Bytes& codes, int64_t k, const std::optional<Bytes>& allowed,
               int64_t threads) {
  py::array_t<int32_t> distances({queries.shape(0), static_cast<py::ssize_t>(k)});
  py::array_t<int64_t> indices({queries.shape(0), static_cast<py::ssize_t>(k)});
  const TopK out = {k, distances.mutable_data(), indices.mutable_data()};
  const Codes from = codes_of(queries), to = codes_of(codes);
  const uint8_t* mask = allowed ? allowed->data() : nullptr;
  {
    const py::gil_scoped_release release;
    const int64_t count = thread_count(threads);
    hamming_topk(hamming_loops(), from, to, mask, out, count, ThreadParallelFor(count));
  }
  return py::make_tuple(distances, indices);
}

py::list isa_levels() {
  py::list levels;
  for (Isa level : {Isa::portable, Isa::avx2, Isa::avx512, Isa::amx}) {
    if (isa_available(level)) levels.append(isa_name(level));
  }
  return levels;
}

}  // namespace

PYBIND11_MODULE(_host, m) {
  m.doc() = "Torch-free kernels and build facts; use embedding_kernels.numpy, which checks its input.";
  m.def("pack_bits", &pack_bits);
  m.def("hamming_distance", &distance);
  m.def("hamming_topk", &topk);
  m.def(
      "isa", [] { return std::string(isa_name(isa())); }, "Level in use; ValueError if a forced one is not to be had.");
  m.def("isa_levels", &isa_levels, "Levels that this processor and build have, lowest first.");
  m.attr("compiler") = EMBEDDING_KERNELS_COMPILER;
  m.attr("built_for_torch") = EMBEDDING_KERNELS_TORCH_VERSION;
}
