"""Calibration data: whatever the caller has, made into equally long rows of token ids.

Accepted: nothing (the text that ships with the package), a string, token ids (a tensor ``[N, T]`` or ``[T]``, or lists of
ints), or any iterable of strings, token-id rows, or mappings with ``input_ids``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import torch

from llmopt.errors import CalibrationError

# default size: more changes little on small models, and costs time on all
NUM_ROWS = 128
ROW_TOKENS = 256
_SHARE_FOR_QUALITY = 0.2  # of the packaged text, never calibrated on


def packaged_text(part: str) -> str:
    """The text that ships with llmopt; part "calibration" or "quality" (they do not overlap)."""
    text = resources.files("llmopt").joinpath("data/calibration.txt").read_text(encoding="utf-8")
    cut = text.find("\n\n", int(len(text) * (1 - _SHARE_FOR_QUALITY)))
    return text[:cut] if part == "calibration" else text[cut:]


def find_tokenizer(model: Any) -> Any | None:
    """The tokenizer lying beside the model's weights, or None. Local files only."""
    source = Path(str(getattr(model.config, "_name_or_path", "") or ""))
    if not str(source) or not (source / "tokenizer.json").is_file():
        return None
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(source), local_files_only=True, trust_remote_code=False)


def rows(
    source: Any, model: Any, *, num_rows: int = NUM_ROWS, row_tokens: int = ROW_TOKENS, seed: int = 0
) -> list[torch.Tensor]:
    """Token rows ``[T]`` int64, all of one length, at most ``num_rows``.

    Text is concatenated and cut; where there is more than needed, rows are taken evenly over it, so that every part of
    the text speaks. Given rows keep their own boundaries and are cut to the shortest useful length.

    Raises:
        CalibrationError: nothing to calibrate on, ids outside the vocabulary, text without a tokenizer.
    """
    if row_tokens < 2:
        raise CalibrationError(f"row_tokens: expected at least 2, got {row_tokens}")
    ids = _token_stream(source, model)
    vocab = int(model.config.get_text_config().vocab_size)
    total = sum(len(r) for r in ids)
    if total < 2:
        raise CalibrationError(f"calibration: expected at least 2 tokens, got {total}")
    for row in ids:
        if int(row.min()) < 0 or int(row.max()) >= vocab:
            raise CalibrationError(
                f"calibration: expected token ids in [0, {vocab}), got {int(row.min())} to {int(row.max())}"
            )
    stream = torch.cat(ids)
    length = min(row_tokens, len(stream))
    starts = torch.arange(0, len(stream) - length + 1, length)
    if len(starts) > num_rows:
        starts = starts[torch.linspace(0, len(starts) - 1, num_rows).round().long()]
    return [stream[s : s + length] for s in starts.tolist()]


def _token_stream(source: Any, model: Any) -> list[torch.Tensor]:
    if source is None:
        source = packaged_text("calibration")
    if isinstance(source, str):
        return [_encode([source], model)]
    if isinstance(source, torch.Tensor):
        return _tensor_rows(source)
    if isinstance(source, Mapping):
        return _item(source, model)
    if not isinstance(source, Iterable):
        raise CalibrationError(
            "calibration: expected text, token ids, or an iterable of them, got " + type(source).__name__
        )
    items = list(source)
    if items and all(isinstance(i, int) for i in items):
        return _tensor_rows(torch.tensor(items))
    return [row for item in items for row in _item(item, model)]


def _item(item: Any, model: Any) -> list[torch.Tensor]:
    if isinstance(item, str):
        return [_encode([item], model)]
    if isinstance(item, Mapping):
        if "input_ids" in item:
            return _item(item["input_ids"], model)
        if "text" in item:
            return _item(item["text"], model)
        raise CalibrationError(f"calibration: expected mappings with 'input_ids' or 'text', got keys {sorted(item)}")
    if isinstance(item, torch.Tensor):
        return _tensor_rows(item)
    try:
        return _tensor_rows(torch.as_tensor(item))
    except (TypeError, ValueError, RuntimeError) as error:
        raise CalibrationError(f"calibration: cannot read an item of type {type(item).__name__}: {error}") from None


def _tensor_rows(ids: torch.Tensor) -> list[torch.Tensor]:
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise CalibrationError(f"calibration: expected integer token ids, got {ids.dtype}")
    if ids.dim() not in (1, 2):
        raise CalibrationError(f"calibration: expected token ids of shape [T] or [N, T], got {list(ids.shape)}")
    return [r.to(torch.int64).cpu() for r in (ids if ids.dim() == 2 else ids[None]) if r.numel()]


def _encode(texts: list[str], model: Any) -> torch.Tensor:
    tokenizer = find_tokenizer(model)
    if tokenizer is None:
        raise CalibrationError(
            "calibration: text needs the model's tokenizer, and there is no tokenizer.json in "
            f"'{getattr(model.config, '_name_or_path', '')}'; load the model from its local directory, "
            "or pass token ids"
        )
    # verbose: the text is cut into rows afterwards, so its length is no reason to warn
    encoded = [
        tokenizer(t, add_special_tokens=False, return_tensors="pt", verbose=False)["input_ids"][0]
        for t in texts
        if t.strip()
    ]
    if not encoded:
        raise CalibrationError("calibration: the text is empty")
    return torch.cat(encoded)
