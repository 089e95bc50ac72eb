// Sequences into microbatches of bounded size, balanced over ranks: Karmarkar-Karp differencing, swap refinement,
// first-fit decreasing. orz_async/ops/reference/packing.py is the same algorithm, decision by decision, and the tests
// hold the two to identical results: every tie is broken by index, and sums are added in the same order.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <numeric>
#include <queue>
#include <utility>
#include <vector>

namespace orz {

using Index = int32_t;
using Ranks = std::vector<std::vector<Index>>;
using Packed = std::vector<Ranks>;
using Item = std::pair<double, Index>;  // cost, index

constexpr int kRefineRounds = 64;

// Partial partitions live side by side in flat arrays: slot s of partition p holds a sum and a linked list of items.
class Differencing {
 public:
  Differencing(const std::vector<double>& costs, size_t num_ranks) : k_(num_ranks), next_(costs.size(), -1) {
    const size_t n = costs.size();
    sums_.assign(n * k_, 0.0);
    head_.assign(n * k_, -1);
    tail_.assign(n * k_, -1);
    for (size_t i = 0; i < n; ++i) {
      const size_t last = i * k_ + k_ - 1;
      sums_[last] = costs[i];
      head_[last] = tail_[last] = static_cast<Index>(i);
    }
  }

  Ranks solve() {
    const size_t n = next_.size();
    std::vector<Entry> entries;
    entries.reserve(n);
    for (size_t p = 0; p < n; ++p) entries.push_back({sums_[p * k_ + k_ - 1], p, p});
    std::priority_queue<Entry> queue(std::less<Entry>(), std::move(entries));
    for (size_t joined = n; queue.size() > 1; ++joined) {
      const Entry left = queue.top();
      queue.pop();
      const Entry right = queue.top();
      queue.pop();
      join(left.place, right.place);
      const double* sums = &sums_[left.place * k_];
      queue.push({sums[k_ - 1] - sums[0], joined, left.place});
    }
    Ranks ranks(k_);
    const size_t place = queue.top().place;
    for (size_t slot = 0; slot < k_; ++slot)
      for (Index i = head_[place * k_ + slot]; i >= 0; i = next_[static_cast<size_t>(i)]) ranks[slot].push_back(i);
    return ranks;
  }

 private:
  struct Entry {
    double spread;
    size_t born;
    size_t place;
    bool operator<(const Entry& other) const {
      return spread != other.spread ? spread < other.spread : born > other.born;
    }
  };

  struct Slot {
    double sum;
    Index head, tail;
  };

  // The heaviest slot of one meets the lightest of the other; the result replaces `left`, slots ascending.
  void join(size_t left, size_t right) {
    slots_.resize(k_);
    for (size_t s = 0; s < k_; ++s) {
      const size_t a = left * k_ + s, b = right * k_ + k_ - 1 - s;
      Slot slot{sums_[a] + sums_[b], head_[a], tail_[a]};
      if (slot.head < 0) {
        slot.head = head_[b];
        slot.tail = tail_[b];
      } else if (head_[b] >= 0) {
        next_[static_cast<size_t>(slot.tail)] = head_[b];
        slot.tail = tail_[b];
      }
      // Insertion sort: stable, and k is small.
      size_t at = s;
      for (; at > 0 && slots_[at - 1].sum > slot.sum; --at) slots_[at] = slots_[at - 1];
      slots_[at] = slot;
    }
    for (size_t s = 0; s < k_; ++s) {
      sums_[left * k_ + s] = slots_[s].sum;
      head_[left * k_ + s] = slots_[s].head;
      tail_[left * k_ + s] = slots_[s].tail;
    }
  }

  size_t k_;
  std::vector<double> sums_;
  std::vector<Index> head_, tail_, next_;
  std::vector<Slot> slots_;
};

inline Ranks partition(const std::vector<double>& costs, size_t num_ranks) {
  if (num_ranks == 1 || costs.empty()) {
    Ranks ranks(num_ranks);
    ranks[0].resize(costs.size());
    std::iota(ranks[0].begin(), ranks[0].end(), 0);
    return ranks;
  }
  return Differencing(costs, num_ranks).solve();
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

inline Ranks refine(const Ranks& ranks, const std::vector<double>& costs) {
  std::vector<std::vector<Item>> items(ranks.size());
  std::vector<double> loads(ranks.size(), 0.0);
  for (size_t r = 0; r < ranks.size(); ++r) {
    for (Index i : ranks[r]) items[r].emplace_back(costs[static_cast<size_t>(i)], i);
    std::sort(items[r].begin(), items[r].end());
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

inline Ranks first_fit_decreasing(std::vector<Index> rank, const std::vector<int64_t>& lengths, int64_t max_tokens) {
  const auto length = [&](Index i) { return lengths[static_cast<size_t>(i)]; };
  std::sort(rank.begin(), rank.end(),
            [&](Index a, Index b) { return length(a) != length(b) ? length(a) > length(b) : a < b; });
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
  Packed packed;
  size_t most = 0;
  for (const auto& rank : refine(partition(costs, num_ranks), costs)) {
    Ranks bins = first_fit_decreasing(rank, lengths, max_tokens);
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
