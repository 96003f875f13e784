// The arithmetic of one element, shared by every compiled kernel.
//
// T is whatever the kernel computes in: float, double, or a SIMD vector of either. S is the matching
// scalar. Each function has a twin of the same name in fastsam/kernels/torch.py, which is the specification.
// Multiplications and additions are written out and compiled without contraction into fused
// multiply-adds, so every instruction set gives the same bits.
#pragma once

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

}  // namespace fastsam
