// The arithmetic of one element, shared by every compiled kernel.
//
// T is whatever the kernel computes in: float, double, or a SIMD vector of either. S is the matching
// scalar. The specification is fastsam/kernels/torch.py.
// Multiplications and additions are written out and compiled without contraction into fused
// multiply-adds, so every instruction set gives the same bits.
#pragma once

#include <cmath>
#include <cstdint>

#if defined(__CUDACC__)
#define FASTSAM_INLINE __host__ __device__ __forceinline__
#else
#define FASTSAM_INLINE inline __attribute__((always_inline))
#endif

namespace fastsam {

// Added to every norm before a division, as the authors of SAM do.
constexpr double kNormEpsilon = 1e-12;

// d = g - sigma m: the gradient without its expected part (F-SAM).
template <class T, class S>
FASTSAM_INLINE T direction(T g, T m, S sigma) {
  return g - m * sigma;
}

// m <- lmbda m + (1 - lmbda) g
template <class T, class S>
FASTSAM_INLINE T moving_average(T m, T g, S lmbda, S one_minus_lmbda) {
  return m * lmbda + g * one_minus_lmbda;
}

struct Coefficients {
  double d, v;
};

// e = c_d d + c_v v for the whole family; alpha = 0 is SAM, ASAM and F-SAM.
FASTSAM_INLINE Coefficients coefficients(double norm_d, double dot_dv, double rho, double alpha) {
  const double n = norm_d + kNormEpsilon;
  const double sign = (dot_dv > 0) - (dot_dv < 0);
  return {rho * (1.0 / n - alpha * sign * (dot_dv / n) / n), rho * alpha * sign};
}

// What a second side does with the second gradient g and a stored vector s.
template <class S>
struct Mixture {
  S gradient, stored;                // h, in g's place
  S direct_gradient, direct_stored;  // subtracted from the new weight
  S keep_gradient, keep_stored;      // the next s
  bool direct;                       // -0.0 less nothing must stay -0.0
};

template <class S, class Group>
FASTSAM_INLINE Mixture<S> mixture_constants(const Group& h) {
  return {S(h.gradient),    S(h.stored),        S(h.direct_gradient),
          S(h.direct_stored), S(h.keep_gradient), S(h.keep_stored),
          h.direct_gradient != 0 || h.direct_stored != 0};
}

// a g + b s, and a g where there is no s.
template <class T, class S>
FASTSAM_INLINE T combination(T g, T s, bool has_s, S a, S b) {
  return has_s ? g * a + s * b : g * a;
}

template <class S>
struct Sgd {
  S lr, momentum, one_minus_dampening, weight_decay;
  bool has_momentum, nesterov, maximize, fresh;
};

// torch.optim.SGD for one element; the momentum buffer is updated in place, the new weight is returned.
template <class T, class S>
FASTSAM_INLINE T sgd(T w, T g, T& buffer, const Sgd<S>& h) {
  if (h.maximize) g = -g;
  if (h.weight_decay != S(0)) g = g + w * h.weight_decay;
  if (h.has_momentum) {
    buffer = h.fresh ? g : buffer * h.momentum + g * h.one_minus_dampening;
    g = h.nesterov ? g + buffer * h.momentum : buffer;
  }
  return h.lr == S(0) ? w : w - g * h.lr;  // lr = 0 must not turn -0.0 into 0.0
}

template <class S>
struct Adam {
  S one_minus_beta1, beta2, one_minus_beta2, eps;
  S decay_factor;      // 1 - lr weight_decay (AdamW), or 1
  S weight_decay;      // added to the gradient (Adam), or 0
  S step_size;         // lr / (1 - beta1^t)
  S sqrt_correction2;  // sqrt(1 - beta2^t)
  bool maximize;
};

// What Adam's elements of one group and step count t share; the powers are beta1^t and beta2^t.
template <class S, class Group>
FASTSAM_INLINE Adam<S> adam_constants(const Group& h, double beta1_power, double beta2_power) {
  const bool decoupled = h.decoupled_weight_decay != 0;
  Adam<S> rule;
  rule.one_minus_beta1 = S(1 - h.beta1);
  rule.beta2 = S(h.beta2);
  rule.one_minus_beta2 = S(1 - h.beta2);
  rule.eps = S(h.eps);
  rule.decay_factor = S(decoupled ? 1 - h.lr * h.weight_decay : 1);
  rule.weight_decay = S(decoupled ? 0 : h.weight_decay);
  rule.step_size = S(h.lr / (1 - beta1_power));
  rule.sqrt_correction2 = S(sqrt(1 - beta2_power));
  rule.maximize = h.maximize != 0;
  return rule;
}

// torch.optim.Adam and AdamW for one element; both moments are updated in place.
template <class T, class S, class Sqrt>
FASTSAM_INLINE T adam(T w, T g, T& exp_avg, T& exp_avg_sq, const Adam<S>& h, Sqrt square_root) {
  if (h.maximize) g = -g;
  if (h.weight_decay != S(0)) g = g + w * h.weight_decay;
  if (h.decay_factor != S(1)) w = w * h.decay_factor;
  exp_avg = exp_avg + (g - exp_avg) * h.one_minus_beta1;
  exp_avg_sq = exp_avg_sq * h.beta2 + g * g * h.one_minus_beta2;
  const T denominator = square_root(exp_avg_sq) / h.sqrt_correction2 + h.eps;
  return h.step_size == S(0) ? w : w - exp_avg / denominator * h.step_size;
}

// Sixteen random bits for the element of that number. U is uint32_t, or a SIMD vector of it.
template <class U>
FASTSAM_INLINE U random_bits(U number, uint32_t first_key, uint32_t second_key) {
  U x = number ^ first_key;
  x = (x ^ (x >> 16)) * 0x7feb352du;
  x = ((x ^ (x >> 15)) + second_key) * 0x846ca68bu;
  return x >> 16;
}

// The bits of a float32, not a NaN, rounded to those of a bfloat16: away from 0 as often as the bits cut off say.
template <class U>
FASTSAM_INLINE U stochastically_rounded(U bits, U random) {
  return (bits + random) & 0xffff0000u;
}

}  // namespace fastsam
