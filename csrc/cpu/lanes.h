// Sixty-four bytes of numbers at a time, in as many registers as the instruction set needs.
//
// The number of lanes never changes, so neither does any sum: every instruction set gives the same bits.
#pragma once

#include "registers.h"

// A lambda in an inner loop must be inlined into it, or its captures live in memory.
#define FASTSAM_LAMBDA __attribute__((always_inline))

namespace fastsam {

struct bf16 { uint16_t bits; };
struct f16 { uint16_t bits; };

namespace FASTSAM_ISA {

constexpr int kVectorBytes = 64;
constexpr int kRegisters = kVectorBytes / kRegisterBytes;

// A vector of S (float or double) with elementwise operators.
template <class S> struct Register;
template <> struct Register<float> { using type = f32; };
template <> struct Register<double> { using type = f64; };

template <class S>
struct Vector {
  using R = typename Register<S>::type;
  R r[kRegisters];

#define FASTSAM_OPERATOR(op)                                                 \
  friend FASTSAM_INLINE Vector operator op(const Vector& a, const Vector& b) { \
    Vector c;                                                                \
    for (int i = 0; i < kRegisters; ++i) c.r[i] = a.r[i] op b.r[i];          \
    return c;                                                                \
  }                                                                          \
  friend FASTSAM_INLINE Vector operator op(const Vector& a, S b) {             \
    Vector c;                                                                \
    for (int i = 0; i < kRegisters; ++i) c.r[i] = a.r[i] op b;               \
    return c;                                                                \
  }
  FASTSAM_OPERATOR(+)
  FASTSAM_OPERATOR(-)
  FASTSAM_OPERATOR(*)
  FASTSAM_OPERATOR(/)
#undef FASTSAM_OPERATOR

  FASTSAM_INLINE Vector operator-() const {
    Vector c;
    for (int i = 0; i < kRegisters; ++i) c.r[i] = -r[i];
    return c;
  }
};

template <class S>
FASTSAM_INLINE Vector<S> square_root(const Vector<S>& x) {
  Vector<S> y;
  for (int i = 0; i < kRegisters; ++i) y.r[i] = square_root(x.r[i]);
  return y;
}

// Limited to [-limit, limit].
template <class S>
FASTSAM_INLINE Vector<S> limited(Vector<S> x, S limit) {
  for (int i = 0; i < kRegisters; ++i) {
    const auto high = typename Vector<S>::R{} + limit;
    x.r[i] = x.r[i] > high ? high : x.r[i];
    x.r[i] = x.r[i] < -high ? -high : x.r[i];
  }
  return x;
}

// Sixteen values of bfloat16 instead of those of float32 in x, drawn for the elements from that number on.
FASTSAM_INLINE Vector<float> stochastically_rounded(Vector<float> x, uint32_t number, uint32_t first_key, uint32_t second_key) {
  constexpr int lanes = kRegisterBytes / sizeof(float);
  u32 numbers = {};
  for (int k = 0; k < lanes; ++k) numbers[k] = k;
  for (int i = 0; i < kRegisters; ++i) {
    const u32 bits = fastsam::stochastically_rounded(
        (u32)x.r[i], random_bits(numbers + (number + uint32_t(i * lanes)), first_key, second_key));
    const u32 is_nan = (u32)(x.r[i] != x.r[i]);
    x.r[i] = (f32)((bits & ~is_nan) | ((u32)x.r[i] & is_nan));
  }
  return x;
}

// What an element type is computed in: double for double, float for everything else.
template <class E> struct Compute { using Scalar = float; static constexpr int lanes = 16; };
template <> struct Compute<double> { using Scalar = double; static constexpr int lanes = 8; };
template <class E> using VectorOf = Vector<typename Compute<E>::Scalar>;

FASTSAM_INLINE f32 widen(u16 x, bf16) { return from_bf16(x); }
FASTSAM_INLINE f32 widen(u16 x, f16) { return from_f16(x); }
FASTSAM_INLINE u16 narrow(f32 x, bf16) { return to_bf16(x); }
FASTSAM_INLINE u16 narrow(f32 x, f16) { return to_f16(x); }

// The `count` elements at p (all lanes if Full), widened to what they are computed in; missing lanes are 0.
template <bool Full, class E>
FASTSAM_INLINE VectorOf<E> load(const E* p, int count) {
  if constexpr (!Full) {
    E whole[Compute<E>::lanes] = {};
    std::memcpy(whole, p, count * sizeof(E));
    return load<true>(whole, count);
  } else if constexpr (sizeof(E) == 2) {
    VectorOf<E> v;
    for (int i = 0; i < kRegisters; ++i) {
      u16 raw;
      std::memcpy(&raw, reinterpret_cast<const char*>(p) + i * sizeof raw, sizeof raw);
      v.r[i] = widen(raw, E{});
    }
    return v;
  } else {
    VectorOf<E> v;
    for (int i = 0; i < kRegisters; ++i)
      std::memcpy(&v.r[i], reinterpret_cast<const char*>(p) + i * kRegisterBytes, kRegisterBytes);
    return v;
  }
}

// Stream: past the caches. Right for what is not read again soon and was not just read.
template <bool Full, class E>
FASTSAM_INLINE void store(E* p, const VectorOf<E>& v, int count, bool past_caches = false) {
  if constexpr (!Full) {
    E whole[Compute<E>::lanes];
    store<true>(whole, v, count);
    std::memcpy(p, whole, count * sizeof(E));
  } else {
    for (int i = 0; i < kRegisters; ++i) {
      const auto put = [&](auto raw) FASTSAM_LAMBDA {
        char* at = reinterpret_cast<char*>(p) + i * sizeof raw;
        if (past_caches) stream(at, raw);
        else std::memcpy(at, &raw, sizeof raw);
      };
      if constexpr (sizeof(E) == 2) put(narrow(v.r[i], E{}));
      else put(v.r[i]);
    }
  }
}

// A sum in double, whatever the element type, in sixteen lanes (eight for double).
struct Sum {
  f64 lanes[2 * kRegisters] = {};

  FASTSAM_INLINE void add_product(const Vector<float>& a, const Vector<float>& b) {
    for (int i = 0; i < kRegisters; ++i) {
      f64 a_low, a_high, b_low, b_high;
      to_double(a.r[i], a_low, a_high);
      to_double(b.r[i], b_low, b_high);
      lanes[2 * i] += a_low * b_low;
      lanes[2 * i + 1] += a_high * b_high;
    }
  }
  FASTSAM_INLINE void add_product(const Vector<double>& a, const Vector<double>& b) {
    for (int i = 0; i < kRegisters; ++i) lanes[i] += a.r[i] * b.r[i];
  }

  FASTSAM_INLINE double total() const {
    double sum = 0;
    for (const f64& part : lanes)
      for (int i = 0; i < static_cast<int>(sizeof part / sizeof(double)); ++i) sum += part[i];
    return sum;
  }
};

}  // namespace FASTSAM_ISA
}  // namespace fastsam
