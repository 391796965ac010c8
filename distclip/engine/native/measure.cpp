#include <algorithm>
#include <memory>

#include "mlx/backend/cpu/encoder.h"
#include "mlx/ops.h"
#include "pieces.h"
#include "primitives.h"
#include "reads.h"
#include "runs.h"

namespace distclip {
namespace {

struct Piece {
  const View* view;
  size_t begin, end;
  Measured measured;
};

std::vector<Piece> cut(const std::vector<View>& views) {
  std::vector<Piece> pieces;
  for (const auto& view : views)
    for (size_t begin = 0; begin < view.size; begin += PIECE)
      pieces.push_back({&view, begin, std::min(begin + PIECE, view.size), {}});
  return pieces;
}

} // namespace

void MeasureAll::eval_cpu(const std::vector<mx::array>& given, std::vector<mx::array>& outputs) {
  const auto& inputs = constants_.empty() ? given : constants_;
  auto& out = outputs[0];
  out.set_data(mx::allocator::malloc(out.nbytes()));
  std::vector<View> views(inputs.begin(), inputs.end());
  auto reads = std::make_shared<Reads>(inputs, stream());
  mx::cpu::get_command_encoder(stream())
      .dispatch([kind = kind_, views = std::move(views), reads = std::move(reads), to = out.data<double>()]() mutable {
        auto pieces = cut(views);
        size_t values = 0;
        for (const auto& view : views)
          values += view.size;
        share_if(values, pieces.size(), [&](size_t i) {
          auto& piece = pieces[i];
          piece.view->for_runs(piece.begin, piece.end, [&](const char* run, size_t n, size_t) {
            piece.measured.add(kind, piece.view->type, run, n);
          });
        });
        Measured all;
        for (const auto& piece : pieces)
          all.add(kind, piece.measured);
        to[0] = all.found;
        to[1] = all.bad;
        reads.reset();
      });
  if (!out.is_tracer()) // else MLX would hold the buffers itself until the read is done; it is about to detach them
    out.inputs().clear();
}

std::vector<mx::array> MeasureAll::operations(const std::vector<mx::array>& given) {
  const auto& inputs = constants_.empty() ? given : constants_;
  auto on = stream();
  auto zero = mx::array(0.0, mx::float64);
  auto found = zero, bad = zero;
  for (const auto& x : inputs) {
    if (x.size() == 0)
      continue;
    std::vector<mx::array> parts{x};
    if (x.dtype() == mx::complex64)
      parts = {mx::real(x, on), mx::imag(x, on)};
    for (const auto& part : parts) {
      auto wide = mx::astype(part, mx::float64, on);
      auto broken = mx::astype(mx::logical_not(mx::isfinite(part, on), on), mx::float64, on);
      bad = mx::add(bad, mx::sum(broken, on), on);
      if (kind_ == Measure::largest)
        found = mx::maximum(found, mx::max(mx::abs(wide, on), on), on);
      else
        found = mx::add(found, mx::sum(kind_ == Measure::squares ? mx::square(wide, on) : mx::abs(wide, on), on), on);
    }
  }
  return {mx::stack({found, bad}, on)};
}

mx::array measure(Measure kind, std::vector<mx::array> leaves, mx::StreamOrDevice stream) {
  auto on = mx::to_stream(stream, mx::Device::cpu);
  for (auto& leaf : leaves) {
    leaf = inexact(leaf, on);
    if (kind != Measure::squares && leaf.dtype() == mx::complex64)
      leaf = mx::abs(leaf, on);
  }
  std::vector<mx::array> inputs;
  if (!std::all_of(leaves.begin(), leaves.end(), [](const auto& leaf) { return leaf.is_available(); }))
    inputs.swap(leaves);
  return mx::array({2}, mx::float64, std::make_shared<MeasureAll>(on, kind, std::move(leaves)), std::move(inputs));
}

mx::array inexact(const mx::array& leaf, mx::Stream stream) {
  return mx::issubdtype(leaf.dtype(), mx::inexact) ? leaf : mx::astype(leaf, mx::float32, stream);
}

} // namespace distclip
