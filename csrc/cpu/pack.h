// Sequences into microbatches of bounded size, balanced over ranks: Karmarkar-Karp differencing, swap refinement,
// first-fit decreasing. orz_async/ops/reference/packing.py is the same algorithm, decision by decision, and the tests
// hold the two to identical results: every tie is broken by index, and sums are added in the same order.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <numeric>
#include <utility>
#include <vector>

namespace orz {

using Index = int32_t;
using Ranks = std::vector<std::vector<Index>>;
using Packed = std::vector<Ranks>;
using Item = std::pair<double, Index>;  // cost, index

constexpr int kRefineRounds = 64;

// Longest first, equal lengths in the order of their indices: counting sort by 11 bits at a time, since everything below
// wants this order and comparing is what it would spend its time on.
inline std::vector<Index> longest_first(const std::vector<int64_t>& lengths) {
  constexpr size_t kBits = 11, kBuckets = size_t{1} << kBits;
  std::vector<Index> order(lengths.size()), next(lengths.size());
  std::iota(order.begin(), order.end(), 0);
  const int64_t longest = lengths.empty() ? 0 : *std::max_element(lengths.begin(), lengths.end());
  for (size_t shift = 0; shift < 63 && (longest >> shift) != 0; shift += kBits) {
    const auto bucket = [&](Index i) {
      return kBuckets - 1 - (static_cast<size_t>(lengths[static_cast<size_t>(i)] >> shift) & (kBuckets - 1));
    };
    std::vector<size_t> ends(kBuckets + 1, 0);
    for (Index i : order) ++ends[bucket(i) + 1];
    for (size_t b = 0; b < kBuckets; ++b) ends[b + 1] += ends[b];
    for (Index i : order) next[ends[bucket(i)]++] = i;
    order.swap(next);
  }
  return order;
}

// Costliest first, equal costs in the order of their indices. Cost grows with length, but for lengths so near that it
// rounds to the same number.
inline std::vector<Index> costliest_first(const std::vector<Index>& by_length, const std::vector<double>& costs) {
  const auto before = [&](Index a, Index b) {
    const double left = costs[static_cast<size_t>(a)], right = costs[static_cast<size_t>(b)];
    return left != right ? left > right : a < b;
  };
  std::vector<Index> order = by_length;
  if (!std::is_sorted(order.begin(), order.end(), before)) std::sort(order.begin(), order.end(), before);
  return order;
}

// The members of each rank, every one in the order of `order`.
inline Ranks in_order(const Ranks& ranks, const std::vector<Index>& order) {
  std::vector<size_t> rank_of(order.size());
  Ranks sorted(ranks.size());
  for (size_t r = 0; r < ranks.size(); ++r) {
    sorted[r].reserve(ranks[r].size());
    for (Index i : ranks[r]) rank_of[static_cast<size_t>(i)] = r;
  }
  for (Index i : order) sorted[rank_of[static_cast<size_t>(i)]].push_back(i);
  return sorted;
}

// Karmarkar-Karp, k-way. A partial partition is a single item, or a row of k slots, ascending by sum, each a linked
// list of items. Most joins put one more item onto a row; rows come from a pool that stays in the cache.
class Differencing {
 public:
  Differencing(const std::vector<double>& costs, size_t num_ranks)
      : k_(num_ranks), costs_(costs), next_(costs.size(), -1), joined_(k_), place_(k_), order_(k_) {}

  // `order`: the costliest item first, equal ones by index.
  Ranks solve(const std::vector<Index>& order) {
    // Items need no heap: in order they are one. Nor does the row made last, which until each of its slots has an item
    // is the very next to be joined.
    size_t taken = 0;
    std::vector<Entry> heap;
    Entry hand{};
    bool holding = false;
    const auto take = [&] {
      Entry best{-1.0, 0, 0};
      const bool any_item = taken < order.size();
      if (any_item) best = {costs_[static_cast<size_t>(order[taken])], order[taken], static_cast<Index>(~order[taken])};
      const bool from_heap = !heap.empty() && (!any_item || best < heap.front());
      if (from_heap) best = heap.front();
      if (holding && ((!any_item && !from_heap) || best < hand)) {
        holding = false;
        return hand;
      }
      if (from_heap) {
        std::pop_heap(heap.begin(), heap.end());
        heap.pop_back();
      } else {
        ++taken;
      }
      return best;
    };
    const auto count = static_cast<Index>(order.size());
    for (Index joined = 1; joined < count; ++joined) {
      const Entry left = take(), right = take();
      const Index row = join(left.where, right.where);
      if (holding) {
        heap.push_back(hand);
        std::push_heap(heap.begin(), heap.end());
      }
      const Slot* slots = slots_of(row);
      hand = {slots[k_ - 1].sum - slots[0].sum, count + joined - 1, row};
      holding = true;
    }
    const Entry last = take();
    Ranks ranks(k_);
    const Slot* slots = slots_of(as_row(last.where));
    for (size_t s = 0; s < k_; ++s)
      for (Index i = slots[s].head; i >= 0; i = next_[static_cast<size_t>(i)]) ranks[s].push_back(i);
    return ranks;
  }

 private:
  struct Entry {
    double spread;
    Index born;   // equal spreads are joined in the order they arose
    Index where;  // a row, or ~item
    bool operator<(const Entry& other) const {
      return spread != other.spread ? spread < other.spread : born > other.born;
    }
  };

  struct Slot {
    double sum = 0.0;
    Index head = -1, tail = -1;
  };

  static constexpr size_t kCountingRanks = 48;

  Slot* slots_of(Index row) { return &pool_[static_cast<size_t>(row) * k_]; }

  Index as_row(Index where) {
    if (where >= 0) return where;
    Index row;
    if (free_.empty()) {
      row = static_cast<Index>(pool_.size() / k_);
      pool_.resize(pool_.size() + k_);
    } else {
      row = free_.back();
      free_.pop_back();
      std::fill_n(slots_of(row), k_, Slot{});
    }
    const Index item = ~where;
    slots_of(row)[k_ - 1] = {costs_[static_cast<size_t>(item)], item, item};
    return row;
  }

  void append(Slot& slot, Index head, Index tail, double sum) {
    slot.sum += sum;
    if (head < 0) return;
    if (slot.head < 0)
      slot.head = head;
    else
      next_[static_cast<size_t>(slot.tail)] = head;
    slot.tail = tail;
  }

  // The heaviest slot of one meets the lightest of the other.
  Index join(Index left, Index right) {
    const Index row = as_row(left);
    Slot* slots = slots_of(row);
    if (right < 0) {
      append(slots[0], ~right, ~right, costs_[static_cast<size_t>(~right)]);
      // Only the first slot grew; it goes before its equals.
      const Slot grown = slots[0];
      size_t at = 0;
      for (; at + 1 < k_ && slots[at + 1].sum < grown.sum; ++at) slots[at] = slots[at + 1];
      slots[at] = grown;
      return row;
    }
    const Slot* others = slots_of(right);
    for (size_t s = 0; s < k_; ++s) {
      joined_[s] = slots[s];
      append(joined_[s], others[k_ - 1 - s].head, others[k_ - 1 - s].tail, others[k_ - 1 - s].sum);
    }
    free_.push_back(right);
    rank_slots();
    for (size_t s = 0; s < k_; ++s) slots[place_[s]] = joined_[s];
    return row;
  }

  // place_[s] = position of joined slot s in ascending order, equal sums in the order they have.
  void rank_slots() {
    if (k_ > kCountingRanks) {
      std::iota(order_.begin(), order_.end(), size_t{0});
      std::stable_sort(order_.begin(), order_.end(),
                       [&](size_t a, size_t b) { return joined_[a].sum < joined_[b].sum; });
      for (size_t s = 0; s < k_; ++s) place_[order_[s]] = static_cast<uint32_t>(s);
      return;
    }
    // Counting how many come before is quadratic, but has no branch to mispredict: faster while k is small.
    for (size_t s = 0; s < k_; ++s) {
      uint32_t before = 0;
      for (size_t other = 0; other < s; ++other) {
        const uint32_t first = joined_[other].sum <= joined_[s].sum ? 1u : 0u;
        before += first;
        place_[other] += 1u - first;
      }
      place_[s] = before;
    }
  }

  size_t k_;
  const std::vector<double>& costs_;
  std::vector<Index> next_, free_;
  std::vector<Slot> pool_, joined_;
  std::vector<uint32_t> place_;
  std::vector<size_t> order_;
};

inline Ranks partition(const std::vector<double>& costs, const std::vector<Index>& order, size_t num_ranks) {
  if (num_ranks == 1 || costs.empty()) {
    Ranks ranks(num_ranks);
    ranks[0].resize(costs.size());
    std::iota(ranks[0].begin(), ranks[0].end(), 0);
    return ranks;
  }
  return Differencing(costs, num_ranks).solve(order);
}

struct Exchange {
  ptrdiff_t give = -1, take = -1;  // positions; take = -1: nothing comes back; give = -1: nothing narrows the gap
};

// Both lists ascend by cost, so the partner nearest to cost - gap / 2 only moves right: one sweep.
inline Exchange best_exchange(const std::vector<Item>& heavy, const std::vector<Item>& light, double gap) {
  Exchange best;
  double left_over = gap;
  const auto count = static_cast<ptrdiff_t>(light.size());
  ptrdiff_t at = -1;
  for (size_t give = 0; give < heavy.size(); ++give) {
    const double cost = heavy[give].first;
    while (at + 1 < count && light[static_cast<size_t>(at + 1)].first <= cost - gap / 2) ++at;
    for (ptrdiff_t take = at; take <= at + 1 && take < count; ++take) {
      const double delta = cost - (take >= 0 ? light[static_cast<size_t>(take)].first : 0.0);
      const double after = std::abs(gap - 2 * delta);
      if (after < left_over) {
        best = {static_cast<ptrdiff_t>(give), take};
        left_over = after;
      }
    }
  }
  return best;
}

inline void insert_sorted(std::vector<Item>& items, Item item) {
  items.insert(std::upper_bound(items.begin(), items.end(), item), item);
}

// `ascending`: all items, the cheapest first, equal ones by index.
inline Ranks refine(const Ranks& ranks, const std::vector<double>& costs, const std::vector<Index>& ascending) {
  std::vector<std::vector<Item>> items(ranks.size());
  std::vector<double> loads(ranks.size(), 0.0);
  const Ranks sorted = in_order(ranks, ascending);
  for (size_t r = 0; r < ranks.size(); ++r) {
    items[r].reserve(sorted[r].size() + 1);
    for (Index i : sorted[r]) items[r].emplace_back(costs[static_cast<size_t>(i)], i);
    for (const Item& item : items[r]) loads[r] += item.first;
  }
  for (size_t round = 0; round < kRefineRounds * ranks.size(); ++round) {
    const auto high = static_cast<size_t>(std::max_element(loads.begin(), loads.end()) - loads.begin());
    const auto low = static_cast<size_t>(std::min_element(loads.begin(), loads.end()) - loads.begin());
    const Exchange exchange = best_exchange(items[high], items[low], loads[high] - loads[low]);
    if (exchange.give < 0) break;
    const Item given = items[high][static_cast<size_t>(exchange.give)];
    items[high].erase(items[high].begin() + exchange.give);
    double delta = given.first;
    if (exchange.take >= 0) {
      const Item taken = items[low][static_cast<size_t>(exchange.take)];
      items[low].erase(items[low].begin() + exchange.take);
      insert_sorted(items[high], taken);
      delta -= taken.first;
    }
    insert_sorted(items[low], given);
    loads[high] -= delta;
    loads[low] += delta;
  }
  Ranks out(ranks.size());
  for (size_t r = 0; r < ranks.size(); ++r)
    for (const Item& item : items[r]) out[r].push_back(item.second);
  return out;
}

// `rank`: its longest first.
inline Ranks first_fit(const std::vector<Index>& rank, const std::vector<int64_t>& lengths, int64_t max_tokens) {
  const auto length = [&](Index i) { return lengths[static_cast<size_t>(i)]; };
  Ranks bins;
  std::vector<int64_t> room;
  for (Index i : rank) {
    const auto fits = std::find_if(room.begin(), room.end(), [&](int64_t left) { return length(i) <= left; });
    if (fits == room.end()) {
      bins.push_back({i});
      room.push_back(max_tokens - length(i));
    } else {
      bins[static_cast<size_t>(fits - room.begin())].push_back(i);
      *fits -= length(i);
    }
  }
  for (auto& members : bins) std::sort(members.begin(), members.end());
  return bins;
}

// [rank][microbatch][index], heaviest microbatch first; a sequence costs linear * L + square * L^2.
inline Packed pack(const std::vector<int64_t>& lengths, int64_t max_tokens, size_t num_ranks, double linear,
                   double square) {
  std::vector<double> costs;
  costs.reserve(lengths.size());
  for (int64_t n : lengths) {
    const auto length = static_cast<double>(n);
    costs.push_back(linear * length + square * (length * length));
  }
  const std::vector<Index> by_length = longest_first(lengths), by_cost = costliest_first(by_length, costs);
  std::vector<Index> ascending(by_cost.rbegin(), by_cost.rend());
  // Backwards, equal costs come by falling index.
  for (auto first = ascending.begin(); first != ascending.end();) {
    const double cost = costs[static_cast<size_t>(*first)];
    const auto last = std::find_if(first, ascending.end(), [&](Index i) { return costs[static_cast<size_t>(i)] != cost; });
    std::reverse(first, last);
    first = last;
  }
  Packed packed;
  size_t most = 0;
  const Ranks balanced = refine(partition(costs, by_cost, num_ranks), costs, ascending);
  for (const auto& rank : in_order(balanced, by_length)) {
    Ranks bins = first_fit(rank, lengths, max_tokens);
    std::vector<double> heavy(bins.size(), 0.0);
    for (size_t k = 0; k < bins.size(); ++k)
      for (Index i : bins[k]) heavy[k] += costs[static_cast<size_t>(i)];
    std::vector<size_t> order(bins.size());
    std::iota(order.begin(), order.end(), size_t{0});
    std::sort(order.begin(), order.end(), [&](size_t a, size_t b) {
      return heavy[a] != heavy[b] ? heavy[a] > heavy[b] : bins[a].front() < bins[b].front();
    });
    Ranks sorted;
    for (size_t k : order) sorted.push_back(std::move(bins[k]));
    most = std::max(most, sorted.size());
    packed.push_back(std::move(sorted));
  }
  for (auto& rank : packed) rank.resize(most);
  return packed;
}

}  // namespace orz
