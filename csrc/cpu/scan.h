// Looks at every parameter, or its gradient, in one call: the usual case of what Python would do tensor by tensor.
//
// Tensors are looked at through DLPack's C exchange API, which torch offers from 2.10 on: a stable binary interface
// that needs no header of torch.
#pragma once

#include <pybind11/pybind11.h>

#include <stdexcept>
#include <vector>

namespace fastsam {

namespace py = pybind11;

// The parts of DLPack 1.x that are used here, as its specification lays them out in memory.
struct DlTensor {
  void* data;
  struct { int32_t type, index; } device;
  int32_t ndim;
  struct { uint8_t code, bits; uint16_t lanes; } dtype;
  int64_t* shape;
  int64_t* strides;
  uint64_t byte_offset;
};

struct DlExchangeApi {
  struct { uint32_t major, minor; } version;
  void* previous;
  void* managed_tensor_allocator;
  void* managed_tensor_from_object;
  void* managed_tensor_to_object;
  int (*tensor_from_object)(void* object, DlTensor* out);
};

class Scanner {
 public:
  // api: torch.Tensor.__dlpack_c_exchange_api__; tensor: torch.Tensor, whose subclasses get a closer look in Python.
  Scanner(py::list parameters, py::capsule api, py::object tensor)
      : api_(static_cast<DlExchangeApi*>(static_cast<void*>(api))), tensor_(std::move(tensor)) {
    if (api_->version.major != 1) throw std::invalid_argument("DLPack's exchange API has another major version than 1");
    for (const py::handle p : parameters) {
      parameters_.push_back(py::reinterpret_borrow<py::object>(p));
      DlTensor t;
      if (api_->tensor_from_object(p.ptr(), &t)) throw py::error_already_set();
      layouts_.push_back({t, {t.shape, t.shape + t.ndim}, {t.strides, t.strides + t.ndim}});
    }
  }

  // The parameters' addresses, packed int64 in bytes, or None if one is not laid out as it was.
  py::object weights() const {
    const size_t n = parameters_.size();
    py::bytes addresses = room(n);
    for (size_t i = 0; i < n; ++i) {
      DlTensor t;
      if (api_->tensor_from_object(parameters_[i].ptr(), &t)) throw py::error_already_set();
      if (!layouts_[i].equals(t)) return py::none();
      entries(addresses)[i] = address(t);
    }
    return addresses;
  }

  // (list of gradients, their addresses as above), or None if one is missing or is not laid out as its parameter was.
  py::object gradients() const {
    const size_t n = parameters_.size();
    py::list found(n);
    py::bytes addresses = room(n);
    for (size_t i = 0; i < n; ++i) {
      py::object g = parameters_[i].attr(name_);
      DlTensor t;
      if (Py_TYPE(g.ptr()) != reinterpret_cast<PyTypeObject*>(tensor_.ptr())) return py::none();
      if (api_->tensor_from_object(g.ptr(), &t)) {
        PyErr_Clear();  // a sparse gradient, say: Python has the better message
        return py::none();
      }
      if (!layouts_[i].equals(t)) return py::none();
      entries(addresses)[i] = address(t);
      found[i] = std::move(g);
    }
    return py::make_tuple(found, addresses);
  }

 private:
  struct Layout {
    DlTensor tensor;
    std::vector<int64_t> shape, strides;

    bool equals(const DlTensor& t) const {
      return t.ndim == tensor.ndim && t.dtype.code == tensor.dtype.code && t.dtype.bits == tensor.dtype.bits &&
             t.dtype.lanes == tensor.dtype.lanes && t.device.type == tensor.device.type &&
             t.device.index == tensor.device.index && std::equal(shape.begin(), shape.end(), t.shape) &&
             same_order(t);
    }

    // A dimension of one element may have any stride: the gradient of a 1x1 convolution with channels last, say.
    bool same_order(const DlTensor& t) const {
      for (int i = 0; i < t.ndim; ++i)
        if (shape[i] != 1 && strides[i] != t.strides[i]) return false;
      return true;
    }
  };

  static py::bytes room(size_t n) { return py::bytes(static_cast<const char*>(nullptr), n * sizeof(uintptr_t)); }

  // Before anybody else has seen them.
  static uintptr_t* entries(const py::bytes& b) { return reinterpret_cast<uintptr_t*>(PyBytes_AS_STRING(b.ptr())); }

  static uintptr_t address(const DlTensor& t) { return reinterpret_cast<uintptr_t>(t.data) + t.byte_offset; }

  DlExchangeApi* api_;
  py::object tensor_;
  py::str name_{"grad"};
  std::vector<py::object> parameters_;
  std::vector<Layout> layouts_;
};

}  // namespace fastsam
