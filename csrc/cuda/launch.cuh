// How a pass runs: a block a chunk, thread 0 computing what all of them share; and the same on the host.
//
// A pass is a struct template P<W, G, M> of the types of weights, gradients and a method's own vectors, with
//     Args                                  what it is launched with
//     Shared                                what thread 0 computes for its block
//     prepare(args, piece) -> Shared
//     run(args, piece, shared, thread)      one thread's elements
//     finish(args, thread)                  of the block that ends last, if kFinishes
//     kBlocks                               that a multiprocessor is to hold
#pragma once

#include <stdexcept>
#include <string>
#include <type_traits>

#include "elements.cuh"
#include "kernels.h"

namespace fastsam {

inline void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess)
    throw std::runtime_error(std::string("fastsam: CUDA could not ") + what + ": " + cudaGetErrorString(error));
}

// A block has kThreads threads.
template <class Args>
void launch(void (*kernel)(Args), int blocks, const Args& args, Place place) {
  check(cudaSetDevice(place.device), "select the device");
  void* arguments[] = {const_cast<Args*>(&args)};
  const cudaStream_t stream = static_cast<cudaStream_t>(place.stream);
  check(cudaLaunchKernel(kernel, blocks, kThreads, arguments, 0, stream), "launch a kernel");
}

// Whether every other block of the launch has been here; what they wrote before can then be read. For all threads:
// the barriers carry to and from thread 0 what its fences order between blocks.
__device__ __forceinline__ bool finished_last(int* counter, int blocks) {
  __shared__ bool last;
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    last = atomicAdd(counter, 1) == blocks - 1;
    if (last) {
      __threadfence();
      *counter = 0;
    }
  }
  __syncthreads();
  return last;
}

// Blocks that a multiprocessor is to hold at a time, which bounds the registers: 64 of a thread, or 80 where
// gradients of several types or float64 need them.
template <class W, class G>
constexpr int kResidentBlocks = std::is_same_v<G, Mixed> || std::is_same_v<W, double> ? 3 : 4;

template <class P, class W>
__global__ void __launch_bounds__(kThreads, P::kBlocks) pass_kernel(const __grid_constant__ typename P::Args args) {
  __shared__ typename P::Shared shared;
  const Piece p = piece(args.table, reversed_chunk(blockIdx.x, gridDim.x), sizeof(W));
  if (threadIdx.x == 0) shared = P::prepare(args, p);
  __syncthreads();
  P::run(args, p, typename P::Shared(shared), threadIdx.x);
  if constexpr (P::kFinishes) {
    if (finished_last(args.counter, gridDim.x)) P::finish(args, threadIdx.x);
  }
}

template <class P, class W>
void run_pass(const typename P::Args& args, Place place) {
  const int n = args.table.n_chunks;
  if (n == 0) return;
  if (place.on_host) {
    for (int block = 0; block < n; ++block) {
      const Piece p = piece(args.table, reversed_chunk(block, n), sizeof(W));
      const typename P::Shared shared = P::prepare(args, p);
      for (int thread = 0; thread < kThreads; ++thread) P::run(args, p, shared, thread);
    }
    if constexpr (P::kFinishes)
      for (int thread = 0; thread < kThreads; ++thread) P::finish(args, thread);
    return;
  }
  launch(pass_kernel<P, W>, n, args, place);
}

// f(W, G, M) for the types of a launch. float64 mixes with nothing else.
template <class F> void with_types(Types types, F f) {
  const auto with_vectors = [&](auto w, auto m) {
    if (types.mixed) f(w, Mixed{}, m);
    else f(w, w, m);
  };
  switch (types.weights) {
    case kFloat64: return f(double{}, double{}, double{});
    case kBfloat16: return with_vectors(bf16{}, bf16{});
    case kFloat16: return with_vectors(f16{}, f16{});
    default: return types.vectors == kBfloat16 ? with_vectors(float{}, bf16{}) : with_vectors(float{}, float{});
  }
}

}  // namespace fastsam
