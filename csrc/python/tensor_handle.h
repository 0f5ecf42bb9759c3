// The handle of torch's stable ABI that a Python tensor carries: a handle points to an at::Tensor, and the Python object
// has one inside. Read in place, nothing is counted: an owned handle would keep the tensor alive, and have
// torch.utils.swap_tensors refuse it.
#pragma once

#include <pybind11/pybind11.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <cstdint>
#include <cstring>

namespace mnv2_fused {

class TensorHandle {
 public:
  // Where the objects of this type have it: the word that holds the address of torch's own object, which the attribute
  // _cdata tells. 0 where none does.
  static size_t find(PyObject* tensor) {
    const auto impl = pybind11::handle(tensor).attr("_cdata").cast<uintptr_t>();
    const auto bytes = static_cast<size_t>(Py_TYPE(tensor)->tp_basicsize);
    for (size_t at = sizeof(PyObject); at + sizeof impl <= bytes; at += sizeof impl) {
      uintptr_t word;
      std::memcpy(&word, reinterpret_cast<const char*>(tensor) + at, sizeof word);
      if (word == impl) return at;
    }
    return 0;
  }

  TensorHandle(PyObject* tensor, size_t offset)
      : handle_(reinterpret_cast<AtenTensorHandle>(reinterpret_cast<char*>(tensor) + offset)) {}

  // Each false where torch refuses to tell.
  bool address(void*& value) const { return !aoti_torch_get_data_ptr(handle_, &value); }
  bool dims(int64_t& value) const { return !aoti_torch_get_dim(handle_, &value); }
  bool shape(int64_t*& value) const { return !aoti_torch_get_sizes(handle_, &value); }
  bool strides(int64_t*& value) const { return !aoti_torch_get_strides(handle_, &value); }
  bool dtype(int32_t& value) const { return !aoti_torch_get_dtype(handle_, &value); }
  bool on_cpu() const {
    int32_t device;
    return !aoti_torch_get_device_type(handle_, &device) && device == aoti_torch_device_type_cpu();
  }

 private:
  AtenTensorHandle handle_;
};

}  // namespace mnv2_fused
