// Reading the graph of operations that arrays wait for, without evaluating it.

#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "mlx/array.h"
#include "mlx/stream.h"

namespace distclip {

namespace mx = mlx::core;

// An operation that was not evaluated yet. Arrays are told apart by their ids.
struct Node {
  std::string name;
  mx::Stream stream;
  std::vector<mx::array> inputs;
  std::vector<mx::array> outputs;
};

// The operations that arrays wait for, each after those that make its inputs.
std::vector<Node> graph(const std::vector<mx::array>& arrays);

// How many operations lie one after the other before each array has a value; 0 for one that has it.
std::vector<size_t> depths(const std::vector<mx::array>& arrays);

} // namespace distclip
