// Sixty-four bytes of numbers at a time, in the compiler's own vector types.
//
// The same source is compiled once for each instruction set; the compiler splits a vector into as many
// registers as the set needs. The number of lanes never changes, so neither does any sum.
#pragma once

#include <cstdint>
#include <cstring>
#if defined(__SSE2__)
#include <immintrin.h>
#endif

#include "../arithmetic.h"

// Every function here is inlined, so how a wide vector would be passed between objects does not matter.
#pragma GCC diagnostic ignored "-Wpsabi"

// A lambda in an inner loop must be inlined into it, or its captures live in memory.
#define FASTSAM_LAMBDA __attribute__((always_inline))

namespace fastsam {

struct bf16 { uint16_t bits; };
struct f16 { uint16_t bits; };

namespace FASTSAM_ISA {

constexpr int kVectorBytes = 64;

typedef float f32x16 __attribute__((vector_size(64)));
typedef float f32x8 __attribute__((vector_size(32)));
typedef double f64x8 __attribute__((vector_size(64)));
typedef uint32_t u32x16 __attribute__((vector_size(64)));
typedef int32_t i32x16 __attribute__((vector_size(64)));
typedef uint16_t u16x16 __attribute__((vector_size(32)));

template <class To, class From>
FASTSAM_INLINE To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast needs equal sizes");
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

// What an element type is computed in: double for double, float for everything else.
template <class E> struct Compute { using Scalar = float; using Vector = f32x16; static constexpr int lanes = 16; };
template <> struct Compute<double> { using Scalar = double; using Vector = f64x8; static constexpr int lanes = 8; };

// ---- element types to and from float -----------------------------------------------------------

FASTSAM_INLINE f32x16 widen(u16x16 bits, bf16) {
  return bit_cast<f32x16>(__builtin_convertvector(bits, u32x16) << 16);
}

FASTSAM_INLINE u16x16 narrow(f32x16 x, bf16) {  // round to nearest even; NaN stays a quiet NaN
  const u32x16 u = bit_cast<u32x16>(x);
  const u32x16 rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  const u32x16 is_nan = bit_cast<u32x16>((u & 0x7fffffffu) > 0x7f800000u);
  const u32x16 quiet = (u >> 16) | 0x40u;
  return __builtin_convertvector((rounded & ~is_nan) | (quiet & is_nan), u16x16);
}

FASTSAM_INLINE f32x16 widen(u16x16 bits, f16) {
  const u32x16 h = __builtin_convertvector(bits, u32x16);
  const u32x16 sign = (h & 0x8000u) << 16;
  const u32x16 magnitude = h & 0x7fffu;
  // Shifting into place and multiplying by 2^112 repairs the exponent's bias, subnormals included.
  const f32x16 scaled = bit_cast<f32x16>(magnitude << 13) * 0x1p112f;
  const u32x16 special = bit_cast<u32x16>(magnitude >= 0x7c00u);  // infinity and NaN
  const u32x16 value = (bit_cast<u32x16>(scaled) & ~special) | (((magnitude << 13) | 0x7f800000u) & special);
  return bit_cast<f32x16>(value | sign);
}

FASTSAM_INLINE u16x16 narrow(f32x16 x, f16) {  // round to nearest even
  const u32x16 u = bit_cast<u32x16>(x);
  const u32x16 sign = (u >> 16) & 0x8000u;
  const u32x16 a = u & 0x7fffffffu;
  const u32x16 normal = (a - 0x38000000u + 0xfffu + ((a >> 13) & 1u)) >> 13;
  // Below 2^-14 the sum with 0.5 leaves the rounded subnormal in the low bits.
  const u32x16 subnormal = bit_cast<u32x16>(bit_cast<f32x16>(a) + 0.5f) - 0x3f000000u;
  const u32x16 is_small = bit_cast<u32x16>(a < 0x38800000u);
  const u32x16 is_large = bit_cast<u32x16>(a >= 0x477ff000u);  // rounds to infinity
  const u32x16 is_nan = bit_cast<u32x16>(a > 0x7f800000u);
  u32x16 r = (subnormal & is_small) | (normal & ~is_small);
  r = (r & ~is_large) | (0x7c00u & is_large);
  r = (r & ~is_nan) | (0x7e00u & is_nan);
  return __builtin_convertvector(r | sign, u16x16);
}

// ---- loads and stores; `count` matters only for the last, partial vector --------------------------

template <bool Full, class E>
FASTSAM_INLINE typename Compute<E>::Vector load(const E* p, int count) {
  constexpr int lanes = Compute<E>::lanes;
  const size_t bytes = (Full ? lanes : count) * sizeof(E);
  if constexpr (sizeof(E) == 2) {
    u16x16 raw = {};
    std::memcpy(&raw, p, bytes);
    return widen(raw, E{});
  } else {
    typename Compute<E>::Vector v = {};
    std::memcpy(&v, p, bytes);
    return v;
  }
}

template <int Bytes>
FASTSAM_INLINE void stream_bytes(void* p, const void* from) {
#if defined(__AVX512F__)
  if constexpr (Bytes == 64) {
    _mm512_stream_si512(static_cast<__m512i*>(p), _mm512_loadu_si512(from));
    return;
  }
#endif
#if defined(__AVX2__)
  for (int i = 0; i < Bytes / 32; ++i)
    _mm256_stream_si256(static_cast<__m256i*>(p) + i, _mm256_loadu_si256(static_cast<const __m256i*>(from) + i));
#elif defined(__SSE2__)
  for (int i = 0; i < Bytes / 16; ++i)
    _mm_stream_si128(static_cast<__m128i*>(p) + i, _mm_loadu_si128(static_cast<const __m128i*>(from) + i));
#else
  std::memcpy(p, from, Bytes);
#endif
}

// Stream: past the caches. Right for what is not read again soon and was not just read.
template <bool Full, class E>
FASTSAM_INLINE void store(E* p, typename Compute<E>::Vector v, int count, bool stream = false) {
  constexpr int lanes = Compute<E>::lanes;
  const size_t bytes = (Full ? lanes : count) * sizeof(E);
  if constexpr (sizeof(E) == 2) {
    const u16x16 raw = narrow(v, E{});
    if (Full && stream) stream_bytes<lanes * 2>(p, &raw);
    else std::memcpy(p, &raw, bytes);
  } else {
    if (Full && stream) stream_bytes<kVectorBytes>(p, &v);
    else std::memcpy(p, &v, bytes);
  }
}

FASTSAM_INLINE void stream_fence() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

FASTSAM_INLINE f32x16 square_root(f32x16 x) {
  for (int i = 0; i < 16; ++i) x[i] = __builtin_sqrtf(x[i]);
  return x;
}
FASTSAM_INLINE f64x8 square_root(f64x8 x) {
  for (int i = 0; i < 8; ++i) x[i] = __builtin_sqrt(x[i]);
  return x;
}

// ---- sums in double, whatever the element type -------------------------------------------------

struct Sum {
  f64x8 lanes[2] = {};

  FASTSAM_INLINE void add_product(f32x16 a, f32x16 b) {
    f32x8 ah[2], bh[2];
    std::memcpy(ah, &a, sizeof a);
    std::memcpy(bh, &b, sizeof b);
    for (int i = 0; i < 2; ++i)
      lanes[i] += __builtin_convertvector(ah[i], f64x8) * __builtin_convertvector(bh[i], f64x8);
  }
  FASTSAM_INLINE void add_product(f64x8 a, f64x8 b) { lanes[0] += a * b; }

  double total() const {
    double sum = 0;
    for (const f64x8& half : lanes)
      for (int i = 0; i < 8; ++i) sum += half[i];
    return sum;
  }
};

}  // namespace FASTSAM_ISA
}  // namespace fastsam
