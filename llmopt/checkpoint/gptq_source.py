"""One quantized linear in a checkpoint's files: checked, and written in the kernels' layout."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from llmopt.checkpoint import gptq_format
from llmopt.checkpoint.quant_config import Settings, kernel_settings
from llmopt.checkpoint.shard_reader import Shard
from llmopt.errors import CheckpointError, InputError
from llmopt.ops.int4_linear import layout
from llmopt.ops.packed_tiles import packed_words
from llmopt.packed import kernel_group_size, spread_scales

# a scale that float16 holds less exactly than bfloat16 would is too small for it
_SCALE_TOLERANCE = 2.0**-8


@dataclass(frozen=True, slots=True)
class LinearFormat:
    """What the shapes of a linear's tensors say."""

    name: str  # on disk
    out_features: int
    in_features: int
    bits: int
    group_size: int  # as in the checkpoint
    owner: dict[str, Shard]  # the checkpoint's tensors

    def read(self, part: str) -> torch.Tensor:
        name = f"{self.name}.{part}"
        return self.owner[name].read(name)

    def where(self, part: str) -> str:
        name = f"{self.name}.{part}"
        return f"{self.owner[name].path}: {name}"

    def column_order(self) -> torch.Tensor | None:
        """The permutation of a linear in true activation order, else None.

        Raises:
            CheckpointError: ``g_idx`` is out of range or not a division into groups.
        """
        if f"{self.name}.g_idx" not in self.owner:
            return None
        try:
            return gptq_format.column_order(self.read("g_idx"), self.group_size)
        except InputError as error:
            raise CheckpointError(f"{self.where('g_idx')}: {error}") from None


class GptqSource:
    """The codes of one linear.

    Args:
        form: where it is and how it is written.
        settings: of the checkpoint.
        perm: its column order.
        keep_zeros: store zero points even if all are in the middle (experts share one layout).

    Raises:
        CheckpointError: scales that are zero, not finite or beyond float16; zero points that contradict ``sym``.
    """

    def __init__(
        self, form: LinearFormat, settings: Settings, perm: torch.Tensor | None, *, keep_zeros: bool = False
    ) -> None:
        self.form, self.perm = form, perm
        self.group_size, repeat = kernel_settings(form.group_size)
        self.kernel_group = kernel_group_size(form.in_features, self.group_size)
        groups = 1 if self.group_size == -1 else -(-form.in_features // self.group_size)
        self.scales = self._whole_groups(_checked_scales(form), repeat, groups)
        zeros = gptq_format.unpack_zeros(form.read("qzeros"), form.out_features, bits=form.bits, v2=settings.v2)
        if keep_zeros or self._is_asymmetric(settings, zeros):
            self.zeros: torch.Tensor | None = self._whole_groups(zeros, repeat, groups)
        else:
            self.zeros = None
        # [ceil(K * bits / 32), N] int32, columns in the kernels' order
        self.words = form.read("qweight") if perm is None else _permuted(form, perm)

    @property
    def asymmetric(self) -> bool:
        return self.zeros is not None

    def packed_shape(self, out_features: int) -> tuple[int, int]:
        """Of a weight of so many rows in this linear's format."""
        return layout.packed_shape(
            out_features, self.form.in_features, self.kernel_group, bits=self.form.bits, asymmetric=self.asymmetric
        )

    def pack(self, out: torch.Tensor) -> None:
        """Write the linear in the kernels' layout."""
        pack_together([self], out)

    def _whole_groups(self, x: torch.Tensor, repeat: int, groups: int) -> torch.Tensor:
        return x if repeat == 1 else x.repeat_interleave(repeat, -1)[:, :groups].contiguous()

    def _is_asymmetric(self, settings: Settings, zeros: torch.Tensor) -> bool:
        middle = 2 ** (self.form.bits - 1)
        off_centre = bool((zeros != middle).any())
        if off_centre and settings.symmetric and not settings.has_overrides:
            got = sorted(set(zeros.flatten().tolist()) - {middle})[:4]
            raise CheckpointError(
                f"{self.form.where('qzeros')}: expected zero points of {middle} (sym is true), got {got}; "
                "is checkpoint_format right?"
            )
        asymmetric = off_centre if settings.has_overrides or settings.symmetric is None else not settings.symmetric
        if asymmetric and self.form.bits == 8:
            raise CheckpointError(f"{self.form.where('qzeros')}: expected symmetric weights at 8 bits, got zero points")
        return asymmetric


def pack_together(sources: Sequence[GptqSource], out: torch.Tensor) -> None:
    """Write linears of one format and input, one below the other, as one weight in the kernels' layout."""
    first = sources[0]
    k, zeros = first.form.in_features, [x.zeros for x in sources if x.zeros is not None]

    def spread(parts: list[torch.Tensor]) -> torch.Tensor:
        return spread_scales(_joined(parts, 0), k, first.group_size).contiguous()

    packed_words(
        _joined([x.words for x in sources], 1), spread([x.scales for x in sources]), spread(zeros) if zeros else None,
        out, in_features=k, group_size=first.kernel_group, bits=first.form.bits,
    )  # fmt: skip


def _joined(parts: list[torch.Tensor], dim: int) -> torch.Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


def _permuted(form: LinearFormat, perm: torch.Tensor) -> torch.Tensor:
    q = gptq_format.unpack_weight(form.read("qweight"), form.in_features, bits=form.bits)
    return gptq_format.pack_weight(q[:, perm], bits=form.bits)


def _checked_scales(form: LinearFormat) -> torch.Tensor:
    """``[N, G]`` float16."""
    scales = form.read("scales").t()
    where = form.where("scales")
    if not bool(torch.isfinite(scales).all()):
        raise CheckpointError(f"{where}: expected finite scales, got NaN or Inf")
    if bool((scales == 0).any()):
        raise CheckpointError(f"{where}: expected scales other than 0, got {int((scales == 0).sum())} zeros")
    half = scales.to(torch.float16).contiguous()
    if scales.dtype != torch.float16:
        wide = scales.float()
        off = ((half.float() - wide).abs() > wide.abs() * _SCALE_TOLERANCE) | ~torch.isfinite(half)
        if bool(off.any()):
            raise CheckpointError(f"{where}: expected scales that float16 can hold, got {float(wide[off][0]):.3g}")
    return half
