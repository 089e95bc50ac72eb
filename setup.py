"""Builds the C++ core with CMake; everything declarative is in pyproject.toml.

ORZ_CUDA=AUTO|ON|OFF in the environment decides about the GPU kernels: AUTO (default) builds them if there is an nvcc.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()


def remove_libraries(folder: Path) -> None:
    for library in folder.glob("liborz_cuda.*"):
        library.unlink()


class CMakeBuild(build_ext):
    """One CMake project makes the extension and, where there is an nvcc, the library of GPU kernels beside it."""

    def copy_extensions_to_source(self) -> None:
        """For editable installs: also what is no Python extension."""
        super().copy_extensions_to_source()
        remove_libraries(ROOT / "orz_async")
        for library in (Path(self.build_lib) / "orz_async").glob("liborz_cuda.*"):
            shutil.copy2(library, ROOT / "orz_async")

    def build_extension(self, ext: Extension) -> None:
        cmake = shutil.which("cmake")
        if cmake is None:
            raise SystemExit("setup.py: expected cmake on PATH, found none; install it (pip install cmake)")
        import pybind11

        cuda = os.environ.get("ORZ_CUDA", "AUTO")
        if cuda not in ("AUTO", "ON", "OFF"):
            raise SystemExit(f"ORZ_CUDA: expected AUTO, ON or OFF, found {cuda!r}")
        package = Path(self.get_ext_fullpath(ext.name)).parent.resolve()
        build = Path(self.build_temp).resolve() / "cmake"
        configure = [cmake, "-S", str(ROOT), "-B", str(build), f"-DORZ_CUDA={cuda}"]
        configure += ["-DCMAKE_BUILD_TYPE=Release", f"-DPython_EXECUTABLE={sys.executable}"]
        configure += [f"-Dpybind11_DIR={pybind11.get_cmake_dir()}", f"-DCMAKE_INSTALL_PREFIX={package}"]
        # An earlier build with ORZ_CUDA=ON may have left its library where the wheel is made.
        remove_libraries(package)
        jobs = str(self.parallel or os.cpu_count() or 1)
        for command in (configure, [cmake, "--build", str(build), "-j", jobs], [cmake, "--install", str(build)]):
            # The compiler has said what is wrong; a Python traceback below it would only hide that.
            if code := subprocess.run(command, check=False).returncode:
                raise SystemExit(f"setup.py: {' '.join(command)} failed with exit code {code}; the cause is above")


setup(
    ext_modules=[Extension("orz_async._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
    packages=find_packages(".", include=["orz_async", "orz_async.*"])
    + find_packages("kernels", include=["orz_kernels", "orz_kernels.*"]),
    package_dir={"orz_async": "orz_async", "orz_kernels": "kernels/orz_kernels"},
    package_data={"orz_async": ["*.pyi", "py.typed", "report/assets/*"]},
)
