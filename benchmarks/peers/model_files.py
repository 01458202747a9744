"""The files peers read, made once per shape and kept: GGUF for llama.cpp and ik_llama.cpp, an export for OpenVINO.

All have random weights of the shape's sizes. A file appears under its name only when it is complete.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.peers.worker import ContenderError
from llmopt.models.published import find

ROOT = Path(__file__).resolve().parents[2]
_MAKE_GGUF = "benchmarks.peers.workers.make_gguf"
Say = Callable[[str], None]


def is_moe(shape: str) -> bool:
    return "moe_intermediate_size" in find(shape).config


def gguf_file(shape: str, kind: str, folder: Path, python: Path, threads: int, say: Say) -> Path:
    """``shape`` as GGUF, by llama.cpp's own quantizer; MoE shapes straight in Q4_0, for their f16 file is too large.

    Args:
        shape: a published shape.
        kind: ``"q4_0"`` or ``"q4_k_m"``.
        folder: where files are kept.
        python: an interpreter with gguf and llama_cpp.
        threads: for quantizing.
        say: told what takes long.
    """
    out = folder / f"{shape}.{kind}.gguf"
    if out.exists():
        return out
    if is_moe(shape):
        if kind != "q4_0":
            raise ContenderError("MoE shapes are written straight in Q4_0 only")
        return _write_gguf(shape, kind, out, python, say)
    source = folder / f"{shape}.f16.gguf"
    if not source.exists():
        _write_gguf(shape, "f16", source, python, say)
    say(f"{out.name}: quantizing")
    half = out.with_suffix(".part")
    call([python, "-m", _MAKE_GGUF, "--quantize", source, half, kind, threads])
    half.replace(out)
    return out


def _write_gguf(shape: str, kind: str, out: Path, python: Path, say: Say) -> Path:
    say(f"{out.name}: writing")
    published = find(shape)
    described = out.with_suffix(".json")
    described.parent.mkdir(parents=True, exist_ok=True)
    described.write_text(json.dumps({"model_type": published.model_type, "config": dict(published.config)}))
    half = out.with_suffix(".part")
    call([python, "-m", _MAKE_GGUF, described, half, kind])
    half.replace(out)
    return out


def openvino_export(shape: str, folder: Path, python: Path, say: Say) -> Path:
    """``shape`` exported by optimum-cli: int4, groups of 128, symmetric, every linear; head and embedding at 8 bits."""
    out = folder / f"{shape}.openvino"
    if out.exists():
        return out
    source = checkpoint(shape, folder, say)
    say(f"{out.name}: exporting (minutes)")
    half = out.with_suffix(".part")
    shutil.rmtree(half, ignore_errors=True)
    call(
        [python.parent / "optimum-cli", "export", "openvino", "-m", source, "--task", "text-generation-with-past",
         "--weight-format", "int4", "--group-size", 128, "--ratio", "1.0", "--sym", half]
    )  # fmt: skip
    half.replace(out)
    return out


def checkpoint(shape: str, folder: Path, say: Say) -> Path:
    """``shape`` as a Hugging Face directory in bfloat16, for exporters."""
    from llmopt.models import shapes

    out = folder / f"{shape}.hf"
    if out.exists():
        return out
    say(f"{out.name}: writing")
    half = out.with_suffix(".part")
    shutil.rmtree(half, ignore_errors=True)
    shapes.build(shape).save_pretrained(half)
    described = json.loads((half / "config.json").read_text(encoding="utf-8"))
    # transformers 4 reads the base from the top level, transformers 5 from rope_parameters
    described["rope_theta"] = find(shape).config["rope_theta"]
    (half / "config.json").write_text(json.dumps(described, indent=1), encoding="utf-8")
    half.replace(out)
    return out


def call(command: Sequence[object]) -> None:
    """Run a tool from the repository's root.

    Raises:
        ContenderError: it failed; the message is the end of what it said.
    """
    words = [str(word) for word in command]
    done = subprocess.run(
        words, cwd=ROOT, env={**os.environ, "HF_HUB_OFFLINE": "1"}, capture_output=True, text=True, check=False
    )
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.strip()]
        raise ContenderError(f"{Path(words[0]).name}: {said[-1] if said else done.returncode}"[:300])
