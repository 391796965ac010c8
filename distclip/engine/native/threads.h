// Sharing the blocks of large work between threads.

#pragma once

#include <cstddef>
#include <functional>

namespace distclip {

// How many threads share large work: OMP_NUM_THREADS, or the processors this process may use, divided by the processes
// that mpirun started on this host, at most 8.
int threads();

// Calls work(0) ... work(n - 1), each once, on this thread and on others that are free. Returns when all are done.
// An exception that work throws is thrown here.
void share(size_t n, const std::function<void(size_t)>& work);

} // namespace distclip
