// One kernel goes over the codes for every search, hamming_scan.cu or on Hopper hamming_hopper.cu; here is what it is
// told.
#pragma once

#include <algorithm>

#include "launch.cuh"

namespace embedding_kernels::cuda {

enum class ScanMode : int32_t {
  kDistances,  // distances[query, code] are written
  kHistogram,  // histogram[query, distance] counts the codes near the query
  kCount,      // counts[query, span, 2]: codes below the query's bound, and at it
  kWrite,      // those codes are written, each span's from its place on
};

constexpr int kTileCodes = 32;      // a warp looks at one tile, a lane a code
constexpr int kParts = 4;           // tiles that a block looks at together, each of a span of its own
constexpr int kScanStages = 3;      // tiles that are at hand or under way
constexpr int kFewQueries = 4;      // so many read the codes by XOR; more of them are a product of bits
constexpr int kProductRows = 64;    // of which one is all ones: it counts the ones of the codes
constexpr int kMostSharers = 3;     // warps that look at a tile, each for queries of its own
constexpr int kMostPieces = 8;      // of 16 bytes, in a row of shared memory
constexpr int kDistancePitch = 40;  // 32 and a shift, so that rows of a fragment lie in different banks
constexpr int kDistanceRows = 16;   // of one fragment

struct Scan {
  ScanMode mode;
  const uint8_t* codes;  // [count, width], rows `stride` bytes apart
  int64_t count, stride, width;
  int32_t access;          // 16, 4 or 1 bytes are read at a time, as their addresses allow
  const uint8_t* allowed;  // a bit a code, or null
  // queries [query_count, chunks * row_bytes] with zeros past their width, and the ones in each
  const uint8_t* queries;
  const int32_t* query_ones;
  int64_t query_count;
  // A code is near within distance < bound, or at most the bound with `ties`.
  const int32_t* bounds;
  bool ties;
  // A code is taken in `chunks` chunks of row_bytes: 32, 64 or 128, rows of shared memory.
  int32_t row_bytes, chunks;
  // A block has kParts times `sharers` warps, each for up to queries_a_warp queries, in row_tiles fragments.
  int32_t groups, sharers, queries_a_warp, row_tiles;
  bool few;
  // On Hopper a block has sharers / 4 groups of up to 64 queries, 16 a warp, and queries_a_block of them.
  bool on_hopper;
  int32_t queries_a_block;
  // Tiles of tile_codes codes. Every tile_stride-th tile is visited, `visited` of them, in `spans` spans of neighbours.
  int32_t tile_codes;
  int64_t tiles, tile_stride, visited, spans;
  // [groups, sharers, tiles]: whether a tile holds what is near one of a warp's queries. It is written, and with
  // only_near other tiles are passed over.
  uint8_t* near_tiles;
  bool only_near;
  // by mode; a list has list_pitch places a query, or begins at starts[query]
  int32_t* distances;
  uint64_t* histogram;
  int64_t bins;
  uint32_t* counts;
  const int64_t* places;  // [query_count, spans, 2]: the first place of each span's codes below and at the bound
  const int64_t* starts;
  int64_t list_pitch;
  int32_t* list_distances;
  int64_t* list_indices;
  // codes at the bound stand after the `closer` ones below it, up to k
  const int64_t* closer;
  int64_t k;
  int32_t* out_distances;
  int64_t* out_indices;
  // byte offsets in shared memory
  int32_t at_queries, at_limits, at_distances, at_counts, shared_bytes;
};

// Shares out a scan of these codes by so many queries: everything but modes, bounds and outputs.
Scan plan_scan(const Tensor& codes, int64_t query_count);

// The whole of the codes, or every stride-th tile.
void visit_every(Scan& scan, int64_t stride, const Tensor& codes);

void run_scan(const char* op, const Scan& scan, cudaStream_t stream);

// The same where Hopper's kernel takes the scan; `plan` says whether it does.
bool plan_scan_on_hopper(const Tensor& codes, Scan& scan);
void visit_every_on_hopper(Scan& scan, int64_t multiprocessors);
void run_scan_on_hopper(const char* op, const Scan& scan, cudaStream_t stream);

}  // namespace embedding_kernels::cuda
