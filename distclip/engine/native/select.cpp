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

// Puts the values of one array in the places of another of the same shape and type.
void copy_values(const View& from, const View& to) {
  bool alike = from.dense && to.dense && from.strides == to.strides;
  const View source = alike ? from : from.in_order_of_indices(), target = alike ? to : to.in_order_of_indices();
  share_if(source.size, blocks_of(source.size), [&](size_t i) {
    size_t begin = i * BLOCK, end = std::min(begin + BLOCK, source.size);
    source.for_runs(begin, end, [&](const char* values, size_t n, size_t at) { target.scatter(at, at + n, values); });
  });
}

} // namespace

void Select::eval_cpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) {
  const auto &updated = inputs[0], &old = inputs[1];
  auto& out = outputs[0];
  View first(updated), second(old);
  bool in_place = first.dense && fits(updated) && try_donate(updated, stream());
  if (in_place)
    out.copy_shared_buffer(updated);
  else
    out.set_data(mx::allocator::malloc(out.nbytes()));
  View to(out);
  mx::cpu::get_command_encoder(stream()).dispatch([first = std::move(first),
                                                   second = std::move(second),
                                                   to = std::move(to),
                                                   in_place,
                                                   keep = inputs[2].data<bool>()] {
    if (!*keep)
      copy_values(second, to);
    else if (!in_place)
      copy_values(first, to);
  });
}

std::vector<mx::array> Select::operations(const std::vector<mx::array>& inputs) {
  return {mx::where(inputs[2], inputs[0], inputs[1], stream())};
}

std::vector<mx::array> select(
    const mx::array& condition,
    const std::vector<mx::array>& updated,
    const std::vector<mx::array>& old,
    mx::StreamOrDevice stream) {
  auto on = mx::to_stream(stream, mx::Device::cpu);
  std::vector<mx::array> selected;
  selected.reserve(updated.size());
  for (size_t i = 0; i < updated.size(); i++) {
    const auto &a = updated[i], &b = old.at(i);
    if (!mx::issubdtype(a.dtype(), mx::inexact) || a.dtype() != b.dtype() || a.shape() != b.shape())
      selected.push_back(mx::where(condition, a, b, on));
    else
      selected.emplace_back(
          a.shape(), a.dtype(), std::make_shared<Select>(on), std::vector<mx::array>{a, b, condition});
  }
  return selected;
}

} // namespace distclip
