// One warp loads, multiplies and stores its fragments: for the emulator (self_test.cpp) and a GPU (dump_fragments.cu).
#pragma once
#include "warp.h"

namespace linattn::cuda {

// What the fragments of one warp hold, for comparison with the layouts of the PTX manual.
struct Fragments {
  const uint16_t *left, *right;    // (16, 16) and (8, 16): the second operand's transpose
  const float* sum;                // (16, 8)
  uint32_t *a, *a_transposed, *b;  // [lane][register]
  float* d;
};
template <class T>
LINATTN_KERNEL(32, 1)
fragments_kernel(Fragments p) {
  const int lane = thread_index();
  auto* rows = reinterpret_cast<uint16_t*>(shared_memory());
  for (int i = lane; i < 256; i += kWarp) rows[i] = p.left[i];
  for (int i = lane; i < 128; i += kWarp) rows[256 + i] = p.right[i];
  barrier_warp();
  uint32_t a[4], transposed[4], b[4];
  load_matrices(a, rows + lane % 16 * 16 + lane / 16 * 8);
  load_matrices_transposed(transposed, rows + lane % 16 * 16 + lane / 16 * 8);
  load_matrices(b, rows + 256 + lane % 8 * 16 + lane / 8 % 2 * 8);
  float d[4];
  for (int i = 0; i < 4; ++i) {
    d[i] = p.sum[(lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2];
    p.a[lane * 4 + i] = a[i];
    p.a_transposed[lane * 4 + i] = transposed[i];
    p.b[lane * 4 + i] = b[i];
  }
  multiply_add<T>(d, a, b[0], b[1]);
  for (int i = 0; i < 4; ++i) p.d[lane * 4 + i] = d[i];
}

}  // namespace linattn::cuda
