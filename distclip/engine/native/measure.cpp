#include <algorithm>
#include <memory>

#include "blocks.h"
#include "donation.h"
#include "mlx/backend/cpu/encoder.h"
#include "mlx/ops.h"
#include "primitives.h"
#include "strided.h"

namespace distclip {
namespace {

struct Block {
  size_t leaf, begin, end;
  Measured measured;
};

std::vector<Block> cut(const std::vector<View>& leaves) {
  std::vector<Block> blocks;
  blocks.reserve(leaves.size());
  for (size_t leaf = 0; leaf < leaves.size(); leaf++)
    for (size_t begin = 0; begin < leaves[leaf].size; begin += BLOCK)
      blocks.push_back({leaf, begin, std::min(begin + BLOCK, leaves[leaf].size), {}});
  return blocks;
}

// Two float64 for each leaf: its measure, and how many of its values are not finite.
void measure_leaves(Measure kind, const std::vector<View>& leaves, double* to) {
  auto blocks = cut(leaves);
  size_t values = 0;
  for (const auto& leaf : leaves)
    values += leaf.size;
  share_if(values, blocks.size(), [&](size_t i) {
    auto& block = blocks[i];
    const View& leaf = leaves[block.leaf];
    leaf.for_runs(block.begin, block.end, [&](const char* run, size_t n, size_t) {
      block.measured.add(kind, leaf.type, run, n);
    });
  });
  auto block = blocks.begin();
  for (size_t leaf = 0; leaf < leaves.size(); leaf++) {
    Measured sum;
    for (; block != blocks.end() && block->leaf == leaf; ++block)
      sum.add(kind, block->measured);
    *to++ = sum.value;
    *to++ = sum.nonfinite;
  }
}

} // namespace

void MeasureAll::eval_cpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) {
  const auto& arrays = leaves(inputs);
  auto& out = outputs[0];
  out.set_data(mx::allocator::malloc(out.nbytes()));
  std::vector<View> views(arrays.begin(), arrays.end());
  auto reads = std::make_shared<PendingReads>(arrays, stream());
  mx::cpu::get_command_encoder(stream()).dispatch(
      [kind = kind_, views = std::move(views), reads = std::move(reads), to = out.data<double>()]() mutable {
        measure_leaves(kind, views, to);
        reads.reset();
      });
  if (!out.is_tracer()) // else MLX would hold the buffers itself until the read is done; it is about to detach them
    out.inputs().clear();
}

std::vector<mx::array> MeasureAll::operations(const std::vector<mx::array>& inputs) {
  auto on = stream();
  auto zero = mx::array(0.0, mx::float64);
  std::vector<mx::array> rows;
  for (const auto& x : leaves(inputs)) {
    auto value = zero, nonfinite = zero;
    std::vector<mx::array> parts;
    if (x.size() > 0)
      parts = x.dtype() == mx::complex64 ? Arrays{mx::real(x, on), mx::imag(x, on)} : Arrays{x};
    for (const auto& part : parts) {
      auto wide = mx::astype(part, mx::float64, on);
      auto broken = mx::astype(mx::logical_not(mx::isfinite(part, on), on), mx::float64, on);
      nonfinite = mx::add(nonfinite, mx::sum(broken, on), on);
      if (kind_ == Measure::largest)
        value = mx::maximum(value, mx::max(mx::abs(wide, on), on), on);
      else
        value = mx::add(value, mx::sum(kind_ == Measure::squares ? mx::square(wide, on) : mx::abs(wide, on), on), on);
    }
    rows.push_back(mx::stack({value, nonfinite}, on));
  }
  return {rows.empty() ? mx::zeros({0, 2}, mx::float64, on) : mx::stack(rows, on)};
}

mx::array measure(Measure kind, std::vector<mx::array> leaves, mx::StreamOrDevice stream) {
  auto on = mx::to_stream(stream, mx::Device::cpu);
  for (auto& leaf : leaves) {
    leaf = inexact(leaf, on);
    if (kind != Measure::squares && leaf.dtype() == mx::complex64)
      leaf = mx::abs(leaf, on);
  }
  const mx::Shape shape{static_cast<mx::ShapeElem>(leaves.size()), 2};
  std::vector<mx::array> inputs;
  if (!std::all_of(leaves.begin(), leaves.end(), [](const auto& leaf) { return leaf.is_available(); }))
    inputs.swap(leaves);
  return mx::array(shape, mx::float64, std::make_shared<MeasureAll>(on, kind, std::move(leaves)), std::move(inputs));
}

mx::array inexact(const mx::array& leaf, mx::Stream stream) {
  return mx::issubdtype(leaf.dtype(), mx::inexact) ? leaf : mx::astype(leaf, mx::float32, stream);
}

} // namespace distclip
