"""Each state a model must not be in is refused by name, with the way out, before any work."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

import llmopt
from llmopt.errors import InputError, LlmoptError, ModelStateError, UnsupportedModelError
from llmopt.models import FAMILIES, family_for, validate
from llmopt.models.shapes import meta_model, tiny_model
from llmopt.models.validate import check_runnable, validate_model


def config_of(model_type: str) -> Any:
    return AutoConfig.for_model(model_type, **family_for(model_type).tiny_config)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("model_type", [family.model_type for family in FAMILIES])
def test_a_model_ready_for_inference_passes(model_type: str, dtype: torch.dtype) -> None:
    model = tiny_model(model_type, dtype=dtype)
    resolved = validate_model(model)
    assert resolved.model is model
    assert resolved.family is family_for(model_type)


def test_a_model_loaded_by_transformers_passes(tmp_path: Any) -> None:
    tiny_model("ernie4_5_moe", dtype=torch.bfloat16).save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert len(validate_model(model).layers) == 3


@pytest.mark.parametrize(
    ("value", "got"),
    [
        (None, "NoneType"),
        ("Qwen/Qwen3-0.6B", "str"),
        (nn.Linear(2, 2), "Linear"),
        (SimpleNamespace(model=1), "SimpleNamespace"),
    ],
    ids=["none", "name", "module", "wrapper"],
)
def test_not_a_transformers_model(value: object, got: str) -> None:
    with pytest.raises(UnsupportedModelError, match=rf"PreTrainedModel.*got {got}.*from_pretrained"):
        validate_model(value)


def test_a_compiled_model_is_pointed_to_the_original() -> None:
    with pytest.raises(UnsupportedModelError, match=r"got OptimizedModule; pass the wrapped model itself.*_orig_mod"):
        validate_model(torch.compile(tiny_model("qwen3")))


@pytest.mark.parametrize("auto", [AutoModel, AutoModelForSequenceClassification], ids=["headless", "classifier"])
def test_not_a_causal_lm(auto: Any) -> None:
    with pytest.raises(UnsupportedModelError, match=r"language-model head, got Qwen3\w+.*AutoModelForCausalLM"):
        validate_model(auto.from_config(config_of("qwen3")).eval())


def test_unsupported_family_lists_the_supported_and_the_nearest() -> None:
    config = AutoConfig.for_model(
        "qwen2_moe", vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(UnsupportedModelError, match=r"qwen3_moe.*got 'qwen2_moe'; nearest: qwen3_moe"):
        validate_model(model.eval())


def lora_layers(model: Any) -> Any:
    model.model.layers[1].self_attn.q_proj.lora_A = nn.ModuleDict()
    return model


def lora_base_layer(model: Any) -> Any:
    holder = nn.Module()
    holder.base_layer = model.model.layers[0].mlp.up_proj
    model.model.layers[0].mlp.up_proj = holder
    return model


def peft_wrapper(model: Any) -> Any:
    wrapper_type = type("PeftModelForCausalLM", (nn.Module,), {"__module__": "peft.peft_model"})
    wrapper = wrapper_type()
    wrapper.base_model = model
    return wrapper


def quantized_config(model: Any) -> Any:
    model.config.quantization_config = {"quant_method": "awq", "bits": 4}
    return model


def quantized_flag(model: Any) -> Any:
    model.is_quantized = True
    return model


def quantizer_left_behind(model: Any) -> Any:
    model.hf_quantizer = object()
    return model


def training(model: Any) -> Any:
    return model.train()


def one_module_training(model: Any) -> Any:
    model.model.layers[1].mlp.train()
    return model


def meta_parameter(model: Any) -> Any:
    layer = model.model.layers[1].mlp.down_proj
    layer.weight = nn.Parameter(layer.weight.to("meta"))
    return model


def float8(model: Any) -> Any:
    layer = model.model.layers[0].mlp.down_proj
    layer.weight = nn.Parameter(layer.weight.to(torch.float8_e4m3fn), requires_grad=False)
    return model


def int8(model: Any) -> Any:
    layer = model.model.layers[0].mlp.down_proj
    layer.weight = nn.Parameter(layer.weight.to(torch.int8), requires_grad=False)
    return model


def float64(model: Any) -> Any:
    return model.double()


class Shard(torch.Tensor):
    pass


def tensor_subclass(model: Any) -> Any:
    layer = model.model.layers[0].mlp.down_proj
    layer.weight = nn.Parameter(layer.weight.detach().as_subclass(Shard), requires_grad=False)
    return model


def replaced_linear(model: Any) -> Any:
    model.model.layers[0].self_attn.o_proj = nn.Identity().eval()
    return model


STATES: list[tuple[Callable[[Any], Any], str]] = [
    (lora_layers, r"adapters.*model\.layers\.1\.self_attn\.q_proj.*merge_and_unload"),
    (lora_base_layer, r"adapters.*model\.layers\.0\.mlp\.up_proj.*merge_and_unload"),
    (peft_wrapper, r"PeftModelForCausalLM.*merge_and_unload"),
    (quantized_config, r"already quantized by awq.*original"),
    (quantized_flag, r"already quantized"),
    (quantizer_left_behind, r"already quantized"),
    (training, r"training mode in the model itself, .* more; call model\.eval\(\)"),
    (one_module_training, r"training mode in model\.layers\.1\.mlp, .*call model\.eval\(\)"),
    (meta_parameter, r"meta device for model\.layers\.1\.mlp\.down_proj\.weight; .*device_map"),
    (float8, r"model\.layers\.0\.mlp\.down_proj\.weight in float8_e4m3fn.*dtype=torch\.bfloat16"),
    (int8, r"in int8.*dtype=torch\.bfloat16"),
    (float64, r"in float64.*dtype=torch\.bfloat16"),
    (tensor_subclass, r"down_proj\.weight as Shard.*one device"),
    (replaced_linear, r"model\.layers\.0\.self_attn\.o_proj to be torch\.nn\.Linear, got Identity"),
]


@pytest.mark.parametrize(("spoil", "message"), STATES, ids=[spoil.__name__ for spoil, _ in STATES])
def test_a_state_that_cannot_be_optimized_is_refused(spoil: Callable[[Any], Any], message: str) -> None:
    model = tiny_model("qwen3")
    validate_model(model)
    with pytest.raises(ModelStateError, match=message):
        validate_model(spoil(model))


def quantized(model: Any) -> Any:
    llmopt.optimize(model, ["quantize_gptq"], measure=False)
    return model


def test_an_optimized_model_can_be_run_but_not_optimized() -> None:
    model = quantized(tiny_model("ernie4_5_moe"))
    assert check_runnable(model) is model
    with pytest.raises(ModelStateError, match="optimized or quantized already"):
        validate_model(model)


@pytest.mark.parametrize(("spoil", "message"), STATES[:-1], ids=[spoil.__name__ for spoil, _ in STATES[:-1]])
def test_a_state_that_cannot_be_run_is_refused(spoil: Callable[[Any], Any], message: str) -> None:
    with pytest.raises(ModelStateError, match=message):
        check_runnable(spoil(tiny_model("qwen3")))


def test_a_whole_model_on_meta_is_refused() -> None:
    with pytest.raises(ModelStateError, match="meta device"):
        validate_model(meta_model(config_of("deepseek_v3")))


def test_several_devices_are_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("qwen3")
    real = validate._tensors

    def spread(module: nn.Module) -> Iterator[tuple[str, Any]]:
        for i, (name, tensor) in enumerate(real(module)):
            fake = SimpleNamespace(is_meta=False, data=tensor.data, device=torch.device("cuda", i % 2))
            yield name, fake if i else tensor

    monkeypatch.setattr(validate, "_tensors", spread)
    with pytest.raises(ModelStateError, match=r"one device, got cpu, cuda:0, cuda:1; call model\.to\('cuda:1'\)"):
        validate_model(model)


def test_a_weight_the_family_does_not_know_is_refused() -> None:
    model = tiny_model("qwen3")
    model.model.layers[0].mlp.extra_proj = nn.Linear(8, 8).eval()
    with pytest.raises(UnsupportedModelError, match=r"'qwen3' declares, got model\.layers\.0\.mlp\.extra_proj;"):
        validate_model(model)


def test_the_errors_are_input_errors_and_value_errors() -> None:
    for error in (UnsupportedModelError, ModelStateError):
        assert issubclass(error, InputError)
        assert issubclass(error, LlmoptError)
        assert issubclass(error, ValueError)
