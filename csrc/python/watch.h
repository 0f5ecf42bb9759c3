// Whether Python objects are still what they were when a call was prepared. Asked before every fused
// call, mostly with cold caches, so it looks at as little as CPython and torch allow.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>
#include <vector>

namespace mnv2_fused {

class Watch {
 public:
  // values: dictionaries whose values must stay the very same objects.
  // sizes: dictionaries that must keep their number of entries.
  // entries: (dictionary, key) pairs whose values must stay equal.
  // The environment's MNV2_FUSED_BACKEND counts as well.
  // tensors: their data pointers and version counters; of `shaped` ones also shape and strides.
  Watch(const pybind11::list& values, const pybind11::list& sizes, const pybind11::list& entries,
        const pybind11::list& tensors, const pybind11::list& shaped);
  bool holds();

  // For Python's collector: what is watched holds the watch, too.
  int traverse(visitproc visit, void* arg) const;
  void clear();

 private:
  // Looks into every dictionary; a version that has moved on may still hold what counts.
  bool dictionaries_hold() const;
  void find_lines();

  // A dictionary and the version CPython gave it last: as long as that stays, so does all inside.
  struct Versioned {
    PyObject* dict;  // owned by one of the lists below
    uint64_t version;
  };
  struct Held {
    pybind11::object dict;
    size_t end;  // of its values in values_
  };
  struct Sized {
    pybind11::object dict;
    Py_ssize_t size;
  };
  struct Entry {
    pybind11::object dict, key, value;
  };
  struct State {
    pybind11::object tensor;
    long long version, pointer;
  };
  struct Shape {
    pybind11::object tensor, shape, strides;
  };

  bool cleared_ = false;
  std::string backend_;
  pybind11::object version_name_, shape_name_, data_ptr_, stride_;
  std::vector<Versioned> versions_;
  std::vector<Held> held_;
  std::vector<pybind11::object> values_;
  std::vector<Sized> sized_;
  std::vector<Entry> entries_;
  std::vector<State> states_;
  std::vector<Shape> shapes_;
  std::vector<const void*> lines_;  // of the caches, that a look at everything touches
};

}  // namespace mnv2_fused
