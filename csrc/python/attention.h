// The Python face of csrc/cpu/attend.h and attend_packed.h.
#pragma once

#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "cpu/attend.h"
#include "cpu/attend_packed.h"
#include "cpu/parallel.h"
#include "python/view.h"

namespace orz::python {

// Rows of work for one thread at least: a row of the smallest models takes some microseconds.
constexpr size_t kGrainRows = 16;

inline void attend_slots(const py::buffer& query, const py::buffer& key, const py::buffer& value,
                         const py::buffer& keys, const py::buffer& values, const py::buffer& positions,
                         int64_t kv_heads, int64_t dim, int64_t max_tokens, double scale, int64_t window,
                         const py::buffer& out, int64_t threads) {
  if (kv_heads < 1 || dim < 1 || max_tokens < 1 || window < 0 || threads < 1)
    throw std::invalid_argument("attend_slots: expected positive kv_heads, dim, max_tokens and threads, and a window "
                                "of at least 0");
  const View query_view(query, "query"), key_view(key, "key"), value_view(value, "value");
  const View positions_view(positions, "positions");
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
      nullptr,
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
      throw std::invalid_argument("attend_packed: expected positive kv_heads, dim and threads, and a window of at "
                                  "least 0");
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
      fits = fits && args.owned[b] >= 0 && args.ends[b] <= args.ends[b + 1] &&
             args.owned[b] <= args.ends[b + 1] - args.ends[b];
    if (!fits || group == 0)
      throw std::invalid_argument("attend_packed: expected `ends` from 0 to the length of `rows`, `owned` within the "
                                  "sequences, and a multiple of kv_heads heads, found others");
    return args;
  }
};

inline size_t tokens_of(const View& value, int64_t kv_heads, int64_t dim) {
  return value.bytes() / std::max<size_t>(1, static_cast<size_t>(kv_heads) * static_cast<size_t>(dim) * sizeof(float));
}

inline void attend_packed_forward(const py::buffer& query, const py::buffer& key, const py::buffer& value,
                                  const py::buffer& rows, const py::buffer& ends, const py::buffer& owned,
                                  int64_t kv_heads, int64_t dim, double scale, int64_t window, const py::buffer& out,
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

inline void attend_packed_backward(const py::buffer& query, const py::buffer& key, const py::buffer& value,
                                   const py::buffer& rows, const py::buffer& ends, const py::buffer& owned,
                                   int64_t kv_heads, int64_t dim, double scale, int64_t window, const py::buffer& out,
                                   const py::buffer& logsumexp, const py::buffer& grad_out,
                                   const py::buffer& grad_query, const py::buffer& grad_key,
                                   const py::buffer& grad_value, int64_t threads) {
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

inline void define_attention(py::module_& m) {
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
}

}  // namespace orz::python
