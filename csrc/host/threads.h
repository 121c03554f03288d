// Threads where there is no torch.
#pragma once

#include <atomic>
#include <cstdint>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>

namespace embedding_kernels {

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
    const int64_t wanted = std::min(threads_, count);
    others.reserve(wanted);
    try {
      for (int64_t t = 1; t < wanted; ++t) others.emplace_back(work);
    } catch (const std::exception&) {
      // the system gives no more threads: those there are, at least this one, do all tasks
    }
    work();
    for (std::thread& other : others) other.join();
    if (failure) std::rethrow_exception(failure);
  }

 private:
  int64_t threads_;
};

}  // namespace embedding_kernels
