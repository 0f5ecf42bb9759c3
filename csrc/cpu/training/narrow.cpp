// The ops of training that take tensors of a block's own width; mnv2_fused/training_ops says what each
// computes.
#include <optional>
#include <tuple>

#include "../tasks.h"
#include "tensors.h"

namespace mnv2_fused::cpu::training {
namespace {

// One call of one pass: x [N, C, H, W], dense in channels_last order.
template <class T>
class Call {
 public:
  explicit Call(const Tensor& x) : sizes(sizes_of(x)), padded(round_up(sizes[1], kPanel)) {
    args.pixels = sizes[0] * sizes[2] * sizes[3];
    args.channels = sizes[1];
    if (args.pixels < 1 || args.channels < 1) fail("x must have elements, got ", to_string(x));
    if (args.pixels > kMost / args.channels) fail("x is too large: ", to_string(x));
    args.x = activation<T>("x", x, sizes);
    args.slices = kMostSlices;
  }

  // Rows of values of each channel, [rows][channels/16 * 16].
  const T* rows(const char* name, const Tensor& t, int64_t count) {
    return weights<T>(name, t, {count, padded});
  }
  Tensor result() {
    const Tensor y = empty(sizes, type_of<T>, true);
    args.y = static_cast<T*>(y.mutable_data_ptr());
    return y;
  }
  double* of_slices(Tensor& memory, int64_t count) {
    memory = buffer(args.slices * count * int64_t{sizeof(double)});
    return static_cast<double*>(memory.mutable_data_ptr());
  }
  void run(void (*pass)(const NarrowArgs<T>&, int64_t)) {
    for_tasks(args.slices, torch::stable::get_num_threads(),
              [&](int64_t slice, int64_t) { pass(args, slice); });
  }
  int64_t first_pixel(int64_t slice) const { return args.pixels * slice / args.slices; }

  const Sizes sizes;
  const int64_t padded;
  NarrowArgs<T> args;

 private:
  static constexpr int64_t kMost = int64_t{1} << 60;
};

// Sums of the slices, [rows, C] of [slices][at least rows][C/16 * 16].
template <class T>
Tensor summed(const Call<T>& call, const double* parts, int64_t rows, int64_t rows_of_slice) {
  const int64_t channels = call.args.channels;
  const Tensor result = dense({rows, channels}, ScalarType::Double);
  auto* const to = static_cast<double*>(result.mutable_data_ptr());
  for (int64_t r = 0; r < rows; ++r)
    sum_parts(parts + r * call.padded, call.args.slices, rows_of_slice * call.padded, channels,
              to + r * channels);
  return result;
}

Tensor moments(const Tensor& x) {
  return with_dtype("training_moments", x, [&]<class T>(T) {
    Call<T> call(x);
    Tensor memory;
    const double* const parts = call.args.sums = call.of_slices(memory, 2 * call.padded);
    call.run(kernels<T>().moments);
    return joined(parts, call.args.slices, call.padded, call.args.channels, [&](int64_t slice) {
      return double(call.first_pixel(slice + 1) - call.first_pixel(slice));
    });
  });
}

Tensor normalise(const Tensor& x, const Tensor& values, const std::optional<Tensor>& added) {
  return with_dtype("training_normalise", x, [&]<class T>(T) {
    Call<T> call(x);
    const T* const at = call.rows("values", values, 3);
    call.args.mean = at;
    call.args.scale = at + call.padded;
    call.args.offset = at + 2 * call.padded;
    if (added) call.args.added = activation<T>("added", *added, call.sizes);
    const Tensor y = call.result();
    call.run(kernels<T>().normalise);
    return y;
  });
}

Tensor gradient_sums(const Tensor& g, const Tensor& x, const Tensor& values) {
  return with_dtype("training_gradient_sums", x, [&]<class T>(T) {
    Call<T> call(x);
    call.args.g = activation<T>("g", g, call.sizes);
    const T* const at = call.rows("values", values, 2);
    call.args.mean = at;
    call.args.inverse = at + call.padded;
    Tensor memory;
    const double* const parts = call.args.sums = call.of_slices(memory, 2 * call.padded);
    call.run(kernels<T>().gradient_sums);
    return summed(call, parts, 2, 2);
  });
}

Tensor gradient(const Tensor& g, const Tensor& x, const Tensor& values) {
  return with_dtype("training_gradient", x, [&]<class T>(T) {
    Call<T> call(x);
    call.args.g = activation<T>("g", g, call.sizes);
    const T* at = call.rows("values", values, 5);
    for (const T** p : {&call.args.mean, &call.args.inverse, &call.args.scale, &call.args.offset,
                        &call.args.slope})
      *p = std::exchange(at, at + call.padded);
    const Tensor y = call.result();
    call.run(kernels<T>().gradient);
    return y;
  });
}

// Without a mean, x stays as it is, and no new one is made.
std::tuple<Tensor, Tensor, Tensor> centre(const Tensor& x, const std::optional<Tensor>& mean) {
  return with_dtype("training_centre", x, [&]<class T>(T) {
    Call<T> call(x);
    NarrowArgs<T>& args = call.args;
    // Few where pixels are few: each has all products.
    args.slices = std::min(ceil_div(args.pixels, kBlockPixels), kMostSlices);
    if (mean) args.mean = call.rows("mean", *mean, 1);
    const Tensor y = mean ? call.result() : dense({0}, type_of<T>);
    Tensor of_sums, of_products;
    const double* const sums = args.sums = call.of_slices(of_sums, 2 * call.padded);
    const double* const products = args.products =
        call.of_slices(of_products, args.channels * call.padded);
    const int64_t slice_elements = call.padded * kBlockPixels;
    const int64_t workers = std::min<int64_t>(call.args.slices, torch::stable::get_num_threads());
    const Tensor scratch = buffer(workers * slice_elements * int64_t{sizeof(T)});
    T* const first = static_cast<T*>(scratch.mutable_data_ptr());
    for_tasks(call.args.slices, workers, [&](int64_t slice, int64_t worker) {
      kernels<T>().centre(args, slice, first + worker * slice_elements);
    });
    return std::make_tuple(y, summed(call, sums, 1, 2),
                           summed(call, products, args.channels, args.channels));
  });
}

// What a 3x3 convolution of stride 2 and padding 1 multiplies, less the mean [C]: [N, 9 C, H', W'] by rows of
// the kernel, columns, channels.
Tensor patches(const Tensor& x, const std::optional<Tensor>& mean) {
  return with_dtype("training_patches", x, [&]<class T>(T) {
    const auto [n, c, height, width] = sizes_of(x);
    const T* const from = activation<T>("x", x, sizes_of(x));
    std::vector<T> of_row(size_t(3 * c), T(0));
    if (mean) {
      const T* const m = weights<T>("mean", *mean, {c});
      for (int64_t i = 0; i < 3 * c; ++i) of_row[size_t(i)] = m[i % c];
    }
    const int64_t out_height = (height + 1) / 2, out_width = (width + 1) / 2, row = 3 * c;
    const Tensor y = empty({n, 9 * c, out_height, out_width}, type_of<T>, true);
    T* const first = static_cast<T*>(y.mutable_data_ptr());
    const T* const means = of_row.data();
    torch::stable::parallel_for(0, n * out_height, 1, [&](int64_t at, int64_t end) {
      for (; at < end; ++at)
        for (int64_t ky = 0; ky < 3; ++ky) {
          const int64_t line = at % out_height * 2 - 1 + ky;
          const bool inside = line >= 0 && line < height;
          const T* const pixels = from + (at / out_height * height + line) * width * c;
          T* to = first + at * out_width * 9 * c + ky * row;
          for (int64_t col = -1; col + 1 < width; col += 2, to += 9 * c)
            if (inside && col >= 0 && col + 2 < width)
              for (int64_t i = 0; i < row; ++i) to[i] = pixels[col * c + i] - means[i];
            else
              for (int64_t i = 0; i < row; ++i) {
                const int64_t place = col * c + i;
                const bool image = inside && place >= 0 && place < width * c;
                to[i] = (image ? pixels[place] : T(0)) - means[i];
              }
        }
    });
    return y;
  });
}

}  // namespace
}  // namespace mnv2_fused::cpu::training

STABLE_TORCH_LIBRARY_IMPL(mnv2_fused, CPU, m) {
  m.impl("training_moments", TORCH_BOX(&mnv2_fused::cpu::training::moments));
  m.impl("training_normalise", TORCH_BOX(&mnv2_fused::cpu::training::normalise));
  m.impl("training_gradient_sums", TORCH_BOX(&mnv2_fused::cpu::training::gradient_sums));
  m.impl("training_gradient", TORCH_BOX(&mnv2_fused::cpu::training::gradient));
  m.impl("training_patches", TORCH_BOX(&mnv2_fused::cpu::training::patches));
  m.impl("training_centre", TORCH_BOX(&mnv2_fused::cpu::training::centre));
}
