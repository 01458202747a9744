"""Is this model one that can be optimized, and in a state to be? Answered before any work, from metadata alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from llmopt.errors import ModelStateError, UnsupportedModelError
from llmopt.models import family_for, resolve_model
from llmopt.models.base import FLOAT_DTYPES, ResolvedModel, unclaimed

_LOAD_HINT = "load it with transformers.AutoModelForCausalLM.from_pretrained(...)"


def validate_model(model: object) -> ResolvedModel:
    """Check that ``model`` can be optimized, and find its parts. Reads no weight and changes nothing.

    NaN and Inf in the weights are not looked for here: that would read all of them.

    Raises:
        UnsupportedModelError: not a transformers causal LM, or not of a supported family.
        ModelStateError: as :func:`check_runnable`; or optimized or quantized already.
    """
    resolved = resolve_model(check_runnable(model))
    _check_linears(resolved)
    return resolved


def check_runnable(model: object) -> Any:
    """Check that ``model`` can be run as it is, optimized or not. Reads no weight and changes nothing.

    Returns:
        The same model.

    Raises:
        UnsupportedModelError: not a transformers causal LM, or not of a supported family.
        ModelStateError: LoRA-wrapped, quantized by another method, in training mode, on the meta device, spread over
            several devices or shards, or of a dtype other than float32, bfloat16 or float16.
    """
    _check_not_lora(model)
    checked = _check_causal_lm(model)
    family_for(checked.config.model_type)
    _check_not_quantized(checked)
    _check_eval(checked)
    _check_placement(checked)
    _check_dtypes(checked)
    return checked


def _check_not_lora(model: object) -> None:
    if not isinstance(model, nn.Module):
        return
    wrapped = any(cls.__module__.partition(".")[0] == "peft" for cls in type(model).__mro__)
    layers = [n for n, m in model.named_modules() if hasattr(m, "lora_A") or hasattr(m, "base_layer")]
    if wrapped or layers:
        where = f" (first at {layers[0]})" if layers and layers[0] else ""
        raise ModelStateError(
            f"model: expected plain weights, got LoRA or other PEFT adapters in {type(model).__name__}{where}; "
            "merge them first: model = peft_model.merge_and_unload()"
        )


def _check_causal_lm(model: object) -> Any:
    # not at the top: it pulls in most of transformers, and whoever has a model to check has it loaded already
    from transformers import PreTrainedModel

    name = type(model).__name__
    if not isinstance(model, PreTrainedModel):
        inner = next((attr for attr in ("_orig_mod", "module", "model") if hasattr(model, attr)), None)
        hint = f"pass the wrapped model itself (its .{inner}), or {_LOAD_HINT}" if inner else _LOAD_HINT
        raise UnsupportedModelError(f"model: expected a transformers causal LM (PreTrainedModel), got {name}; {hint}")
    if model.get_output_embeddings() is None or not model.can_generate():
        raise UnsupportedModelError(
            f"model: expected a causal LM with a language-model head, got {name}, which has none; {_LOAD_HINT}"
        )
    return model


def _check_not_quantized(model: Any) -> None:
    config = getattr(model.config, "quantization_config", None)
    if config is None and not getattr(model, "is_quantized", False) and getattr(model, "hf_quantizer", None) is None:
        return
    method = config.get("quant_method") if isinstance(config, dict) else getattr(config, "quant_method", None)
    method = getattr(method, "value", method) or "an unnamed method"
    raise ModelStateError(
        f"model: expected float weights, got a model already quantized by {method}; "
        "load the original bfloat16 or float16 checkpoint instead"
    )


def _check_eval(model: nn.Module) -> None:
    training = [name or "the model itself" for name, module in model.named_modules() if module.training]
    if training:
        raise ModelStateError(f"model: expected eval mode, got training mode in {_shown(training)}; call model.eval()")


def _tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()


def _check_placement(model: nn.Module) -> None:
    meta = [name for name, tensor in _tensors(model) if tensor.is_meta]
    if meta:
        raise ModelStateError(
            f"model: expected weights in memory, got the meta device for {_shown(meta)}; "
            "load the weights without offloading (no device_map), or, if a load was interrupted, load again"
        )
    for name, tensor in _tensors(model):
        kind = type(tensor.data)
        if kind is not torch.Tensor:
            raise ModelStateError(
                f"model: expected plain tensors, got {name} as {kind.__name__} (sharded or quantized); "
                "load the whole model on one device, unquantized"
            )
    devices = sorted({str(tensor.device) for _, tensor in _tensors(model)})
    if len(devices) > 1:
        raise ModelStateError(
            f"model: expected all weights on one device, got {', '.join(devices)}; "
            f"call model.to('{devices[-1]}'), or load without device_map"
        )


def _check_dtypes(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if parameter.dtype not in FLOAT_DTYPES:
            raise ModelStateError(
                f"model: expected weights in float32, bfloat16 or float16, got {name} in "
                f"{str(parameter.dtype).removeprefix('torch.')}; load it with dtype=torch.bfloat16"
            )


def _check_linears(resolved: ResolvedModel) -> None:
    sites = [resolved.head, *(site for layer in resolved.layers for site in (*layer.linears(), *layer.kept))]
    for site in sites:
        if not isinstance(site.module, nn.Linear):
            raise ModelStateError(
                f"model: expected {site.name} to be torch.nn.Linear, got {type(site.module).__name__}; "
                "it seems to be optimized or quantized already: load the original checkpoint"
            )
    left_out = unclaimed(resolved)
    if left_out:
        raise UnsupportedModelError(
            f"model: expected only what family '{resolved.family.model_type}' declares, got {_shown(left_out)}; "
            "this version of transformers, or a change to the model, added them"
        )


def _shown(names: list[str]) -> str:
    """``a, b, c and 5 more``"""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
