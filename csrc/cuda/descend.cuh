// What the base optimizers' passes share: where w comes from, what becomes of the gradient, a step that does not count.
#pragma once

#include "launch.cuh"

namespace fastsam {

// What the second side makes of gradient and stored vector; a base without a member where it makes nothing of them.
template <class S, bool Mixes> struct Mixing {};
template <class S> struct Mixing<S, true> { Mixture<S> mixture; };

template <class S, bool Mixes> FASTSAM_INLINE Mixing<S, Mixes> mixing(const DescentArgs& a, const Piece& p) {
  if constexpr (Mixes) return {mixture_constants<S>(a.mixtures[p.group])};
  else return {};
}

// Whether the second side makes something of gradient and stored vector: M is that one's type.
template <class M> constexpr bool kMixes = !std::is_same_v<M, None>;

// P<W, G, M> for the types of a launch, with None for M where it does not mix. What mixes has one block fewer on a
// multiprocessor: its coefficients take registers, and with s every thread has more bytes under way.
template <template <class, class, class> class P, class Args>
void run_descent(const Args& args, Types types, Place place) {
  with_types(types, [&](auto w, auto g, auto m) {
    using W = decltype(w);
    using G = decltype(g);
    if (args.mixtures) run_pass<P<W, G, decltype(m)>, W>(args, place);
    else run_pass<P<W, G, None>, W>(args, place);
  });
}

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

// The keys of stochastic rounding and the number of the piece's first element. Weights are rounded to the nearest where
// `on` is false, and those of other types than bf16 always.
template <class W> struct Draws {};
template <> struct Draws<bf16> {
  uint32_t first_key, second_key, first;
  bool on;
};

template <class W> FASTSAM_INLINE Draws<W> draws(const DescentArgs& a, const Piece& p) {
  if constexpr (!std::is_same_v<W, bf16>) return {};
  else if (!a.rounding) return {0, 0, 0, false};
  else return {static_cast<uint32_t>(a.rounding->first_key), static_cast<uint32_t>(a.rounding->second_key), p.first, true};
}

FASTSAM_INLINE uint32_t element(int i, int k) { return i + k; }
FASTSAM_INLINE uint32_t element(Apart i, int k) { return i.i + k * kThreads; }

// The new weights of N elements from the i-th on.
template <class W, int N, class I>
FASTSAM_INLINE void store_weights(W* w, I i, Values<Scalar<W>, N>& x, const Draws<W>& h) {
  if constexpr (std::is_same_v<W, bf16>) {
    if (h.on) {
      FASTSAM_UNROLL
      for (int k = 0; k < N; ++k) {
        uint32_t bits;
        memcpy(&bits, &x.at[k], sizeof bits);
        bits = stochastically_rounded(bits, random_bits(h.first + element(i, k), h.first_key, h.second_key));
        if (x.at[k] == x.at[k]) memcpy(&x.at[k], &bits, sizeof bits);
      }
    }
  }
  store<W, N>(w + i, x);
}

// Restores a chunk without a gradient, and any chunk of a step that does not count; says whether that was all.
template <class W, class M>
FASTSAM_INLINE bool only_restored(const DescentArgs& a, const Piece& p, bool counts, int thread) {
  if (counts && p.g) return false;
  if (p.climbed) copy(reinterpret_cast<W*>(p.w), source<W>(a, p), p.count, thread);
  if (!counts && a.ema) {
    if constexpr (kMixes<M>) copy(part<M>(a.ema_next, p), part<M>(a.ema, p), p.count, thread);
    else {  // in units of two bytes, whatever they are of
      const int64_t units = a.narrow_averages ? 1 : sizeof(W) / 2;
      const auto* from = static_cast<const bf16*>(a.ema) + units * p.offset;
      copy(static_cast<bf16*>(a.ema_next) + units * p.offset, from, int(units) * p.count, thread);
    }
  }
  return true;
}

// The second gradient up to the base optimizer's rule: N elements from the i-th on, mixed with the stored vector.
template <class W, class G, class M> struct SecondSide {
  static constexpr bool Mixes = kMixes<M>;
  using S = Scalar<W>;
  const DescentArgs& a;  // s and the next s by their places in it: pointers of their own would take registers
  const Piece& p;
  const char* g;
  int gradient_type;
  bool stored, stored_next;

  FASTSAM_INLINE SecondSide(const DescentArgs& a, const Piece& p)
      : a(a), p(p), g(p.g), gradient_type(p.gradient_type), stored(Mixes && a.stored),
        stored_next(Mixes && a.stored_next) {}

  FASTSAM_INLINE uint64_t addresses() const {
    if constexpr (!Mixes) return address(g);
    else return address(g) | address_beside<W>(part<M>(a.stored, p)) | address_beside<W>(part<M>(a.stored_next, p));
  }

  // The gradients and, where there is one, s.
  template <int N> struct Read {
    Values<S, N> gradient, stored;
  };

  template <int N, class I> FASTSAM_INLINE Read<N> read(I i) const {
    Read<N> x = {Gradient<G, N>::load(g, gradient_type, i), {}};
    if constexpr (Mixes)
      if (stored) x.stored = load<M, N>(part<M>(a.stored, p) + i);
    return x;
  }

  // Scales the gradients and writes the next s.
  template <int N, class I> FASTSAM_INLINE void keep(Read<N>& x, I i, const Mixing<S, Mixes>& h, S scale) const {
    FASTSAM_UNROLL
    for (int k = 0; k < N; ++k) x.gradient.at[k] = x.gradient.at[k] * scale;
    if constexpr (Mixes) {
      if (!stored_next) return;
      Values<S, N> kept;
      FASTSAM_UNROLL
      for (int k = 0; k < N; ++k)
        kept.at[k] = combination(x.gradient.at[k], x.stored.at[k], stored, h.mixture.keep_gradient, h.mixture.keep_stored);
      store<M, N>(part<M>(a.stored_next, p) + i, kept, true);
    }
  }

  // What the rule gets in the gradient's place, before it is limited.
  template <int N> FASTSAM_INLINE S mixed(const Read<N>& x, int k, const Mixing<S, Mixes>& h) const {
    if constexpr (Mixes)
      return combination(x.gradient.at[k], x.stored.at[k], stored, h.mixture.gradient, h.mixture.stored);
    else return x.gradient.at[k];
  }

  // The new weight, of which the rule made w.
  template <int N> FASTSAM_INLINE S directed(S w, const Read<N>& x, int k, const Mixing<S, Mixes>& h) const {
    if constexpr (Mixes)
      if (h.mixture.direct)
        w = w - combination(x.gradient.at[k], x.stored.at[k], stored, h.mixture.direct_gradient, h.mixture.direct_stored);
    return w;
  }
};

}  // namespace fastsam
