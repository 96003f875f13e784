// descend with torch.optim.SGD: restore and update in one pass.
#include "descend.cuh"

namespace fastsam {
namespace {

template <class W, class G>
struct DescendSgd {
  using S = Scalar<W>;
  using Args = SgdArgs;
  static constexpr int kBlocks = kResidentBlocks<W, G>;
  static constexpr bool kFinishes = false;

  struct Shared {
    Reading<S> reading;
    Sgd<S> rule;
  };

  static FASTSAM_INLINE Shared prepare(const SgdArgs& a, const Piece& p) {
    const SgdGroup& h = a.groups[p.group];
    return {reading<S>(a),
            {S(h.lr), S(h.momentum), S(1 - h.dampening), S(h.weight_decay), h.momentum != 0, h.nesterov != 0,
             h.maximize != 0, false}};
  }

  static FASTSAM_INLINE void run(const SgdArgs& a, const Piece& p, const Shared& h, int thread) {
    if (only_restored<W>(a, p, h.reading.counts, thread)) return;
    W* w = reinterpret_cast<W*>(p.w);
    const W* from = source<W>(a, p);
    W* buffer = h.rule.has_momentum ? part<W>(a.momentum_buffer, p) : nullptr;
    const uint64_t addresses = address(w) | address(from) | address(p.g) | address(buffer);
    for_elements<kWidth<W>>(thread, p.count, addresses, [&](int i, auto width) {
      constexpr int N = decltype(width)::value;
      const Values<S, N> g = Gradient<G, N>::load(p.g, p.gradient_type, i);
      Values<S, N> x = load<W, N>(from + i), momentum = {};
      if (buffer) momentum = load<W, N>(buffer + i);
      FASTSAM_UNROLL
      for (int k = 0; k < N; ++k) {
        Sgd<S> rule = h.rule;
        rule.fresh = is_blank(momentum.at[k]);
        x.at[k] = sgd(x.at[k], limited(g.at[k] * h.reading.scale, h.reading.limit), momentum.at[k], rule);
      }
      if (buffer) store<W, N>(buffer + i, momentum);
      store<W, N>(w + i, x);
    });
  }
};

}  // namespace

void descend_sgd(const SgdArgs& args, Types types, Place place) {
  with_types(types, [&](auto w, auto g) { run_pass<DescendSgd<decltype(w), decltype(g)>, decltype(w)>(args, place); });
}

}  // namespace fastsam
