// What a launch reads from device memory, and how its work is cut into blocks. Plain C++: tested without a GPU.
//
// fastsam/kernels/device.py builds the tables; its tuples of column names are the lists below.
#pragma once

#include <cstdint>

#include "../arithmetic.h"

namespace fastsam {

// X(column) for every column of a table, in order.
#define FASTSAM_ROW(X) X(weight) X(gradient) X(offset) X(size) X(group) X(param) X(climbed) X(gradient_type) X(first)
#define FASTSAM_CHUNK(X) X(row) X(begin) X(count)
#define FASTSAM_ASCENT(X) X(rho) X(alpha) X(sigma) X(lmbda) X(adaptive)
#define FASTSAM_SGD(X) X(lr) X(momentum) X(dampening) X(weight_decay) X(nesterov) X(maximize)
#define FASTSAM_ADAM(X) \
  X(lr) X(beta1) X(beta2) X(log2_beta1) X(log2_beta2) X(eps) X(weight_decay) X(decoupled_weight_decay) X(maximize)
#define FASTSAM_MIXTURE(X) \
  X(gradient) X(stored) X(direct_gradient) X(direct_stored) X(keep_gradient) X(keep_stored)
#define FASTSAM_SCALING(X) X(grad_scale) X(max_norm) X(clip_value)
#define FASTSAM_ROUNDING(X) X(first_key) X(second_key)

#define FASTSAM_INTEGER(column) int64_t column;
#define FASTSAM_REAL(column) double column;
struct Row { FASTSAM_ROW(FASTSAM_INTEGER) };  // a run of elements with one address each for weight and gradient
struct Chunk { FASTSAM_CHUNK(FASTSAM_INTEGER) };  // a stretch of one row
struct AscentGroup { FASTSAM_ASCENT(FASTSAM_REAL) };
struct SgdGroup { FASTSAM_SGD(FASTSAM_REAL) };
struct AdamGroup { FASTSAM_ADAM(FASTSAM_REAL) };
struct MixtureGroup { FASTSAM_MIXTURE(FASTSAM_REAL) };
struct Scaling { FASTSAM_SCALING(FASTSAM_REAL) };
struct Rounding { FASTSAM_ROUNDING(FASTSAM_REAL) };  // whole numbers below 2^32
#undef FASTSAM_INTEGER
#undef FASTSAM_REAL

enum Dtype : int { kFloat32, kFloat64, kBfloat16, kFloat16 };

struct Tables {
  const Row* rows;
  const Chunk* chunks;
  int n_rows, n_chunks;
};

constexpr int kThreads = 256;         // of a block
constexpr int kMostGramBlocks = 4096;  // their partial sums are added by one block
constexpr int kVectorBytes = 16;      // the widest access

// Every block of gram walks the chunks b, b + blocks, ...: which, and so the order of summation, depends on the
// number of chunks alone. Every other pass has a block for each chunk.
FASTSAM_INLINE int gram_blocks(int n_chunks) { return n_chunks < kMostGramBlocks ? n_chunks : kMostGramBlocks; }

// The passes after gram walk the chunks backwards: what gram read last is still in the cache.
FASTSAM_INLINE int reversed_chunk(int block, int n_chunks) { return n_chunks - 1 - block; }

// How many of `count` elements are read in whole vectors of `width`: none if an address is no multiple of 16 bytes.
FASTSAM_INLINE int vector_count(int count, int width, uint64_t addresses) {
  return addresses % kVectorBytes ? 0 : count / width * width;
}

// One chunk, with everything a kernel needs to find its elements.
struct Piece {
  char* w;
  const char* g;  // null: no gradient in this pass
  int64_t offset;  // of its state in the flat buffers, in elements
  int count, group, param, gradient_type;
  bool climbed;  // the backup holds its weights
  uint32_t first;  // the low bits of its first element's number, which stochastic rounding draws by
};

FASTSAM_INLINE int item_size(int dtype) { return dtype == kFloat64 ? 8 : dtype == kFloat32 ? 4 : 2; }

FASTSAM_INLINE Piece piece(const Tables& t, int i, int weight_size) {
  const Chunk& c = t.chunks[i];
  const Row& r = t.rows[c.row];
  const int gradient_type = static_cast<int>(r.gradient_type);
  Piece p;
  p.w = reinterpret_cast<char*>(r.weight + c.begin * weight_size);
  p.g = r.gradient ? reinterpret_cast<const char*>(r.gradient + c.begin * item_size(gradient_type)) : nullptr;
  p.offset = r.offset + c.begin;
  p.count = static_cast<int>(c.count);
  p.group = static_cast<int>(r.group);
  p.param = static_cast<int>(r.param);
  p.gradient_type = gradient_type;
  p.climbed = r.climbed != 0;
  p.first = static_cast<uint32_t>(r.first + c.begin);
  return p;
}

}  // namespace fastsam
