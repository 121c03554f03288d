// The scan of the Hamming family. Four warps of a block look at four tiles of 32 codes, each from a span of its own, so
// that what a warp finds comes in the order of the codes without a word between warps.
//
// Few queries are read by XOR, a lane a code: 32 bits of it cost a popcount, so that up to three queries take no longer
// than the codes take from memory (1,024 bits: 37.5 G codes/s at 4.8 TB/s; 16 popcounts a clock and multiprocessor).
//
// More are a product of bits, |a| + |b| - 2 |a and b| (hamming_hopper.cu has Hopper's own way): a warp holds 63 queries
// and a row of ones, whose products are the ones of the codes, in registers, and up to three such warps share a tile,
// so that 189 queries cost one reading. A step of 64 rows by 32 codes by 1,024 bits is 64 instructions on the tensor
// cores and a comparison a distance; what is not near leaves no trace.
#include "hamming_products.cuh"

namespace embedding_kernels::cuda {
namespace {

struct Step {
  uint32_t tile;
  int chunk;
};

template <class Product>
__global__ void __launch_bounds__(Product::kThreads, Product::kBlocks) scan_kernel(const Scan s) {
  const Warp w(s);
  for (int i = w.lane; i < 2 * w.queries; i += kWarp) w.counted(s)[i] = 0;
  Product product(s, w);  // its barrier is that of the counts too

  const int chunks = Product::kOneChunk ? 1 : s.chunks;
  const uint32_t stage_bytes = kTileCodes * s.row_bytes;
  const uint32_t stages = ptx::shared_address(shared_at<uint8_t>(0)) + w.part * kScanStages * stage_bytes;
  Tiles tiles(s, w.span);
  // three steps follow each other: that to be looked at, and two under way; kNoTile before the first and past the last
  Step ahead = {tiles.next(s, w), 0}, following = {kNoTile, 0}, step = {kNoTile, 0};
  for (int stage = 1; ahead.tile != kNoTile || following.tile != kNoTile || step.tile != kNoTile;) {
    if (step.tile != kNoTile) {
      ptx::wait_copies<kScanStages - 2>();
      sync_sharers<Product::kShared>(s, w);  // the step is there for all, and nobody reads the last one any more
    }
    if (ahead.tile != kNoTile) stage_tile(s, w, ahead.tile, ahead.chunk, stages + stage * stage_bytes);
    ptx::commit_copies();
    ptx::sync_warp();  // products want its lanes together
    stage = stage + 1 == kScanStages ? 0 : stage + 1;
    if (step.tile != kNoTile) {
      if (step.chunk == 0) product.clear();
      product.add(s, w, stages + stage * stage_bytes, step.chunk);
      if (step.chunk + 1 == chunks) {
        const bool near = product.finish(s, w, step.tile, stages + stage * stage_bytes);
        if (s.near_tiles != nullptr && s.mode != ScanMode::kWrite && w.lane == 0) {
          s.near_tiles[(int64_t{w.group} * s.sharers + w.sharer) * s.tiles + step.tile] = near;
        }
      }
    }
    step = following;
    following = ahead;
    if (ahead.tile != kNoTile) {
      ahead = ahead.chunk + 1 < chunks ? Step{ahead.tile, ahead.chunk + 1} : Step{tiles.next(s, w), 0};
    }
  }
  ptx::wait_copies<0>();
  if (s.mode != ScanMode::kCount) return;
  ptx::sync_warp();
  for (int i = w.lane; i < 2 * w.queries; i += kWarp) {
    s.counts[((int64_t{w.first_query} + i / 2) * s.spans + w.span) * 2 + i % 2] = w.counted(s)[i];
  }
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace

Scan plan_scan(const Tensor& codes, int64_t query_count) {
  Scan s = {};
  s.codes = pointer<uint8_t>(codes);
  s.count = codes.size(0);
  s.width = codes.size(1);
  // the rows that a single code does not have are copied from aligned addresses too, though not a byte of them
  s.stride = s.count > 1 ? codes.stride(0) : 0;
  const uint64_t bits = reinterpret_cast<uint64_t>(s.codes) | static_cast<uint64_t>(s.stride);
  s.access = bits % 16 == 0 ? 16 : bits % 4 == 0 ? 4 : 1;
  s.query_count = query_count;
  s.bins = 8 * s.width + 1;
  if constexpr (kForHopper) {
    if (plan_scan_on_hopper(codes, s)) return s;
  }
  s.row_bytes = s.width <= 32 ? 32 : s.width <= 64 ? 64 : 128;
  s.chunks = static_cast<int32_t>(std::max<int64_t>(ceil_div(s.width, s.row_bytes), 1));
  s.tile_codes = kTileCodes;
  s.tiles = ceil_div(s.count, kTileCodes);

  // rows of queries in shared memory, at most 64 KiB
  constexpr int64_t kQueryBytes = 64 * 1024;
  const int64_t row_limit = kQueryBytes / 16 / s.row_bytes / s.chunks * 16;
  s.few = query_count <= kFewQueries || row_limit < 16;
  const int64_t most = s.few ? kFewQueries : std::min<int64_t>(row_limit, kProductRows) - 1;
  const int64_t sharers_limit = s.few ? 1 : std::min<int64_t>(row_limit / (most + 1), kMostSharers);
  const int64_t warps = ceil_div(query_count, most);
  s.sharers = static_cast<int32_t>(std::clamp<int64_t>(warps, 1, sharers_limit));
  s.groups = static_cast<int32_t>(std::max<int64_t>(ceil_div(warps, s.sharers), 1));
  s.queries_a_warp = static_cast<int32_t>(std::max<int64_t>(ceil_div(query_count, int64_t{s.groups} * s.sharers), 1));
  const int32_t row_tiles = static_cast<int32_t>(ceil_div(s.queries_a_warp + 1, 16));
  s.row_tiles = s.few ? 0 : s.chunks > 1 ? row_tiles : row_tiles <= 2 ? 2 : 4;

  const int32_t block_warps = kParts * s.sharers;
  s.at_queries = kParts * kScanStages * kTileCodes * s.row_bytes;
  s.at_limits = s.at_queries + s.sharers * 16 * s.row_tiles * s.chunks * s.row_bytes;
  s.at_distances = s.at_limits + (s.few ? 0 : s.sharers * 2 * kProductRows * 4);
  s.at_counts = s.at_distances + (s.few ? 0 : block_warps * kDistanceRows * kDistancePitch * 4);
  s.shared_bytes = s.at_counts + block_warps * s.queries_a_warp * 8;
  return s;
}

void visit_every(Scan& s, int64_t stride, const Tensor& codes) {
  s.tile_stride = stride;
  s.visited = ceil_div(s.tiles, stride);
  if constexpr (kForHopper) {
    if (s.on_hopper) return visit_every_on_hopper(s, multiprocessors(codes));
  }
  // one wave of blocks, by shared memory and registers: every multiprocessor ends at about the same time
  const int64_t resident = s.few ? 3 : s.sharers == 1 ? 2 : 1;
  const int64_t blocks = resident * multiprocessors(codes) / s.groups;
  s.spans = std::clamp<int64_t>(blocks, 1, std::max<int64_t>(ceil_div(s.visited, kParts), 1)) * kParts;
}

void run_scan(const char* op, const Scan& s, cudaStream_t stream) {
  if constexpr (kForHopper) {
    if (s.on_hopper) return run_scan_on_hopper(op, s, stream);
  }
  const dim3 grid(static_cast<unsigned>(s.spans / kParts * s.groups));
  const dim3 block(static_cast<unsigned>(kParts * s.sharers * kWarp));
  const auto kernel = s.few              ? scan_kernel<FewQueries>
                      : s.chunks > 1     ? scan_kernel<ProductOfChunks>
                      : s.row_tiles == 2 ? scan_kernel<ProductOfBits<2>>
                                         : scan_kernel<ProductOfBits<4>>;
  launch(op, kernel, grid, block, s.shared_bytes, stream, s);
}

}  // namespace embedding_kernels::cuda
