// Elements in memory and in registers: what each type is computed in, and accesses of 16 bytes.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstring>

#include "tables.h"

#if defined(__CUDA_ARCH__)
#define FASTSAM_UNROLL _Pragma("unroll")
#define FASTSAM_UNROLL_FEW _Pragma("unroll 4")  // so many accesses under way at a time
#define FASTSAM_ROLLED _Pragma("unroll 1")  // registers are for other threads instead
#else
#define FASTSAM_UNROLL
#define FASTSAM_UNROLL_FEW
#define FASTSAM_ROLLED
#endif

namespace fastsam {

using bf16 = __nv_bfloat16;
using f16 = __half;

// Gradients of any type that goes with the weights; the row says which.
struct Mixed {};

// What an element type is computed in.
template <class E> struct Compute { using Scalar = float; };
template <> struct Compute<double> { using Scalar = double; };
template <class E> using Scalar = typename Compute<E>::Scalar;

// How many elements an access of 16 bytes takes.
template <class E> constexpr int kWidth = kVectorBytes / sizeof(E);

template <class S, int N> struct Values {
  S at[N];
};

// N elements as they lie in memory, in units that one access takes.
template <int Bytes> struct Unit;
template <> struct Unit<2> { using Type = unsigned short; };
template <> struct Unit<4> { using Type = unsigned int; };
template <> struct Unit<8> { using Type = uint2; };
template <> struct Unit<16> { using Type = uint4; };

template <class E, int N> struct Raw {
  static constexpr int kBytes = N * int(sizeof(E));
  static constexpr int kUnits = kBytes > kVectorBytes ? kBytes / kVectorBytes : 1;
  using U = typename Unit<kBytes / kUnits>::Type;
  U unit[kUnits];
};

// Addresses come out of a table, where the compiler cannot see that they are global memory: these say so.
template <class U> FASTSAM_INLINE U read(const U* p) {
#if defined(__CUDA_ARCH__)
  __builtin_assume(__isGlobal(p));
#endif
  return *p;
}
template <class U> FASTSAM_INLINE void write(U* p, U x, bool past_caches) {
#if defined(__CUDA_ARCH__)
  if (past_caches) return __stcs(p, x);
  __builtin_assume(__isGlobal(p));
#endif
  *p = x;
}

template <class E, int N> FASTSAM_INLINE Raw<E, N> load_raw(const E* p) {
  using R = Raw<E, N>;
  R raw;
  FASTSAM_UNROLL
  for (int i = 0; i < R::kUnits; ++i) raw.unit[i] = read(reinterpret_cast<const typename R::U*>(p) + i);
  return raw;
}

// past_caches: right for what is not read again soon. Always a constant, and folded.
template <class E, int N> FASTSAM_INLINE void store_raw(E* p, const Raw<E, N>& raw, bool past_caches = false) {
  using R = Raw<E, N>;
  FASTSAM_UNROLL
  for (int i = 0; i < R::kUnits; ++i) write(reinterpret_cast<typename R::U*>(p) + i, raw.unit[i], past_caches);
}

// Elements a block's width apart, as threads side by side read them one by one: p + Apart{i} is a place of N of them.
struct Apart {
  int i;
};
template <class E> struct ApartAt {
  E* p;
};
template <class E> FASTSAM_INLINE ApartAt<E> operator+(E* p, Apart first) { return {p + first.i}; }

template <class E, int N, class P> FASTSAM_INLINE Raw<E, N> load_raw(const ApartAt<P>& place) {
  using U = typename Unit<sizeof(E)>::Type;
  U elements[N];
  FASTSAM_UNROLL
  for (int k = 0; k < N; ++k) elements[k] = read(reinterpret_cast<const U*>(place.p + k * kThreads));
  Raw<E, N> raw;
  memcpy(&raw, elements, sizeof raw);
  return raw;
}

template <class E, int N>
FASTSAM_INLINE void store_raw(const ApartAt<E>& place, const Raw<E, N>& raw, bool past_caches = false) {
  using U = typename Unit<sizeof(E)>::Type;
  U elements[N];
  memcpy(elements, &raw, sizeof raw);
  FASTSAM_UNROLL
  for (int k = 0; k < N; ++k) write(reinterpret_cast<U*>(place.p + k * kThreads), elements[k], past_caches);
}

FASTSAM_INLINE float widen(float x) { return x; }
FASTSAM_INLINE double widen(double x) { return x; }
FASTSAM_INLINE float widen(bf16 x) { return __bfloat162float(x); }
FASTSAM_INLINE float widen(f16 x) { return __half2float(x); }
FASTSAM_INLINE void narrow(float x, float& y) { y = x; }
FASTSAM_INLINE void narrow(double x, double& y) { y = x; }
FASTSAM_INLINE void narrow(float x, bf16& y) { y = __float2bfloat16_rn(x); }
FASTSAM_INLINE void narrow(float x, f16& y) { y = __float2half_rn(x); }

template <class E, int N> FASTSAM_INLINE Values<Scalar<E>, N> widened(const Raw<E, N>& raw) {
  E elements[N];
  memcpy(static_cast<void*>(elements), &raw, sizeof elements);
  Values<Scalar<E>, N> values;
  FASTSAM_UNROLL
  for (int i = 0; i < N; ++i) values.at[i] = widen(elements[i]);
  return values;
}

template <class E, int N, class Place> FASTSAM_INLINE Values<Scalar<E>, N> load(Place p) {
  return widened<E, N>(load_raw<E, N>(p));
}

template <class E, int N, class Place>
FASTSAM_INLINE void store(Place p, const Values<Scalar<E>, N>& values, bool past_caches = false) {
  E elements[N];
  FASTSAM_UNROLL
  for (int i = 0; i < N; ++i) narrow(values.at[i], elements[i]);
  Raw<E, N> raw;
  memcpy(&raw, elements, sizeof elements);
  store_raw<E, N>(p, raw, past_caches);
}

// N gradients from the i-th on, or Apart, of type G or, where that is Mixed, of the type that the row says.
template <class G, int N> struct Gradient {
  template <class I> static FASTSAM_INLINE Values<Scalar<G>, N> load(const char* g, int, I i) {
    return fastsam::load<G, N>(reinterpret_cast<const G*>(g) + i);
  }
};
template <int N> struct Gradient<Mixed, N> {
  template <class I> static FASTSAM_INLINE Values<float, N> load(const char* g, int type, I i) {
    if (type == kBfloat16) return Gradient<bf16, N>::load(g, type, i);
    if (type == kFloat16) return Gradient<f16, N>::load(g, type, i);
    return Gradient<float, N>::load(g, type, i);
  }
};

// A piece's part of a flat buffer.
template <class W> FASTSAM_INLINE W* part(void* flat, const Piece& p) {
  return flat ? static_cast<W*>(flat) + p.offset : nullptr;
}
template <class W> FASTSAM_INLINE const W* part(const void* flat, const Piece& p) {
  return part<W>(const_cast<void*>(flat), p);
}

FASTSAM_INLINE uint64_t address(const void* p) { return reinterpret_cast<uint64_t>(p); }

// An address of M as one of W: a multiple of 16 bytes where as many elements of M as 16 bytes have of W are one access.
template <class W, class M> FASTSAM_INLINE uint64_t address_beside(const M* p) {
  static_assert(sizeof(M) <= sizeof(W));
  return address(p) * (sizeof(W) / sizeof(M));
}

// There are no vectors of this type.
struct None {};

template <int N> struct Int {
  static constexpr int value = N;
};

// Single elements of each array under way at a time: four, or the two doubles that registers hold.
template <int Width> constexpr int kApart = Width < 4 ? Width : 4;

// A thread may begin below it with kApart elements apart: the last of them lies before count.
template <int Width> FASTSAM_INLINE int end_of_apart(int count) { return count - (kApart<Width> - 1) * kThreads; }

// f(i, Int<N>) for the elements i .. i + N - 1 that fall to a thread: whole vectors first; where an address allows none,
// f(Apart{i}, Int<N>), some single elements at a time, whose loads would wait for each other's stores; single elements.
// Batched = false leaves the middle out, where registers do not hold it.
template <int Width, bool Batched = true, class F>
FASTSAM_INLINE void for_elements(int thread, int count, uint64_t addresses, F f) {
  const int whole = vector_count(count, Width, addresses);
  FASTSAM_ROLLED
  for (int i = thread * Width; i < whole; i += kThreads * Width) f(i, Int<Width>{});
  int i = whole + thread;
  if constexpr (Batched && Width > 1) {
    FASTSAM_ROLLED
    for (; i < end_of_apart<Width>(count); i += kApart<Width> * kThreads) f(Apart{i}, Int<kApart<Width>>{});
  }
  FASTSAM_ROLLED
  for (; i < count; i += kThreads) f(i, Int<1>{});
}

// Bit for bit.
template <class W>
FASTSAM_INLINE void copy(W* to, const W* from, int count, int thread) {
  for_elements<kWidth<W>>(thread, count, address(to) | address(from), [&](auto i, auto width) {
    constexpr int N = decltype(width)::value;
    store_raw<W, N>(to + i, load_raw<W, N>(from + i));
  });
}

FASTSAM_INLINE bool is_finite(double x) { return x - x == 0; }
FASTSAM_INLINE bool all_finite(const double* sums) {
  return is_finite(sums[0]) && is_finite(sums[1]) && is_finite(sums[2]);
}

// A NaN in a moving average or momentum buffer stands where none was stored yet.
template <class S> FASTSAM_INLINE bool is_blank(S x) { return x != x; }

}  // namespace fastsam
