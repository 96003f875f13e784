// descend with torch.optim.Adam or AdamW: restore and update in one pass.
#include "descend.cuh"

namespace fastsam {
namespace {

template <class W, class G, class M>
struct DescendAdam {
  static constexpr bool Mixes = kMixes<M>;
  using S = Scalar<W>;
  using Args = AdamArgs;
  // Halves have eight elements of four vectors in registers: enough under way with fewer threads.
  static constexpr int kBlocks = sizeof(W) == 2 ? 3 : kResidentBlocks<W, G> - Mixes;
  static constexpr bool kFinishes = true;

  struct Shared : Mixing<S, Mixes> {
    Reading<S> reading;
    Draws<W> draws;
    Adam<S> rule;
  };

  static FASTSAM_INLINE Shared prepare(const AdamArgs& a, const Piece& p) {
    const AdamGroup& h = a.groups[p.group];
    const double t = double(a.steps[p.param]) + 1;
    return {mixing<S, Mixes>(a, p), reading<S>(a), fastsam::draws<W>(a, p),
            adam_constants<S>(h, exp2(t * h.log2_beta1), exp2(t * h.log2_beta2))};
  }

  static FASTSAM_INLINE void run(const AdamArgs& a, const Piece& p, const Shared& h, int thread) {
    if (only_restored<W, M>(a, p, h.reading.counts, thread)) return;
    W* w = reinterpret_cast<W*>(p.w);
    const W* from = source<W>(a, p);
    W *exp_avg = part<W>(a.exp_avg, p), *exp_avg_sq = part<W>(a.exp_avg_sq, p);
    const SecondSide<W, G, M> second(a, p);
    const uint64_t addresses = address(w) | address(from) | second.addresses() | address(exp_avg) | address(exp_avg_sq);
    for_elements<kWidth<W>, !Mixes>(thread, p.count, addresses, [&](auto i, auto width) {
      constexpr int N = decltype(width)::value;
      auto g = second.template read<N>(i);
      Values<S, N> x = load<W, N>(from + i), mean = load<W, N>(exp_avg + i), mean_sq = load<W, N>(exp_avg_sq + i);
      second.keep(g, i, h, h.reading.scale);
      FASTSAM_UNROLL
      for (int k = 0; k < N; ++k) {
        x.at[k] = adam(x.at[k], limited(second.mixed(g, k, h), h.reading.limit), mean.at[k], mean_sq.at[k], h.rule,
                       [](S y) { return S(sqrt(y)); });
        x.at[k] = second.directed(x.at[k], g, k, h);
      }
      store<W, N>(exp_avg + i, mean);
      store<W, N>(exp_avg_sq + i, mean_sq);
      store_weights<W, N>(w, i, x, h.draws);
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
  run_descent<DescendAdam>(args, types, place);
}

}  // namespace fastsam
