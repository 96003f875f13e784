// body(i) for i in [0, n) on a number of threads, in any order.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>

namespace fastsam {

// Runs `body` once on each of `threads` threads, the caller's included. Uses torch's own OpenMP pool where
// torch has loaded one: a second pool would fight the first for the cores.
void on_threads(int threads, const std::function<void()>& body);

// Which runtime on_threads uses: "OpenMP" or "std::thread".
const char* thread_runtime();

template <class Body>
void parallel_for(int64_t n, int threads, Body body) {
  if (threads <= 1 || n <= 1) {
    for (int64_t i = 0; i < n; ++i) body(i);
    return;
  }
  std::atomic<int64_t> next{0};
  on_threads(threads, [&] {
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < n;) body(i);
  });
}

}  // namespace fastsam
