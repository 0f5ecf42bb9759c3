// Whether everything that a prepared call relies on is unchanged. Asked before every fused call, mostly
// with cold caches: the guard looks at as little as CPython and torch allow.
#pragma once

#include <pybind11/pybind11.h>

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace mnv2_fused {

// Torch counts most writes to a tensor in its version, but not all: kernels of fused optimizers,
// collectives, statistics of F.batch_norm, writes through .data, NumPy or another process go uncounted.
// So the guard compares, beside version and address,
//   - samples: one or two cache lines of each tensor, at every call;
//   - a checksum of kChunk bytes at every call, the next ones each time: any write to a CPU tensor is
//     found after at most ceil(bytes / kChunk) calls plus one per tensor.
// A tensor of another device has no readable memory here: its version and address are all there is.
class Guard {
 public:
  // values: dictionaries whose values must stay the very same objects.
  // sizes: dictionaries that must keep their number of entries.
  // entries: (dictionary, key) pairs whose values must stay equal.
  // tensors: (tensor, bytes) pairs; bytes that the tensor spans in memory of the CPU, else 0.
  // hooks: dictionaries of hooks that must keep their number of entries, looked at once any module was
  // hooked since next_hook.
  // next_hook: RemovableHandle.next_id from before the modules were looked at, or None.
  // The environment's MNV2_FUSED_BACKEND counts as well.
  Guard(const pybind11::list& values, const pybind11::list& sizes, const pybind11::list& entries,
        const pybind11::list& tensors, const pybind11::list& hooks,
        const pybind11::object& next_hook);

  // Once false, always false.
  bool is_valid();
  // Whether it is valid and x is what a call on its tensors takes as it is: an ordinary tensor of their
  // dtype on the CPU, while nothing records, casts or transforms. False says nothing about the guard.
  bool serves(pybind11::handle x);
  // Whether a checksum, and no earlier call, found the change: results since then may be stale.
  bool found_late() const { return found_late_; }

  // What nobody counted may have happened to any tensor: the next is_valid() of every guard compares all
  // of its memory.
  static void note_uncounted_writes() { ++uncounted_writes_; }

  // Of Python's garbage collector: what the guard holds may hold the guard.
  int traverse(visitproc visit, void* arg) const;
  void clear();

 private:
  struct Versioned {  // a dictionary and its version: as long as that stays, so does all inside
    PyObject* dict;   // owned by one of the lists below
    uint64_t version;
  };
  struct Values {
    pybind11::object dict;
    size_t end;  // of its values in values_
  };
  struct Size {
    pybind11::object dict;
    Py_ssize_t entries;
  };
  struct Entry {
    pybind11::object dict, key, value;
  };
  // One cache line each: they are read in a row.
  struct alignas(64) Tensor {
    pybind11::object object;
    long long version;  // -1: an inference tensor, which has none
    long long address;
    const void *impl, *storage;  // of torch's objects, to be fetched beforehand
    uint32_t first_sample;       // in samples_
    uint32_t first_length;       // in lengths_: the shape, then the strides
    uint32_t dims;
    uint8_t samples;  // 0 where its memory cannot be read here
    uint8_t sample_bytes;
    uint8_t item_bytes;
    bool has_handle;  // which tells address, shape, strides, dtype; else attributes of Python do
    int32_t dtype;    // by the stable ABI's number
  };
  // What one cache line of a tensor held.
  struct alignas(64) Sample {
    char held[64];
  };
  // Bytes of a tensor and their checksum.
  struct Chunk {
    const char* at;
    size_t bytes;
    uint64_t sum;
  };

  bool check();
  static bool has_its_size(const Size& size);
  bool dictionaries_hold() const;
  bool lies_as_before(const Tensor& t) const;  // address, shape and strides
  bool samples_hold(const Tensor& t) const;
  void take_samples(Tensor& t, size_t bytes);
  uint32_t lengths_of(const pybind11::tuple& shape, const pybind11::tuple& strides);
  void fetch(const Tensor& t) const;
  void fetch_next_chunks() const;

  inline static uint64_t uncounted_writes_ = 0;

  bool valid_ = true, found_late_ = false;
  uint64_t seen_writes_;
  std::string backend_;
  pybind11::object next_hook_;
  std::vector<Versioned> versions_;
  std::vector<Values> held_;
  std::vector<pybind11::object> values_;
  std::vector<Size> sizes_, hooks_;
  std::vector<Entry> entries_;
  std::vector<Tensor> tensors_;
  std::vector<Sample> samples_;
  std::vector<const char*> sampled_;  // where each of samples_ lies
  std::vector<int64_t> lengths_;      // each combination once
  std::vector<Chunk> chunks_;
  size_t next_chunk_ = 0;
};

}  // namespace mnv2_fused
