// The part of DLPack's C interface, version 1.3, by which a Python tensor tells where it lies: struct
// layouts as its specification has them (torch's own copy refuses builds for the stable ABI).
#pragma once

#include <cstdint>

namespace mnv2_fused::dlpack {

constexpr uint32_t kMajor = 1, kMinor = 3;  // later minor versions only append

constexpr int32_t kCpu = 1;  // of device types

struct Version {
  uint32_t major, minor;
};
struct Header {
  Version version;
  const Header* previous;  // of an older major version, or null
};
struct Tensor {
  void* data;
  int32_t device_type, device_id;
  int32_t ndim;
  uint8_t type_code, type_bits;
  uint16_t type_lanes;
  int64_t* shape;    // [ndim], elements
  int64_t* strides;  // [ndim], elements
  uint64_t byte_offset;
};
struct ExchangeApi {
  Header header;
  void (*unused[3])();
  // Describes a Python tensor in place, whose memory it does not own; 0, or -1 and a Python error.
  int (*tensor_from_py_object)(void* object, Tensor* out);
  void (*unused_stream)();
};
// Of the capsule that the attribute of a tensor's type holds.
constexpr const char* kAttribute = "__dlpack_c_exchange_api__";
constexpr const char* kCapsule = "dlpack_exchange_api";

}  // namespace mnv2_fused::dlpack
