// A fiber: a stack and a place to go on from. On x86-64 a switch saves six registers, 50 times
// faster than swapcontext(), which asks the kernel for the signal mask; ucontext serves elsewhere.
#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>

#if defined(__x86_64__) && !defined(SC_UCONTEXT)
#define SC_OWN_SWITCH
#else
#include <ucontext.h>
#endif

namespace cuda_host {

constexpr size_t kStackBytes = 128 * 1024;  // committed page by page, as it is touched
constexpr uint64_t kStackEnd = 0x5ca1ab1e0ddba11;  // lies at the far end of every stack

struct Fiber {
  char* stack = nullptr;
#ifdef SC_OWN_SWITCH
  void* stack_pointer = nullptr;
#else
  ucontext_t context;
#endif
  ~Fiber() {
    if (stack) munmap(stack, kStackBytes);
  }
  bool overflowed() const { return stack && *reinterpret_cast<uint64_t*>(stack) != kStackEnd; }
};

inline void make_stack(Fiber& fiber) {
  if (fiber.stack == nullptr) {
    void* stack = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (stack == MAP_FAILED) perror("cuda_host: no memory for the stack of a fiber"), abort();
    fiber.stack = static_cast<char*>(stack);
  }
  *reinterpret_cast<uint64_t*>(fiber.stack) = kStackEnd;
}

#ifdef SC_OWN_SWITCH

// rdi: where to keep the present stack pointer; rsi: the one to go on with.
__attribute__((naked, noinline)) inline void switch_stacks(void** /*from*/, void* /*to*/) {
  asm("pushq %rbp\n pushq %rbx\n pushq %r12\n pushq %r13\n pushq %r14\n pushq %r15\n"
      "movq %rsp, (%rdi)\n movq %rsi, %rsp\n"
      "popq %r15\n popq %r14\n popq %r13\n popq %r12\n popq %rbx\n popq %rbp\n ret\n");
}

inline void switch_fiber(Fiber& from, Fiber& to) {
  switch_stacks(&from.stack_pointer, to.stack_pointer);
}

// The fiber will run entry(), which must never return.
inline void start_fiber(Fiber& fiber, void (*entry)()) {
  make_stack(fiber);
  auto* top = reinterpret_cast<void**>(fiber.stack + kStackBytes);
  *--top = nullptr;                         // keeps the stack aligned as a call would
  *--top = reinterpret_cast<void*>(entry);  // popped by ret
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  fiber.stack_pointer = top;
}

#else

inline void switch_fiber(Fiber& from, Fiber& to) { swapcontext(&from.context, &to.context); }

inline void start_fiber(Fiber& fiber, void (*entry)()) {
  make_stack(fiber);
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack;
  fiber.context.uc_stack.ss_size = kStackBytes;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, entry, 0);
}

#endif

}  // namespace cuda_host
