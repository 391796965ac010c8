#include "threads.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdlib>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>
#if defined(__linux__)
#include <sched.h>
#endif

namespace distclip {
namespace {

constexpr auto SPIN = std::chrono::microseconds(50); // leaves follow each other faster than a sleeping thread wakes
constexpr int MOST_THREADS = 8; // memory is the limit long before

int number(const char* variable) {
  const char* text = std::getenv(variable);
  return text ? std::atoi(text) : 0;
}

int processors() {
#if defined(__linux__)
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof(set), &set) == 0)
    return CPU_COUNT(&set);
#endif
  return static_cast<int>(std::thread::hardware_concurrency());
}

struct Job {
  Job(size_t n, const std::function<void(size_t)>& work) : n(n), work(work) {}

  size_t n;
  const std::function<void(size_t)>& work;
  std::atomic<size_t> next{0};
  std::exception_ptr error;
  std::mutex error_mutex;

  void run() {
    for (size_t i = next++; i < n; i = next++) {
      try {
        work(i);
      } catch (...) {
        std::lock_guard lock(error_mutex);
        error = std::current_exception();
      }
    }
  }
};

// Workers join a job while it is open. One that never comes, as in a forked child, is not waited for.
class Pool {
 public:
  explicit Pool(int workers) {
    for (int i = 0; i < workers; i++)
      std::thread([this] { serve(); }).detach();
  }

  // False when another thread has the pool.
  bool run(Job& job) {
    std::unique_lock busy(caller_, std::try_to_lock);
    if (!busy)
      return false;
    {
      std::lock_guard lock(mutex_);
      job_ = &job;
      number_.fetch_add(1, std::memory_order_release);
    }
    if (sleeping_.load() > 0)
      wake_.notify_all();
    job.run();
    std::unique_lock lock(mutex_);
    job_ = nullptr;
    left_.wait(lock, [this] { return inside_ == 0; });
    return true;
  }

 private:
  void serve() {
    for (size_t seen = 0;;) {
      wait_for_another(seen);
      Job* job;
      {
        std::lock_guard lock(mutex_);
        seen = number_.load(std::memory_order_acquire);
        job = job_;
        inside_ += job != nullptr;
      }
      if (!job)
        continue;
      job->run();
      std::lock_guard lock(mutex_);
      if (--inside_ == 0)
        left_.notify_one();
    }
  }

  void wait_for_another(size_t seen) {
    auto until = std::chrono::steady_clock::now() + SPIN;
    while (std::chrono::steady_clock::now() < until)
      for (int i = 0; i < 64; i++)
        if (number_.load(std::memory_order_acquire) != seen)
          return;
    std::unique_lock lock(mutex_);
    sleeping_++;
    wake_.wait(lock, [&] { return number_.load(std::memory_order_acquire) != seen; });
    sleeping_--;
  }

  std::mutex caller_, mutex_;
  std::condition_variable wake_, left_;
  std::atomic<size_t> number_{0};
  std::atomic<int> sleeping_{0};
  Job* job_ = nullptr;
  int inside_ = 0;
};

} // namespace

int threads() {
  static const int count = [] {
    int named = number("OMP_NUM_THREADS");
    int ranks_here = std::max({1, number("OMPI_COMM_WORLD_LOCAL_SIZE"), number("MPI_LOCALNRANKS")});
    return std::clamp(named > 0 ? named : processors() / ranks_here, 1, MOST_THREADS);
  }();
  return count;
}

void share(size_t n, const std::function<void(size_t)>& work) {
  Job job(n, work);
  if (n < 2 || threads() < 2) {
    job.run();
  } else {
    static Pool& pool = *new Pool(threads() - 1); // never ends: a stream may still work while the process exits
    if (!pool.run(job))
      job.run();
  }
  if (job.error)
    std::rethrow_exception(job.error);
}

} // namespace distclip
