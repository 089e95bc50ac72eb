// A Llama-like network over a slot cache: sequences that go on by one token, or begin with many. A block of tokens
// flows through all layers while it is in the cache of a core, and needs nothing of other blocks but the keys and
// values of its own slot; so threads share no barrier, and a sequence's bits depend on nothing but that sequence.
//
// The equations are those of orz_async/ops/reference/decoding.py.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "attend.h"
#include "gemm.h"
#include "layers.h"
#include "parallel.h"

namespace orz::decode {

constexpr size_t kBlock = 64;       // tokens: their activations and a layer's weights share the second-level cache
constexpr size_t kGrainTokens = 16;  // of a thread; fewer are done before it has started

struct Layer {
  std::vector<float> attention_norm;         // [width]
  gemm::Linear qkv;                          // to [heads, dim | kv_heads, dim | kv_heads, dim]
  std::vector<float> query_norm, key_norm;   // [dim], or empty
  gemm::Linear out;
  std::vector<float> mlp_norm;               // [width]
  gemm::Linear gate_up;                      // to [hidden | hidden]
  gemm::Linear down;
  size_t window;                             // keys a query sees, itself included; 0: all before it
};

struct Network {
  size_t vocab, width, heads, kv_heads, dim, hidden;
  size_t positions;                   // rows of `cos` and `sin`
  double eps, scale;
  std::vector<float> embedding;       // [vocab, width]
  std::vector<float> cos, sin;        // [positions, dim]
  std::vector<Layer> layers;
  std::vector<float> norm;            // [width]
  gemm::Linear head;                  // to [vocab]
};

struct Cache {  // of a layer: [slots, kv_heads, max_tokens, dim]
  float* keys;
  float* values;
};

// Sequence s goes on in slot slots[s], which has positions[s] tokens of it, with tokens starts[s] to starts[s + 1].
struct Step {
  const int64_t* tokens;
  const int64_t* starts;     // [sequences + 1]
  const int64_t* slots;      // [sequences], no two alike
  const int64_t* positions;  // [sequences]
  size_t sequences;
  const Cache* caches;       // [layers]
  size_t max_tokens;
  float* logits;             // [sequences, vocab], of the last token of each
};

// out = x / rms(x) * weight, as the learner computes it: errors that both make are no mismatch. `out` may be `x`.
inline void rms_norm(const float* x, const std::vector<float>& weight, double eps, float* out) {
  float inverse = 0.0f;
  layers::norm_forward({x, weight.data(), 1, weight.size(), eps}, out, &inverse, 0, 1);
}

// Rotary embedding (Su et al. 2021) of one head, whose halves are the two coordinates.
inline void rotate(const float* x, const float* cos, const float* sin, size_t dim, float* out) {
  const size_t half = dim / 2;
  for (size_t d = 0; d < half; ++d) {
    out[d] = x[d] * cos[d] - x[d + half] * sin[d];
    out[d + half] = x[d + half] * cos[d + half] + x[d] * sin[d + half];
  }
}

// The activations of one block of tokens.
class Block {
 public:
  Block(const Network& net, const Step& step, size_t most)
      : net_(net),
        step_(step),
        x_(most * net.width),
        normed_(most * net.width),
        query_(most * net.heads * net.dim),
        attended_(most * net.heads * net.dim),
        key_(most * net.kv_heads * net.dim),
        value_(most * net.kv_heads * net.dim),
        gated_(most * net.hidden) {
    size_t widest = net.head.stride();
    for (const Layer& layer : net.layers)
      widest = std::max({widest, layer.qkv.stride(), layer.gate_up.stride(), layer.out.stride(), layer.down.stride()});
    product_.resize(most * widest);
  }

  // The next `count` tokens, from `token` of sequence `sequence` on. Returns the sequence of the token after them.
  size_t run(size_t token, size_t count, size_t sequence) {
    places_.clear();
    slots_.clear();
    ended_.clear();
    for (size_t r = 0; r < count; ++r, ++token) {
      const auto start = static_cast<size_t>(step_.starts[sequence]);
      const auto stop = static_cast<size_t>(step_.starts[sequence + 1]);
      places_.push_back(step_.positions[sequence] + static_cast<int64_t>(token - start));
      slots_.push_back(step_.slots[sequence]);
      const size_t width = net_.width;
      std::copy_n(&net_.embedding[static_cast<size_t>(step_.tokens[token]) * width], width, &x_[r * width]);
      if (token + 1 == stop) ended_.push_back({r, sequence++});
    }
    for (size_t l = 0; l < net_.layers.size(); ++l) {
      attention(net_.layers[l], step_.caches[l]);
      mlp(net_.layers[l]);
    }
    head();
    return sequence;
  }

 private:
  struct End {
    size_t row, sequence;
  };

  size_t rows() const { return slots_.size(); }

  void add_product(size_t stride) {
    for (size_t r = 0; r < rows(); ++r)
      for (size_t i = 0; i < net_.width; ++i) x_[r * net_.width + i] += product_[r * stride + i];
  }

  void norm_and_multiply(const std::vector<float>& weight, const gemm::Linear& linear) {
    for (size_t r = 0; r < rows(); ++r) rms_norm(&x_[r * net_.width], weight, net_.eps, &normed_[r * net_.width]);
    gemm::multiply(normed_.data(), net_.width, rows(), linear, product_.data());
  }

  // Projected heads in `product_` to `out` [rows, heads, dim], normalised and turned.
  void turn(size_t offset, size_t heads, size_t stride, const std::vector<float>& norm, float* out) {
    for (size_t r = 0; r < rows(); ++r) {
      const size_t at = static_cast<size_t>(places_[r]) * net_.dim;
      for (size_t h = 0; h < heads; ++h) {
        float* head = product_.data() + r * stride + offset + h * net_.dim;
        if (!norm.empty()) rms_norm(head, norm, net_.eps, head);
        rotate(head, &net_.cos[at], &net_.sin[at], net_.dim, out + (r * heads + h) * net_.dim);
      }
    }
  }

  void attention(const Layer& layer, const Cache& cache) {
    norm_and_multiply(layer.attention_norm, layer.qkv);
    const size_t query = net_.heads * net_.dim, key = net_.kv_heads * net_.dim, stride = layer.qkv.stride();
    turn(0, net_.heads, stride, layer.query_norm, query_.data());
    turn(query, net_.kv_heads, stride, layer.key_norm, key_.data());
    for (size_t r = 0; r < rows(); ++r) std::copy_n(&product_[r * stride + query + key], key, &value_[r * key]);
    attend::decode({query_.data(), key_.data(), value_.data(), cache.keys, cache.values, places_.data(),
                    attended_.data(), net_.kv_heads, net_.heads / net_.kv_heads, step_.max_tokens, net_.dim,
                    net_.scale, layer.window, slots_.data()},
                   0, rows());
    gemm::multiply(attended_.data(), query, rows(), layer.out, product_.data());
    add_product(layer.out.stride());
  }

  void mlp(const Layer& layer) {
    norm_and_multiply(layer.mlp_norm, layer.gate_up);
    for (size_t r = 0; r < rows(); ++r) {
      const float* gate = &product_[r * layer.gate_up.stride()];
      layers::gate_forward(gate, gate + net_.hidden, &gated_[r * net_.hidden], 0, net_.hidden);
    }
    gemm::multiply(gated_.data(), net_.hidden, rows(), layer.down, product_.data());
    add_product(layer.down.stride());
  }

  void head() {
    for (size_t e = 0; e < ended_.size(); ++e)
      rms_norm(&x_[ended_[e].row * net_.width], net_.norm, net_.eps, &normed_[e * net_.width]);
    gemm::multiply(normed_.data(), net_.width, ended_.size(), net_.head, product_.data());
    for (size_t e = 0; e < ended_.size(); ++e)
      std::copy_n(&product_[e * net_.head.stride()], net_.vocab, step_.logits + ended_[e].sequence * net_.vocab);
  }

  const Network& net_;
  const Step& step_;
  std::vector<float> x_, normed_, query_, attended_, key_, value_, gated_, product_;
  std::vector<int64_t> places_, slots_;  // of each row
  std::vector<End> ended_;               // rows that are the last of their sequence
};

// Sequences [first, last).
inline void run(const Network& net, const Step& step, size_t first, size_t last) {
  const auto begin = static_cast<size_t>(step.starts[first]), end = static_cast<size_t>(step.starts[last]);
  const size_t blocks = (end - begin + kBlock - 1) / kBlock;
  Block block(net, step, std::min(kBlock, end - begin));
  size_t sequence = first;
  for (size_t b = 0; b < blocks; ++b) {
    const size_t from = begin + (end - begin) * b / blocks, to = begin + (end - begin) * (b + 1) / blocks;
    sequence = block.run(from, to - from, sequence);
  }
}

// A sequence belongs to the thread in whose share of the tokens it begins: its own tokens need each other's keys.
inline void run(const Network& net, const Step& step, size_t threads) {
  const int64_t* stop = step.starts + step.sequences;
  const auto sequence_at = [&](size_t token) {
    return static_cast<size_t>(std::lower_bound(step.starts, stop, static_cast<int64_t>(token)) - step.starts);
  };
  parallel_ranges(static_cast<size_t>(*stop), threads, kGrainTokens, [&](size_t begin, size_t end) {
    run(net, step, sequence_at(begin), sequence_at(end));
  });
}

}  // namespace orz::decode
