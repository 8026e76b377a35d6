// Small kernels for the emulator's own tests: each is right, or has one mistake that must be found.
#include <cstring>

#include "fragments.h"

namespace linattn::cuda {
namespace {

struct Params {
  float *in, *out;  // 64 values each; in holds 0, 1, 2 ...
  int* counter;     // 0
};
using Kernel = void(Params);

int lane() { return thread_index() % kWarp; }
int warp() { return thread_index() / kWarp; }
float* shared() { return reinterpret_cast<float*>(shared_memory()); }
float sum(const float* x, int count) {
  float total = 0;
  for (int i = 0; i < count; ++i) total += x[i];
  return total;
}

// ---- barriers and plain accesses
void sum_after_barrier(Params p) {
  shared()[thread_index()] = 1;
  barrier_block();
  if (thread_index() == 0) p.out[block_x()] = sum(shared(), 64);
}
void sum_without_barrier(Params p) {
  shared()[thread_index()] = 1;
  if (thread_index() == 0) p.out[0] = sum(shared() + 32, 32);
}
void overwrite_without_barrier(Params p) {
  shared()[thread_index()] = 1;
  barrier_block();
  p.out[thread_index()] = shared()[63 - thread_index()];
  shared()[thread_index()] = 2;
}
void warp_exchange(Params p) {
  shared()[thread_index()] = static_cast<float>(lane());
  barrier_warp();
  p.out[thread_index()] = shared()[thread_index() ^ 1];
}
void warp_exchange_without_barrier(Params p) {
  shared()[thread_index()] = static_cast<float>(lane());
  shuffle_xor(1.f, 1);  // brings the lanes together, but orders no memory
  p.out[thread_index()] = shared()[thread_index() ^ 1];
}
void overwrite_after_shuffle(Params p) {
  shared()[lane()] = 1;
  barrier_warp();
  const float x = shared()[lane() ^ 1];
  shuffle_xor(1.f, 1);
  shared()[lane()] = 2;
  p.out[lane()] = x;
}
void first_of_many_readers_overwrites(Params p) {
  if (lane() == 0) shared()[0] = 1;
  barrier_warp();
  p.out[lane()] = shared()[0];
  shuffle_xor(1.f, 1);
  if (lane() == 0) shared()[0] = 2;
}
void reads_what_a_former_block_left(Params p) {
  if (block_x() == 0) shared()[lane()] = 1;
  if (block_x() == 1) p.out[lane()] = shared()[lane()];
}
void warp_barrier_across_warps(Params p) {
  shared()[thread_index()] = 1;
  barrier_warp();
  p.out[thread_index()] = shared()[thread_index() ^ 32];
}
void blocks_write_one_place(Params p) {
  if (thread_index() == 0) p.out[0] = static_cast<float>(block_x());
}
void block_reads_what_another_writes(Params p) {
  if (thread_index() == 0 && block_x()) p.out[1] = 1;
  if (thread_index() == 0 && !block_x()) p.out[2] = p.out[1];
}
void uninitialised_shared(Params p) { p.out[thread_index()] = shared()[thread_index()]; }
void uninitialised_global(Params p) { p.out[thread_index()] = p.out[thread_index()] + 1; }
void shared_out_of_bounds(Params) { shared()[thread_index() + 1] = 1; }
void global_out_of_bounds(Params p) { p.out[thread_index() + 1] = 1; }
void misaligned(Params p) {
  if (thread_index() == 0) store_quad(p.out, load_quad(p.in + 1));
}
void writes_an_input(Params p) { p.in[thread_index()] = 1; }
void barrier_after_exit(Params) {
  if (warp() == 0) return;
  barrier_block();
}
void lanes_diverge(Params p) {
  if (lane() < 16)
    barrier_warp();
  else
    p.out[lane()] = shuffle_xor(1.f, 1);
}
void lane_missing(Params p) {
  if (lane() != 7) p.out[lane()] = shuffle_xor(1.f, 1);
}

// ---- named barriers: warp 0 fills, warp 1 empties
void producer_and_consumer(Params p) {
  for (int turn = 0; turn < 3; ++turn) {
    if (warp() == 0) {
      if (turn) barrier_named(2, 64);  // emptied
      shared()[lane()] = p.in[lane() + turn];
      barrier_named_arrive(1, 64);  // filled
    } else {
      barrier_named(1, 64);
      p.out[lane()] = shared()[31 - lane()];
      if (turn < 2) barrier_named_arrive(2, 64);
    }
  }
}
void producer_does_not_wait(Params p) {
  for (int turn = 0; turn < 2; ++turn) {
    if (warp() == 0) {
      shared()[lane()] = p.in[lane() + turn];
      barrier_named_arrive(1 + turn, 64);
    } else {
      barrier_named(1 + turn, 64);
      p.out[lane()] = shared()[31 - lane()];
    }
  }
}
void arrives_before_it_writes(Params p) {
  if (warp() == 0) {
    barrier_named_arrive(1, 64);
    shared()[lane()] = 1;
  } else {
    barrier_named(1, 64);
    p.out[lane()] = shared()[lane()];
  }
}
void nobody_arrives(Params) {
  if (warp() == 1) barrier_named(1, 64);
}
void barrier_counts_differ(Params) { barrier_named(1, warp() ? 64 : 96); }

// ---- atomics: the last of four blocks sums what all have written
template <bool ORDERED, bool BARRIER_BEFORE, bool BARRIER_AFTER>
void last_block_sums(Params p) {
  int* last = reinterpret_cast<int*>(shared_memory());
  p.out[block_x() * 16 + thread_index() % 16] = static_cast<float>(thread_index() % 16);
  if constexpr (BARRIER_BEFORE) barrier_block();
  if (thread_index() == 0)
    *last = ORDERED ? atomic_add_acquire_release(p.counter, 1) : atomic_add_relaxed(p.counter, 1);
  if constexpr (BARRIER_AFTER) barrier_block();
  if (thread_index() == 15 && (BARRIER_AFTER ? *last == 3 : true)) p.in[0] = sum(p.out, 64);
}
void ticket_without_barrier(Params p) {
  p.out[block_x() * 16 + thread_index()] = 1;
  if (thread_index() == 0 && atomic_add_acquire_release(p.counter, 1) == 3) p.in[0] = sum(p.out, 64);
}
void atomics_alone(Params p) { atomic_add_relaxed(p.counter, 1); }
void atomic_and_plain_store(Params p) {
  if (block_x()) atomic_add_relaxed(p.counter, 1);
  if (!block_x() && thread_index() == 0) *p.counter = 5;
}

// ---- asynchronous copies
void copy_then_wait(Params p) {
  if (lane() < 8) copy_async_16(shared() + 4 * lane(), p.in + 4 * lane(), 16);
  if (lane() == 8) copy_async_16(shared() + 32, p.in, 4);
  copy_async_commit();
  copy_async_wait<0>();
  barrier_warp();
  p.out[lane()] = shared()[lane()];
  if (lane() < 4) p.out[32 + lane()] = shared()[32 + lane()];
}
void copy_without_wait(Params p) {
  if (lane() < 8) copy_async_16(shared() + 4 * lane(), p.in + 4 * lane(), 16);
  copy_async_commit();
  copy_async_wait<1>();
  barrier_warp();
  p.out[lane()] = shared()[lane()];
}
void copy_without_commit(Params p) {
  if (lane() < 8) copy_async_16(shared() + 4 * lane(), p.in + 4 * lane(), 16);
  copy_async_wait<0>();
  barrier_warp();
  p.out[lane()] = shared()[lane()];
}
void copy_without_barrier(Params p) {
  if (lane() < 8) copy_async_16(shared() + 4 * lane(), p.in + 4 * lane(), 16);
  copy_async_commit();
  copy_async_wait<0>();
  p.out[lane()] = shared()[lane()];
}
void copy_over_what_is_read(Params p) {
  shared()[lane()] = 1;
  barrier_warp();
  p.out[lane()] = shared()[31 - lane()];
  if (lane() < 8) copy_async_16(shared() + 4 * lane(), p.in + 4 * lane(), 16);
  copy_async_commit();
  copy_async_wait<0>();
}
void copy_misaligned(Params p) {
  if (lane() == 0) copy_async_16(shared(), p.in + 1, 16);
  copy_async_commit();
  copy_async_wait<0>();
}

// ---- fragments
void bank_conflict(Params p) {  // rows of 64 bytes: eight of them lie in two groups of banks
  for (int i = lane(); i < 512; i += kWarp) shared()[i] = 0;
  barrier_warp();
  uint32_t r[4];
  load_matrices(r, shared() + 16 * lane());
  p.out[lane()] = float_from_bits(r[0]);
}

struct Case {
  const char* name;
  Kernel* kernel;
  int blocks, threads, shared_bytes;
};
#define CASE(kernel, ...) {#kernel, kernel, __VA_ARGS__}
const Case kCases[] = {
    CASE(sum_after_barrier, 4, 64, 256),
    CASE(sum_without_barrier, 1, 64, 256),
    CASE(overwrite_without_barrier, 1, 64, 256),
    CASE(warp_exchange, 1, 64, 256),
    CASE(warp_exchange_without_barrier, 1, 64, 256),
    CASE(overwrite_after_shuffle, 1, 32, 128),
    CASE(first_of_many_readers_overwrites, 1, 32, 128),
    CASE(reads_what_a_former_block_left, 2, 32, 128),
    CASE(warp_barrier_across_warps, 1, 64, 256),
    CASE(blocks_write_one_place, 3, 32, 0),
    CASE(block_reads_what_another_writes, 2, 32, 0),
    CASE(uninitialised_shared, 1, 32, 256),
    CASE(uninitialised_global, 1, 32, 0),
    CASE(shared_out_of_bounds, 1, 32, 128),
    CASE(global_out_of_bounds, 1, 64, 0),
    CASE(misaligned, 1, 32, 0),
    CASE(writes_an_input, 1, 32, 0),
    CASE(barrier_after_exit, 1, 64, 0),
    CASE(lanes_diverge, 1, 32, 0),
    CASE(lane_missing, 1, 32, 0),
    CASE(producer_and_consumer, 1, 64, 128),
    CASE(producer_does_not_wait, 1, 64, 128),
    CASE(arrives_before_it_writes, 1, 64, 128),
    CASE(nobody_arrives, 1, 64, 0),
    CASE(barrier_counts_differ, 1, 96, 0),
    {"last_block_sums", last_block_sums<true, true, true>, 4, 16, 16},
    {"last_block_sums_relaxed", last_block_sums<false, true, true>, 4, 16, 16},
    {"last_block_sums_without_barrier_after", last_block_sums<true, true, false>, 4, 16, 16},
    {"last_block_sums_without_barrier_before", last_block_sums<true, false, true>, 4, 16, 16},
    CASE(ticket_without_barrier, 4, 16, 0),
    CASE(atomics_alone, 5, 64, 0),
    CASE(atomic_and_plain_store, 2, 32, 0),
    CASE(copy_then_wait, 1, 32, 256),
    CASE(copy_without_wait, 1, 32, 256),
    CASE(copy_without_commit, 1, 32, 256),
    CASE(copy_without_barrier, 1, 32, 256),
    CASE(copy_over_what_is_read, 1, 32, 256),
    CASE(copy_misaligned, 1, 32, 256),
    CASE(bank_conflict, 1, 32, 2048),
};

}  // namespace
}  // namespace linattn::cuda

#pragma GCC visibility push(default)
extern "C" {
using namespace linattn::cuda;

// Names of all cases, separated by blanks.
const char* self_test_cases() {
  static char names[4096];
  names[0] = 0;
  for (const Case& c : kCases) std::strcat(std::strcat(names, c.name), " ");
  return names;
}
const char* self_test(const char* name, float* in, float* out, int* counter) {
  for (const Case& c : kCases)
    if (!std::strcmp(c.name, name))
      return launch(c.kernel, {c.blocks, 1, 1}, c.threads, c.shared_bytes, nullptr, Params{in, out, counter});
  return "there is no such case";
}
const char* self_test_fragments(int bfloat16, const uint16_t* left, const uint16_t* right, const float* sum,
                                uint32_t* a, uint32_t* a_transposed, uint32_t* b, float* d) {
  Fragments p{left, right, sum, a, a_transposed, b, d};
  return bfloat16 ? launch(fragments_kernel<BFloat16>, {1, 1, 1}, 32, 1024, nullptr, p)
                  : launch(fragments_kernel<Float16>, {1, 1, 1}, 32, 1024, nullptr, p);
}
const char* self_test_launch(int64_t x, int64_t y, int threads, int shared_bytes) {
  return launch(+[](Params) {}, {x, y, 1}, threads, shared_bytes, nullptr, Params{});
}
}
