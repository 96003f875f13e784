// descend with torch.optim.Adam or AdamW: restore and update in one pass.
#include "descend.cuh"

namespace fastsam {
namespace {

template <class W, class G>
struct DescendAdam {
  using S = Scalar<W>;
  using Args = AdamArgs;
  // Halves have eight elements of four vectors in registers: enough under way with fewer threads.
  static constexpr int kBlocks = sizeof(W) == 2 ? 3 : kResidentBlocks<W, G>;
  static constexpr bool kFinishes = true;

  struct Shared {
    Reading<S> reading;
    Adam<S> rule;
  };

  static FASTSAM_INLINE Shared prepare(const AdamArgs& a, const Piece& p) {
    const AdamGroup& h = a.groups[p.group];
    const double t = double(a.steps[p.param]) + 1;
    return {reading<S>(a), adam_constants<S>(h, exp2(t * h.log2_beta1), exp2(t * h.log2_beta2))};
  }

  static FASTSAM_INLINE void run(const AdamArgs& a, const Piece& p, const Shared& h, int thread) {
    if (only_restored<W>(a, p, h.reading.counts, thread)) return;
    W* w = reinterpret_cast<W*>(p.w);
    const W* from = source<W>(a, p);
    W *exp_avg = part<W>(a.exp_avg, p), *exp_avg_sq = part<W>(a.exp_avg_sq, p);
    const uint64_t addresses = address(w) | address(from) | address(p.g) | address(exp_avg) | address(exp_avg_sq);
    for_elements<kWidth<W>>(thread, p.count, addresses, [&](int i, auto width) {
      constexpr int N = decltype(width)::value;
      const Values<S, N> g = Gradient<G, N>::load(p.g, p.gradient_type, i);
      Values<S, N> x = load<W, N>(from + i), first = load<W, N>(exp_avg + i), second = load<W, N>(exp_avg_sq + i);
      FASTSAM_UNROLL
      for (int k = 0; k < N; ++k)
        x.at[k] = adam(x.at[k], limited(g.at[k] * h.reading.scale, h.reading.limit), first.at[k], second.at[k], h.rule,
                       [](S y) { return S(sqrt(y)); });
      store<W, N>(exp_avg + i, first);
      store<W, N>(exp_avg_sq + i, second);
      store<W, N>(w + i, x);
    });
  }

  // Counts the steps, when every block has read them.
  static FASTSAM_INLINE void finish(const AdamArgs& a, int thread) {
    if (!all_finite(a.sums)) return;
    for (int r = thread; r < a.table.n_rows; r += kThreads)
      if (a.table.rows[r].gradient) a.steps[a.table.rows[r].param] += 1;
  }
};

}  // namespace

void descend_adam(const AdamArgs& args, Types types, Place place) {
  with_types(types, [&](auto w, auto g) { run_pass<DescendAdam<decltype(w), decltype(g)>, decltype(w)>(args, place); });
}

}  // namespace fastsam
