// The CUDA passes as the binding sees them: one struct of arguments each, all addresses in device memory.
#pragma once

#include "tables.h"

namespace fastsam {

// m, v and s, a method's own vectors, are of the type that Types has for them; other buffers are of the weights'.
struct GramArgs {
  Tables table;
  const AscentGroup* groups;  // null: neither m nor a weighted norm
  const Scaling* scaling;
  const void* ema;     // m, or null: d = g; NaN where m has not met a parameter
  const void* vector;  // v, or null
  double* partials;    // room for three sums of every block
  int* counter;        // 0 between launches
  double* sums;        // <d,d>, <d,v>, <v,v>
  const double* met;   // sums of an earlier pass, or null: not finite, they make these so
  bool weighted;       // adaptive groups count w d instead of d
};

struct ClimbArgs {
  Tables table;
  const AscentGroup* groups;
  const Scaling* scaling;
  const double* sums;
  void* backup;
  const void* ema;
  void* ema_next;
  const void* vector;
  bool closed_form;  // else the groups' rho and alpha are c_d and c_v themselves
};

// What both base optimizers' passes share. An average is put over its successor where the step does not count.
struct DescentArgs {
  Tables table;
  const Scaling* scaling;
  const double* sums;
  const void* backup;
  const void* ema;
  void* ema_next;
  const MixtureGroup* mixtures;  // null: the base optimizer takes the gradient itself
  const void* stored;            // s, or null
  void* stored_next;             // where it goes on, or null
  const Rounding* rounding;      // null: weights are rounded to the nearest
  bool narrow_averages;          // m has two bytes an element, whatever the weights have
};

struct SgdArgs : DescentArgs {
  const SgdGroup* groups;
  void* momentum_buffer;  // null where no group has momentum; NaN where it was never written
};

struct AdamArgs : DescentArgs {
  const AdamGroup* groups;
  void *exp_avg, *exp_avg_sq;
  float* steps;  // one for each parameter; rows are single parameters
  int* counter;
};

struct RestoreArgs {
  Tables table;
  const void* backup;
};

// Where a pass runs. Without a stream it runs on this processor, block after block, on addresses of its memory:
// the same code, for tests.
struct Place {
  int device;
  void* stream;
  bool on_host;
};

// `vectors` are a method's own: of the weights' type, or bfloat16 beside float32. `mixed`: the launch meets gradients of
// another type than the weights'.
struct Types {
  Dtype weights, vectors;
  bool mixed;
};

// These throw std::runtime_error with CUDA's own words.
void gram(const GramArgs&, Types, Place);
void climb(const ClimbArgs&, Types, Place);
void descend_sgd(const SgdArgs&, Types, Place);
void descend_adam(const AdamArgs&, Types, Place);
void restore(const RestoreArgs&, Types, Place);

}  // namespace fastsam
