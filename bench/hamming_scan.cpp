// hamming_topk with its selection compiled out: what a search costs that keeps nothing. For the benchmarks only.
#include "../csrc/cpu/hamming_driver.h"
#include "../csrc/host/threads.h"

using namespace embedding_kernels;

// Distances of all queries to all codes, each step of them dropped once it is there; no code counts as near.
extern "C" __attribute__((visibility("default"))) void hamming_scan(const uint8_t* queries, int64_t query_count,
                                                                    const uint8_t* codes, int64_t count, int64_t bytes,
                                                                    int64_t threads) {
  const Codes from = {queries, query_count, bytes, bytes}, to = {codes, count, bytes, bytes};
  const Shares shares = share(query_count, count, threads);
  ThreadParallelFor{threads}(shares.count(), [&](int64_t index) {
    const Shares::Task task = shares.task(index);
    std::vector<int32_t> bounds(task.end - task.begin, 0);
    scan(hamming_loops(), Scan{from, task.begin, task.end, to, task.first, task.last, bounds.data()},
         [](const Found& found) { asm volatile("" ::"r"(found.distances), "r"(found.near)
                                               : "memory"); });
  });
}
