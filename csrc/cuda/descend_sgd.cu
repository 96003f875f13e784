// descend with torch.optim.SGD: restore and update in one pass.
#include "descend.cuh"

namespace fastsam {
namespace {

template <class W, class G, class M>
struct DescendSgd {
  static constexpr bool Mixes = kMixes<M>;
  using S = Scalar<W>;
  using Args = SgdArgs;
  static constexpr int kBlocks = kResidentBlocks<W, G> - Mixes;
  static constexpr bool kFinishes = false;

  struct Shared : Mixing<S, Mixes> {
    Reading<S> reading;
    Draws<W> draws;
    Sgd<S> rule;
  };

  static FASTSAM_INLINE Shared prepare(const SgdArgs& a, const Piece& p) {
    const SgdGroup& h = a.groups[p.group];
    return {mixing<S, Mixes>(a, p), reading<S>(a), fastsam::draws<W>(a, p),
            {S(h.lr), S(h.momentum), S(1 - h.dampening), S(h.weight_decay), h.momentum != 0, h.nesterov != 0,
             h.maximize != 0, false}};
  }

  static FASTSAM_INLINE void run(const SgdArgs& a, const Piece& p, const Shared& h, int thread) {
    if (only_restored<W, M>(a, p, h.reading.counts, thread)) return;
    W* w = reinterpret_cast<W*>(p.w);
    const W* from = source<W>(a, p);
    W* buffer = h.rule.has_momentum ? part<W>(a.momentum_buffer, p) : nullptr;
    const SecondSide<W, G, M> second(a, p);
    const uint64_t addresses = address(w) | address(from) | second.addresses() | address(buffer);
    for_elements<kWidth<W>, !Mixes>(thread, p.count, addresses, [&](auto i, auto width) {
      constexpr int N = decltype(width)::value;
      auto g = second.template read<N>(i);
      Values<S, N> x = load<W, N>(from + i), momentum = {};
      if (buffer) momentum = load<W, N>(buffer + i);
      second.keep(g, i, h, h.reading.scale);
      FASTSAM_UNROLL
      for (int k = 0; k < N; ++k) {
        Sgd<S> rule = h.rule;
        rule.fresh = is_blank(momentum.at[k]);
        x.at[k] = sgd(x.at[k], limited(second.mixed(g, k, h), h.reading.limit), momentum.at[k], rule);
        x.at[k] = second.directed(x.at[k], g, k, h);
      }
      if (buffer) store<W, N>(buffer + i, momentum);
      store_weights<W, N>(w, i, x, h.draws);
    });
  }
};

}  // namespace

void descend_sgd(const SgdArgs& args, Types types, Place place) {
  run_descent<DescendSgd>(args, types, place);
}

}  // namespace fastsam
