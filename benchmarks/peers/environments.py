"""One virtual environment per peer, made once, with pinned versions (``requirements/NAME.txt``).

pip's own settings apply: whoever wants a CPU build of torch from another index says so in pip's configuration. What is
compiled goes through ``CC`` and ``CXX`` where they are set. GCC 12 drops the stores that llama.cpp configures AMX tiles
from, and the process dies at ``ldtilecfg``: on a processor with AMX take clang or a later GCC.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from benchmarks.peers.worker import ContenderError

REQUIREMENTS = Path(__file__).parent / "requirements"
# compiled for this processor: a portable build would be a handicap. And for one without AVX-512, to be compared with our
# own loops for those
_BUILD = {
    "llama-cpp": {"CMAKE_ARGS": "-DGGML_NATIVE=ON"},
    "llama-cpp-avx2": {"CMAKE_ARGS": "-DGGML_NATIVE=OFF -DGGML_AVX2=ON -DGGML_FMA=ON -DGGML_F16C=ON -DGGML_BMI2=ON"},
}
_PINS = {"llama-cpp-avx2": "llama-cpp"}  # environments with another's requirements
# comes along, is not needed, and breaks transformers where its build does not match torch's
_REMOVE = {"openvino": ("torchvision",)}
_CHECK = """
import sys
from importlib import metadata
for line in sys.stdin.read().split():
    name, _, wanted = line.partition("==")
    found = metadata.version(name.partition("[")[0])
    assert found.partition("+")[0] == wanted, f"{name}: {found}, expected {wanted}"
"""


def pins(name: str) -> list[str]:
    """The requirements of an environment, as ``package==version``."""
    lines = _file_of(name).read_text(encoding="utf-8").splitlines()
    return [line.strip() for line in lines if line.strip() and not line.startswith("#")]


def ensure(name: str, folder: Path, say: Callable[[str], None]) -> Path:
    """Its interpreter; the environment is made, or brought to the pinned versions, if need be.

    Args:
        name: of the environment.
        folder: where environments are kept.
        say: told what takes long.

    Raises:
        ContenderError: pip failed.
    """
    python = folder / name / "bin" / "python"
    if not python.exists():
        say(f"{name}: making its environment")
        python.parent.parent.parent.mkdir(parents=True, exist_ok=True)
        _run([sys.executable, "-m", "venv", str(folder / name)], name)
    wanted = "\n".join(pins(name))
    checked = subprocess.run([python, "-c", _CHECK], input=wanted, capture_output=True, text=True, check=False)
    if checked.returncode:
        say(f"{name}: installing {', '.join(pins(name))} (minutes)")
        # a wheel that pip keeps was built with other flags, perhaps
        fresh = ["--no-cache-dir"] if name in _BUILD else []
        _run([str(python), "-m", "pip", "install", "--quiet", *fresh, "-r", str(_file_of(name))], name)
        if name in _REMOVE:
            _run([str(python), "-m", "pip", "uninstall", "--quiet", "--yes", *_REMOVE[name]], name)
    return python


def _file_of(name: str) -> Path:
    return REQUIREMENTS / f"{_PINS.get(name, name)}.txt"


def _run(command: list[str], name: str) -> None:
    done = subprocess.run(
        command, env={**os.environ, **_BUILD.get(name, {})}, capture_output=True, text=True, check=False
    )
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if "ERROR" in line or "error" in line]
        raise ContenderError(f"{name}: {(said or done.stderr.splitlines() or ['pip failed'])[-1]}"[:300])
