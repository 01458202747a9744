"""Modules that hold quantized weights in the kernels' layout and run them.

They stand where ``nn.Linear``, the fused experts or ``nn.Embedding`` stood. Weights are one uint8 buffer each; nothing else
of the original is kept. Without the compiled kernels (or on a device they do not serve) the weight is dequantized for each
call and PyTorch multiplies: correct, and slow.
"""

from __future__ import annotations

import torch
from torch import nn

from llmopt.errors import InputError
from llmopt.ops.device import kernels_for
from llmopt.ops.int4_experts import int4_experts
from llmopt.ops.int4_linear import int4_linear, layout
from llmopt.ops.int8_linear import int8_linear, quant_rows


def kernel_group_size(in_features: int, group_size: int) -> int:
    """Group size of the packed layout: the checkpoint's, or for per-channel scales (-1) the largest the kernels have.

    A row shorter than its group is one group either way; the smallest layout that holds it pads least.
    """
    if group_size not in (*layout.KERNEL_GROUPS, -1):
        raise InputError.argument("group_size", expected="32, 64, 128 or -1 (per channel)", got=group_size)
    largest = layout.KERNEL_GROUPS[-1] if group_size == -1 else group_size
    return min(g for g in layout.KERNEL_GROUPS if g >= min(largest, in_features))


def spread_scales(scales: torch.Tensor, in_features: int, group_size: int) -> torch.Tensor:
    """Per-channel scales (or zeros) ``[..., N, 1]`` repeated for every kernel group; others unchanged."""
    if group_size != -1:
        return scales
    groups = -(-in_features // kernel_group_size(in_features, group_size))
    return scales.expand(*scales.shape[:-1], groups)


def uses_kernels(x: torch.Tensor) -> bool:
    """True when our kernels serve this tensor: compiled ones on the CPU, Triton's on an NVIDIA GPU."""
    return bool(_have_kernels(x.device.type))


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _have_kernels(device: str) -> bool:
    # torch.compile cannot look into the file system, and need not: the answer is the same for the whole process
    return kernels_for(device)


class QuantLinear(nn.Module):
    """A linear with packed 4-bit or 8-bit weights.

    Args:
        packed: ``[tiles, bytes]`` uint8, see :mod:`llmopt.ops.int4_linear.layout`.
        bias: ``[out_features]`` or None.
        in_features, out_features: sizes of the weight.
        bits: 4 or 8.
        group_size: as quantized: 32, 64, 128 or -1 (one scale a row).
        asymmetric: zero points are stored.
        perm: ``[in_features]`` int64 or None. Column j of the packed weight is column ``perm[j]`` of the original: only for
            checkpoints with true activation order (``desc_act``), whose groups are not contiguous.
    """

    packed: torch.Tensor
    bias: torch.Tensor | None
    perm: torch.Tensor | None

    def __init__(
        self, packed: torch.Tensor, bias: torch.Tensor | None, *, in_features: int, out_features: int, bits: int,
        group_size: int, asymmetric: bool, perm: torch.Tensor | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.bits, self.group_size, self.asymmetric = bits, group_size, asymmetric
        self.kernel_group = kernel_group_size(in_features, group_size)
        want = layout.packed_shape(out_features, in_features, self.kernel_group, bits=bits, asymmetric=asymmetric)
        if tuple(packed.shape) != want:
            raise InputError.argument("packed", expected=f"shape {want}", got=tuple(packed.shape))
        self.register_buffer("packed", packed)
        self.register_buffer("bias", bias)
        self.register_buffer("perm", perm)

    @classmethod
    def from_codes(
        cls, q: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None, bias: torch.Tensor | None, *,
        bits: int, group_size: int, perm: torch.Tensor | None = None,
    ) -> QuantLinear:  # fmt: skip
        """Pack codes ``q [N, K]`` uint8 with scales and zeros ``[N, G]`` (G = 1 for per-channel)."""
        n, k = q.shape
        packed = layout.pack(
            q, spread_scales(scales, k, group_size), None if zeros is None else spread_scales(zeros, k, group_size),
            group_size=kernel_group_size(k, group_size), bits=bits,
        )  # fmt: skip
        return cls(
            packed, bias, in_features=k, out_features=n, bits=bits, group_size=group_size,
            asymmetric=zeros is not None, perm=perm,
        )  # fmt: skip

    def codes(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """``(q [N, K] uint8, scales [N, G] float16, zeros [N, G] uint8 or None)``, columns in packed order."""
        q, scales, zeros = layout.unpack(
            self.packed, out_features=self.out_features, in_features=self.in_features, group_size=self.kernel_group,
            bits=self.bits, asymmetric=self.asymmetric,
        )  # fmt: skip
        if self.group_size == -1:
            scales, zeros = scales[:, :1], None if zeros is None else zeros[:, :1]
        return q, scales, zeros

    def dequantize(self) -> torch.Tensor:
        """The weight ``[out_features, in_features]`` that the codes stand for, float32, original column order."""
        weight = layout.dequantize(
            self.packed, out_features=self.out_features, in_features=self.in_features, group_size=self.kernel_group,
            bits=self.bits, asymmetric=self.asymmetric,
        )  # fmt: skip
        if self.perm is not None:
            weight = weight[:, torch.argsort(self.perm)]
        return weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # in a decode step a lookup through nn.Module is a fifth of what this method costs
        buffers = self._buffers
        packed, bias, perm = buffers["packed"], buffers["bias"], buffers["perm"]
        assert packed is not None
        if not uses_kernels(x):
            return nn.functional.linear(x, self.dequantize().to(x.dtype), bias)
        if perm is not None:
            x = x[..., perm]
        if self.bits == 4:
            return int4_linear(
                x, packed, bias, out_features=self.out_features, group_size=self.kernel_group,
                asymmetric=self.asymmetric,
            )  # fmt: skip
        return int8_linear(x, packed, bias, out_features=self.out_features, group_size=self.kernel_group)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bits={self.bits}, "
            f"group_size={self.group_size}, asymmetric={self.asymmetric}, bias={self.bias is not None}"
        )


class QuantEmbedding(nn.Module):
    """An embedding whose rows are dequantized when looked up; shares its bytes with a tied head.

    Args:
        packed: ``[tiles, bytes]`` uint8.
        num_embeddings, embedding_dim: sizes of the table.
        bits, group_size: of the packed table (symmetric).
        dtype: of the rows returned.
        padding_idx: kept for those who read it.
    """

    packed: torch.Tensor

    def __init__(
        self, packed: torch.Tensor, *, num_embeddings: int, embedding_dim: int, bits: int, group_size: int,
        dtype: torch.dtype, padding_idx: int | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.num_embeddings, self.embedding_dim, self.padding_idx = num_embeddings, embedding_dim, padding_idx
        self.bits, self.group_size, self.dtype = bits, group_size, dtype
        self.register_buffer("packed", packed)

    def dequantize(self) -> torch.Tensor:
        """The table ``[num_embeddings, embedding_dim]``, float32."""
        return layout.dequantize(
            self.packed, out_features=self.num_embeddings, in_features=self.embedding_dim,
            group_size=self.group_size, bits=self.bits, asymmetric=False,
        )  # fmt: skip

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        if not uses_kernels(ids):
            return nn.functional.embedding(ids, self.dequantize()).to(self.dtype)
        rows = quant_rows(
            ids, self.packed, out_features=self.num_embeddings, in_features=self.embedding_dim,
            group_size=self.group_size, bits=self.bits,
        )  # fmt: skip
        return rows.to(self.dtype)

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, bits={self.bits}, group_size={self.group_size}"


class QuantExperts(nn.Module):
    """Routed experts, fused and 4-bit: stands where transformers' 3-D experts module stood.

    Args:
        gate_up: ``[E, tiles, bytes]`` uint8, packed ``[2I, H]`` an expert (gate rows, then up rows).
        down: ``[E, tiles, bytes]`` uint8, packed ``[H, I]`` an expert.
        hidden_dim, intermediate_dim: H and I.
        group_size: as quantized, 32, 64, 128 or -1, of both.
        asymmetric: zero points are stored.
    """

    is_packed = True  # tells models.base.resolve not to look for the 3-D parameters
    gate_up: torch.Tensor
    down: torch.Tensor

    def __init__(
        self, gate_up: torch.Tensor, down: torch.Tensor, *, hidden_dim: int, intermediate_dim: int, group_size: int,
        asymmetric: bool,
    ) -> None:  # fmt: skip
        super().__init__()
        self.num_experts = gate_up.shape[0]
        self.hidden_dim, self.intermediate_dim = hidden_dim, intermediate_dim
        self.group_size, self.asymmetric = group_size, asymmetric
        self.gate_up_group = kernel_group_size(hidden_dim, group_size)
        self.down_group = kernel_group_size(intermediate_dim, group_size)
        for name, packed, n, k, group in (
            ("gate_up", gate_up, 2 * intermediate_dim, hidden_dim, self.gate_up_group),
            ("down", down, hidden_dim, intermediate_dim, self.down_group),
        ):
            want = (self.num_experts, *layout.packed_shape(n, k, group, bits=4, asymmetric=asymmetric))
            if tuple(packed.shape) != want:
                raise InputError.argument(name, expected=f"shape {want}", got=tuple(packed.shape))
            self.register_buffer(name, packed)

    def codes(self, part: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Of ``part`` "gate_up" or "down": ``(q [E, N, K], scales [E, N, G], zeros [E, N, G] or None)``."""
        n, k, group = self._sizes(part)
        q, scales, zeros = layout.unpack(
            getattr(self, part), out_features=n, in_features=k, group_size=group, bits=4, asymmetric=self.asymmetric
        )
        if self.group_size == -1:
            scales, zeros = scales[..., :1], None if zeros is None else zeros[..., :1]
        return q, scales, zeros

    def dequantize(self, part: str) -> torch.Tensor:
        """The weights of ``part`` "gate_up" ``[E, 2I, H]`` or "down" ``[E, H, I]``, float32."""
        n, k, group = self._sizes(part)
        return layout.dequantize(
            getattr(self, part), out_features=n, in_features=k, group_size=group, bits=4, asymmetric=self.asymmetric
        )

    def _sizes(self, part: str) -> tuple[int, int, int]:
        if part == "gate_up":
            return 2 * self.intermediate_dim, self.hidden_dim, self.gate_up_group
        if part == "down":
            return self.hidden_dim, self.intermediate_dim, self.down_group
        raise InputError.argument("part", expected="'gate_up' or 'down'", got=part)

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        if not uses_kernels(hidden_states):
            return self._torch_forward(hidden_states, top_k_index, top_k_weights)
        return int4_experts(
            hidden_states, top_k_index, top_k_weights, self.gate_up, self.down, intermediate=self.intermediate_dim,
            group_size=self.gate_up_group, down_group_size=self.down_group, asymmetric=self.asymmetric,
        )  # fmt: skip

    def _torch_forward(self, x: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        out = torch.zeros_like(x)
        gate_up, down = self.dequantize("gate_up").to(x.dtype), self.dequantize("down").to(x.dtype)
        for expert in index.unique().tolist():
            token, choice = torch.where(index == expert)
            gate, up = nn.functional.linear(x[token], gate_up[expert]).chunk(2, dim=-1)
            y = nn.functional.linear(nn.functional.silu(gate) * up, down[expert])
            out.index_add_(0, token, (y * weights[token, choice, None]).to(out.dtype))
        return out

    def extra_repr(self) -> str:
        return (
            f"{self.num_experts}, hidden_dim={self.hidden_dim}, intermediate_dim={self.intermediate_dim}, bits=4, "
            f"group_size={self.group_size}, asymmetric={self.asymmetric}"
        )
