// Summing leaves over the ranks in buckets, and measuring them as they arrive.

#pragma once

#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <vector>

#include "loops.h"
#include "mlx/array.h"
#include "mlx/distributed/distributed.h"
#include "mlx/primitives.h"
#include "mlx/utils.h"

namespace distclip {

namespace mx = mlx::core;

// From the sum over the ranks to the arrays that its consumers return. MLX evaluates the two at different times, and an
// operation of several outputs would keep each from being written in place, so the leaves pass beside the graph.
class Channel {
 public:
  using Leaves = std::vector<std::optional<mx::array>>;

  void put(const mx::array& token, const std::shared_ptr<Leaves>& leaves);
  mx::array take(const mx::array& token, size_t index);

 private:
  struct Sent {
    std::weak_ptr<mx::array::Data> token;
    std::shared_ptr<Leaves> leaves;
  };

  std::mutex mutex_;
  std::map<const mx::array::Data*, Sent> sent_;
};

// The sums of leaves over the ranks, on their way.
class Sums {
 public:
  Sums(mx::array measured, std::vector<mx::array> leaves, std::shared_ptr<Channel> channel, mx::Stream stream);

  // float64 (leaves, 2): the measure of each sum, and how many of its values are not finite.
  mx::array measured;

  // Each sum times a factor as in scale(); zeros where `finite`, a bool scalar, is given and false. Once only.
  std::vector<mx::array> scaled(const mx::array& factor, const std::optional<mx::array>& finite) const;

 private:
  std::vector<std::pair<mx::Shape, mx::Dtype>> kinds_;
  std::shared_ptr<Channel> channel_;
  mx::Stream stream_;
};

// Sums each leaf, times `before`, over the ranks of a group, all of which hold leaves of the same shapes and types.
// Floating leaves travel as `wire`, by default as their own type. A leaf's buffer is used for its sum when nothing else
// holds it. Neighbours of one type travel together in buckets that close at `bucket_bytes`.
Sums sum_over_ranks(
    const std::vector<mx::array>& leaves,
    mx::distributed::Group group,
    Measure kind,
    float before,
    std::optional<mx::Dtype> wire,
    size_t bucket_bytes,
    mx::StreamOrDevice stream);

// How many all-reduces sum_over_ranks() has scheduled in this process.
size_t scheduled_all_reduces();

} // namespace distclip
