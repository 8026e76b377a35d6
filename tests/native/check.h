// What the native checks of the CPU kernels share: number formats, tensors in heap blocks of the exact size, threads,
// and the comparison with a reference value. Each check is one program, so everything here may be in an unnamed
// namespace.
#pragma once
#include <sys/mman.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "isa.h"
#include "parallel.h"
#include "tensor.h"

using namespace linattn;

namespace {

int failures = 0;
long comparisons = 0;
std::string context;

void fail(const std::string& what) {
  if (++failures <= 40) printf("FAIL %s: %s\n", context.c_str(), what.c_str());
}

// ---------------------------------------------------------------------------------------------- number formats

int size_of(DType t) { return t == DType::kFloat32 ? 4 : 2; }

double decode(DType t, const char* p) {
  if (t == DType::kFloat32) {
    float x;
    memcpy(&x, p, 4);
    return x;
  }
  uint16_t h;
  memcpy(&h, p, 2);
  if (t == DType::kBFloat16) {
    uint32_t u = static_cast<uint32_t>(h) << 16;
    float x;
    memcpy(&x, &u, 4);
    return x;
  }
  int e = (h >> 10) & 31, m = h & 1023;
  double x = e == 31 ? (m ? NAN : INFINITY) : e == 0 ? std::ldexp(m, -24) : std::ldexp(1024 + m, e - 25);
  return h & 0x8000 ? -x : x;
}

void encode(DType t, double value, char* p) {
  float x = static_cast<float>(value);
  uint32_t u;
  memcpy(&u, &x, 4);
  if (t == DType::kFloat32) {
    memcpy(p, &x, 4);
    return;
  }
  uint16_t h;
  if (t == DType::kBFloat16) {  // truncation is good enough to make a test value, but NaN must stay one
    h = static_cast<uint16_t>(u >> 16);
    if (std::isnan(x)) h |= 0x40;
  } else if (std::isnan(x)) {
    h = 0x7e00;
  } else if (std::isinf(x)) {
    h = x > 0 ? 0x7c00 : 0xfc00;
  } else {  // values of a test are in the range of normal numbers or truncated to zero
    int e;
    double m = std::frexp(std::fabs(x), &e);
    h = x == 0 || e < -13 ? 0 : static_cast<uint16_t>(((e + 14) << 10) + (static_cast<int>(m * 2048) - 1024));
    if (x < 0) h |= 0x8000;
  }
  memcpy(p, &h, 2);
}

// ------------------------------------------------------------------------------------------------------ tensors

enum Layout { kHeadsFirst, kTokensFirst, kGaps, kExpanded };
const char* const kLayoutNames[] = {"BHND", "BNHD", "gaps", "expanded"};

// A (B, H, N, D) tensor in a heap block that ends with its last element. kGaps: rows D + 3 apart, first element one
// element into the block, gaps of NaN that nobody may write. kExpanded: all heads and batches are the same memory.
struct Tensor {
  DType type = DType::kFloat32;
  int64_t B = 0, H = 0, N = 0;
  int D = 0;
  Layout layout = kHeadsFirst;
  char* block = nullptr;
  int64_t elements = 0;
  View view;
  Tensor() = default;
  Tensor(DType t, int64_t b, int64_t h, int64_t n, int d, Layout l) : type(t), B(b), H(h), N(n), D(d), layout(l) {
    int64_t row = l == kGaps ? d + 3 : d, start = l == kGaps ? 1 : 0;
    if (l == kTokensFirst || l == kGaps) view = {nullptr, n * h * row, row, h * row};
    if (l == kHeadsFirst) view = {nullptr, h * n * row, n * row, row};
    if (l == kExpanded) view = {nullptr, 0, 0, row};
    bool empty = b * h * n == 0;
    elements = empty ? 0 : start + (b - 1) * view.stride_b + (h - 1) * view.stride_h + (n - 1) * view.stride_n + d;
    block = static_cast<char*>(malloc(static_cast<size_t>(elements * size_of(t))));
    memset(block, 0xff, static_cast<size_t>(elements * size_of(t)));  // NaN in every format
    view.data = block + start * size_of(t);
  }
  Tensor(const Tensor&) = delete;
  Tensor& operator=(const Tensor&) = delete;
  Tensor(Tensor&& o) noexcept { *this = std::move(o); }
  Tensor& operator=(Tensor&& o) noexcept {
    std::swap(type, o.type), std::swap(B, o.B), std::swap(H, o.H), std::swap(N, o.N), std::swap(D, o.D);
    std::swap(layout, o.layout), std::swap(block, o.block), std::swap(elements, o.elements), std::swap(view, o.view);
    return *this;
  }
  ~Tensor() { free(block); }
  char* at(int64_t b, int64_t h, int64_t n, int d) const {
    return static_cast<char*>(view.data) +
           (b * view.stride_b + h * view.stride_h + n * view.stride_n + d) * size_of(type);
  }
  double get(int64_t b, int64_t h, int64_t n, int d) const { return decode(type, at(b, h, n, d)); }
  // All rows of one head, decoded.
  std::vector<double> head(int64_t b, int64_t h) const {
    std::vector<double> x(static_cast<size_t>(N * D));
    for (int64_t n = 0; n < N; ++n)
      for (int d = 0; d < D; ++d) x[static_cast<size_t>(n * D + d)] = get(b, h, n, d);
    return x;
  }
  template <class F>
  void each(const F& f) const {
    for (int64_t b = 0; b < B; ++b)
      for (int64_t h = 0; h < H; ++h)
        for (int64_t n = 0; n < N; ++n)
          for (int d = 0; d < D; ++d) f(b, h, n, d);
  }
  void fill(std::mt19937& random, bool positive) {
    std::normal_distribution<double> normal;
    each([&](int64_t b, int64_t h, int64_t n, int d) {
      double x = normal(random);
      encode(type, positive ? std::fabs(x) + 0.1 : x, at(b, h, n, d));
    });
  }
  // Bytes between the rows still as they were made.
  bool gaps_untouched() const {
    if (layout != kGaps) return true;
    std::vector<char> used(static_cast<size_t>(elements * size_of(type)), 0);
    each([&](int64_t b, int64_t h, int64_t n, int d) {
      memset(&used[static_cast<size_t>(at(b, h, n, d) - block)], 1, static_cast<size_t>(size_of(type)));
    });
    for (size_t i = 0; i < used.size(); ++i)
      if (!used[i] && static_cast<unsigned char>(block[i]) != 0xff) return false;
    return true;
  }
};

struct Floats {  // exact-size float array that starts as NaN
  float* data;
  int64_t size;
  explicit Floats(int64_t n) : data(static_cast<float*>(malloc(static_cast<size_t>(n) * 4))), size(n) {
    memset(data, 0xff, static_cast<size_t>(n) * 4);
  }
  Floats(const Floats&) = delete;
  Floats& operator=(const Floats&) = delete;
  ~Floats() { free(data); }
};

// -------------------------------------------------------------------------------------------------------- threads

Parallel serial() {
  return {1, [](int slots, void (*body)(void*, int), void* c) {
            for (int i = 0; i < slots; ++i) body(c, i);
          }};
}
Parallel threaded(int n) {
  return {n, [](int slots, void (*body)(void*, int), void* c) {
            std::vector<std::thread> pool;
            for (int i = 1; i < slots; ++i) pool.emplace_back([=] { body(c, i); });
            body(c, 0);
            for (auto& t : pool) t.join();
          }};
}

// --------------------------------------------------------------------------------------------- reference values

struct Value {  // a result and the same sum of absolute terms
  double x = 0, size = 0;
  void add(double term) { x += term, size += std::fabs(term); }
  void add(double term, double magnitude) { x += term, size += magnitude; }
};
using Values = std::vector<Value>;

// where() names the element; it is only called for a failure.
template <class Where>
void compare(const char* name, DType t, double units, double got, const Value& want, bool half, const Where& where) {
  ++comparisons;
  // Results below the normal range of a format are rounded (or, by vdpbf16ps, flushed) to an absolute grid.
  double tiny = half && t == DType::kFloat16 ? std::ldexp(1, -24) : 1e-36;
  double tolerance = units * want.size + tiny;
  if (std::fabs(got - want.x) <= tolerance) return;
  char text[200];
  snprintf(text, sizeof(text), "%s%s = %.9g, expected %.9g within %.2g", name, where().c_str(), got, want.x, tolerance);
  fail(text);
}

// ---------------------------------------------------------------------------------------------------------- a program

// f(prefix, type) for every instruction set of this machine (or the one that argv names) and every type; returns main's
// exit status.
template <class F>
int for_each_level(int argc, char** argv, const F& f) {
  const char* only = argc > 1 ? argv[1] : nullptr;
  const char* const types[] = {"float32", "float16", "bfloat16"};
  std::string levels = linattn_cpu_isas();
  for (size_t begin = 0; begin < levels.size();) {
    size_t end = std::min(levels.find(',', begin), levels.size());
    std::string level = levels.substr(begin, end - begin);
    begin = end + 1;
    if (only && level != only) continue;
    if (linattn_cpu_set_isa(level.c_str())) {
      printf("%s: not supported by this machine, skipped\n", level.c_str());
      continue;
    }
    int before = failures;
    for (DType t : {DType::kFloat32, DType::kFloat16, DType::kBFloat16}) f(level + " " + types[static_cast<int>(t)], t);
    printf("%s: %s\n", level.c_str(), failures == before ? "ok" : "FAILED");
  }
  printf("%ld comparisons, %d failures\n", comparisons, failures);
  return failures != 0;
}

}  // namespace
