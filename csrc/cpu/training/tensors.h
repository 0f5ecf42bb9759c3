// Tensors of the training ops: checks, results, and sums of what ran side by side.
#pragma once

#include <algorithm>
#include <utility>
#include <vector>

#include "../isa.h"
#include "../op.h"
#include "args.h"

namespace mnv2_fused::cpu::training {

template <class T>
const Kernels<T>& kernels() {
  const AllKernels& all = cpu::active().training();
  if constexpr (std::is_same_v<T, float>)
    return all.f32;
  else
    return all.f64;
}

// A dense [N, C, H, W] in channels_last order.
template <class T>
const T* activation(const char* name, const Tensor& t, const Sizes& sizes) {
  const auto [n, c, h, w] = sizes;
  const bool right = t.is_cpu() && t.scalar_type() == type_of<T> && t.dim() == 4 &&
                     std::equal(sizes.begin(), sizes.end(), t.sizes().begin()) &&
                     (c == 1 || t.stride(1) == 1) && (w == 1 || t.stride(3) == c) &&
                     (h == 1 || t.stride(2) == w * c) && (n == 1 || t.stride(0) == h * w * c);
  if (!right)
    fail(name, " must be dense ", to_string(sizes),
         " in channels_last order, of the block's dtype, got ", to_string(t));
  return static_cast<const T*>(t.const_data_ptr());
}
template <class T>
const T* weights(const char* name, const Tensor& t, std::initializer_list<int64_t> sizes) {
  if (!t.is_cpu() || t.scalar_type() != type_of<T>) fail(name, " must be of x's dtype, on the CPU");
  check_sizes(name, t, sizes);
  return static_cast<const T*>(t.const_data_ptr());
}

inline Tensor dense(std::initializer_list<int64_t> sizes, ScalarType dtype) {
  const std::vector<int64_t> all(sizes);
  std::vector<int64_t> strides(all.size(), 1);
  for (size_t i = all.size(); i-- > 1;) strides[i - 1] = strides[i] * all[i];
  return empty({all.data(), all.size()}, {strides.data(), strides.size()}, dtype);
}

// Sums of parts that lie `pitch` apart, in their order.
template <class R>
void sum_parts(const R* parts, int64_t count, int64_t pitch, int64_t channels, R* to) {
  constexpr int64_t kSome = 64;
  for (int64_t first = 0; first < channels; first += kSome) {
    const int64_t some = std::min(kSome, channels - first);
    double total[kSome] = {};
    for (int64_t i = 0; i < count; ++i)
      for (int64_t c = 0; c < some; ++c) total[c] += double(parts[i * pitch + first + c]);
    for (int64_t c = 0; c < some; ++c) to[first + c] = R(total[c]);
  }
}

struct Moments {
  double mean, variance;
};
// Of several samples of a channel put together in order: [parts][2][padded], the mean of each and its sum of
// squares less that. count_of(part): values in it.
template <class F>
Moments moments_of(const double* parts, int64_t count, int64_t padded, F count_of) {
  double mean = 0, squares = 0, before = 0;
  for (int64_t i = 0; i < count; ++i) {
    const double* const part = parts + i * 2 * padded;
    const double more = count_of(i), all = before + more, difference = part[0] - mean;
    if (more == 0) continue;
    squares += part[padded] + difference * difference * (before * more / all);
    mean += difference * (more / all);
    before = all;
  }
  return {mean, squares / before};
}

// The same of all channels: [2, C].
template <class F>
Tensor joined(const double* parts, int64_t count, int64_t padded, int64_t channels, F count_of) {
  const Tensor result = dense({2, channels}, ScalarType::Double);
  auto* const to = static_cast<double*>(result.mutable_data_ptr());
  for (int64_t c = 0; c < channels; ++c) {
    const Moments m = moments_of(parts + c, count, padded, count_of);
    to[c] = m.mean;
    to[channels + c] = m.variance;
  }
  return result;
}

// Calls f with the kernels' T for x. Errors carry the op's name.
template <class F>
auto with_dtype(const char* op, const Tensor& x, F f) {
  try {
    switch (x.scalar_type()) {
      case ScalarType::Float:
        return f(float{});
      case ScalarType::Double:
        return f(double{});
      default:
        fail("x must be float32 or float64");
    }
  } catch (const std::exception& error) {
    throw std::runtime_error(std::string("mnv2_fused::") + op + ": " + error.what());
  }
}

}  // namespace mnv2_fused::cpu::training
