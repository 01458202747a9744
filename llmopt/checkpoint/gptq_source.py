"""One quantized linear in a checkpoint's files: checked, and handed out as rows of codes in the kernels' order."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from llmopt.checkpoint import gptq_format
from llmopt.checkpoint.quant_config import Settings, kernel_settings
from llmopt.checkpoint.shard_reader import Shard
from llmopt.errors import CheckpointError, InputError
from llmopt.ops.int4_linear import layout
from llmopt.passes.quantize_gptq.linear import kernel_group_size, spread_scales

_BLOCK_WEIGHTS = 2**21
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
        self._qweight = form.read("qweight")

    @property
    def asymmetric(self) -> bool:
        return self.zeros is not None

    def rows(self, start: int, stop: int) -> torch.Tensor:
        """Codes ``[stop - start, K]`` uint8."""
        q = gptq_format.unpack_weight(self._qweight[:, start:stop], self.form.in_features, bits=self.form.bits)
        return q if self.perm is None else q[:, self.perm]

    def pack(self) -> torch.Tensor:
        """The linear in the kernels' layout, a block of rows at a time."""
        n, k = self.form.out_features, self.form.in_features
        shape = layout.packed_shape(n, k, self.kernel_group, bits=self.form.bits, asymmetric=self.asymmetric)
        packed = torch.empty(shape, dtype=torch.uint8)
        step = max(1, _BLOCK_WEIGHTS // (k * layout.TILE_ROWS)) * layout.TILE_ROWS
        for start in range(0, n, step):
            stop = min(start + step, n)
            zeros = None if self.zeros is None else self.zeros[start:stop]
            block = self.pack_codes(self.rows(start, stop), self.scales[start:stop], zeros)
            first = start // layout.TILE_ROWS
            packed[first : first + block.shape[0]] = block
        return packed

    def pack_codes(self, q: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None) -> torch.Tensor:
        """Pack any rows of codes that are in this linear's format: ``q [N, K]``, ``scales`` and ``zeros [N, G]``."""
        k = self.form.in_features
        packed: torch.Tensor = layout.pack(
            q, spread_scales(scales, k, self.group_size),
            None if zeros is None else spread_scales(zeros, k, self.group_size),
            group_size=self.kernel_group, bits=self.form.bits,
        )  # fmt: skip
        return packed

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
