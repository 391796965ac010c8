#include "donation.h"

#include <mutex>
#include <unordered_map>

namespace distclip {
namespace {

constexpr size_t LEAST_BYTES = 1 << 14; // a small buffer is not worth the bookkeeping

struct Held {
  PendingReads* reads;
  size_t index;
};

std::mutex mutex;

std::unordered_multimap<const mx::array::Data*, Held>& registry() {
  static auto& map = *new std::unordered_multimap<const mx::array::Data*, Held>; // streams may outlive static objects
  return map;
}

} // namespace

PendingReads::PendingReads(const std::vector<mx::array>& arrays, mx::Stream stream) : stream_(stream.index) {
  held_.reserve(arrays.size());
  registered_.reserve(arrays.size());
  std::lock_guard lock(mutex);
  for (const auto& x : arrays) {
    bool large = x.nbytes() >= LEAST_BYTES;
    if (large)
      registry().emplace(x.data_shared_ptr().get(), Held{this, held_.size()});
    held_.push_back(x.data_shared_ptr());
    registered_.push_back(large ? held_.back().get() : nullptr);
  }
}

PendingReads::~PendingReads() {
  std::lock_guard lock(mutex);
  for (size_t i = 0; i < registered_.size(); i++) {
    if (!registered_[i])
      continue;
    auto [first, last] = registry().equal_range(registered_[i]);
    for (auto it = first; it != last; ++it)
      if (it->second.reads == this && it->second.index == i) {
        registry().erase(it);
        break;
      }
  }
}

bool try_donate(const mx::array& x, mx::Stream stream) {
  if (x.is_donatable())
    return true;
  if (x.nbytes() < LEAST_BYTES)
    return false;
  std::lock_guard lock(mutex);
  auto [first, last] = registry().equal_range(x.data_shared_ptr().get());
  for (auto it = first; it != last; ++it)
    if (it->second.reads->stream_ != stream.index)
      return false;
  for (auto it = first; it != last; ++it)
    it->second.reads->held_[it->second.index] = nullptr;
  bool alone = x.is_donatable();
  if (!alone)
    for (auto it = first; it != last; ++it)
      it->second.reads->held_[it->second.index] = x.data_shared_ptr();
  return alone;
}

} // namespace distclip
