// gram: <d,d>, <d,v>, <v,v> in one read.
#include "launch.cuh"

namespace fastsam {
namespace {

struct Sums {
  double dd, dv, vv;
};

FASTSAM_INLINE void add(Sums& a, const Sums& b) {
  a.dd += b.dd;
  a.dv += b.dv;
  a.vv += b.vv;
}

// sum + <a, b>, the products of one access added up in F.
template <class F, class S, int N>
FASTSAM_INLINE double plus_products(double sum, const Values<S, N>& a, const Values<S, N>& b) {
  F few = 0;
  FASTSAM_UNROLL
  for (int k = 0; k < N; ++k) few = fma(F(a.at[k]), F(b.at[k]), few);
  return sum + few;
}

template <class W, class G, class M>
struct Gram {
  using S = Scalar<W>;
  template <class F> static constexpr int kWidthOf = std::is_same_v<F, S> ? kWidth<W> : 1;  // fewer registers
  static constexpr bool kBatched = !std::is_same_v<G, Mixed>;  // registers are for three types of gradients there

  // One thread's part of the chunks of one block, the products of one access added up in F.
  template <class F>
  static FASTSAM_INLINE Sums of_block(const GramArgs& a, int block, int blocks, int thread) {
    Sums sums = {0, 0, 0};
    FASTSAM_ROLLED
    for (int c = block; c < a.table.n_chunks; c += blocks) add_chunk<F>(a, piece(a.table, c, sizeof(W)), sums, thread);
    return sums;
  }

 private:
  template <class F>
  static FASTSAM_INLINE void add_chunk(const GramArgs& a, const Piece& p, Sums& sums, int thread) {
    if (!p.g) return;
    const AscentGroup* h = a.groups ? a.groups + p.group : nullptr;
    const S scale = S(a.scaling->grad_scale), sigma = S(h ? h->sigma : 0.0);
    const W* w = a.weighted && h->adaptive != 0 ? reinterpret_cast<const W*>(p.w) : nullptr;
    const M *m = part<M>(a.ema, p), *v = part<M>(a.vector, p);
    if (std::is_same_v<F, S> && !m && !v && !w) return norm(p, scale, sums, thread);
    const uint64_t addresses = address(w) | address(p.g) | address_beside<W>(m) | address_beside<W>(v);
    for_elements<kWidthOf<F>, kBatched>(thread, p.count, addresses, [&](auto i, auto width) {
      constexpr int N = decltype(width)::value;
      Values<S, N> d = Gradient<G, N>::load(p.g, p.gradient_type, i);
      Raw<M, N> average, other;
      Raw<W, N> weight;
      if (m) average = load_raw<M, N>(m + i);
      if (v) other = load_raw<M, N>(v + i);
      if (w) weight = load_raw<W, N>(w + i);
      FASTSAM_UNROLL
      for (int k = 0; k < N; ++k) d.at[k] = d.at[k] * scale;
      if (m) {
        const Values<S, N> x = widened<M, N>(average);
        FASTSAM_UNROLL
        for (int k = 0; k < N; ++k)
          if (!is_blank(x.at[k])) d.at[k] = direction(d.at[k], x.at[k], sigma);
      }
      if (v) {
        const Values<S, N> x = widened<M, N>(other);
        sums.dv = plus_products<F>(sums.dv, d, x);
        sums.vv = plus_products<F>(sums.vv, x, x);
      }
      if (w) {
        const Values<S, N> x = widened<W, N>(weight);
        FASTSAM_UNROLL
        for (int k = 0; k < N; ++k) d.at[k] = d.at[k] * x.at[k];
      }
      sums.dd = plus_products<F>(sums.dd, d, d);
    });
  }

  // <g,g>, where nothing else is read: four vectors are under way at a time.
  static FASTSAM_INLINE void norm(const Piece& p, S scale, Sums& sums, int thread) {
    constexpr int N = kWidth<W>, kStep = kThreads * N, kTogether = 4;
    const auto square = [&](auto g, auto width) {
      constexpr int n = decltype(width)::value;
      FASTSAM_UNROLL
      for (int k = 0; k < n; ++k) g.at[k] = g.at[k] * scale;
      sums.dd = plus_products<S>(sums.dd, g, g);
    };
    const int whole = vector_count(p.count, N, address(p.g));
    int i = thread * N;
    FASTSAM_ROLLED
    for (; i + (kTogether - 1) * kStep < whole; i += kTogether * kStep) {
      Values<S, N> g[kTogether];
      FASTSAM_UNROLL
      for (int j = 0; j < kTogether; ++j) g[j] = Gradient<G, N>::load(p.g, p.gradient_type, i + j * kStep);
      FASTSAM_UNROLL
      for (int j = 0; j < kTogether; ++j) square(g[j], Int<N>{});
    }
    FASTSAM_ROLLED
    for (; i < whole; i += kStep) square(Gradient<G, N>::load(p.g, p.gradient_type, i), Int<N>{});
    i = whole + thread;
    if constexpr (kBatched) {
      FASTSAM_ROLLED
      for (; i < end_of_apart<N>(p.count); i += kApart<N> * kThreads)
        square(Gradient<G, kApart<N>>::load(p.g, p.gradient_type, Apart{i}), Int<kApart<N>>{});
    }
    FASTSAM_ROLLED
    for (; i < p.count; i += kThreads) square(Gradient<G, 1>::load(p.g, p.gradient_type, i), Int<1>{});
  }
};

// One step of the sum over a block's threads, in a tree whose shape never changes.
FASTSAM_INLINE void fold(Sums* lanes, int thread, int half) {
  if (thread < half) add(lanes[thread], lanes[thread + half]);
}

FASTSAM_INLINE double from_other_block(const double* p) {
#if defined(__CUDA_ARCH__)
  return __ldcg(p);  // the caches of this processor may be behind
#else
  return *p;
#endif
}

// One thread's part of the sum over all blocks. Without v there is only one to form.
FASTSAM_INLINE Sums over_blocks(const GramArgs& a, int blocks, int thread) {
  Sums sums = {0, 0, 0};
  FASTSAM_UNROLL_FEW
  for (int b = thread; b < blocks; b += kThreads) sums.dd += from_other_block(a.partials + b);
  if (a.vector) {
    FASTSAM_UNROLL_FEW
    for (int b = thread; b < blocks; b += kThreads) {
      sums.dv += from_other_block(a.partials + blocks + b);
      sums.vv += from_other_block(a.partials + 2 * blocks + b);
    }
  }
  return sums;
}

FASTSAM_INLINE void put(double* at, int stride, const Sums& sums) {
  at[0] = sums.dd;
  at[stride] = sums.dv;
  at[2 * stride] = sums.vv;
}

// Whether a block has to add up again, in double: few GPUs do more than one operation there in the time of 64 in float.
// What float loses at its lower end is nothing beside the epsilon of a norm.
template <class W>
FASTSAM_INLINE bool overflowed(const Sums& sums) {
  return !std::is_same_v<Scalar<W>, double> && !is_finite(sums.dd + sums.dv + sums.vv);
}

// Sums that have to be finite for these to be: 0 times infinity is NaN.
FASTSAM_INLINE Sums carried(Sums sums, const double* met) {
  if (met) add(sums, {0 * met[0], 0 * met[1], 0 * met[2]});
  return sums;
}

// The sum over a block, for all its threads; what is in `lanes` need not outlive it.
__device__ __forceinline__ Sums over_threads(Sums* lanes, const Sums& part) {
  lanes[threadIdx.x] = part;
  for (int half = kThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    fold(lanes, threadIdx.x, half);
  }
  __syncthreads();
  const Sums sums = lanes[0];
  __syncthreads();
  return sums;
}

template <class W, class G, class M>
__global__ void __launch_bounds__(kThreads, kResidentBlocks<W, G>) gram_kernel(const __grid_constant__ GramArgs a) {
  __shared__ Sums lanes[kThreads];
  using P = Gram<W, G, M>;
  Sums sums = over_threads(lanes, P::template of_block<Scalar<W>>(a, blockIdx.x, gridDim.x, threadIdx.x));
  if (overflowed<W>(sums)) sums = over_threads(lanes, P::template of_block<double>(a, blockIdx.x, gridDim.x, threadIdx.x));
  if (threadIdx.x == 0) put(a.partials + blockIdx.x, gridDim.x, sums);
  if (finished_last(a.counter, gridDim.x)) {
    const Sums total = over_threads(lanes, over_blocks(a, gridDim.x, threadIdx.x));
    if (threadIdx.x == 0) put(a.sums, 1, carried(total, a.met));
  }
}

// The kernel's order of summation, thread by thread.
template <class Part>
Sums block_on_host(Part part) {
  Sums lanes[kThreads];
  for (int thread = 0; thread < kThreads; ++thread) lanes[thread] = part(thread);
  for (int half = kThreads / 2; half > 0; half /= 2)
    for (int thread = 0; thread < half; ++thread) fold(lanes, thread, half);
  return lanes[0];
}

template <class W, class G, class M>
void gram_on_host(const GramArgs& a, int blocks) {
  for (int block = 0; block < blocks; ++block) {
    using P = Gram<W, G, M>;
    Sums sums = block_on_host([&](int thread) { return P::template of_block<Scalar<W>>(a, block, blocks, thread); });
    if (overflowed<W>(sums))
      sums = block_on_host([&](int thread) { return P::template of_block<double>(a, block, blocks, thread); });
    put(a.partials + block, blocks, sums);
  }
  put(a.sums, 1, carried(block_on_host([&](int thread) { return over_blocks(a, blocks, thread); }), a.met));
}

}  // namespace

void gram(const GramArgs& args, Types types, Place place) {
  const int blocks = gram_blocks(args.table.n_chunks);
  if (blocks == 0) return;
  with_types(types, [&](auto w, auto g, auto m) {
    using W = decltype(w);
    using G = decltype(g);
    using M = decltype(m);
    if (place.on_host) return gram_on_host<W, G, M>(args, blocks);
    launch(gram_kernel<W, G, M>, blocks, args, place);
  });
}

}  // namespace fastsam
