"""``quantization_config``: what a GPTQ checkpoint says about its quantized linears, read and written.

Keys as AutoGPTQ, GPTQModel, transformers and vLLM use them. ``dynamic`` holds name patterns: ``-:`` not quantized,
``+:`` with settings of its own. Patterns are written, never evaluated: which modules are quantized, and how, shows in
the tensors, and a regular expression from an untrusted file can take forever.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import llmopt
from llmopt.checkpoint.gptq_format import BITS
from llmopt.checkpoint.safety import CONFIG, CheckpointFiles, has, read_json
from llmopt.errors import CheckpointError, InputError
from llmopt.ops.int4_linear.layout import KERNEL_GROUPS

LEGACY_CONFIG = "quantize_config.json"  # AutoGPTQ's own file, before transformers knew the format
_LARGEST_GROUP = 128  # of the kernels; a larger group is read as several of this size with the same scale
_MAX_GROUP = 2**20
_LAYER = re.compile(r"\\?\.\d+\\?\.")  # also in an escaped name
FORMATS = ("gptq", "gptq_v2")  # of zero points: minus one, and as they are


@dataclass(frozen=True, slots=True)
class Settings:
    """How a checkpoint's linears are quantized, unless a module's tensors say otherwise."""

    bits: int
    group_size: int
    symmetric: bool | None  # None: not said
    v2: bool
    has_overrides: bool  # modules may differ in bits, group size and symmetry

    def group_sizes(self) -> tuple[int, ...]:
        """Group sizes a module may have, the stated one first."""
        others = (*KERNEL_GROUPS, 256, 512, 1024, -1) if self.has_overrides else ()
        return (self.group_size, *(g for g in others if g != self.group_size))


@dataclass(frozen=True, slots=True)
class ModuleFormat:
    """How one linear is written."""

    bits: int
    group_size: int
    symmetric: bool


def read_settings(files: CheckpointFiles) -> Settings | None:
    """The quantization settings of a checkpoint, or None where it is not quantized.

    Raises:
        CheckpointError: quantized by another method, or with settings that make no sense or have no kernel.
    """
    config = files.config.get("quantization_config")
    path = files.directory / CONFIG
    if config is None:
        if not has(files.directory, LEGACY_CONFIG):
            return None
        path = files.directory / LEGACY_CONFIG
        config = {"quant_method": "gptq", **read_json(files.directory, LEGACY_CONFIG)}
    if not isinstance(config, dict):
        raise CheckpointError(f"{path}: quantization_config: expected an object, got {type(config).__name__}")
    where = f"{path}: quantization_config"
    _expect(where, config, "quant_method", "'gptq'", lambda v: v == "gptq")
    _expect(where, config, "bits", " or ".join(map(str, BITS)), lambda v: type(v) is int and v in BITS)
    _expect(where, config, "group_size", "32, 64, a multiple of 128, or -1", _is_group_size)
    for key in ("sym", "desc_act", "lm_head"):
        _expect(where, config, key, "true or false", lambda v: v is None or isinstance(v, bool))
    name = config.get("checkpoint_format", config.get("format", "gptq"))
    if name not in FORMATS or config.get("is_marlin_format"):
        got = "marlin" if config.get("is_marlin_format") else name
        raise CheckpointError(f"{where}: checkpoint_format: expected {' or '.join(FORMATS)}, got {got!r}")
    _expect(where, config, "pack_dtype", "'int32'", lambda v: v in (None, "int32"))
    for key in ("adapter", "rotation"):
        _expect(where, config, key, "nothing: it changes what the weights mean", lambda v: not v)
    dynamic = config.get("dynamic") or {}
    if not isinstance(dynamic, dict):
        raise CheckpointError(f"{where}: dynamic: expected an object, got {type(dynamic).__name__}")
    symmetric = config.get("sym")
    if config["bits"] == 8 and symmetric is False:
        raise CheckpointError(f"{where}: sym: expected true at 8 bits (there is no asymmetric 8-bit kernel), got false")
    return Settings(
        bits=config["bits"], group_size=config["group_size"], symmetric=symmetric, v2=name == "gptq_v2",
        has_overrides=any(not pattern.startswith("-:") for pattern in dynamic),
    )  # fmt: skip


def check_format(argument: str, name: object) -> None:
    """Raises InputError, naming the argument, unless ``name`` is a format that can be written."""
    if name not in FORMATS:
        raise InputError.argument(argument, expected=" or ".join(map(repr, FORMATS)), got=name)


def kernel_settings(group_size: int) -> tuple[int, int]:
    """``(group size of the packed layout, how many of its groups one of the checkpoint's makes)``."""
    if group_size in (*KERNEL_GROUPS, -1):
        return group_size, 1
    return _LARGEST_GROUP, group_size // _LARGEST_GROUP


def quantization_config(
    modules: Mapping[str, ModuleFormat], left_out: Iterable[str], *, desc_act: bool, v2: bool
) -> dict[str, Any]:
    """What a checkpoint says of its quantized modules.

    Args:
        modules: every quantized linear by its name on disk.
        left_out: linears of the same kind that are not quantized.
        desc_act: some module's columns are in activation order.
        v2: zero points are stored as they are.
    """
    base = Counter(modules.values()).most_common(1)[0][0]
    dynamic: dict[str, dict[str, Any]] = {f"-:^{p}$": {} for p in _patterns(left_out, modules)}
    for name, module in modules.items():
        if module != base:
            dynamic[f"+:^{re.escape(name)}$"] = {
                "bits": module.bits, "group_size": module.group_size, "sym": module.symmetric
            }  # fmt: skip
    name = "gptq_v2" if v2 else "gptq"
    config: dict[str, Any] = {
        "quant_method": "gptq", "bits": base.bits, "group_size": base.group_size, "sym": base.symmetric,
        "desc_act": desc_act, "checkpoint_format": name, "format": name, "pack_dtype": "int32", "lm_head": False,
        "true_sequential": True, "meta": {"quantizer": [f"llmopt:{llmopt.__version__}"]},
    }  # fmt: skip
    if dynamic:
        config["dynamic"] = dynamic
    return config


def _patterns(names: Iterable[str], others: Iterable[str]) -> list[str]:
    """Regular expressions for the names: one for all layers where that catches none of the others."""
    taken = {_LAYER.sub(".N.", name) for name in others}
    found = dict.fromkeys(
        re.escape(name) if _LAYER.sub(".N.", name) in taken else _LAYER.sub(r"\.\\d+\.", re.escape(name))
        for name in names
    )
    return list(found)


def _is_group_size(value: Any) -> bool:
    if type(value) is not int:
        return False
    return value in (*KERNEL_GROUPS, -1) or (0 < value <= _MAX_GROUP and value % _LARGEST_GROUP == 0)


def _expect(where: str, config: Mapping[str, Any], key: str, expected: str, fits: Any) -> None:
    value = config.get(key)
    if not fits(value):
        raise CheckpointError(f"{where}: {key}: expected {expected}, got {value!r:.80}")
