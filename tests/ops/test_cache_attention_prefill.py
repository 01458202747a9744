"""cache_attention of long runs in bfloat16: the loops on AMX tiles and on vdpbf16ps, wherever the processor has them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch

from llmopt import native
from llmopt.ops.attention import attention
from llmopt.ops.cache_attention import reference
from llmopt.ops.cache_attention.spec import SPEC, make_inputs, run, torch_arguments
from llmopt.ops.spec import Case, Inputs
from llmopt.runtime.program import Program

pytestmark = [
    pytest.mark.skipif(not native.available(), reason="no compiled kernels"),
    pytest.mark.usefixtures("nan_memory", "products"),
]

SMALL = [case for case in SPEC.cases if not case.real]
RTOL, ATOL = SPEC.tolerance[torch.bfloat16]
RAGGED = ((0, 20, 300), (1, 500, 1), (2, 90, 130), (3, 40, 7), (4, 700, 16))


def given(*chunks: tuple[int, int, int], **params: Any) -> Inputs:
    shape = {"heads": 6, "kv_heads": 2, "dim": 40, **params, "dtype": torch.bfloat16}
    return make_inputs(Case("given", {"chunks": chunks, **shape}), 5)


def check(inputs: Inputs) -> None:
    torch.testing.assert_close(run(**inputs), reference.cache_attention(**inputs), rtol=RTOL, atol=ATOL)


@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_cases_of_the_spec(case: Case) -> None:
    check(SPEC.make_inputs(dataclasses.replace(case, params={**case.params, "dtype": torch.bfloat16}), 0))


@pytest.mark.parametrize("dim", [1, 20, 32, 64, 80, 128, 192])
def test_head_sizes(dim: int) -> None:
    check(given((0, 3, 45), (1, 0, 64), dim=dim))


@pytest.mark.parametrize("group", range(1, 9))
def test_groups(group: int) -> None:
    check(given((0, 30, 40), (1, 3, 16), heads=2 * group))


@pytest.mark.parametrize("start", [None, [17, 0, 90, 5, 33]], ids=["all", "padded"])
def test_runs_of_any_length_side_by_side(start: list[int] | None) -> None:
    check(given(*RAGGED, start=start))


def test_more_packed_keys_than_are_held_at_a_time() -> None:
    """Twenty KV heads of 1.2 MB: they take turns."""
    check(given((0, 2350, 40), (1, 0, 50), heads=20, kv_heads=20, dim=128))


def test_a_whole_prompt_is_what_attention_gives() -> None:
    inputs = given((0, 0, 290), spare=0)
    expected = attention(inputs["q"].transpose(0, 1)[None], inputs["k"], inputs["v"], scale=inputs["scale"])
    assert torch.equal(run(**inputs), expected.flatten(2)[0])


def test_chunks_and_neighbours_change_no_bit() -> None:
    """A long run gives the bits of the whole prompt, in a batch and alone."""
    inputs = given((0, 0, 700), (1, 20, 100), sequences=2)
    whole = run(**inputs)
    parts = [slice(0, 33), slice(33, 49), slice(49, 530), slice(530, 700), slice(700, 800)]
    alone = [run(**(inputs | {name: inputs[name][part] for name in ("q", "seq", "slot")})) for part in parts]
    assert torch.equal(torch.cat(alone), whole)


def test_any_number_of_threads_gives_the_same_bits(threads: Callable[[int], None]) -> None:
    inputs, results = given(*RAGGED), []
    for count in (1, 2, 3, 7):
        threads(count)
        results.append(run(**inputs))
    assert all(torch.equal(each, results[0]) for each in results)


def test_recorded_runs_may_become_longer() -> None:
    """What is recorded finds its runs anew every time."""
    inputs = given((0, 0, 90), spare=20)
    arguments = torch_arguments(**inputs)
    program = Program(lambda: torch.ops.llmopt.cache_attention(**arguments), arguments)
    apart = inputs["slot"] + torch.arange(90, dtype=torch.int32) // 10
    for slot in (inputs["slot"].clone(), apart, inputs["slot"] + 20):
        inputs["slot"].copy_(slot)
        program.run()
        assert torch.equal(arguments["out"], run(**inputs))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf], ids=str)
def test_slots_that_no_row_sees_do_not_matter(bad: float) -> None:
    chunks = ((0, 4, 60), (1, 600, 40))
    inputs = given(*chunks, spare=70, start=[3, 11], sequences=2)
    expected = run(**inputs)
    for cache in (inputs["k"], inputs["v"]):
        for s, first, count in chunks:
            cache[s, :, : int(inputs["start"][s])] = bad
            cache[s, :, first + count :] = bad
    assert torch.equal(run(**inputs), expected)


@pytest.mark.parametrize("scale", [0.0, -0.2])
def test_scale_that_is_not_above_zero(scale: float) -> None:
    check(given((0, 3, 60)) | {"scale": scale})
