#include <algorithm>
#include <memory>
#include <stdexcept>

#include "blocks.h"
#include "donation.h"
#include "mlx/backend/cpu/encoder.h"
#include "mlx/ops.h"
#include "primitives.h"
#include "strided.h"

namespace distclip {
namespace {

constexpr size_t SPARE_BYTES = 1 << 14; // a buffer that is larger by more than its array is not kept for it

} // namespace

bool fits(const mx::array& x) {
  return x.buffer_size() <= x.nbytes() + SPARE_BYTES;
}

void check_factor(const mx::array& factor, size_t leaves) {
  if (factor.ndim() > 1 || (factor.ndim() == 1 && factor.size() != leaves))
    throw std::invalid_argument("factor should be a scalar or hold one value for each leaf");
}

void scale_values(const View& from, char* to, bool in_place, float factor, bool finite) {
  if (in_place && factor == 1 && finite)
    return;
  const size_t bytes = bytes_of(from.type);
  share_if(from.size, blocks_of(from.size), [&](size_t i) {
    size_t begin = i * BLOCK, end = std::min(begin + BLOCK, from.size);
    if (!finite) {
      std::memset(to + begin * bytes, 0, (end - begin) * bytes);
      return;
    }
    from.for_runs(begin, end, [&](const char* values, size_t n, size_t at) {
      if (factor == 1)
        std::memcpy(to + at * bytes, values, n * bytes);
      else
        loops().scale(from.type, values, to + at * bytes, n, factor);
    });
  });
}

void Scale::eval_cpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) {
  const auto& x = inputs[0];
  auto& out = outputs[0];
  View from(x);
  bool in_place = from.dense && fits(x) && try_donate(x, stream());
  if (in_place)
    out.copy_shared_buffer(x);
  else if (from.dense && x.data_size() == x.size()) // keep the order of memory
    out.set_data(mx::allocator::malloc(out.nbytes()), x.data_size(), x.strides(), x.flags());
  else
    out.set_data(mx::allocator::malloc(out.nbytes()));
  const float* factor = factor_of(inputs[1], index_);
  const bool* finite = inputs.size() > 2 ? inputs[2].data<bool>() : nullptr;
  mx::cpu::get_command_encoder(stream()).dispatch(
      [from = std::move(from), to = out.data<char>(), in_place, factor, finite] {
        scale_values(from, to, in_place, *factor, finite ? *finite : true);
      });
}

std::vector<mx::array> Scale::operations(const std::vector<mx::array>& inputs) {
  auto on = stream();
  auto factor = inputs[1].ndim() == 0 ? inputs[1] : mx::take(inputs[1], static_cast<int>(index_), 0, on);
  auto product = mx::astype(mx::multiply(inputs[0], factor, on), inputs[0].dtype(), on);
  if (inputs.size() > 2)
    product = mx::where(inputs[2], product, mx::zeros_like(product, on), on);
  return {product};
}

std::vector<mx::array> scale(
    const std::vector<mx::array>& leaves,
    const mx::array& factor,
    const std::optional<mx::array>& finite,
    mx::StreamOrDevice stream) {
  check_factor(factor, leaves.size());
  auto on = mx::to_stream(stream, mx::Device::cpu);
  std::vector<mx::array> scaled;
  scaled.reserve(leaves.size());
  for (size_t i = 0; i < leaves.size(); i++) {
    auto leaf = inexact(leaves[i], on);
    std::vector<mx::array> inputs{leaf, factor};
    if (finite)
      inputs.push_back(*finite);
    scaled.emplace_back(
        leaf.shape(), leaf.dtype(), std::make_shared<Scale>(on, factor.ndim() == 0 ? 0 : i), std::move(inputs));
  }
  return scaled;
}

} // namespace distclip
