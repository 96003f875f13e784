// restore: the backup over every climbed weight, bit for bit.
#include "launch.cuh"

namespace fastsam {
namespace {

template <class W>
struct Restore {
  using Args = RestoreArgs;
  static constexpr int kBlocks = kResidentBlocks<W, W>;
  static constexpr bool kFinishes = false;
  struct Shared {};

  static FASTSAM_INLINE Shared prepare(const RestoreArgs&, const Piece&) { return {}; }

  static FASTSAM_INLINE void run(const RestoreArgs& a, const Piece& p, Shared, int thread) {
    if (p.climbed) copy(reinterpret_cast<W*>(p.w), part<W>(a.backup, p), p.count, thread);
  }
};

}  // namespace

void restore(const RestoreArgs& args, Types types, Place place) {
  switch (item_size(types.weights)) {
    case 8: return run_pass<Restore<double>, double>(args, place);
    case 4: return run_pass<Restore<float>, float>(args, place);
    default: return run_pass<Restore<bf16>, bf16>(args, place);
  }
}

}  // namespace fastsam
