#include "guard.h"

#include <algorithm>
#include <bit>
#include <cstdlib>
#include <cstring>

#include "dlpack.h"

namespace mnv2_fused {
namespace {

namespace py = pybind11;

// Bytes whose checksum one call compares: a microsecond, also from memory.
constexpr size_t kChunk = size_t{16} << 10;
// Words compared of each tensor at every call: its ends, and two between.
constexpr size_t kSamples = 4, kWord = sizeof(uint64_t);
constexpr size_t kLine = 64;  // bytes of a cache line

long long integer(PyObject* owned) {
  if (!owned) throw py::error_already_set();
  const long long value = PyLong_AsLongLong(owned);
  Py_DECREF(owned);
  if (value == -1 && PyErr_Occurred()) throw py::error_already_set();
  return value;
}

bool equal(PyObject* a, PyObject* b) {
  const int same = PyObject_RichCompareBool(a, b, Py_EQ);
  if (same < 0) throw py::error_already_set();
  return same == 1;
}

// What os.environ holds, too.
const char* backend_override() {
  const char* name = std::getenv("MNV2_FUSED_BACKEND");
  return name ? name : "";
}

// Changes with every change of the dictionary (PEP 509), up to CPython 3.12. In 3.13 an attribute that is set on an
// object changes the object's dictionary, but not the version; 3.14 has no version.
#if PY_VERSION_HEX < 0x030D0000
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

// Address, shape and strides of a tensor without a Python object for each: by DLPack's table of C
// functions, which torch.Tensor carries. Null where this torch has none, or another version of it.
using Describe = decltype(dlpack::ExchangeApi::tensor_from_py_object);
Describe describe_function(const py::object& type) {
  const py::object capsule = py::getattr(type, dlpack::kAttribute, py::none());
  if (!PyCapsule_IsValid(capsule.ptr(), dlpack::kCapsule)) return nullptr;
  auto* header =
      static_cast<const dlpack::Header*>(PyCapsule_GetPointer(capsule.ptr(), dlpack::kCapsule));
  while (header && header->version.major != dlpack::kMajor) header = header->previous;
  if (!header || header->version.minor < dlpack::kMinor) return nullptr;
  return reinterpret_cast<const dlpack::ExchangeApi*>(header)->tensor_from_py_object;
}

// What the guard asks of torch.Tensor. Called past the lookup of the attribute where CPython's own
// descriptors tell how.
class TensorType {
 public:
  static const TensorType& get() {
    static const TensorType* const type = new TensorType;  // never freed: Python may end first
    return *type;
  }
  long long version(PyObject* t) const {
    return integer(version_get_ ? version_get_(t, version_closure_)
                                : PyObject_GetAttr(t, version_name_.ptr()));
  }
  // Fits: addresses of user space lie below 2^63.
  long long address(PyObject* t) const {
    return integer(data_ptr_call_ ? data_ptr_call_(t, nullptr)
                                  : PyObject_CallOneArg(data_ptr_.ptr(), t));
  }
  // Whether DLPack describes the tensor, in `view`; with lists of shape and strides that are torch's own.
  bool describe(PyObject* t, dlpack::Tensor& view) const {
    if (!describe_) return false;
    if (describe_(t, &view) == 0) return true;
    PyErr_Clear();  // a dtype or layout that DLPack does not know
    return false;
  }
  py::object shape(PyObject* t) const {
    return owned(shape_get_ ? shape_get_(t, shape_closure_)
                            : PyObject_GetAttr(t, shape_name_.ptr()));
  }
  py::object strides(PyObject* t) const { return owned(PyObject_CallOneArg(stride_.ptr(), t)); }

 private:
  TensorType()
      : type_(py::module_::import("torch").attr("Tensor")),
        version_name_(py::str("_version")),
        shape_name_(py::str("shape")),
        data_ptr_(type_.attr("data_ptr")),
        stride_(type_.attr("stride")),
        describe_(describe_function(type_)) {
    find(type_.attr("_version"), version_get_, version_closure_);
    find(type_.attr("shape"), shape_get_, shape_closure_);
    if (Py_TYPE(data_ptr_.ptr()) == &PyMethodDescr_Type) {
      const PyMethodDef* const method =
          reinterpret_cast<PyMethodDescrObject*>(data_ptr_.ptr())->d_method;
      if (method->ml_flags == METH_NOARGS) data_ptr_call_ = method->ml_meth;
    }
  }
  static void find(const py::object& descriptor, getter& get, void*& closure) {
    if (Py_TYPE(descriptor.ptr()) != &PyGetSetDescr_Type) return;
    const PyGetSetDef* const of =
        reinterpret_cast<PyGetSetDescrObject*>(descriptor.ptr())->d_getset;
    get = of->get;
    closure = of->closure;
  }
  static py::object owned(PyObject* object) {
    if (!object) throw py::error_already_set();
    return py::reinterpret_steal<py::object>(object);
  }

  py::object type_, version_name_, shape_name_, data_ptr_, stride_;
  getter version_get_ = nullptr, shape_get_ = nullptr;
  void *version_closure_ = nullptr, *shape_closure_ = nullptr;
  PyCFunction data_ptr_call_ = nullptr;
  const Describe describe_;
};

const char* memory_of(long long address) {
  return reinterpret_cast<const char*>(static_cast<uintptr_t>(address));
}

uint64_t word_at(const char* p, size_t bytes) {
  uint64_t word = 0;
  std::memcpy(&word, p, bytes < kWord ? bytes : kWord);
  return word;
}

// Where sample i of a tensor of this size begins.
size_t sample_offset(size_t bytes, size_t samples, size_t i) {
  return samples < 2 ? 0 : (bytes - kWord) * i / (samples - 1);
}

// Sums, and sums of the sums, in lanes that compilers turn into vectors: a change of any word, and of
// the words' order, changes them. Rotation keeps top bits in play: without it an even number of flipped
// signs adds up to a multiple of 2^64, which is nothing.
uint64_t checksum(const char* p, size_t bytes) {
  constexpr size_t kLanes = 8, kBlock = kLanes * kWord;
  uint64_t sum[kLanes] = {}, sums[kLanes] = {};
  for (; bytes >= kBlock; bytes -= kBlock, p += kBlock)
    for (size_t lane = 0; lane < kLanes; ++lane) {
      sum[lane] += word_at(p + lane * kWord, kWord);
      sums[lane] = std::rotl(sums[lane], 1) + sum[lane];
    }
  uint64_t result = bytes;
  for (; bytes > 0; bytes -= std::min(bytes, kWord), p += kWord)
    result = result * 0x9E3779B97F4A7C15 + word_at(p, bytes);
  for (size_t lane = 0; lane < kLanes; ++lane)
    result = (result * 0x9E3779B97F4A7C15 + sum[lane]) * 0xC2B2AE3D27D4EB4F + sums[lane];
  return result;
}

}  // namespace

Guard::Guard(const py::list& values, const py::list& sizes, const py::list& entries,
             const py::list& tensors, const py::object& next_hook)
    : seen_writes_(uncounted_writes_), backend_(backend_override()), next_hook_(next_hook) {
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
    sizes_.push_back({py::reinterpret_borrow<py::object>(dict), PyDict_Size(dict.ptr())});
  for (const auto entry : entries) {
    const py::tuple pair = py::reinterpret_borrow<py::tuple>(entry);
    const py::dict dict = pair[0];
    entries_.push_back({dict, pair[1], dict[pair[1]]});
  }
  const TensorType& type = TensorType::get();
  for (const auto entry : tensors) {
    const py::tuple pair = py::reinterpret_borrow<py::tuple>(entry);
    Tensor t{};
    t.object = pair[0];
    PyObject* const object = t.object.ptr();
    t.version = t.object.attr("is_inference")().cast<bool>() ? -1 : type.version(object);
    t.address = type.address(object);
    t.bytes = pair[1].cast<size_t>();
    // A view through .data, its channels cut or its axes swapped, can have address and version of the
    // whole.
    const py::tuple shape = type.shape(object), strides = type.strides(object);
    t.first_length = lengths_.size();
    t.dims = shape.size();
    for (size_t i = 0; i < t.dims; ++i) lengths_.push_back(shape[i].cast<int64_t>());
    for (size_t i = 0; i < t.dims; ++i) lengths_.push_back(strides[i].cast<int64_t>());
    dlpack::Tensor view;
    t.described = type.describe(object, view);
    if (t.described) {
      t.type_code = view.type_code;
      t.type_bits = view.type_bits;
      t.described = lies_as_before(t);
    }
    const char* const memory = memory_of(t.address);
    t.first_sample = samples_.size();
    t.samples = t.bytes <= kWord ? t.bytes > 0 : std::min(kSamples, (t.bytes + kWord - 1) / kWord);
    for (size_t i = 0; i < t.samples; ++i) {
      const char* const at = memory + sample_offset(t.bytes, t.samples, i);
      samples_.push_back({at, word_at(at, t.bytes)});
    }
    for (size_t begin = 0; begin < t.bytes; begin += kChunk) {
      const size_t bytes = std::min(kChunk, t.bytes - begin);
      chunks_.push_back({tensors_.size(), begin, bytes, checksum(memory + begin, bytes)});
    }
    tensors_.push_back(std::move(t));
  }
  find_lines();
}

// Between two calls all of this leaves the nearer caches. A walk from one object to the next would wait
// for each; fetched beforehand, all at once, they come much sooner. Addresses are hints: a wrong one
// costs nothing, since fetching cannot fail.
void Guard::find_lines() {
  const auto add = [&](uintptr_t address, size_t bytes = 1) {
    for (uintptr_t at = address / kLine * kLine; at < address + bytes; at += kLine)
      lines_.push_back(reinterpret_cast<const void*>(at));
  };
  // Of the objects of torch: the parts that a look at version and address reads, by their usual size.
  constexpr size_t kTensorBytes = 192, kStorageBytes = 64;
  for (const Versioned& v : versions_) add(reinterpret_cast<uintptr_t>(v.dict));
  for (const Tensor& t : tensors_) {
    add(reinterpret_cast<uintptr_t>(t.object.ptr()), 32);
    add(t.object.attr("_cdata").cast<uintptr_t>(), kTensorBytes);
    add(t.object.attr("untyped_storage")().attr("_cdata").cast<uintptr_t>(), kStorageBytes);
  }
  for (const Sample& s : samples_) add(reinterpret_cast<uintptr_t>(s.at));
  std::ranges::sort(lines_);
  lines_.erase(std::ranges::unique(lines_).begin(), lines_.end());
}

int Guard::traverse(visitproc visit, void* arg) const {
  for (const Values& held : held_) Py_VISIT(held.dict.ptr());
  for (const py::object& value : values_) Py_VISIT(value.ptr());
  for (const Size& size : sizes_) Py_VISIT(size.dict.ptr());
  for (const Entry& entry : entries_) {
    Py_VISIT(entry.dict.ptr());
    Py_VISIT(entry.key.ptr());
    Py_VISIT(entry.value.ptr());
  }
  for (const Tensor& t : tensors_) Py_VISIT(t.object.ptr());
  return 0;
}

void Guard::clear() {
  valid_ = false;
  versions_.clear();
  // Swapped out first: what is released may call back.
  std::vector<Values> held;
  std::vector<py::object> values;
  std::vector<Size> sizes;
  std::vector<Entry> entries;
  std::vector<Tensor> tensors;
  held.swap(held_);
  values.swap(values_);
  sizes.swap(sizes_);
  entries.swap(entries_);
  tensors.swap(tensors_);
  chunks_.clear();
}

bool Guard::dictionaries_hold() const {
  size_t i = 0;
  for (const Values& held : held_) {
    PyObject *key, *value;
    Py_ssize_t position = 0;
    while (PyDict_Next(held.dict.ptr(), &position, &key, &value))
      if (i == held.end || value != values_[i++].ptr()) return false;
    if (i != held.end) return false;
  }
  for (const Size& size : sizes_)
    if (PyDict_Size(size.dict.ptr()) != size.entries) return false;
  for (const Entry& entry : entries_) {
    PyObject* const value = PyDict_GetItemWithError(entry.dict.ptr(), entry.key.ptr());
    if (!value && PyErr_Occurred()) throw py::error_already_set();
    if (!value) return false;
    if (value == entry.value.ptr()) continue;
    if (PyDict_Check(value)) return false;  // another one, and `held_` looked into the former
    const auto held = py::reinterpret_borrow<py::object>(value);  // comparing may run anything
    if (!equal(held.ptr(), entry.value.ptr())) return false;
  }
  return true;
}

bool Guard::lies_as_before(const Tensor& t) const {
  const TensorType& type = TensorType::get();
  PyObject* const object = t.object.ptr();
  const int64_t* expected = lengths_.data() + t.first_length;
  if (t.described) {
    dlpack::Tensor view;
    if (!type.describe(object, view)) return false;
    return static_cast<const char*>(view.data) + view.byte_offset == memory_of(t.address) &&
           view.type_code == t.type_code && view.type_bits == t.type_bits &&
           static_cast<size_t>(view.ndim) == t.dims &&
           std::equal(view.shape, view.shape + t.dims, expected) &&
           (view.strides ? std::equal(view.strides, view.strides + t.dims, expected + t.dims)
                         : t.dims == 0);
  }
  if (type.address(object) != t.address) return false;
  for (const py::object& lengths : {type.shape(object), type.strides(object)}) {
    if (static_cast<size_t>(PyTuple_GET_SIZE(lengths.ptr())) != t.dims) return false;
    for (size_t i = 0; i < t.dims; ++i)
      if (PyLong_AsLongLong(PyTuple_GET_ITEM(lengths.ptr(), i)) != *expected++) return false;
  }
  return true;
}

bool Guard::samples_hold(const Tensor& t) const {
  if (t.bytes < kWord)
    return t.samples == 0 ||
           word_at(memory_of(t.address), t.bytes) == samples_[t.first_sample].word;
  for (size_t i = t.first_sample; i < t.first_sample + t.samples; ++i)
    if (word_at(samples_[i].at, kWord) != samples_[i].word) return false;
  return true;
}

bool Guard::chunk_holds(const Chunk& c) const {
  return checksum(memory_of(tensors_[c.tensor].address) + c.begin, c.bytes) == c.sum;
}

bool Guard::check() {
  if (backend_ != backend_override()) return false;
  for (const void* line : lines_) __builtin_prefetch(line, 0, 2);
  if (!next_hook_.is_none()) {
    static const py::object* const handle =
        new py::object(py::module_::import("torch.utils.hooks").attr("RemovableHandle"));
    static const py::object* const name = new py::object(py::str("next_id"));
    const auto now =
        py::reinterpret_steal<py::object>(PyObject_GetAttr(handle->ptr(), name->ptr()));
    if (!now) throw py::error_already_set();
    if (!equal(now.ptr(), next_hook_.ptr())) return false;
  }
  const auto moved_on = [](const Versioned& v) { return version_of(v.dict) != v.version; };
  if (!kVersions || std::ranges::any_of(versions_, moved_on)) {
    // Taken first: comparing may run anything.
    std::vector<uint64_t> versions;
    for (const Versioned& v : versions_) versions.push_back(version_of(v.dict));
    if (!dictionaries_hold() || !valid_) return false;
    for (size_t i = 0; i < versions.size(); ++i) versions_[i].version = versions[i];
  }
  const TensorType& type = TensorType::get();
  for (const Tensor& t : tensors_) {
    // Address before samples: memory is read only while the tensor still owns it.
    if ((t.version >= 0 && type.version(t.object.ptr()) != t.version) || !lies_as_before(t) ||
        !samples_hold(t))
      return false;
  }
  if (seen_writes_ != uncounted_writes_) {
    seen_writes_ = uncounted_writes_;
    const auto unreadable = [](const Tensor& t) { return t.bytes == 0 && t.address != 0; };
    if (std::ranges::any_of(tensors_, unreadable)) return false;
    return std::ranges::all_of(chunks_, [&](const Chunk& c) { return chunk_holds(c); });
  }
  for (size_t left = kChunk, n = 0; n < chunks_.size(); ++n) {
    const Chunk& c = chunks_[next_chunk_];
    if (c.bytes > left) break;
    left -= c.bytes;
    next_chunk_ = next_chunk_ + 1 == chunks_.size() ? 0 : next_chunk_ + 1;
    if (!chunk_holds(c)) {
      found_late_ = true;
      note_uncounted_writes();  // other guards may hold the same tensor
      return false;
    }
  }
  return true;
}

bool Guard::is_valid() { return valid_ = valid_ && check(); }

}  // namespace mnv2_fused
