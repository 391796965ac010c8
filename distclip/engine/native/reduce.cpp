#include "reduce.h"

#include <algorithm>
#include <atomic>
#include <stdexcept>

#include "blocks.h"
#include "donation.h"
#include "mlx/backend/cpu/encoder.h"
#include "mlx/distributed/distributed_impl.h"
#include "primitives.h"
#include "strided.h"

namespace distclip {
namespace {

constexpr size_t LEAST_BYTES = 1 << 20; // a leaf is not cut into less
constexpr size_t MOST_VALUES = 1 << 30; // MPI counts in int

std::atomic<size_t> all_reduces = 0;

// A part of a leaf, and its place in a bucket.
struct Part {
  size_t leaf, begin, end, at;
};

struct Bucket {
  Type type; // that is sent
  size_t size = 0;
  std::vector<Part> parts;
  char* sent = nullptr; // the memory that is reduced: of one leaf, or of the shared bucket

  // Parts cut for threads.
  std::vector<Part> blocks() const {
    std::vector<Part> cut;
    for (const auto& part : parts)
      for (size_t begin = part.begin; begin < part.end; begin += BLOCK)
        cut.push_back({part.leaf, begin, std::min(begin + BLOCK, part.end), part.at + begin - part.begin});
    return cut;
  }
};

// Everything that the scheduled steps of one reduction share.
struct Transfer {
  std::vector<View> from, to; // each leaf, and where its sum goes
  std::vector<View> from_indices, to_indices;
  std::shared_ptr<Channel::Leaves> leaves; // kept until the last step has run
  std::unique_ptr<PendingReads> reads;
  int64_t* order; // the largest over the ranks: of a number for the order of memory of all leaves, and of its opposite
  float before;
  Measure kind;
  std::vector<Measured> measured; // of each leaf

  // Ranks whose leaves lie in memory in different orders meet in the order of indices.
  bool same_order() const { return order[0] == -order[1]; }
};

int64_t order_of(const std::vector<View>& views) {
  uint64_t hash = 1469598103934665603u; // FNV-1a
  for (const auto& view : views)
    if (view.dense && view.shape.size() > 1)
      for (auto stride : view.strides)
        hash = (hash ^ static_cast<uint64_t>(stride)) * 1099511628211u;
    else
      hash = (hash ^ 1) * 1099511628211u;
  return static_cast<int64_t>(hash >> 1);
}

// Leaves of one type together until they reach bucket_bytes; larger ones alone, in several buckets; each alone for 0.
std::vector<Bucket> fill_buckets(const std::vector<View>& views, const std::vector<Type>& sent, size_t bucket_bytes) {
  std::vector<Bucket> full;
  std::map<Type, Bucket> open;
  for (size_t leaf = 0; leaf < views.size(); leaf++) {
    const View& view = views[leaf];
    const Type type = sent[leaf];
    const size_t bytes = bytes_of(type);
    if (view.size == 0)
      continue;
    if (view.size * bytes >= bucket_bytes) {
      const size_t most = bucket_bytes == 0 ? MOST_VALUES : std::max(bucket_bytes, LEAST_BYTES) / bytes;
      for (size_t begin = 0; begin < view.size; begin += most) {
        size_t end = std::min(begin + most, view.size);
        full.push_back({type, end - begin, {{leaf, begin, end, 0}}, nullptr});
      }
      continue;
    }
    auto& bucket = open.try_emplace(type, Bucket{type, 0, {}, nullptr}).first->second;
    bucket.parts.push_back({leaf, 0, view.size, bucket.size});
    bucket.size += view.size;
    if (bucket.size * bytes >= bucket_bytes)
      full.push_back(std::exchange(bucket, Bucket{type, 0, {}, nullptr}));
  }
  for (auto& [_, bucket] : open)
    if (bucket.size > 0)
      full.push_back(std::move(bucket));
  return full;
}

mx::Dtype dtype_of(Type type) {
  switch (type) {
    case Type::f16: return mx::float16;
    case Type::bf16: return mx::bfloat16;
    case Type::f64: return mx::float64;
    default: return mx::float32;
  }
}

// `size` values from number `begin` of an array's memory.
mx::array part_of(const mx::array& whole, size_t begin, size_t size, mx::Dtype dtype) {
  mx::array part({static_cast<mx::ShapeElem>(size)}, dtype, nullptr, {});
  part.copy_shared_buffer(whole, {1}, {true, true, true}, size, static_cast<int64_t>(begin));
  return part;
}

mx::array new_array(size_t size, mx::Dtype dtype) {
  mx::array x({static_cast<mx::ShapeElem>(size)}, dtype, nullptr, {});
  x.set_data(mx::allocator::malloc(x.nbytes()));
  return x;
}

void pack(const Transfer& transfer, const Bucket& bucket) {
  const size_t bytes = bytes_of(bucket.type);
  const auto& from = transfer.same_order() ? transfer.from : transfer.from_indices;
  const auto blocks = bucket.blocks();
  share_if(bucket.size, blocks.size(), [&](size_t i) {
    const Part& part = blocks[i];
    from[part.leaf].for_runs(part.begin, part.end, [&](const char* values, size_t n, size_t at) {
      char* to = bucket.sent + (part.at + at - part.begin) * bytes;
      if (from[part.leaf].type != bucket.type)
        loops().convert(from[part.leaf].type, bucket.type, values, to, n, transfer.before);
      else if (transfer.before != 1)
        loops().scale(bucket.type, values, to, n, transfer.before);
      else if (values != to)
        std::memcpy(to, values, n * bytes);
    });
  });
}

void widen(Type type, const char* values, const View& to, size_t begin, size_t end) {
  constexpr size_t SOME = 1024;
  alignas(64) char wide[SOME * sizeof(double)];
  for (size_t at = begin; at < end; at += SOME) {
    const size_t n = std::min(SOME, end - at);
    loops().convert(type, to.type, values + (at - begin) * bytes_of(type), wide, n, 1);
    to.scatter(at, at + n, wide);
  }
}

void unpack(Transfer& transfer, const Bucket& bucket) {
  const size_t bytes = bytes_of(bucket.type);
  const auto& to = transfer.same_order() ? transfer.to : transfer.to_indices;
  const auto blocks = bucket.blocks();
  std::vector<Measured> measured(blocks.size());
  share_if(bucket.size, blocks.size(), [&](size_t i) {
    const Part& part = blocks[i];
    const char* values = bucket.sent + part.at * bytes;
    measured[i].add(transfer.kind, bucket.type, values, part.end - part.begin);
    const View& place = to[part.leaf];
    if (place.type != bucket.type)
      widen(bucket.type, values, place, part.begin, part.end);
    else if (values != place.data + part.begin * bytes)
      place.scatter(part.begin, part.end, values);
  });
  for (size_t i = 0; i < blocks.size(); i++)
    transfer.measured[blocks[i].leaf].add(transfer.kind, measured[i]);
}

// A large leaf in a dense order that all ranks must share is summed where its sum belongs.
bool sent_from_its_place(const Transfer& transfer, const Bucket& bucket) {
  const View& view = transfer.from[bucket.parts[0].leaf];
  return bucket.parts.size() == 1 && view.type == bucket.type && view.dense && view.shape.size() <= 1;
}

size_t shared_bytes(const Transfer& transfer, const std::vector<Bucket>& buckets) {
  size_t most = 0;
  for (const auto& bucket : buckets)
    if (!sent_from_its_place(transfer, bucket))
      most = std::max(most, bucket.size * bytes_of(bucket.type));
  return most;
}

class SumOverRanks : public mx::Primitive {
 public:
  SumOverRanks(
      mx::Stream stream,
      mx::distributed::Group group,
      Measure kind,
      float before,
      std::optional<Type> wire,
      size_t bucket_bytes,
      std::shared_ptr<Channel> channel)
      : Primitive(stream),
        group_(std::move(group)),
        kind_(kind),
        before_(before),
        wire_(wire),
        bucket_bytes_(bucket_bytes),
        channel_(std::move(channel)) {}

  void eval_cpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) override;
  void eval_gpu(const std::vector<mx::array>&, std::vector<mx::array>&) override {
    throw std::runtime_error("DistclipSumOverRanks runs on a CPU stream");
  }
  DEFINE_NAME(DistclipSumOverRanks)

 private:
  mx::distributed::Group group_;
  Measure kind_;
  float before_;
  std::optional<Type> wire_;
  size_t bucket_bytes_;
  std::shared_ptr<Channel> channel_;
};

void SumOverRanks::eval_cpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) {
  auto& out = outputs[0];
  out.set_data(mx::allocator::malloc(out.nbytes()));
  auto transfer = std::make_shared<Transfer>();
  transfer->before = before_;
  transfer->kind = kind_;
  transfer->measured.resize(inputs.size());
  transfer->leaves = std::make_shared<Channel::Leaves>();
  std::vector<Type> sent;
  std::vector<mx::array> kept; // inputs that are read but not written
  for (const auto& x : inputs) {
    const View& from = transfer->from.emplace_back(x);
    transfer->from_indices.push_back(from.in_order_of_indices());
    // A type wider than the leaf's stays until the sum is scaled: rounding comes last.
    const Type type = sent.emplace_back(wire_ && x.dtype() != mx::complex64 ? *wire_ : from.type);
    const bool wider = bytes_of(type) > bytes_of(from.type);
    mx::array sum(x.shape(), wider ? dtype_of(type) : x.dtype(), nullptr, {});
    if (!wider && from.dense && fits(x) && try_donate(x, stream())) {
      sum.copy_shared_buffer(x);
    } else {
      kept.push_back(x);
      if (from.dense && x.data_size() == x.size()) // keep the order of memory
        sum.set_data(mx::allocator::malloc(sum.nbytes()), x.data_size(), x.strides(), x.flags());
      else
        sum.set_data(mx::allocator::malloc(sum.nbytes()));
    }
    sum.set_status(mx::array::Status::available);
    const View& to = transfer->to.emplace_back(sum);
    transfer->to_indices.push_back(to.in_order_of_indices());
    transfer->leaves->emplace_back(std::move(sum));
  }
  transfer->reads = std::make_unique<PendingReads>(kept, stream());
  kept.clear();
  channel_->put(out, transfer->leaves);

  auto& encoder = mx::cpu::get_command_encoder(stream());

  auto order = new_array(2, mx::int64);
  transfer->order = order.data<int64_t>();
  transfer->order[0] = order_of(transfer->from);
  transfer->order[1] = -transfer->order[0];
  group_.raw_group()->all_max(order, order, stream());
  all_reduces++;

  auto buckets = fill_buckets(transfer->from, sent, bucket_bytes_);
  auto shared = new_array(shared_bytes(*transfer, buckets), mx::uint8); // by one bucket after the other
  for (auto& filled : buckets) {
    auto bucket = std::make_shared<Bucket>(std::move(filled));
    const Part& first = bucket->parts[0];
    bool alone = sent_from_its_place(*transfer, *bucket);
    auto memory = alone ? part_of(*(*transfer->leaves)[first.leaf], first.begin, bucket->size, dtype_of(bucket->type))
                        : part_of(shared, 0, bucket->size, dtype_of(bucket->type));
    bucket->sent = memory.data<char>();
    encoder.dispatch([transfer, bucket] { pack(*transfer, *bucket); });
    group_.raw_group()->all_sum(memory, memory, stream());
    all_reduces++;
    encoder.dispatch([transfer, bucket] { unpack(*transfer, *bucket); });
  }
  encoder.dispatch([transfer, order, shared, to = out.data<double>()]() mutable {
    for (const auto& leaf : transfer->measured) {
      *to++ = leaf.value;
      *to++ = leaf.nonfinite;
    }
    transfer.reset();
  });
  if (!out.is_tracer()) // else MLX would hold the buffers itself until all is done; it is about to detach them
    out.inputs().clear();
}

void round_values(const View& from, Type type, char* to, float factor, bool finite) {
  const size_t bytes = bytes_of(type);
  share_if(from.size, blocks_of(from.size), [&](size_t i) {
    const size_t begin = i * BLOCK, n = std::min(BLOCK, from.size - begin);
    if (finite)
      loops().convert(from.type, type, from.data + begin * bytes_of(from.type), to + begin * bytes, n, factor);
    else
      std::memset(to + begin * bytes, 0, n * bytes);
  });
}

// One leaf's sum, scaled in place, or into a narrower type.
class Arrival : public mx::Primitive {
 public:
  Arrival(mx::Stream stream, std::shared_ptr<Channel> channel, size_t index)
      : Primitive(stream), channel_(std::move(channel)), index_(index) {}

  void eval_cpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) override {
    auto sum = channel_->take(inputs[0], index_);
    View view(sum);
    const float* factor = factor_of(inputs[1], index_);
    const bool* finite = inputs.size() > 2 ? inputs[2].data<bool>() : nullptr;
    auto& out = outputs[0];
    if (sum.dtype() != out.dtype()) {
      out.set_data(mx::allocator::malloc(out.nbytes()), sum.data_size(), sum.strides(), sum.flags());
      mx::cpu::get_command_encoder(stream()).add_temporary(sum);
      mx::cpu::get_command_encoder(stream()).dispatch(
          [view = std::move(view), type = type_of(out.dtype()), to = out.data<char>(), factor, finite] {
            round_values(view, type, to, *factor, finite ? *finite : true);
          });
      return;
    }
    out.copy_shared_buffer(sum);
    mx::cpu::get_command_encoder(stream()).dispatch([view = std::move(view), factor, finite] {
      scale_values(view, view.data, true, *factor, finite ? *finite : true);
    });
  }
  void eval_gpu(const std::vector<mx::array>&, std::vector<mx::array>&) override {
    throw std::runtime_error("DistclipArrival runs on a CPU stream");
  }
  DEFINE_NAME(DistclipArrival)

 private:
  std::shared_ptr<Channel> channel_;
  size_t index_;
};

} // namespace

void Channel::put(const mx::array& token, const std::shared_ptr<Leaves>& leaves) {
  std::lock_guard lock(mutex_);
  std::erase_if(sent_, [](const auto& entry) { return entry.second.token.expired(); }); // never all taken
  sent_[token.data_shared_ptr().get()] = {token.data_shared_ptr(), leaves};
}

mx::array Channel::take(const mx::array& token, size_t index) {
  std::lock_guard lock(mutex_);
  auto& leaf = (*sent_.at(token.data_shared_ptr().get()).leaves)[index];
  if (!leaf)
    throw std::logic_error("distclip: a sum over the ranks was scaled twice");
  return *std::exchange(leaf, std::nullopt);
}

Sums::Sums(mx::array measured, std::vector<mx::array> leaves, std::shared_ptr<Channel> channel, mx::Stream stream)
    : measured(std::move(measured)), channel_(std::move(channel)), stream_(stream) {
  for (const auto& leaf : leaves)
    kinds_.emplace_back(leaf.shape(), leaf.dtype());
}

std::vector<mx::array> Sums::scaled(const mx::array& factor, const std::optional<mx::array>& finite) const {
  check_factor(factor, kinds_.size());
  std::vector<mx::array> leaves;
  for (size_t i = 0; i < kinds_.size(); i++) {
    std::vector<mx::array> inputs{measured, factor};
    if (finite)
      inputs.push_back(*finite);
    auto& [shape, dtype] = kinds_[i];
    leaves.emplace_back(shape, dtype, std::make_shared<Arrival>(stream_, channel_, i), std::move(inputs));
  }
  return leaves;
}

Sums sum_over_ranks(
    const std::vector<mx::array>& leaves,
    mx::distributed::Group group,
    Measure kind,
    float before,
    std::optional<mx::Dtype> wire,
    size_t bucket_bytes,
    mx::StreamOrDevice stream) {
  auto on = group.raw_group()->communication_stream(stream);
  auto channel = std::make_shared<Channel>();
  auto primitive = std::make_shared<SumOverRanks>(
      on, group, kind, before, wire ? std::optional(type_of(*wire)) : std::nullopt, bucket_bytes, channel);
  auto measured = mx::array({static_cast<mx::ShapeElem>(leaves.size()), 2}, mx::float64, primitive, leaves);
  return Sums(std::move(measured), leaves, channel, on);
}

size_t scheduled_all_reduces() {
  return all_reduces;
}

} // namespace distclip
