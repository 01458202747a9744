"""Builds the kernel library with CMake and maps kernels/ops to llmopt.ops. Names no op: they are found by folder."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
LIBRARY = "libllmopt_kernels.so"


class CMakeBuild(build_ext):
    """Builds the library into llmopt/lib. Without a compiler the package installs all the same and runs on PyTorch."""

    def run(self) -> None:
        tools = [shutil.which("cmake"), shutil.which(os.environ.get("CXX", "c++")) or shutil.which("g++")]
        if not all(tools):
            self.warn("no cmake or no C++ compiler: llmopt installs without compiled kernels (see `llmopt doctor`)")
            return
        build = Path(self.build_temp).resolve() / "cmake"
        build.mkdir(parents=True, exist_ok=True)
        jobs = os.environ.get("MAX_JOBS", str(os.cpu_count() or 1))
        subprocess.run(
            ["cmake", "-S", str(ROOT), "-B", str(build), f"-DPython3_EXECUTABLE={sys.executable}"], check=True
        )
        subprocess.run(["cmake", "--build", str(build), "--parallel", jobs], check=True)
        target = self._target()
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(next(build.rglob(LIBRARY)), target)

    def _target(self) -> Path:
        root = ROOT if self.inplace or self.editable_mode else Path(self.build_lib).resolve()
        return root / "llmopt" / "lib" / LIBRARY

    def get_outputs(self) -> list[str]:
        return [str(self._target())] if self._target().is_file() else []

    def get_output_mapping(self) -> dict[str, str]:
        return {}


class PlatformWheel(bdist_wheel):
    """The library talks to Python through tvm-ffi's C ABI, so one wheel serves every Python on the platform."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


setup(
    packages=find_packages(include=["llmopt", "llmopt.*"])
    + ["llmopt.ops"]
    + [f"llmopt.ops.{name}" for name in find_packages("kernels/ops")],
    package_dir={"llmopt.ops": "kernels/ops"},
    package_data={"llmopt": ["py.typed", "data/*", "lib/*"]},
    ext_modules=[Extension("llmopt.lib.kernels", sources=[])],
    cmdclass={"build_ext": CMakeBuild, "bdist_wheel": PlatformWheel},
)
