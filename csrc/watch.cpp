#include "watch.h"

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

const PyDictObject* as_dict(const py::object& dict) {
  return reinterpret_cast<const PyDictObject*>(dict.ptr());
}

bool equal(PyObject* a, PyObject* b) {
  const int same = PyObject_RichCompareBool(a, b, Py_EQ);
  if (same < 0) throw py::error_already_set();
  return same == 1;
}

// Between two calls everything here leaves the nearer caches, and a walk from one object to the next
// would wait for each. So what comes later is fetched meanwhile, in two steps: an object, then what it
// points to, which its own first words tell. A wrong guess about those costs nothing: fetching cannot
// fail.
constexpr size_t kFar = 12, kNear = 6;

void fetch(const void* p, int lines) {
  for (int i = 0; i < lines; ++i) __builtin_prefetch(static_cast<const char*>(p) + 64 * i);
}
// What a dictionary looks into.
void fetch_inside(const PyDictObject* dict) {
  fetch(dict->ma_keys, 3);
  fetch(dict->ma_values, 2);
}
// What a tensor's object stands for: the word behind the object's head, or the one behind that.
void fetch_inside(const PyObject* tensor) {
  const void* words[2];
  std::memcpy(words, tensor + 1, sizeof(words));
  for (const void* word : words) fetch(word, 4);
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

bool Watch::holds() const {
  if (cleared_ || backend_ != backend_override()) return false;
  size_t i = 0;
  for (size_t j = 0; j < held_.size(); ++j) {
    const Held& held = held_[j];
    if (j + kFar < held_.size()) fetch(held_[j + kFar].dict.ptr(), 1);
    if (j + kNear < held_.size()) fetch_inside(as_dict(held_[j + kNear].dict));
    PyObject *key, *value;
    Py_ssize_t position = 0;
    while (PyDict_Next(held.dict.ptr(), &position, &key, &value))
      if (i == held.end || value != values_[i++].ptr()) return false;
    if (i != held.end) return false;
  }
  for (const Sized& sized : sized_)
    if (PyDict_Size(sized.dict.ptr()) != sized.size) return false;
  for (size_t j = 0; j < entries_.size(); ++j) {
    const Entry& entry = entries_[j];
    if (j + 2 * kFar < entries_.size()) fetch_inside(as_dict(entries_[j + 2 * kFar].dict));
    PyObject* const value = PyDict_GetItemWithError(entry.dict.ptr(), entry.key.ptr());
    if (!value && PyErr_Occurred()) throw py::error_already_set();
    if (!value) return false;
    if (value == entry.value.ptr()) continue;
    const auto held = py::reinterpret_borrow<py::object>(value);  // comparing may run anything
    if (!equal(held.ptr(), entry.value.ptr())) return false;
  }
  for (size_t j = 0; j < states_.size(); ++j) {
    const State& s = states_[j];
    if (j + kFar < states_.size()) fetch(states_[j + kFar].tensor.ptr(), 1);
    if (j + kNear < states_.size()) fetch_inside(states_[j + kNear].tensor.ptr());
    if (integer(PyObject_GetAttr(s.tensor.ptr(), version_name_.ptr())) != s.version ||
        pointer_of(data_ptr_, s.tensor) != s.pointer)
      return false;
  }
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
