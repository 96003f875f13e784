// Python's view of the CPU kernels: addresses and numbers in, nothing of torch.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstdlib>
#include <tuple>

#include "kernels.h"
#include "scan.h"
#include "threads.h"

namespace py = pybind11;
using namespace fastsam;

namespace {

const Kernels& kernels() {
  static const Kernels& chosen = select_kernels(std::getenv("FASTSAM_ISA"));
  return chosen;
}

// Below this many bytes the flat buffers fit in a cache, where an ordinary store is the faster one.
constexpr int64_t kStreamBytes = int64_t(8) << 20;
// A thread is not worth waking for less than this many elements.
constexpr int64_t kElementsPerThread = 8 * Table::kChunk;

bool worth_streaming(const Table& t) { return t.elements * item_size(t.dtype) >= kStreamBytes; }

template <class Body>
void for_pieces(const Table& t, int threads, bool backwards, Body body) {
  const int64_t n = static_cast<int64_t>(t.chunks.size());
  const int useful = static_cast<int>(std::clamp<int64_t>(t.elements / kElementsPerThread, 1, std::max(threads, 1)));
  parallel_for(n, useful, [&](int64_t k) {
    const int64_t i = backwards ? n - 1 - k : k;
    const Chunk& c = t.chunks[i];
    body(i, Piece{&t.rows[c.row], c.begin, c.count, t.dtype, t.state_dtype});
  });
}

template <class T>
T* at(uintptr_t address) { return reinterpret_cast<T*>(address); }

using ClimbTuple = std::tuple<double, double, double, double, bool>;  // c_d, c_v, sigma, lmbda, adaptive
std::vector<ClimbGroup> climb_groups(const std::vector<ClimbTuple>& tuples) {
  std::vector<ClimbGroup> groups;
  for (const auto& [c_d, c_v, sigma, lmbda, adaptive] : tuples)
    groups.push_back({c_d, c_v, sigma, lmbda, 1 - lmbda, adaptive});
  return groups;
}

std::tuple<double, double, double> gram(const Table& t, uintptr_t ema, uintptr_t vector, const std::vector<ClimbTuple>& tuples,
                                        bool weighted, double grad_scale, int threads) {
  const std::vector<ClimbGroup> groups = climb_groups(tuples);
  const GramArgs args{at<void>(ema), at<void>(vector), groups.data(), grad_scale, weighted};
  std::vector<double> partial(3 * t.chunks.size(), 0.0);
  for_pieces(t, threads, false, [&](int64_t i, const Piece& p) {
    if (p.row->g) kernels().gram(p, args, &partial[3 * i]);
  });
  double sums[3] = {0, 0, 0};
  for (size_t i = 0; i < partial.size(); ++i) sums[i % 3] += partial[i];
  return {sums[0], sums[1], sums[2]};
}

void climb(const Table& t, uintptr_t backup, uintptr_t ema, uintptr_t ema_next, uintptr_t vector,
           const std::vector<ClimbTuple>& tuples, double grad_scale, bool skip, int threads) {
  const std::vector<ClimbGroup> groups = climb_groups(tuples);
  const ClimbArgs args{at<void>(backup), at<void>(ema), at<void>(ema_next), at<void>(vector), groups.data(), grad_scale,
                       skip, worth_streaming(t)};
  for_pieces(t, threads, true, [&](int64_t, const Piece& p) {
    if (p.row->g) kernels().climb(p, args);
  });
}

void restore(const Table& t, uintptr_t backup, int threads) {
  for_pieces(t, threads, true, [&](int64_t, const Piece& p) {
    if (p.row->flags & kClimbed) kernels().restore(p, at<void>(backup), worth_streaming(t));
  });
}

// Update where there is a gradient; only restore where there was one in the first pass alone.
template <class Update>
void descend(const Table& t, uintptr_t backup, int threads, Update update) {
  for_pieces(t, threads, true, [&](int64_t, const Piece& p) {
    if (p.row->g) update(p);
    else kernels().restore(p, at<void>(backup), worth_streaming(t));
  });
}

// gradient, stored, direct_gradient, direct_stored, keep_gradient, keep_stored
using MixtureTuple = std::tuple<double, double, double, double, double, double>;
std::vector<MixtureGroup> mixture_groups(const std::vector<MixtureTuple>& tuples) {
  std::vector<MixtureGroup> groups;
  for (const auto& t : tuples)
    groups.push_back(std::apply([](auto... coefficient) { return MixtureGroup{coefficient...}; }, t));
  return groups;
}

MixingArgs mixing(const std::vector<MixtureGroup>& groups, uintptr_t stored, uintptr_t stored_next) {
  return {groups.empty() ? nullptr : groups.data(), at<void>(stored), at<void>(stored_next)};
}

// Both keys, or none.
Rounding rounding(const std::vector<uint32_t>& keys) {
  return keys.empty() ? Rounding{0, 0, false} : Rounding{keys.at(0), keys.at(1), true};
}

using SgdTuple = std::tuple<double, double, double, double, bool, bool>;  // lr, momentum, dampening, weight_decay, nesterov, maximize
void descend_sgd(const Table& t, uintptr_t backup, uintptr_t momentum_buffer, const std::vector<SgdTuple>& tuples,
                 double grad_scale, double clip_value, const std::vector<MixtureTuple>& mixtures, uintptr_t stored,
                 uintptr_t stored_next, const std::vector<uint32_t>& keys, int threads) {
  std::vector<SgdGroup> groups;
  for (const auto& [lr, momentum, dampening, weight_decay, nesterov, maximize] : tuples)
    groups.push_back({lr, momentum, 1 - dampening, weight_decay, nesterov, maximize});
  const std::vector<MixtureGroup> mixed = mixture_groups(mixtures);
  const SgdArgs args{at<void>(backup), at<void>(momentum_buffer), groups.data(), grad_scale, clip_value,
                     mixing(mixed, stored, stored_next), rounding(keys), worth_streaming(t)};
  descend(t, backup, threads, [&](const Piece& p) { kernels().descend_sgd(p, args); });
}

// lr, beta1, beta2, eps, weight_decay, decoupled, maximize
using AdamTuple = std::tuple<double, double, double, double, double, bool, bool>;
// counted: a byte a parameter, 1 where its step count goes up.
void descend_adam(const Table& t, uintptr_t backup, uintptr_t exp_avg, uintptr_t exp_avg_sq, uintptr_t steps,
                  std::string_view counted, const std::vector<AdamTuple>& tuples, double grad_scale, double clip_value,
                  const std::vector<MixtureTuple>& mixtures, uintptr_t stored, uintptr_t stored_next,
                  const std::vector<uint32_t>& keys, int threads) {
  std::vector<AdamGroup> groups;
  for (const auto& [lr, beta1, beta2, eps, weight_decay, decoupled, maximize] : tuples)
    groups.push_back({lr, beta1, beta2, eps, weight_decay, decoupled, maximize});
  const std::vector<MixtureGroup> mixed = mixture_groups(mixtures);
  for (size_t i = 0; i < counted.size(); ++i) at<float>(steps)[i] += counted[i];
  const AdamArgs args{at<void>(backup), at<void>(exp_avg), at<void>(exp_avg_sq), at<float>(steps), groups.data(), grad_scale, clip_value,
                      mixing(mixed, stored, stored_next), rounding(keys), worth_streaming(t)};
  descend(t, backup, threads, [&](const Piece& p) { kernels().descend_adam(p, args); });
}

void stream(const std::vector<uintptr_t>& reads, const std::vector<uintptr_t>& writes, int in_place, int64_t numel, int threads) {
  const StreamArgs args{reinterpret_cast<const float* const*>(reads.data()), reinterpret_cast<float* const*>(writes.data()),
                        static_cast<int>(reads.size()), static_cast<int>(writes.size()), in_place};
  const int64_t n = (numel + Table::kChunk - 1) / Table::kChunk;
  parallel_for(n, threads, [&](int64_t i) {
    kernels().stream(args, i * Table::kChunk, std::min(numel, (i + 1) * Table::kChunk));
  });
}

}  // namespace

PYBIND11_MODULE(_cpu, m) {
  m.doc() = "fastsam's CPU kernels";
  kernels();  // a wrong FASTSAM_ISA fails the import, not the first step
  const auto free = py::call_guard<py::gil_scoped_release>();

  py::class_<Table>(m, "Table")
      .def(py::init([](int dtype, int state_dtype, std::vector<int64_t> offsets, std::vector<int64_t> first,
                       std::vector<int64_t> sizes, std::vector<int32_t> groups, std::vector<bool> joined) {
        return Table(static_cast<Dtype>(dtype), static_cast<Dtype>(state_dtype), std::move(offsets), std::move(first),
                     std::move(sizes), std::move(groups), std::move(joined));
      }))
      .def("set_gradient_types", &Table::set_gradient_types)
      .def("set_addresses", &Table::set_addresses)
      .def("set_flags", &Table::set_flags)
      .def_property_readonly("rows", [](const Table& t) { return t.rows.size(); })
      .def_property_readonly("chunks", [](const Table& t) { return t.chunks.size(); });

  py::class_<Scanner>(m, "Scanner")
      .def(py::init<py::list, py::capsule, py::object>())
      .def("weights", &Scanner::weights)
      .def("gradients", &Scanner::gradients);

  m.def("isa", [] { return kernels().name; });
  m.def("thread_runtime", thread_runtime);
  m.def("gram", gram, free);
  m.def("climb", climb, free);
  m.def("restore", restore, free);
  m.def("descend_sgd", descend_sgd, free);
  m.def("descend_adam", descend_adam, free);
  m.def("stream", stream, free);
}
