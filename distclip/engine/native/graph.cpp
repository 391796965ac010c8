#include "graph.h"

#include <algorithm>
#include <unordered_map>
#include <unordered_set>

#include "mlx/primitives.h"

namespace distclip {

std::vector<Node> graph(const std::vector<mx::array>& arrays) {
  std::vector<Node> nodes;
  std::unordered_set<std::uintptr_t> seen;
  struct Visit {
    mx::array made;
    size_t next; // of its inputs
  };
  std::vector<Visit> path; // no recursion: a graph may be deeper than the stack
  auto enter = [&](const mx::array& made) {
    bool waits = made.has_primitive() && made.status() == mx::array::Status::unscheduled;
    if (!waits || !seen.insert(made.id()).second)
      return;
    for (const auto& sibling : made.siblings())
      seen.insert(sibling.id());
    path.push_back({made, 0});
  };
  for (const auto& wanted : arrays) {
    enter(wanted);
    while (!path.empty()) {
      auto& [made, next] = path.back();
      if (next < made.inputs().size()) {
        mx::array input = made.inputs()[next++];
        enter(input);
        continue;
      }
      nodes.push_back({made.primitive().name(), made.primitive().stream(), made.inputs(), made.outputs()});
      path.pop_back();
    }
  }
  return nodes;
}

std::vector<size_t> depths(const std::vector<mx::array>& arrays) {
  std::unordered_map<std::uintptr_t, size_t> depth; // of those that wait
  auto of = [&](const mx::array& x) {
    auto known = depth.find(x.id());
    return known == depth.end() ? 0 : known->second;
  };
  for (const auto& node : graph(arrays)) {
    size_t deepest = 0;
    for (const auto& input : node.inputs)
      deepest = std::max(deepest, of(input));
    for (const auto& output : node.outputs)
      depth[output.id()] = deepest + 1;
  }
  std::vector<size_t> all;
  for (const auto& x : arrays)
    all.push_back(of(x));
  return all;
}

} // namespace distclip
