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


def missing_tools() -> str:
    """What a build needs and this machine lacks, or ''."""
    compiler = os.environ.get("CXX")
    found = {
        "cmake": shutil.which("cmake"),
        "make or ninja": shutil.which("make") or shutil.which("ninja"),
        "a C++ compiler": shutil.which(compiler.split()[0]) if compiler else shutil.which("c++") or shutil.which("g++"),
    }
    return ", ".join(name for name, path in found.items() if path is None)


class CMakeBuild(build_ext):
    """Builds the library into llmopt/lib. Without a compiler the package installs all the same and runs on PyTorch."""

    def run(self) -> None:
        if missing := missing_tools():
            self.warn(f"not found: {missing}; llmopt installs without compiled kernels (see `llmopt doctor`)")
            return
        # an editable install gets a temporary build_temp, which would compile everything each time
        build = (ROOT / "build" if self.editable_mode else Path(self.build_temp).resolve()) / "cmake"
        build.mkdir(parents=True, exist_ok=True)
        jobs = os.environ.get("MAX_JOBS", str(os.cpu_count() or 1))
        # the path is given each time: pip's isolated environments come and go, and CMake remembers
        generator = [] if shutil.which("make") else ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={shutil.which('ninja')}"]
        subprocess.run(
            ["cmake", "-S", str(ROOT), "-B", str(build), f"-DPython3_EXECUTABLE={sys.executable}", *generator],
            check=True,
        )
        subprocess.run(["cmake", "--build", str(build), "--parallel", jobs], check=True)
        target = self._target()
        target.parent.mkdir(parents=True, exist_ok=True)
        # renamed into place: a process that has the old library mapped keeps it
        staged = target.with_suffix(".new")
        shutil.copy2(next(build.rglob(LIBRARY)), staged)
        staged.replace(target)

    def _target(self) -> Path:
        root = ROOT if self.inplace or self.editable_mode else Path(self.build_lib).resolve()
        return root / "llmopt" / "lib" / LIBRARY

    def get_outputs(self) -> list[str]:
        return [str(self._target())] if self._target().is_file() else []

    def get_output_mapping(self) -> dict[str, str]:
        return {}


class PlatformWheel(bdist_wheel):
    """The library talks to Python through tvm-ffi's C ABI, so one wheel serves every Python on the platform."""

    def run(self) -> None:
        # setuptools packs whatever earlier builds left there
        shutil.rmtree(self.get_finalized_command("build").build_lib, ignore_errors=True)
        super().run()

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


setup(
    packages=find_packages(include=["llmopt", "llmopt.*"])
    + ["llmopt.ops"]
    + [f"llmopt.ops.{name}" for name in find_packages("kernels/ops")],
    package_dir={"llmopt.ops": "kernels/ops"},
    package_data={"llmopt": ["py.typed", "data/*"]},
    ext_modules=[Extension("llmopt.lib.kernels", sources=[])],
    cmdclass={"build_ext": CMakeBuild, "bdist_wheel": PlatformWheel},
)
