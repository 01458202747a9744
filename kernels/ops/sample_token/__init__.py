"""sample_token: a token drawn from temperature, top-k, top-p and min-p, as a part of a recorded step."""

from __future__ import annotations

import torch

from llmopt import native
from llmopt.errors import InputError
from llmopt.ops.device import implementation, registered

__all__ = ["sample_token"]

_LIBRARY = torch.library.Library("llmopt", "FRAGMENT")
_LIBRARY.define("sample_token(Tensor logits, Tensor noise, Tensor settings, Tensor(a!) ids, Tensor(b!)? chosen) -> ()")


def sample_token(
    logits: torch.Tensor, noise: torch.Tensor, settings: torch.Tensor, ids: torch.Tensor,
    chosen: torch.Tensor | None = None,
) -> None:  # fmt: skip
    """Draw a token of each row: the largest ``weight / noise`` among those that all filters keep.

    ``weight = e^((logit - largest) / temperature)``. With noise from an exponential distribution a token is drawn in proportion
    to its weight (the Gumbel trick, as ``torch.multinomial`` draws). The filters follow each other as transformers' do:

    - top_k keeps the k largest logits;
    - top_p keeps of those the fewest largest whose weights reach that share of all of theirs (Holtzman et al., 2020);
    - min_p keeps weights of at least that share of the largest one (Nguyen et al., 2024).

    Each is a threshold: logits that equal the last one kept are kept too. The largest is always kept.

    Args:
        logits: ``[T, V]`` float32.
        noise: ``[T, V]`` float32, positive; read where a token is kept. Below 1e-20 it counts as that.
        settings: ``[T, 4]`` float32: temperature (0: the largest is taken), top_k, top_p, min_p. Outside of (0, V), [0, 1) and
            (0, 1] the last three filter nothing.
        ids: ``[T]`` int64, written: always a token, so that a step may go on.
        chosen: ``[T]`` int64, written: the same, but -1 where none can be drawn: a logit is NaN, or the largest infinite.

    Raises:
        InputError: shapes or dtypes do not fit together.
        NativeLibraryError: the compiled kernels are not installed.
    """
    if torch.compiler.is_compiling():
        torch.ops.llmopt.sample_token(logits, noise, settings, ids, chosen)
    else:
        implementation("sample_token", _cpu, logits)(logits, noise, settings, ids, chosen)


def _cpu(
    logits: torch.Tensor, noise: torch.Tensor, settings: torch.Tensor, ids: torch.Tensor, chosen: torch.Tensor | None
) -> None:
    try:
        native.library().sample_token(logits, noise, settings, ids, chosen)
    except ValueError as error:
        raise InputError(f"sample_token: {error}") from None


def _fake(
    logits: torch.Tensor, noise: torch.Tensor, settings: torch.Tensor, ids: torch.Tensor, chosen: torch.Tensor | None
) -> None:
    torch._check(logits.shape == noise.shape, lambda: f"noise: expected {logits.shape}, got {noise.shape}")
    torch._check(logits.shape[0] == ids.shape[0], lambda: f"ids: expected {logits.shape[0]}, got {ids.shape[0]}")


_LIBRARY.impl("sample_token", _cpu, "CPU")
_LIBRARY.impl("sample_token", registered("sample_token"), "CUDA")
torch.library.register_fake("llmopt::sample_token", _fake, lib=_LIBRARY)
