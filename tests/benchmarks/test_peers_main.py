"""The command of the peer benchmark, from arguments to the written table."""

from __future__ import annotations

import json
import sys
from importlib import metadata
from pathlib import Path

import pytest

from benchmarks.peers import __main__ as command
from benchmarks.peers import contenders, environments
from benchmarks.peers.contenders import FIELD, Setup
from benchmarks.peers.jobs import parse
from benchmarks.peers.worker import ContenderError


@pytest.mark.parametrize(
    "words",
    [
        ["--shape", "qwen4"],
        ["--shape", "qwen3-0.6b@99"],
        ["--peers", "vllm"],
        ["--kv-dtype", "int4"],
        ["--kv-dtype", "int8", "--passes", "quantize_gptq"],
        ["--cells", "x"],
        ["--rounds", "0"],
        ["--threads", "0"],
    ],
)
def test_bad_arguments_are_refused_before_any_work(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        command.arguments(words)
    assert ended.value.code == 2
    assert words[0].lstrip("-")[:5] in capsys.readouterr().err


def test_the_recorded_command_names_no_folder() -> None:
    words = ["--rounds", "3", "--cache", "/a/b", "--lock=/c", "--ik-bench", "/home/me/llama-bench", "--json", "x.json"]
    assert command.command(words) == "python -m benchmarks.peers --rounds 3 --ik-bench llama-bench"


def setup(tmp_path: Path, shape: str) -> Setup:
    return Setup(shape, parse("128"), 1, tmp_path, lambda text: None)


@pytest.mark.parametrize("name", [name for name in FIELD if not FIELD[name].takes_moe])
def test_what_does_not_take_moe_shapes_says_so(tmp_path: Path, name: str) -> None:
    with pytest.raises(ContenderError, match="MoE"):
        contenders.make(name, setup(tmp_path, "qwen3-30b-a3b"))


def test_ik_is_left_out_with_a_reason_unless_its_program_is_given(tmp_path: Path) -> None:
    with pytest.raises(ContenderError, match="not given: IK_BENCH="):
        contenders.make("ik-q4_0", setup(tmp_path, "qwen3-0.6b"))


@pytest.mark.parametrize("path", sorted(environments.REQUIREMENTS.glob("*.txt")), ids=lambda path: path.stem)
def test_every_peer_is_pinned(path: Path) -> None:
    pins = environments.pins(path.stem)
    assert pins
    assert all(pin.count("==") == 1 for pin in pins)


@pytest.mark.parametrize("is_right", [True, False])
def test_an_environment_is_installed_into_only_if_its_versions_differ(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_right: bool
) -> None:
    python = tmp_path / "openvino" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    calls: list[list[str]] = []
    monkeypatch.setattr(environments, "_run", lambda command, name: calls.append(command))
    monkeypatch.setattr(environments, "pins", lambda name: [f"rich=={metadata.version('rich') if is_right else '0.1'}"])
    assert environments.ensure("openvino", tmp_path, lambda text: None) == python
    assert [command[3] for command in calls] == ([] if is_right else ["install", "uninstall"])


@pytest.mark.slow
def test_a_small_run_writes_table_and_record(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, table = tmp_path / "out.json", tmp_path / "out.md"
    words = ["--shape", "small", "--peers", "eager,openvino-int4", "--cells", "16,2x8", "--tokens", "4", "--rounds", "2",
             "--threads", "1", "--cache", str(tmp_path), "--json", str(out), "--markdown", str(table)]  # fmt: skip
    assert command.main(words) == 0
    record = json.loads(out.read_text())
    assert record["cells"] == ["prefill 16", "decode 16", "decode 2x8"]
    for name in ("llmopt", "eager"):
        assert {cell: len(values) for cell, values in record["samples"][name].items()} == dict.fromkeys(
            record["cells"], 2
        )
        assert all(rate > 0 for values in record["samples"][name].values() for rate in values)
    assert set(record["skipped"]) == {"openvino-int4"}
    assert str(tmp_path) not in table.read_text()
    assert "llmopt over eager, bf16" in table.read_text()
    assert "llmopt" in capsys.readouterr().out


def test_a_contender_for_one_comparison_runs_only_where_it_is_named() -> None:
    everyone, named = command.arguments([]).names, command.arguments(["--peers", "llama-cpp-avx2-q4_0"]).names
    assert "llama-cpp-q4_0" in everyone
    assert "llama-cpp-avx2-q4_0" not in everyone
    assert named == ["llama-cpp-avx2-q4_0"]
    assert environments.pins("llama-cpp-avx2") == environments.pins("llama-cpp")
