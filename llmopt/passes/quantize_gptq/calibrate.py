"""Calibration data: whatever the caller has, made into equally long rows of token ids.

Accepted: nothing (the text that ships with the package), a string, token ids (a tensor ``[N, T]`` or ``[T]``, or lists of
ints), or any iterable of strings, token-id rows, or mappings with ``input_ids``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sized
from importlib import resources
from numbers import Integral
from pathlib import Path
from typing import Any

import torch

from llmopt.errors import CalibrationError

# default size: more changes little on small models, and costs time on all
NUM_ROWS = 128
ROW_TOKENS = 256
_STREAM_FACTOR = 8  # of an iterator: times the tokens needed
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model")
_SHARE_FOR_QUALITY = 0.2  # of the packaged text, never calibrated on


def packaged_text(part: str) -> str:
    """The text that ships with llmopt; part "calibration" or "quality" (they do not overlap)."""
    text = resources.files("llmopt").joinpath("data/calibration.txt").read_text(encoding="utf-8")
    cut = text.find("\n\n", int(len(text) * (1 - _SHARE_FOR_QUALITY)))
    return text[:cut] if part == "calibration" else text[cut:]


def find_tokenizer(model: Any) -> Any | None:
    """The tokenizer lying beside the model's weights, in their directory or a hub's cache, or None. Local files only."""
    name = str(getattr(model.config, "_name_or_path", "") or "")
    # of a model without a path the working directory says nothing
    if not name or (Path(name).is_dir() and not any((Path(name) / file).is_file() for file in _TOKENIZER_FILES)):
        return None
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        if Path(name).is_dir():
            raise CalibrationError(f"calibration: {name}: the tokenizer cannot be read: {error}") from error
        return None  # the name of a model whose tokenizer no cache holds


def rows(
    source: Any,
    model: Any,
    *,
    tokenizer: Any = None,
    num_rows: int = NUM_ROWS,
    row_tokens: int = ROW_TOKENS,
    seed: int = 0,
) -> list[torch.Tensor]:
    """Token rows ``[T]`` int64, all of one length, at most ``num_rows``.

    Everything is concatenated and cut. Where there is more than needed, rows are taken evenly over it, so that every part
    speaks; of an iterator, which may be endless, only the beginning is read. ``tokenizer``: None for the one that
    :func:`find_tokenizer` finds.

    Raises:
        CalibrationError: nothing to calibrate on, ids outside the vocabulary, text without a tokenizer.
    """
    if row_tokens < 2:
        raise CalibrationError(f"row_tokens: expected at least 2, got {row_tokens}")
    if source is None:
        source = packaged_text("calibration")
    ids = _Reader(model, tokenizer, _STREAM_FACTOR * num_rows * row_tokens).read(source)
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


class _Reader:
    """Makes token rows of whatever the caller gave. A tokenizer is looked for once, and only if text turns up."""

    def __init__(self, model: Any, tokenizer: Any, most_tokens: int) -> None:
        self.model, self.most_tokens = model, most_tokens
        self._tokenizer = tokenizer

    def read(self, source: Any) -> list[torch.Tensor]:
        if isinstance(source, str | torch.Tensor | Mapping) or hasattr(source, "__array__"):
            return self._item(source)
        if isinstance(source, bytes | bytearray) or not isinstance(source, Iterable):
            raise CalibrationError(
                f"calibration: expected text, token ids, or an iterable of them, got {type(source).__name__}"
            )
        if not isinstance(source, Sized):
            return self._stream(source)
        items = list(source)
        if items and all(isinstance(i, Integral) for i in items):
            return self._item(items)
        return [row for item in items for row in self._item(item)]

    def _stream(self, source: Iterable[Any]) -> list[torch.Tensor]:
        # a streamed data set can be endless: several times what is needed is variety enough
        found: list[torch.Tensor] = []
        total = 0
        for item in source:
            rows_of_item = self._item([item] if isinstance(item, Integral) else item)
            found += rows_of_item
            total += sum(len(r) for r in rows_of_item)
            if total >= self.most_tokens:
                break
        return found

    def _item(self, item: Any) -> list[torch.Tensor]:
        if isinstance(item, str):
            return [self._encode(item)] if item.strip() else []
        if isinstance(item, Mapping):
            for key in ("input_ids", "text"):
                if key in item:
                    return self.read(item[key])
            raise CalibrationError(
                f"calibration: expected mappings with 'input_ids' or 'text', got keys {sorted(map(str, item))}"
            )
        try:
            ids = torch.as_tensor(item)
        except (TypeError, ValueError, RuntimeError) as error:
            raise CalibrationError(f"calibration: cannot read an item of type {type(item).__name__}: {error}") from None
        return _tensor_rows(ids) if ids.numel() else []

    def _encode(self, text: str) -> torch.Tensor:
        if self._tokenizer is None:
            self._tokenizer = find_tokenizer(self.model)
        if self._tokenizer is None:
            raise CalibrationError(
                "calibration: text needs the model's tokenizer, and there is no tokenizer.json in "
                f"'{getattr(self.model.config, '_name_or_path', '')}'; pass tokenizer=, or token ids"
            )
        # verbose=False: the text is cut into rows, so its length is no concern
        encoded = self._tokenizer(text, add_special_tokens=False, return_tensors="pt", verbose=False)
        ids: torch.Tensor = encoded["input_ids"][0]
        return ids.to(torch.int64)


def _tensor_rows(ids: torch.Tensor) -> list[torch.Tensor]:
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise CalibrationError(f"calibration: expected integer token ids, got {ids.dtype}")
    if ids.dim() not in (1, 2):
        raise CalibrationError(f"calibration: expected token ids of shape [T] or [N, T], got {list(ids.shape)}")
    return [r.to(torch.int64).cpu() for r in (ids if ids.dim() == 2 else ids[None]) if r.numel()]
