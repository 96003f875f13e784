// The scheduler of cuda_threads.h. Compiled without instrumentation: ThreadSanitizer sees only what it is told here.
#include "cuda_threads.h"

#include <sanitizer/tsan_interface.h>
#include <ucontext.h>

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <memory>
#include <thread>
#include <vector>

__thread uint3 threadIdx, blockIdx, gridDim;

namespace {

// A char here is one of ThreadSanitizer's clocks: what acquires it comes after all that was done before its release.

struct Thread {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  void* fiber;
  bool finished;
  char* fence;     // its last one
  size_t atomics;  // of all threads, up to its own last one
};

struct Block {
  ucontext_t scheduler;
  void* fiber;
  std::vector<Thread> threads;
  std::atomic<bool> its_turn;
  int passed;       // so many barriers
  char barrier[2];  // two, since a thread may come to the next one while another has yet to leave the last
};

struct Atomic {
  int* at;
  char* fence;  // the last of its thread
};

struct Launch {
  const std::function<void()>* kernel;
  std::vector<bool> finished;   // for each block
  std::vector<Atomic> atomics;  // in the order in which they took place
  std::vector<char> fences;
  char begin, end;
};

constexpr int kStack = 64 << 10;
std::deque<Block> device;  // fibers take long to make: every launch uses them again
Launch* current;
__thread Block* block;
__thread Thread* self;

unsigned random_below(unsigned n) {
  static unsigned state;
  state = state * 1664525 + 1013904223;
  return (state >> 16) % n;
}

void fail(const char* what) {
  std::fprintf(stderr, "%s\n", what);
  std::_Exit(1);
}

void add_block(int threads) {
  Block& added = device.emplace_back();
  added.threads.resize(threads);
  for (Thread& t : added.threads) {
    t.stack.reset(new char[kStack]);
    t.fiber = __tsan_create_fiber(0);
  }
}

void back_to_scheduler() {
  __tsan_switch_to_fiber(block->fiber, __tsan_switch_to_fiber_no_sync);
  swapcontext(&self->context, &block->scheduler);
}

void thread_main() {
  __tsan_acquire(&current->begin);
  (*current->kernel)();
  __tsan_release(&current->end);
  self->finished = true;
  back_to_scheduler();
}

void prepare(Thread& t) {
  getcontext(&t.context);
  t.context.uc_stack.ss_sp = t.stack.get();
  t.context.uc_stack.ss_size = kStack;
  makecontext(&t.context, thread_main, 0);
  t.finished = false;
  t.fence = nullptr;
  t.atomics = 0;
}

// To its next barrier, or to its end.
void run_thread(int i) {
  self = &block->threads[i];
  threadIdx = {unsigned(i), 0, 0};
  __tsan_switch_to_fiber(self->fiber, __tsan_switch_to_fiber_no_sync);
  swapcontext(&block->scheduler, &self->context);
}

void next_turn() {
  const std::vector<bool>& finished = current->finished;
  if (std::find(finished.begin(), finished.end(), false) == finished.end()) return;
  size_t b;
  do b = random_below(finished.size());
  while (finished[b]);
  device[b].its_turn = true;
  device[b].its_turn.notify_one();
}

void run_block(int index, int blocks) {
  block = &device[index];
  blockIdx = {unsigned(index), 0, 0};
  gridDim = {unsigned(blocks), 1, 1};
  block->fiber = __tsan_get_current_fiber();
  const int threads = block->threads.size();
  for (Thread& t : block->threads) prepare(t);
  __tsan_release(&current->begin);  // its thread_local memory is new
  for (int finished = 0; finished < threads; ++block->passed) {
    block->its_turn.wait(false);
    const bool backwards = random_below(2);
    for (int k = 0; k < threads; ++k) run_thread(backwards ? threads - 1 - k : k);
    finished = std::count_if(block->threads.begin(), block->threads.end(), [](const Thread& t) { return t.finished; });
    if (finished && finished < threads) fail("a barrier that only some threads of a block come to");
    current->finished[index] = finished;
    block->its_turn = false;
    next_turn();
  }
  __tsan_acquire(&current->end);
}

}  // namespace

void __syncthreads() {
  char* barrier = &block->barrier[block->passed % 2];
  __tsan_release(barrier);
  back_to_scheduler();
  __tsan_acquire(barrier);
}

// PTX's release and acquire patterns: what one thread did before a fence, and an atomic after that, comes before what
// another does after an atomic that reads the first one, and a fence after that. Nothing less orders anything. (CUDA's
// fence is sequentially consistent besides; no kernel has to rely on that.)
void __threadfence() {
  for (size_t i = 0; i < self->atomics; ++i) {
    const Atomic& read = current->atomics[i];
    if (read.at == current->atomics[self->atomics - 1].at && read.fence) __tsan_acquire(read.fence);
  }
  if (current->fences.size() == current->fences.capacity()) fail("more than two fences of a thread");
  self->fence = &current->fences.emplace_back();
  __tsan_release(self->fence);
}

// ThreadSanitizer does not see the access itself: atomics on one number are in order without a fence.
int atomicAdd(int* at, int n) {
  if (current->atomics.size() == current->atomics.capacity()) fail("more than one atomic of a thread");
  current->atomics.push_back({at, self->fence});
  self->atomics = current->atomics.size();
  return (*at += n) - n;
}

void run_blocks(int blocks, int threads, const std::function<void()>& kernel) {
  while (device.size() < size_t(blocks)) add_block(threads);
  Launch launch = {&kernel, std::vector<bool>(blocks), {}, {}, 0, 0};
  launch.atomics.reserve(blocks * threads);  // now: ThreadSanitizer would take allocations for the kernel's
  launch.fences.reserve(2 * blocks * threads);
  current = &launch;
  __tsan_release(&launch.begin);
  std::vector<std::thread> running;
  for (int b = 0; b < blocks; ++b) running.emplace_back(run_block, b, blocks);
  next_turn();
  for (std::thread& t : running) t.join();
}

cudaError_t cudaSetDevice(int) { return cudaSuccess; }
const char* cudaGetErrorString(cudaError_t) { return ""; }
