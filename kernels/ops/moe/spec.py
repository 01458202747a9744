"""Cases, tolerances and traffic of moe."""

from __future__ import annotations

import torch

from llmopt.ops.int4_linear import layout
from llmopt.ops.moe import Routing, SharedExperts, moe, reference
from llmopt.ops.spec import Case, Inputs, OpSpec


def make_weight(
    shape: tuple[int, ...], g: torch.Generator, *, group: int, bits: int, asymmetric: bool, dtype: torch.dtype
) -> torch.Tensor:
    """A random weight ``[..., N, K]``: packed, or with 16 bits or more of the dtype."""
    cols = shape[-1]
    if bits >= 16:
        dense: torch.Tensor = torch.randn(shape, generator=g) * float(cols**-0.5)
        return dense.to(dtype)
    q = torch.randint(0, 1 << bits, shape, generator=g, dtype=torch.uint8)
    per_group = (*shape[:-1], -(-cols // group))
    scales = (torch.rand(per_group, generator=g) + 0.1) * cols**-0.5 * 3 / (1 << bits)
    zeros = torch.randint(6, 10, per_group, generator=g, dtype=torch.uint8) if asymmetric else None
    return layout.pack(q, scales, zeros, group_size=group, bits=bits)


def make_inputs(case: Case, seed: int) -> Inputs:
    p = case.params
    g = torch.Generator().manual_seed(seed)
    e, h, i, s, tokens = p["experts"], p["hidden"], p["intermediate"], p.get("shared", 0), p["tokens"]
    dtype, asymmetric = p.get("dtype", torch.float32), bool(p.get("asymmetric"))
    group, down_group, bits = p.get("group", 128), p.get("down_group", 128), p.get("bits", 4)
    shared_bits = p.get("shared_bits", bits)

    def weight(*shape: int, group: int, bits: int = bits, asymmetric: bool = asymmetric) -> torch.Tensor:
        return make_weight(shape, g, group=group, bits=bits, asymmetric=asymmetric, dtype=dtype)

    routing: Routing = p["routing"]
    shared = {"bits": shared_bits, "asymmetric": False}
    return {
        "h": torch.randn(tokens, h, generator=g),
        "norm": torch.rand(h, generator=g) + 0.5,
        "router": (torch.randn(e, h, generator=g) * h**-0.5).to(dtype),
        "correction_bias": torch.randn(e, generator=g) * 0.1 if p.get("bias") else None,
        "gate_up": weight(e, 2 * i, h, group=group),
        "down": weight(e, h, i, group=down_group),
        "shared_gate": weight(s, h, group=group, **shared) if s else None,
        "shared_up": weight(s, h, group=group, **shared) if s else None,
        "shared_down": weight(h, s, group=down_group, **shared) if s else None,
        "eps": 1e-6,
        "sizes": [i, group, down_group, 4, int(asymmetric)],
        "shared_sizes": [s, group, down_group, min(shared_bits, 8), 0] if s else [],
        "choice": routing.choice(),
        "weighting": routing.weighting(),
    }


def run(
    *, h: torch.Tensor, norm: torch.Tensor, router: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor,
    eps: float, sizes: list[int], shared_sizes: list[int], choice: list[int], weighting: list[float],
    correction_bias: torch.Tensor | None = None, shared_gate: torch.Tensor | None = None,
    shared_up: torch.Tensor | None = None, shared_down: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """``moe`` as a function: h stays as it is. Weights that are not contiguous, which the op refuses, are copied.

    Args:
        h, norm, router, gate_up, down, correction_bias, eps: as of ``moe``.
        shared_gate, shared_up, shared_down: the shared experts, or None.
        sizes, shared_sizes: intermediate, group size, down's group size, bits, asymmetric.
        choice, weighting: what ``Routing.choice`` and ``Routing.weighting`` give.

    Raises:
        InputError: as of ``moe``.
    """
    shared = None
    if shared_gate is not None and shared_up is not None and shared_down is not None:
        s, group, down_group, bits, asymmetric = shared_sizes
        shared = SharedExperts(
            shared_gate.contiguous(), shared_up.contiguous(), shared_down.contiguous(), s, group, down_group, bits,
            bool(asymmetric),
        )  # fmt: skip
    top_k, sigmoid, n_group, topk_group, group_best = choice
    renormalize, sum_eps, sum_min, scale = weighting
    out = h.clone()
    moe(
        out, norm, router.contiguous(), gate_up.contiguous(), down.contiguous(), eps=eps,
        routing=Routing(
            top_k, "sigmoid" if sigmoid else "softmax", n_group, topk_group, group_best, bool(renormalize), sum_eps,
            sum_min, scale,
        ),
        intermediate=sizes[0], group_size=sizes[1], down_group_size=sizes[2], asymmetric=bool(sizes[4]),
        correction_bias=correction_bias, shared=shared,
    )  # fmt: skip
    return out


def chosen(h: torch.Tensor, inputs: Inputs) -> torch.Tensor:
    """The experts the reference chooses, ``[T, k]``."""
    x = torch.nn.functional.rms_norm(h, h.shape[-1:], inputs["norm"], inputs["eps"])
    logits = x @ inputs["router"].float().T
    return reference.route(logits, inputs["correction_bias"], inputs["choice"], inputs["weighting"])[0]


def bytes_moved(*, h: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor, **rest: object) -> int:
    hit: int = torch.unique(chosen(h, rest)).numel()
    expert = gate_up[0].numel() * gate_up.element_size() + down[0].numel() * down.element_size()
    always = [rest[name] for name in ("router", "shared_gate", "shared_up", "shared_down")]
    return hit * expert + sum(t.nbytes for t in (h, h, *always) if isinstance(t, torch.Tensor))


def flops(
    *, h: torch.Tensor, router: torch.Tensor, sizes: list[int], shared_sizes: list[int], choice: list[int], **_: object
) -> int:
    shared = shared_sizes[0] if shared_sizes else 0
    return 2 * h.numel() * (router.shape[0] + 3 * (choice[0] * sizes[0] + shared))


SMALL = {"experts": 8, "hidden": 128, "intermediate": 64, "down_group": 64}
QWEN3 = Routing(8, renormalize=True)
ERNIE = Routing(6, renormalize=True, sum_min=1e-12)
V2_LITE = Routing(6)
V2 = Routing(2, n_group=4, topk_group=2, scale=16.0)
V3 = Routing(3, "sigmoid", n_group=4, topk_group=2, group_best=2, renormalize=True, sum_eps=1e-20, scale=2.5)


def decode(name: str, experts: int, hidden: int, intermediate: int, shared: int, routing: Routing) -> Case:
    params = {"tokens": 1, "experts": experts, "hidden": hidden, "intermediate": intermediate, "shared": shared}
    return Case(f"{name}_t1", params | {"routing": routing, "dtype": torch.float32}, real=True)


SPEC = OpSpec(
    name="moe",
    run=run,
    reference=reference.block,
    make_inputs=make_inputs,
    cases=(
        Case("one_token", {**SMALL, "tokens": 1, "routing": Routing(2)}),
        Case("no_tokens", {**SMALL, "tokens": 0, "routing": Routing(2)}),
        Case("two_tokens_shared", {**SMALL, "tokens": 2, "shared": 96, "routing": Routing(2, renormalize=True)}),
        Case("three_tokens_bias", {**SMALL, "tokens": 3, "bias": True, "shared": 128, "routing": V3}),
        Case("max_of_groups", {**SMALL, "tokens": 17, "shared": 32, "routing": V2}),
        Case("top_1", {**SMALL, "tokens": 5, "group": 32, "down_group": 32, "routing": Routing(1, "sigmoid")}),
        Case("all_experts", {**SMALL, "experts": 3, "tokens": 5, "routing": Routing(3)}),
        Case(
            "odd_sizes",
            {
                "experts": 5,
                "hidden": 72,
                "intermediate": 40,
                "shared": 24,
                "group": 64,
                "down_group": 32,
                "tokens": 7,
                "routing": Routing(2),
            },
        ),
        Case("asymmetric", {**SMALL, "tokens": 33, "asymmetric": True, "shared": 64, "routing": Routing(2)}),
        Case("shared_int8", {**SMALL, "tokens": 4, "shared": 64, "shared_bits": 8, "routing": Routing(2)}),
        Case("dense", {**SMALL, "tokens": 6, "bits": 16, "shared": 40, "routing": Routing(2)}),
        Case("dense_odd", {**SMALL, "hidden": 72, "intermediate": 40, "tokens": 19, "bits": 16, "routing": Routing(2)}),
        Case("many_tokens", {**SMALL, "tokens": 61, "shared": 64, "bias": True, "routing": V3}),
        decode("deepseek_v2_lite", 64, 2048, 1408, 2816, V2_LITE),
        decode("ernie_4_5_21b", 64, 2560, 1536, 3072, ERNIE),
        decode("qwen3_30b", 128, 2048, 768, 0, QWEN3),
    ),
    # float32 all the way down, whatever the dtype of the router (and of weights that are not packed); a code of an expert's
    # inner activations may fall on the other side of a tie, and experts weigh up to 2.5
    tolerance=dict.fromkeys((torch.float32, torch.bfloat16, torch.float16), (1e-4, 1e-3)),
    bytes_moved=bytes_moved,
    flops=flops,
)
