from __future__ import annotations

import shutil
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from checkpoint_tools import AutoGptq, quantize, tiny

from llmopt.checkpoint import loader, save


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Matrices of a hundred columns gain nothing from threads, and lose a lot where cores are shared."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One good checkpoint of each kind; tests change a copy."""
    root = tmp_path_factory.mktemp("made")
    model = tiny("qwen3_moe")
    plain = save(model, root / "plain")
    (plain / "llmopt.json").unlink()
    AutoGptq().write(model, root / "gptq")
    originals = quantize(model)
    save(model, root / "ours", originals=originals)
    save(tiny("qwen3"), root / "sharded", max_shard_bytes=100_000)
    return {p.name: p for p in root.iterdir()}


@pytest.fixture
def copy(made: dict[str, Path], tmp_path: Path) -> Callable[[str], Path]:
    def make(kind: str) -> Path:
        return Path(shutil.copytree(made[kind], tmp_path / "model"))

    return make


@pytest.fixture
def reads_weights() -> None:
    """For tests of what only shows in the weights themselves."""


@pytest.fixture
def nothing_is_read(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """An error comes before the first weight is read (unless a test says so), and nothing reaches for the network."""

    def refuse(*args: object) -> None:
        pytest.fail("weights were read before the error")

    if "reads_weights" not in request.fixturenames:
        monkeypatch.setattr(loader.Loader, "run", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)
