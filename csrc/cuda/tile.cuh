// Rows of tensors in global memory, and tiles of them in shared memory.
#pragma once
#include "../cpu/tensor.h"
#include "warp.h"

namespace linattn::cuda {

// A (B, H, N, D) tensor: strides in elements, the head dim has stride 1.
template <class Element>
struct HeadRows {
  Element* data;
  int64_t stride_b, stride_h, stride_n;
  bool aligned;  // every row begins at a multiple of 16 bytes

  HeadRows() : data(nullptr), stride_b(0), stride_h(0), stride_n(0), aligned(false) {}
  explicit HeadRows(const View& x)
      : data(static_cast<Element*>(x.data)), stride_b(x.stride_b), stride_h(x.stride_h), stride_n(x.stride_n) {
    constexpr int64_t kElements = 16 / sizeof(Element);
    aligned = reinterpret_cast<uintptr_t>(x.data) % 16 == 0 && x.stride_b % kElements == 0 &&
              x.stride_h % kElements == 0 && x.stride_n % kElements == 0;
  }
  LINATTN_DEVICE Element* row(int64_t b, int64_t h, int64_t n) const {
    return data + b * stride_b + h * stride_h + n * stride_n;
  }
};

// Tiles have 16 bytes more per row than their WIDTH columns. Where that makes an odd number of 16-byte chunks, eight
// rows at the same column lie in all eight groups of banks.
template <class Element, int WIDTH>
inline constexpr int kRowBytes = WIDTH * static_cast<int>(sizeof(Element)) + 16;

template <class Element, int WIDTH>
LINATTN_DEVICE unsigned char* chunk_of(unsigned char* tile, int row, int chunk) {
  return tile + row * kRowBytes<Element, WIDTH> + chunk * 16;
}

// Copies ROWS rows of `columns` columns, the first `live` of which exist, by THREADS threads; the rest becomes zero.
// With `aligned` the copies are under way when this returns.
template <int ROWS, int WIDTH, int THREADS, class Element>
LINATTN_DEVICE void load_tile(unsigned char* tile, const Element* rows, int64_t stride, bool aligned, int live,
                              int columns, int thread) {
  constexpr int kElements = 16 / sizeof(Element), kChunks = WIDTH / kElements;
  constexpr bool kWholeRows = THREADS % kChunks == 0;  // then a thread stays in its column, and addresses are cheap
#pragma unroll
  for (int first = 0; first < ROWS * kChunks; first += THREADS) {
    const int i = first + thread;
    if (ROWS * kChunks % THREADS != 0 && i >= ROWS * kChunks) break;
    const int row = kWholeRows ? first / kChunks + thread / kChunks : i / kChunks;
    const int chunk = kWholeRows ? thread % kChunks : i % kChunks;
    int count = row < live ? columns - chunk * kElements : 0;
    count = count < 0 ? 0 : count > kElements ? kElements : count;
    const Element* source = rows + (count ? row * stride + chunk * kElements : 0);
    unsigned char* target = chunk_of<Element, WIDTH>(tile, row, chunk);
    if (aligned) {
      copy_async_16(target, source, count * static_cast<int>(sizeof(Element)));
      continue;
    }
    Quad values{};
#pragma unroll
    for (int c = 0; c < kElements; ++c) {
      if (c >= count) continue;
      if constexpr (sizeof(Element) == 2) {
        values.x[c / 2] |= static_cast<uint32_t>(source[c]) << (c % 2 * 16);
      } else {
        values.x[c] = float_bits(source[c]);
      }
    }
    store_quad(target, values);
  }
}

// The other way round: ROWS rows of `columns` columns, at most COLUMNS, the first `live` of which exist, by one warp. A
// barrier of the warp before this, and one before the tile is used again.
template <int ROWS, int WIDTH, int COLUMNS, class Element>
LINATTN_DEVICE void store_tile(const unsigned char* tile, Element* rows, int64_t stride, bool aligned, int live,
                               int columns, int lane) {
  constexpr int kElements = 16 / sizeof(Element), kChunks = COLUMNS / kElements;
  const int limit = live + (LINATTN_FAULT("a row past the last is stored") ? 1 : 0);
  for (int i = lane; i < ROWS * kChunks; i += kWarp) {
    const int row = i / kChunks, chunk = i % kChunks, count = columns - chunk * kElements;
    if (row >= limit || count <= 0) continue;
    const unsigned char* from = tile + row * kRowBytes<Element, WIDTH> + chunk * 16;
    Element* to = rows + row * stride + chunk * kElements;
    if (aligned && count >= kElements) {
      store_quad(to, load_quad(from));
    } else {
      for (int c = 0; c < kElements && c < count; ++c) to[c] = reinterpret_cast<const Element*>(from)[c];
    }
  }
}

enum FeatureMap { kIdentity, kRelu, kElu1 };  // as the ops number them

// ---- sums that several blocks share

// Whether this block is the last of `count` to come to `ticket`. What the others wrote before they came is then visible
// to every thread of it: the barrier orders a block's writes before its thread 0, the ticket thread 0 before the last
// block's, the second barrier that one before its block.
LINATTN_DEVICE bool is_last_block(int* ticket, int count, int* shared_flag) {
  if (!LINATTN_FAULT("no barrier before the ticket")) barrier_block();
  if (thread_index() == 0) {
    int before =
        LINATTN_FAULT("relaxed ticket") ? atomic_add_relaxed(ticket, 1) : atomic_add_acquire_release(ticket, 1);
    *shared_flag = before == count - 1;
  }
  if (!LINATTN_FAULT("no barrier after the ticket")) barrier_block();
  return *shared_flag != 0;
}

template <int THREADS, int QUADS>
LINATTN_DEVICE void store_partial(unsigned char* slot, const float (&sums)[QUADS][4]) {
  slot += thread_index() * 16;
#pragma unroll
  for (int i = 0; i < QUADS; ++i) {
    const float (&s)[4] = sums[i];
    store_quad(slot + i * THREADS * 16, {{float_bits(s[0]), float_bits(s[1]), float_bits(s[2]), float_bits(s[3])}});
  }
}

// sums = slot 0 + slot 1 + ..., in this order. A few blocks do this while the rest of the device is idle, so it is
// latency that counts: eight slots are read at once (four where 128 registers are all that a thread has).
template <int THREADS, int QUADS>
LINATTN_DEVICE void add_partials(const unsigned char* slots, int64_t slot_bytes, int count, float (&sums)[QUADS][4]) {
  constexpr int kAtOnce = THREADS >= 512 ? 4 : 8;
  slots += thread_index() * 16;
#pragma unroll
  for (int i = 0; i < QUADS; ++i) {
    sums[i][0] = sums[i][1] = sums[i][2] = sums[i][3] = 0;
    for (int first = 0; first < count; first += kAtOnce) {
      Quad parts[kAtOnce];
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j)
        parts[j] = first + j < count ? load_quad(slots + (first + j) * slot_bytes + i * THREADS * 16) : Quad{};
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j)
#pragma unroll
        for (int c = 0; c < 4; ++c) sums[i][c] += float_from_bits(parts[j].x[c]);
    }
  }
}

// The splits of a sum, each of whose blocks holds `sums`: added up in groups, then the groups, so that no block reads
// more than about 2 sqrt(splits) partial sums.
struct Splits {
  int count, group;
  unsigned char* partials;  // [sum][split][quad][thread], 16 bytes each
  int* tickets;             // [sum][1 + groups], zero

  LINATTN_HOST_DEVICE int groups() const { return (count + group - 1) / group; }
};

// Leaves the sum over all splits of sum number `index` in `sums` of one block, and returns true there.
template <int THREADS, int QUADS>
LINATTN_DEVICE bool reduce_splits(const Splits& s, int64_t index, int split, float (&sums)[QUADS][4],
                                  int* shared_flag) {
  const int64_t slot_bytes = static_cast<int64_t>(QUADS) * THREADS * 16;
  const int group = split / s.group, first = group * s.group;
  const int members = s.count - first < s.group ? s.count - first : s.group;
  unsigned char* slots = s.partials + index * s.count * slot_bytes;
  int* tickets = s.tickets + index * (1 + s.groups());
  store_partial<THREADS>(slots + split * slot_bytes, sums);
  if (!is_last_block(tickets + 1 + group, members, shared_flag)) return false;
  add_partials<THREADS>(slots + first * slot_bytes, slot_bytes,
                        members - (LINATTN_FAULT("one split is left out") ? 1 : 0), sums);
  if (s.groups() == 1) return true;
  store_partial<THREADS>(slots + first * slot_bytes, sums);
  if (!is_last_block(tickets, s.groups(), shared_flag)) return false;
  add_partials<THREADS>(slots, s.group * slot_bytes, s.groups(), sums);
  return true;
}

}  // namespace linattn::cuda
