"""Models of published shapes with random weights, for measuring speed where no checkpoint is at hand.

``build`` makes a whole model; ``meta_model`` and ``materialize_`` make one a part at a time, for a model that fits
memory only after each layer has been quantized. Random weights say nothing about quality.

One block of 4,194,301 normal values from a seeded generator is tiled over every weight, starting at an offset that
follows from the weight's full name. Filling then costs a copy rather than a draw. The length is prime, so no two rows
of a matrix are equal; the offset hangs on the name alone, so a layer filled alone gets the values it has in ``build``.
"""

from __future__ import annotations

import copy
import difflib
import zlib
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from llmopt.errors import InputError
from llmopt.models import family_for
from llmopt.models.base import FLOAT_DTYPES, ModelFamily
from llmopt.models.published import SHAPES, Shape, find

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

__all__ = [
    "SHAPES",
    "Shape",
    "build",
    "config_for",
    "layer_bytes",
    "materialize_",
    "meta_model",
    "parameter_bytes",
    "tiny_model",
]

_BLOCK_NUMEL = 2**22 - 3


def config_for(name: str) -> PreTrainedConfig:
    """The published config of a shape; of ``NAME@LAYERS`` with fewer layers.

    Raises:
        InputError: no such shape; lists them and the nearest.
    """
    from transformers import AutoConfig

    try:
        shape = find(name)
    except KeyError:
        near = difflib.get_close_matches(name, SHAPES, n=1)
        hint = f"; nearest: {near[0]}" if near else ""
        expected = f"one of {', '.join(SHAPES)}, or NAME@LAYERS with fewer layers"
        raise InputError(f"shape: expected {expected}, got {name!r}{hint}") from None
    return AutoConfig.for_model(shape.model_type, **copy.deepcopy(dict(shape.config)), dtype="bfloat16")


def build(
    shape: str | PreTrainedConfig, *, dtype: torch.dtype = torch.bfloat16, seed: int = 0, num_layers: int | None = None
) -> PreTrainedModel:
    """A model with random weights, ready for inference: eval mode, no gradients, no end-of-sequence token.

    Weights are made one by one in their final dtype, so the peak is the model plus one block of 8 MiB.

    Args:
        shape: name of a published shape, or a config of a supported family.
        dtype: of the weights; what the family keeps in float32 stays float32.
        seed: same seed, same bytes.
        num_layers: only the first so many decoder layers, with their dense and MoE layout as published.

    Raises:
        InputError: unknown shape, dtype that is not float32, bfloat16 or float16, or num_layers out of range.
    """
    model = meta_model(shape, dtype=dtype, num_layers=num_layers)
    materialize_(model, seed=seed, std=model.config.initializer_range)
    # the receipt then gives no quality figures
    model.llmopt_random_weights = True
    return model


def tiny_model(model_type: str, *, dtype: torch.dtype = torch.float32, seed: int = 0) -> PreTrainedModel:
    """The small random model that a family declares for tests (``ModelFamily.tiny_config``)."""
    from transformers import AutoConfig

    family = family_for(model_type)
    return build(AutoConfig.for_model(model_type, **copy.deepcopy(family.tiny_config)), dtype=dtype, seed=seed)


def decide_routers_(model: PreTrainedModel) -> PreTrainedModel:
    """Let biases decide which experts a token goes to, where a router has them: for checks of anything that rounds.

    A random router has near ties, and what rounds (int8, bfloat16) settles them in another way, which changes a token's
    logits altogether: no bound on rounding holds then. Scores lie within 0 and 1, the biases here 4 apart.
    """
    generator = torch.Generator().manual_seed(0)
    for name, bias in model.state_dict().items():
        if name.endswith("e_score_correction_bias"):
            order = torch.randperm(bias.numel(), generator=generator)
            bias.copy_(4.0 * order.view_as(bias))
    return model


def meta_model(
    shape: str | PreTrainedConfig, *, dtype: torch.dtype = torch.bfloat16, num_layers: int | None = None
) -> PreTrainedModel:
    """The model of ``build`` with every weight on the meta device, in its final dtype. Only the rotary tables are real.

    Arguments and errors as for ``build``. Fill it, or any part of it, with ``materialize_``.
    """
    from transformers import AutoModelForCausalLM

    if dtype not in FLOAT_DTYPES:
        raise InputError.argument("dtype", expected="torch.float32 | torch.bfloat16 | torch.float16", got=dtype)
    config = config_for(shape) if isinstance(shape, str) else copy.deepcopy(shape)
    family = family_for(config.model_type)
    if num_layers is not None:
        config = _first_layers(config, num_layers)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    # inv_freq is computed, not loaded: a rotary module built under meta would never get its values
    path, _, attr = family.rotary.rpartition(".")
    rotary = model.get_submodule(family.rotary)
    setattr(model.get_submodule(path), attr, type(rotary)(config=model.config))
    _keep_islands_fp32(model, family)
    model.requires_grad_(False)
    model.eval()
    # a random head would end sequences at random: benchmarks need every sequence at full length
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


def materialize_(module: nn.Module, *, prefix: str = "", seed: int = 0, std: float = 0.02) -> nn.Module:
    """Fill, on CPU and in place, every parameter and buffer of ``module`` that is on the meta device. Dtypes stay.

    Weights get normal values of standard deviation ``std``, norms ones, biases (correction biases too) zeros. Tensors
    shared inside ``module`` stay shared; what is already real is left alone.

    Args:
        module: a ``meta_model`` or any part of one, such as one decoder layer.
        prefix: full name of ``module`` in its model, such as ``"model.layers.3"``. With it a part gets the very values
            it has in ``build`` with the same seed; without it, equal parts get equal values.
        seed: of the block of normal values.
        std: standard deviation; ``config.initializer_range`` in ``build``.

    Returns:
        ``module``
    """
    generator = torch.Generator().manual_seed(seed)
    block = torch.empty(_BLOCK_NUMEL, dtype=torch.bfloat16).normal_(0.0, std, generator=generator)
    made: dict[int, torch.Tensor] = {}
    for path, owner in module.named_modules():
        for slot in (owner._parameters, owner._buffers):
            for attr, tensor in slot.items():
                if tensor is None or not tensor.is_meta:
                    continue
                if id(tensor) not in made:
                    name = ".".join(part for part in (prefix, path, attr) if part)
                    real = _filled(tensor, name, block)
                    is_parameter = isinstance(tensor, nn.Parameter)
                    made[id(tensor)] = nn.Parameter(real, requires_grad=tensor.requires_grad) if is_parameter else real
                slot[attr] = made[id(tensor)]
    return module


def parameter_bytes(config: PreTrainedConfig, dtype: torch.dtype = torch.bfloat16) -> int:
    """Bytes of all weights of a model with this config; tied weights count once. Allocates nothing."""
    return _state_bytes(meta_model(config, dtype=dtype))


def layer_bytes(config: PreTrainedConfig, dtype: torch.dtype = torch.bfloat16) -> tuple[int, ...]:
    """Bytes of the weights of each decoder layer. Allocates nothing.

    The first layers can be smaller or larger than the rest: they are dense in most MoE families.
    """
    model = meta_model(config, dtype=dtype)
    layers = model.get_submodule(family_for(config.model_type).layers)
    return tuple(_state_bytes(layer) for layer in layers.children())


def _first_layers(config: Any, num_layers: int) -> Any:
    published = config.num_hidden_layers
    if not 1 <= num_layers <= published:
        raise InputError.argument("num_layers", expected=f"1 to {published}", got=num_layers)
    values = config.to_dict()
    values["num_hidden_layers"] = num_layers
    if values.get("layer_types") is not None:
        values["layer_types"] = values["layer_types"][:num_layers]
    return type(config).from_dict(values)


def _keep_islands_fp32(model: nn.Module, family: ModelFamily) -> None:
    # from_config makes every tensor in the one default dtype; from_pretrained would keep these in float32
    for path, owner in model.named_modules():
        for slot in (owner._parameters, owner._buffers):
            for attr, tensor in slot.items():
                name = f"{path}.{attr}"
                if tensor is None or not any(fragment in name for fragment in family.keep_fp32):
                    continue
                wide = tensor.float()
                slot[attr] = nn.Parameter(wide) if isinstance(tensor, nn.Parameter) else wide


def _filled(tensor: torch.Tensor, name: str, block: torch.Tensor) -> torch.Tensor:
    if name.endswith("bias"):
        return torch.zeros(tensor.shape, dtype=tensor.dtype)
    if tensor.ndim == 1:
        return torch.ones(tensor.shape, dtype=tensor.dtype)
    real = torch.empty(tensor.shape, dtype=tensor.dtype)
    flat = real.view(-1)
    start, done = zlib.crc32(name.encode()) % block.numel(), 0
    while done < flat.numel():
        count = min(block.numel() - start, flat.numel() - done)
        flat[done : done + count] = block[start : start + count]
        start, done = 0, done + count
    return real


def _state_bytes(module: nn.Module) -> int:
    unique = {id(tensor): tensor for tensor in module.state_dict(keep_vars=True).values()}
    return sum(tensor.numel() * tensor.element_size() for tensor in unique.values())
