// Distances, the nearest codes, and all codes within a radius: scans of the codes and the small kernels between them.
//
// The nearest k. A histogram of the distances of a part of the codes bounds the k-th of all; the histogram of sixteen
// times as many needs only what is within that bound, and so on up to all codes, which bound exactly. What is below the
// bound then, and the first codes at it, are written in the order of their indices; a stable sort by counting puts
// those below it in order. Both scans after the last histogram look only at tiles in which that found something, so
// codes are read little more than once where distances differ, and three times where all are equal. No step depends on
// the order in which threads run, and none on how many answers are asked for.
#include "../hamming_checks.h"
#include "../kernels.h"
#include "hamming_scan.cuh"
#include "ptx.cuh"

namespace embedding_kernels::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int32_t kNoDistance = 2147483647;
constexpr int64_t kNoIndex = -1;

// ---- kernels of a warp a query ----

__device__ inline int64_t first_warp() { return (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) / kWarp; }
__device__ inline int64_t all_warps() { return static_cast<int64_t>(gridDim.x) * (blockDim.x / kWarp); }

__device__ inline uint64_t shuffle(uint64_t value, uint32_t lane) {
  const uint64_t high = ptx::shuffle(static_cast<uint32_t>(value >> 32), lane);
  return high << 32 | ptx::shuffle(static_cast<uint32_t>(value), lane);
}

// Sum of the values of this lane and those below.
__device__ inline uint64_t sum_up_to(uint64_t value, int lane) {
#pragma unroll
  for (int by = 1; by < kWarp; by *= 2) {
    const uint64_t high = ptx::shuffle_up(static_cast<uint32_t>(value >> 32), by);
    const uint64_t low = ptx::shuffle_up(static_cast<uint32_t>(value), by);
    if (lane >= by) value += high << 32 | low;
  }
  return value;
}

// Queries with zeros up to `pitch`, a multiple of 32, their ones, and a bound that all begin with.
__global__ void lay_queries_kernel(const uint8_t* __restrict__ queries, int64_t count, int64_t stride, int64_t width,
                                   int64_t pitch, int32_t bound, uint32_t* __restrict__ out, int32_t* __restrict__ ones,
                                   int32_t* __restrict__ bounds) {
  const int lane = threadIdx.x % kWarp;
  for (int64_t q = first_warp(); q < count; q += all_warps()) {
    uint32_t found = 0;
    for (int64_t word = lane; word < pitch / 4; word += kWarp) {
      uint32_t bits = 0;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int64_t byte = 4 * word + i;
        if (byte < width) bits |= static_cast<uint32_t>(queries[q * stride + byte]) << (8 * i);
      }
      out[q * (pitch / 4) + word] = bits;
      found += ptx::count_bits(bits);
    }
    found = ptx::warp_add(found);
    if (lane == 0) {
      ones[q] = static_cast<int32_t>(found);
      bounds[q] = bound;
    }
  }
}

// The distance of the k-th code that was counted, which bounds that of the k-th of all: `bins` if there are fewer.
// Counts are consumed. At last: the first place of each distance, how many are closer than the bound, and the answers
// that no code fills.
__global__ void bound_kernel(uint64_t* __restrict__ histogram, int64_t count, int64_t bins, int64_t k, bool last,
                             int32_t* __restrict__ bounds, int64_t* __restrict__ first_places,
                             int64_t* __restrict__ closer, int32_t* __restrict__ out_distances,
                             int64_t* __restrict__ out_indices) {
  const int lane = threadIdx.x % kWarp;
  for (int64_t q = first_warp(); q < count; q += all_warps()) {
    const int64_t counted = bounds[q] < bins ? bounds[q] + int64_t{1} : bins;
    int64_t bound = bins;
    uint64_t before = 0, before_bound = 0;
    for (int64_t first = 0; first < counted; first += kWarp) {
      const int64_t bin = first + lane, entry = q * bins + bin;
      const uint64_t own = bin < counted ? histogram[entry] : 0;
      const uint64_t up_to = before + sum_up_to(own, lane);
      if (bin < counted) {
        histogram[entry] = 0;
        if (last) first_places[entry] = static_cast<int64_t>(up_to - own);
      }
      const uint32_t reached = ptx::vote_ballot(up_to >= static_cast<uint64_t>(k));
      if (bound == bins && reached != 0) {
        const uint32_t place = ptx::highest_bit(reached & (0u - reached));
        bound = first + place;
        before_bound = shuffle(up_to - own, place);
      }
      before = shuffle(up_to, kWarp - 1);
    }
    ptx::sync_warp();  // the bound was read by all
    const int64_t nearer = static_cast<int64_t>(bound < bins ? before_bound : before);
    if (lane == 0) bounds[q] = static_cast<int32_t>(bound);
    if (!last) continue;
    if (lane == 0) closer[q] = nearer;
    for (int64_t place = nearer + lane; bound == bins && place < k; place += kWarp) {
      out_distances[q * k + place] = kNoDistance;
      out_indices[q * k + place] = kNoIndex;
    }
  }
}

// counts [count, spans, 2] to the places of each span's first codes, and the sums of the first of each two.
__global__ void place_kernel(const uint32_t* __restrict__ counts, int64_t count, int64_t spans,
                             int64_t* __restrict__ places, int64_t* __restrict__ totals) {
  const int lane = threadIdx.x % kWarp;
  for (int64_t q = first_warp(); q < count; q += all_warps()) {
    uint64_t before[2] = {0, 0};
    for (int64_t first = 0; first < spans; first += kWarp) {
      const int64_t span = first + lane, entry = (q * spans + span) * 2;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const uint64_t own = span < spans ? counts[entry + i] : 0;
        const uint64_t up_to = before[i] + sum_up_to(own, lane);
        if (span < spans) places[entry + i] = static_cast<int64_t>(up_to - own);
        before[i] = shuffle(up_to, kWarp - 1);
      }
    }
    if (lane == 0) totals[q] = static_cast<int64_t>(before[0]);
  }
}

// totals [count] to offsets [count + 1], by one warp.
__global__ void offset_kernel(const int64_t* __restrict__ totals, int64_t count, int64_t* __restrict__ offsets) {
  const int lane = threadIdx.x;
  uint64_t before = 0;
  for (int64_t first = 0; first <= count; first += kWarp) {
    const int64_t q = first + lane;
    const uint64_t own = q < count ? static_cast<uint64_t>(totals[q]) : 0;
    const uint64_t up_to = before + sum_up_to(own, lane);
    if (q <= count) offsets[q] = static_cast<int64_t>(up_to - own);
    before = shuffle(up_to, kWarp - 1);
  }
}

// The first closer[query] codes of a list that ascends by index, to the places of their distances, which are consumed
// (lanes tell each other by them, so they are not __restrict__).
__global__ void order_kernel(const int32_t* __restrict__ list_distances, const int64_t* __restrict__ list_indices,
                             int64_t list_pitch, const int64_t* __restrict__ closer, int64_t* next_places,
                             int64_t count, int64_t bins, int64_t k, int32_t* __restrict__ out_distances,
                             int64_t* __restrict__ out_indices) {
  const int lane = threadIdx.x % kWarp;
  for (int64_t q = first_warp(); q < count; q += all_warps()) {
    for (int64_t first = 0; first < closer[q]; first += kWarp) {
      const bool is_entry = first + lane < closer[q];
      const int64_t entry = q * list_pitch + first + lane;
      const int32_t distance = is_entry ? list_distances[entry] : -1;
      int earlier = 0;
      bool is_last = true;
      for (int other = 0; other < kWarp; ++other) {
        const bool equal = static_cast<int32_t>(ptx::shuffle(static_cast<uint32_t>(distance), other)) == distance;
        earlier += equal && other < lane;
        is_last &= !(equal && other > lane);
      }
      int64_t* const next = next_places + q * bins + (is_entry ? distance : 0);
      const int64_t place = is_entry ? *next + earlier : 0;
      ptx::sync_warp();
      if (is_entry && is_last) *next = place + 1;
      ptx::sync_warp();
      if (is_entry) {
        out_distances[q * k + place] = distance;
        out_indices[q * k + place] = list_indices[entry];
      }
    }
  }
}

dim3 warp_each(int64_t count) { return dim3(blocks_for(count, kThreads / kWarp)); }

// ---- what a search of some queries needs ----

struct LaidQueries {
  Tensor rows, ones, bounds;
};

// Queries [first, first + scan.query_count), and the same in the scan.
LaidQueries lay_queries(const char* op, const Tensor& queries, int64_t first, int64_t bound, Scan& scan) {
  const int64_t count = scan.query_count, pitch = int64_t{scan.chunks} * scan.row_bytes;
  LaidQueries laid = {empty_like_device(queries, {count, pitch}, ScalarType::Byte),
                      empty_like_device(queries, {count}, ScalarType::Int),
                      empty_like_device(queries, {count}, ScalarType::Int)};
  auto* const rows = mutable_pointer<uint8_t>(laid.rows);
  launch(op, lay_queries_kernel, warp_each(count), dim3(kThreads), 0, current_stream(queries),
         pointer<uint8_t>(queries) + first * queries.stride(0), count, queries.stride(0), queries.size(1), pitch,
         static_cast<int32_t>(bound), reinterpret_cast<uint32_t*>(rows), mutable_pointer<int32_t>(laid.ones),
         mutable_pointer<int32_t>(laid.bounds));
  scan.queries = rows;
  scan.query_ones = pointer<int32_t>(laid.ones);
  return laid;
}

// Room for a mark a tile and warp of queries; without it, all tiles are looked at again.
constexpr int64_t kMostMarks = int64_t{1} << 28;

std::optional<Tensor> mark_near_tiles(const Tensor& like, Scan& scan) {
  const int64_t marks = int64_t{scan.groups} * scan.sharers * scan.tiles;
  if (marks > kMostMarks) return std::nullopt;
  Tensor near = empty_like_device(like, {marks}, ScalarType::Byte);
  scan.near_tiles = mutable_pointer<uint8_t>(near);
  return near;
}

struct Places {
  Tensor counts, places, totals;
};

// The places of what is within the bounds, span by span.
Places count_near(const char* op, const Tensor& like, Scan& scan) {
  const int64_t count = scan.query_count;
  Places found = {empty_like_device(like, {count, scan.spans, 2}, ScalarType::Int),
                  empty_like_device(like, {count, scan.spans, 2}, ScalarType::Long),
                  empty_like_device(like, {count}, ScalarType::Long)};
  auto* const counts = reinterpret_cast<uint32_t*>(mutable_pointer<int32_t>(found.counts));
  scan.mode = ScanMode::kCount;
  scan.counts = counts;
  run_scan(op, scan, current_stream(like));
  launch(op, place_kernel, warp_each(count), dim3(kThreads), 0, current_stream(like), counts, count, scan.spans,
         mutable_pointer<int64_t>(found.places), mutable_pointer<int64_t>(found.totals));
  scan.places = pointer<int64_t>(found.places);
  return found;
}

std::optional<Tensor> contiguous(const std::optional<Tensor>& tensor) {
  return tensor ? std::optional(torch::stable::contiguous(*tensor)) : std::nullopt;
}

// ---- the nearest codes ----

// What becomes of a turn of queries in hamming_topk.
struct Answers {
  int64_t k;
  int32_t* distances;
  int64_t* indices;
};

constexpr int64_t kHistogramEntries = int64_t{1} << 24;
constexpr int64_t kFirstCodes = 1024;  // at least so many bound the rest, or sixteen times as many as answers

// How many times as many tiles the last round has as the one before, on Hopper. What that round finds near, ratio · k
// codes a query, has whole row groups look at whole tiles again.
int64_t last_ratio_on_hopper(const Scan& scan, int64_t k) {
  constexpr double kPairs = 64.0 * 256;
  const double near = kPairs * static_cast<double>(k) / static_cast<double>(std::max<int64_t>(scan.count, 1));
  const auto cost = [&](int64_t ratio) {
    return 1 / static_cast<double>(ratio) + std::min(1.0, near * static_cast<double>(ratio));
  };
  int64_t best = 16;
  for (const int64_t ratio : {8, 4, 2}) {
    if (cost(ratio) < cost(best)) best = ratio;
  }
  return best;
}

// The share of the tiles in each round of histograms, the last one 1: few queries can afford to look again at more of
// what is found, many are better bounded.
std::vector<int64_t> round_strides(const Scan& scan, int64_t k) {
  const int64_t ratio = scan.few ? 64 : 16, least = std::max(kFirstCodes, 16 * k) / scan.tile_codes;
  std::vector<int64_t> strides = {1};
  // what comes first is looked at as a whole, so that a large second round needs another before it
  const int64_t last = scan.on_hopper ? last_ratio_on_hopper(scan, k) : ratio;
  if (scan.tiles / last / ratio >= least) strides.insert(strides.begin(), last);
  while (scan.tiles / strides.front() / ratio >= least) strides.insert(strides.begin(), strides.front() * ratio);
  return strides;
}

void topk_turn(const Tensor& queries, int64_t first, int64_t count, const Tensor& codes, const uint8_t* allowed,
               const Answers& out) {
  const char* const op = "hamming_topk";
  const cudaStream_t stream = current_stream(codes);
  Scan scan = plan_scan(codes, count);
  LaidQueries laid = lay_queries(op, queries, first, scan.bins, scan);
  const int64_t entries = count * scan.bins, listed = std::min(out.k, scan.count);
  Tensor histogram = empty_like_device(codes, {entries}, ScalarType::Long);
  Tensor first_places = empty_like_device(codes, {entries}, ScalarType::Long);
  Tensor closer = empty_like_device(codes, {count}, ScalarType::Long);
  fill_zero(op, mutable_pointer<int64_t>(histogram), entries * sizeof(int64_t), stream);
  auto* const bounds = mutable_pointer<int32_t>(laid.bounds);
  auto* const places = mutable_pointer<int64_t>(first_places);
  auto* const nearer = mutable_pointer<int64_t>(closer);
  scan.allowed = allowed;
  scan.mode = ScanMode::kHistogram;
  scan.bounds = bounds;
  scan.ties = true;
  scan.histogram = reinterpret_cast<uint64_t*>(mutable_pointer<int64_t>(histogram));
  std::optional<Tensor> near_tiles;
  for (const int64_t stride : round_strides(scan, out.k)) {
    visit_every(scan, stride, codes);
    if (stride == 1) near_tiles = mark_near_tiles(codes, scan);
    if (scan.tiles > 0) run_scan(op, scan, stream);
    launch(op, bound_kernel, warp_each(count), dim3(kThreads), 0, stream, scan.histogram, count, scan.bins, out.k,
           stride == 1, bounds, places, nearer, out.distances, out.indices);
  }
  if (scan.tiles == 0) return;

  Tensor list_distances = empty_like_device(codes, {count, listed}, ScalarType::Int);
  Tensor list_indices = empty_like_device(codes, {count, listed}, ScalarType::Long);
  scan.only_near = near_tiles.has_value();
  const Places found = count_near(op, codes, scan);
  scan.mode = ScanMode::kWrite;
  scan.list_pitch = listed;
  scan.list_distances = mutable_pointer<int32_t>(list_distances);
  scan.list_indices = mutable_pointer<int64_t>(list_indices);
  scan.closer = nearer;
  scan.k = out.k;
  scan.out_distances = out.distances;
  scan.out_indices = out.indices;
  run_scan(op, scan, stream);
  launch(op, order_kernel, warp_each(count), dim3(kThreads), 0, stream, scan.list_distances, scan.list_indices, listed,
         nearer, places, count, scan.bins, out.k, out.distances, out.indices);
}

}  // namespace

Tensor hamming_distance(Tensor queries, Tensor codes) {
  const char* const op = "hamming_distance";
  check_codes(op, queries, codes);
  const DeviceGuard guard(queries.get_device_index());
  queries = dense_rows(queries);
  codes = dense_rows(codes);
  Tensor out = empty_like_device(codes, {queries.size(0), codes.size(0)}, ScalarType::Int);
  if (queries.size(0) == 0 || codes.size(0) == 0) return out;
  Scan scan = plan_scan(codes, queries.size(0));
  const LaidQueries laid = lay_queries(op, queries, 0, 0, scan);
  visit_every(scan, 1, codes);
  scan.mode = ScanMode::kDistances;
  scan.distances = mutable_pointer<int32_t>(out);
  run_scan(op, scan, current_stream(codes));
  return out;
}

// The ones in the codes come with the product, so that no one needs to bring them.
std::tuple<Tensor, Tensor> hamming_topk(Tensor queries, Tensor codes, int64_t k, std::optional<Tensor> allowed,
                                        std::optional<Tensor> code_norms) {
  check_hamming_topk(queries, codes, k, allowed, code_norms);
  const DeviceGuard guard(queries.get_device_index());
  queries = dense_rows(queries);
  codes = dense_rows(codes);
  const std::optional<Tensor> mask = contiguous(allowed);
  const int64_t count = queries.size(0), bins = 8 * codes.size(1) + 1;
  Tensor distances = empty_like_device(codes, {count, k}, ScalarType::Int);
  Tensor indices = empty_like_device(codes, {count, k}, ScalarType::Long);
  auto* const out_distances = mutable_pointer<int32_t>(distances);
  auto* const out_indices = mutable_pointer<int64_t>(indices);
  // scratch is bounded: more queries than fit take turns
  const int64_t marks = kMostMarks / std::max<int64_t>((codes.size(0) + kTileCodes - 1) / kTileCodes, 1);
  const int64_t turn = std::max<int64_t>(std::min(kHistogramEntries / bins, marks * (kProductRows - 1)), kFewQueries);
  for (int64_t first = 0; first < count; first += turn) {
    topk_turn(queries, first, std::min(turn, count - first), codes, pointer_or_null<uint8_t>(mask),
              {k, out_distances + first * k, out_indices + first * k});
  }
  return {distances, indices};
}

std::tuple<Tensor, Tensor, Tensor> hamming_range(Tensor queries, Tensor codes, int64_t radius,
                                                 std::optional<Tensor> allowed) {
  const char* const op = "hamming_range";
  check_hamming_range(queries, codes, radius, allowed);
  const DeviceGuard guard(queries.get_device_index());
  queries = dense_rows(queries);
  codes = dense_rows(codes);
  const std::optional<Tensor> mask = contiguous(allowed);
  const int64_t count = queries.size(0);
  const cudaStream_t stream = current_stream(codes);
  Tensor offsets = empty_like_device(codes, {count + 1}, ScalarType::Long);
  auto* const starts = mutable_pointer<int64_t>(offsets);
  int64_t total = 0;
  Scan scan = plan_scan(codes, count);
  std::optional<LaidQueries> laid;
  std::optional<Tensor> near_tiles;
  std::optional<Places> found;
  if (count == 0 || scan.count == 0) {
    fill_zero(op, starts, (count + 1) * sizeof(int64_t), stream);
  } else {
    laid = lay_queries(op, queries, 0, std::min(radius, scan.bins), scan);
    scan.allowed = pointer_or_null<uint8_t>(mask);
    scan.bounds = pointer<int32_t>(laid->bounds);
    visit_every(scan, 1, codes);
    near_tiles = mark_near_tiles(codes, scan);
    found = count_near(op, codes, scan);
    launch(op, offset_kernel, dim3(1), dim3(kWarp), 0, stream, pointer<int64_t>(found->totals), count, starts);
    copy_to_host(op, &total, starts + count, sizeof(total), stream);
  }
  Tensor distances = empty_like_device(codes, {total}, ScalarType::Int);
  Tensor indices = empty_like_device(codes, {total}, ScalarType::Long);
  if (total > 0) {
    scan.mode = ScanMode::kWrite;
    scan.only_near = near_tiles.has_value();
    scan.starts = starts;
    scan.list_distances = mutable_pointer<int32_t>(distances);
    scan.list_indices = mutable_pointer<int64_t>(indices);
    run_scan(op, scan, stream);
  }
  return {offsets, distances, indices};
}

}  // namespace embedding_kernels::cuda
