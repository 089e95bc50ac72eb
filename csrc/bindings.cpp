// The Python face of csrc/cpu; with csrc/python all that knows pybind11. Plain buffers come in, no torch.
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

#include "cpu/crc32c.h"
#include "cpu/delta.h"
#include "cpu/dispatch.h"
#include "cpu/gae.h"
#include "cpu/loss.h"
#include "cpu/pack.h"
#include "cpu/parallel.h"
#include "cpu/sample.h"
#include "cpu/softmax.h"
#include "python/attention.h"
#include "python/decoder.h"
#include "python/layers.h"
#include "python/view.h"

namespace py = pybind11;
using orz::python::View;

namespace {

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

void sample(const py::buffer& logits, const py::buffer& temperatures, const py::buffer& uniforms,
            const py::buffer& tokens, const py::buffer& logprobs, int64_t threads) {
  const View logits_view(logits, "logits"), temperatures_view(temperatures, "temperatures");
  const View uniforms_view(uniforms, "uniforms"), tokens_view(tokens, "tokens", true), logprobs_view(logprobs, "logprobs", true);
  const size_t rows = temperatures_view.bytes() / sizeof(float);
  const size_t columns = rows == 0 ? 1 : logits_view.bytes() / (rows * sizeof(float));
  const orz::sample::Args args{
      logits_view.array<float>(rows * columns), columns,
      temperatures_view.array<float>(rows),     uniforms_view.array<double>(rows),
      tokens_view.array<int64_t>(rows),         logprobs_view.array<float>(rows),
  };
  if (columns == 0 || threads < 1)
    throw std::invalid_argument("sample: expected logits and at least one thread");
  const py::gil_scoped_release release;
  orz::parallel_ranges(rows, static_cast<size_t>(threads), kGrainLogits / columns + 1,
                       [&](size_t begin, size_t end) { orz::sample::draw(args, begin, end); });
}

std::vector<std::string> features() {
  std::vector<std::string> names;
  if (orz::has_sse42()) names.emplace_back("sse4.2");
  if (orz::has_avx2()) names.emplace_back("avx2");
  if (orz::has_avx512()) names.emplace_back("avx512");
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
  orz::python::define_layers(m);
  m.def("sample", &sample, py::arg("logits"), py::arg("temperatures"), py::arg("uniforms"), py::arg("tokens"),
        py::arg("logprobs"), py::arg("threads"));
  orz::python::define_decoder(m);
  m.def("features", &features);
}
