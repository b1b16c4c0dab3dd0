// Fibers: stacks, and how the processor goes from one to another.
#include <sys/mman.h>

#include "machine.h"

#if !defined(__x86_64__)
#error "the emulator switches fibers on x86-64 only"
#endif

extern "C" {
// Saves the registers that a call keeps, on the old stack, and takes them from the new one.
void mmk_switch_stack(void** save, void* load);
}
asm(R"(
.text
.globl mmk_switch_stack
.hidden mmk_switch_stack
mmk_switch_stack:
  push %rbp
  push %rbx
  push %r12
  push %r13
  push %r14
  push %r15
  mov %rsp, (%rdi)
  mov %rsi, %rsp
  pop %r15
  pop %r14
  pop %r13
  pop %r12
  pop %rbx
  pop %rbp
  ret
)");

namespace emulator {
namespace {

constexpr size_t stack_bytes = 256 << 10, guard_bytes = 4096;

// The scheduler's.
void* main_stack_pointer;
void* main_tsan;
void* main_fake_stack;
const void* main_stack;
size_t main_stack_bytes;

void enter() {
  if (__sanitizer_finish_switch_fiber)
    __sanitizer_finish_switch_fiber(nullptr, &main_stack, &main_stack_bytes);
  run_thread();
  running->done = true;
  to_scheduler(true);
  __builtin_trap();
}

}  // namespace

void become_scheduler() {
  if (__tsan_get_current_fiber)
    main_tsan = __tsan_get_current_fiber();
}

void prepare(Fiber& f) {
  if (!f.stack) {
    f.stack = static_cast<char*>(mmap(nullptr, guard_bytes + stack_bytes, PROT_READ | PROT_WRITE,
                                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    mprotect(f.stack, guard_bytes, PROT_NONE);
    if (__tsan_create_fiber)
      f.tsan = __tsan_create_fiber(0);
  }
  void** top = reinterpret_cast<void**>(f.stack + guard_bytes + stack_bytes);
  *--top = nullptr;  // aligns the stack, as a call would
  *--top = reinterpret_cast<void*>(enter);
  f.stack_pointer = top - 6;
}

void to_scheduler(bool last) {
  Fiber* self = running;
  void* fake = nullptr;
  if (__tsan_switch_to_fiber)
    __tsan_switch_to_fiber(main_tsan, 1);  // 1: without synchronising
  if (__sanitizer_start_switch_fiber)
    __sanitizer_start_switch_fiber(last ? nullptr : &fake, main_stack, main_stack_bytes);
  mmk_switch_stack(&self->stack_pointer, main_stack_pointer);
  if (__sanitizer_finish_switch_fiber)
    __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
}

void to_fiber(Fiber& f) {
  running = &f;
  current = &f;
  if (__tsan_switch_to_fiber)
    __tsan_switch_to_fiber(f.tsan, 1);
  if (__sanitizer_start_switch_fiber)
    __sanitizer_start_switch_fiber(&main_fake_stack, f.stack + guard_bytes, stack_bytes);
  mmk_switch_stack(&main_stack_pointer, f.stack_pointer);
  if (__sanitizer_finish_switch_fiber)
    __sanitizer_finish_switch_fiber(main_fake_stack, nullptr, nullptr);
}

}  // namespace emulator
