// The fused block for one tile of output pixels, written once over a vector type V and the type S of
// stored elements: V's own type T, or BFloat16, whose products are summed in V.
//
// Include inside an instruction set's own .cpp, after its `#pragma GCC target`, MNV2_INLINE and V (and
// Bf16<V> for BFloat16): everything here has internal linkage, so no code compiled for one instruction
// set can serve another.
//
// Stages, for each group of expanded channels:
//   expand     x tile + halo -> expanded   T [group/16][ring rows][in_cols][16], 0 outside the image
//              (a stem reads x from a patch S [rows][cols][C_in] with its padding)
//   depthwise  expanded      -> depthwise  S [group/16][band pixels][16]
//   project    depthwise     -> y, the groups' sums added up in place (in a buffer of T where y is
//              narrower) or, when split, by add_row
//
// Every output element sums its terms in an order that depends on the group alone: the first run of
// channels ascending, then the bias, then the sum of each further run (shorter sums round less than
// one over all channels), those of a group before those of the next, and x last: a large bias or x
// would coarsen every rounding after it. Taps and input channels ascend. So results are identical
// bit for bit over tiles, splits and threads.
#pragma once

#define MNV2_INLINE_LAMBDA __attribute__((always_inline))

namespace {

// Rows x vectors of the 1x1 products' register tile: accumulators, a row of weights, a broadcast.
template <class V>
constexpr int kMaxVectors = V::kRegisters >= 32 ? 4 : 2;
#ifndef MNV2_MOST_ROWS  // fewer for compilers that check every access: their time goes with this
#define MNV2_MOST_ROWS 12
#endif
constexpr int kMostRows = MNV2_MOST_ROWS;
template <class V>
constexpr int max_rows(int vectors) {
  const int rows = (V::kRegisters - 1 - vectors) / vectors;
  // 16 registers hold 6 rows of two vectors; many more of one are no faster.
  const int most = V::kRegisters >= 32 || kMostRows < 7 ? kMostRows : 7;
  return rows < most ? rows : most;
}
// Output columns per depthwise pass: MobileNetV2's widths at 224 are multiples of 7.
constexpr int kDepthwiseCols = kMostRows < 7 ? kMostRows : 7;

// x86 max/min return the second operand when either is NaN, so NaN passes through as in torch.
template <class V>
MNV2_INLINE V clamp(V v, V low, V high) {
  return V::min(high, V::max(low, v));
}
template <class V>
MNV2_INLINE V relu6(V v) {
  return clamp(v, V::set1(0), V::set1(6));
}
template <class V>
MNV2_INLINE V multiplied(V a, V b) {
  return V::fma(a, b, V::set1(0));
}

// What an activation clips to; the others come after it, by way of memory.
template <class T>
struct Clip {
  T low, high;

  explicit Clip(Activation a)
      : low(a <= Activation::kRelu ? T(0) : -std::numeric_limits<T>::infinity()),
        high(a == Activation::kRelu6 ? T(6) : std::numeric_limits<T>::infinity()) {}
};
constexpr bool is_clip(Activation a) { return a <= Activation::kIdentity; }

// exp(x): 2^n e^r with the nearest n and |r| <= ln(2) / 2, e^r by as many terms of its series as T
// has digits for. Infinite where T is; the smallest normal number below that.
template <class V>
MNV2_INLINE V exponential(V x) {
  using T = typename V::T;
  constexpr bool kFloat = sizeof(T) == 4;
  constexpr T kLowest = kFloat ? -87 : -708, kHighest = kFloat ? 89 : 710;
  // Added to n, it leaves n in the lowest bits of the sum.
  constexpr T kMagic = kFloat ? T(0x1.8p23) : T(0x1.8p52);
  // ln(2) in two parts, n times the first of which is exact.
  constexpr T kLn2High = kFloat ? T(0x1.63p-1) : T(0x1.62e42feep-1);
  constexpr T kLn2Low = kFloat ? T(-0x1.bd0105c610ca8p-13) : T(0x1.a39ef35793c76p-33);
  constexpr int kTerms = kFloat ? 7 : 13;
  const V t = clamp(x, V::set1(kLowest), V::set1(kHighest));
  const V bits = V::fma(t, V::set1(T(0x1.71547652b82fep0)), V::set1(kMagic));
  const V n = V::add(bits, V::set1(-kMagic));
  const V r = V::fma(n, V::set1(-kLn2Low), V::fma(n, V::set1(-kLn2High), t));
  V sum = V::set1(1);
  for (int i = kTerms; i > 0; --i)  // 1 + r / i * sum
    sum = V::fma(multiplied(r, V::set1(T(1) / T(i))), sum, V::set1(1));
  return multiplied(sum, V::power_of_two(bits));
}
template <class V>
MNV2_INLINE V one_plus_exp_of_minus(V v) {
  return V::add(V::set1(1), exponential(multiplied(v, V::set1(-1))));
}
template <class V>
MNV2_INLINE V hardsigmoid(V v) {
  using T = typename V::T;
  return multiplied(relu6(V::add(v, V::set1(3))), V::set1(T(1) / T(6)));
}

template <class V>
MNV2_INLINE V activated(V v, Activation a) {
  using T = typename V::T;
  if (a == Activation::kHardswish) return multiplied(v, hardsigmoid(v));
  if (a == Activation::kSilu) return V::div(v, one_plus_exp_of_minus(v));
  const Clip<T> clip(a);
  return clamp(v, V::set1(clip.low), V::set1(clip.high));
}

// Calls f(begin, count) over [0, total) in near-equal pieces of at most `most`.
template <class F>
MNV2_INLINE void for_pieces(int64_t total, int64_t most, F f) {
  const int64_t pieces = ceil_div(total, most);
  for (int64_t i = 0, begin = 0; i < pieces; ++i) {
    const int64_t count = (total - begin) / (pieces - i);
    f(begin, int(count));
    begin += count;
  }
}

// Pointers to a tile's pixels. Filled by whole vectors: a run of pixels writes kMostRows of them, and
// the next run of the same tile writes over those that are not its own.
template <class P>
struct Pixels {
  P* at[2 * kMostRows];

  MNV2_INLINE P* operator[](int i) const { return at[i]; }
  MNV2_INLINE void fill(int begin, P* first, int64_t step) {
    for (int i = 0; i < kMostRows; ++i) at[begin + i] = first + i * step;
  }
};

// f(0), ..., f(N - 1) with compile-time indices: a loop would leave arrays of vectors on the stack.
template <int N, class F>
MNV2_INLINE void unrolled(F f) {
  [&]<int... I>(std::integer_sequence<int, I...>) MNV2_INLINE_LAMBDA {
    (f(std::integral_constant<int, I>{}), ...);
  }(std::make_integer_sequence<int, N>{});
}

// Elements of S and how V multiplies them. kDepth neighbouring ones make up one lane of a factor;
// kParts multiply-adds go over them.
template <class V, class S>
struct Elements;
template <class V>
struct Elements<V, typename V::T> {
  using T = typename V::T;
  static constexpr int kParts = 1;
  static MNV2_INLINE V load(const T* p) { return V::load(p); }
  static MNV2_INLINE V load_partial(const T* p, int64_t n) { return V::load_partial(p, n); }
  static MNV2_INLINE void store(V v, T* p) { v.store(p); }
  static MNV2_INLINE void store_partial(V v, T* p, int64_t n) { v.store_partial(p, n); }
  template <int>
  static MNV2_INLINE V value(const T* p) {
    return V::set1(*p);
  }
  template <int>
  static MNV2_INLINE V weights(const T* p) {
    return V::load(p);
  }
  static MNV2_INLINE V multiply_add(V value, V weights, V sum) {
    return V::fma(value, weights, sum);
  }
};
#ifdef MNV2_BFLOAT16
template <class V>
struct Elements<V, BFloat16> : Bf16<V> {};
#endif

// Of the vectors at `count` places, `step` elements apart.
template <class V, class S, class F>
MNV2_INLINE void transform(S* p, int64_t count, int64_t step, F f) {
  for (int64_t i = 0; i < count; ++i, p += step)
    Elements<V, S>::store(f(Elements<V, S>::load(p)), p);
}
// Hardswish or SiLU, in place.
template <class V, class S>
__attribute__((noinline)) void activate(S* p, int64_t count, int64_t step, Activation a) {
  if (a == Activation::kHardswish)
    transform<V>(p, count, step, [](V v) { return activated(v, Activation::kHardswish); });
  else
    transform<V>(p, count, step, [](V v) { return activated(v, Activation::kSilu); });
}

template <class S>
constexpr int64_t kDepth = depth<S>;

// Calls f(i, load, store) for the vectors of `count` elements of any kinds, the last of which may be
// partial.
template <class V, class F>
MNV2_INLINE void for_vectors(int64_t count, F f) {
  for (int64_t i = 0; i < count; i += V::kLanes) {
    const int64_t lanes = count - i;
    const auto load = [lanes]<class O>(const O* p) MNV2_INLINE_LAMBDA {
      return lanes >= V::kLanes ? Elements<V, O>::load(p) : Elements<V, O>::load_partial(p, lanes);
    };
    const auto store = [lanes]<class O>(V v, O* p) MNV2_INLINE_LAMBDA {
      lanes >= V::kLanes ? Elements<V, O>::store(v, p) : Elements<V, O>::store_partial(v, p, lanes);
    };
    f(i, load, store);
  }
}

// What a kernel fetches into L2 while it multiplies: `step` bytes on with every term.
struct Fetch {
  const char* from;
  int64_t step;
};

// Memory to be read soon, handed out in equal shares to the kernels that run before. Weights come
// from beyond L2, each once per group: waited for, they would cost more than the arithmetic hides.
class Ahead {
 public:
  Ahead() = default;
  // `total` bytes in runs of `run`, their beginnings `pitch` apart, over this many kernel calls.
  Ahead(const void* from, int64_t total, int64_t run, int64_t pitch, int64_t calls)
      : from_(static_cast<const char*>(from)),
        left_(calls > 0 ? total : 0),
        run_(run),
        pitch_(pitch),
        share_(calls > 0 ? round_up(ceil_div(total, calls), 64) : 0) {}

  Fetch next(int64_t terms) {
    if (left_ <= 0) return {from_, 0};
    const int64_t done = done_;
    done_ += share_;
    left_ -= share_;
    return {from_ + done / run_ * pitch_ + done % run_, ceil_div(share_, terms)};
  }

 private:
  const char* from_ = nullptr;
  int64_t left_ = 0, done_ = 0, run_ = 1, pitch_ = 0, share_ = 0;
};

// Vector j of a panel-major buffer, whose lanes are kDeep elements, starts at this element.
template <class V, int64_t kDeep = 1>
MNV2_INLINE int64_t vector_offset(int64_t vector, int64_t panel_stride) {
  constexpr int64_t kPerPanel = kPanel / V::kLanes;
  return vector / kPerPanel * panel_stride + vector % kPerPanel * V::kLanes * kDeep;
}

// acc[i][j] += sum over k of *a(i, k) * w[j][16 k]
template <class V, class S, int R, int N, class A>
MNV2_INLINE void multiply(V (&acc)[R][N], const A& a, const S* const (&w)[N], int64_t terms,
                          Fetch& fetch) {
  using E = Elements<V, S>;
#pragma GCC unroll 4
  for (int64_t k = 0; k + kDepth<S> <= terms; k += kDepth<S>) {
    __builtin_prefetch(fetch.from, 0, 2);
    fetch.from += fetch.step;
    unrolled<E::kParts>([&](auto part) MNV2_INLINE_LAMBDA {
      using Factor = decltype(E::template weights<part>(w[0]));
      Factor row[N];
      unrolled<N>([&](auto j) MNV2_INLINE_LAMBDA {
        row[j] = E::template weights<part>(w[j] + k * kPanel);
      });
      unrolled<R>([&](auto i) MNV2_INLINE_LAMBDA {
        const Factor value = E::template value<part>(a(i, k));
        unrolled<N>([&](auto j) MNV2_INLINE_LAMBDA {
          acc[i][j] = E::multiply_add(value, row[j], acc[i][j]);
        });
      });
    });
  }
  if constexpr (kDepth<S> > 1) {
    if (terms % kDepth<S> == 0) return;
    // One element is left: what lies behind it is not its neighbour.
    unrolled<R>([&](auto i) MNV2_INLINE_LAMBDA {
      const S pair[2] = {*a(i, terms - 1), S{}};
      unrolled<E::kParts>([&](auto part) MNV2_INLINE_LAMBDA {
        const auto value = E::template value<part>(pair);
        unrolled<N>([&](auto j) MNV2_INLINE_LAMBDA {
          const auto row = E::template weights<part>(w[j] + (terms - 1) * kPanel);
          acc[i][j] = E::multiply_add(value, row, acc[i][j]);
        });
      });
    });
  }
}

// The most terms that one accumulator sums: past it, every further term would be rounded to the size
// of a long sum. Of a linear layer fewer, since torch's product of a vector has many short sums, too.
constexpr int64_t kLongestSum = 160, kLongestLinearSum = 16;

// A 1x1 product: pixels x vectors of channels.
template <class S, class T = Compute<S>>
struct Product {
  Pixels<const S> x;
  const S* weights;  // [channels/16][C_in][16]
  const T* bias;     // [channels]
  int64_t in_channels;
  int64_t vector;  // first vector of this tile
  Fetch fetch{};
  int64_t longest = kLongestSum;
};

// Its results, stored as O.
template <class S, class O>
struct ExpandTile : Product<S> {
  Pixels<O> expanded;            // where each pixel's first vector goes
  int64_t panel;                 // elements between panels of `expanded`
  Compute<S> low = 0, high = 6;  // of the activation
};

template <class V, class S, int N>
MNV2_INLINE void weight_rows(const Product<S>& t, const S* (&w)[N]) {
  const int64_t panel = round_up(t.in_channels, kDepth<S>) * kPanel;
  unrolled<N>([&](auto j) MNV2_INLINE_LAMBDA {
    w[j] = t.weights + vector_offset<V, kDepth<S>>(t.vector + j, panel);
  });
}

// acc[i][j] += sum over k of x[i][k] * w[j][16 k], in chunks. By way of memory, where acc is no
// array of registers, and in a function of its own: kernels without such sums must not pay for them.
template <class V, class S, int R, int N>
__attribute__((noinline)) void chunk_sums(const Product<S>& t, typename V::T* sums) {
  const S* w[N];
  weight_rows<V, S, N>(t, w);
  Fetch fetch = t.fetch;
  for (int64_t k = 0; k < t.in_channels; k += t.longest) {
    const int64_t left = t.in_channels - k;
    V acc[R][N];
    unrolled<R>([&](auto i) MNV2_INLINE_LAMBDA {
      unrolled<N>([&](auto j) MNV2_INLINE_LAMBDA { acc[i][j] = V::set1(0); });
    });
    const S* x[R];
    unrolled<R>([&](auto i) MNV2_INLINE_LAMBDA { x[i] = t.x[i] + k; });
    const auto value = [&](auto i, int64_t c) MNV2_INLINE_LAMBDA { return x[i] + c; };
    multiply<V, S, R, N>(acc, value, w, left < t.longest ? left : t.longest, fetch);
    unrolled<R>([&](auto i) MNV2_INLINE_LAMBDA {
      unrolled<N>([&](auto j) MNV2_INLINE_LAMBDA {
        typename V::T* const p = sums + (i * N + j) * V::kLanes;
        V::add(V::load(p), acc[i][j]).store(p);
      });
    });
    unrolled<N>([&](auto j) MNV2_INLINE_LAMBDA { w[j] += t.longest * kPanel; });
  }
}
template <class V, class S, int R, int N>
MNV2_INLINE void sum_in_chunks(const Product<S>& t, V (&acc)[R][N]) {
  typename V::T sums[R * N * V::kLanes];
  unrolled<R>([&](auto i) MNV2_INLINE_LAMBDA {
    unrolled<N>([&](auto j)
                    MNV2_INLINE_LAMBDA { acc[i][j].store(sums + (i * N + j) * V::kLanes); });
  });
  chunk_sums<V, S, R, N>(t, sums);
  unrolled<R>([&](auto i) MNV2_INLINE_LAMBDA {
    unrolled<N>([&](auto j)
                    MNV2_INLINE_LAMBDA { acc[i][j] = V::load(sums + (i * N + j) * V::kLanes); });
  });
}

// kSum: adds the pixels up into expanded[0] instead of storing each.
template <class V, class S, class O, int R, int N, bool kSum>
void expand_tile(const ExpandTile<S, O>& t) {
  const S* w[N];
  const S* x[R];
  V acc[R][N];
  unrolled<R>([&](auto i) MNV2_INLINE_LAMBDA { x[i] = t.x[i]; });
  weight_rows<V, S, N>(t, w);
  unrolled<N>([&](auto j) MNV2_INLINE_LAMBDA {
    const V bias = V::load(t.bias + (t.vector + j) * V::kLanes);
    unrolled<R>([&](auto i) MNV2_INLINE_LAMBDA { acc[i][j] = bias; });
  });
  const auto value = [&](auto i, int64_t k) MNV2_INLINE_LAMBDA { return x[i] + k; };
  Fetch fetch = t.fetch;
  if (t.in_channels <= t.longest)
    multiply<V, S, R, N>(acc, value, w, t.in_channels, fetch);
  else
    sum_in_chunks<V, S, R, N>(t, acc);
  unrolled<N>([&](auto j) MNV2_INLINE_LAMBDA {
    const int64_t offset = vector_offset<V>(t.vector + j, t.panel);
    const V low = V::set1(t.low), high = V::set1(t.high);
    V sum = clamp(acc[0][j], low, high);
    unrolled<R>([&](auto i) MNV2_INLINE_LAMBDA {
      if constexpr (!kSum)
        Elements<V, O>::store(clamp(acc[i][j], low, high), t.expanded[i] + offset);
      else if constexpr (i > 0)
        sum = V::add(sum, clamp(acc[i][j], low, high));
    });
    if constexpr (kSum) Elements<V, O>::store(sum, t.expanded[0] + offset);
  });
}

template <class S, class T = Compute<S>>
struct StemTile {
  const S* patch;     // first value under the first pixel, [rows][cols][channels]
  int64_t patch_row;  // elements
  int64_t channels;   // of the patch: C_in up to a multiple of kDepth
  T* expanded;        // where the first pixel's first vector goes; the others follow it
  int64_t panel;      // elements between panels of `expanded`
  const S* weights;   // [group/16][9 * channels][16]
  const T* bias;      // [group]
  int64_t vector;     // first vector of this tile
  Clip<T> clip{Activation::kRelu6};  // of the activation
  Fetch fetch{};
};

// kChannels: of the patch, when known beforehand: then no pixel needs a pointer of its own.
template <class V, class S, int R, int N, int kChannels>
void stem_tile(const StemTile<S>& t) {
  const S* w[N];
  V acc[R][N];
  const int64_t channels = kChannels ? kChannels : t.channels;
  const int64_t run = 3 * channels, step = kStemStride * channels;
  unrolled<N>([&](auto j) MNV2_INLINE_LAMBDA {
    w[j] = t.weights + vector_offset<V, kDepth<S>>(t.vector + j, 3 * run * kPanel);
    const V bias = V::load(t.bias + (t.vector + j) * V::kLanes);
    unrolled<R>([&](auto i) MNV2_INLINE_LAMBDA { acc[i][j] = bias; });
  });
  const S* patch = t.patch;
  Fetch fetch = t.fetch;
  const auto value = [&](auto i, int64_t k) MNV2_INLINE_LAMBDA { return patch + i * step + k; };
  for (int ky = 0; ky < 3; ++ky, patch += t.patch_row) {
    multiply<V, S, R, N>(acc, value, w, run, fetch);
    unrolled<N>([&](auto j) MNV2_INLINE_LAMBDA { w[j] += run * kPanel; });
  }
  unrolled<N>([&](auto j) MNV2_INLINE_LAMBDA {
    auto* const out = t.expanded + vector_offset<V>(t.vector + j, t.panel);
    const V low = V::set1(t.clip.low), high = V::set1(t.clip.high);
    unrolled<R>([&](auto i)
                    MNV2_INLINE_LAMBDA { clamp(acc[i][j], low, high).store(out + i * kPanel); });
  });
}

template <class S, class T = Compute<S>>
struct ProjectTile {
  const S* panels;     // [terms/16][band pixels][16]
  const S* depthwise;  // of them, the first pixel
  int64_t panel;       // elements between its panels
  const S* weights;    // this group's first row of the tile's first panel, [..][E][16]
  int64_t hidden;      // E
  int64_t terms;       // expanded channels in this group
  Pixels<T> sum;       // where the sums so far lie, at the tile's first channel: in y, or aside
  Pixels<S> y;         // output pixels, if they are not the same
  Pixels<const S> x;   // what a residual adds to them
  const T* bias;       // what the first group's sum ends with, else null
  bool add_sum;        // after a further group: what lies at `sum` counts
  bool add_x;          // after the last group of a residual block
  bool finished;       // the result goes to y
  Clip<T> clip{Activation::kIdentity};  // of what is finished, by its activation
  int64_t lanes;                        // valid lanes, when partial
  int64_t half;                         // channel offset inside the first panel
  Fetch fetch{};
};

template <class V, class S, int R, int N, bool kPartial>
void project_tile(const ProjectTile<S>& t) {
  const auto load = [&]<class O>(const O* p) MNV2_INLINE_LAMBDA {
    if constexpr (kPartial) return Elements<V, O>::load_partial(p, t.lanes);
    return Elements<V, O>::load(p);
  };
  const auto store = [&]<class O>(V v, O* p) MNV2_INLINE_LAMBDA {
    if constexpr (kPartial)
      Elements<V, O>::store_partial(v, p, t.lanes);
    else
      Elements<V, O>::store(v, p);
  };
  const S* w[N];
  V acc[R][N];
  unrolled<N>([&](auto j) MNV2_INLINE_LAMBDA {
    w[j] = t.weights + vector_offset<V, kDepth<S>>(j + t.half / V::kLanes, t.hidden * kPanel);
    unrolled<R>([&](auto i) MNV2_INLINE_LAMBDA { acc[i][j] = V::set1(0); });
  });
  const S* depthwise = t.depthwise;
  const auto value = [&](auto i, int64_t c)
                         MNV2_INLINE_LAMBDA { return depthwise + i * kPanel + c; };
  int64_t left = t.terms;
  Fetch fetch = t.fetch;
  for (; left >= kPanel; left -= kPanel, depthwise += t.panel) {
    multiply<V, S, R, N>(acc, value, w, kPanel, fetch);
    unrolled<N>([&](auto j) MNV2_INLINE_LAMBDA { w[j] += kPanel * kPanel; });
  }
  multiply<V, S, R, N>(acc, value, w, left / kDepth<S> * kDepth<S>, fetch);
  unrolled<R>([&](auto i) MNV2_INLINE_LAMBDA {
    unrolled<N>([&](auto j) MNV2_INLINE_LAMBDA {
      V y = acc[i][j];
      if (t.bias) y = V::add(y, load(t.bias + j * V::kLanes));
      if (t.add_sum) y = V::add(y, load(t.sum[i] + j * V::kLanes));
      y = clamp(y, V::set1(t.clip.low), V::set1(t.clip.high));
      if (t.add_x) y = V::add(y, load(t.x[i] + j * V::kLanes));
      if constexpr (kDepth<S> == 1)
        store(y, t.sum[i] + j * V::kLanes);
      else if (t.finished)
        store(y, t.y[i] + j * V::kLanes);
      else
        store(y, t.sum[i] + j * V::kLanes);
    });
  });
}

// One row of depthwise outputs, one vector of channels.
template <class V, class O, class T = typename V::T>
struct DepthwiseRow {
  // Expanded rows under the kernel's, at the first output's first tap. Dilated, at the first column in
  // the image, and null for rows outside.
  const T* rows[5];
  const T* weights;  // [taps][16]
  const T* bias;
  O* out;
  Activation activation;  // of the outputs, and what they are multiplied by then
  const T* gate;          // or null
  int64_t dilation;
  int64_t left,
      in_image;  // dilated: from the first tap to the first column in the image, and those
};

// What becomes of the sums of C outputs from `first` on.
template <class V, int C, class O>
MNV2_INLINE void store_cols(const DepthwiseRow<V, O>& t, int64_t first, const V (&acc)[C]) {
  const Clip<typename V::T> clip(t.activation);
  const V low = V::set1(clip.low), high = V::set1(clip.high);
  O* const out = t.out + first * kPanel;
  if (is_clip(t.activation) && !t.gate) {
    unrolled<C>([&](auto c) MNV2_INLINE_LAMBDA {
      Elements<V, O>::store(clamp(acc[c], low, high), out + c * kPanel);
    });
  } else {
    typename V::T results[C * V::kLanes];
    unrolled<C>([&](auto c) MNV2_INLINE_LAMBDA {
      clamp(acc[c], low, high).store(results + c * V::kLanes);
    });
    if (!is_clip(t.activation)) activate<V>(results, C, V::kLanes, t.activation);
    const V gate = t.gate ? V::load(t.gate) : V::set1(1);
    for (int64_t c = 0; c < C; ++c)
      Elements<V, O>::store(multiplied(V::load(results + c * V::kLanes), gate), out + c * kPanel);
  }
}

// C outputs from `first` on: all taps from K expanded rows.
template <class V, int K, int S, int C, class O>
MNV2_INLINE void depthwise_cols(const DepthwiseRow<V, O>& t, int64_t first, V bias) {
  V acc[C];
  unrolled<C>([&](auto c) MNV2_INLINE_LAMBDA { acc[c] = bias; });
  unrolled<K>([&](auto ky) MNV2_INLINE_LAMBDA {
    V tap[K];
    unrolled<K>([&](auto kx)
                    MNV2_INLINE_LAMBDA { tap[kx] = V::load(t.weights + (ky * K + kx) * kPanel); });
    unrolled<(C - 1) * S + K>([&](auto i) MNV2_INLINE_LAMBDA {
      V v = V::load(t.rows[ky] + (first * S + i) * kPanel);
      // One load for up to K products: left to itself, the compiler makes it an operand of each.
      asm volatile("" : V_KEEP(v.v));
      unrolled<K>([&](auto kx) MNV2_INLINE_LAMBDA {
        constexpr int kFirst = decltype(i)::value - decltype(kx)::value, kOut = kFirst / S;
        if constexpr (kFirst >= 0 && kFirst % S == 0 && kOut < C)
          acc[kOut] = V::fma(v, tap[kx], acc[kOut]);
      });
    });
  });
  store_cols<V, C>(t, first, acc);
}

// The same dilated, tap by tap, without those outside the image: far apart, most of them may be.
template <class V, int K, int C, class O>
MNV2_INLINE void dilated_cols(const DepthwiseRow<V, O>& t, int64_t first, V bias) {
  V acc[C];
  unrolled<C>([&](auto c) MNV2_INLINE_LAMBDA { acc[c] = bias; });
  for (int64_t tap = 0; tap < K * K; ++tap) {
    const typename V::T* const row = t.rows[tap / K];
    const int64_t from = first + tap % K * t.dilation - t.left;
    if (!row || from + C <= 0 || from >= t.in_image) continue;
    const V weight = V::load(t.weights + tap * kPanel);
    const bool all = from >= 0 && from + C <= t.in_image;
    unrolled<C>([&](auto c) MNV2_INLINE_LAMBDA {
      if (all || (from + c >= 0 && from + c < t.in_image))
        acc[c] = V::fma(V::load(row + (from + c) * kPanel), weight, acc[c]);
    });
  }
  store_cols<V, C>(t, first, acc);
}

// S: stride, 0 for a dilated row.
template <class V, int K, int S, class O>
void depthwise_row(const DepthwiseRow<V, O>& t, int64_t cols) {
  const V bias = V::load(t.bias);
  const auto run = [&](auto c, int64_t col) MNV2_INLINE_LAMBDA {
    if constexpr (S == 0)
      dilated_cols<V, K, c>(t, col, bias);
    else
      depthwise_cols<V, K, S, c>(t, col, bias);
  };
  int64_t col = 0;
  for (; cols - col >= kDepthwiseCols; col += kDepthwiseCols)
    run(std::integral_constant<int, kDepthwiseCols>{}, col);
  unrolled<kDepthwiseCols - 1>([&](auto c) MNV2_INLINE_LAMBDA {
    if (cols - col == c + 1) run(std::integral_constant<int, c + 1>{}, col);
  });
}

template <class V, class O>
void depthwise_row(const DepthwiseRow<V, O>& t, const BlockShape& s, int64_t cols) {
  if (s.dilation > 1)
    s.kernel == 3 ? depthwise_row<V, 3, 0>(t, cols) : depthwise_row<V, 5, 0>(t, cols);
  else if (s.kernel == 3)
    s.stride == 1 ? depthwise_row<V, 3, 1>(t, cols) : depthwise_row<V, 3, 2>(t, cols);
  else
    s.stride == 1 ? depthwise_row<V, 5, 1>(t, cols) : depthwise_row<V, 5, 2>(t, cols);
}

// Function tables over the number of rows: entry r - 1 handles r pixels.
template <class V, class S, class O, int N, bool kSum, int... R>
auto expand_table(std::integer_sequence<int, R...>) {
  static constexpr decltype(&expand_tile<V, S, O, 1, N, kSum>) kTable[] = {
      &expand_tile<V, S, O, R + 1, N, kSum>...};
  return kTable;
}
template <class V, class S, int N, int kChannels, int... R>
auto stem_table(std::integer_sequence<int, R...>) {
  static constexpr decltype(&stem_tile<V, S, 1, N, kChannels>) kTable[] = {
      &stem_tile<V, S, R + 1, N, kChannels>...};
  return kTable;
}
template <class V, class S, int N, bool kPartial, int... R>
auto project_table(std::integer_sequence<int, R...>) {
  static constexpr decltype(&project_tile<V, S, 1, N, kPartial>) kTable[] = {
      &project_tile<V, S, R + 1, N, kPartial>...};
  return kTable;
}
template <class V, int N>
using Rows = std::make_integer_sequence<int, max_rows<V>(N)>;

// Calls f(std::integral_constant<int, n>) for a run-time n in [1, kMaxVectors].
template <class V, class F>
MNV2_INLINE void with_vectors(int n, F f) {
  if constexpr (kMaxVectors<V> == 4) {
    if (n == 4) return f(std::integral_constant<int, 4>{});
    if (n == 3) return f(std::integral_constant<int, 3>{});
  }
  if (n == 2) return f(std::integral_constant<int, 2>{});
  return f(std::integral_constant<int, 1>{});
}

// One tile of one image: where it lies and the scratch it works in.
//
// It works down the image in bands of output rows. The expanded rows of one band lie in a ring: those
// that the next band needs, too, stay, and no row is computed twice.
template <class V, class S>
class Tile {
  using T = typename V::T;
  static constexpr int64_t kBytes = sizeof(S);

 public:
  Tile(const BlockArgs<S>& args, const Plan& plan, int64_t task, T* scratch)
      : a_(args), s_(args.shape), plan_(plan), expanded_(scratch) {
    sum_ = scratch + plan.expanded_elements(s_);
    total_ = sum_ + plan.sum_elements(s_);
    depthwise_ = reinterpret_cast<S*>(total_ + plan.total_elements(s_));
    patch_ = depthwise_ + plan.depthwise_elements();
    const int64_t across = plan.tiles_across(s_), down = plan.tiles_down(s_);
    split_ = task % plan.splits;
    task /= plan.splits;
    const int64_t image = task / (across * down);
    row_ = task / across % down * plan.tile_rows;
    col_ = task % across * plan.tile_cols;
    rows_ = least(plan.tile_rows, s_.out_height() - row_);
    cols_ = least(plan.tile_cols, s_.out_width() - col_);
    ring_ = plan.ring_rows(s_);
    const int64_t window = (cols_ - 1) * s_.stride + s_.extent();
    // The window of expanded pixels that lie inside the image.
    top_ = greatest(0, s_.pad_top - row_ * s_.stride);
    left_ = greatest(0, s_.pad_left - col_ * s_.stride);
    bottom_ =
        least((rows_ - 1) * s_.stride + s_.extent(), s_.height + s_.pad_top - row_ * s_.stride);
    right_ = least(window, s_.width + s_.pad_left - col_ * s_.stride);
    first_ = s_.dilation > 1 ? left_ : 0;
    in_cols_ = s_.dilation > 1 ? right_ - left_ : window;
    x_ = args.x + image * args.x_image;
    if (s_.expand != Expand::kStem)
      x_ += (row_ * s_.stride - s_.pad_top) * args.x_row +
            (col_ * s_.stride - s_.pad_left) * args.x_col;
    out_ = ((image * s_.out_height() + row_) * s_.out_width() + col_) * s_.out_channels;
    panel_ = ring_ * in_cols_ * kPanel;
    if (args.gate && args.pass == Pass::kLast) gate_ = args.gate + image * s_.hidden_channels;
    const int64_t hidden = s_.hidden_panels() * kPanel;
    if (args.kept)
      kept_ =
          args.kept + ((image * s_.out_height() + row_) * s_.out_width() + col_ * rows_) * hidden;
    if (args.pass == Pass::kPool)
      pooled_ = args.pooled +
                ((image * s_.out_height() + row_) * across + col_ / plan.tile_cols) * hidden;
  }

  void run() {
    const bool expands = !kept_ || a_.pass == Pass::kPool;
    if (expands) clear_columns();
    const int64_t groups = plan_.groups(s_), splits = plan_.splits;
    const int64_t last_group = groups * (split_ + 1) / splits - 1;
    for (int64_t g = groups * split_ / splits; g <= last_group; ++g) {
      const int64_t first = g * plan_.group;
      const int64_t channels = least(plan_.group, s_.hidden_channels - first);
      y_ = a_.y + out_;
      sums_row_ = s_.out_width() * s_.out_channels;
      if (splits > 1) {
        sums_ = a_.partial + g * s_.out_elements() + out_;
      } else if constexpr (kDepth<S> == 1) {
        sums_ = y_;
      } else {
        sums_ = total_;
        sums_row_ = cols_ * s_.out_channels;
      }
      for (int64_t row = 0, done = 0; row < rows_; row += plan_.band_rows) {
        const int64_t band = least(plan_.band_rows, rows_ - row);
        const int64_t needed = (row + band - 1) * s_.stride + s_.extent();
        if (kept_) depthwise_ = kept_ + (first * rows_ + row * round_up(channels, kPanel)) * cols_;
        if (!expands) {
          multiply_by_gate(first, channels, band);
          ahead_ = {};
          project(first, channels, row, band);
          continue;
        }
        run_band(first, channels, row, band, done, needed, g == last_group);
        done = needed;
      }
    }
  }

 private:
  static int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
  static int64_t greatest(int64_t a, int64_t b) { return a > b ? a : b; }

  // Output rows [row, row + band), after expanding rows [from, to).
  void run_band(int64_t first, int64_t channels, int64_t row, int64_t band, int64_t from,
                int64_t to, bool last_group) {
    clear_rows(channels, from, to);
    from = greatest(from, top_);
    to = least(to, bottom_);
    if (s_.expand == Expand::kStem && from < to) fill_patch(from, to);
    const int64_t vectors = ceil_div(channels, kPanel) * (kPanel / V::kLanes);
    ahead_ = before_project(first, channels, row, band, calls(vectors, (to - from) * in_cols_));
    for_pieces(vectors, kMaxVectors<V>, [&](int64_t vector, int n) {
      if (from < to) expand_vectors(first, channels, vector, n, from, to);
      // While these channels are in L1.
      depthwise(first, vector, least(vector + n, ceil_div(channels, V::kLanes)), row, band);
    });
    if (a_.pass == Pass::kPool) return pool(first, channels, row, band);
    const int64_t out_vectors = ceil_div(s_.out_channels, V::kLanes);
    ahead_ =
        before_next(first + channels, row + band, to, last_group, calls(out_vectors, band * cols_));
    project(first, channels, row, band);
  }

  // What the project stage of this band reads first: its weights, or where they are known its outputs.
  Ahead before_project(int64_t first, int64_t channels, int64_t row, int64_t band,
                       int64_t calls) const {
    if (row == 0) {
      const int64_t run = channels * kPanel * kBytes;
      return {a_.w_project + first * kPanel, ceil_div(s_.out_channels, kPanel) * run, run,
              s_.hidden_channels * kPanel * kBytes, calls};
    }
    const int64_t y_row = s_.out_width() * s_.out_channels, run = cols_ * s_.out_channels * kBytes;
    return {y_ + row * y_row, band * run, run, y_row * kBytes, calls};
  }

  // What the stage after a band's project stage reads first: x of the next band, whose window begins
  // at row `from`, or the weights of the next group or layer.
  Ahead before_next(int64_t channel, int64_t row, int64_t from, bool last_group,
                    int64_t calls) const {
    if (row < rows_) {
      const int64_t to =
          least((least(row + plan_.band_rows, rows_) - 1) * s_.stride + s_.extent(), bottom_);
      if (s_.expand != Expand::kStem) {
        const int64_t run = (right_ - left_) * a_.x_col * kBytes;
        return {x_ + from * a_.x_row + left_ * a_.x_col, (to - from) * run, run, a_.x_row * kBytes,
                calls};
      }
      const int64_t first = (row_ * s_.stride - s_.pad_top + from) * kStemStride;
      const int64_t rows = least((to - from) * kStemStride, s_.image_height - first);
      const int64_t run = rows * a_.x_row * kBytes;
      const int64_t planes = a_.x_channel == 1 ? 1 : s_.in_channels;
      return {x_ + first * a_.x_row, planes * run, run, a_.x_channel * kBytes, calls};
    }
    if (last_group) return {a_.next, a_.next_bytes, a_.next_bytes, 0, calls};
    const int64_t terms = s_.expand_terms(kDepth<S>);
    const int64_t bytes =
        least(plan_.group, s_.hidden_panels() * kPanel - channel) * terms * kBytes;
    return {a_.w_expand + channel * terms, bytes, bytes, 0, calls};
  }

  // About how many kernel calls it takes to multiply this many vectors of channels and pixels.
  static int64_t calls(int64_t vectors, int64_t pixels) {
    const int64_t pieces = ceil_div(vectors, kMaxVectors<V>);
    return pieces * ceil_div(pixels, max_rows<V>(int(ceil_div(vectors, pieces))));
  }

  void expand_vectors(int64_t first, int64_t channels, int64_t vector, int n, int64_t from,
                      int64_t to) {
    switch (s_.expand) {
      case Expand::kNone:
        return copy(first, channels, vector, n, from, to);
      case Expand::kPointwise:
        return expand(first, vector, n, from, to);
      case Expand::kStem:
        return expand_stem(first, vector, n, from, to);
    }
  }

  // Where row r of the window lies in a panel of the ring.
  int64_t ring_offset(int64_t r) const { return r % ring_ * in_cols_ * kPanel; }

  static void clear(T* p, int64_t pixels) {
    for (int64_t i = 0; i < pixels * kPanel; i += V::kLanes) V::set1(0).store(p + i);
  }
  // Expanded pixels outside the image are 0: for every group, as the expansion never writes them, ...
  void clear_columns() {
    const int64_t panels = least(plan_.group / kPanel, s_.hidden_panels());
    if (right_ - left_ == in_cols_) return;
    for (int64_t i = 0; i < panels * ring_; ++i) {
      T* const row = expanded_ + i * in_cols_ * kPanel;
      clear(row, left_);
      clear(row + right_ * kPanel, in_cols_ - right_);
    }
  }
  // ... or until the ring comes round to this row.
  void clear_rows(int64_t channels, int64_t from, int64_t to) {
    if (s_.dilation > 1) return;
    for (int64_t r = from; r < to; ++r)
      if (r < top_ || r >= bottom_)
        for (int64_t panel = 0; panel < ceil_div(channels, kPanel); ++panel)
          clear(expanded_ + panel * panel_ + ring_offset(r), in_cols_);
  }

  // The next pixels of the window in row order.
  struct Cursor {
    int64_t row, col;
    const S* x;   // of this pixel
    T* expanded;  // of this pixel
  };
  Cursor cursor(int64_t row) const {
    return {row, left_, x_ + row * a_.x_row + left_ * a_.x_col,
            expanded_ + ring_offset(row) + (left_ - first_) * kPanel};
  }
  void next_pixels(Cursor& at, int count, ExpandTile<S, T>& t) const {
    for (int i = 0; i < count;) {
      t.x.fill(i, at.x, a_.x_col);
      t.expanded.fill(i, at.expanded, kPanel);
      const int64_t run = least(count - i, right_ - at.col);
      i += int(run);
      at.col += run;
      at.x += run * a_.x_col;
      at.expanded += run * kPanel;
      if (at.col == right_) at = cursor(at.row + 1);
    }
  }

  void expand(int64_t first, int64_t vector, int n, int64_t from, int64_t to) {
    ExpandTile<S, T> t;
    t.panel = panel_;
    t.weights = a_.w_expand + first * s_.expand_terms(kDepth<S>);
    t.bias = a_.b_expand + first;
    t.in_channels = s_.in_channels;
    t.vector = vector;
    const Clip<T> clip(s_.activation);
    t.low = clip.low;
    t.high = clip.high;
    with_vectors<V>(n, [&](auto N) {
      const auto table = expand_table<V, S, T, N, false>(Rows<V, N>{});
      Cursor at = cursor(from);
      for_pieces((to - from) * (right_ - left_), max_rows<V>(N), [&](int64_t, int rows) {
        next_pixels(at, rows, t);
        t.fetch = ahead_.next(t.in_channels);
        table[rows - 1](t);
      });
    });
    activate_rows(vector, n, from, to, s_.activation);
  }

  // Of expanded rows [from, to), where clipping was not all.
  void activate_rows(int64_t vector, int n, int64_t from, int64_t to, Activation activation) {
    if (is_clip(activation)) return;
    for (int64_t v = vector; v < vector + n; ++v)
      for (int64_t row = from; row < to; ++row)
        activate<V>(
            expanded_ + vector_offset<V>(v, panel_) + ring_offset(row) + (left_ - first_) * kPanel,
            right_ - left_, kPanel, activation);
  }

  // The image under rows [from, to) of the window: what the stem's taps reach.
  void fill_patch(int64_t from, int64_t to) {
    const int64_t channels = patch_channels();
    const int64_t rows = (to - from - 1) * kStemStride + 3;
    const int64_t cols = (right_ - left_ - 1) * kStemStride + 3;
    const int64_t first_row = (row_ * s_.stride - s_.pad_top + from) * kStemStride - 1;
    const int64_t first_col = (col_ * s_.stride - s_.pad_left + left_) * kStemStride - 1;
    const int64_t begin = greatest(0, -first_col), end = least(cols, s_.image_width - first_col);
    patch_row_ = cols * channels;
    for (int64_t r = 0; r < rows; ++r) {
      S* out = patch_ + r * patch_row_;
      const int64_t row = first_row + r;
      if (row < 0 || row >= s_.image_height) {
        std::memset(out, 0, size_t(patch_row_) * sizeof(S));
        continue;
      }
      std::memset(out, 0, size_t(begin * channels) * sizeof(S));
      std::memset(out + end * channels, 0, size_t((cols - end) * channels) * sizeof(S));
      const S* x = x_ + row * a_.x_row + (first_col + begin) * a_.x_col;
      fill_pixels(x, end - begin, out + begin * channels);
    }
  }
  int64_t patch_channels() const { return round_up(s_.in_channels, kDepth<S>); }

  // `count` pixels' channels side by side, with zeros behind an odd number of BFloat16.
  void fill_pixels(const S* x, int64_t count, S* out) const {
    constexpr int64_t kRgb = round_up(3, kDepth<S>);
    const int64_t channels = patch_channels();
    if (a_.x_channel == 1 && a_.x_col == channels && s_.in_channels == channels) {
      std::memcpy(out, x, size_t(count * channels) * sizeof(S));
    } else if (s_.in_channels == 3 && a_.x_col == 1) {
      const S *g = x + a_.x_channel, *b = g + a_.x_channel;
      for (int64_t i = 0; i < count; ++i, out += kRgb) {
        out[0] = x[i];
        out[1] = g[i];
        out[2] = b[i];
        if constexpr (kRgb > 3) out[3] = S{};
      }
    } else if (kRgb == 4 && s_.in_channels == 3 && a_.x_col == 3 && a_.x_channel == 1) {
      // Four at a time; the fourth belongs to the next pixel.
      for (int64_t i = 0; i + 1 < count; ++i, out += 4, x += 3) {
        std::memcpy(out, x, 4 * sizeof(S));
        out[3] = S{};
      }
      std::memcpy(out, x, 3 * sizeof(S));
      out[3] = S{};
    } else {
      for (int64_t i = 0; i < count; ++i, x += a_.x_col)
        for (int64_t c = 0; c < channels; ++c)
          *out++ = c < s_.in_channels ? x[c * a_.x_channel] : S{};
    }
  }

  void expand_stem(int64_t first, int64_t vector, int n, int64_t from, int64_t to) {
    StemTile<S> t;
    t.clip = Clip<T>(s_.stem_activation);
    t.patch_row = patch_row_;
    t.channels = patch_channels();
    t.panel = panel_;
    t.weights = a_.w_expand + first * s_.expand_terms(kDepth<S>);
    t.bias = a_.b_expand + first;
    t.vector = vector;
    constexpr int kRgb = round_up(3, kDepth<S>);
    const int64_t step = kStemStride * t.channels;
    with_vectors<V>(n, [&](auto N) {
      const auto table = t.channels == kRgb ? stem_table<V, S, N, kRgb>(Rows<V, N>{})
                                            : stem_table<V, S, N, 0>(Rows<V, N>{});
      for (int64_t row = from; row < to; ++row)
        for_pieces(right_ - left_, max_rows<V>(N), [&](int64_t col, int count) {
          t.patch = patch_ + (row - from) * kStemStride * patch_row_ + col * step;
          t.expanded = expanded_ + ring_offset(row) + (left_ - first_ + col) * kPanel;
          t.fetch = ahead_.next(9 * t.channels);
          table[count - 1](t);
        });
    });
    activate_rows(vector, n, from, to, s_.stem_activation);
  }

  // No expansion: x itself, panel by panel, with zeros past the last channel.
  void copy(int64_t first, int64_t channels, int64_t vector, int n, int64_t from, int64_t to) {
    for (int64_t row = from; row < to; ++row)
      for (int64_t v = vector; v < vector + n; ++v) {
        const int64_t c = v * V::kLanes, lanes = channels - c;
        if (lanes <= 0) break;
        const S* x = x_ + row * a_.x_row + left_ * a_.x_col + first + c;
        T* e =
            expanded_ + vector_offset<V>(v, panel_) + ring_offset(row) + (left_ - first_) * kPanel;
        for (int64_t col = left_; col < right_; ++col, x += a_.x_col, e += kPanel)
          (lanes >= V::kLanes ? In::load(x) : In::load_partial(x, lanes)).store(e);
      }
  }

  // Vectors [begin, end) of the group, output rows [row, row + band).
  void depthwise(int64_t first, int64_t begin, int64_t end, int64_t row, int64_t band) {
    DepthwiseRow<V, S> t{};
    t.activation = s_.activation;
    t.dilation = s_.dilation;
    t.left = left_;
    t.in_image = right_ - left_;
    for (int64_t v = begin; v < end; ++v) {
      t.weights = a_.w_depthwise + vector_offset<V>(first / V::kLanes + v, s_.taps() * kPanel);
      t.bias = a_.b_depthwise + first + v * V::kLanes;
      t.gate = gate_ ? gate_ + first + v * V::kLanes : nullptr;
      const T* in = expanded_ + vector_offset<V>(v, panel_);
      S* out = depthwise_ + vector_offset<V>(v, band * cols_ * kPanel);
      for (int64_t r = 0; r < band; ++r) {
        for (int64_t ky = 0; ky < s_.kernel; ++ky) {
          const int64_t line = (row + r) * s_.stride + ky * s_.dilation;
          const bool skipped = s_.dilation > 1 && (line < top_ || line >= bottom_);
          t.rows[ky] = skipped ? nullptr : in + ring_offset(line);
        }
        t.out = out + r * cols_ * kPanel;
        depthwise_row(t, s_, cols_);
      }
    }
  }

  // Sums of each row of the band, one for every channel.
  void pool(int64_t first, int64_t channels, int64_t row, int64_t band) {
    const int64_t pitch = plan_.tiles_across(s_) * s_.hidden_panels() * kPanel;
    for (int64_t v = 0; v < ceil_div(channels, V::kLanes); ++v) {
      const S* d = depthwise_ + vector_offset<V>(v, band * cols_ * kPanel);
      for (int64_t r = row; r < row + band; ++r) {
        V sum = V::set1(0);
        for (int64_t col = 0; col < cols_; ++col, d += kPanel) sum = V::add(sum, In::load(d));
        sum.store(pooled_ + r * pitch + first + v * V::kLanes);
      }
    }
  }

  void multiply_by_gate(int64_t first, int64_t channels, int64_t band) {
    for (int64_t v = 0; v < ceil_div(channels, V::kLanes); ++v) {
      const V gate = V::load(gate_ + first + v * V::kLanes);
      transform<V>(depthwise_ + vector_offset<V>(v, band * cols_ * kPanel), band * cols_, kPanel,
                   [&](V d) MNV2_INLINE_LAMBDA { return multiplied(d, gate); });
    }
  }

  // Output channels [channel, ...) of the band in pieces of at most `most` pixels: f(t, rows).
  template <class F>
  void project_pixels(ProjectTile<S>& t, int64_t first, int64_t channel, int64_t row, int64_t band,
                      bool aside, int most, F f) {
    t.weights = a_.w_project + channel / kPanel * s_.hidden_channels * kPanel + first * kPanel;
    t.half = channel % kPanel;
    t.bias = first == 0 ? a_.b_project + channel : nullptr;
    t.finished = plan_.splits == 1 && !aside && first + t.terms == s_.hidden_channels;
    t.clip = Clip<T>(t.finished ? s_.out_activation : Activation::kIdentity);
    t.add_x = s_.residual && t.finished && is_clip(s_.out_activation);
    int64_t r = row, c = 0;
    for_pieces(band * cols_, most, [&](int64_t pixel, int rows) {
      t.depthwise = t.panels + pixel * kPanel;
      const int64_t step = s_.out_channels;
      for (int i = 0; i < rows;) {
        if (aside)
          t.sum.fill(i, sum_ + (pixel + i) * step + channel, step);
        else
          t.sum.fill(i, sums_ + r * sums_row_ + c * step + channel, step);
        if constexpr (kDepth<S> > 1)
          t.y.fill(i, y_ + (r * s_.out_width() + c) * step + channel, step);
        if (t.add_x) t.x.fill(i, residual(r, c) + channel, a_.x_col);
        const int64_t run = least(rows - i, cols_ - c);
        i += int(run);
        c += run;
        if (c == cols_) {
          c = 0;
          ++r;
        }
      }
      t.fetch = ahead_.next(t.terms);
      f(rows);
    });
  }

  // x under output pixel (r, c), where they are of one size.
  const S* residual(int64_t r, int64_t c) const {
    return x_ + (r + s_.pad_top) * a_.x_row + (c + s_.pad_left) * a_.x_col;
  }

  void project(int64_t first, int64_t channels, int64_t row, int64_t band) {
    ProjectTile<S> t;
    t.panel = band * cols_ * kPanel;
    t.hidden = s_.hidden_channels;
    // A large group's channels in runs of a length that rounds well, whose sums are added up before
    // the groups' sums are: in their place, where there is nothing else yet.
    const bool aside = channels > kLongestProject && first != 0 && plan_.splits == 1;
    for_pieces(ceil_div(channels, kPanel), kLongestProject / kPanel,
               [&](int64_t panel, int panels) {
                 const int64_t begin = panel * kPanel;
                 t.panels = depthwise_ + panel * t.panel;
                 t.terms = least(panels * kPanel, channels - begin);
                 t.add_sum = begin != 0 || (first != 0 && plan_.splits == 1 && !aside);
                 project_terms(t, first + begin, row, band, aside);
               });
    const bool last = first + channels == s_.hidden_channels;
    if (aside) return add_sum(row, band, last);
    if (last && plan_.splits == 1 && !is_clip(s_.out_activation))
      for (int64_t r = row; r < row + band; ++r)
        for (int64_t col = 0; col < cols_; ++col) activate_output(r, col);
  }

  // y = activation of y (+ x).
  void activate_output(int64_t r, int64_t col) {
    S* const y = y_ + (r * s_.out_width() + col) * s_.out_channels;
    const S* const x = residual(r, col);
    for_vectors<V>(s_.out_channels, [&](int64_t c, auto load, auto store) MNV2_INLINE_LAMBDA {
      V v = activated(load(y + c), s_.out_activation);
      if (s_.residual) v = V::add(v, load(x + c));
      store(v, y + c);
    });
  }

  // The groups' sum += this group's (+ x, into y, after the last).
  void add_sum(int64_t row, int64_t band, bool last) {
    const int64_t out_channels = s_.out_channels;
    for (int64_t r = row; r < row + band; ++r)
      for (int64_t col = 0; col < cols_; ++col) {
        T* const sums = sums_ + r * sums_row_ + col * out_channels;
        S* const y = y_ + (r * s_.out_width() + col) * out_channels;
        const T* const sum = sum_ + ((r - row) * cols_ + col) * out_channels;
        const S* const x = residual(r, col);
        for_vectors<V>(out_channels, [&](int64_t c, auto load, auto store) MNV2_INLINE_LAMBDA {
          V total = V::add(load(sum + c), load(sums + c));
          if (!last) return store(total, sums + c);
          total = activated(total, s_.out_activation);
          if (s_.residual) total = V::add(total, load(x + c));
          store(total, y + c);
        });
      }
  }

  void project_terms(ProjectTile<S>& t, int64_t first, int64_t row, int64_t band, bool aside) {
    const int64_t full = s_.out_channels / V::kLanes;
    for_pieces(full, kMaxVectors<V>, [&](int64_t vector, int n) {
      with_vectors<V>(n, [&](auto N) {
        const auto table = project_table<V, S, N, false>(Rows<V, N>{});
        project_pixels(t, first, vector * V::kLanes, row, band, aside, max_rows<V>(N),
                       [&](int rows) { table[rows - 1](t); });
      });
    });
    const int64_t done = full * V::kLanes;
    t.lanes = s_.out_channels - done;
    if (t.lanes > 0) {
      // What is left fills no vector; a half vector does it at half the cost where there is one.
      using H = typename V::Half;
      const auto tail = [&]<class U>(U) {
        const auto table = project_table<U, S, 1, true>(Rows<U, 1>{});
        project_pixels(t, first, done, row, band, aside, max_rows<U>(1),
                       [&](int rows) { table[rows - 1](t); });
      };
      t.lanes <= H::kLanes ? tail(H{}) : tail(V{});
    }
  }

  using In = Elements<V, S>;

  const BlockArgs<S>& a_;
  const BlockShape& s_;
  const Plan& plan_;
  T* expanded_;
  T* sum_;    // [band pixels][C_out], of a group of several runs
  T* total_;  // [tile pixels][C_out], the groups' sums where y cannot hold them
  S* depthwise_;
  S* patch_;
  int64_t patch_row_ = 0;                // elements
  int64_t row_, col_, rows_, cols_;      // output pixels
  int64_t ring_, in_cols_;               // rows of the ring, and columns
  int64_t first_;                        // column of the window that the ring's first is
  int64_t top_, left_, bottom_, right_;  // of those, the ones inside the image
  const S* x_;                           // input pixel of expanded pixel (0, 0)
  int64_t out_;                          // elements from the first output to the tile's
  S* y_;                                 // output pixel (0, 0)
  T* sums_;                              // where the sums of its groups are added up
  int64_t sums_row_;                     // elements between rows of them
  int64_t split_;
  int64_t panel_;  // elements between panels of expanded_
  Ahead ahead_;
  // Of a squeeze-and-excite: what this pass multiplies d by, where d stays between the passes, or
  // null, and where its rows' sums go.
  const T* gate_ = nullptr;
  S* kept_ = nullptr;
  T* pooled_ = nullptr;
};

template <class V, class S>
void run_tile(const BlockArgs<S>& args, const Plan& plan, int64_t task, typename V::T* scratch) {
  Tile<V, S>(args, plan, task, scratch).run();
}

// y = the groups' sums in order, then x: what one task adds when it runs all groups of a tile.
template <class V, class S>
void add_row(const BlockArgs<S>& args, const Plan& plan, int64_t row) {
  const BlockShape& s = args.shape;
  const int64_t groups = plan.groups(s), group_size = s.out_elements();
  const int64_t first = row * s.out_width() * s.out_channels;
  const S* x = args.x + row / s.out_height() * args.x_image + row % s.out_height() * args.x_row;
  for (int64_t col = 0; col < s.out_width(); ++col) {
    const int64_t pixel = first + col * s.out_channels;
    for_vectors<V>(s.out_channels, [&](int64_t c, auto load, auto store) MNV2_INLINE_LAMBDA {
      V sum = load(args.partial + pixel + c);
      for (int64_t g = 1; g < groups; ++g)
        sum = V::add(load(args.partial + g * group_size + pixel + c), sum);
      sum = activated(sum, s.out_activation);
      if (s.residual) sum = V::add(sum, load(x + col * args.x_col + c));
      store(sum, args.y + pixel + c);
    });
  }
}

// mean[c] = the rows' sums of one image, added up in order, over its pixels.
template <class V>
void mean_of_rows(const typename V::T* rows, int64_t count, int64_t channels, typename V::T scale,
                  typename V::T* mean) {
  for (int64_t c = 0; c < channels; c += V::kLanes) {
    V sum = V::load(rows + c);
    for (int64_t r = 1; r < count; ++r) sum = V::add(sum, V::load(rows + r * channels + c));
    multiplied(sum, V::set1(scale)).store(mean + c);
  }
}

// In place, what stands between or behind the two products of a squeeze-and-excite.
template <class V>
void activate_all(typename V::T* p, int64_t count, Activation a) {
  for_vectors<V>(count, [&](int64_t i, auto load, auto store)
                            MNV2_INLINE_LAMBDA { store(activated(load(p + i), a), p + i); });
}
template <class V>
void gate_all(typename V::T* p, int64_t count, Gate gate) {
  for_vectors<V>(count, [&](int64_t i, auto load, auto store) MNV2_INLINE_LAMBDA {
    const V v = load(p + i);
    store(gate == Gate::kSigmoid ? V::div(V::set1(1), one_plus_exp_of_minus(v)) : hardsigmoid(v),
          p + i);
  });
}

// A 1x1 convolution for one image's share of the output channels: all its pixels, so that
// a mean over them is summed in the same order however many tasks there are.
template <class V, class S>
class Pointwise {
  using T = typename V::T;
  // Pixels whose inputs stay in L2 while every weight passes by.
  static constexpr int64_t kBlock = 256;
  static constexpr int64_t kPerPanel = kPanel / V::kLanes;

 public:
  Pointwise(const PointwiseArgs<S>& args, int64_t task)
      : a_(args), s_(args.shape), image_(task / args.parts), pixels_(s_.height * s_.width) {
    const int64_t part = task % a_.parts;
    begin_ = s_.panels() * part / a_.parts * kPerPanel;
    end_ = s_.panels() * (part + 1) / a_.parts * kPerPanel;
  }

  void run() {
    for (int64_t block = 0; block < pixels_; block += kBlock) {
      const int64_t count = pixels_ - block < kBlock ? pixels_ - block : kBlock;
      for_pieces(end_ - begin_, kMaxVectors<V>, [&](int64_t piece, int n) {
        const int64_t vector = begin_ + piece;
        if (vector * V::kLanes >= s_.out_channels) return;
        with_vectors<V>(n, [&](auto N) {
          if (s_.pool)
            pooled<N>(vector, block, count);
          else if (is_clip(s_.activation))
            every_pixel<N>(vector, block, count);
          else
            every_pixel_activated<N>(vector, block, count);
        });
      });
    }
  }

 private:
  template <class O>
  ExpandTile<S, O> tile(int64_t vector) const {
    ExpandTile<S, O> t;
    t.weights = a_.weight;
    t.bias = a_.bias;
    t.in_channels = s_.in_channels;
    if (s_.linear) t.longest = kLongestLinearSum;
    t.vector = vector;
    t.panel = kPanel;
    const Clip<T> clip(s_.activation);
    t.low = clip.low;
    t.high = clip.high;
    return t;
  }

  // The weights of the vectors behind these, or behind the last those of the next layer.
  Ahead ahead(int64_t after, int64_t vectors, int64_t block, int64_t count, int64_t calls) const {
    const int64_t panel = round_up(s_.in_channels, kDepth<S>) * kPanel;
    const int64_t bytes = panel * int64_t{sizeof(S)};
    if (block == 0 && after < end_)
      return {a_.weight + after / kPerPanel * panel, ceil_div(vectors, kPerPanel) * bytes, bytes,
              bytes, calls};
    if (block + count >= pixels_ && after >= end_ && a_.next_bytes > 0)
      return {a_.next, a_.next_bytes, a_.next_bytes, 0, calls};
    return {};
  }

  // Calls f(pixel, rows) for pieces of a block, t.x and t.fetch set.
  template <class O, class F>
  void for_pixels(ExpandTile<S, O>& t, int64_t vectors, int64_t block, int64_t count, int most,
                  F f) const {
    int64_t row = block / s_.width, col = block % s_.width;
    Ahead ahead = this->ahead(t.vector + vectors, vectors, block, count, ceil_div(count, most));
    for_pieces(count, most, [&](int64_t pixel, int rows) {
      for (int i = 0; i < rows;) {
        t.x.fill(i, a_.x + image_ * a_.x_image + row * a_.x_row + col * a_.x_col, a_.x_col);
        const int64_t run = rows - i < s_.width - col ? rows - i : s_.width - col;
        i += int(run);
        col += run;
        if (col == s_.width) {
          col = 0;
          ++row;
        }
      }
      t.fetch = ahead.next(s_.in_channels);
      f(pixel, rows);
    });
  }

  template <int N>
  void pooled(int64_t vector, int64_t block, int64_t count) const {
    const int64_t channel = vector * V::kLanes;
    // One order of summation, however many vectors this piece happens to have.
    constexpr int kRows = max_rows<V>(kMaxVectors<V>);
    T results[kRows * N * V::kLanes];
    ExpandTile<S, T> t = tile<T>(vector);
    // What clips is summed up by the product's own kernel, else pixels come one by one. The kernels
    // add the vector's own offset.
    const bool clips = is_clip(s_.activation);
    t.expanded.fill(0, results - channel, clips ? 0 : N * V::kLanes);
    const auto table = clips ? expand_table<V, S, T, N, true>(Rows<V, N>{})
                             : expand_table<V, S, T, N, false>(Rows<V, N>{});
    V sums[N];
    unrolled<N>([&](auto j) MNV2_INLINE_LAMBDA { sums[j] = V::set1(0); });
    for_pixels(t, N, block, count, kRows, [&](int64_t, int rows) {
      table[rows - 1](t);
      const int pixels = clips ? 1 : rows;
      if (!clips) activate<V>(results, rows * N, V::kLanes, s_.activation);
      for (int i = 0; i < pixels; ++i)
        unrolled<N>([&](auto j) MNV2_INLINE_LAMBDA {
          sums[j] = V::add(sums[j], V::load(results + (i * N + j) * V::kLanes));
        });
    });
    const V scale = V::set1(T(1) / T(pixels_));
    unrolled<N>([&](auto j) MNV2_INLINE_LAMBDA {
      const int64_t offset = image_ * s_.out_channels + channel + j * V::kLanes;
      const int64_t lanes = s_.out_channels - (channel + j * V::kLanes);
      if (lanes <= 0) return;
      const bool full = lanes >= V::kLanes;
      T* const p = a_.sums + offset;
      V sum = sums[j];
      if (block > 0) sum = V::add(sum, full ? V::load(p) : V::load_partial(p, lanes));
      if (block + count < pixels_) {
        full ? sum.store(p) : sum.store_partial(p, lanes);
        return;
      }
      sum = V::fma(sum, scale, V::set1(0));
      S* const y = a_.y + offset;
      full ? Elements<V, S>::store(sum, y) : Elements<V, S>::store_partial(sum, y, lanes);
    });
  }

  template <int N>
  void every_pixel(int64_t vector, int64_t block, int64_t count) const {
    const int64_t channel = vector * V::kLanes, channels = s_.out_channels - channel;
    const bool full = channels >= N * V::kLanes;
    S results[kMostRows * N * V::kLanes];  // outputs that fill no vector
    S* const y = a_.y + (image_ * pixels_ + block) * s_.out_channels + channel;
    ExpandTile<S, S> t = tile<S>(vector);
    const auto table = expand_table<V, S, S, N, false>(Rows<V, N>{});
    for_pixels(t, N, block, count, max_rows<V>(N), [&](int64_t pixel, int rows) {
      // The kernel adds the vector's own offset.
      t.expanded.fill(0, (full ? y + pixel * s_.out_channels : results) - channel,
                      full ? s_.out_channels : N * V::kLanes);
      table[rows - 1](t);
      if (full) return;
      for (int i = 0; i < rows; ++i)
        std::memcpy(y + (pixel + i) * s_.out_channels, results + i * N * V::kLanes,
                    size_t(channels) * sizeof(S));
    });
  }

  // By way of sums, which are rounded to S once.
  template <int N>
  void every_pixel_activated(int64_t vector, int64_t block, int64_t count) const {
    const int64_t channel = vector * V::kLanes;
    T results[kMostRows * N * V::kLanes];
    S* y = a_.y + (image_ * pixels_ + block) * s_.out_channels + channel;
    ExpandTile<S, T> t = tile<T>(vector);
    t.expanded.fill(0, results - channel,
                    N * V::kLanes);  // the kernel adds the vector's own offset
    const auto table = expand_table<V, S, T, N, false>(Rows<V, N>{});
    const int64_t left = s_.out_channels - channel;
    const int64_t channels = left < N * V::kLanes ? left : N * V::kLanes;
    for_pixels(t, N, block, count, max_rows<V>(N), [&](int64_t, int rows) {
      table[rows - 1](t);
      activate<V>(results, rows * N, V::kLanes, s_.activation);
      for (int i = 0; i < rows; ++i, y += s_.out_channels)
        for_vectors<V>(channels, [&](int64_t c, auto, auto store) MNV2_INLINE_LAMBDA {
          store(V::load(results + i * N * V::kLanes + c), y + c);
        });
    });
  }

  const PointwiseArgs<S>& a_;
  const PointwiseShape& s_;
  int64_t image_, pixels_;
  int64_t begin_, end_;  // vectors
};

template <class V, class S>
void run_pointwise(const PointwiseArgs<S>& args, int64_t task) {
  Pointwise<V, S>(args, task).run();
}

}  // namespace
