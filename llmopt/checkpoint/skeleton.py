"""From ``config.json`` to a model without weights, on the meta device.

The config is untrusted. Keys that choose code are dropped, numbers are checked before any module is built from them,
and the class comes from the family's ``model_type`` alone.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError

from llmopt.checkpoint.safety import CONFIG, CheckpointFiles, contained, has, read_json
from llmopt.errors import CheckpointError, UnsupportedModelError
from llmopt.models import family_for
from llmopt.models.base import FLOAT_DTYPES, ModelFamily, ResolvedModel, resolve

GENERATION_CONFIG = "generation_config.json"
DTYPE_NAMES = {str(dtype).removeprefix("torch."): dtype for dtype in FLOAT_DTYPES}

# these would pick code to run, or say how weights are stored (which is read from the file apart)
_DROPPED = (
    "auto_map", "trust_remote_code", "custom_pipelines", "attn_implementation", "experts_implementation",
    "quantization_config", "transformers_weights", "use_kernels", "name_or_path", "per_layer_config",
)  # fmt: skip
# what a model can have at most: far above anything published, far below what hurts
_LIMITS = {
    "vocab_size": 2**24, "hidden_size": 2**18, "intermediate_size": 2**20, "moe_intermediate_size": 2**20,
    "num_hidden_layers": 1024, "num_attention_heads": 2**12, "num_key_value_heads": 2**12, "head_dim": 2**14,
    "kv_lora_rank": 2**16, "q_lora_rank": 2**16, "qk_nope_head_dim": 2**14, "qk_rope_head_dim": 2**14,
    "v_head_dim": 2**14, "num_experts_per_tok": 2**12, "moe_k": 2**12, "n_group": 2**12, "topk_group": 2**12,
    "max_position_embeddings": 2**40,
}  # fmt: skip
_MAX_EXPERTS = 2**14
_MAX_SHARED = 2**10
_MAY_BE_ZERO = ("n_shared_experts", "moe_num_shared_experts")
# what transformers raises on a config it cannot use, from its own checks or from arithmetic on the values
_CONFIG_ERRORS = (
    ValueError, TypeError, KeyError, IndexError, AttributeError, ArithmeticError, RuntimeError, AssertionError,
    StrictDataclassError,
)  # fmt: skip


def family_of(files: CheckpointFiles) -> ModelFamily:
    """The family that the config names.

    Raises:
        CheckpointError: no ``model_type``, or one that is not supported.
    """
    model_type = files.config.get("model_type")
    path = files.directory / CONFIG
    if not isinstance(model_type, str):
        raise CheckpointError(f"{path}: model_type: expected a string, got {model_type!r}")
    try:
        return family_for(model_type)
    except UnsupportedModelError as error:
        raise CheckpointError(f"{path}: {error}") from None


def config_dtype(files: CheckpointFiles) -> torch.dtype | None:
    """The dtype that the config names (``dtype``, or ``torch_dtype`` in older files), or None.

    Raises:
        CheckpointError: it is not float32, bfloat16 or float16.
    """
    key = "dtype" if files.config.get("dtype") is not None else "torch_dtype"
    name = files.config.get(key)
    if name is None:
        return None
    if not isinstance(name, str) or name.removeprefix("torch.") not in DTYPE_NAMES:
        raise CheckpointError(f"{files.directory / CONFIG}: {key}: expected {' | '.join(DTYPE_NAMES)}, got {name!r}")
    return DTYPE_NAMES[name.removeprefix("torch.")]


def build(files: CheckpointFiles, family: ModelFamily, dtype: torch.dtype | None) -> ResolvedModel:
    """The model on the meta device, in eval mode, its parts found.

    Raises:
        CheckpointError: the config has a value that no model can have, or that transformers refuses.
    """
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    path = files.directory / CONFIG
    config_class = CONFIG_MAPPING[family.model_type]
    check_sizes(path, files.config, family, config_class.attribute_map)
    data = {k: v for k, v in files.config.items() if k not in _DROPPED and not k.startswith("_")}
    data.pop("torch_dtype", None)
    data["dtype"] = None if dtype is None else str(dtype).removeprefix("torch.")
    try:
        config = config_class.from_dict(data)
        _check_relations(path, config, family)
        config._name_or_path = str(files.directory)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
        resolved = resolve(model, family)
    except CheckpointError:
        raise
    except _CONFIG_ERRORS as error:
        raise CheckpointError(f"{path}: not a config that a model can be built from: {_first_line(error)}") from error
    model.generation_config = _generation_config(files.directory, model.generation_config)
    model.eval()
    model.requires_grad_(False)
    return resolved


def fill_computed_buffers(resolved: ResolvedModel, device: torch.device) -> None:
    """Compute the rotary frequencies, which no checkpoint stores.

    Raises:
        CheckpointError: the rope settings of the config cannot be used.
    """
    rotary = resolved.model.get_submodule(resolved.family.rotary)
    config: Any = resolved.model.config
    try:
        with torch.device(device):
            fresh = type(rotary)(config=config)
    except _CONFIG_ERRORS as error:
        raise CheckpointError(
            f"{config._name_or_path}: {CONFIG}: rope settings cannot be used: {_first_line(error)}"
        ) from error
    computed = {**dict(fresh.named_buffers()), "attention_scaling": torch.tensor(fresh.attention_scaling)}
    for name, buffer in computed.items():
        if not bool(torch.isfinite(buffer).all()):
            raise CheckpointError(f"{config._name_or_path}: {CONFIG}: rope settings give NaN or Inf in {name}")
    parent, _, attr = resolved.family.rotary.rpartition(".")
    setattr(resolved.model.get_submodule(parent), attr, fresh.eval())


def check_sizes(path: Path, config: dict[str, Any], family: ModelFamily, aliases: dict[str, str]) -> None:
    """Refuse sizes that are not integers within reason, before anything is built from them.

    Args:
        path: of the config, for the message.
        config: the parsed JSON.
        family: names the key of the number of experts.
        aliases: other names of keys that the config class takes.

    Raises:
        CheckpointError: names the key.
    """
    limits = _LIMITS | dict.fromkeys(_MAY_BE_ZERO, _MAX_SHARED)
    if family.moe is not None:
        limits[family.moe.num_experts_key] = _MAX_EXPERTS
    for alias, key in aliases.items():
        if alias in limits or key in limits:
            limits[alias] = limits[key] = limits.get(alias, limits.get(key, 0))
        if config.get(alias, config.get(key)) != config.get(key, config.get(alias)):
            raise CheckpointError(
                f"{path}: {alias}: expected {config[key]!r:.80} as in {key}, its other name, got {config[alias]!r:.80}"
            )
    for key, limit in limits.items():
        value, low = config.get(key), 0 if key in _MAY_BE_ZERO else 1
        # absent and null mean the family's default
        if value is not None and not (type(value) is int and low <= value <= limit):
            raise CheckpointError(f"{path}: {key}: expected an integer in {low}..{limit}, got {value!r:.80}")
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    for where in (config, rope if isinstance(rope, dict) else {}):
        factor = where.get("partial_rotary_factor")
        # it scales a buffer that is allocated for real
        if factor is not None and not (isinstance(factor, int | float) and 0 < factor <= 1):
            raise CheckpointError(f"{path}: partial_rotary_factor: expected a share in (0, 1], got {factor!r}")


def _check_relations(path: Path, config: Any, family: ModelFamily) -> None:
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    if heads % kv_heads:
        raise CheckpointError(f"{path}: num_key_value_heads: expected a divisor of {heads} heads, got {kv_heads}")
    if family.moe is not None:
        experts, chosen = getattr(config, family.moe.num_experts_key), config.num_experts_per_tok
        if chosen > experts:
            raise CheckpointError(f"{path}: num_experts_per_tok: expected at most {experts} (all), got {chosen}")


def _generation_config(root: Path, default: Any) -> Any:
    if not has(root, GENERATION_CONFIG):
        return default
    from transformers import GenerationConfig

    try:
        return GenerationConfig.from_dict(read_json(root, GENERATION_CONFIG))
    except CheckpointError:
        raise
    except _CONFIG_ERRORS as error:
        path = contained(root, GENERATION_CONFIG)
        raise CheckpointError(f"{path}: not a generation config: {_first_line(error)}") from error


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:2]) or type(error).__name__
