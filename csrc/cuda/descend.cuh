// What the base optimizers' passes share: where w comes from, what becomes of the gradient, a step that does not count.
#pragma once

#include "launch.cuh"

namespace fastsam {

// What becomes of gradients as they are read; `counts` is false where a sum met a NaN or an infinity.
template <class S> struct Reading {
  S scale, limit;
  bool counts;
};

template <class S> FASTSAM_INLINE Reading<S> reading(const DescentArgs& a) {
  const Scaling& s = *a.scaling;
  const double clip = s.max_norm / (sqrt(a.sums[0]) + 1e-6);
  return {S(s.grad_scale * (clip < 1 ? clip : 1)), S(s.clip_value), all_finite(a.sums)};
}

template <class S> FASTSAM_INLINE S limited(S x, S limit) {
  x = x > limit ? limit : x;
  return x < -limit ? -limit : x;
}

// The unperturbed weights: the backup where there is one, else w itself.
template <class W> FASTSAM_INLINE const W* source(const DescentArgs& a, const Piece& p) {
  return p.climbed ? part<W>(a.backup, p) : reinterpret_cast<const W*>(p.w);
}

// Restores a chunk without a gradient, and any chunk of a step that does not count; says whether that was all.
template <class W>
FASTSAM_INLINE bool only_restored(const DescentArgs& a, const Piece& p, bool counts, int thread) {
  if (counts && p.g) return false;
  if (p.climbed) copy(reinterpret_cast<W*>(p.w), source<W>(a, p), p.count, thread);
  if (!counts && a.ema) copy(part<W>(a.ema_next, p), part<W>(a.ema, p), p.count, thread);
  return true;
}

}  // namespace fastsam
