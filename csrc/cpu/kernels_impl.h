// The CPU kernels. Included once by each kernels_<isa>.cpp, which names its namespace FASTSAM_ISA.
#pragma once

#include <cmath>
#include <limits>
#include <type_traits>

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

// Whether vectors of elements can be stored there past the caches.
template <class E> bool aligned(const E* p) {
  return reinterpret_cast<uintptr_t>(p) % (Compute<E>::lanes * sizeof(E)) == 0;
}

// The elements of a piece: weights, gradients, and its part of a flat buffer.
template <class W> W* weights(const Piece& p) { return reinterpret_cast<W*>(p.row->w) + p.begin; }
template <class G> const G* gradients(const Piece& p) { return reinterpret_cast<const G*>(p.row->g) + p.begin; }
template <class W> W* part(void* flat, const Piece& p) {
  return flat ? static_cast<W*>(flat) + p.row->offset + p.begin : nullptr;
}
template <class W> const W* part(const void* flat, const Piece& p) {
  return part<W>(const_cast<void*>(flat), p);
}

// Calls f(W, M) for the piece's weights and vectors: these are of one type, or float and bf16.
template <class F>
FASTSAM_INLINE void with_types(const Piece& p, F f) {
  switch (p.w_type) {
    case Dtype::f64: return f(double{}, double{});
    case Dtype::bf16: return f(bf16{}, bf16{});
    case Dtype::f16: return f(f16{}, f16{});
    default: return p.m_type == Dtype::bf16 ? f(float{}, bf16{}) : f(float{}, float{});
  }
}

// Calls F<W, G, M>::run for the piece's element types: weights, gradients, and a method's own vectors.
template <template <class, class, class> class F, class... Args>
FASTSAM_INLINE void dispatch(const Piece& p, Args&&... args) {
  with_types(p, [&](auto w, auto m) {
    using W = decltype(w);
    using M = decltype(m);
    if constexpr (std::is_same_v<W, double>) return F<W, W, M>::run(p, args...);
    else switch (p.row->g_type) {
      case Dtype::bf16: return F<W, bf16, M>::run(p, args...);
      case Dtype::f16: return F<W, f16, M>::run(p, args...);
      default: return F<W, float, M>::run(p, args...);
    }
  });
}

// ---- gram: <d,d>, <d,v>, <v,v> in one read -------------------------------------------------------

template <class W, class G, class M>
struct Gram {
  using S = typename Compute<W>::Scalar;
  static void run(const Piece& p, const GramArgs& a, double sums[3]) {
    const ClimbGroup& h = a.groups[p.row->group];
    const G* g = gradients<G>(p);
    const W* w = a.weighted && h.adaptive ? weights<W>(p) : nullptr;
    const M* m = p.row->flags & kEmaStarted ? part<M>(a.ema, p) : nullptr;
    const M* v = part<M>(a.vector, p);
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

template <class W, class G, class M>
struct Climb {
  using S = typename Compute<W>::Scalar;
  static void run(const Piece& p, const ClimbArgs& a) {
    const ClimbGroup& h = a.groups[p.row->group];
    const G* g = gradients<G>(p);
    W* w = weights<W>(p);
    W* backup = part<W>(a.backup, p);
    const M* m = p.row->flags & kEmaStarted ? part<M>(a.ema, p) : nullptr;
    M* m_next = part<M>(a.ema_next, p);
    const M* v = part<M>(a.vector, p);
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

template <class W>
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

// The second side up to the base optimizer's rule and after it. M is the type of s; where it is None, there is nothing
// but the gradient, scaled and limited.
struct None {};

template <class W, class G, class M>
struct SecondSide {
  static constexpr bool Mixes = !std::is_same_v<M, None>;
  using S = typename Compute<W>::Scalar;
  using V = VectorOf<W>;
  const G* gradient;
  const M* stored;
  M* stored_next;
  Mixture<S> mixture;
  S scale, limit;
  bool clips, past_caches;

  template <class Args>
  SecondSide(const Piece& p, const Args& a)
      : gradient(gradients<G>(p)), stored(part<M>(a.mixing.stored, p)), stored_next(part<M>(a.mixing.stored_next, p)),
        mixture(Mixes ? mixture_constants<S>(a.mixing.groups[p.row->group]) : Mixture<S>{}), scale(S(a.grad_scale)),
        limit(S(a.clip_value)), clips(limit != std::numeric_limits<S>::infinity()),
        past_caches(Mixes && a.stream && stored_next && aligned(stored_next)) {}

  // updated(w, h) -> the new weight of the elements from the i-th on, rounded only when it is stored.
  template <bool F, class Update>
  FASTSAM_INLINE V run(int i, int count, Update updated) const {
    const V g = load<F>(gradient + i, count) * scale;
    V h = g, s = {};
    if constexpr (Mixes) {
      if (stored) s = load<F>(stored + i, count);
      h = combination(g, s, stored, mixture.gradient, mixture.stored);
      if (stored_next) {
        const V kept = combination(g, s, stored, mixture.keep_gradient, mixture.keep_stored);
        store<F>(stored_next + i, kept, count, past_caches);
      }
    }
    if (clips) h = limited(h, limit);
    V w = updated(h);
    if constexpr (Mixes)
      if (mixture.direct) w = w - combination(g, s, stored, mixture.direct_gradient, mixture.direct_stored);
    return w;
  }
};

// F<W, G, None>, whatever the type of the vectors.
template <template <class, class, class> class F>
struct WithoutVector {
  template <class W, class G, class> struct Pass : F<W, G, None> {};
};

template <template <class, class, class> class F, class Args>
FASTSAM_INLINE void dispatch_descent(const Piece& p, const Args& a) {
  a.mixing.groups ? dispatch<F>(p, a) : dispatch<WithoutVector<F>::template Pass>(p, a);
}

// The new weights of the elements from the i-th on.
template <bool F, class W>
FASTSAM_INLINE void store_weights(const Piece& p, int i, VectorOf<W> updated, int count, bool past_caches, const Rounding& h) {
  if constexpr (std::is_same_v<W, bf16>)
    if (h.on)
      updated = stochastically_rounded(updated, static_cast<uint32_t>(p.row->first + p.begin + i), h.first_key, h.second_key);
  store<F>(weights<W>(p) + i, updated, count, past_caches);
}

template <class W, class G, class M>
struct DescendSgd {
  using S = typename Compute<W>::Scalar;
  static void run(const Piece& p, const SgdArgs& a) {
    const SgdGroup& group = a.groups[p.row->group];
    const Sgd<S> h{S(group.lr),          S(group.momentum), S(group.one_minus_dampening), S(group.weight_decay),
                   group.momentum != 0, group.nesterov,    group.maximize,               !(p.row->flags & kStateStarted)};
    const SecondSide<W, G, M> second(p, a);
    W* w = weights<W>(p);
    const bool climbed = p.row->flags & kClimbed;
    const W* source = climbed ? part<W>(a.backup, p) : w;
    W* buffer = h.has_momentum ? part<W>(a.momentum_buffer, p) : nullptr;
    const bool past_caches = a.stream && climbed && aligned(w);
    for_vectors<Compute<W>::lanes>(p.count, [&](int i, auto full, int count) FASTSAM_LAMBDA {
      constexpr bool F = decltype(full)::value;
      VectorOf<W> m = {};
      if (buffer && !h.fresh) m = load<F>(buffer + i, count);
      const auto updated = second.template run<F>(i, count, [&](auto gradient) FASTSAM_LAMBDA {
        return sgd(load<F>(source + i, count), gradient, m, h);
      });
      if (buffer) store<F>(buffer + i, m, count);
      store_weights<F, W>(p, i, updated, count, past_caches, a.rounding);
    });
    if (past_caches || second.past_caches) stream_fence();
  }
};

template <class W, class G, class M>
struct DescendAdam {
  using S = typename Compute<W>::Scalar;
  static void run(const Piece& p, const AdamArgs& a) {
    const AdamGroup& group = a.groups[p.row->group];
    const double t = a.steps[p.row->param];
    const Adam<S> h = adam_constants<S>(group, std::pow(group.beta1, t), std::pow(group.beta2, t));
    const SecondSide<W, G, M> second(p, a);
    W* w = weights<W>(p);
    const bool climbed = p.row->flags & kClimbed;
    const W* source = climbed ? part<W>(a.backup, p) : w;
    W* exp_avg = part<W>(a.exp_avg, p);
    W* exp_avg_sq = part<W>(a.exp_avg_sq, p);
    const bool past_caches = a.stream && climbed && aligned(w);
    for_vectors<Compute<W>::lanes>(p.count, [&](int i, auto full, int count) FASTSAM_LAMBDA {
      constexpr bool F = decltype(full)::value;
      auto mean = load<F>(exp_avg + i, count), mean_sq = load<F>(exp_avg_sq + i, count);
      const auto updated = second.template run<F>(i, count, [&](auto gradient) FASTSAM_LAMBDA {
        return adam(load<F>(source + i, count), gradient, mean, mean_sq, h,
                    [](auto x) FASTSAM_LAMBDA { return square_root(x); });
      });
      store<F>(exp_avg + i, mean, count);
      store<F>(exp_avg_sq + i, mean_sq, count);
      store_weights<F, W>(p, i, updated, count, past_caches, a.rounding);
    });
    if (past_caches || second.past_caches) stream_fence();
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
          [](const Piece& p, const SgdArgs& a) { dispatch_descent<DescendSgd>(p, a); },
          [](const Piece& p, const AdamArgs& a) { dispatch_descent<DescendAdam>(p, a); },
          [](const Piece& p, const void* backup, bool stream) {
            with_types(p, [&](auto w, auto) { Restore<decltype(w)>::run(p, backup, stream); });
          },
          stream_traffic};
}

}  // namespace FASTSAM_ISA
}  // namespace fastsam
