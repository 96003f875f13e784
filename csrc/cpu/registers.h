// What differs from one instruction set to the next: the width of a register and four operations on it.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#if defined(__SSE2__)
#include <immintrin.h>
#endif

#include "../arithmetic.h"

// Every function here is inlined, so how a wide vector would be passed between objects does not matter.
#pragma GCC diagnostic ignored "-Wpsabi"

namespace fastsam {
namespace FASTSAM_ISA {

#if defined(__AVX512F__)
constexpr int kRegisterBytes = 64;
#elif defined(__AVX2__)
constexpr int kRegisterBytes = 32;
#else
constexpr int kRegisterBytes = 16;
#endif

typedef float f32 __attribute__((vector_size(kRegisterBytes)));
typedef double f64 __attribute__((vector_size(kRegisterBytes)));
typedef uint32_t u32 __attribute__((vector_size(kRegisterBytes)));
typedef uint16_t u16 __attribute__((vector_size(kRegisterBytes / 2)));  // as many as a u32 has

// Past the caches; p is aligned to a register.
FASTSAM_INLINE void stream(void* p, f32 v) {
#if defined(__AVX512F__)
  _mm512_stream_ps(static_cast<float*>(p), v);
#elif defined(__AVX2__)
  _mm256_stream_ps(static_cast<float*>(p), v);
#elif defined(__SSE2__)
  _mm_stream_ps(static_cast<float*>(p), v);
#else
  std::memcpy(p, &v, sizeof v);
#endif
}
FASTSAM_INLINE void stream(void* p, f64 v) { stream(p, (f32)v); }
FASTSAM_INLINE void stream(void* p, u16 v) {
#if defined(__AVX512F__)
  _mm256_stream_si256(static_cast<__m256i*>(p), (__m256i)v);
#elif defined(__AVX2__)
  _mm_stream_si128(static_cast<__m128i*>(p), (__m128i)v);
#else
  std::memcpy(p, &v, sizeof v);
#endif
}

FASTSAM_INLINE void stream_fence() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

// The lower and the upper half as doubles.
FASTSAM_INLINE void to_double(f32 x, f64& low, f64& high) {
#if defined(__AVX512F__)
  low = _mm512_cvtps_pd(_mm512_castps512_ps256(x));
  high = _mm512_cvtps_pd(_mm512_extractf32x8_ps(x, 1));
#elif defined(__AVX2__)
  low = _mm256_cvtps_pd(_mm256_castps256_ps128(x));
  high = _mm256_cvtps_pd(_mm256_extractf128_ps(x, 1));
#elif defined(__SSE2__)
  low = _mm_cvtps_pd(x);
  high = _mm_cvtps_pd(_mm_movehl_ps(x, x));
#else
  low = f64{x[0], x[1]};
  high = f64{x[2], x[3]};
#endif
}

FASTSAM_INLINE f32 square_root(f32 x) {
#if defined(__AVX512F__)
  return _mm512_sqrt_ps(x);
#elif defined(__AVX2__)
  return _mm256_sqrt_ps(x);
#elif defined(__SSE2__)
  return _mm_sqrt_ps(x);
#else
  for (int i = 0; i < 4; ++i) x[i] = std::sqrt(x[i]);
  return x;
#endif
}
FASTSAM_INLINE f64 square_root(f64 x) {
#if defined(__AVX512F__)
  return _mm512_sqrt_pd(x);
#elif defined(__AVX2__)
  return _mm256_sqrt_pd(x);
#elif defined(__SSE2__)
  return _mm_sqrt_pd(x);
#else
  for (int i = 0; i < 2; ++i) x[i] = std::sqrt(x[i]);
  return x;
#endif
}

// ---- bfloat16 and float16 ------------------------------------------------------------------------------

FASTSAM_INLINE u32 to_u32(u16 x) { return __builtin_convertvector(x, u32); }

FASTSAM_INLINE u16 to_u16(u32 x) {  // of values below 2^16
#if defined(__AVX512F__)
  return (u16)_mm512_cvtepi32_epi16((__m512i)x);
#elif defined(__AVX2__)
  const __m256i packed = _mm256_packus_epi32((__m256i)x, (__m256i)x);
  return (u16)_mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x08));
#else
  return __builtin_convertvector(x, u16);
#endif
}

FASTSAM_INLINE f32 from_bf16(u16 x) { return (f32)(to_u32(x) << 16); }

FASTSAM_INLINE u16 to_bf16(f32 x) {  // round to nearest even; NaN stays a quiet NaN
  const u32 u = (u32)x;
  const u32 rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  const u32 is_nan = (u32)(x != x);
  return to_u16((rounded & ~is_nan) | (((u >> 16) | 0x40u) & is_nan));
}

FASTSAM_INLINE f32 from_f16(u16 x) {
#if defined(__AVX512F__)
  return _mm512_cvtph_ps((__m256i)x);
#elif defined(__F16C__)
  return _mm256_cvtph_ps((__m128i)x);
#else
  const u32 h = to_u32(x);
  const u32 magnitude = (h & 0x7fffu) << 13;
  // Multiplying by 2^112 repairs the exponent's bias, subnormals included.
  const u32 finite = (u32)((f32)magnitude * 0x1p112f);
  const u32 is_special = (u32)(magnitude > 0x0f7fffffu);  // infinity and NaN
  return (f32)((finite & ~is_special) | ((magnitude | 0x7f800000u) & is_special) | ((h & 0x8000u) << 16));
#endif
}

FASTSAM_INLINE u16 to_f16(f32 x) {  // round to nearest even
#if defined(__AVX512F__)
  return (u16)_mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif defined(__F16C__)
  return (u16)_mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT);
#else
  const u32 u = (u32)x;
  const u32 a = u & 0x7fffffffu;
  const u32 normal = (a - 0x38000000u + 0xfffu + ((a >> 13) & 1u)) >> 13;
  // Below 2^-14 the sum with 0.5 leaves the rounded subnormal in the low bits.
  const u32 subnormal = (u32)((f32)a + 0.5f) - 0x3f000000u;
  const u32 is_small = (u32)(a < 0x38800000u), is_large = (u32)(a > 0x477fefffu), is_nan = (u32)(x != x);
  u32 r = (subnormal & is_small) | (normal & ~is_small);
  r = (r & ~is_large) | (0x7c00u & is_large);
  r = (r & ~is_nan) | (0x7e00u & is_nan);
  return to_u16(r | ((u >> 16) & 0x8000u));
#endif
}

}  // namespace FASTSAM_ISA
}  // namespace fastsam
