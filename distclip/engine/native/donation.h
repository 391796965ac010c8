// Donation: writing a result into the buffer of an input that nothing else needs.
//
// MLX schedules far ahead of the work. When scale() is scheduled, the sum over the same leaf has usually not run, and
// its reference to the buffer would keep scale() from writing there, although the two run one after the other. So our
// reads keep their references here, and a later write of ours on the same stream may drop them.

#pragma once

#include <memory>
#include <vector>

#include "mlx/array.h"
#include "mlx/stream.h"

namespace distclip {

namespace mx = mlx::core;

// Arrays that wait to be read by us.
class PendingReads {
 public:
  // Keep the buffers of these arrays until this object is destroyed: hold it until the read is done.
  PendingReads(const std::vector<mx::array>& arrays, mx::Stream stream);
  ~PendingReads();
  PendingReads(const PendingReads&) = delete;
  PendingReads& operator=(const PendingReads&) = delete;

 private:
  friend bool try_donate(const mx::array&, mx::Stream);
  using Data = mx::array::Data;

  int stream_;
  std::vector<std::shared_ptr<Data>> held_;
  std::vector<const Data*> registered_; // nullptr for small arrays
};

// Whether what is scheduled next on the stream may write into the array's buffer: nothing else refers to it but reads
// that run before on the same stream. From then on those reads rely on whoever holds the array.
bool try_donate(const mx::array& x, mx::Stream stream);

} // namespace distclip
