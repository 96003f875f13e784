// The CPU kernels. Included once by each kernels_<isa>.cpp, which names its namespace FASTSAM_ISA.
#pragma once

#include <cmath>
#include <limits>

#include "kernels.h"
#include "lanes.h"

namespace fastsam {
namespace FASTSAM_ISA {

template <bool B>
struct Bool {
  static constexpr bool value = B;
};

// f(i, full, count) over [0, n) in vectors of `lanes`; only the last may be partial.
template <int lanes, class F>
FASTSAM_INLINE void for_vectors(int n, F f) {
  int i = 0;
  for (; i + lanes <= n; i += lanes) f(i, Bool<true>{}, lanes);
  if (i < n) f(i, Bool<false>{}, n - i);
}

inline bool aligned(const void* p) { return (reinterpret_cast<uintptr_t>(p) & (kVectorBytes - 1)) == 0; }

// The elements of a piece: weights, gradients, and its part of a flat buffer.
template <class W> W* weights(const Piece& p) { return reinterpret_cast<W*>(p.row->w) + p.begin; }
template <class G> const G* gradients(const Piece& p) { return reinterpret_cast<const G*>(p.row->g) + p.begin; }
template <class W> W* part(void* flat, const Piece& p) {
  return flat ? static_cast<W*>(flat) + p.row->offset + p.begin : nullptr;
}
template <class W> const W* part(const void* flat, const Piece& p) {
  return part<W>(const_cast<void*>(flat), p);
}

// Calls F<W, G>::run for the piece's element types.
template <template <class, class> class F, class... Args>
FASTSAM_INLINE void dispatch(const Piece& p, Args&&... args) {
  if (p.w_type == Dtype::f64) return F<double, double>::run(p, args...);
  const auto with_gradient = [&](auto w) {
    using W = decltype(w);
    switch (p.row->g_type) {
      case Dtype::bf16: return F<W, bf16>::run(p, args...);
      case Dtype::f16: return F<W, f16>::run(p, args...);
      default: return F<W, float>::run(p, args...);
    }
  };
  switch (p.w_type) {
    case Dtype::bf16: return with_gradient(bf16{});
    case Dtype::f16: return with_gradient(f16{});
    default: return with_gradient(float{});
  }
}

// ---- gram: <d,d>, <d,v>, <v,v> in one read -------------------------------------------------------

template <class W, class G>
struct Gram {
  using S = typename Compute<W>::Scalar;
  static void run(const Piece& p, const GramArgs& a, double sums[3]) {
    const ClimbGroup& h = a.groups[p.row->group];
    const G* g = gradients<G>(p);
    const W* w = a.weighted && h.adaptive ? weights<W>(p) : nullptr;
    const W* m = p.row->flags & kEmaStarted ? part<W>(a.ema, p) : nullptr;
    const W* v = part<W>(a.vector, p);
    const S scale = S(a.grad_scale), sigma = S(h.sigma);
    Sum dd, dv, vv;
    for_vectors<Compute<W>::lanes>(p.count, [&](int i, auto full, int count) FASTSAM_LAMBDA {
      constexpr bool F = decltype(full)::value;
      auto d = load<F>(g + i, count) * scale;
      if (m) d = direction(d, load<F>(m + i, count), sigma);
      if (v) {
        const auto e = load<F>(v + i, count);
        dv.add_product(d, e);
        vv.add_product(e, e);
      }
      if (w) d = d * load<F>(w + i, count);
      dd.add_product(d, d);
    });
    sums[0] = dd.total();
    sums[1] = dv.total();
    sums[2] = vv.total();
  }
};

// ---- climb: back up w, write w + e, move the average on ----------------------------------------------

template <class W, class G>
struct Climb {
  using S = typename Compute<W>::Scalar;
  static void run(const Piece& p, const ClimbArgs& a) {
    const ClimbGroup& h = a.groups[p.row->group];
    const G* g = gradients<G>(p);
    W* w = weights<W>(p);
    W* backup = part<W>(a.backup, p);
    const W* m = p.row->flags & kEmaStarted ? part<W>(a.ema, p) : nullptr;
    W* m_next = part<W>(a.ema_next, p);
    const W* v = part<W>(a.vector, p);
    const S scale = S(a.grad_scale), sigma = S(h.sigma), c_d = S(h.c_d), c_v = S(h.c_v);
    const S lmbda = S(h.lmbda), one_minus_lmbda = S(h.one_minus_lmbda);
    const bool past_caches = a.stream && aligned(backup) && aligned(m_next);
    for_vectors<Compute<W>::lanes>(p.count, [&](int i, auto full, int count) FASTSAM_LAMBDA {
      constexpr bool F = decltype(full)::value;
      const auto old = load<F>(w + i, count);
      store<F>(backup + i, old, count, past_caches);
      if (a.skip) return;
      const auto gradient = load<F>(g + i, count) * scale;
      auto d = gradient;
      if (m_next) {
        auto average = gradient;
        if (m) {
          average = load<F>(m + i, count);
          d = direction(gradient, average, sigma);
          average = moving_average(average, gradient, lmbda, one_minus_lmbda);
        }
        store<F>(m_next + i, average, count, past_caches);
      }
      auto e = d * c_d;
      if (v) e = e + load<F>(v + i, count) * c_v;
      if (h.adaptive) e = e * (old * old);
      store<F>(w + i, old + e, count);
    });
    if (past_caches) stream_fence();
  }
};

// ---- restore, and descend: restore and the base optimizer's update in one pass --------------------------

template <class W, class G>
struct Restore {
  static void run(const Piece& p, const void* flat, bool stream) {
    W* w = weights<W>(p);
    const W* backup = part<W>(flat, p);
    const bool past_caches = stream && aligned(w);
    for_vectors<Compute<W>::lanes>(p.count, [&](int i, auto full, int count) FASTSAM_LAMBDA {
      constexpr bool F = decltype(full)::value;
      store<F>(w + i, load<F>(backup + i, count), count, past_caches);
    });
    if (past_caches) stream_fence();
  }
};

template <class W, class G>
struct DescendSgd {
  using S = typename Compute<W>::Scalar;
  static void run(const Piece& p, const SgdArgs& a) {
    const SgdGroup& group = a.groups[p.row->group];
    const Sgd<S> h{S(group.lr),          S(group.momentum), S(group.one_minus_dampening), S(group.weight_decay),
                   group.momentum != 0, group.nesterov,    group.maximize,               !(p.row->flags & kStateStarted)};
    const G* g = gradients<G>(p);
    W* w = weights<W>(p);
    const bool climbed = p.row->flags & kClimbed;
    const W* source = climbed ? part<W>(a.backup, p) : w;
    W* buffer = h.has_momentum ? part<W>(a.momentum_buffer, p) : nullptr;
    const S scale = S(a.grad_scale), limit = S(a.clip_value);
    const bool clips = limit != std::numeric_limits<S>::infinity();
    const bool past_caches = a.stream && climbed && aligned(w);
    for_vectors<Compute<W>::lanes>(p.count, [&](int i, auto full, int count) FASTSAM_LAMBDA {
      constexpr bool F = decltype(full)::value;
      auto gradient = load<F>(g + i, count) * scale;
      if (clips) gradient = limited(gradient, limit);
      VectorOf<W> m = {};
      if (buffer && !h.fresh) m = load<F>(buffer + i, count);
      const auto updated = sgd(load<F>(source + i, count), gradient, m, h);
      if (buffer) store<F>(buffer + i, m, count);
      store<F>(w + i, updated, count, past_caches);
    });
    if (past_caches) stream_fence();
  }
};

template <class W, class G>
struct DescendAdam {
  using S = typename Compute<W>::Scalar;
  static void run(const Piece& p, const AdamArgs& a) {
    const AdamGroup& group = a.groups[p.row->group];
    const double t = a.steps[p.row->param];
    const Adam<S> h = adam_constants<S>(group, std::pow(group.beta1, t), std::pow(group.beta2, t));
    const G* g = gradients<G>(p);
    W* w = weights<W>(p);
    const bool climbed = p.row->flags & kClimbed;
    const W* source = climbed ? part<W>(a.backup, p) : w;
    W* exp_avg = part<W>(a.exp_avg, p);
    W* exp_avg_sq = part<W>(a.exp_avg_sq, p);
    const S scale = S(a.grad_scale), limit = S(a.clip_value);
    const bool clips = limit != std::numeric_limits<S>::infinity();
    const bool past_caches = a.stream && climbed && aligned(w);
    for_vectors<Compute<W>::lanes>(p.count, [&](int i, auto full, int count) FASTSAM_LAMBDA {
      constexpr bool F = decltype(full)::value;
      auto gradient = load<F>(g + i, count) * scale;
      if (clips) gradient = limited(gradient, limit);
      auto first = load<F>(exp_avg + i, count), second = load<F>(exp_avg_sq + i, count);
      const auto updated = adam(load<F>(source + i, count), gradient, first, second, h,
                                [](auto x) FASTSAM_LAMBDA { return square_root(x); });
      store<F>(exp_avg + i, first, count);
      store<F>(exp_avg_sq + i, second, count);
      store<F>(w + i, updated, count, past_caches);
    });
    if (past_caches) stream_fence();
  }
};

// ---- plain traffic ---------------------------------------------------------------------------------------

inline void stream_traffic(const StreamArgs& a, int64_t begin, int64_t end) {
  for (int64_t i = begin; i + 16 <= end; i += 16) {
    Vector<float> sum = {};
    for (int r = 0; r < a.n_reads; ++r) sum = sum + load<true>(a.reads[r] + i, 16);
    for (int k = 0; k < a.n_writes; ++k) store<true>(a.writes[k] + i, sum, 16, k >= a.in_place);
    if (a.n_writes == 0) __asm__ volatile("" : : "m"(sum.r));
  }
  stream_fence();
}

// Constant-initialised: no instruction of this set runs before the processor was asked for it.
constexpr Kernels make(const char* name) {
  return {name,
          [](const Piece& p, const GramArgs& a, double* sums) { dispatch<Gram>(p, a, sums); },
          [](const Piece& p, const ClimbArgs& a) { dispatch<Climb>(p, a); },
          [](const Piece& p, const SgdArgs& a) { dispatch<DescendSgd>(p, a); },
          [](const Piece& p, const AdamArgs& a) { dispatch<DescendAdam>(p, a); },
          [](const Piece& p, const void* backup, bool stream) { dispatch<Restore>(p, backup, stream); },
          stream_traffic};
}

}  // namespace FASTSAM_ISA
}  // namespace fastsam
