// The chunk table: where every parameter and gradient lies, and how the work is cut into chunks.
#pragma once

#include <cstdint>
#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string_view>
#include <utility>
#include <vector>

namespace fastsam {

enum class Dtype : uint8_t { f32, f64, bf16, f16 };

inline int64_t item_size(Dtype t) { return t == Dtype::f64 ? 8 : t == Dtype::f32 ? 4 : 2; }

// What has happened to a parameter so far.
enum Flags : uint8_t {
  kClimbed = 1,       // the backup holds its weights
  kEmaStarted = 2,    // F-SAM's m has met it before
  kStateStarted = 4,  // so has the base optimizer's state
};

// A run of elements with one address each for weight and gradient: a parameter, or adjacent parameters.
struct Row {
  char* w;
  const char* g;   // null: no gradient in this pass
  int64_t offset;  // of its state in the flat buffers, in elements
  int64_t first;   // the number of its first element, which stochastic rounding draws by
  int64_t size;
  int32_t group;
  int32_t param;  // the first parameter in it
  uint8_t flags;
  Dtype g_type;
};

struct Chunk {
  int32_t row;
  int32_t count;
  int64_t begin;  // within the row
};

class Table {
 public:
  // Chunks are this many elements or fewer. Sums are formed chunk by chunk, so this fixes their order.
  static constexpr int64_t kChunk = 16384;

  // dtype is the weights', state_dtype that of a method's own vectors.
  // first[i]: the number of parameter i's first element.
  // joined[i]: the weights of parameter i follow those of i - 1 without a gap in the same storage.
  Table(Dtype dtype, Dtype state_dtype, std::vector<int64_t> offsets, std::vector<int64_t> first,
        std::vector<int64_t> sizes, std::vector<int32_t> groups, std::vector<bool> joined)
      : dtype(dtype), state_dtype(state_dtype), offsets_(std::move(offsets)), first_(std::move(first)), sizes_(std::move(sizes)),
        groups_(std::move(groups)), joined_(std::move(joined)) {}

  void set_gradient_types(std::vector<uint8_t> types) {
    gradient_types_ = std::move(types);
    flags_.clear();
  }

  // Packed: an address for every parameter, 0 for a gradient that is missing.
  void set_addresses(std::string_view weights, std::string_view gradients) {
    for (auto [packed, addresses] : {std::pair{weights, &weights_}, {gradients, &gradients_}}) {
      if (packed.size() != sizes_.size() * sizeof(uintptr_t)) throw std::invalid_argument("not an address a parameter");
      addresses->resize(sizes_.size());
      std::memcpy(addresses->data(), packed.data(), packed.size());
    }
    flags_.clear();
  }

  // Rebuilds rows and chunks if the flags, or the addresses before them, have changed. Without `merge` every
  // parameter has a row of its own: Adam's step counts may differ between neighbours.
  void set_flags(std::string_view flags, bool merge) {
    if (flags == flags_ && merge == merge_) return;
    flags_ = flags;
    merge_ = merge;
    rows.clear();
    chunks.clear();
    elements = 0;
    int previous = -2;
    for (size_t i = 0; i < sizes_.size(); ++i) {
      const bool taken = gradients_[i] || (flags_[i] & kClimbed);
      if (!taken || sizes_[i] == 0) continue;
      const Row row{reinterpret_cast<char*>(weights_[i]), reinterpret_cast<const char*>(gradients_[i]), offsets_[i],
                    first_[i], sizes_[i], groups_[i], static_cast<int32_t>(i), flags_[i], static_cast<Dtype>(gradient_types_[i])};
      if (merge_ && previous == static_cast<int>(i) - 1 && joined_[i] && extends(rows.back(), row))
        rows.back().size += row.size;
      else
        rows.push_back(row);
      previous = static_cast<int>(i);
      elements += row.size;
    }
    for (size_t r = 0; r < rows.size(); ++r)
      for (int64_t begin = 0; begin < rows[r].size; begin += kChunk)
        chunks.push_back({static_cast<int32_t>(r), static_cast<int32_t>(std::min(kChunk, rows[r].size - begin)), begin});
  }

  Dtype dtype, state_dtype;
  std::vector<Row> rows;
  std::vector<Chunk> chunks;
  int64_t elements = 0;

 private:
  bool extends(const Row& a, const Row& b) const {
    const bool gradients_adjoin = (!a.g && !b.g) || (a.g && b.g == a.g + a.size * item_size(a.g_type));
    return gradients_adjoin && a.g_type == b.g_type && a.group == b.group && a.flags == b.flags &&
           b.w == a.w + a.size * item_size(dtype) && b.offset == a.offset + a.size &&
           b.first == a.first + a.size;
  }

  std::vector<int64_t> offsets_, first_, sizes_;
  std::vector<int32_t> groups_;
  std::vector<bool> joined_;
  std::vector<uintptr_t> weights_, gradients_;
  std::vector<uint8_t> gradient_types_;
  std::string flags_;  // a byte a parameter
  bool merge_ = true;
};

}  // namespace fastsam
