"""What every file here does first: Triton's interpreter on, and quick at scans. `test_triton_interpreted.py` runs them.

They are not called test_*.py, since Triton must be imported with TRITON_INTERPRET=1 or not at all: another process.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "1"
ROOT = Path(__file__).parents[3]
sys.path[:0] = [str(ROOT / "tests" / "ops"), str(ROOT / "kernels"), str(ROOT)]

import numpy as np  # noqa: E402  after the environment is set
from triton.runtime import interpreter  # noqa: E402


def _scan(self, inputs):
    """In log2(n) steps over whole arrays; the interpreter's own calls the combine function once an element."""
    arrays = [x.handle.data for x in inputs]
    size = arrays[0].shape[self.axis]
    index = np.arange(size).reshape([size if axis == self.axis else 1 for axis in range(arrays[0].ndim)])
    step = 1
    while step < size:
        before = [self.to_tensor(np.roll(a, step, self.axis), x.dtype) for a, x in zip(arrays, inputs, strict=True)]
        here = [self.to_tensor(a, x.dtype) for a, x in zip(arrays, inputs, strict=True)]
        both = self.combine_fn.fn(*before, *here)
        arrays = [np.where(index >= step, c.handle.data, a) for c, a in zip(both, arrays, strict=True)]
        step *= 2
    return [self.to_tensor(a, x.dtype) for a, x in zip(arrays, inputs, strict=True)]


interpreter.ScanOps.generic_scan = _scan
