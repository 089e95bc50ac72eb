// The Python face of csrc/cpu/layers.h.
#pragma once

#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/layers.h"
#include "cpu/parallel.h"
#include "python/view.h"

namespace orz::python {

inline orz::layers::Norm norm_of(const View& x, const View& weight, double eps) {
  const size_t dim = weight.bytes() / sizeof(float);
  if (dim == 0) throw std::invalid_argument("weight: expected at least one element, found none");
  const size_t rows = x.bytes() / (dim * sizeof(float));
  return {x.array<float>(rows * dim), weight.array<float>(dim), rows, dim, eps};
}

inline void rms_norm_forward(const py::buffer& x, const py::buffer& weight, double eps, const py::buffer& out,
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

inline void rms_norm_backward(const py::buffer& x, const py::buffer& weight, const py::buffer& inverse,
                              const py::buffer& grad_out, const py::buffer& grad_x, const py::buffer& grad_weight,
                              int64_t threads) {
  const View x_view(x, "x"), weight_view(weight, "weight"), inverse_view(inverse, "inverse");
  const View grad_out_view(grad_out, "grad_out"), grad_x_view(grad_x, "grad_x", true);
  const View grad_weight_view(grad_weight, "grad_weight", true);
  const orz::layers::Norm args = norm_of(x_view, weight_view, 0.0);  // what eps did is in `inverse`
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

inline void silu_mul_forward(const py::buffer& gate, const py::buffer& up, const py::buffer& out, int64_t threads) {
  const View gate_view(gate, "gate"), up_view(up, "up"), out_view(out, "out", true);
  const size_t count = gate_view.bytes() / sizeof(float);
  const float *g = gate_view.array<float>(count), *u = up_view.array<float>(count);
  auto* to = out_view.array<float>(count);
  const py::gil_scoped_release release;
  parallel_elements(count, threads,
                    [&](size_t begin, size_t end) { orz::layers::gate_forward(g, u, to, begin, end); });
}

inline void silu_mul_backward(const py::buffer& gate, const py::buffer& up, const py::buffer& grad_out,
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

inline void define_layers(py::module_& m) {
  m.def("rms_norm_forward", &rms_norm_forward, py::arg("x"), py::arg("weight"), py::arg("eps"), py::arg("out"),
        py::arg("inverse"), py::arg("threads"));
  m.def("rms_norm_backward", &rms_norm_backward, py::arg("x"), py::arg("weight"), py::arg("inverse"),
        py::arg("grad_out"), py::arg("grad_x"), py::arg("grad_weight"), py::arg("threads"));
  m.def("silu_mul_forward", &silu_mul_forward, py::arg("gate"), py::arg("up"), py::arg("out"), py::arg("threads"));
  m.def("silu_mul_backward", &silu_mul_backward, py::arg("gate"), py::arg("up"), py::arg("grad_out"),
        py::arg("grad_gate"), py::arg("grad_up"), py::arg("threads"));
  orz::python::define_attention(m);
}

}  // namespace orz::python
