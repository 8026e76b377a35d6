// Which tile and how many splits: what the launches of linear attention, forward and backward, share.
#pragma once
#include <algorithm>
#include <type_traits>

#include "linear_attention.h"
#include "tile.cuh"

namespace linattn::cuda {

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Calls f(Kernels) with the smallest tile that holds both head dims. More than 128 columns of v are taken in several
// runs where registers or shared memory do not suffice.
template <template <class, int, int> class Kernels, class T, class F>
auto with_tile(int width, F f) {
  constexpr bool kWide = std::is_same_v<T, float>;
  if (width <= 48) return f(Kernels<T, 48, 48>());
  if (width <= 64) return f(Kernels<T, 64, 64>());
  if (width <= 80) return f(Kernels<T, 80, 80>());
  if (width <= 128) return f(Kernels<T, 128, kWide ? 64 : 128>());
  if (width <= 160) return f(Kernels<T, 160, kWide ? 80 : 160>());
  return f(Kernels<T, 256, kWide ? 64 : 128>());
}
template <template <class, int, int> class Kernels, class F>
auto with_kernels(const LinearAttentionArgs& a, F f) {
  const int width = std::max(a.D, a.E);
  if (a.dtype == DType::kFloat32) return with_tile<Kernels, float>(width, f);
  return a.dtype == DType::kBFloat16 ? with_tile<Kernels, BFloat16>(width, f) : with_tile<Kernels, Float16>(width, f);
}

struct Plan {
  int64_t column_runs, splits, chunk, group;
  int64_t ticket_bytes = 0, workspace_bytes = 0;
};
// Never a function of the batch: the split decides the order of the sums, and a sample must give the same bits in any
// batch. Two blocks per multiprocessor at batch 1, but not less than 256 tokens for each.
template <class K>
Plan plan_state(const LinearAttentionArgs& a, int64_t tokens) {
  Plan p;
  p.column_runs = ceil_div(a.E, K::kColumns);
  const int64_t fill =
      std::min(ceil_div(2 * static_cast<int64_t>(a.multiprocessors), a.H * p.column_runs), tokens / 256);
  const int64_t splits = std::max({int64_t{1}, fill, ceil_div(tokens, K::kLongestSum)});
  p.chunk = ceil_div(ceil_div(tokens, splits), 64) * 64;
  p.splits = ceil_div(tokens, p.chunk);
  p.group = 1;
  while (p.group * p.group < p.splits) ++p.group;
  if (p.splits > 1) {
    const int64_t sums = a.B * a.H * p.column_runs;
    p.ticket_bytes = ceil_div(sums * (1 + ceil_div(p.splits, p.group)) * 4, 256) * 256;
    p.workspace_bytes = p.ticket_bytes + sums * p.splits * K::kSums * K::State::kThreads * 16;
  }
  return p;
}

// How the rows of `tokens` are cut where they are independent of each other, so that the batch may count. Long runs
// spread the cost of preparing the state, short ones fill the device. `step`: tokens that a block takes at a time.
struct Runs {
  int64_t chunk, count;
};
inline Runs plan_rows(int64_t tokens, int64_t step, int64_t blocks, int multiprocessors) {
  const int64_t fill = ceil_div(2 * static_cast<int64_t>(multiprocessors), blocks);
  const int64_t smooth = std::min(ceil_div(8 * static_cast<int64_t>(multiprocessors), blocks), tokens / (8 * step));
  const int64_t wanted = std::max({int64_t{1}, fill, smooth, ceil_div(tokens, 65536)});
  const int64_t chunk = ceil_div(ceil_div(tokens, wanted), step) * step;
  return {chunk, ceil_div(tokens, chunk)};
}

inline const char* refusal(const LinearAttentionArgs& a) {
  if (a.D < 1 || a.D > 256 || a.E < 1 || a.E > 256) return "linear attention in CUDA C++ takes head dims 1..256";
  if (a.B * a.H >= int64_t{1} << 31) return "linear attention in CUDA C++ takes fewer than 2^31 heads of all samples";
  return nullptr;
}

}  // namespace linattn::cuda
