// Compiled and called by native.py, which says what a row holds. The formulas are those of fused.py.

#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {
constexpr int64_t LANES = 16, BLOCK = 1024, CHUNK = 64 * BLOCK, AHEAD = 1024;

using bfloat16 = uint16_t;
struct Row { float* p; const float* w; const void* l; float* s; float* t; int64_t size, half; };

float number(float x) { return x; }
float number(bfloat16 x) {
  const uint32_t bits = uint32_t(x) << 16;
  float found;
  std::memcpy(&found, &bits, sizeof found);
  return found;
}

int64_t chunks(const Row& r) { return (r.size + CHUNK - 1) / CHUNK; }
int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

template <class L> void add_products(const float* w, const L* l, int64_t size, double* sums) {
  float ww[LANES] = {}, wl[LANES] = {}, ll[LANES] = {};
  int64_t j = 0;
  for (; j + LANES <= size; j += LANES) {
    __builtin_prefetch(w + j + AHEAD);
    __builtin_prefetch(l + j + AHEAD);
    #pragma omp simd
    for (int64_t k = 0; k < LANES; k++) {
      const float x = w[j + k], y = number(l[j + k]);
      ww[k] += x * x; wl[k] += x * y; ll[k] += y * y;
    }
  }
  for (int64_t k = 0; j < size; j++, k++) {
    const float x = w[j], y = number(l[j]);
    ww[k] += x * x; wl[k] += x * y; ll[k] += y * y;
  }
  for (int64_t k = 0; k < LANES; k++) { sums[0] += ww[k]; sums[1] += wl[k]; sums[2] += ll[k]; }
}

struct Numbers { float c[6], h[8]; };

template <class L> float mixed(const Row& r, int64_t k, const Numbers& n) {
  const float y = n.c[1] * number(static_cast<const L*>(r.l)[k]);
  return n.c[5] * (n.c[4] * ((n.c[0] != 0 ? r.w[k] : 0) + n.c[2] * y + n.c[3] * y));
}

// Updates: what to do with element k of the mixture, g. With a momentum, RMSprop and SGD have a state more.

template <bool> struct Written {
  static constexpr int states = 0;
  static void step(const Row& r, int64_t k, const Numbers&, float g) { r.p[k] = g; }
};

template <bool momentum> struct RMSprop {
  static constexpr int states = 1 + momentum;
  static void step(const Row& r, int64_t k, const Numbers& n, float g) {
    const float p = r.p[k];
    g += p * n.h[1];
    const float v = r.s[k] * n.h[2] + n.h[3] * g * g;  // in torch's order, which keeps the range
    float u = g / (std::sqrt(v) + n.h[4]);
    if (momentum) r.t[k] = u = r.t[k] * n.h[5] + u;
    r.s[k] = v;
    r.p[k] = p - u * n.h[0];
  }
};

template <bool> struct Adam {
  static constexpr int states = 2;
  static void step(const Row& r, int64_t k, const Numbers& n, float g) {
    const float p = r.p[k];
    g += p * n.h[1];
    const float m = r.s[k] + (g - r.s[k]) * n.h[2], v = r.t[k] * n.h[3] + n.h[4] * g * g;
    r.s[k] = m;
    r.t[k] = v;
    r.p[k] = p * n.h[7] - m / (std::sqrt(v) / n.h[6] + n.h[5]) * n.h[0];
  }
};

template <bool momentum> struct SGD {
  static constexpr int states = momentum;
  static void step(const Row& r, int64_t k, const Numbers& n, float g) {
    const float p = r.p[k];
    g += p * n.h[1];
    if (momentum) {
      const float b = r.s[k] * n.h[2] + g * n.h[3];
      r.s[k] = b;
      g = g * n.h[4] + b * n.h[5];
    }
    r.p[k] = p - g * n.h[0];
  }
};

template <class Update, class L> void run(const Row r, const Numbers n, int64_t j, int64_t stop) {
  for (; j + LANES <= stop; j += LANES) {
    __builtin_prefetch(r.p + j + AHEAD, 1);
    if (r.w != r.p) __builtin_prefetch(r.w + j + AHEAD);
    __builtin_prefetch(static_cast<const L*>(r.l) + j + AHEAD);
    if (Update::states > 0) __builtin_prefetch(r.s + j + AHEAD, 1);
    if (Update::states > 1) __builtin_prefetch(r.t + j + AHEAD, 1);
    #pragma omp simd
    for (int64_t k = j; k < j + LANES; k++) Update::step(r, k, n, mixed<L>(r, k, n));
  }
  for (; j < stop; j++) Update::step(r, j, n, mixed<L>(r, j, n));
}

template <template <bool> class Update> void over(int64_t count, const Row* rows, int threads, const Numbers* numbers) {
  #pragma omp parallel num_threads(threads)
  for (int64_t i = 0; i < count; i++) {
    const bool momentum = Update<true>::states == 2 ? rows[i].t : rows[i].s;
    const auto loop = momentum ? (rows[i].half ? run<Update<true>, bfloat16> : run<Update<true>, float>)
                               : (rows[i].half ? run<Update<false>, bfloat16> : run<Update<false>, float>);
    #pragma omp for schedule(static) nowait
    for (int64_t k = 0; k < chunks(rows[i]); k++) loop(rows[i], numbers[i], k * CHUNK, least(rows[i].size, (k + 1) * CHUNK));
  }
}

template <class L> void add_chunk(const Row& r, int64_t start, double* sums) {
  for (int64_t j = start, stop = least(r.size, start + CHUNK); j < stop; j += BLOCK)
    add_products(r.w + j, static_cast<const L*>(r.l) + j, least(BLOCK, stop - j), sums);
}
}  // namespace

extern "C" void products(int64_t count, const Row* rows, int threads, double* out) {
  int64_t total = 0;
  for (int64_t i = 0; i < count; i++) total += chunks(rows[i]);
  std::vector<double> parts(3 * total, 0.0);
  #pragma omp parallel num_threads(threads)
  for (int64_t i = 0, first = 0; i < count; first += chunks(rows[i++])) {
    const auto add = rows[i].half ? add_chunk<bfloat16> : add_chunk<float>;
    #pragma omp for schedule(static) nowait
    for (int64_t k = 0; k < chunks(rows[i]); k++) add(rows[i], k * CHUNK, &parts[3 * (first + k)]);
  }
  const double* part = parts.data();
  for (int64_t i = 0; i < count; i++, out += 3)
    for (int64_t k = chunks(rows[i]); k > 0; k--, part += 3)
      for (int m = 0; m < 3; m++) out[m] += part[m];
}

#define EXPORT(name, Update) \
  extern "C" void name(int64_t count, const Row* rows, int threads, const Numbers* numbers) { \
    over<Update>(count, rows, threads, numbers); \
  }
EXPORT(mix, Written)
EXPORT(rmsprop, RMSprop)
EXPORT(adam, Adam)
EXPORT(sgd, SGD)

extern "C" void count(int64_t size, float* const* counters, double by, double* out) {
  for (int64_t i = 0; i < size; i++) {
    out[i] = *counters[i] + by;
    if (by != 0) *counters[i] = float(out[i]);
  }
}

// Copies numbers of `width` bytes into `out`, which lies in the order of the sizes; strides are the source's, in numbers. Two
// dimensions go in tiles that fit the nearest cache: the last, and the one along which the source's memory lies.
template <class T> void turn_as(const T* in, T* out, int dims, const int64_t* sizes, const int64_t* strides) {
  constexpr int64_t TILE = 16;
  int run = dims - 1;
  for (int d = 0; d < dims; d++) if (sizes[d] > 1 && (sizes[run] == 1 || strides[d] < strides[run])) run = d;
  std::vector<int64_t> steps(dims, 1), outer;
  for (int d = dims - 2; d >= 0; d--) steps[d] = steps[d + 1] * sizes[d + 1];
  int64_t count = 1;
  for (int d = 0; d < dims - 1; d++) if (d != run) { outer.push_back(d); count *= sizes[d]; }
  const int64_t rows = run == dims - 1 ? 1 : sizes[run], columns = sizes[dims - 1], across = strides[dims - 1];
  const int64_t down = steps[run], along = run == dims - 1 ? 0 : strides[run];
  for (int64_t n = 0; n < count; n++) {
    const T* x = in;
    T* y = out;
    int64_t left = n;
    for (int64_t k = int64_t(outer.size()) - 1; k >= 0; k--) {
      const int64_t d = outer[k], i = left % sizes[d];
      left /= sizes[d];
      x += i * strides[d];
      y += i * steps[d];
    }
    if (along != 1 || rows < TILE) {
      for (int64_t i = 0; i < rows; i++)
        for (int64_t j = 0; j < columns; j++) y[i * down + j] = x[i * along + j * across];
      continue;
    }
    // By lines of the cache, each read and written whole once; along the longer side, so that few pages are open.
    const bool tall = rows > columns;
    for (int64_t p = 0; p < (tall ? columns : rows); p += TILE)
      for (int64_t q = 0; q < (tall ? rows : columns); q += TILE) {
        const int64_t r = tall ? q : p, c = tall ? p : q;
        const int64_t high = least(TILE, rows - r), wide = least(TILE, columns - c);
        const T* from = x + r + c * across;
        T* to = y + r * down + c;
        T tile[TILE][TILE];
        if (high == TILE) {
          for (int64_t j = 0; j < wide; j++) std::memcpy(tile[j], from + j * across, sizeof tile[j]);
          if (wide == TILE)
            for (int64_t i = 0; i < TILE; i++)
              for (int64_t j = 0; j < TILE; j++) to[i * down + j] = tile[j][i];
          else
            for (int64_t i = 0; i < TILE; i++)
              for (int64_t j = 0; j < wide; j++) to[i * down + j] = tile[j][i];
        } else {
          for (int64_t i = 0; i < high; i++)
            for (int64_t j = 0; j < wide; j++) to[i * down + j] = from[i + j * across];
        }
      }
  }
}

extern "C" void turn(const void* in, void* out, int half, int dims, const int64_t* sizes, const int64_t* strides) {
  if (half) turn_as(static_cast<const uint16_t*>(in), static_cast<uint16_t*>(out), dims, sizes, strides);
  else turn_as(static_cast<const uint32_t*>(in), static_cast<uint32_t*>(out), dims, sizes, strides);
}
