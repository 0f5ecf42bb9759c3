#include "guard.h"

#include <algorithm>
#include <bit>
#include <cstdlib>
#include <cstring>

#include "tensor_handle.h"

namespace mnv2_fused {
namespace {

namespace py = pybind11;

// Bytes whose checksum one call compares: a microsecond, also from memory.
constexpr size_t kChunk = size_t{16} << 10;
constexpr size_t kWord = sizeof(uint64_t);
constexpr size_t kLine = 64;  // bytes of a cache line
// Cache lines compared of each tensor at every call: of a vector one, which holds many channels; of a
// convolution's weight, where a line is mostly of one channel, two from its two halves.
constexpr size_t kVectorSamples = 1, kSamples = 2;
// Tensors between the one that is looked at and the one whose memory is fetched.
constexpr size_t kAhead = 8;

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
  // Where a tensor's handle lies in its object, 0 if nowhere.
  size_t handle_offset() const { return handle_offset_; }
  bool is_exact(PyObject* t) const {
    return reinterpret_cast<PyObject*>(Py_TYPE(t)) == type_.ptr();
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
        handle_offset_(TensorHandle::find(py::module_::import("torch").attr("empty")(0).ptr())) {
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
  const size_t handle_offset_;
};

// Of the next handle of a hook, whatever it is on.
py::object next_hook_id() {
  static const py::object* const handle =
      new py::object(py::module_::import("torch.utils.hooks").attr("RemovableHandle"));
  static const py::object* const name = new py::object(py::str("next_id"));
  PyObject* const id = PyObject_GetAttr(handle->ptr(), name->ptr());
  if (!id) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(id);
}

// What torch may do with a call besides calling it. Each of these is a call of Python too: in one place
// they take a third of the time.
class TorchState {
 public:
  static const TorchState& get() {
    static const TorchState* const state = new TorchState;  // never freed: Python may end first
    return *state;
  }
  // Whether nothing records, traces, casts or transforms.
  bool is_plain() const {
    return result_of(grad_, nullptr) == Py_False && result_of(autocast_, cpu_.ptr()) == Py_False &&
           result_of(transforms_, nullptr) == Py_None && value(compiler_, compiling_) == Py_False &&
           result_of(tracing_, nullptr) == Py_False && level() < 0;
  }

 private:
  TorchState()
      : grad_(py::module_::import("torch").attr("is_grad_enabled")),
        autocast_(py::module_::import("torch").attr("is_autocast_enabled")),
        transforms_(py::module_::import("torch._C._functorch").attr("peek_interpreter_stack")),
        tracing_(py::module_::import("torch._C").attr("_is_tracing")),
        compiler_(py::module_::import("torch.compiler").attr("__dict__")),
        forward_ad_(py::module_::import("torch.autograd.forward_ad").attr("__dict__")),
        cpu_(py::str("cpu")),
        compiling_(py::str("_is_compiling_flag")),
        level_(py::str("_current_level")) {}
  // Compared, not looked into: it is owned no more.
  static PyObject* result_of(const py::object& function, PyObject* argument) {
    PyObject* const result = argument ? PyObject_CallOneArg(function.ptr(), argument)
                                      : PyObject_CallNoArgs(function.ptr());
    if (!result) throw py::error_already_set();
    Py_DECREF(result);
    return result;
  }
  static PyObject* value(const py::object& names, const py::object& name) {
    PyObject* const found = PyDict_GetItemWithError(names.ptr(), name.ptr());
    if (!found && PyErr_Occurred()) throw py::error_already_set();
    return found;
  }
  // 0, which is a level, where there is none.
  long long level() const {
    PyObject* const found = value(forward_ad_, level_);
    return found ? integer(Py_NewRef(found)) : 0;
  }

  py::object grad_, autocast_, transforms_, tracing_, compiler_, forward_ad_, cpu_, compiling_,
      level_;
};

// Inlined: a call of memcmp would take longer than the few values do.
[[gnu::always_inline]] inline bool same_lengths(const int64_t* a, const int64_t* b, size_t dims) {
  bool same = true;
  for (size_t i = 0; i < dims; ++i) same &= a[i] == b[i];
  return same;
}

const char* memory_of(long long address) {
  return reinterpret_cast<const char*>(static_cast<uintptr_t>(address));
}

uint64_t word_at(const char* p, size_t bytes) {
  uint64_t word = 0;
  std::memcpy(&word, p, bytes < kWord ? bytes : kWord);
  return word;
}

// Zeros of either sign among the elements of a cache line.
size_t zeros_of(const char* line, size_t item) {
  size_t zeros = 0;
  for (const char* at = line; at + item <= line + kLine; at += item)
    zeros += word_at(at, item) << (1 + 8 * (kWord - item)) == 0;
  return zeros;
}

// The first of these cache lines with the fewest zeros: products leave a zero as it was.
const char* best_line(const char* first, size_t lines, size_t item) {
  const char* best = first;
  size_t fewest = SIZE_MAX;
  for (const char* line = first; line < first + lines * kLine && fewest > 0; line += kLine)
    if (const size_t zeros = zeros_of(line, item); zeros < fewest) {
      fewest = zeros;
      best = line;
    }
  return best;
}

// Inlined: compilers take a function that only fetches for one without effect.
[[gnu::always_inline]] inline void fetch_lines(const void* first, size_t bytes) {
  const auto begin = reinterpret_cast<uintptr_t>(first);
  for (uintptr_t at = begin & ~(kLine - 1); at < begin + bytes; at += kLine)
    __builtin_prefetch(reinterpret_cast<const void*>(at), 0, 3);
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
             const py::list& tensors, const py::list& hooks, const py::object& next_hook)
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
  for (const auto dict : hooks)
    hooks_.push_back({py::reinterpret_borrow<py::object>(dict), PyDict_Size(dict.ptr())});
  // What was hooked between the look at the modules and this one is nobody's to judge.
  valid_ = next_hook_.is_none() || equal(next_hook_id().ptr(), next_hook_.ptr());
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
    // A view through .data, its channels cut or its axes swapped, can have address and version of the
    // whole.
    const py::tuple shape = type.shape(object), strides = type.strides(object);
    t.dims = static_cast<uint32_t>(shape.size());
    t.first_length = lengths_of(shape, strides);
    t.item_bytes = pair[0].attr("itemsize").cast<uint8_t>();
    const size_t offset = TensorHandle::find(object);
    t.has_handle = offset != 0 && offset == type.handle_offset() &&
                   TensorHandle(object, offset).dtype(t.dtype);
    t.has_handle = t.has_handle && lies_as_before(t);
    t.impl = reinterpret_cast<const void*>(t.object.attr("_cdata").cast<uintptr_t>());
    t.storage = reinterpret_cast<const void*>(
        t.object.attr("untyped_storage")().attr("_cdata").cast<uintptr_t>());
    const size_t bytes = pair[1].cast<size_t>();
    take_samples(t, bytes);
    const char* const memory = memory_of(t.address);
    for (size_t begin = 0; begin < bytes; begin += kChunk) {
      const size_t of_chunk = std::min(kChunk, bytes - begin);
      chunks_.push_back({memory + begin, of_chunk, checksum(memory + begin, of_chunk)});
    }
    tensors_.push_back(std::move(t));
  }
}

uint32_t Guard::lengths_of(const py::tuple& shape, const py::tuple& strides) {
  std::vector<int64_t> lengths;
  for (const py::tuple& values : {shape, strides})
    for (const auto value : values) lengths.push_back(value.cast<int64_t>());
  const auto found = std::ranges::search(lengths_, lengths).begin();
  const size_t first = static_cast<size_t>(found - lengths_.begin());
  if (found == lengths_.end()) lengths_.insert(lengths_.end(), lengths.begin(), lengths.end());
  return static_cast<uint32_t>(first);
}

void Guard::take_samples(Tensor& t, size_t bytes) {
  if (bytes == 0) return;
  const char* const memory = memory_of(t.address);
  const size_t lines = bytes / kLine, item = std::clamp<size_t>(t.item_bytes, 1, kWord);
  t.sample_bytes = static_cast<uint8_t>(std::min(bytes, kLine));
  t.samples =
      static_cast<uint8_t>(std::clamp<size_t>(lines, 1, t.dims > 1 ? kSamples : kVectorSamples));
  t.first_sample = static_cast<uint32_t>(samples_.size());
  for (size_t i = 0; i < t.samples; ++i) {
    const size_t begin = lines * i / t.samples, end = lines * (i + 1) / t.samples;
    const char* const at = best_line(memory + begin * kLine, end - begin, item);
    std::memcpy(samples_.emplace_back().held, at, t.sample_bytes);
    sampled_.push_back(at);
  }
}

// Between two calls all of this leaves the nearer caches. Addresses are hints: a wrong one costs nothing,
// since fetching cannot fail. Of torch's objects those parts, by their usual size, that a look at version
// and address reads.
[[gnu::always_inline]] inline void Guard::fetch(const Tensor& t) const {
  constexpr size_t kObjectBytes = 32, kTensorBytes = 192, kStorageBytes = 64;
  fetch_lines(t.object.ptr(), kObjectBytes);
  fetch_lines(t.impl, kTensorBytes);
  fetch_lines(t.storage, kStorageBytes);
  for (size_t i = t.first_sample; i < t.first_sample + t.samples; ++i)
    __builtin_prefetch(sampled_[i], 0, 3);
}

// What this call will compare a checksum of.
[[gnu::always_inline]] inline void Guard::fetch_next_chunks() const {
  size_t left = kChunk;
  for (size_t i = next_chunk_; i < chunks_.size() && chunks_[i].bytes <= left; ++i) {
    fetch_lines(chunks_[i].at, chunks_[i].bytes);
    left -= chunks_[i].bytes;
  }
}

int Guard::traverse(visitproc visit, void* arg) const {
  for (const Values& held : held_) Py_VISIT(held.dict.ptr());
  for (const py::object& value : values_) Py_VISIT(value.ptr());
  for (const Size& size : sizes_) Py_VISIT(size.dict.ptr());
  for (const Size& size : hooks_) Py_VISIT(size.dict.ptr());
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
  std::vector<Size> sizes, hooks;
  std::vector<Entry> entries;
  std::vector<Tensor> tensors;
  held.swap(held_);
  values.swap(values_);
  sizes.swap(sizes_);
  hooks.swap(hooks_);
  entries.swap(entries_);
  tensors.swap(tensors_);
  chunks_.clear();
}

bool Guard::has_its_size(const Size& size) { return PyDict_Size(size.dict.ptr()) == size.entries; }

bool Guard::dictionaries_hold() const {
  size_t i = 0;
  for (const Values& held : held_) {
    PyObject *key, *value;
    Py_ssize_t position = 0;
    while (PyDict_Next(held.dict.ptr(), &position, &key, &value))
      if (i == held.end || value != values_[i++].ptr()) return false;
    if (i != held.end) return false;
  }
  if (!std::ranges::all_of(sizes_, has_its_size)) return false;
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
  if (t.has_handle) {
    const TensorHandle handle(object, type.handle_offset());
    void* address;
    int64_t dims, *shape, *strides;
    int32_t dtype;
    return handle.address(address) && address == memory_of(t.address) && handle.dims(dims) &&
           dims == t.dims && handle.dtype(dtype) && dtype == t.dtype && handle.shape(shape) &&
           same_lengths(shape, expected, t.dims) && handle.strides(strides) &&
           same_lengths(strides, expected + t.dims, t.dims);
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
  const size_t end = t.first_sample + t.samples;
  if (t.sample_bytes < kLine)
    return t.samples == 0 || std::memcmp(sampled_[t.first_sample], samples_[t.first_sample].held,
                                         t.sample_bytes) == 0;
  for (size_t i = t.first_sample; i < end; ++i) {
    uint64_t differs = 0;
    for (size_t word = 0; word < kLine; word += kWord)
      differs |= word_at(sampled_[i] + word, kWord) ^ word_at(samples_[i].held + word, kWord);
    if (differs) return false;
  }
  return true;
}

bool Guard::check() {
  if (backend_ != backend_override()) return false;
  if (!next_hook_.is_none()) {
    py::object now = next_hook_id();
    if (!equal(now.ptr(), next_hook_.ptr())) {
      if (!std::ranges::all_of(hooks_, has_its_size)) return false;
      next_hook_ = std::move(now);
    }
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
  const auto holds = [](const Chunk& c) { return checksum(c.at, c.bytes) == c.sum; };
  fetch_next_chunks();
  for (size_t i = 0; i < std::min(kAhead, tensors_.size()); ++i) fetch(tensors_[i]);
  for (size_t i = 0; i < tensors_.size(); ++i) {
    if (i + kAhead < tensors_.size()) fetch(tensors_[i + kAhead]);
    const Tensor& t = tensors_[i];
    // Address before samples: memory is read only while the tensor still owns it.
    if ((t.version >= 0 && type.version(t.object.ptr()) != t.version) || !lies_as_before(t) ||
        !samples_hold(t))
      return false;
  }
  if (seen_writes_ != uncounted_writes_) {
    seen_writes_ = uncounted_writes_;
    const auto unreadable = [](const Tensor& t) { return t.samples == 0 && t.address != 0; };
    if (std::ranges::any_of(tensors_, unreadable)) return false;
    return std::ranges::all_of(chunks_, holds);
  }
  for (size_t left = kChunk, n = 0; n < chunks_.size(); ++n) {
    const Chunk& c = chunks_[next_chunk_];
    if (c.bytes > left) break;
    left -= c.bytes;
    next_chunk_ = next_chunk_ + 1 == chunks_.size() ? 0 : next_chunk_ + 1;
    if (!holds(c)) {
      found_late_ = true;
      note_uncounted_writes();  // other guards may hold the same tensor
      return false;
    }
  }
  return true;
}

bool Guard::serves(py::handle x) {
  const TensorType& type = TensorType::get();
  if (tensors_.empty() || !tensors_[0].has_handle || !type.is_exact(x.ptr())) return false;
  const TensorHandle handle(x.ptr(), type.handle_offset());
  int32_t dtype;
  return TorchState::get().is_plain() && handle.on_cpu() && handle.dtype(dtype) &&
         dtype == tensors_[0].dtype && is_valid();
}

bool Guard::is_valid() { return valid_ = valid_ && check(); }

}  // namespace mnv2_fused
