// simd.h of one instruction set behind a C interface, for the accuracy tests (loaded with ctypes).
#include "simd.h"

using namespace linattn::LINATTN_ISA;

namespace {
template <class From, class To, class F>
void each(const From* x, To* y, int64_t n, const F& f) {
  for (int64_t i = 0; i < n; i += V::W) {
    int w = n - i < V::W ? static_cast<int>(n - i) : V::W;
    store_n(y + i, f(load_n(x + i, w)), w);
  }
}
template <int MAP, int DEGREE>
void map_all(const float* x, float* y, float* grad, int64_t n) {
  each(x, y, n, [](V v) {
    V f[1] = {v};
    phi<MAP, DEGREE>(f);
    return f[0];
  });
  each(y, grad, n, [](V v) { return phi_grad<MAP>(v); });
}
}  // namespace

extern "C" {
// y = phi(x) and grad = phi'(x). degree 6, 4, 3: the exponentials for float32, float16, bfloat16.
void simd_phi(int map, int degree, const float* x, float* y, float* grad, int64_t n) {
  if (map == kIdentity) map_all<kIdentity, 6>(x, y, grad, n);
  if (map == kRelu) map_all<kRelu, 6>(x, y, grad, n);
  if (map == kElu1 && degree == 6) map_all<kElu1, 6>(x, y, grad, n);
  if (map == kElu1 && degree == 4) map_all<kElu1, 4>(x, y, grad, n);
  if (map == kElu1 && degree == 3) map_all<kElu1, 3>(x, y, grad, n);
}
void simd_to_bf16(const float* x, uint16_t* y, int64_t n) {
  each(x, reinterpret_cast<bf16*>(y), n, [](V v) { return v; });
}
void simd_to_f16(const float* x, uint16_t* y, int64_t n) {
  each(x, reinterpret_cast<f16*>(y), n, [](V v) { return v; });
}
void simd_from_bf16(const uint16_t* x, float* y, int64_t n) {
  each(reinterpret_cast<const bf16*>(x), y, n, [](V v) { return v; });
}
void simd_from_f16(const uint16_t* x, float* y, int64_t n) {
  each(reinterpret_cast<const f16*>(x), y, n, [](V v) { return v; });
}
}
