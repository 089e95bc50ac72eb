// Tests of what samples: matrix products with packed weights, the network, the draw of a token.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#include "cpu/decode.h"
#include "cpu/gemm.h"
#include "cpu/sample.h"
#include "tests/check.h"

// Against sums in float64, and a row's bits against those of the row alone: below, at and above every tile, panel and fold.
inline void test_gemm() {
  Rng rng(8);
  for (size_t inputs : {1u, 5u, 64u, 255u, 256u, 257u, 600u})
    for (size_t outputs : {1u, 31u, 32u, 33u, 100u}) {
      const auto weight = normal(rng, outputs * inputs), bias = normal(rng, outputs);
      const float* added = outputs % 2 == 0 ? bias.data() : nullptr;
      const orz::gemm::Linear linear = orz::gemm::pack(weight.data(), added, outputs, inputs);
      for (size_t rows : {1u, 6u, 7u, 12u, 29u}) {
        const auto x = normal(rng, rows * inputs);
        std::vector<float> out(rows * linear.stride(), NAN), alone(linear.stride());
        orz::gemm::multiply(x.data(), inputs, rows, linear, out.data());
        for (size_t r = 0; r < rows; ++r) {
          orz::gemm::multiply(x.data() + r * inputs, inputs, 1, linear, alone.data());
          for (size_t n = 0; n < outputs; ++n) {
            double want = added == nullptr ? 0.0 : added[n];
            for (size_t k = 0; k < inputs; ++k) want += static_cast<double>(x[r * inputs + k]) * weight[n * inputs + k];
            CHECK(std::abs(out[r * linear.stride() + n] - want) < 2e-6 * std::sqrt(static_cast<double>(inputs)) * 3);
            CHECK(std::memcmp(&alone[n], &out[r * linear.stride() + n], sizeof(float)) == 0);
          }
        }
      }
    }
}

inline orz::decode::Network random_network(Rng& rng) {
  orz::decode::Network net{17, 24, 4, 2, 6, 40, 50, 1e-6, 0.4, {}, {}, {}, {}, {}, {}};
  const auto linear = [&rng](size_t outputs, size_t inputs) {
    const auto weight = normal(rng, outputs * inputs, 0.3f), bias = normal(rng, outputs);
    return orz::gemm::pack(weight.data(), bias.data(), outputs, inputs);
  };
  net.embedding = normal(rng, net.vocab * net.width);
  net.cos = normal(rng, net.positions * net.dim);
  net.sin = normal(rng, net.positions * net.dim);
  for (size_t window : {0u, 7u})
    net.layers.push_back({normal(rng, net.width), linear(48, 24), normal(rng, net.dim),
                          window == 0 ? std::vector<float>() : normal(rng, net.dim), linear(24, 24),
                          normal(rng, net.width), linear(80, 24), linear(24, 40), window});
  net.norm = normal(rng, net.width);
  net.head = linear(net.vocab, net.width);
  return net;
}

// The same tokens in one call on several threads, and one after the other, give the same bits. The values themselves are
// tested from Python, against transformers.
inline void test_decode() {
  Rng rng(9);
  const orz::decode::Network net = random_network(rng);
  const std::vector<int64_t> starts = {0, 1, 2, 42, 43, 44, 94}, slots = {5, 0, 3, 1, 6, 2}, positions(6, 0);
  const size_t slot = net.kv_heads * 64 * net.dim, sequences = slots.size();
  std::vector<int64_t> tokens(94);
  for (int64_t& token : tokens) token = static_cast<int64_t>(rng() % net.vocab);
  std::vector<float> together[4], apart[4];
  for (auto& cache : together) cache.resize(7 * slot);
  for (auto& cache : apart) cache.resize(7 * slot);
  const orz::decode::Cache all[2] = {{together[0].data(), together[1].data()}, {together[2].data(), together[3].data()}};
  const orz::decode::Cache each[2] = {{apart[0].data(), apart[1].data()}, {apart[2].data(), apart[3].data()}};
  std::vector<float> logits(sequences * net.vocab, NAN), last(net.vocab);
  const orz::decode::Step step{tokens.data(), starts.data(), slots.data(), positions.data(),
                               sequences,     all,           64,           logits.data()};
  orz::decode::run(net, step, 3);
  for (size_t s = 0; s < sequences; ++s) {
    for (int64_t at = starts[s]; at < starts[s + 1]; ++at) {
      const int64_t one[2] = {0, 1}, place = at - starts[s];
      orz::decode::run(net, {tokens.data() + at, one, slots.data() + s, &place, 1, each, 64, last.data()}, 1);
    }
    CHECK(std::isfinite(last[0]));
    CHECK(std::memcmp(last.data(), logits.data() + s * net.vocab, net.vocab * sizeof(float)) == 0);
  }
  for (size_t c = 0; c < 4; ++c) CHECK(together[c] == apart[c]);
}

// The token whose share of the CDF holds the draw, and never one of probability 0.
inline void test_sample() {
  Rng rng(10);
  const float none = -std::numeric_limits<float>::infinity();
  for (size_t columns : {1u, 3u, 8u, 13u, 100u}) {
    std::vector<float> logits = normal(rng, columns, 3.0f);
    if (columns > 2) logits[0] = logits[columns - 1] = none;
    double total = 0.0;
    for (float z : logits) total += std::exp(double{z} / 0.7);
    for (double uniform : {0.0, 0.25, 0.5, 0.9, 1.0 - std::ldexp(1.0, -52)}) {
      const float temperature = 0.7f;
      int64_t token = -1;
      float logprob = NAN;
      orz::sample::draw({logits.data(), columns, &temperature, &uniform, &token, &logprob}, 0, 1);
      double below = 0.0;
      for (size_t v = 0; v < static_cast<size_t>(token); ++v) below += std::exp(double{logits[v]} / 0.7) / total;
      const double p = std::exp(double{logits[static_cast<size_t>(token)]} / 0.7) / total;
      CHECK(p > 0.0 && below <= uniform + 1e-6 && uniform < below + p + 1e-6 && near(logprob, std::log(p), 1e-6));
    }
  }
  const float bad[3] = {0.0f, NAN, 1.0f}, one = 1.0f;
  const double half = 0.5;
  int64_t token = -1;
  float logprob = 0.0f;
  orz::sample::draw({bad, 3, &one, &half, &token, &logprob}, 0, 1);
  CHECK(token >= 0 && token < 3 && std::isnan(logprob));
}
