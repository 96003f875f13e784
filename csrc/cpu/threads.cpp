#include "threads.h"

#include <dlfcn.h>

#include <thread>
#include <vector>

namespace fastsam {
namespace {

// libgomp's stable entry point. Looked up by name, not linked: the runtime to use is the one torch loaded.
using GompParallel = void (*)(void (*)(void*), void*, unsigned, unsigned);

GompParallel gomp_parallel() {
  static const auto entry = reinterpret_cast<GompParallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
  return entry;
}

void call(void* body) { (*static_cast<const std::function<void()>*>(body))(); }

}  // namespace

void on_threads(int threads, const std::function<void()>& body) {
  if (const GompParallel parallel = gomp_parallel()) {
    parallel(call, const_cast<std::function<void()>*>(&body), static_cast<unsigned>(threads), 0);
    return;
  }
  std::vector<std::thread> others;
  for (int i = 1; i < threads; ++i) others.emplace_back(body);
  body();
  for (std::thread& t : others) t.join();
}

const char* thread_runtime() { return gomp_parallel() ? "OpenMP" : "std::thread"; }

}  // namespace fastsam
