// Runs a kernel on the CPU: its threadgroups one after the other, the threads of each as fibers that change at
// barriers. Compiled with shim.h and the kernel before it, and with CALL as the kernel's call.

constexpr size_t STACK = 1 << 16, SHARED_BYTES = 1 << 15; // Metal has 32 kB of shared memory
alignas(64) char threadgroup_memory[SHARED_BYTES];
#if defined(EMULATE_CUDA)
uint3 threadIdx, blockIdx;
#endif

namespace {

struct Fiber {
  ucontext_t context;
  jmp_buf place;
  bool started, done;
  std::vector<char> stack = std::vector<char>(STACK);
};

std::vector<Fiber> fibers;
jmp_buf scheduler;
uint3 thread_position, group_position;
void* const* buffers;

// swapcontext asks the kernel for signal masks at each change; a long jump does not.
[[gnu::noinline]] void leave() {
  if (_setjmp(fibers[thread_position.x].place) == 0)
    _longjmp(scheduler, 1);
}

void run_thread() {
  for (;;) {
    CALL;
    fibers[thread_position.x].done = true;
    leave();
  }
}

void enter(unsigned t) {
  Fiber& fiber = fibers[t];
  thread_position.x = t;
#if defined(EMULATE_CUDA)
  threadIdx = thread_position, blockIdx = group_position;
#endif
  if (_setjmp(scheduler) != 0)
    return;
  if (fiber.started)
    _longjmp(fiber.place, 1);
  fiber.started = true;
  getcontext(&fiber.context);
  fiber.context.uc_stack = {fiber.stack.data(), 0, STACK};
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, run_thread, 0);
  setcontext(&fiber.context);
}

struct Order {
  std::vector<unsigned> threads;
  unsigned seed;

  Order(unsigned count, unsigned kind) : threads(count), seed(kind) {
    for (unsigned i = 0; i < count; i++)
      threads[i] = kind == 1 ? count - 1 - i : i;
  }

  void shuffle() { // 0: rising, 1: falling, else another order after each barrier
    if (seed < 2)
      return;
    for (size_t i = threads.size() - 1; i > 0; i--) {
      seed = seed * 1664525u + 1013904223u;
      std::swap(threads[i], threads[(seed >> 8) % (i + 1)]);
    }
  }
};

// Whether each barrier of the group is reached by all of its threads or by none.
bool run_group(Order& order) {
  std::memset(threadgroup_memory, 0xff, SHARED_BYTES); // NaN
  for (auto& fiber : fibers)
    fiber.done = false;
  for (;;) {
    order.shuffle();
    size_t done = 0;
    for (unsigned t : order.threads) {
      enter(t);
      done += fibers[t].done;
    }
    if (done != 0)
      return done == fibers.size();
  }
}

} // namespace

void wait_for_the_group() {
  leave();
}

extern "C" int run(void* const* arrays, unsigned groups, unsigned threads, unsigned order, int flush_subnormals) {
  const unsigned saved = _mm_getcsr();
  if (flush_subnormals)
    _mm_setcsr(saved | 0x8040); // FTZ and DAZ
  if (fibers.empty())
    fibers = std::vector<Fiber>(threads);
  buffers = arrays;
  Order threads_in(threads, order);
  bool right = true;
  for (unsigned group = 0; group < groups && right; group++) {
    group_position = {group, 0, 0};
    right = run_group(threads_in);
  }
  if (!right)
    fibers.clear();
  _mm_setcsr(saved);
  return right ? 0 : 1;
}
