// How a kernel runs in parallel without knowing whose threads they are: library.cpp hands in torch's pool, the native
// test driver std::thread or a plain loop.
#pragma once

namespace linattn {

struct Parallel {
  int threads;  // how many slots are worth having, >= 1
  // Calls body(context, slot) once for every slot in [0, slots), possibly at the same time, and returns when all calls
  // have returned; everything written before run() is visible in body, everything written in body after run().
  void (*run)(int slots, void (*body)(void* context, int slot), void* context);
};

}  // namespace linattn
