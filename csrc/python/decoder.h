// The Python face of csrc/cpu/decode.h: a network that holds its own packed copy of the weights.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstdint>
#include <deque>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "cpu/decode.h"
#include "python/view.h"

namespace orz::python {

inline void expect(bool condition, const std::string& message) {
  if (!condition) throw std::invalid_argument("decoder: expected " + message);
}

inline std::vector<float> floats(const py::handle& object, const char* name, size_t count) {
  const View view(object, name);
  const float* data = view.array<float>(count);
  return {data, data + count};
}

inline std::vector<float> maybe_floats(const py::handle& object, const char* name, size_t count) {
  return object.is_none() ? std::vector<float>() : floats(object, name, count);
}

// `pair` is (weight [outputs, inputs], bias [outputs] | None).
inline gemm::Linear linear(const py::handle& pair, const char* name, size_t outputs, size_t inputs) {
  const auto parts = py::cast<py::tuple>(pair);
  expect(parts.size() == 2, "weight and bias, found " + std::to_string(parts.size()) + " parts");
  const View weight(parts[0], name);
  const std::vector<float> bias = maybe_floats(parts[1], name, outputs);
  const float* values = weight.array<float>(outputs * inputs);
  const py::gil_scoped_release release;
  return gemm::pack(values, bias.empty() ? nullptr : bias.data(), outputs, inputs);
}

inline decode::Layer layer(const py::tuple& parts, const decode::Network& net) {
  expect(parts.size() == 9, "layers of 9 parts, found " + std::to_string(parts.size()));
  const size_t query = net.heads * net.dim, key = net.kv_heads * net.dim;
  const auto window = py::cast<int64_t>(parts[8]);
  expect(window >= 0, "a window of at least 0, found " + std::to_string(window));
  return {
      floats(parts[0], "attention_norm", net.width),
      linear(parts[1], "qkv", query + 2 * key, net.width),
      maybe_floats(parts[2], "query_norm", net.dim),
      maybe_floats(parts[3], "key_norm", net.dim),
      linear(parts[4], "out", net.width, query),
      floats(parts[5], "mlp_norm", net.width),
      linear(parts[6], "gate_up", 2 * net.hidden, net.width),
      linear(parts[7], "down", net.width, net.hidden),
      static_cast<size_t>(window),
  };
}

inline decode::Network network(const std::vector<int64_t>& shape, double eps, double scale, const py::buffer& embedding,
                               const py::buffer& cos, const py::buffer& sin, const std::vector<py::tuple>& layers,
                               const py::buffer& norm, const py::tuple& head) {
  expect(shape.size() == 7, "7 sizes, found " + std::to_string(shape.size()));
  for (int64_t size : shape)
    expect(size >= 1 && size < (int64_t{1} << 31), "sizes from 1 to 2^31, found " + std::to_string(size));
  const auto at = [&shape](size_t index) { return static_cast<size_t>(shape[index]); };
  decode::Network net{at(0), at(1), at(2), at(3), at(4), at(5), at(6), eps, scale, {}, {}, {}, {}, {}, {}};
  expect(net.heads % net.kv_heads == 0 && net.dim % 2 == 0, "heads in groups, of an even size, found " +
         std::to_string(net.heads) + " for " + std::to_string(net.kv_heads) + ", of " + std::to_string(net.dim));
  net.embedding = floats(embedding, "embedding", net.vocab * net.width);
  net.cos = floats(cos, "cos", net.positions * net.dim);
  net.sin = floats(sin, "sin", net.positions * net.dim);
  for (const py::tuple& parts : layers) net.layers.push_back(layer(parts, net));
  net.norm = floats(norm, "norm", net.width);
  net.head = linear(head, "head", net.vocab, net.width);
  return net;
}

// Every index that the network will follow.
inline void check(const decode::Network& net, const decode::Step& step, size_t slots) {
  const auto count = static_cast<size_t>(step.starts[step.sequences]);
  std::vector<bool> taken(slots);
  for (size_t s = 0; s < step.sequences; ++s) {
    const int64_t length = step.starts[s + 1] - step.starts[s], slot = step.slots[s];
    const auto most = static_cast<int64_t>(std::min(net.positions, step.max_tokens));
    // What is wrong is put into words only where something is: a step checks every token.
    if (length < 1) expect(false, "sequences of at least one token, found " + std::to_string(length));
    if (slot < 0 || static_cast<size_t>(slot) >= slots || taken[static_cast<size_t>(slot)])
      expect(false, "each of " + std::to_string(slots) + " slots at most once, found " + std::to_string(slot));
    taken[static_cast<size_t>(slot)] = true;
    if (step.positions[s] < 0 || step.positions[s] > most - length)
      expect(false, "at most " + std::to_string(most) + " tokens, found " + std::to_string(length) + " from position " +
                        std::to_string(step.positions[s]));
  }
  for (size_t n = 0; n < count; ++n)
    if (step.tokens[n] < 0 || static_cast<size_t>(step.tokens[n]) >= net.vocab)
      expect(false, "tokens in [0, " + std::to_string(net.vocab) + "), found " + std::to_string(step.tokens[n]));
}

inline void step(const decode::Network& net, const py::buffer& tokens, const py::buffer& starts,
                 const py::buffer& slots, const py::buffer& positions, const std::vector<std::pair<py::buffer, py::buffer>>& caches,
                 int64_t max_tokens, const py::buffer& logits, int64_t threads) {
  const View tokens_view(tokens, "tokens"), starts_view(starts, "starts"), slots_view(slots, "slots");
  const View positions_view(positions, "positions"), logits_view(logits, "logits", true);
  const size_t sequences = slots_view.bytes() / sizeof(int64_t);
  expect(max_tokens >= 1 && threads >= 1, "positive max_tokens and threads");
  expect(caches.size() == net.layers.size(),
         std::to_string(net.layers.size()) + " caches, found " + std::to_string(caches.size()));
  const size_t slot = net.kv_heads * net.dim * static_cast<size_t>(max_tokens);
  size_t num_slots = 0;
  std::deque<View> views;
  std::vector<decode::Cache> pairs;
  for (const auto& [keys, values] : caches) {
    const View& key = views.emplace_back(keys, "keys", true);
    const View& value = views.emplace_back(values, "values", true);
    if (pairs.empty()) num_slots = key.bytes() / (slot * sizeof(float));
    pairs.push_back({key.array<float>(num_slots * slot), value.array<float>(num_slots * slot)});
  }
  const size_t count = tokens_view.bytes() / sizeof(int64_t);
  const decode::Step args{
      tokens_view.array<int64_t>(count),
      starts_view.array<int64_t>(sequences + 1),
      slots_view.array<int64_t>(sequences),
      positions_view.array<int64_t>(sequences),
      sequences,
      pairs.data(),
      static_cast<size_t>(max_tokens),
      logits_view.array<float>(sequences * net.vocab),
  };
  expect(args.starts[0] == 0 && args.starts[sequences] == static_cast<int64_t>(count),
         "starts from 0 to " + std::to_string(count));
  check(net, args, num_slots);
  const py::gil_scoped_release release;
  decode::run(net, args, static_cast<size_t>(threads));
}

inline void define_decoder(py::module_& m) {
  py::class_<decode::Network>(m, "Decoder")
      .def(py::init(&network), py::arg("shape"), py::arg("eps"), py::arg("scale"), py::arg("embedding"), py::arg("cos"),
           py::arg("sin"), py::arg("layers"), py::arg("norm"), py::arg("head"))
      .def("step", &step, py::arg("tokens"), py::arg("starts"), py::arg("slots"), py::arg("positions"),
           py::arg("caches"), py::arg("max_tokens"), py::arg("logits"), py::arg("threads"));
}

}  // namespace orz::python
