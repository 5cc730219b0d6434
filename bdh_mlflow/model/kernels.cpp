// The elementwise passes of `passes.py` for a CPU, each reading and writing its activations once.
//
// Values are those of the eager passes to the bit: products and sums are computed in float32 and rounded to the format of the
// activations where PyTorch does. Plain loops; the compiler vectorises them for the machine it runs on (-march=native). Every function
// gets contiguous activations: neurons are rows, and the tokens of a block stand side by side. Built and loaded by `passes.py`.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

namespace {

constexpr int64_t PIECE = 1024;  // elements that one turn of a thread works on: they stay in its first-level cache

struct bfloat16 {
  uint16_t bits;
};

inline float read(float value) { return value; }

inline float read(bfloat16 value) {
  const uint32_t bits = uint32_t(value.bits) << 16;
  float wide;
  std::memcpy(&wide, &bits, 4);
  return wide;
}

inline void write(float* to, float value) { *to = value; }

inline void write(bfloat16* to, float value) {  // to nearest, ties to even; NaN stays NaN
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  to->bits = uint16_t((bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded);
}

template <class T>
inline float rounded(float value) {
  T narrow;
  write(&narrow, value);
  return read(narrow);
}

inline float relu(float value) { return value < 0 ? 0 : value; }  // NaN stays NaN

// Which neurons dropout keeps, as `dropout.keep_mask`: 16 bits of splitmix64 for each, against a threshold.
struct Dropout {
  uint64_t seed;      // the hashed key
  int32_t threshold;  // keeps a neuron whose bits, as a signed number, reach it; the smallest one keeps all

  void keep(int64_t first, int64_t count, int16_t* kept) const {
    if (threshold <= INT16_MIN) {
      std::fill(kept, kept + count, int16_t(1));
      return;
    }
    uint64_t bits[PIECE / 4];
    for (int64_t i = 0; i < (count + 3) / 4; i++) {
      uint64_t x = seed + uint64_t(first / 4 + i) * 0x9E3779B97F4A7C15u;
      x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
      x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
      bits[i] = x ^ (x >> 31);
    }
    int16_t lanes[PIECE];
    std::memcpy(lanes, bits, sizeof lanes);
    for (int64_t i = 0; i < count; i++) kept[i] = lanes[i] >= threshold;
  }
};

// Rotations by position: a row for each pair of neurons, a column for each token of a text.
struct Table {
  const float* cos;
  const float* sin;
  int64_t pairs, texts, tokens, stride;

  int64_t width() const { return texts * tokens; }
};

template <class T>
void activate(T* x, T* q, Table table, int threads) {
#pragma omp parallel for num_threads(threads)
  for (int64_t pair = 0; pair < table.pairs; pair++) {
    const float *cos = table.cos + pair * table.stride, *sin = table.sin + pair * table.stride;
    for (int64_t text = 0; text < table.texts; text++) {
      const int64_t even = 2 * pair * table.width() + text * table.tokens, odd = even + table.width();
      T *x0 = x + even, *x1 = x + odd, *q0 = q + even, *q1 = q + odd;
#pragma omp simd
      for (int64_t t = 0; t < table.tokens; t++) {
        const float a = relu(read(x0[t])), b = relu(read(x1[t]));
        write(x0 + t, a);
        write(x1 + t, b);
        write(q0 + t, std::fma(-b, sin[t], a * cos[t]));
        write(q1 + t, std::fma(a, sin[t], b * cos[t]));
      }
    }
  }
}

template <class T>
void activate_backward(const T* d_q, T* d_x, const T* x, Table table, int threads) {
#pragma omp parallel for num_threads(threads)
  for (int64_t pair = 0; pair < table.pairs; pair++) {
    const float *cos = table.cos + pair * table.stride, *sin = table.sin + pair * table.stride;
    for (int64_t text = 0; text < table.texts; text++) {
      const int64_t even = 2 * pair * table.width() + text * table.tokens, odd = even + table.width();
      const T *q0 = d_q + even, *q1 = d_q + odd, *x0 = x + even, *x1 = x + odd;
      T *d0 = d_x + even, *d1 = d_x + odd;
#pragma omp simd
      for (int64_t t = 0; t < table.tokens; t++) {
        const float a = read(q0[t]), b = read(q1[t]);
        const float to_even = std::fma(b, sin[t], std::fma(a, cos[t], read(d0[t])));
        const float to_odd = std::fma(-a, sin[t], std::fma(b, cos[t], read(d1[t])));
        write(d0 + t, read(x0[t]) <= 0 ? 0 : to_even);
        write(d1 + t, read(x1[t]) <= 0 ? 0 : to_odd);
      }
    }
  }
}

template <class T>
void gate(T* y, const T* x, int64_t count, Dropout dropout, int threads) {
#pragma omp parallel for num_threads(threads)
  for (int64_t first = 0; first < count; first += PIECE) {
    const int64_t here = std::min(PIECE, count - first);
    int16_t kept[PIECE];
    dropout.keep(first, here, kept);
    T* y0 = y + first;
    const T* x0 = x + first;
#pragma omp simd
    for (int64_t i = 0; i < here; i++) write(y0 + i, relu(read(y0[i])) * read(x0[i]) * kept[i]);
  }
}

template <class T>
void gate_backward(T* x, T* y, T* d_xy, T* d_x, int64_t count, Dropout dropout, int threads) {
#pragma omp parallel for num_threads(threads)
  for (int64_t first = 0; first < count; first += PIECE) {
    const int64_t here = std::min(PIECE, count - first);
    int16_t kept[PIECE];
    dropout.keep(first, here, kept);
    T *x0 = x + first, *y0 = y + first, *xy0 = d_xy + first, *d0 = d_x + first;
#pragma omp simd
    for (int64_t i = 0; i < here; i++) {
      const float a = relu(read(x0[i])), b = relu(read(y0[i])), d = read(xy0[i]) * kept[i];
      write(x0 + i, a);
      write(d0 + i, d * b);
      write(xy0 + i, b <= 0 ? 0 : d * a);
      write(y0 + i, a * b * kept[i]);
    }
  }
}

}  // namespace

#define PASSES(T, name)                                                                                                          \
  extern "C" void activate_##name(T* x, T* q, const float* cos, const float* sin, int64_t pairs, int64_t texts, int64_t tokens,  \
                                  int64_t stride, int threads) {                                                                 \
    activate(x, q, Table{cos, sin, pairs, texts, tokens, stride}, threads);                                                      \
  }                                                                                                                              \
  extern "C" void activate_backward_##name(const T* d_q, T* d_x, const T* x, const float* cos, const float* sin, int64_t pairs,  \
                                           int64_t texts, int64_t tokens, int64_t stride, int threads) {                         \
    activate_backward(d_q, d_x, x, Table{cos, sin, pairs, texts, tokens, stride}, threads);                                      \
  }                                                                                                                              \
  extern "C" void gate_##name(T* y, const T* x, int64_t count, uint64_t seed, int32_t threshold, int threads) {                  \
    gate(y, x, count, Dropout{seed, threshold}, threads);                                                                        \
  }                                                                                                                              \
  extern "C" void gate_backward_##name(T* x, T* y, T* d_xy, T* d_x, int64_t count, uint64_t seed, int32_t threshold,             \
                                       int threads) {                                                                            \
    gate_backward(x, y, d_xy, d_x, count, Dropout{seed, threshold}, threads);                                                    \
  }

PASSES(float, float32)
PASSES(bfloat16, bfloat16)
