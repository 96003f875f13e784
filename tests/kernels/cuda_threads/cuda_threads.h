// What a kernel's source needs to be plain C++: CUDA's threads on a processor, as ThreadSanitizer can watch them.
//
// A block is an OS thread, so that thread_local memory is its __shared__ memory. Its threads are fibers, which
// ThreadSanitizer takes for threads: nothing orders what two of them do but barriers, and fences around atomics.
#pragma once

#include <cuda_runtime_api.h>

#include <cmath>
#include <cstring>
#include <functional>

#undef __shared__
#define __shared__ static thread_local
#define __launch_bounds__(...)

extern __thread uint3 threadIdx, blockIdx, gridDim;

void __syncthreads();
void __threadfence();
int atomicAdd(int* at, int n);

// Runs the blocks by turns, from barrier to barrier, in an order that differs from launch to launch.
void run_blocks(int blocks, int threads, const std::function<void()>& kernel);

template <class Args>
cudaError_t cudaLaunchKernel(void (*kernel)(Args), dim3 blocks, dim3 threads, void** arguments, size_t, cudaStream_t) {
  run_blocks(blocks.x, threads.x, [&] { kernel(*static_cast<Args*>(arguments[0])); });
  return cudaSuccess;
}
