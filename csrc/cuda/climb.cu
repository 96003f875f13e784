// climb: back up w, write w + D (c_d d + c_v v), move the average on.
#include "launch.cuh"

namespace fastsam {
namespace {

template <class W, class G, class M>
struct Climb {
  using S = Scalar<W>;
  using Args = ClimbArgs;
  static constexpr int kBlocks = kResidentBlocks<W, G>;
  static constexpr bool kFinishes = false;

  struct Shared {
    S scale, sigma, lmbda, one_minus_lmbda, c_d, c_v;
    bool adaptive, counts;
  };

  static FASTSAM_INLINE Shared prepare(const ClimbArgs& a, const Piece& p) {
    const AscentGroup& h = a.groups[p.group];
    Coefficients c{h.rho, h.alpha};
    if (a.closed_form) c = coefficients(sqrt(a.sums[0]), a.sums[1], h.rho, h.alpha);
    return {S(a.scaling->grad_scale), S(h.sigma), S(h.lmbda),       S(1 - h.lmbda), S(c.d),
            S(c.v),                   h.adaptive != 0, all_finite(a.sums)};
  }

  static FASTSAM_INLINE void run(const ClimbArgs& a, const Piece& p, const Shared& h, int thread) {
    if (!p.g) return;
    W* w = reinterpret_cast<W*>(p.w);
    W* backup = part<W>(a.backup, p);
    if (!h.counts) return copy(backup, w, p.count, thread);
    const M *m = part<M>(a.ema, p), *v = part<M>(a.vector, p);
    M* m_next = part<M>(a.ema_next, p);
    const uint64_t addresses = address(w) | address(p.g) | address(backup) | address_beside<W>(m) |
                               address_beside<W>(m_next) | address_beside<W>(v);
    for_elements<kWidth<W>>(thread, p.count, addresses, [&](auto i, auto width) {
      constexpr int N = decltype(width)::value;
      Values<S, N> g = Gradient<G, N>::load(p.g, p.gradient_type, i), average, other;
      const Raw<W, N> raw = load_raw<W, N>(w + i);
      if (m) average = load<M, N>(m + i);
      if (v) other = load<M, N>(v + i);
      store_raw<W, N>(backup + i, raw, true);
      Values<S, N> old = widened<W, N>(raw);
      FASTSAM_UNROLL
      for (int k = 0; k < N; ++k) {
        const S gradient = g.at[k] * h.scale;
        S d = gradient;
        if (m) {
          const bool blank = is_blank(average.at[k]);
          if (!blank) d = direction(gradient, average.at[k], h.sigma);
          average.at[k] = blank ? gradient : moving_average(average.at[k], gradient, h.lmbda, h.one_minus_lmbda);
        } else {
          average.at[k] = gradient;
        }
        S e = d * h.c_d;
        if (v) e = e + other.at[k] * h.c_v;
        if (h.adaptive) e = e * (old.at[k] * old.at[k]);
        old.at[k] = old.at[k] + e;
      }
      if (m_next) store<M, N>(m_next + i, average, true);
      store<W, N>(w + i, old);
    });
  }
};

}  // namespace

void climb(const ClimbArgs& args, Types types, Place place) {
  with_types(types, [&](auto w, auto g, auto m) {
    run_pass<Climb<decltype(w), decltype(g), decltype(m)>, decltype(w)>(args, place);
  });
}

}  // namespace fastsam
