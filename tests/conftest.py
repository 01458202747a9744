"""What every test may use: instruction sets, thread counts, poisoned memory, tiny models and the trained ones."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from llmopt import native
from llmopt.env import ISA_NAMES
from llmopt.models.shapes import decide_routers_, tiny_model

# Triton, where it is imported, interprets its kernels: there is no GPU to count on
os.environ.setdefault("TRITON_INTERPRET", "1")

ASSETS = Path(__file__).parent.parent / "assets"

# on a busy machine two threads that spin at a barrier cost many times the work; tests of threading ask for more
torch.set_num_threads(1)


def supported_isas() -> tuple[str, ...]:
    """Instruction sets of this processor, the slowest first."""
    if not native.available():
        return ()
    best = str(native.library().supported_isa())
    return ISA_NAMES[: ISA_NAMES.index(best) + 1]


def pytest_configure(config: pytest.Config) -> None:
    config.llmopt_isas = supported_isas()  # type: ignore[attr-defined]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "isa" in metafunc.fixturenames:
        metafunc.parametrize("isa", metafunc.config.llmopt_isas, indirect=True)  # type: ignore[attr-defined]


@pytest.fixture(scope="session", autouse=True)
def _compiled_libraries(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What compile_tvm keeps, it keeps for the session."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LLMOPT_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """One instruction set of this processor, in force for the test."""
    native.force_isa(request.param)
    try:
        yield request.param
    finally:
        native.force_isa("auto")


@pytest.fixture(params=["amx", "dots"])
def products(request: pytest.FixtureRequest) -> Iterator[str]:
    """One way of multiplying bfloat16, in force for the test."""
    library = native.library()
    try:
        if request.param == "amx":
            native.force_isa("amx")
        else:
            native.force_isa("avx512")
            library.force_bf16_dots("on")
    except ValueError as error:
        pytest.skip(str(error))
    try:
        yield request.param
    finally:
        native.force_isa("auto")
        library.force_bf16_dots("auto")


@pytest.fixture(autouse=True)
def _as_many_threads_afterwards() -> Iterator[None]:
    """Other sums in later tests would be the least of it."""
    before = torch.get_num_threads()
    yield
    if torch.get_num_threads() != before:
        torch.set_num_threads(before)


@pytest.fixture
def threads() -> Callable[[int], None]:
    """Sets the number of threads, which the test's end puts back."""
    return torch.set_num_threads


@pytest.fixture
def nan_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """``torch.empty`` gives NaN (in integers a value of no use), so that an element nobody wrote cannot look right."""
    empty = torch.empty

    def poisoned(*args: Any, **named: Any) -> torch.Tensor:
        made = empty(*args, **named)
        if made.device.type == "cpu" and made.numel():
            whole = {torch.uint8: 0xA5, torch.int8: -0x5B}.get(made.dtype, -(2**15))
            made.fill_(torch.nan if made.is_floating_point() else whole)
        return made

    monkeypatch.setattr(torch, "empty", poisoned)


@pytest.fixture(scope="session")
def _tiny_models() -> dict[tuple[str, torch.dtype], Any]:
    return {}


@pytest.fixture
def tiny(_tiny_models: dict[tuple[str, torch.dtype], Any]) -> Callable[..., Any]:
    """``tiny(model_type, dtype)``: a small random model of its own for the test."""

    def get(model_type: str, dtype: torch.dtype = torch.float32) -> Any:
        key = model_type, dtype
        if key not in _tiny_models:
            _tiny_models[key] = tiny_model(model_type, dtype=dtype)
        return copy.deepcopy(_tiny_models[key])

    return get


@pytest.fixture
def decided(tiny: Callable[..., Any]) -> Callable[..., Any]:
    """``tiny``'s models, in which rounding sends no token to other experts (:func:`~.shapes.decide_routers_`)."""
    return lambda model_type, dtype=torch.float32: decide_routers_(tiny(model_type, dtype))


@pytest.fixture(scope="session")
def trained() -> Callable[[str], Any]:
    """``trained(model_type)``: a bundled trained checkpoint, read anew, in float32."""
    from transformers import AutoModelForCausalLM

    def get(model_type: str) -> Any:
        path = ASSETS / f"tiny-{model_type}"
        return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, local_files_only=True).eval()

    return get


@pytest.fixture
def token_rows() -> Callable[..., torch.Tensor]:
    """``token_rows(rows, length)``: seeded ids that every tiny model's vocabulary has."""

    def make(rows: int = 4, length: int = 48, *, vocab: int = 512, seed: int = 0) -> torch.Tensor:
        return torch.randint(0, vocab, (rows, length), generator=torch.Generator().manual_seed(seed))

    return make


@pytest.fixture
def same_bits() -> Callable[[dict[str, torch.Tensor], dict[str, torch.Tensor]], bool]:
    """Are two state dicts the same, name by name and bit by bit?"""

    def check(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
        def raw(x: torch.Tensor) -> torch.Tensor:
            return x.contiguous().view(-1).view(torch.uint8)

        return list(a) == list(b) and all(
            a[n].dtype == b[n].dtype and a[n].shape == b[n].shape and torch.equal(raw(a[n]), raw(b[n])) for n in a
        )

    return check


@pytest.fixture
def snapshot() -> Callable[[Any], dict[str, torch.Tensor]]:
    """A copy of every parameter and buffer of a model."""
    return lambda model: {name: value.clone() for name, value in model.state_dict().items()}
