"""What is shipped: the sdist builds a wheel with the library, or without one where there is no compiler."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email.message import Message
from email.parser import Parser
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from llmopt.env import ISA_NAMES

ROOT = Path(__file__).parent.parent
LIBRARY = "llmopt/lib/libllmopt_kernels.so"
NO_KERNELS = {"CXX": "/nonexistent/c++"}


def run(*command: str | Path, cwd: Path, **variables: str) -> str:
    """Run this Python away from the checkout, with its own tools first on PATH; its stdout."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "PIP_DISABLE_PIP_VERSION_CHECK": "1", **variables}
    done = subprocess.run(
        [sys.executable, *map(str, command)], env=environment, cwd=cwd, capture_output=True, text=True
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def install(wheel: Path, folder: Path) -> Path:
    """Install into a folder for PYTHONPATH."""
    run("-m", "pip", "install", "--no-deps", "--no-index", "--target", folder, wheel, cwd=folder)
    return folder


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy of the sources in which an earlier build has left its library."""
    base = tmp_path_factory.mktemp("sdist")
    skip = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "assets", "lib", "__pycache__")
    shutil.copytree(ROOT, base / "tree", ignore=skip, symlinks=True)
    (base / "tree/llmopt/lib").mkdir()
    (base / "tree" / LIBRARY).write_bytes(b"stale")
    (base / "out").mkdir()
    build = "import sys; from setuptools import build_meta; build_meta.build_sdist(sys.argv[1])"
    run("-c", build, base / "out", cwd=base / "tree")
    (archive,) = (base / "out").iterdir()
    return archive


def make_wheel(sdist: Path, target: Path, **variables: str) -> Path:
    """Build a wheel from the sdist with pip, as ``pip install`` does."""
    target.mkdir(exist_ok=True)
    options = ("--no-build-isolation", "--no-deps", "--no-index", "--wheel-dir", target)
    run("-m", "pip", "wheel", *options, sdist, cwd=target, **variables)
    (wheel,) = target.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With the library, compiled without optimization: that takes a third of the time."""
    base = tmp_path_factory.mktemp("wheel")
    compiler = shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        pytest.skip("no C++ compiler on this machine")
    wrapper = base / "c++"
    wrapper.write_text(f'#!/bin/sh\nexec {compiler} "$@" -O0\n')
    wrapper.chmod(0o755)
    return make_wheel(sdist, base / "out", CXX=str(wrapper))


@pytest.fixture(scope="module")
def wheel_without_kernels(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_wheel(sdist, tmp_path_factory.mktemp("bare"), **NO_KERNELS)


@pytest.fixture(scope="module")
def bare_install(wheel_without_kernels: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel without a library, installed into a folder for PYTHONPATH."""
    return install(wheel_without_kernels, tmp_path_factory.mktemp("site"))


def names(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def metadata(wheel: Path) -> Message:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        return Parser().parsestr(archive.read(name).decode("utf-8"))


def test_sdist_holds_the_sources_and_no_build_product(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        found = {name.partition("/")[2] for name in archive.getnames()}
    wanted = {p.relative_to(ROOT).as_posix() for p in (ROOT / "kernels").rglob("*") if p.suffix in (".cpp", ".h")}
    assert wanted
    assert wanted | {"CMakeLists.txt", "kernels/CMakeLists.txt", "LICENSE", "llmopt/data/calibration.txt"} <= found
    assert not {name for name in found if name.endswith(".so") or name.split("/")[0] in ("tests", "benchmarks")}


def test_wheel_holds_the_library_the_ops_and_the_data(wheel: Path) -> None:
    found = names(wheel)
    ops = {f"llmopt/ops/{p.relative_to(ROOT / 'kernels/ops')}" for p in (ROOT / "kernels/ops").rglob("*.py")}
    modules = {p.relative_to(ROOT).as_posix() for p in (ROOT / "llmopt").rglob("*.py")}
    assert ops | modules | {LIBRARY, "llmopt/py.typed", "llmopt/data/calibration.txt"} <= found


def test_wheel_holds_nothing_else(wheel: Path) -> None:
    found = names(wheel)
    assert {name.split("/")[0].split("-")[0] for name in found} == {"llmopt"}
    package = {name for name in found if not name.split("/")[0].endswith(".dist-info")}
    assert {Path(name).suffix for name in package} == {".py", ".txt", ".md", ".so", ".typed"}
    assert not {name for name in package if re.search(r"(^|/)(tests?|benchmarks)(/|$)|/test_", name)}


def test_one_wheel_serves_every_python(wheel: Path) -> None:
    assert re.search(r"-py3-none-linux_\w+\.whl$", wheel.name)


def test_metadata_asks_for_lower_bounds_only(wheel: Path) -> None:
    required = [Requirement(line) for line in metadata(wheel).get_all("Requires-Dist") or []]
    assert {"torch", "transformers", "safetensors", "numpy", "apache-tvm-ffi"} <= {r.name for r in required}
    for requirement in required:
        assert [clause.operator for clause in requirement.specifier] == [">="], requirement


def test_extras_are_by_capability(wheel: Path) -> None:
    assert set(metadata(wheel).get_all("Provides-Extra") or []) == {"gpu", "tvm", "plot", "dev"}


def test_the_shipped_library_loads(wheel: Path, tmp_path: Path) -> None:
    site = install(wheel, tmp_path)
    code = "from llmopt import native; print(native.library_path()); print(native.active_isa())"
    path, isa = run("-c", code, cwd=site, PYTHONPATH=str(site)).split()
    assert Path(path) == tmp_path / LIBRARY
    assert isa in ISA_NAMES


def test_without_a_compiler_the_wheel_has_no_library(wheel_without_kernels: Path) -> None:
    found = names(wheel_without_kernels)
    assert "llmopt/ops/int4_linear/__init__.py" in found
    assert not {name for name in found if name.endswith(".so")}


def test_without_kernels_the_doctor_says_so_and_is_content(bare_install: Path) -> None:
    out = run("-m", "llmopt.cli", "doctor", "--json", "-", cwd=bare_install, PYTHONPATH=str(bare_install))
    result = json.loads(out)
    (check,) = (c for c in result["checks"] if c["name"] == "compiled kernels")
    assert result["usable"]
    assert check["status"] == "warn"
    assert "compiled kernels are not part of this installation" in check["detail"]


OPTIMIZE_TWICE = """
import warnings

import torch

import llmopt
from llmopt import native
from llmopt.models.shapes import tiny_model

assert not native.available()
ids = torch.arange(256).reshape(4, 64)
for _ in range(2):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = llmopt.optimize(tiny_model("qwen3"), ["quantize_gptq"], calibration=ids, measure=False)
    assert torch.isfinite(model(ids).logits).all()
    print(sum("compiled kernels" in str(warning.message) for warning in caught))
    print(sum("compiled kernels" in note for note in llmopt.report(model).notes))
"""


def test_without_kernels_optimize_runs_on_torch_and_says_so_once(bare_install: Path) -> None:
    out = run("-c", OPTIMIZE_TWICE, cwd=bare_install, PYTHONPATH=str(bare_install))
    first_warnings, first_notes, second_warnings, second_notes = map(int, out.split())
    assert (first_warnings, second_warnings) == (1, 0)
    assert (first_notes, second_notes) == (1, 1)


def test_tested_versions_are_within_the_bounds(wheel: Path) -> None:
    pinned = {}
    for line in (ROOT / "requirements/tested.txt").read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            name, version = line.split("==")
            pinned[name] = version
    for line in metadata(wheel).get_all("Requires-Dist") or []:
        requirement = Requirement(line)
        if requirement.marker is None or "tvm" not in str(requirement.marker):
            assert requirement.specifier.contains(pinned[requirement.name]), requirement


def test_ci_runs_lint_and_the_test_command_of_the_readme() -> None:
    script = (ROOT / ".ci/run").read_text(encoding="utf-8").splitlines()
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (command,) = re.findall(r"## Tests\n+```bash\n(.+?)\n```", readme)
    assert script[-2:] == ["make lint", command]
