// The emulator's engine: fibers, warp collectives, barriers, asynchronous copies, and the checker behind them.
//
// The checker keeps vector clocks. Thread i of a block has a clock that advances whenever it releases (comes to a
// barrier, stores with release), and knows of every other thread of its block up to which clock its accesses happened
// before now; what it knows of other blocks it has from atomics. Every two bytes of memory remember their last write
// and the reads since. An access races with one that the thread does not know of.
#include "emulator.h"

#include <sys/mman.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <vector>

extern "C" {
extern const char __ehdr_start
    __attribute__((visibility("hidden")));  // the linker's: first and last byte of this library
extern char _end __attribute__((visibility("hidden")));
void emulation_switch(void** save_stack, void* to_stack);
}
// Saves what the calling convention preserves and continues on another stack.
asm(".text\n.globl emulation_switch\n.hidden emulation_switch\n.type emulation_switch,@function\nemulation_switch:\n"
    " pushq %rbp\n pushq %rbx\n pushq %r12\n pushq %r13\n pushq %r14\n pushq %r15\n"
    " movq %rsp,(%rdi)\n movq %rsi,%rsp\n"
    " popq %r15\n popq %r14\n popq %r13\n popq %r12\n popq %rbx\n popq %rbp\n ret\n"
    ".size emulation_switch,.-emulation_switch\n");

namespace emulation {

Thread* thread = nullptr;

namespace {

constexpr int kStack = 128 << 10;  // bytes of a fiber's stack, the lowest page a guard
constexpr int kMargin = 1024;      // bytes beside a region whose accesses are reported as beyond it
constexpr int kGrain = 2;          // bytes that share a memory cell of the checker
constexpr int kReaders = 64;       // concurrent readers that a cell remembers

enum Copies { kLate, kEager, kMixed };
enum How { kRead, kWrite, kAtomic, kCopyStarts };

struct Options {
  uint64_t seed = 0;  // 0: in order
  int copies = kLate;
  bool check = true;
} options;
std::string planted;
bool planted_reached = false;
std::map<std::string, int64_t> counters;

uint32_t code_offset(const void* address) {
  return static_cast<uint32_t>(static_cast<const char*>(address) - &__ehdr_start);
}
#define CALLER code_offset(__builtin_return_address(0))

// ------------------------------------------------------------------------------------------------- findings

struct Finding {
  std::string text;
  uint32_t pc, other_pc;
  int64_t count = 0;
};
std::map<std::string, Finding> findings;  // by kind and places, so that each is told once

void find(const std::string& kind, uint32_t pc, uint32_t other_pc, const std::string& text) {
  Finding& f = findings[kind + "\t" + std::to_string(pc) + "\t" + std::to_string(other_pc)];
  if (f.count++ == 0) f = {text, pc, other_pc, 1};
}

// ------------------------------------------------------------------------------------------------- memory

// serial 0: nobody, or before this launch.
struct Access {
  uint32_t serial = 0, clock = 0, pc = 0;
  int thread = 0;
};
struct Cell {
  Access write;
  Access first_read;
  uint32_t owner = 0;  // block (shared memory) or launch (global) that the above belongs to
  int more_reads = -1;
  bool written = false, atomic = false, in_flight = false;
};
struct Region {
  std::string name;
  char* base = nullptr;
  int64_t bytes = 0;
  bool shared = false, initialised = false, writable = true;
  std::vector<Cell> cells;
  std::vector<std::vector<Access>> more_reads;

  bool near(const char* a) const { return a >= base - kMargin && a < base + bytes + kMargin; }
  bool holds(const char* a, int64_t n) const { return a >= base && a + n <= base + bytes; }
};
std::map<char*, std::unique_ptr<Region>> regions;  // by base
uint32_t next_serial = 1;

// ------------------------------------------------------------------------------------------------- clocks

using Clocks = std::vector<uint32_t>;
using Foreign = std::map<uint32_t, Clocks>;  // other blocks' threads, by block
using ForeignPointer = std::shared_ptr<const Foreign>;

void join(Clocks& into, const uint32_t* from) {
  for (size_t i = 0; i < into.size(); ++i) into[i] = std::max(into[i], from[i]);
}
ForeignPointer join(const ForeignPointer& a, const ForeignPointer& b) {
  if (!b || a == b) return a;
  if (!a) return b;
  auto both = std::make_shared<Foreign>(*a);
  for (const auto& [serial, clocks] : *b) {
    auto [it, fresh] = both->emplace(serial, clocks);
    if (!fresh) join(it->second, clocks.data());
  }
  return both;
}

// What a barrier or an atomic variable hands from those who release to those who acquire.
struct Handover {
  Clocks clocks;
  ForeignPointer foreign;
};

// ------------------------------------------------------------------------------------------------- engine

struct Copy {
  char* target;
  const char* source;
  int bytes;
  bool done;
  void land() {
    if (done) return;
    std::memcpy(target, source, static_cast<size_t>(bytes));
    std::memset(target + bytes, 0, static_cast<size_t>(16 - bytes));
    done = true;
  }
};
enum State { kReady, kBlocked, kExited };
struct Fiber : Thread {
  int warp, lane;
  void* stack_pointer;
  char* stack;
  State state;
  const char* where;  // what it waits for
  std::vector<std::vector<Copy>> groups;
  std::vector<Copy> open_group;
  ForeignPointer foreign;
};
struct Meeting {  // of the lanes of a warp
  uint32_t lanes = 0, arrived = 0;
  std::string kind;
  void* argument[32];
};
struct Warp {
  uint32_t ready = 0, live = 0;
  std::array<Meeting, 32> meetings;  // by lowest lane
};
struct NamedBarrier {
  int threads = 0, arrived = 0;
  std::vector<int> waiting;
  Handover handover;
};

class Engine {
 public:
  Engine(int threads, int shared_bytes, void (*kernel)(void*), void* params)
      : threads_(threads),
        warps_((threads + 31) / 32),
        kernel_(kernel),
        params_(params),
        fibers_(threads),
        warp_(warps_),
        priority_(warps_),
        clocks_(static_cast<size_t>(threads) * threads) {
    stacks_ = static_cast<char*>(mmap(nullptr, static_cast<size_t>(threads) * kStack, PROT_READ | PROT_WRITE,
                                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    if (stacks_ == MAP_FAILED) std::perror("emulation: mmap"), std::abort();
    shared_raw_ = static_cast<char*>(std::aligned_alloc(1024, (shared_bytes + 2 * kMargin + 1023) / 1024 * 1024));
    shared_.name = "shared", shared_.shared = true, shared_.base = shared_raw_ + kMargin, shared_.bytes = shared_bytes;
    shared_.cells.resize((shared_bytes + kGrain - 1) / kGrain);
    for (int i = 0; i < threads; ++i) {
      Fiber& f = fibers_[i];
      f.index = i, f.warp = i / 32, f.lane = i % 32;
      f.stack = stacks_ + static_cast<size_t>(i) * kStack;
      mprotect(f.stack, 4096, PROT_NONE);
      f.shared = reinterpret_cast<unsigned char*>(shared_.base);
    }
  }
  ~Engine() {
    munmap(stacks_, static_cast<size_t>(threads_) * kStack);
    std::free(shared_raw_);
  }

  // False when the block could not be finished.
  bool run_block(std::array<int64_t, 3> block, uint32_t serial, uint32_t launch_serial) {
    serial_ = serial, launch_serial_ = launch_serial;
    random_ = (options.seed + 1) * 0x9e3779b97f4a7c15ull + (serial - launch_serial), random();
    live_ = threads_, arrived_ = 0, stuck_ = false;
    named_.clear();
    std::memset(shared_raw_, 0xff, shared_.bytes + 2 * kMargin);  // not a number, in every type
    shared_.more_reads.clear();
    std::fill(clocks_.begin(), clocks_.end(), 0);
    for (Warp& w : warp_) w = Warp();
    for (Fiber& f : fibers_) {
      f.block = block;
      clock(f.index) = 1;
      start(f);
      warp_[f.warp].live |= 1u << f.lane, warp_[f.warp].ready |= 1u << f.lane;
    }
    shuffle_priorities();
    ++counters["blocks"];
    while (live_ && !stuck_) {
      int best = -1;
      for (int w = 0; w < warps_; ++w)
        if (warp_[w].ready && (best < 0 || priority_[w] < priority_[best])) best = w;
      if (best < 0) {
        deadlock();
        break;
      }
      if (options.seed && (random() & 63) == 0) priority_[best] = random();  // so that skew between warps varies
      uint32_t ready = warp_[best].ready;
      int lane = __builtin_ctz(ready);
      if (options.seed) {
        uint32_t turn = random() & 31, turned = turn ? ready >> turn | ready << (32 - turn) : ready;
        lane = (__builtin_ctz(turned) + static_cast<int>(turn)) & 31;
      }
      warp_[best].ready &= ~(1u << lane);
      resume(fibers_[best * 32 + lane]);
    }
    return !stuck_;
  }

  Fiber& self() { return *static_cast<Fiber*>(thread); }
  uint32_t random() {
    random_ ^= random_ << 13, random_ ^= random_ >> 7, random_ ^= random_ << 17;
    return static_cast<uint32_t>(random_ >> 32);
  }

  // ---- barriers and collectives

  void barrier_block(uint32_t pc) {
    Fiber& f = self();
    if (live_ != threads_)
      find("barrier after exit", pc, 0, at(f) + ": barrier of a block some of whose threads returned");
    if (++arrived_ < live_) return wait(f, "barrier_block");
    release_block();
    warp_[f.warp].ready &= ~(1u << f.lane), f.state = kReady;
    step_aside(f);
  }

  void barrier_named(int id, int threads, bool wait_for_others, uint32_t pc) {
    Fiber& f = self();
    NamedBarrier& b = named_[id];
    if (b.arrived && b.threads != threads)
      find("barrier mismatch", pc, 0,
           at(f) + ": barrier " + std::to_string(id) + " for " + std::to_string(threads) + " threads, others named " +
               std::to_string(b.threads));
    if (threads % 32) find("barrier mismatch", pc, 0, at(f) + ": a barrier is for whole warps");
    b.threads = threads;
    if (b.arrived++ == 0) b.handover = {};
    give(f, b.handover);
    if (wait_for_others) b.waiting.push_back(f.index);
    if (b.arrived < threads) {
      if (wait_for_others) wait(f, "barrier_named");
      return;
    }
    NamedBarrier complete = std::move(b);
    b = {};
    for (int i : complete.waiting) {
      take(fibers_[i], complete.handover);
      if (i != f.index) wake(fibers_[i]);
    }
    ++counters["barriers"];
    shuffle_priorities();
    step_aside(f);
  }

  // The lanes meet; the last one to come runs `operation` on everybody's argument.
  template <class Operation>
  void meet(const char* kind, uint32_t lanes, void* argument, Operation operation) {
    Fiber& f = self();
    Warp& w = warp_[f.warp];
    if (threads_ % 32 && f.warp == warps_ - 1) lanes &= (1u << (threads_ % 32)) - 1;
    if (!(lanes >> f.lane & 1)) give_up(std::string(kind) + ": the calling lane is not among those named");
    if (lanes & ~w.live) give_up(std::string(kind) + ": names lanes that have returned");
    Meeting& m = w.meetings[__builtin_ctz(lanes)];
    if (m.arrived && (m.lanes != lanes || m.kind != kind))
      give_up("lanes of a warp diverge: some are at " + m.kind + ", others at " + kind);
    m.lanes = lanes, m.kind = kind, m.arrived |= 1u << f.lane, m.argument[f.lane] = argument;
    if (m.arrived != lanes) return wait(f, kind);
    m.arrived = 0;
    operation(m.argument, lanes);
    for (uint32_t rest = lanes & ~(1u << f.lane); rest; rest &= rest - 1)
      wake(fibers_[f.warp * 32 + __builtin_ctz(rest)]);
    step_aside(f);
  }

  void barrier_warp(uint32_t lanes) {
    int first = self().warp * 32;
    meet("barrier_warp", lanes, nullptr, [&](void**, uint32_t all) {
      Handover handover;
      for (uint32_t rest = all; rest; rest &= rest - 1) give(fibers_[first + __builtin_ctz(rest)], handover);
      for (uint32_t rest = all; rest; rest &= rest - 1) take(fibers_[first + __builtin_ctz(rest)], handover);
    });
  }

  // ---- memory

  Region* region(const char* a) {
    if (shared_.near(a)) return &shared_;
    if (last_ && last_->near(a)) return last_;
    auto after = regions.upper_bound(const_cast<char*>(a) + kMargin);
    if (after == regions.begin()) return nullptr;
    Region* r = std::prev(after)->second.get();
    return r->near(a) ? last_ = r : nullptr;
  }

  // False when the access would be outside every region: it must not be made.
  bool access(const void* p, int64_t bytes, How how, uint32_t pc, bool aligned = true) {
    const char* a = static_cast<const char*>(p);
    if (a >= stacks_ && a < stacks_ + static_cast<size_t>(threads_) * kStack) return true;
    Fiber& f = self();
    Region* r = region(a);
    if (!r) {
      if (host_owned(a)) return true;
      find("out of bounds", pc, 0, at(f) + (how == kRead ? " reads " : " writes ") + "memory that is no tensor's");
      return false;
    }
    if (!options.check) return r->holds(a, bytes);
    ++counters["checked"];
    auto place = [&](const char* b) { return at(f) + ", " + r->name + " + " + std::to_string(b - r->base); };
    if (!r->holds(a, bytes)) {
      find("out of bounds", pc, 0,
           place(a) + " of " + std::to_string(r->bytes) + " bytes, " + (how == kRead ? "read" : "write") + " of " +
               std::to_string(bytes));
      return false;
    }
    if (aligned && reinterpret_cast<uintptr_t>(a) % static_cast<uintptr_t>(bytes))
      find("misaligned", pc, 0, place(a) + ", access of " + std::to_string(bytes) + " bytes");
    if (how != kRead && !r->writable) find("write to an input", pc, 0, place(a));
    const Access now{serial_, clock(f.index), pc, f.index};
    const uint32_t owner = r->shared ? serial_ : launch_serial_;
    for (int64_t i = (a - r->base) / kGrain, end = (a - r->base + bytes - 1) / kGrain; i <= end; ++i) {
      Cell& c = r->cells[static_cast<size_t>(i)];
      if (c.owner != owner) {  // a former launch, or a former block's shared memory
        bool keep = c.written && !r->shared;
        c = Cell();
        c.owner = owner, c.written = keep;
      }
      auto told = [&](const Access& other) {
        return place(r->base + i * kGrain) + ", with thread " + std::to_string(other.thread) +
               (other.serial == serial_ ? "" : " of another block");
      };
      if (c.in_flight)
        find("race with a copy", pc, c.write.pc, told(c.write) + ", whose copy is still under way");
      else if (!(how == kAtomic && c.atomic) && !known(f, c.write))
        find(how == kRead ? "race: read after write" : "race: write after write", pc, c.write.pc, told(c.write));
      if (how == kRead) {
        if (!c.written && !r->initialised) find("uninitialised read", pc, 0, place(r->base + i * kGrain));
        if (r->writable) remember_read(f, *r, c, now);
        continue;
      }
      if (!known(f, c.first_read)) find("race: write after read", pc, c.first_read.pc, told(c.first_read));
      if (c.more_reads >= 0) {
        auto& reads = r->more_reads[static_cast<size_t>(c.more_reads)];
        for (const Access& read : reads)
          if (!known(f, read)) find("race: write after read", pc, read.pc, told(read));
        reads.clear();
      }
      c.first_read = Access();
      c.write = now, c.written = true, c.atomic = how == kAtomic, c.in_flight = how == kCopyStarts;
    }
    return true;
  }

  void copy_has_landed(const Copy& copy) {
    if (!options.check) return;
    Fiber& f = self();
    for (int64_t i = (copy.target - shared_.base) / kGrain, end = i + 16 / kGrain; i < end; ++i) {
      Cell& c = shared_.cells[static_cast<size_t>(i)];
      if (c.owner == serial_ && c.in_flight && c.write.thread == f.index)
        c.in_flight = false, c.write.clock = clock(f.index);
    }
  }

  bool in_shared(const char* a, int64_t bytes) const { return shared_.holds(a, bytes); }

  // Acquires from and releases to an atomic variable.
  void exchange(Fiber& f, const void* address) {
    auto& v = variables_[address];
    if (v) {
      auto own = v->find(serial_);
      if (own != v->end())
        for (int i = 0; i < threads_; ++i)
          clock(f.index, i) = std::max(clock(f.index, i), own->second[static_cast<size_t>(i)]);
      f.foreign = join(f.foreign, v);
    }
    const uint32_t* mine = &clock(f.index, 0);
    auto now = std::make_shared<Foreign>(f.foreign ? *f.foreign : Foreign());
    (*now)[serial_] = Clocks(mine, mine + threads_);
    v = join(v, now);
    ++clock(f.index);
  }

 private:
  const int threads_, warps_;
  void (*kernel_)(void*);
  void* params_;
  std::vector<Fiber> fibers_;
  std::vector<Warp> warp_;
  std::vector<uint32_t> priority_;
  Clocks clocks_;  // [thread][thread]
  char *stacks_, *shared_raw_;
  Region shared_;
  Region* last_ = nullptr;
  void* main_stack_ = nullptr;
  uint32_t serial_ = 0, launch_serial_ = 0;
  uint64_t random_ = 1;
  int live_ = 0, arrived_ = 0;
  bool stuck_ = false;
  std::map<int, NamedBarrier> named_;
  std::map<const void*, ForeignPointer> variables_;

  uint32_t& clock(int of, int about) { return clocks_[static_cast<size_t>(of) * threads_ + about]; }
  uint32_t& clock(int of) { return clock(of, of); }

  std::string at(const Fiber& f) const {
    return "block (" + std::to_string(f.block[0]) + ", " + std::to_string(f.block[1]) + ", " +
           std::to_string(f.block[2]) + ") thread " + std::to_string(f.index);
  }
  // Kernel parameters, what a thread is told of itself, and constants.
  bool host_owned(const char* a) const {
    const char* stack = static_cast<const char*>(main_stack_);
    return (a > stack - (64 << 10) && a < stack + (8 << 20)) || (a >= &__ehdr_start && a < &_end) ||
           (a >= reinterpret_cast<const char*>(fibers_.data()) &&
            a < reinterpret_cast<const char*>(fibers_.data() + fibers_.size()));
  }

  // Whether this access happened before now, as far as f knows.
  bool known(const Fiber& f, const Access& a) {
    if (a.serial == 0) return true;
    if (a.serial == serial_) return a.clock <= clock(f.index, a.thread);
    if (!f.foreign) return false;
    auto it = f.foreign->find(a.serial);
    return it != f.foreign->end() && a.clock <= it->second[static_cast<size_t>(a.thread)];
  }

  // Reads that happened before this one need not be remembered: a write that knows of this one knows of them.
  void remember_read(const Fiber& f, Region& r, Cell& c, const Access& now) {
    if (known(f, c.first_read)) {
      c.first_read = now;
      if (c.more_reads < 0) return;
    } else if (c.more_reads < 0) {
      c.more_reads = static_cast<int>(r.more_reads.size());
      r.more_reads.push_back({now});
      return;
    }
    auto& reads = r.more_reads[static_cast<size_t>(c.more_reads)];
    std::erase_if(reads, [&](const Access& read) { return known(f, read); });
    if (c.first_read.serial != now.serial || c.first_read.thread != now.thread) reads.push_back(now);
    if (reads.size() > kReaders) reads.erase(reads.begin());
  }

  void give(Fiber& f, Handover& to) {
    if (to.clocks.empty()) to.clocks.resize(static_cast<size_t>(threads_));
    join(to.clocks, &clock(f.index, 0));
    to.foreign = join(to.foreign, f.foreign);
    ++clock(f.index);
  }
  void take(Fiber& f, const Handover& from) {
    for (int i = 0; i < threads_; ++i)
      clock(f.index, i) = std::max(clock(f.index, i), from.clocks[static_cast<size_t>(i)]);
    f.foreign = join(f.foreign, from.foreign);
  }

  void release_block() {
    arrived_ = 0;
    ++counters["barriers"];
    shuffle_priorities();
    Handover handover;
    for (Fiber& f : fibers_)
      if (f.state != kExited) give(f, handover);
    for (Fiber& f : fibers_)
      if (f.state != kExited) take(f, handover), wake(f);
  }

  void shuffle_priorities() {
    for (int w = 0; w < warps_; ++w) priority_[w] = options.seed ? random() : static_cast<uint32_t>(w);
  }
  void wake(Fiber& f) { f.state = kReady, warp_[f.warp].ready |= 1u << f.lane; }
  void wait(Fiber& f, const char* where) {
    f.state = kBlocked, f.where = where;
    yield();
  }
  void step_aside(Fiber& f) {
    if (options.seed && (random() & 1)) warp_[f.warp].ready |= 1u << f.lane, yield();
  }
  [[noreturn]] void give_up(const std::string& why) {
    find("divergent collective", 0, 0, at(self()) + ": " + why);
    stuck_ = true;
    yield();
    std::abort();
  }
  void deadlock() {
    std::map<std::string, int> places;
    for (const Fiber& f : fibers_) ++places[f.state == kExited ? "return" : f.where];
    std::string text = at(fibers_[0]).substr(0, at(fibers_[0]).find(" thread"));
    for (const auto& [where, count] : places) text += ", " + std::to_string(count) + " threads at " + where;
    find("deadlock", 0, 0, text);
    stuck_ = true;
  }

  // ---- fibers
  void start(Fiber& f) {
    f.state = kReady, f.where = "", f.groups.clear(), f.open_group.clear(), f.foreign = nullptr;
    void** top = reinterpret_cast<void**>(f.stack + kStack);
    *--top = nullptr;
    *--top = reinterpret_cast<void*>(&enter);
    for (int saved = 0; saved < 6; ++saved) *--top = nullptr;
    f.stack_pointer = top;
  }
  void resume(Fiber& f) {
    char here;
    main_stack_ = &here;
    thread = &f;
    emulation_switch(&main_stack_pointer_, f.stack_pointer);
    thread = nullptr;
  }
  void yield() { emulation_switch(&self().stack_pointer, main_stack_pointer_); }
  static void enter();
  void leave() {
    Fiber& f = self();
    // Copies nobody waited for do land, but stay under way for the checker.
    for (auto& group : f.groups)
      for (Copy& copy : group) copy.land();
    for (Copy& copy : f.open_group) copy.land();
    f.state = kExited;
    warp_[f.warp].live &= ~(1u << f.lane);
    --live_;
    if (live_ && arrived_ == live_) {
      find("barrier after exit", 0, 0, at(f) + " returned while the others wait at a barrier of the block");
      release_block();
    }
    yield();
    std::abort();
  }
  void* main_stack_pointer_ = nullptr;
};

Engine* engine = nullptr;

void Engine::enter() {
  engine->kernel_(engine->params_);
  engine->leave();
}

float half_to_float(uint16_t h) {
  uint32_t sign = static_cast<uint32_t>(h & 0x8000) << 16, exponent = (h >> 10) & 31, fraction = h & 1023;
  if (exponent == 31) return float_from_bits(sign | 0x7f800000u | fraction << 13);
  if (exponent) return float_from_bits(sign | (exponent + 112) << 23 | fraction << 13);
  float x = static_cast<float>(fraction) * 0x1p-24f;
  return sign ? -x : x;
}
uint16_t half_from_float(float x) {
  uint32_t bits = float_bits(x), sign = (bits >> 16) & 0x8000;
  bits &= 0x7fffffff;
  if (bits > 0x7f800000u) return 0x7fff;
  if (bits >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00);
  if (bits < 0x38800000u)
    return static_cast<uint16_t>(sign | static_cast<uint32_t>(std::nearbyint(float_from_bits(bits) * 0x1p24f)));
  return static_cast<uint16_t>(sign | (bits + 0xfffu + ((bits >> 13) & 1) - 0x38000000u) >> 13);
}
uint16_t bfloat_from_float(float x) {
  uint32_t bits = float_bits(x);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fff;
  return static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1)) >> 16);
}

}  // namespace

// ------------------------------------------------------------------------------------------------- vocabulary

void barrier_block() { engine->barrier_block(CALLER); }
void barrier_warp(uint32_t lanes) { engine->barrier_warp(lanes); }
void barrier_named(int id, int threads, bool wait) { engine->barrier_named(id, threads, wait, CALLER); }

int atomic_add(int* address, int value, bool acquire_release) {
  if (!engine->access(address, sizeof(int), kAtomic, CALLER)) return 0;
  if (acquire_release) engine->exchange(engine->self(), address);
  int before = *address;
  *address += value;
  return before;
}

uint32_t shuffle_xor(uint32_t lanes, uint32_t value, int distance) {
  struct Argument {
    uint32_t value, result;
    int distance;
  } mine{value, 0, distance};
  engine->meet("shuffle_xor", lanes, &mine, [](void** arguments, uint32_t all) {
    for (int lane = 0; lane < 32; ++lane) {
      if (!(all >> lane & 1)) continue;
      auto* a = static_cast<Argument*>(arguments[lane]);
      int from = (lane ^ a->distance) & 31;
      a->result =
          all >> from & 1 ? static_cast<Argument*>(arguments[from])->value : 0xffffffffu;  // undefined: not a number
    }
  });
  return mine.result;
}

void load_quad(uint32_t (&value)[4], const void* p) {
  if (engine->access(p, 16, kRead, CALLER)) std::memcpy(value, p, 16);
}
void store_quad(void* p, const uint32_t (&value)[4]) {
  if (engine->access(p, 16, kWrite, CALLER)) std::memcpy(p, value, 16);
}

void copy_async(void* target, const void* source, int bytes) {
  char* to = static_cast<char*>(target);
  const uint32_t pc = CALLER;
  ++counters["copies"];
  if (bytes < 0 || bytes > 16 || !engine->in_shared(to, 16)) {
    find("out of bounds", pc, 0,
         "asynchronous copy of " + std::to_string(bytes) + " bytes, not into shared memory or not 0..16");
    return;
  }
  if (bytes && reinterpret_cast<uintptr_t>(source) % 16) find("misaligned", pc, 0, "source of an asynchronous copy");
  if (bytes && !engine->access(source, bytes, kRead, pc, false)) bytes = 0;
  engine->access(to, 16, kCopyStarts, pc);
  Copy copy{to, static_cast<const char*>(source), bytes, false};
  if (options.copies == kEager || (options.copies == kMixed && engine->random() & 1)) copy.land();
  engine->self().open_group.push_back(copy);
}
void copy_async_commit() {
  Fiber& f = engine->self();
  f.groups.push_back(std::move(f.open_group));
  f.open_group.clear();
}
void copy_async_wait(int pending) {
  Fiber& f = engine->self();
  while (static_cast<int>(f.groups.size()) > pending) {
    for (Copy& copy : f.groups.front()) {
      copy.land();
      engine->copy_has_landed(copy);
    }
    f.groups.erase(f.groups.begin());
  }
}

void load_matrices(uint32_t (&r)[4], const void* row, bool transposed) {
  struct Argument {
    uint32_t* r;
    const void* row;
  } mine{r, row};
  const uint32_t pc = CALLER;
  if (!engine->in_shared(static_cast<const char*>(row), 16)) {
    find("out of bounds", pc, 0, "row of a matrix that is not in shared memory");
    mine.row = nullptr;
  } else {
    engine->access(row, 16, kRead, pc);
  }
  engine->meet(transposed ? "load_matrices_transposed" : "load_matrices", 0xffffffffu, &mine,
               [&](void** arguments, uint32_t) {
                 for (int matrix = 0; matrix < 4; ++matrix) {
                   uint16_t value[8][8] = {};
                   uint32_t banks = 0;
                   std::set<const void*> rows;
                   for (int i = 0; i < 8; ++i) {
                     const void* at = static_cast<Argument*>(arguments[matrix * 8 + i])->row;
                     if (at) std::memcpy(value[i], at, 16);
                     rows.insert(at);
                     banks |= 1u << (reinterpret_cast<uintptr_t>(at) / 16 % 8);
                   }
                   // Eight rows of 16 bytes fill the 128 bytes that the banks deliver at once; the same row is read
                   // once.
                   if (__builtin_popcount(banks) < static_cast<int>(rows.size()))
                     find("bank conflict", pc, 0,
                          std::to_string(rows.size()) + " rows of a matrix lie in " +
                              std::to_string(__builtin_popcount(banks)) + " of 8 groups of banks");
                   for (int lane = 0; lane < 32; ++lane) {
                     int i = lane / 4, j = lane % 4 * 2;
                     uint32_t low = transposed ? value[j][i] : value[i][j],
                              high = transposed ? value[j + 1][i] : value[i][j + 1];
                     static_cast<Argument*>(arguments[lane])->r[matrix] = low | high << 16;
                   }
                 }
               });
}

void multiply_add(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], bool bfloat16) {
  struct Argument {
    float* d;
    const uint32_t *a, *b;
  } mine{d, a, b};
  engine->meet(bfloat16 ? "multiply_add of bfloat16" : "multiply_add of float16", 0xffffffffu, &mine,
               [&](void** arguments, uint32_t) {
                 ++counters["multiply_add"];
                 using Row = float __attribute__((vector_size(32)));
                 float left[16][16];
                 union {
                   Row row[16];
                   float at[16][8];
                 } right, sum;
                 auto value = [&](uint32_t bits, int half) {
                   return to_float(static_cast<uint16_t>(bits >> 16 * half), bfloat16);
                 };
                 for (int lane = 0; lane < 32; ++lane) {
                   auto* p = static_cast<Argument*>(arguments[lane]);
                   int g = lane / 4, t = lane % 4 * 2;
                   for (int i = 0; i < 4; ++i)
                     for (int h = 0; h < 2; ++h) left[g + (i & 1) * 8][t + (i >> 1) * 8 + h] = value(p->a[i], h);
                   for (int i = 0; i < 2; ++i)
                     for (int h = 0; h < 2; ++h) right.at[t + i * 8 + h][g] = value(p->b[i], h);
                   for (int i = 0; i < 4; ++i) sum.at[g + (i >> 1) * 8][t + (i & 1)] = p->d[i];
                 }
                 for (int i = 0; i < 16; ++i)
                   for (int k = 0; k < 16; ++k) sum.row[i] += left[i][k] * right.row[k];
                 for (int lane = 0; lane < 32; ++lane) {
                   int g = lane / 4, t = lane % 4 * 2;
                   for (int i = 0; i < 4; ++i)
                     static_cast<Argument*>(arguments[lane])->d[i] = sum.at[g + (i >> 1) * 8][t + (i & 1)];
                 }
               });
}

bool fault(const char* name) {
  if (planted.empty() || planted != name) return false;
  return planted_reached = true;
}

float exp2_fast(float x) {
  float y = std::exp2(x);
  return y < 0x1p-126f ? 0.f : y;
}
float exp_precise(float x) { return std::exp(x); }
float to_float(uint16_t bits, bool bfloat16) {
  return bfloat16 ? float_from_bits(static_cast<uint32_t>(bits) << 16) : half_to_float(bits);
}
uint16_t from_float(float x, bool bfloat16) { return bfloat16 ? bfloat_from_float(x) : half_from_float(x); }

// ------------------------------------------------------------------------------------------------- host

const char* launch(std::array<int64_t, 3> grid, int threads, int shared_bytes, void (*kernel)(void*), void* params) {
  // What every GPU from sm_80 on accepts; shared memory as on sm_80 and sm_90.
  if (threads < 1 || threads > 1024) return "emulation: a block has 1 to 1024 threads";
  if (shared_bytes > 163 * 1024) return "emulation: more than 163 KiB of shared memory";
  if (grid[0] < 1 || grid[0] >= int64_t{1} << 31) return "emulation: grid.x is not in 1..2^31 - 1";
  if (grid[1] < 1 || grid[1] > 65535 || grid[2] < 1 || grid[2] > 65535)
    return "emulation: grid.y and grid.z are not in 1..65535";
  const int64_t blocks = grid[0] * grid[1] * grid[2];
  std::vector<int64_t> order(static_cast<size_t>(blocks));
  for (int64_t i = 0; i < blocks; ++i) order[static_cast<size_t>(i)] = i;
  uint64_t state = options.seed * 0x9e3779b97f4a7c15ull + 1;
  for (int64_t i = blocks; options.seed && i > 1; --i) {
    state = state * 6364136223846793005ull + 1442695040888963407ull;
    std::swap(order[static_cast<size_t>(i - 1)], order[(state >> 33) % static_cast<uint64_t>(i)]);
  }
  const uint32_t first = next_serial;
  next_serial += static_cast<uint32_t>(blocks);
  for (auto& [base, r] : regions) r->more_reads.clear();
  Engine e(threads, shared_bytes, kernel, params);
  engine = &e;
  for (int64_t i : order)
    if (!e.run_block({i % grid[0], i / grid[0] % grid[1], i / (grid[0] * grid[1])}, first + static_cast<uint32_t>(i),
                     first))
      break;
  engine = nullptr;
  ++counters["launches"];
  return nullptr;
}

const char* fill_zero(void* p, int64_t bytes) {
  std::memset(p, 0, static_cast<size_t>(bytes));
  auto after = regions.upper_bound(static_cast<char*>(p));
  Region* r = after == regions.begin() ? nullptr : std::prev(after)->second.get();
  if (!r || !r->holds(static_cast<char*>(p), bytes)) return "emulation: fill_zero outside every tensor";
  int64_t begin = static_cast<char*>(p) - r->base;
  for (int64_t i = begin / kGrain; i < (begin + bytes + kGrain - 1) / kGrain; ++i)
    r->cells[static_cast<size_t>(i)] = Cell(), r->cells[static_cast<size_t>(i)].written = true;
  return nullptr;
}

}  // namespace emulation

// ---------------------------------------------------------------------------------------------------- from Python

#pragma GCC visibility push(default)
extern "C" {
using namespace emulation;

void emulation_configure(uint64_t seed, int copies, int check, const char* fault) {
  options = {seed, copies, check != 0};
  planted = fault;
  planted_reached = false;
  findings.clear();
  counters.clear();
}
int emulation_fault_reached() { return planted_reached; }
void emulation_add_region(void* base, int64_t bytes, int initialised, int writable, const char* name) {
  auto r = std::make_unique<Region>();
  r->name = name, r->base = static_cast<char*>(base), r->bytes = bytes;
  r->initialised = initialised, r->writable = writable;
  r->cells.resize(static_cast<size_t>((bytes + kGrain - 1) / kGrain));
  regions[r->base] = std::move(r);
}
void emulation_clear_regions() { regions.clear(); }
// One line per finding: kind, address in the library of the access and of the other one, count, text.
const char* emulation_findings() {
  static std::string text;
  text.clear();
  for (const auto& [key, f] : findings) text += key + "\t" + std::to_string(f.count) + "\t" + f.text + "\n";
  return text.c_str();
}
int64_t emulation_counter(const char* name) { return counters[name]; }
uint16_t emulation_from_float(float x, int bfloat16) { return from_float(x, bfloat16 != 0); }
float emulation_to_float(uint16_t bits, int bfloat16) { return to_float(bits, bfloat16 != 0); }

// ---- what -fsanitize=thread calls before each load and store of a kernel
#define HOOK(name, bytes, how, aligned)                         \
  void name(void* p) {                                          \
    if (thread) engine->access(p, bytes, how, CALLER, aligned); \
  }
#define HOOKS(bytes)                                        \
  HOOK(__tsan_read##bytes, bytes, kRead, true)              \
  HOOK(__tsan_write##bytes, bytes, kWrite, true)            \
  HOOK(__tsan_unaligned_read##bytes, bytes, kRead, false)   \
  HOOK(__tsan_unaligned_write##bytes, bytes, kWrite, false) \
  HOOK(__tsan_volatile_read##bytes, bytes, kRead, true)     \
  HOOK(__tsan_volatile_write##bytes, bytes, kWrite, true)
HOOKS(1)
HOOKS(2)
HOOKS(4)
HOOKS(8)
HOOKS(16)
void __tsan_read_range(void* p, size_t bytes) {
  if (thread && bytes) engine->access(p, static_cast<int64_t>(bytes), kRead, CALLER, false);
}
void __tsan_write_range(void* p, size_t bytes) {
  if (thread && bytes) engine->access(p, static_cast<int64_t>(bytes), kWrite, CALLER, false);
}
void __tsan_vptr_update(void*, void*) {}
void __tsan_vptr_read(void*) {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_init() {}
}
