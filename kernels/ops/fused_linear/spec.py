"""Cases, tolerances and traffic of fused_linear."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from llmopt.ops import shapes
from llmopt.ops.fused_linear import MODES, Mode, Weight, fused_linear, reference
from llmopt.ops.int4_linear import layout
from llmopt.ops.spec import Case, Inputs, OpSpec

_PLAIN = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}


def tokens_of(count: int, k: int, g: torch.Generator) -> torch.Tensor:
    """``[count, k]`` normal values with a few outliers, all multiples of 1/8.

    The sum of their squares is the same in any order, so the norm is too, and a token's codes do not hang on rounding.
    """
    x = (torch.randn(count, k, generator=g) * 8).round() / 8
    x[:, :: max(k // 7, 1)] *= 8
    return x


def weight_data(kind: str, n: int, k: int, group: int, g: torch.Generator) -> torch.Tensor:
    """A weight ``[n, k]`` of about 1/sqrt(k). ``kind``: f32, bf16, f16, int4, int8, or those two asymmetric: int4a, int8a."""
    if kind in _PLAIN:
        return torch.randn(n, k, generator=g).mul(k**-0.5).to(_PLAIN[kind])
    bits, groups = int(kind[3]), -(-k // group)
    q = torch.randint(0, 2**bits, (n, k), generator=g, dtype=torch.uint8)
    scales = (torch.rand(n, groups, generator=g) + 0.1) * k**-0.5 / 2 ** (bits - 1)
    # near the middle, as those of a trained weight
    middle = 2 ** (bits - 1)
    zeros = torch.randint(middle - 2, middle + 3, (n, groups), generator=g, dtype=torch.uint8)
    return layout.pack(q, scales, zeros if kind.endswith("a") else None, group_size=group, bits=bits)


def bits_of(kind: str) -> int:
    return 8 * _PLAIN[kind].itemsize if kind in _PLAIN else int(kind[3])


def make_inputs(case: Case, seed: int) -> Inputs:
    """Params: tokens, k, weights (``(rows, kind)`` each), group, mode, norm; bias: indices of weights that have one."""
    p = case.params
    g = torch.Generator().manual_seed(seed)
    k, group, mode = p["k"], p.get("group", 128), p.get("mode", "store")
    rows, kinds = [n for n, _ in p["weights"]], [kind for _, kind in p["weights"]]
    inputs: Inputs = {
        "x": tokens_of(p["tokens"], k, g).to(p.get("dtype", torch.float32)),
        "norm": torch.rand(k, generator=g) + 0.5 if p.get("norm") else None,
        "base": torch.randn(p["tokens"], sum(rows), generator=g) if mode == "add" else None,
        **{f"weight_{i}": weight_data(kind, n, k, group, g) for i, (n, kind) in enumerate(p["weights"])},
        **{f"bias_{i}": torch.randn(rows[i], generator=g) for i in p.get("bias", ())},
    }
    return inputs | {
        "rows": rows,
        "bits": [bits_of(kind) for kind in kinds],
        "asymmetric": [kind.endswith("a") for kind in kinds],
        "group_size": group,
        "eps": 1e-6,
        "mode": mode,
    }


def weights_of(
    cols: int, rows: Sequence[int], bits: Sequence[int], asymmetric: Sequence[bool], group_size: int, tensors: Inputs
) -> list[Weight]:
    return [
        Weight(
            tensors[f"weight_{i}"].contiguous(), rows[i], cols, bits[i], group_size, asymmetric[i],
            tensors.get(f"bias_{i}"),
        )
        for i in range(len(rows))
    ]  # fmt: skip


def _new_out(x: torch.Tensor, base: torch.Tensor | None, rows: Sequence[int], mode: Mode) -> torch.Tensor:
    out = torch.empty(x.shape[0], rows[0] if mode == "swiglu" else sum(rows), device=x.device)
    return out if base is None else out.copy_(base)


def run(
    x: torch.Tensor, norm: torch.Tensor | None = None, base: torch.Tensor | None = None, *, rows: list[int],
    bits: list[int], asymmetric: list[bool], group_size: int, eps: float, mode: Mode, **tensors: torch.Tensor,
) -> torch.Tensor:  # fmt: skip
    """The op with an output of its own.

    Args:
        x, norm, eps, mode: see :func:`fused_linear`.
        base: what is added to, for mode "add".
        rows, bits, asymmetric, group_size: of the weights.
        tensors: ``weight_0`` to ``weight_3``, and ``bias_0`` to ``bias_3`` where there are.

    Raises:
        InputError: shapes or dtypes do not fit together.
    """
    out = _new_out(x, base, rows, mode)
    weights = weights_of(x.shape[1], rows, bits, asymmetric, group_size, tensors)
    fused_linear(x, weights, out, norm=norm, eps=eps, mode=mode)
    return out


def run_reference(
    x: torch.Tensor, norm: torch.Tensor | None = None, base: torch.Tensor | None = None, *, rows: list[int],
    bits: list[int], asymmetric: list[bool], group_size: int, eps: float, mode: Mode, **tensors: torch.Tensor,
) -> torch.Tensor:  # fmt: skip
    weights = weights_of(x.shape[1], rows, bits, asymmetric, group_size, tensors)
    return reference.fused_linear(x, weights, _new_out(x, base, rows, mode), norm=norm, eps=eps, mode=mode)


def torch_arguments(
    x: torch.Tensor, norm: torch.Tensor | None, base: torch.Tensor | None, *, rows: list[int], bits: list[int],
    asymmetric: list[bool], group_size: int, eps: float, mode: Mode, **tensors: torch.Tensor,
) -> Inputs:  # fmt: skip
    count = range(len(rows))
    biases = [tensors.get(f"bias_{i}", torch.zeros(rows[i], device=x.device)) for i in count]
    return {
        "x": x,
        "norm": norm,
        "eps": eps,
        "weights": [tensors[f"weight_{i}"] for i in count],
        "rows": rows,
        "bits": bits,
        "asymmetric": [int(a) for a in asymmetric],
        "group_size": group_size,
        "biases": biases if any(f"bias_{i}" in tensors for i in count) else None,
        "epilogue": MODES[mode],
        "out": _new_out(x, base, rows, mode),
    }


def bytes_moved(*, x: torch.Tensor, rows: list[int], mode: Mode, **rest: object) -> int:
    weights = sum(w.numel() * w.element_size() for w in rest.values() if isinstance(w, torch.Tensor) and w.dim() == 2)
    out = x.shape[0] * (rows[0] if mode == "swiglu" else sum(rows)) * 4
    return weights + x.numel() * x.element_size() + out


def flops(*, x: torch.Tensor, rows: list[int], **_: object) -> int:
    return 2 * x.shape[0] * x.shape[1] * sum(rows)


def _bf16(*, x: torch.Tensor, rows: list[int], **_: object) -> object:
    """What the op replaces: one bf16 linear of the same shape, without the norm and what follows."""
    weight, activations = torch.randn(sum(rows), x.shape[1], dtype=torch.bfloat16), x.bfloat16()
    return lambda: torch.nn.functional.linear(activations, weight)


def _real_layers(name: str, shape: dict[str, tuple[int, int]], *tokens: int) -> list[Case]:
    """The four ops of a decoder layer in int4: merged q/k/v, output, gate and up, down."""
    n = {part: rows for part, (rows, _) in shape.items()}
    k = {part: cols for part, (_, cols) in shape.items()}
    layers = {
        "qkv": {"k": k["q"], "weights": ((n["q"], "int4"), (n["kv"], "int4"), (n["kv"], "int4")), "norm": True},
        "o": {"k": k["o"], "weights": ((n["o"], "int4"),), "mode": "add"},
        "gate_up": {"k": k["gate_up"], "weights": ((n["gate_up"], "int4"),) * 2, "norm": True, "mode": "swiglu"},
        "down": {"k": k["down"], "weights": ((n["down"], "int4"),), "mode": "add"},
    }
    return [
        Case(f"{name}_{layer}_t{t}", {"tokens": t, **params}, real=True)
        for layer, params in layers.items()
        for t in tokens
    ]


_QKV = ((80, "int4"), (37, "int4"), (16, "int4"))
_HEAD_N, _HEAD_K = shapes.HEAD_QWEN3_0_6B
SPEC = OpSpec(
    name="fused_linear",
    run=run,
    reference=run_reference,
    make_inputs=make_inputs,
    cases=(
        Case("one_row", {"tokens": 1, "k": 128, "weights": ((16, "int4"),)}),
        Case("no_tokens", {"tokens": 0, "k": 128, "weights": _QKV, "norm": True}),
        *(
            Case(f"qkv_t{t}", {"tokens": t, "k": 384, "weights": _QKV, "norm": True})
            for t in (1, 2, 3, 8, 9, 17, 63, 261)
        ),
        *(
            Case(
                f"swiglu_t{t}", {"tokens": t, "k": 200, "weights": ((85, "int4"),) * 2, "norm": True, "mode": "swiglu"}
            )
            for t in (1, 2, 3, 8, 9, 17, 63, 261)
        ),
        *(
            Case(f"add_t{t}", {"tokens": t, "k": 320, "weights": ((53, "int4"),), "mode": "add"})
            for t in (1, 2, 9, 17, 261)
        ),
        *(
            Case(f"{kind}_t{t}", {"tokens": t, "k": 77, "weights": ((33, kind),), "norm": t > 1, "bias": (0,)})
            for kind in ("int4a", "int8", "int8a", "f32", "bf16", "f16")
            for t in (1, 3, 9)
        ),
        *(
            Case(f"group_{group}", {"tokens": 2, "k": 264, "weights": ((48, "int4a"), (20, "int8")), "group": group})
            for group in (32, 64, 128)
        ),
        Case("short_k", {"tokens": 2, "k": 5, "weights": ((7, "int4"), (1, "bf16")), "group": 32, "norm": True}),
        Case("int4_beside_int8", {"tokens": 3, "k": 130, "weights": ((40, "int4"), (40, "int8a")), "norm": True}),
        Case("packed_beside_f32", {"tokens": 9, "k": 130, "weights": ((40, "f32"), (17, "int8")), "norm": True}),
        Case(
            "packed_between_bf16",
            {"tokens": 6, "k": 160, "weights": ((20, "bf16"), (30, "int4"), (9, "bf16")), "norm": True, "bias": (0, 1)},
        ),
        Case(
            "four_with_biases",
            {"tokens": 5, "k": 192, "weights": ((3, "f16"), (18, "int4a"), (16, "f16"), (31, "int8")), "bias": (1, 2)},
        ),
        Case("add_bias", {"tokens": 3, "k": 96, "weights": ((24, "bf16"), (8, "int4")), "bias": (0, 1), "mode": "add"}),
        *(
            Case(f"swiglu_{a}_{b}_t{t}", {"tokens": t, "k": 96, "weights": ((70, a), (70, b)), "mode": "swiglu"})
            for a, b in (("int4a", "int4"), ("int8", "int8a"), ("f32", "f32"), ("bf16", "bf16"), ("f16", "f16"))
            for t in (1, 5)
        ),
        *_real_layers("qwen3_0.6b", shapes.QWEN3_0_6B, 1, 8),
        *_real_layers("qwen3_8b", shapes.QWEN3_8B, 1),
        *_real_layers("ernie_4.5_0.3b", shapes.ERNIE_4_5_0_3B, 1),
        Case(
            "qwen3_0.6b_down_bf16_t1", {"tokens": 1, "k": 3072, "weights": ((1024, "bf16"),), "mode": "add"}, real=True
        ),
        Case(
            "qwen3_0.6b_head_t1", {"tokens": 1, "k": _HEAD_K, "weights": ((_HEAD_N, "int8"),), "norm": True}, real=True
        ),
    ),
    # activations of any dtype are taken to float32 exactly, and the output is float32
    tolerance=dict.fromkeys((torch.float32, torch.bfloat16, torch.float16), (1e-5, 1e-4)),
    bytes_moved=bytes_moved,
    flops=flops,
    torch_arguments=torch_arguments,
    rivals={"bf16_linear": _bf16},
)
