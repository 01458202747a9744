"""moe: routing as each family's, whole blocks against transformers, recorded runs, bad calls."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import DeepseekV2Config, DeepseekV3Config, Ernie4_5_MoeConfig, Qwen3MoeConfig
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2Moe
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE
from transformers.models.ernie4_5_moe.modeling_ernie4_5_moe import Ernie4_5_MoeSparseMoeBlock
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

from llmopt import native
from llmopt.errors import InputError
from llmopt.ops.moe import Routing, SharedExperts, moe, reference, route
from llmopt.ops.moe.spec import ERNIE, QWEN3, SPEC, V2, V2_LITE, V3, make_inputs, run
from llmopt.ops.spec import Case
from llmopt.runtime.program import Program

pytestmark = pytest.mark.skipif(not native.available(), reason="no compiled kernels")

H, INNER, E = 64, 48, 32
COMMON = {"hidden_size": H, "moe_intermediate_size": INNER, "num_experts_per_tok": 4}


@dataclasses.dataclass(frozen=True)
class Family:
    """A transformers MoE block and the routing that should equal its own."""

    block: type[nn.Module]
    config: Any
    routing: Routing


def _v2(**change: Any) -> DeepseekV2Config:
    return DeepseekV2Config(**COMMON, n_routed_experts=E, n_shared_experts=2, routed_scaling_factor=16.0, **change)


def _v3(**change: Any) -> DeepseekV3Config:
    return DeepseekV3Config(
        **COMMON, n_routed_experts=E, n_shared_experts=1, routed_scaling_factor=2.5, n_group=8, topk_group=4, **change
    )


def _qwen3(**change: Any) -> Qwen3MoeConfig:
    return Qwen3MoeConfig(**COMMON, num_experts=E, **change)


def _ernie(**change: Any) -> Ernie4_5_MoeConfig:
    sizes = {"hidden_size": H, "moe_intermediate_size": INNER}
    return Ernie4_5_MoeConfig(**sizes, moe_k=4, moe_num_experts=E, moe_num_shared_experts=2, **change)


SIGMOID = Routing(4, "sigmoid", n_group=8, topk_group=4, group_best=2, scale=2.5)
FAMILIES = {
    "qwen3_moe": Family(Qwen3MoeSparseMoeBlock, _qwen3(norm_topk_prob=True), Routing(4, renormalize=True)),
    "qwen3_moe_raw": Family(Qwen3MoeSparseMoeBlock, _qwen3(norm_topk_prob=False), Routing(4)),
    "ernie4_5_moe": Family(
        Ernie4_5_MoeSparseMoeBlock, _ernie(), dataclasses.replace(ERNIE, top_k=4)
    ),
    # far above what the sum of four scores can be: the clamp decides
    "ernie4_5_moe_clamped": Family(
        Ernie4_5_MoeSparseMoeBlock, _ernie(moe_norm_min=2.0), Routing(4, renormalize=True, sum_min=2.0)
    ),
    "deepseek_v2_lite": Family(DeepseekV2Moe, _v2(topk_method="greedy"), Routing(4, scale=16.0)),
    "deepseek_v2": Family(
        DeepseekV2Moe, _v2(topk_method="group_limited_greedy", n_group=8, topk_group=3),
        Routing(4, n_group=8, topk_group=3, scale=16.0),
    ),
    "deepseek_v3": Family(
        DeepseekV3MoE, _v3(norm_topk_prob=True), dataclasses.replace(SIGMOID, renormalize=True, sum_eps=1e-20)
    ),
    "deepseek_v3_raw": Family(DeepseekV3MoE, _v3(norm_topk_prob=False), SIGMOID),
}  # fmt: skip


def block_of(family: Family) -> Any:
    """The family's block with random weights, and a correction bias where it has one."""
    g = torch.Generator().manual_seed(3)
    block = family.block(family.config).eval()
    for name, tensor in (*block.named_parameters(), *block.named_buffers()):
        scale = 0.2 if "correction_bias" in name else tensor.shape[-1] ** -0.5
        tensor.data = torch.randn(tensor.shape, generator=g) * scale
    return block


def bias_of(block: Any) -> torch.Tensor | None:
    found = [t for n, t in (*block.named_parameters(), *block.named_buffers()) if "correction_bias" in n]
    return found[0].detach().reshape(-1) if found else None


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_routing_is_that_of_the_family(name: str) -> None:
    family = FAMILIES[name]
    block = block_of(family)
    x = torch.randn(200, H, generator=torch.Generator().manual_seed(1)) * 2
    _, weights, index = block.gate(x)
    got_index, got_weights = route(nn.functional.linear(x, block.gate.weight), family.routing, bias_of(block))
    # transformers leaves the order of the chosen open
    dense, got = (torch.zeros(200, E).scatter(1, i, w) for i, w in ((index, weights), (got_index, got_weights)))
    assert torch.equal(index.sort(-1).values, got_index.sort(-1).values)
    torch.testing.assert_close(got, dense, rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize("tokens", [1, 3, 64])
@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_a_block_is_that_of_transformers(name: str, tokens: int, isa: str) -> None:
    family = FAMILIES[name]
    block = block_of(family)
    g = torch.Generator().manual_seed(2)
    h, norm = torch.randn(tokens, H, generator=g), torch.rand(H, generator=g) + 0.5
    x = nn.functional.rms_norm(h, (H,), norm, 1e-6)
    expected = h + block(x[None])[0]
    mlp = getattr(block, "shared_experts", None)
    shared = None
    if mlp is not None:
        parts = (mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight)
        shared = SharedExperts(*parts, parts[0].shape[0])
    moe(
        h, norm, block.gate.weight, block.experts.gate_up_proj, block.experts.down_proj, eps=1e-6,
        routing=family.routing, intermediate=INNER, correction_bias=bias_of(block), shared=shared,
    )  # fmt: skip
    torch.testing.assert_close(h, expected, rtol=1e-5, atol=2e-5)


ALL = [QWEN3, ERNIE, V2_LITE, V2, V3, Routing(1), Routing(4, "sigmoid", renormalize=True, sum_min=0.5)]


@pytest.mark.parametrize("routing", ALL, ids=str)
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
def test_routing_equals_its_reference(routing: Routing, bias: bool) -> None:
    g = torch.Generator().manual_seed(4)
    logits = torch.randn(300, 64, generator=g) * 3
    correction = torch.randn(64, generator=g) * 0.1 if bias else None
    index, weights = route(logits, routing, correction)
    want_index, want_weights = reference.route(logits, correction, routing.choice(), routing.weighting())
    assert torch.equal(index, want_index)
    torch.testing.assert_close(weights, want_weights, rtol=2e-6, atol=1e-8)


def test_of_equal_scores_the_first_are_chosen_and_nan_chooses_something() -> None:
    index, weights = route(torch.zeros(1, 8), Routing(3, renormalize=True))
    assert index.tolist() == [[0, 1, 2]]
    torch.testing.assert_close(weights, torch.full((1, 3), 1 / 3))
    index, weights = route(torch.full((1, 8), torch.nan), Routing(3, n_group=4, topk_group=2, group_best=2))
    assert len(set(index[0].tolist())) == 3
    assert set(index[0].tolist()) <= set(range(8))
    assert weights.isnan().all()


# ---- the block: numbers of tokens and choices, recording, threads

PARAMS = {"experts": 16, "hidden": 128, "intermediate": 64, "down_group": 64, "shared": 96, "bias": True}
KINDS: dict[str, dict[str, Any]] = {
    "packed": {},
    "dense": {"bits": 16, "dtype": torch.bfloat16},
    "joined": {"intermediate": 40},
    "routed": {"shared": 0},
    "even": {"shared": 128},  # as many bytes as two of four experts
}
WIDE = {"hidden": 4096, "intermediate": 32, "down_group": 32, "experts": 8, "shared": 64}  # streams are cut in halves


def given(tokens: int, top_k: int = 4, **change: Any) -> dict[str, Any]:
    routing = Routing(top_k, renormalize=True, scale=1.5)
    return make_inputs(Case("own", {**PARAMS, "tokens": tokens, "routing": routing, **change}), 0)


def check(inputs: dict[str, Any]) -> torch.Tensor:
    got = run(**inputs)
    torch.testing.assert_close(got, SPEC.reference(**inputs), rtol=1e-4, atol=3e-4)
    return got


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tokens", [0, 1, 2, 3, 17, 64])
def test_any_number_of_tokens(tokens: int, kind: str, isa: str) -> None:
    check(given(tokens, **KINDS[kind]))


@pytest.mark.parametrize("top_k", range(1, 9))
def test_any_number_of_choices(top_k: int) -> None:
    for tokens in (1, 5):
        check(given(tokens, top_k))


@pytest.mark.parametrize("kind", [*KINDS, "wide"])
def test_one_token_alone_gives_what_it_gives_in_a_batch(kind: str, isa: str) -> None:
    inputs = given(45, **(KINDS | {"wide": WIDE})[kind])
    rows = [run(**(inputs | {"h": inputs["h"][t : t + 1]})) for t in range(45)]
    assert torch.equal(run(**inputs), torch.cat(rows))


def test_more_tokens_than_one_round_of_scratch() -> None:
    inputs = given(5000, 8, experts=8, shared=0, hidden=256, intermediate=256)
    got = run(**inputs)
    for at in (0, 2000, 4999):
        assert torch.equal(got[at : at + 1], run(**(inputs | {"h": inputs["h"][at : at + 1]}))), at


def recorded(calls: list[dict[str, Any]], h: list[torch.Tensor]) -> Any:
    """A program of one block a call, each on its own h."""
    library = native.library()
    library.record_begin()
    for inputs, state in zip(calls, h, strict=True):
        parts = [inputs[f"shared_{n}"] for n in ("gate", "up", "down")]
        torch.ops.llmopt.moe(
            state, *(inputs[n] for n in ("norm", "router", "correction_bias", "gate_up", "down")), *parts,
            *(inputs[n] for n in ("eps", "sizes", "shared_sizes", "choice", "weighting")),
        )  # fmt: skip
    return library.record_end()["run"]


@pytest.mark.parametrize("count", [1, 2, 3], ids=["one_thread", "two_threads", "three_threads"])
def test_recorded_is_direct_bit_for_bit(count: int, isa: str, threads: Callable[[int], None]) -> None:
    # the second task needs more memory than the first has made, the third fits in it
    calls = [given(t, **KINDS[kind]) for t in (1, 17, 2) for kind in KINDS]
    expected = [run(**inputs) for inputs in calls]
    threads(count)
    states = [torch.zeros_like(inputs["h"]) for inputs in calls]
    program = recorded(calls, states)
    for again in range(3):
        for state, inputs in zip(states, calls, strict=True):
            state.copy_(inputs["h"])
        program(1)
        for state, want in zip(states, expected, strict=True):
            assert torch.equal(state, want), again


def test_a_program_reads_its_tokens_when_it_runs() -> None:
    inputs = given(2)
    state = torch.zeros_like(inputs["h"])
    program = recorded([inputs], [state])
    for seed in range(3):
        new = torch.randn(state.shape, generator=torch.Generator().manual_seed(seed))
        state.copy_(new)
        program(1)
        assert torch.equal(state, run(**(inputs | {"h": new})))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf], ids=["nan", "inf"])
@pytest.mark.parametrize("tokens", [2, 31])
def test_a_bad_token_spoils_itself_only(bad: float, tokens: int, isa: str) -> None:
    inputs = given(tokens)
    expected = run(**inputs)
    inputs["h"][1, 7] = bad
    got = run(**inputs)
    others = torch.arange(tokens) != 1
    assert not torch.isfinite(got[1]).any()
    assert torch.equal(got[others], expected[others])


def test_nothing_is_written_around_h() -> None:
    inputs = given(3)
    expected = run(**inputs)
    buffer = torch.full((5, 128 + 9), 777.0)
    view = buffer[1:-1, 4:132]
    view.copy_(inputs["h"])
    recorded([inputs], [view])(1)
    assert torch.equal(view, expected)
    view.fill_(777.0)
    assert (buffer == 777.0).all()


# ---- bad calls

Given = dict[str, Any]


def changed(at: str, place: int, value: Any) -> Callable[[Given], Given]:
    return lambda g: {at: [value if i == place else x for i, x in enumerate(g[at])]}


BAD: dict[str, tuple[Callable[[Given], Given], str]] = {
    "h_1d": (lambda g: {"h": g["h"][0]}, "h"),
    "h_bf16": (lambda g: {"h": g["h"].bfloat16()}, "h"),
    "norm_short": (lambda g: {"norm": g["norm"][:-1]}, "norm"),
    "norm_bf16": (lambda g: {"norm": g["norm"].bfloat16()}, "norm"),
    "router_narrow": (lambda g: {"router": g["router"][:, :64]}, "router"),
    "router_fewer": (lambda g: {"router": g["router"][:-1], "correction_bias": None}, "gate_up"),
    "bias_short": (lambda g: {"correction_bias": g["correction_bias"][:-1]}, "correction_bias"),
    "gate_up_2d": (lambda g: {"gate_up": g["gate_up"][0]}, "gate_up"),
    "gate_up_int8": (lambda g: {"gate_up": g["gate_up"].view(torch.int8)}, "gate_up"),
    "down_fewer": (lambda g: {"down": g["down"][:-1]}, "down"),
    "shared_gate_short": (lambda g: {"shared_gate": g["shared_gate"][:-1]}, "shared_gate"),
    "shared_down_3d": (lambda g: {"shared_down": g["shared_down"][None]}, "shared_down"),
    "shared_up_dense": (lambda g: {"shared_up": torch.zeros(96, 128)}, "shared_up"),
    "intermediate": (changed("sizes", 0, 80), "gate_up"),
    "intermediate_0": (changed("sizes", 0, 0), "sizes"),
    "group": (changed("sizes", 1, 48), "group_size"),
    "down_group": (changed("sizes", 2, 16), "group_size"),
    "shared_bits": (changed("shared_sizes", 3, 5), "shared_sizes"),
    "top_k_0": (changed("choice", 0, 0), "top_k"),
    "top_k_17": (changed("choice", 0, 17), "top_k"),
    "n_group": (changed("choice", 2, 3), "n_group"),
    "topk_group": (changed("choice", 3, 2), "topk_group"),
    "group_best": (changed("choice", 4, 3), "group_best"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_calls_name_the_argument(name: str) -> None:
    change, named = BAD[name]
    inputs = given(3)
    with pytest.raises(InputError, match=rf"\b{named}: "):
        run(**(inputs | change(inputs)))


def test_weights_that_are_not_contiguous_are_refused() -> None:
    inputs = given(1, **KINDS["dense"])
    inputs["down"] = inputs["down"].transpose(1, 2).contiguous().transpose(1, 2)
    with pytest.raises(InputError, match="down: "):
        straight(inputs)


def straight(inputs: dict[str, Any]) -> None:
    names = [a.name for a in torch.ops.llmopt.moe.default._schema.arguments]
    torch.ops.llmopt.moe(*(inputs[n] for n in names))


@pytest.mark.parametrize("tokens", [64, 65, 130])
def test_many_tokens_of_weights_that_are_not_packed_go_in_turns(tokens: int) -> None:
    inputs = given(tokens, **KINDS["dense"])
    expected = SPEC.reference(**inputs)
    torch.testing.assert_close(run(**inputs), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    h = inputs["h"].clone()
    program = Program(lambda: straight({**inputs, "h": h}), inputs)
    program.run()
    assert torch.equal(h, run(**inputs))


def test_an_unknown_scoring_is_named() -> None:
    with pytest.raises(InputError, match="scoring: expected softmax or sigmoid, got 'tanh'"):
        route(torch.zeros(1, 8), Routing(2, "tanh"))  # type: ignore[arg-type]
