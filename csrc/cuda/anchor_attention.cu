// Attention of a query's anchors to the views of its passages on CUDA.
//
// Every view is read once for sixteen heads, and meets them twice: 32 queries of 100 passages of 4 views of 1,024
// values in bfloat16 are 26 MB, 5.5 us of 4.8 TB/s (more heads find them in the cache); 32 heads are 1.7 GFLOP, some 2
// us of tensor cores, where 67 TFLOP/s of float32 would be 25 us.
#include "../kernels.h"
#include "anchor_mix.cuh"

namespace embedding_kernels::cuda {
namespace {

// ---- tensor cores: rows of 16-bit values up to a width that registers hold ----

constexpr int kHeadRows = 16;      // heads of a block, of which some may not exist
constexpr int kTileRows = 16;      // passages at once
constexpr int kWarpColumns = 128;  // of a row: each warp multiplies, and sums, its own
constexpr int kWidest = 1024;

// kWarps warps cover a row. Rows stand 16 bytes apart from whole banks, so that eight of them are read at once.
template <int kWarps>
struct TensorShared {
  static constexpr int kPitch = kWarps * kWarpColumns / 2 + 4;  // words
  alignas(16) uint32_t rows[2][kTileRows][kPitch];
  alignas(16) float scores[kWarps][2][kWarp][4];  // what each warp's columns add to fragments of scores
};

template <class T>
__device__ inline void multiply(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  if constexpr (std::is_same_v<T, BFloat16>) {
    ptx::multiply_bfloat16(c, a, b0, b1);
  } else {
    ptx::multiply_float16(c, a, b0, b1);
  }
}

// Where a thread finds its own in shared memory; the rest of an address is constants.
template <int kWarps>
struct Places {
  static constexpr uint32_t kRow = TensorShared<kWarps>::kPitch * 4, kStage = kTileRows * kRow;
  static constexpr uint32_t kScores = kWarp * 16;
  uint32_t copied;                   // the chunk of a row that a thread copies
  uint32_t rows_first, rows_second;  // of this warp's columns: what a lane gives as its row of four 8 x 8 matrices
  uint32_t scores;                   // this lane's, of the first warp

  __device__ explicit Places(const TensorShared<kWarps>& shared) {
    const uint32_t rows = ptx::shared_address(&shared.rows[0][0][0]);
    const uint32_t lane = threadIdx.x % kWarp, low = lane / 8 % 2, high = lane / 16;
    const uint32_t columns = rows + threadIdx.x / kWarp * (kWarpColumns * 2) + lane % 8 * kRow;
    copied = rows + threadIdx.x / kWideChunks * kRow + threadIdx.x % kWideChunks * 16;
    rows_first = columns + low * 8 * kRow + high * 16;
    rows_second = columns + high * 8 * kRow + low * 16;
    scores = ptx::shared_address(&shared.scores[0][0][lane]);
  }

  // 16-byte chunks of a row: half as many as there are threads, so each turn of them copies two rows.
  static constexpr uint32_t kWideChunks = kWarps * kWarp / 2;
  static_assert(kWideChunks * 8 == kWarps * kWarpColumns);
};

// Starts copies of up to 16 rows; what does not exist is zero.
template <int kWarps, class T>
__device__ inline void copy_rows(const Places<kWarps>& places, uint32_t stage, const T* rows, int64_t stride, int count,
                                 int dim) {
  const int chunk = threadIdx.x % Places<kWarps>::kWideChunks, first = threadIdx.x / Places<kWarps>::kWideChunks;
  const bool inside = chunk * kWide<T> < dim;
  const T* from = inside ? rows + first * stride + chunk * kWide<T> : rows;
#pragma unroll
  for (int i = 0; i < kTileRows / 2; ++i) {
    const bool exists = inside && 2 * i + first < count;
    ptx::copy16_async(places.copied + stage * Places<kWarps>::kStage + 2 * i * Places<kWarps>::kRow,
                      exists ? from : rows, exists ? 16 : 0);
    from += 2 * stride;
  }
  ptx::commit_copies();
}

// Softmax of two heads, rows g and g + 8 of fragments, as the four lanes that share them keep it.
struct FragmentSoftmax {
  float most[2] = {-INFINITY, -INFINITY}, total[2] = {0, 0};

  // scores[j] are those of passages 8 j to 8 j + 7; they become powers. `correction` is what earlier powers are now
  // worth.
  __device__ void add(float (&scores)[2][4], float (&correction)[2]) {
    constexpr float log2e = 1.44269504088896341f;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float next = fmaxf(fmaxf(scores[0][2 * i], scores[0][2 * i + 1]), fmaxf(scores[1][2 * i], scores[1][2 * i + 1]));
      next = fmaxf(next, ptx::shuffle_xor(next, 1));
      next = fmaxf(most[i], fmaxf(next, ptx::shuffle_xor(next, 2)));
      // before any score above -inf nothing has a power; NaN and inf find their way by the differences
      const float base = next == -INFINITY ? 0.0f : next;
      correction[i] = ptx::exp2_near((most[i] - base) * log2e);
      most[i] = next;
      float sum = 0;
#pragma unroll
      for (int j = 0; j < 2; ++j) {
#pragma unroll
        for (int k = 2 * i; k < 2 * i + 2; ++k) sum += scores[j][k] = ptx::exp2_near((scores[j][k] - base) * log2e);
      }
      sum += ptx::shuffle_xor(sum, 1);
      sum += ptx::shuffle_xor(sum, 2);
      total[i] = total[i] * correction[i] + sum;
    }
  }
};

// Scores of a tile's passages, by all warps together: each gets them all, and -inf past the last passage.
template <class T, int kWarps>
__device__ inline void score_tile(const Places<kWarps>& places, uint32_t stage, const uint32_t (&queries)[8][4],
                                  int count, float (&scores)[2][4]) {
  const uint32_t rows = places.rows_second + stage * Places<kWarps>::kStage;
  float mine[2][4] = {};
#pragma unroll
  for (int k = 0; k < 8; ++k) {
    uint32_t views[4];
    ptx::load_matrices4(rows + k * 32, views);
    multiply<T>(mine[0], queries[k], views[0], views[1]);
    multiply<T>(mine[1], queries[k], views[2], views[3]);
  }
  const uint32_t warp = threadIdx.x / kWarp;
#pragma unroll
  for (uint32_t j = 0; j < 2; ++j) {
    const ptx::Words4 words = {ptx::bits_of(mine[j][0]), ptx::bits_of(mine[j][1]), ptx::bits_of(mine[j][2]),
                               ptx::bits_of(mine[j][3])};
    ptx::store_shared_words4(places.scores + (2 * warp + j) * Places<kWarps>::kScores, words);
  }
  ptx::sync_block();
  const int passage = threadIdx.x % 4 * 2;
#pragma unroll
  for (uint32_t j = 0; j < 2; ++j) {
#pragma unroll
    for (int k = 0; k < 4; ++k) scores[j][k] = 0;
#pragma unroll
    for (uint32_t w = 0; w < kWarps; ++w) {
      const ptx::Words4 words = ptx::load_shared_words4(places.scores + (2 * w + j) * Places<kWarps>::kScores);
#pragma unroll
      for (int k = 0; k < 4; ++k) scores[j][k] += ptx::float_of(words.word[k]);
    }
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      if (static_cast<int>(8 * j) + passage + k % 2 >= count) scores[j][k] = -INFINITY;
    }
  }
}

// Adds the tile's rows, by their powers, to the sums of this warp's columns.
template <class T, int kWarps>
__device__ inline void mix_tile(const Places<kWarps>& places, uint32_t stage, const float (&powers)[2][4],
                                const float (&correction)[2], float (&sums)[16][4]) {
  const uint32_t rows = places.rows_first + stage * Places<kWarps>::kStage;
  const uint32_t weights[4] = {pack_pair<T>(powers[0][0], powers[0][1]), pack_pair<T>(powers[0][2], powers[0][3]),
                               pack_pair<T>(powers[1][0], powers[1][1]), pack_pair<T>(powers[1][2], powers[1][3])};
#pragma unroll
  for (int n = 0; n < 16; n += 2) {
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      sums[n][k] *= correction[k / 2];
      sums[n + 1][k] *= correction[k / 2];
    }
    uint32_t views[4];
    ptx::load_matrices4_transposed(rows + n * 16, views);
    multiply<T>(sums[n], weights, views[0], views[1]);
    multiply<T>(sums[n + 1], weights, views[2], views[3]);
  }
}

// Rounds the means of a warp's columns and stores them, by way of shared memory, 16 bytes at a time.
template <class T, int kWarps>
__device__ inline void store_means(TensorShared<kWarps>& shared, const float (&sums)[16][4], const float (&scale)[2],
                                   T* out, int heads, int dim) {
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  // the last tile has been read
  ptx::sync_block();
#pragma unroll
  for (int n = 0; n < 16; ++n) {
    const int word = (warp * kWarpColumns + n * 8) / 2 + lane % 4;
    shared.rows[0][lane / 4][word] = pack_pair<T>(sums[n][0] * scale[0], sums[n][1] * scale[0]);
    shared.rows[0][lane / 4 + 8][word] = pack_pair<T>(sums[n][2] * scale[1], sums[n][3] * scale[1]);
  }
  ptx::sync_warp();
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const int head = i * 2 + lane / 16, column = warp * kWarpColumns + lane % 16 * 8;
    if (head >= heads || column >= dim) continue;
    const ptx::Words4 words = ptx::load_shared_words4(ptx::shared_address(&shared.rows[0][head][column / 2]));
    ptx::store_words4(out + static_cast<int64_t>(head) * dim + column, words);
  }
}

// The sums of a span, which others join, and their softmax.
__device__ inline void store_sums(const float (&sums)[16][4], const FragmentSoftmax& softmax, float* parts,
                                  float* of_softmax, int heads, int dim) {
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int head = lane / 4 + 8 * i;
    if (head >= heads) break;
#pragma unroll
    for (int n = 0; n < 16; ++n) {
      const int column = warp * kWarpColumns + n * 8 + lane % 4 * 2;
      if (column >= dim) break;
      parts[static_cast<int64_t>(head) * dim + column] = sums[n][2 * i];
      parts[static_cast<int64_t>(head) * dim + column + 1] = sums[n][2 * i + 1];
    }
    if (warp > 0 || lane % 4 > 0) continue;
    of_softmax[2 * head] = softmax.most[i];
    of_softmax[2 * head + 1] = softmax.total[i];
  }
}

template <class T, int kWarps>
__global__ void __launch_bounds__(kWarps* kWarp, kWarps == 4 ? 3 : 2)
    anchor_attention_kernel(Anchoring<T> a, Mixed<T> mixed) {
  auto& shared = shared_memory<TensorShared<kWarps>>();
  const int groups = (a.heads + kHeadRows - 1) / kHeadRows;
  const int first_head = static_cast<int>(blockIdx.x % groups) * kHeadRows;
  const int heads = a.heads - first_head < kHeadRows ? a.heads - first_head : kHeadRows;
  const int view = static_cast<int>(blockIdx.x / groups % a.view_count);
  const MixSpan span(a.segments, blockIdx.x / groups / a.view_count);
  if (!span.exists()) return;
  const Places<kWarps> places(shared);
  const auto copy_tile = [&](int64_t start, uint32_t stage) {
    const int count = static_cast<int>(span.end - start < kTileRows ? span.end - start : kTileRows);
    copy_rows(places, stage, a.views.row(start, view), a.views.strides[0], count, a.dim);
    return count;
  };
  copy_rows(places, 1, a.queries.row(span.segment, view, first_head), a.queries.strides[2], heads, a.dim);
  int count = span.start < span.end ? copy_tile(span.start, 0) : 0;
  ptx::wait_copies<0>();
  ptx::sync_block();
  uint32_t queries[8][4];
#pragma unroll
  for (int k = 0; k < 8; ++k) ptx::load_matrices4(places.rows_first + Places<kWarps>::kStage + k * 32, queries[k]);
  float sums[16][4] = {};
  FragmentSoftmax softmax;
  uint32_t stage = 0;
  for (int64_t start = span.start; start < span.end; start += kTileRows, stage ^= 1) {
    // the tile has come, and everyone has read the one before
    ptx::wait_copies<0>();
    ptx::sync_block();
    const int own = count;
    if (start + kTileRows < span.end) count = copy_tile(start + kTileRows, stage ^ 1);
    float scores[2][4], correction[2];
    score_tile<T>(places, stage, queries, own, scores);
    softmax.add(scores, correction);
    mix_tile<T>(places, stage, scores, correction, sums);
  }
  const int64_t within = static_cast<int64_t>(view) * a.heads + first_head;
  const int64_t of_query = static_cast<int64_t>(a.view_count) * a.heads;
  if (span.is_whole()) {
    // a query without passages has nothing to weigh
    const bool any = span.last > span.first;
    const float scale[2] = {any ? 1.0f / softmax.total[0] : 1.0f, any ? 1.0f / softmax.total[1] : 1.0f};
    store_means(shared, sums, scale, mixed.out + (span.segment * of_query + within) * a.dim, heads, a.dim);
  } else {
    const int64_t at = span.part() * of_query + within;
    store_sums(sums, softmax, mixed.parts + at * a.dim, mixed.softmax + 2 * at, heads, a.dim);
  }
}

template <class T>
void start_on_tensor_cores(const char* op, const AnchorTensors& tensors, Tensor& out) {
  const Anchoring<T> a = tensors.anchoring<T>();
  const cudaStream_t stream = current_stream(out);
  const int64_t rows = int64_t{a.view_count} * a.heads, groups = (a.heads + kHeadRows - 1) / kHeadRows;
  MixParts buffers(out, a.segments, rows, a.dim, true);
  const Mixed<T> mixed = buffers.mixed<T>(out);
  const dim3 grid(static_cast<unsigned>(MixSpan::turns(a.segments) * a.view_count * groups));
  const auto start = [&]<int kWarps>(std::integral_constant<int, kWarps>) {
    launch(op, anchor_attention_kernel<T, kWarps>, grid, dim3(kWarps * kWarp), sizeof(TensorShared<kWarps>), stream, a,
           mixed);
  };
  if (a.dim <= 4 * kWarpColumns) {
    start(std::integral_constant<int, 4>());
  } else if (a.dim <= 6 * kWarpColumns) {
    start(std::integral_constant<int, 6>());
  } else {
    start(std::integral_constant<int, 8>());
  }
  launch_join(op, a.segments, rows, a.dim, mixed, stream);
}

// Runs on tensor cores where they take the tensors.
template <class T>
bool ran_on_tensor_cores(const char* op, const AnchorTensors& tensors, Tensor& out) {
  if constexpr (sizeof(T) != 2) {
    return false;
  } else {
    if (tensors.views.size(2) > kWidest || !tensors.are_aligned<T>()) return false;
    start_on_tensor_cores<T>(op, tensors, out);
    return true;
  }
}

}  // namespace

Tensor anchor_attention(Tensor views, Tensor queries, Tensor cu_passages) {
  const char* const op = "anchor_attention";
  anchor::check_views(op, views, "queries", queries, cu_passages);
  const DeviceGuard guard(views.get_device_index());
  const AnchorTensors tensors(op, views, queries, cu_passages);
  Tensor out = empty_as(queries);
  if (out.numel() == 0) return out;
  with_float_type(views.scalar_type(), [&]<class T>(T) {
    if (!ran_on_tensor_cores<T>(op, tensors, out)) launch_mix(op, tensors, nullptr, out);
  });
  return out;
}

}  // namespace embedding_kernels::cuda
