// Python's view of the CUDA kernels: addresses and numbers in, nothing of torch.
#include <cuda_runtime_api.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <utility>
#include <vector>

#include "kernels.h"

namespace py = pybind11;
using namespace fastsam;

namespace {

using Address = uintptr_t;
template <class T> T* at(Address address) { return reinterpret_cast<T*>(address); }

// (rows, chunks, number of rows, number of chunks, dtype of the weights, dtype of the vectors, mixed, device, stream); no
// stream: the host
struct Where {
  Tables table;
  Types types;
  Place place;
};

Where where(const py::tuple& t) {
  const bool on_host = t[8].is_none();
  return {{at<const Row>(t[0].cast<Address>()), at<const Chunk>(t[1].cast<Address>()), t[2].cast<int>(), t[3].cast<int>()},
          {static_cast<Dtype>(t[4].cast<int>()), static_cast<Dtype>(t[5].cast<int>()), t[6].cast<bool>()},
          {t[7].cast<int>(), on_host ? nullptr : at<void>(t[8].cast<Address>()), on_host}};
}

void py_gram(const py::tuple& t, Address groups, Address scaling, Address ema, Address vector, Address partials,
             Address counter, Address sums, Address met, bool weighted) {
  const Where w = where(t);
  gram({w.table, at<AscentGroup>(groups), at<Scaling>(scaling), at<void>(ema), at<void>(vector), at<double>(partials),
        at<int>(counter), at<double>(sums), at<double>(met), weighted},
       w.types, w.place);
}

void py_climb(const py::tuple& t, Address groups, Address scaling, Address sums, Address backup, Address ema,
              Address ema_next, Address vector, bool closed_form) {
  const Where w = where(t);
  climb({w.table, at<AscentGroup>(groups), at<Scaling>(scaling), at<double>(sums), at<void>(backup), at<void>(ema),
         at<void>(ema_next), at<void>(vector), closed_form},
        w.types, w.place);
}

DescentArgs descent(const Where& w, Address scaling, Address sums, Address backup, Address ema, Address ema_next,
                    Address mixtures, Address stored, Address stored_next, Address rounding) {
  return {w.table, at<Scaling>(scaling), at<double>(sums), at<void>(backup), at<void>(ema), at<void>(ema_next),
          at<MixtureGroup>(mixtures), at<void>(stored), at<void>(stored_next), at<Rounding>(rounding),
          item_size(w.types.vectors) == 2};
}

void py_descend_sgd(const py::tuple& t, Address groups, Address scaling, Address sums, Address backup, Address ema,
                    Address ema_next, Address mixtures, Address stored, Address stored_next, Address rounding,
                    Address momentum_buffer) {
  const Where w = where(t);
  descend_sgd({descent(w, scaling, sums, backup, ema, ema_next, mixtures, stored, stored_next, rounding), at<SgdGroup>(groups),
               at<void>(momentum_buffer)},
              w.types, w.place);
}

void py_descend_adam(const py::tuple& t, Address groups, Address scaling, Address sums, Address backup, Address ema,
                     Address ema_next, Address mixtures, Address stored, Address stored_next, Address rounding,
                     Address exp_avg, Address exp_avg_sq, Address steps, Address counter) {
  const Where w = where(t);
  descend_adam({descent(w, scaling, sums, backup, ema, ema_next, mixtures, stored, stored_next, rounding), at<AdamGroup>(groups),
                at<void>(exp_avg), at<void>(exp_avg_sq), at<float>(steps), at<int>(counter)},
               w.types, w.place);
}

void py_restore(const py::tuple& t, Address backup) {
  const Where w = where(t);
  restore({w.table, at<void>(backup)}, w.types, w.place);
}

// Why kernels cannot be launched at all on this machine; empty if they can.
std::string problem() {
  int devices = 0;
  const cudaError_t error = cudaGetDeviceCount(&devices);
  if (error == cudaErrorInsufficientDriver) {
    int driver = 0;
    cudaDriverGetVersion(&driver);
    if (driver == 0) return "there is no NVIDIA driver";
    const auto version = [](int v) { return std::to_string(v / 1000) + "." + std::to_string(v % 1000 / 10); };
    return "the NVIDIA driver serves CUDA " + version(driver) + ", and these kernels were built with CUDA " +
           version(CUDART_VERSION);
  }
  return error == cudaSuccess ? "" : cudaGetErrorString(error);
}

// (major, minor) of every GPU; this makes no context on any.
std::vector<std::pair<int, int>> capabilities() {
  int devices = 0;
  if (cudaGetDeviceCount(&devices) != cudaSuccess) return {};
  std::vector<std::pair<int, int>> found(devices);
  for (int i = 0; i < devices; ++i) {
    cudaDeviceGetAttribute(&found[i].first, cudaDevAttrComputeCapabilityMajor, i);
    cudaDeviceGetAttribute(&found[i].second, cudaDevAttrComputeCapabilityMinor, i);
  }
  return found;
}

#define FASTSAM_NAME(column) #column,
py::dict columns() {
  using Names = std::vector<std::string>;
  py::dict found;
  found["ROW"] = Names{FASTSAM_ROW(FASTSAM_NAME)};
  found["CHUNK"] = Names{FASTSAM_CHUNK(FASTSAM_NAME)};
  found["ASCENT"] = Names{FASTSAM_ASCENT(FASTSAM_NAME)};
  found["SGD"] = Names{FASTSAM_SGD(FASTSAM_NAME)};
  found["ADAM"] = Names{FASTSAM_ADAM(FASTSAM_NAME)};
  found["MIXTURE"] = Names{FASTSAM_MIXTURE(FASTSAM_NAME)};
  found["SCALING"] = Names{FASTSAM_SCALING(FASTSAM_NAME)};
  found["ROUNDING"] = Names{FASTSAM_ROUNDING(FASTSAM_NAME)};
  return found;
}
#undef FASTSAM_NAME

}  // namespace

PYBIND11_MODULE(_cuda, m) {
  m.doc() = "fastsam's CUDA kernels";
  m.def("gram", py_gram);
  m.def("climb", py_climb);
  m.def("descend_sgd", py_descend_sgd);
  m.def("descend_adam", py_descend_adam);
  m.def("restore", py_restore);
  m.def("problem", problem);
  m.def("capabilities", capabilities);
  m.def("architectures", [] { return std::vector<int>{__CUDA_ARCH_LIST__}; });

  // What launches are planned with, for the tests.
  m.def("columns", columns);
  m.def("gram_blocks", [](int n_chunks) { return gram_blocks(n_chunks); });
  m.def("reversed_chunk", [](int block, int n_chunks) { return reversed_chunk(block, n_chunks); });
  m.def("vector_count", [](int count, int width, uint64_t addresses) { return vector_count(count, width, addresses); });
  m.def("piece", [](Address rows, Address chunks, int i, int weight_size) {
    const Piece p = piece({at<const Row>(rows), at<const Chunk>(chunks), 0, 0}, i, weight_size);
    return py::make_tuple(reinterpret_cast<Address>(p.w), reinterpret_cast<Address>(p.g), p.offset, p.count, p.group, p.param,
                          p.gradient_type, p.climbed, p.first);
  });
  m.attr("THREADS") = kThreads;
  m.attr("MOST_GRAM_BLOCKS") = kMostGramBlocks;
}
