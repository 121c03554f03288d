// The Hamming family for NumPy, on std::thread, and facts about the build: an extension module that needs no torch.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "../cpu/hamming.h"
#include "../cpu/hamming_driver.h"
#include "../cpu/isa.h"
#include "threads.h"

namespace py = pybind11;
using namespace embedding_kernels;

namespace {

using Bytes = py::array_t<uint8_t, py::array::c_style>;

// More threads than this help nobody, and sizes are multiplied by their number.
constexpr int64_t kMaxThreads = 1 << 14;

int64_t thread_count(int64_t num_threads) {
  if (num_threads > 0) return std::min(num_threads, kMaxThreads);
  return std::max<int64_t>(1, std::thread::hardware_concurrency());
}

// Read where they lie, at any stride between rows; the caller has seen to it that the bytes of a row are dense.
Codes codes_of(const py::array& rows) {
  return {static_cast<const uint8_t*>(rows.data()), rows.shape(0), rows.strides(0), rows.shape(1)};
}

const uint8_t* bytes_of(const std::optional<Bytes>& allowed) { return allowed ? allowed->data() : nullptr; }

Bytes pack_bits(const py::array& x, int64_t num_threads) {
  const Dtype dtype = x.itemsize() == 4 ? kFloat32 : kFloat16;
  const int64_t rows = x.shape(0), dim = x.shape(1), bytes = (dim + 7) / 8, stride = x.strides(0);
  Bytes out({rows, bytes});
  const auto* from = static_cast<const uint8_t*>(x.data());
  uint8_t* to = out.mutable_data();
  const auto pack = hamming_loops().pack_bits[dtype];
  const py::gil_scoped_release release;
  const int64_t parts = rows * dim < (1 << 16) ? 1 : thread_count(num_threads);
  ThreadParallelFor{parts}(parts, [&](int64_t part) {
    for (int64_t n = rows * part / parts; n < rows * (part + 1) / parts; ++n)
      pack(from + n * stride, dim, to + n * bytes);
  });
  return out;
}

py::array_t<int32_t> distance(const py::array& queries, const py::array& codes, int64_t num_threads) {
  py::array_t<int32_t> out({queries.shape(0), codes.shape(0)});
  const Codes from = codes_of(queries), to = codes_of(codes);
  int32_t* data = out.mutable_data();
  const py::gil_scoped_release release;
  const int64_t count = thread_count(num_threads);
  hamming_distance(hamming_loops(), from, to, data, count, ThreadParallelFor(count));
  return out;
}

py::tuple topk(const py::array& queries, const py::array& codes, int64_t k, const std::optional<Bytes>& allowed,
               int64_t num_threads) {
  py::array_t<int32_t> distances({queries.shape(0), static_cast<py::ssize_t>(k)});
  py::array_t<int64_t> indices({queries.shape(0), static_cast<py::ssize_t>(k)});
  const TopK out = {k, distances.mutable_data(), indices.mutable_data()};
  const Codes from = codes_of(queries), to = codes_of(codes);
  const uint8_t* mask = bytes_of(allowed);
  {
    const py::gil_scoped_release release;
    const int64_t count = thread_count(num_threads);
    hamming_topk(hamming_loops(), from, to, mask, out, count, ThreadParallelFor(count));
  }
  return py::make_tuple(distances, indices);
}

py::tuple range(const py::array& queries, const py::array& codes, int64_t radius, const std::optional<Bytes>& allowed,
                int64_t num_threads) {
  const Codes from = codes_of(queries), to = codes_of(codes);
  const uint8_t* mask = bytes_of(allowed);
  const int64_t count = thread_count(num_threads);
  RangeAnswers answers;
  {
    const py::gil_scoped_release release;
    answers = hamming_range(hamming_loops(), from, to, mask, radius, count, ThreadParallelFor(count));
  }
  py::array_t<int64_t> offsets(answers.offsets.size(), answers.offsets.data());
  py::array_t<int32_t> distances(answers.offsets.back());
  py::array_t<int64_t> indices(answers.offsets.back());
  int32_t* to_distances = distances.mutable_data();
  int64_t* to_indices = indices.mutable_data();
  {
    const py::gil_scoped_release release;
    write_range(answers, to_distances, to_indices, ThreadParallelFor(count));
  }
  return py::make_tuple(offsets, distances, indices);
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
  m.def("hamming_range", &range);
  m.def(
      "isa", [] { return std::string(isa_name(isa())); }, "Level in use; ValueError if a forced one is not to be had.");
  m.def("isa_levels", &isa_levels, "Levels that this processor and build have, lowest first.");
  m.attr("compiler") = EMBEDDING_KERNELS_COMPILER;
  m.attr("built_for_torch") = EMBEDDING_KERNELS_TORCH_VERSION;
}
