#include <stdexcept>

#include "mlx/ops.h"
#include "mlx/transforms.h"
#include "primitives.h"

namespace distclip {

void Transformable::eval_gpu(const std::vector<mx::array>&, std::vector<mx::array>&) {
  throw std::runtime_error(std::string(name()) + " runs on a CPU stream");
}

std::vector<mx::array> Transformable::jvp(
    const std::vector<mx::array>& primals,
    const std::vector<mx::array>& tangents,
    const std::vector<int>& argnums) {
  std::vector<mx::array> directions;
  for (size_t i = 0, next = 0; i < primals.size(); i++) {
    bool given = next < argnums.size() && argnums[next] == static_cast<int>(i);
    directions.push_back(given ? tangents[next++] : mx::zeros_like(primals[i], stream()));
  }
  return mx::jvp(as_function(), primals, directions).second;
}

std::vector<mx::array> Transformable::vjp(
    const std::vector<mx::array>& primals,
    const std::vector<mx::array>& cotangents,
    const std::vector<int>& argnums,
    const std::vector<mx::array>&) {
  auto all = mx::vjp(as_function(), primals, cotangents).second;
  std::vector<mx::array> wanted;
  for (int argument : argnums)
    wanted.push_back(all[argument]);
  return wanted;
}

std::pair<std::vector<mx::array>, std::vector<int>> Transformable::vmap(
    const std::vector<mx::array>& inputs,
    const std::vector<int>& axes) {
  auto mapped = mx::vmap(as_function(), axes, {0});
  return {mapped(inputs), {0}};
}

} // namespace distclip
