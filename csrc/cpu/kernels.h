// The CPU kernels, one set for each instruction set, and how one is chosen.
#pragma once

#include "table.h"

namespace fastsam {

// One chunk of one row, with everything a kernel needs to find its elements.
struct Piece {
  const Row* row;
  int64_t begin;
  int count;
  Dtype w_type, m_type;
};

struct ClimbGroup {
  double c_d, c_v, sigma, lmbda, one_minus_lmbda;
  bool adaptive;
};

// m, v and s, a method's own vectors, are of the piece's m_type; all other buffers are of the weights' type.
struct GramArgs {
  const void* ema;     // m, or null: d = g
  const void* vector;  // v, or null
  const ClimbGroup* groups;
  double grad_scale;
  bool weighted;  // adaptive groups count |w| d instead of d
};

struct ClimbArgs {
  void* backup;
  const void* ema;
  void* ema_next;
  const void* vector;
  const ClimbGroup* groups;
  double grad_scale;
  bool skip;    // back up and leave the weights alone
  bool stream;  // write what is not read again soon past the caches
};

struct MixtureGroup {
  double gradient, stored, direct_gradient, direct_stored, keep_gradient, keep_stored;
};

// What becomes of the second gradient before the base optimizer's rule, and beside it.
struct MixingArgs {
  const MixtureGroup* groups;  // null: the rule takes the gradient itself
  const void* stored;          // s, or null
  void* stored_next;           // where it goes on, or null
};

// Weights are rounded at random by these keys, or to the nearest.
struct Rounding {
  uint32_t first_key, second_key;
  bool on;
};

struct SgdGroup {
  double lr, momentum, one_minus_dampening, weight_decay;
  bool nesterov, maximize;
};

struct SgdArgs {
  const void* backup;
  void* momentum_buffer;  // null where no group has momentum
  const SgdGroup* groups;
  double grad_scale, clip_value;  // gradients are multiplied by the first, then limited to the second
  MixingArgs mixing;
  Rounding rounding;
  bool stream;
};

struct AdamGroup {
  double lr, beta1, beta2, eps, weight_decay;
  bool decoupled_weight_decay, maximize;
};

struct AdamArgs {
  const void* backup;
  void* exp_avg;
  void* exp_avg_sq;
  const float* steps;  // one for each parameter, already counted up
  const AdamGroup* groups;
  double grad_scale, clip_value;
  MixingArgs mixing;
  Rounding rounding;
  bool stream;
};

struct StreamArgs {
  const float* const* reads;
  float* const* writes;
  int n_reads, n_writes;
  int in_place;  // the first so many written arrays are read ones, with ordinary stores
};

struct Kernels {
  const char* name;
  void (*gram)(const Piece&, const GramArgs&, double sums[3]);  // <d,d>, <d,v>, <v,v>
  void (*climb)(const Piece&, const ClimbArgs&);
  void (*descend_sgd)(const Piece&, const SgdArgs&);
  void (*descend_adam)(const Piece&, const AdamArgs&);
  void (*restore)(const Piece&, const void* backup, bool stream);
  void (*stream)(const StreamArgs&, int64_t begin, int64_t end);  // plain traffic, for measuring bandwidth
};

extern const Kernels kBaseline;
#if defined(FASTSAM_X86)
extern const Kernels kAvx2, kAvx512;
#endif

// The best set this processor can run, or the one named; throws std::invalid_argument for one it cannot.
const Kernels& select_kernels(const char* name);

}  // namespace fastsam
