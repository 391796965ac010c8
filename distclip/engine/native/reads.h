// Which buffers are only waiting to be read by us.
//
// MLX schedules far ahead of the work. When scale() is scheduled, the sum over the same leaf has usually not run, and
// its reference to the buffer would keep scale() from writing there, although the two run one after the other. So our
// reads keep their references here, where our own later writes on the same stream can take them over.

#pragma once

#include <memory>
#include <vector>

#include "mlx/array.h"
#include "mlx/stream.h"

namespace distclip {

namespace mx = mlx::core;

class Reads {
 public:
  // Keep the buffers of these arrays until this object is destroyed: hold it until the read is done.
  Reads(const std::vector<mx::array>& arrays, mx::Stream stream);
  ~Reads();
  Reads(const Reads&) = delete;
  Reads& operator=(const Reads&) = delete;

 private:
  friend bool take_over(const mx::array&, mx::Stream);
  using Data = mx::array::Data;

  int stream_;
  std::vector<std::shared_ptr<Data>> held_;
  std::vector<const Data*> registered_; // nullptr where it is not
};

// Whether what is scheduled next on the stream may write into the array's buffer: nothing else refers to it but reads
// that run before on the same stream. From then on those reads rely on whoever holds the array.
bool take_over(const mx::array& x, mx::Stream stream);

} // namespace distclip
