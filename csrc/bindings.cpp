// The Python face of csrc/cpu: the only file that knows pybind11. Plain buffers come in, no torch.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "cpu/attend.h"
#include "cpu/attend_packed.h"
#include "cpu/crc32c.h"
#include "cpu/delta.h"
#include "cpu/dispatch.h"
#include "cpu/gae.h"
#include "cpu/layers.h"
#include "cpu/loss.h"
#include "cpu/pack.h"
#include "cpu/parallel.h"
#include "cpu/softmax.h"

namespace py = pybind11;

namespace {

// A view of a contiguous Python buffer that keeps it alive and locked. Made and destroyed with the GIL held.
class View {
 public:
  View(const py::handle& object, const char* name, bool writable = false) : name_(name) {
    if (PyObject_GetBuffer(object.ptr(), &view_, writable ? PyBUF_WRITABLE : PyBUF_SIMPLE) != 0)
      throw py::error_already_set();
  }
  View(const View&) = delete;
  View& operator=(const View&) = delete;
  ~View() { PyBuffer_Release(&view_); }

  size_t bytes() const { return static_cast<size_t>(view_.len); }
  uint8_t* data() const { return static_cast<uint8_t*>(view_.buf); }

  template <typename T>
  T* array(size_t count) const {
    if (bytes() != count * sizeof(T))
      throw std::invalid_argument(std::string(name_) + ": expected " + std::to_string(count * sizeof(T)) +
                                  " bytes, found " + std::to_string(bytes()));
    if (reinterpret_cast<uintptr_t>(view_.buf) % alignof(T) != 0)
      throw std::invalid_argument(std::string(name_) + ": expected an aligned buffer");
    return reinterpret_cast<T*>(view_.buf);
  }

 private:
  const char* name_;
  Py_buffer view_{};
};

uint32_t crc32c(const py::buffer& data, uint32_t init) {
  const View view(data, "data");
  // A short buffer is done before another thread could have taken the lock.
  if (view.bytes() < 4096) return orz::crc32c(view.data(), view.bytes(), init);
  const py::gil_scoped_release release;
  return orz::crc32c(view.data(), view.bytes(), init);
}

void check_cu_seqlens(const int32_t* cu_seqlens, size_t num_sequences, size_t num_tokens) {
  for (size_t b = 0; b < num_sequences; ++b)
    if (cu_seqlens[b + 1] < cu_seqlens[b])
      throw std::invalid_argument("cu_seqlens: expected a sequence that never falls, found one that does at " +
                                  std::to_string(b + 1));
  if (cu_seqlens[0] != 0 || static_cast<size_t>(cu_seqlens[num_sequences]) != num_tokens)
    throw std::invalid_argument("cu_seqlens: expected to run from 0 to " + std::to_string(num_tokens) + ", found " +
                                std::to_string(cu_seqlens[0]) + " to " + std::to_string(cu_seqlens[num_sequences]));
}

void gae(const py::buffer& rewards, const py::buffer& values, const py::buffer& cu_seqlens, float gamma, float lam,
         const std::optional<py::buffer>& mask, const std::optional<py::buffer>& bootstrap,
         const py::buffer& advantages, const py::buffer& returns) {
  const View values_view(values, "values"), rewards_view(rewards, "rewards"), cu_view(cu_seqlens, "cu_seqlens");
  const View advantages_view(advantages, "advantages", true), returns_view(returns, "returns", true);
  const size_t num_tokens = values_view.bytes() / sizeof(float);
  const size_t num_bounds = cu_view.bytes() / sizeof(int32_t);
  if (num_bounds == 0) throw std::invalid_argument("cu_seqlens: expected at least one element, found none");
  std::optional<View> mask_view, bootstrap_view;
  if (mask) mask_view.emplace(*mask, "mask");
  if (bootstrap) bootstrap_view.emplace(*bootstrap, "bootstrap");
  const orz::GaeArgs args{
      rewards_view.array<float>(num_tokens),
      values_view.array<float>(num_tokens),
      cu_view.array<int32_t>(num_bounds),
      static_cast<int64_t>(num_bounds) - 1,
      gamma,
      lam,
      mask_view ? mask_view->array<uint8_t>(num_tokens) : nullptr,
      bootstrap_view ? bootstrap_view->array<float>(num_bounds - 1) : nullptr,
      advantages_view.array<float>(num_tokens),
      returns_view.array<float>(num_tokens),
  };
  check_cu_seqlens(args.cu_seqlens, num_bounds - 1, num_tokens);
  const py::gil_scoped_release release;
  orz::gae(args);
}

// As pybind11's caster, but twice as fast: with thousands of integers that is what pack() would spend its time on.
py::list as_list(const std::vector<orz::Index>& members) {
  py::list out(members.size());
  for (size_t i = 0; i < members.size(); ++i)
    PyList_SET_ITEM(out.ptr(), static_cast<Py_ssize_t>(i), PyLong_FromLong(members[i]));
  return out;
}

py::list pack(const py::buffer& lengths, int64_t max_tokens, int64_t num_ranks, std::pair<double, double> cost) {
  if (max_tokens < 1) throw std::invalid_argument("max_tokens: expected at least 1, found " + std::to_string(max_tokens));
  if (num_ranks < 1) throw std::invalid_argument("num_ranks: expected at least 1, found " + std::to_string(num_ranks));
  const View view(lengths, "lengths");
  const size_t count = view.bytes() / sizeof(int64_t);
  const int64_t* data = view.array<int64_t>(count);
  orz::Packed packed;
  {
    const py::gil_scoped_release release;
    packed = orz::pack(std::vector<int64_t>(data, data + count), max_tokens, static_cast<size_t>(num_ranks), cost.first,
                       cost.second);
  }
  py::list ranks;
  for (const auto& rank : packed) {
    py::list bins;
    for (const auto& members : rank) bins.append(as_list(members));
    ranks.append(std::move(bins));
  }
  return ranks;
}

template <typename Word>
py::bytes encode_words(const View& fresh, const View& old, size_t threads) {
  const size_t num_words = fresh.bytes() / sizeof(Word);
  const Word* fresh_words = fresh.array<Word>(num_words);
  const Word* old_words = old.array<Word>(num_words);
  std::optional<orz::delta::Encoder> encoder;
  {
    const py::gil_scoped_release release;
    encoder.emplace(fresh_words, old_words, num_words, threads);
  }
  auto payload = py::reinterpret_steal<py::bytes>(
      PyBytes_FromStringAndSize(nullptr, static_cast<Py_ssize_t>(encoder->size())));
  if (!payload) throw py::error_already_set();
  auto* out = reinterpret_cast<uint8_t*>(PyBytes_AS_STRING(payload.ptr()));
  const py::gil_scoped_release release;
  encoder->write(out);
  return payload;
}

void check_words(size_t word_bytes, int64_t threads) {
  if (word_bytes != 2 && word_bytes != 4)
    throw std::invalid_argument("word_bytes: expected 2 or 4, found " + std::to_string(word_bytes));
  if (threads < 1) throw std::invalid_argument("threads: expected at least 1, found " + std::to_string(threads));
}

py::bytes delta_encode(const py::buffer& fresh, const py::buffer& old, size_t word_bytes, int64_t threads) {
  check_words(word_bytes, threads);
  const View fresh_view(fresh, "new"), old_view(old, "old");
  const auto num_threads = static_cast<size_t>(threads);
  return word_bytes == 2 ? encode_words<uint16_t>(fresh_view, old_view, num_threads)
                         : encode_words<uint32_t>(fresh_view, old_view, num_threads);
}

void delta_apply(const py::buffer& words, const py::buffer& payload, size_t word_bytes, int64_t threads) {
  check_words(word_bytes, threads);
  const View words_view(words, "words", true), payload_view(payload, "payload");
  const size_t num_words = words_view.bytes() / word_bytes;
  const auto num_threads = static_cast<size_t>(threads);
  if (word_bytes == 2) {
    auto* data = words_view.array<uint16_t>(num_words);
    const py::gil_scoped_release release;
    orz::delta::apply(data, num_words, payload_view.data(), payload_view.bytes(), num_threads);
  } else {
    auto* data = words_view.array<uint32_t>(num_words);
    const py::gil_scoped_release release;
    orz::delta::apply(data, num_words, payload_view.data(), payload_view.bytes(), num_threads);
  }
}

// A thread should have at least this many logits to work on.
constexpr size_t kGrainLogits = 65536;

struct Rows {
  size_t rows, columns;
  const int64_t* targets;
};

Rows check_rows(const View& logits, const View& targets) {
  Rows shape{targets.bytes() / sizeof(int64_t), 0, targets.array<int64_t>(targets.bytes() / sizeof(int64_t))};
  if (shape.rows != 0) shape.columns = logits.bytes() / sizeof(float) / shape.rows;
  logits.array<float>(shape.rows * shape.columns);
  for (size_t row = 0; row < shape.rows; ++row)
    if (shape.targets[row] < 0 || static_cast<size_t>(shape.targets[row]) >= shape.columns)
      throw std::invalid_argument("targets: expected indices in [0, " + std::to_string(shape.columns) + "), found " +
                                  std::to_string(shape.targets[row]) + " at " + std::to_string(row));
  return shape;
}

void softmax_forward(const py::buffer& logits, const py::buffer& targets, float scale,
                     const std::optional<py::buffer>& exp, const py::buffer& logprobs, const py::buffer& entropy,
                     const py::buffer& logsumexp, const py::buffer& total, int64_t threads) {
  const View logits_view(logits, "logits"), targets_view(targets, "targets");
  const View logprobs_view(logprobs, "logprobs", true), entropy_view(entropy, "entropy", true);
  const View logsumexp_view(logsumexp, "logsumexp", true), total_view(total, "total", true);
  std::optional<View> exp_view;
  if (exp) exp_view.emplace(*exp, "exp", true);
  const Rows shape = check_rows(logits_view, targets_view);
  const orz::softmax::ForwardArgs args{
      logits_view.array<float>(shape.rows * shape.columns),
      shape.columns,
      shape.targets,
      scale,
      exp_view ? exp_view->array<float>(shape.rows * shape.columns) : nullptr,
      logprobs_view.array<float>(shape.rows),
      entropy_view.array<float>(shape.rows),
      logsumexp_view.array<float>(shape.rows),
      total_view.array<float>(shape.rows),
  };
  const py::gil_scoped_release release;
  orz::parallel_ranges(shape.rows, static_cast<size_t>(threads), kGrainLogits / std::max<size_t>(shape.columns, 1) + 1,
                       [&](size_t begin, size_t end) { orz::softmax::forward(args, begin, end); });
}

void softmax_backward(const py::buffer& logits, const py::buffer& targets, float scale, const py::buffer& logsumexp,
                      const py::buffer& entropy, const py::buffer& grad_logprobs,
                      const std::optional<py::buffer>& grad_entropy, const py::buffer& grad_logits, int64_t threads) {
  const View logits_view(logits, "logits"), targets_view(targets, "targets");
  const View logsumexp_view(logsumexp, "logsumexp"), entropy_view(entropy, "entropy");
  const View slopes_view(grad_logprobs, "grad_logprobs"), out_view(grad_logits, "grad_logits", true);
  std::optional<View> grad_entropy_view;
  if (grad_entropy) grad_entropy_view.emplace(*grad_entropy, "grad_entropy");
  const Rows shape = check_rows(logits_view, targets_view);
  const orz::softmax::BackwardArgs args{
      logits_view.array<float>(shape.rows * shape.columns),
      shape.columns,
      shape.targets,
      scale,
      logsumexp_view.array<float>(shape.rows),
      entropy_view.array<float>(shape.rows),
      slopes_view.array<float>(shape.rows),
      grad_entropy_view ? grad_entropy_view->array<float>(shape.rows) : nullptr,
      out_view.array<float>(shape.rows * shape.columns),
  };
  const py::gil_scoped_release release;
  orz::parallel_ranges(shape.rows, static_cast<size_t>(threads), kGrainLogits / std::max<size_t>(shape.columns, 1) + 1,
                       [&](size_t begin, size_t end) { orz::softmax::backward(args, begin, end); });
}

// A float32 vector of `count` elements, or null where None came.
const float* optional_floats(const std::optional<py::buffer>& buffer, std::optional<View>& view, const char* name,
                             size_t count) {
  if (!buffer) return nullptr;
  view.emplace(*buffer, name);
  return view->array<float>(count);
}

const uint8_t* optional_mask(const std::optional<py::buffer>& buffer, std::optional<View>& view, size_t count) {
  if (!buffer) return nullptr;
  view.emplace(*buffer, "mask");
  return view->array<uint8_t>(count);
}

// One number, or one for each token.
bool is_per_token(const View& denominator, size_t count) {
  if (denominator.bytes() == sizeof(float)) return false;
  denominator.array<float>(count);
  return true;
}

void policy_loss(const py::buffer& logprobs, const py::buffer& sampled, const py::buffer& advantages,
                 const std::optional<py::buffer>& proximal, const std::optional<py::buffer>& entropy,
                 const std::optional<py::buffer>& mask, const py::buffer& denominator, float lowest, float highest,
                 float dual, float cap, const py::buffer& slopes, const py::buffer& stats) {
  const View current_view(logprobs, "logprobs"), sampled_view(sampled, "sampled"), advantages_view(advantages, "advantages");
  const View denominator_view(denominator, "denominator"), slopes_view(slopes, "slopes", true), stats_view(stats, "stats", true);
  std::optional<View> proximal_view, entropy_view, mask_view;
  const size_t count = current_view.bytes() / sizeof(float);
  const orz::PolicyLoss loss{
      current_view.array<float>(count),
      sampled_view.array<float>(count),
      advantages_view.array<float>(count),
      optional_floats(proximal, proximal_view, "proximal", count),
      optional_floats(entropy, entropy_view, "entropy", count),
      optional_mask(mask, mask_view, count),
      reinterpret_cast<const float*>(denominator_view.data()),
      is_per_token(denominator_view, count),
      lowest,
      highest,
      dual,
      cap,
  };
  auto* out = slopes_view.array<float>(count);
  auto* sums = stats_view.array<double>(orz::PolicyLoss::Stats::FIELDS);
  const py::gil_scoped_release release;
  orz::run_loss(loss, static_cast<int64_t>(count), out, sums);
}

void value_loss(const py::buffer& values, const py::buffer& old_values, const py::buffer& returns,
                const std::optional<py::buffer>& mask, const py::buffer& denominator, float clip,
                const py::buffer& slopes, const py::buffer& stats) {
  const View values_view(values, "values"), old_view(old_values, "old_values"), returns_view(returns, "returns");
  const View denominator_view(denominator, "denominator"), slopes_view(slopes, "slopes", true), stats_view(stats, "stats", true);
  std::optional<View> mask_view;
  const size_t count = values_view.bytes() / sizeof(float);
  const orz::ValueLoss loss{
      values_view.array<float>(count),
      old_view.array<float>(count),
      returns_view.array<float>(count),
      optional_mask(mask, mask_view, count),
      reinterpret_cast<const float*>(denominator_view.data()),
      is_per_token(denominator_view, count),
      clip,
  };
  auto* out = slopes_view.array<float>(count);
  auto* sums = stats_view.array<double>(orz::ValueLoss::Stats::FIELDS);
  const py::gil_scoped_release release;
  orz::run_loss(loss, static_cast<int64_t>(count), out, sums);
}

// Rows of work for one thread at least: a row of the smallest models takes some microseconds.
constexpr size_t kGrainRows = 16;

void attend_slots(const py::buffer& query, const py::buffer& key, const py::buffer& value, const py::buffer& keys,
                  const py::buffer& values, const py::buffer& positions, int64_t kv_heads, int64_t dim,
                  int64_t max_tokens, double scale, int64_t window, const py::buffer& out, int64_t threads) {
  if (kv_heads < 1 || dim < 1 || max_tokens < 1 || window < 0 || threads < 1)
    throw std::invalid_argument("attend_slots: expected positive kv_heads, dim, max_tokens and threads, and a window of at least 0");
  const View query_view(query, "query"), key_view(key, "key"), value_view(value, "value"), positions_view(positions, "positions");
  const View keys_view(keys, "keys", true), values_view(values, "values", true), out_view(out, "out", true);
  const size_t rows = positions_view.bytes() / sizeof(int64_t);
  const size_t row = static_cast<size_t>(kv_heads) * static_cast<size_t>(dim);
  const size_t slot = row * static_cast<size_t>(max_tokens);
  const size_t slots = keys_view.bytes() / (slot * sizeof(float));
  const size_t group = rows == 0 ? 1 : query_view.bytes() / (rows * row * sizeof(float));
  const orz::attend::Args args{
      query_view.array<float>(rows * row * group),
      key_view.array<float>(rows * row),
      value_view.array<float>(rows * row),
      keys_view.array<float>(slots * slot),
      values_view.array<float>(slots * slot),
      positions_view.array<int64_t>(rows),
      out_view.array<float>(rows * row * group),
      static_cast<size_t>(kv_heads),
      group,
      static_cast<size_t>(max_tokens),
      static_cast<size_t>(dim),
      scale,
      static_cast<size_t>(window),
  };
  if (rows > slots || group == 0)
    throw std::invalid_argument("attend_slots: expected at most " + std::to_string(slots) + " rows of at least " +
                                std::to_string(kv_heads) + " heads, found " + std::to_string(rows));
  for (size_t r = 0; r < rows; ++r)
    if (args.positions[r] < 0 || args.positions[r] >= max_tokens)
      throw std::invalid_argument("positions: expected 0 to " + std::to_string(max_tokens - 1) + ", found " +
                                  std::to_string(args.positions[r]) + " in row " + std::to_string(r));
  const py::gil_scoped_release release;
  orz::parallel_ranges(rows, static_cast<size_t>(threads), kGrainRows,
                       [&](size_t begin, size_t end) { orz::attend::decode(args, begin, end); });
}

// The views of a packed batch, which must outlive what `packed` makes of them.
struct PackedViews {
  View query, key, value, rows, ends, owned;

  PackedViews(const py::buffer& q, const py::buffer& k, const py::buffer& v, const py::buffer& r, const py::buffer& e,
              const py::buffer& o)
      : query(q, "query"), key(k, "key"), value(v, "value"), rows(r, "rows"), ends(e, "ends"), owned(o, "owned") {}

  orz::attend::Packed packed(size_t tokens, int64_t kv_heads, int64_t dim, double scale, int64_t window,
                             int64_t threads) const {
    if (kv_heads < 1 || dim < 1 || window < 0 || threads < 1)
      throw std::invalid_argument("attend_packed: expected positive kv_heads, dim and threads, and a window of at least 0");
    const size_t row = static_cast<size_t>(kv_heads) * static_cast<size_t>(dim);
    const size_t group = tokens == 0 ? 1 : query.bytes() / (tokens * row * sizeof(float));
    const size_t sequences = owned.bytes() / sizeof(int64_t), places = rows.bytes() / sizeof(int64_t);
    const orz::attend::Packed args{
        query.array<float>(tokens * row * group),
        key.array<float>(tokens * row),
        value.array<float>(tokens * row),
        rows.array<int64_t>(places),
        ends.array<int64_t>(sequences + 1),
        owned.array<int64_t>(sequences),
        sequences,
        static_cast<size_t>(kv_heads),
        group,
        static_cast<size_t>(dim),
        scale,
        static_cast<size_t>(window),
    };
    for (size_t i = 0; i < places; ++i)
      if (args.rows[i] < 0 || static_cast<size_t>(args.rows[i]) >= tokens)
        throw std::invalid_argument("rows: expected 0 to " + std::to_string(tokens) + " (excluded), found " +
                                    std::to_string(args.rows[i]));
    bool fits = args.ends[0] == 0 && static_cast<size_t>(args.ends[sequences]) == places;
    for (size_t b = 0; b < sequences; ++b)
      fits = fits && args.owned[b] >= 0 && args.ends[b] <= args.ends[b + 1] && args.owned[b] <= args.ends[b + 1] - args.ends[b];
    if (!fits || group == 0)
      throw std::invalid_argument("attend_packed: expected `ends` from 0 to the length of `rows`, `owned` within the "
                                  "sequences, and a multiple of kv_heads heads, found others");
    return args;
  }
};

size_t tokens_of(const View& value, int64_t kv_heads, int64_t dim) {
  return value.bytes() / std::max<size_t>(1, static_cast<size_t>(kv_heads) * static_cast<size_t>(dim) * sizeof(float));
}

void attend_packed_forward(const py::buffer& query, const py::buffer& key, const py::buffer& value,
                           const py::buffer& rows, const py::buffer& ends, const py::buffer& owned, int64_t kv_heads,
                           int64_t dim, double scale, int64_t window, const py::buffer& out,
                           const py::buffer& logsumexp, int64_t threads) {
  const PackedViews views(query, key, value, rows, ends, owned);
  const View out_view(out, "out", true), logsumexp_view(logsumexp, "logsumexp", true);
  const size_t tokens = tokens_of(views.value, kv_heads, dim);
  const orz::attend::Packed args = views.packed(tokens, kv_heads, dim, scale, window, threads);
  auto* to = out_view.array<float>(tokens * args.heads() * args.dim);
  auto* sums = logsumexp_view.array<double>(tokens * args.heads());
  const py::gil_scoped_release release;
  orz::parallel_ranges(args.kv_heads, static_cast<size_t>(threads), 1,
                       [&](size_t begin, size_t end) { orz::attend::forward(args, to, sums, begin, end); });
}

void attend_packed_backward(const py::buffer& query, const py::buffer& key, const py::buffer& value,
                            const py::buffer& rows, const py::buffer& ends, const py::buffer& owned, int64_t kv_heads,
                            int64_t dim, double scale, int64_t window, const py::buffer& out,
                            const py::buffer& logsumexp, const py::buffer& grad_out, const py::buffer& grad_query,
                            const py::buffer& grad_key, const py::buffer& grad_value, int64_t threads) {
  const PackedViews views(query, key, value, rows, ends, owned);
  const View out_view(out, "out"), logsumexp_view(logsumexp, "logsumexp"), grad_out_view(grad_out, "grad_out");
  const View grad_query_view(grad_query, "grad_query", true), grad_key_view(grad_key, "grad_key", true);
  const View grad_value_view(grad_value, "grad_value", true);
  const size_t tokens = tokens_of(views.value, kv_heads, dim);
  const orz::attend::Packed args = views.packed(tokens, kv_heads, dim, scale, window, threads);
  const size_t queries = tokens * args.heads() * args.dim, keys = tokens * args.kv_heads * args.dim;
  const orz::attend::Gradients to{
      out_view.array<float>(queries),          logsumexp_view.array<double>(tokens * args.heads()),
      grad_out_view.array<float>(queries),     grad_query_view.array<float>(queries),
      grad_key_view.array<float>(keys),        grad_value_view.array<float>(keys),
  };
  const py::gil_scoped_release release;
  orz::parallel_ranges(args.kv_heads, static_cast<size_t>(threads), 1,
                       [&](size_t begin, size_t end) { orz::attend::backward(args, to, begin, end); });
}

orz::layers::Norm norm_of(const View& x, const View& weight, double eps) {
  const size_t dim = weight.bytes() / sizeof(float);
  if (dim == 0) throw std::invalid_argument("weight: expected at least one element, found none");
  const size_t rows = x.bytes() / (dim * sizeof(float));
  return {x.array<float>(rows * dim), weight.array<float>(dim), rows, dim, eps};
}

void rms_norm_forward(const py::buffer& x, const py::buffer& weight, double eps, const py::buffer& out,
                      const py::buffer& inverse, int64_t threads) {
  const View x_view(x, "x"), weight_view(weight, "weight"), out_view(out, "out", true);
  const View inverse_view(inverse, "inverse", true);
  const orz::layers::Norm args = norm_of(x_view, weight_view, eps);
  auto* to = out_view.array<float>(args.rows * args.dim);
  auto* scales = inverse_view.array<float>(args.rows);
  const py::gil_scoped_release release;
  orz::parallel_ranges(args.rows, static_cast<size_t>(threads), orz::layers::kBlockRows,
                       [&](size_t begin, size_t end) { orz::layers::norm_forward(args, to, scales, begin, end); });
}

void rms_norm_backward(const py::buffer& x, const py::buffer& weight, double eps, const py::buffer& inverse,
                       const py::buffer& grad_out, const py::buffer& grad_x, const py::buffer& grad_weight,
                       int64_t threads) {
  const View x_view(x, "x"), weight_view(weight, "weight"), inverse_view(inverse, "inverse");
  const View grad_out_view(grad_out, "grad_out"), grad_x_view(grad_x, "grad_x", true);
  const View grad_weight_view(grad_weight, "grad_weight", true);
  const orz::layers::Norm args = norm_of(x_view, weight_view, eps);
  const auto* scales = inverse_view.array<float>(args.rows);
  const auto* slopes = grad_out_view.array<float>(args.rows * args.dim);
  auto* to = grad_x_view.array<float>(args.rows * args.dim);
  auto* sums = grad_weight_view.array<float>(args.dim);
  const py::gil_scoped_release release;
  std::vector<float> parts(args.blocks() * args.dim);
  orz::parallel_ranges(args.blocks(), static_cast<size_t>(threads), 1, [&](size_t begin, size_t end) {
    orz::layers::norm_backward(args, scales, slopes, to, parts.data(), begin, end);
  });
  for (size_t d = 0; d < args.dim; ++d) {
    double sum = 0.0;
    for (size_t block = 0; block < args.blocks(); ++block) sum += static_cast<double>(parts[block * args.dim + d]);
    sums[d] = static_cast<float>(sum);
  }
}

// Elements a thread takes at least, and whole numbers of which it takes: vectors then begin at the same places whoever
// computes them, and so do the elements that are left over for the scalar path.
constexpr size_t kGrainElements = 8192;

template <typename Work>
void parallel_elements(size_t count, int64_t threads, const Work& work) {
  orz::parallel_ranges((count + kGrainElements - 1) / kGrainElements, static_cast<size_t>(threads), 1,
                       [&](size_t begin, size_t end) {
                         work(begin * kGrainElements, std::min(count, end * kGrainElements));
                       });
}

void silu_mul_forward(const py::buffer& gate, const py::buffer& up, const py::buffer& out, int64_t threads) {
  const View gate_view(gate, "gate"), up_view(up, "up"), out_view(out, "out", true);
  const size_t count = gate_view.bytes() / sizeof(float);
  const float *g = gate_view.array<float>(count), *u = up_view.array<float>(count);
  auto* to = out_view.array<float>(count);
  const py::gil_scoped_release release;
  parallel_elements(count, threads,
                    [&](size_t begin, size_t end) { orz::layers::gate_forward(g, u, to, begin, end); });
}

void silu_mul_backward(const py::buffer& gate, const py::buffer& up, const py::buffer& grad_out,
                       const py::buffer& grad_gate, const py::buffer& grad_up, int64_t threads) {
  const View gate_view(gate, "gate"), up_view(up, "up"), grad_view(grad_out, "grad_out");
  const View grad_gate_view(grad_gate, "grad_gate", true), grad_up_view(grad_up, "grad_up", true);
  const size_t count = gate_view.bytes() / sizeof(float);
  const float *g = gate_view.array<float>(count), *u = up_view.array<float>(count), *dy = grad_view.array<float>(count);
  float *to_gate = grad_gate_view.array<float>(count), *to_up = grad_up_view.array<float>(count);
  const py::gil_scoped_release release;
  parallel_elements(count, threads, [&](size_t begin, size_t end) {
    orz::layers::gate_backward(g, u, dy, to_gate, to_up, begin, end);
  });
}

std::vector<std::string> features() {
  std::vector<std::string> names;
  if (orz::has_sse42()) names.emplace_back("sse4.2");
  if (orz::has_avx2()) names.emplace_back("avx2");
  return names;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "The C++ core: plain buffers in and out, no torch.";
  m.def("crc32c", &crc32c, py::arg("data"), py::arg("init") = 0);
  m.def("gae", &gae, py::arg("rewards"), py::arg("values"), py::arg("cu_seqlens"), py::arg("gamma"), py::arg("lam"),
        py::arg("mask").none(true), py::arg("bootstrap").none(true), py::arg("advantages"), py::arg("returns"));
  m.def("pack", &pack, py::arg("lengths"), py::arg("max_tokens"), py::arg("num_ranks"), py::arg("cost"));
  m.def("delta_encode", &delta_encode, py::arg("new"), py::arg("old"), py::arg("word_bytes"), py::arg("threads"));
  m.def("delta_apply", &delta_apply, py::arg("words"), py::arg("payload"), py::arg("word_bytes"), py::arg("threads"));
  m.def("softmax_forward", &softmax_forward, py::arg("logits"), py::arg("targets"), py::arg("scale"),
        py::arg("exp").none(true), py::arg("logprobs"), py::arg("entropy"), py::arg("logsumexp"), py::arg("total"),
        py::arg("threads"));
  m.def("softmax_backward", &softmax_backward, py::arg("logits"), py::arg("targets"), py::arg("scale"),
        py::arg("logsumexp"), py::arg("entropy"), py::arg("grad_logprobs"), py::arg("grad_entropy").none(true),
        py::arg("grad_logits"), py::arg("threads"));
  m.def("policy_loss", &policy_loss, py::arg("logprobs"), py::arg("sampled"), py::arg("advantages"),
        py::arg("proximal").none(true), py::arg("entropy").none(true), py::arg("mask").none(true),
        py::arg("denominator"), py::arg("lowest"), py::arg("highest"), py::arg("dual"), py::arg("cap"),
        py::arg("slopes"), py::arg("stats"));
  m.def("value_loss", &value_loss, py::arg("values"), py::arg("old_values"), py::arg("returns"),
        py::arg("mask").none(true), py::arg("denominator"), py::arg("clip"), py::arg("slopes"), py::arg("stats"));
  m.def("attend_slots", &attend_slots, py::arg("query"), py::arg("key"), py::arg("value"), py::arg("keys"),
        py::arg("values"), py::arg("positions"), py::arg("kv_heads"), py::arg("dim"), py::arg("max_tokens"),
        py::arg("scale"), py::arg("window"), py::arg("out"), py::arg("threads"));
  m.def("attend_packed_forward", &attend_packed_forward, py::arg("query"), py::arg("key"), py::arg("value"),
        py::arg("rows"), py::arg("ends"), py::arg("owned"), py::arg("kv_heads"), py::arg("dim"), py::arg("scale"),
        py::arg("window"), py::arg("out"), py::arg("logsumexp"), py::arg("threads"));
  m.def("attend_packed_backward", &attend_packed_backward, py::arg("query"), py::arg("key"), py::arg("value"),
        py::arg("rows"), py::arg("ends"), py::arg("owned"), py::arg("kv_heads"), py::arg("dim"), py::arg("scale"),
        py::arg("window"), py::arg("out"), py::arg("logsumexp"), py::arg("grad_out"), py::arg("grad_query"),
        py::arg("grad_key"), py::arg("grad_value"), py::arg("threads"));
  m.def("rms_norm_forward", &rms_norm_forward, py::arg("x"), py::arg("weight"), py::arg("eps"), py::arg("out"),
        py::arg("inverse"), py::arg("threads"));
  m.def("rms_norm_backward", &rms_norm_backward, py::arg("x"), py::arg("weight"), py::arg("eps"), py::arg("inverse"),
        py::arg("grad_out"), py::arg("grad_x"), py::arg("grad_weight"), py::arg("threads"));
  m.def("silu_mul_forward", &silu_mul_forward, py::arg("gate"), py::arg("up"), py::arg("out"), py::arg("threads"));
  m.def("silu_mul_backward", &silu_mul_backward, py::arg("gate"), py::arg("up"), py::arg("grad_out"),
        py::arg("grad_gate"), py::arg("grad_up"), py::arg("threads"));
  m.def("features", &features);
}
