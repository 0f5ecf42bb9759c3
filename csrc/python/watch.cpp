#include "watch.h"

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>

namespace mnv2_fused {
namespace {

namespace py = pybind11;

long long integer(PyObject* owned) {
  if (!owned) throw py::error_already_set();
  const long long value = PyLong_AsLongLong(owned);
  Py_DECREF(owned);
  if (value == -1 && PyErr_Occurred()) throw py::error_already_set();
  return value;
}

// Data pointers fit: user space lies below 2^63.
long long pointer_of(const py::object& method, const py::object& tensor) {
  return integer(PyObject_CallOneArg(method.ptr(), tensor.ptr()));
}

// What os.environ holds, too.
const char* backend_override() {
  const char* name = std::getenv("MNV2_FUSED_BACKEND");
  return name ? name : "";
}

// Changes with every change of the dictionary (PEP 509); CPython 3.14 has none.
#if PY_VERSION_HEX < 0x030E0000
constexpr bool kVersions = true;
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wdeprecated-declarations"
uint64_t version_of(PyObject* dict) {
  return reinterpret_cast<const PyDictObject*>(dict)->ma_version_tag;
}
#pragma GCC diagnostic pop
#else
constexpr bool kVersions = false;
uint64_t version_of(PyObject*) { return 0; }
#endif

bool equal(PyObject* a, PyObject* b) {
  const int same = PyObject_RichCompareBool(a, b, Py_EQ);
  if (same < 0) throw py::error_already_set();
  return same == 1;
}

// Words of a tensor as torch holds it, and those among them that may point to what belongs to it.
constexpr size_t kTensorWords = 24;
bool may_point(uintptr_t word) {
  return word % 8 == 0 && word > 0xffff && word < uintptr_t{1} << 47;
}

}  // namespace

Watch::Watch(const py::list& values, const py::list& sizes, const py::list& entries,
             const py::list& tensors, const py::list& shaped) {
  backend_ = backend_override();
  const py::object type = py::module_::import("torch").attr("Tensor");
  version_name_ = py::str("_version");
  shape_name_ = py::str("shape");
  data_ptr_ = type.attr("data_ptr");
  stride_ = type.attr("stride");
  // Versions first: another thread may change a dictionary while this one looks into it.
  const auto add = [&](py::handle dict) {
    versions_.push_back({dict.ptr(), version_of(dict.ptr())});
  };
  for (const auto dict : values) add(dict);
  for (const auto dict : sizes) add(dict);
  for (const auto entry : entries) add(py::reinterpret_borrow<py::tuple>(entry)[0]);
  const auto address = [](const Versioned& v) { return v.dict; };
  std::ranges::stable_sort(versions_, {}, address);
  versions_.erase(std::ranges::unique(versions_, {}, address).begin(), versions_.end());
  for (const auto dict : values) {
    for (const auto item : py::reinterpret_borrow<py::dict>(dict))
      values_.push_back(py::reinterpret_borrow<py::object>(item.second));
    held_.push_back({py::reinterpret_borrow<py::object>(dict), values_.size()});
  }
  for (const auto dict : sizes)
    sized_.push_back({py::reinterpret_borrow<py::object>(dict), PyDict_Size(dict.ptr())});
  for (const auto entry : entries) {
    const py::tuple pair = py::reinterpret_borrow<py::tuple>(entry);
    const py::dict dict = pair[0];
    entries_.push_back({dict, pair[1], dict[pair[1]]});
  }
  for (const auto tensor : tensors) {
    const auto t = py::reinterpret_borrow<py::object>(tensor);
    states_.push_back(
        {t, integer(PyObject_GetAttr(t.ptr(), version_name_.ptr())), pointer_of(data_ptr_, t)});
  }
  for (const auto tensor : shaped) {
    const auto t = py::reinterpret_borrow<py::object>(tensor);
    shapes_.push_back({t, t.attr(shape_name_), stride_(t)});
  }
  find_lines();
}

// Between two calls all of this leaves the nearer caches. A walk from one object to the next would wait
// for each; fetched beforehand, all at once, they come much sooner. What is guessed wrong costs
// nothing: fetching cannot fail.
void Watch::find_lines() {
  const auto add = [&](uintptr_t address) {
    lines_.push_back(reinterpret_cast<const void*>(address / 64 * 64));
  };
  for (const Versioned& v : versions_) add(reinterpret_cast<uintptr_t>(v.dict));
  for (const State& s : states_) {
    add(reinterpret_cast<uintptr_t>(s.tensor.ptr()));
    const auto inside = s.tensor.attr("_cdata").cast<uintptr_t>();
    for (size_t i = 0; i < kTensorWords; ++i) {
      uintptr_t word;
      std::memcpy(&word, reinterpret_cast<const void*>(inside + i * sizeof(word)), sizeof(word));
      add(inside + i * sizeof(word));
      if (may_point(word)) add(word);
    }
  }
  std::ranges::sort(lines_);
  lines_.erase(std::ranges::unique(lines_).begin(), lines_.end());
}

int Watch::traverse(visitproc visit, void* arg) const {
  for (const Held& held : held_) Py_VISIT(held.dict.ptr());
  for (const py::object& value : values_) Py_VISIT(value.ptr());
  for (const Sized& sized : sized_) Py_VISIT(sized.dict.ptr());
  for (const Entry& entry : entries_) {
    Py_VISIT(entry.dict.ptr());
    Py_VISIT(entry.value.ptr());
  }
  for (const State& state : states_) Py_VISIT(state.tensor.ptr());
  for (const Shape& shape : shapes_) Py_VISIT(shape.tensor.ptr());
  return 0;
}

void Watch::clear() {
  cleared_ = true;
  versions_.clear();
  // Swapped out first: what is released may call back.
  std::vector<Held> held;
  std::vector<py::object> values;
  std::vector<Sized> sized;
  std::vector<Entry> entries;
  std::vector<State> states;
  std::vector<Shape> shapes;
  held.swap(held_);
  values.swap(values_);
  sized.swap(sized_);
  entries.swap(entries_);
  states.swap(states_);
  shapes.swap(shapes_);
}

bool Watch::dictionaries_hold() const {
  size_t i = 0;
  for (const Held& held : held_) {
    PyObject *key, *value;
    Py_ssize_t position = 0;
    while (PyDict_Next(held.dict.ptr(), &position, &key, &value))
      if (i == held.end || value != values_[i++].ptr()) return false;
    if (i != held.end) return false;
  }
  for (const Sized& sized : sized_)
    if (PyDict_Size(sized.dict.ptr()) != sized.size) return false;
  for (const Entry& entry : entries_) {
    PyObject* const value = PyDict_GetItemWithError(entry.dict.ptr(), entry.key.ptr());
    if (!value && PyErr_Occurred()) throw py::error_already_set();
    if (!value) return false;
    if (value == entry.value.ptr()) continue;
    const auto held = py::reinterpret_borrow<py::object>(value);  // comparing may run anything
    if (!equal(held.ptr(), entry.value.ptr())) return false;
  }
  return true;
}

bool Watch::holds() {
  if (cleared_ || backend_ != backend_override()) return false;
  for (const void* line : lines_) __builtin_prefetch(line, 0, 2);
  const auto moved_on = [](const Versioned& v) { return version_of(v.dict) != v.version; };
  if (!kVersions || std::ranges::any_of(versions_, moved_on)) {
    // Taken first: comparing may run anything.
    std::vector<uint64_t> versions;
    for (const Versioned& v : versions_) versions.push_back(version_of(v.dict));
    if (!dictionaries_hold() || cleared_) return false;
    for (size_t i = 0; i < versions.size(); ++i) versions_[i].version = versions[i];
  }
  for (const State& s : states_)
    if (integer(PyObject_GetAttr(s.tensor.ptr(), version_name_.ptr())) != s.version ||
        pointer_of(data_ptr_, s.tensor) != s.pointer)
      return false;
  for (const Shape& s : shapes_) {
    const py::object shape =
        py::reinterpret_steal<py::object>(PyObject_GetAttr(s.tensor.ptr(), shape_name_.ptr()));
    if (!shape) throw py::error_already_set();
    if (!equal(shape.ptr(), s.shape.ptr())) return false;
    const py::object strides =
        py::reinterpret_steal<py::object>(PyObject_CallOneArg(stride_.ptr(), s.tensor.ptr()));
    if (!strides) throw py::error_already_set();
    if (!equal(strides.ptr(), s.strides.ptr())) return false;
  }
  return true;
}

}  // namespace mnv2_fused
