"""Every family finds every part of its own transformers class, and says so when it does not."""

from __future__ import annotations

import dataclasses
import inspect
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from llmopt.errors import UnsupportedModelError
from llmopt.models import FAMILIES, family_for, resolve_model
from llmopt.models.base import ModelFamily, ResolvedModel, resolve, unclaimed
from llmopt.models.shapes import tiny_model

IDS = [family.model_type for family in FAMILIES]
every_family = pytest.mark.parametrize("family", FAMILIES, ids=IDS)

# model_type -> quantizable linears per layer, whether the layer has routed experts
LAYOUT: dict[str, tuple[tuple[int, ...], tuple[bool, ...]]] = {
    "qwen2": ((7, 7), (False, False)),
    "qwen3": ((7, 7), (False, False)),
    "llama": ((7, 7), (False, False)),
    "ernie4_5": ((7, 7), (False, False)),
    "qwen3_moe": ((7, 4, 4), (False, True, True)),
    "ernie4_5_moe": ((7, 7, 7), (False, True, True)),
    "deepseek_v2": ((6, 6, 6), (False, True, True)),
    "deepseek_v3": ((7, 7, 7), (False, True, True)),
}
KEPT = {"deepseek_v2": ("kv_a_proj_with_mqa",), "deepseek_v3": ("kv_a_proj_with_mqa",)}


@pytest.fixture(scope="module")
def tiny() -> Any:
    made: dict[str, Any] = {}

    def get(model_type: str) -> Any:
        if model_type not in made:
            made[model_type] = tiny_model(model_type)
        return made[model_type]

    return get


def test_the_families_are_the_eight_supported_ones() -> None:
    assert set(IDS) == set(LAYOUT)
    assert len(IDS) == len(set(IDS))
    assert [family_for(name).model_type for name in IDS] == IDS


@every_family
def test_every_declared_part_is_found(family: ModelFamily, tiny: Any) -> None:
    model = tiny(family.model_type)
    resolved = resolve_model(model)
    linears, has_experts = LAYOUT[family.model_type]
    assert tuple(len(list(layer.linears())) for layer in resolved.layers) == linears
    assert tuple(layer.experts is not None for layer in resolved.layers) == has_experts
    assert tuple(layer.router is not None for layer in resolved.layers) == has_experts
    for layer in resolved.layers:
        assert tuple(site.attr for site in layer.kept) == KEPT.get(family.model_type, ())
        for site in (*layer.linears(), *layer.kept, resolved.head):
            assert isinstance(site.module, nn.Linear)
            assert model.get_submodule(site.name) is site.module
            assert getattr(site.parent, site.attr) is site.module
    assert resolved.tied == model.config.tie_word_embeddings
    parent, attr = resolved.parent_of_embedding()
    assert getattr(parent, attr) is resolved.embedding is model.get_input_embeddings()


@pytest.mark.parametrize("family", [f for f in FAMILIES if f.moe], ids=[f.model_type for f in FAMILIES if f.moe])
def test_experts_have_the_declared_layout(family: ModelFamily, tiny: Any) -> None:
    model = tiny(family.model_type)
    config = model.config
    assert family.moe is not None
    num_experts = getattr(config, family.moe.num_experts_key)
    intermediate, hidden = config.moe_intermediate_size, config.hidden_size
    sites = [layer.experts for layer in resolve_model(model).layers if layer.experts is not None]
    assert num_experts == 8
    for site in sites:
        assert site.gate_up.shape == (num_experts, 2 * intermediate, hidden)
        assert site.down.shape == (num_experts, hidden, intermediate)
        assert model.get_submodule(site.name) is site.module
        assert getattr(site.parent, site.attr) is site.module


@every_family
def test_nothing_in_the_decoder_layers_is_left_out(family: ModelFamily, tiny: Any) -> None:
    model = tiny(family.model_type)
    resolved = resolve_model(model)
    claimed = {site.name + ".weight" for layer in resolved.layers for site in (*layer.linears(), *layer.kept)}
    for layer in resolved.layers:
        if layer.experts is not None:
            claimed |= {f"{layer.experts.name}.{part}" for part in ("gate_up_proj", "down_proj")}
    routers = {id(p) for layer in resolved.layers if layer.router for p in layer.router.parameters()}
    matrices = {
        name
        for name, parameter in model.named_parameters()
        if name.startswith("model.layers.") and parameter.ndim >= 2 and id(parameter) not in routers
    }
    assert matrices == claimed
    assert unclaimed(resolved) == []


@every_family
def test_a_linear_the_family_does_not_know_is_reported(family: ModelFamily) -> None:
    model = tiny_model(family.model_type)
    model.model.layers[1].self_attn.extra_proj = nn.Linear(8, 8)
    model.model.layers[1].mlp.extra_stack = nn.Parameter(torch.zeros(2, 3, 4))
    names = ["model.layers.1.self_attn.extra_proj", "model.layers.1.mlp.extra_stack"]
    assert unclaimed(resolve_model(model)) == names


def misspelt(path: str) -> str:
    path, mark, condition = path.partition("?")
    return f"{path[:-2]}x{path[-2:]}{mark}{condition}"


def in_use(path: str, family: ModelFamily) -> bool:
    """A path with a condition that the tiny config does not meet is not looked for."""
    _, _, condition = path.partition("?")
    unset = family.tiny_config.get(condition.removeprefix("!")) is None
    return not condition or unset == condition.startswith("!")


def misspelt_families(family: ModelFamily) -> Iterator[tuple[str, ModelFamily]]:
    """Every path of the family misspelt in turn, with the wrong last name."""
    for name in ("layers", "embedding", "final_norm", "head", "rotary", "input_norm", "post_norm", "mlp_module"):
        wrong = misspelt(getattr(family, name))
        yield wrong, dataclasses.replace(family, **{name: wrong})
    attention = family.attention
    for name in ("qk_norms", "keep"):
        paths = getattr(attention, name)
        for i, path in enumerate(paths):
            if in_use(path, family):
                wrong = (*paths[:i], misspelt(path), *paths[i + 1 :])
                spec = dataclasses.replace(attention, **{name: wrong})
                yield misspelt(path).partition("?")[0], dataclasses.replace(family, attention=spec)
    for i, stage in enumerate(attention.stages):
        for j, path in enumerate(stage):
            if in_use(path, family):
                stages = list(attention.stages)
                stages[i] = (*stage[:j], misspelt(path), *stage[j + 1 :])
                spec = dataclasses.replace(attention, stages=tuple(stages))
                yield misspelt(path).partition("?")[0], dataclasses.replace(family, attention=spec)
    wrong = misspelt(attention.module)
    yield wrong, dataclasses.replace(family, attention=dataclasses.replace(attention, module=wrong))
    for name in ("gate", "up", "down"):
        wrong = misspelt(getattr(family.mlp, name))
        yield wrong, dataclasses.replace(family, mlp=dataclasses.replace(family.mlp, **{name: wrong}))
    for name in ("router", "experts", "gate_up", "down", "shared", "correction_bias"):
        if family.moe is not None and (path := getattr(family.moe, name)) is not None:
            wrong = misspelt(path)
            yield wrong, dataclasses.replace(family, moe=dataclasses.replace(family.moe, **{name: wrong}))


@pytest.mark.parametrize(
    ("name", "family"),
    [pytest.param(n, wrong, id=f"{f.model_type}-{n}") for f in FAMILIES for n, wrong in misspelt_families(f)],
)
def test_a_misspelt_path_raises_and_names_it(name: str, family: ModelFamily, tiny: Any) -> None:
    with pytest.raises(UnsupportedModelError) as caught:
        resolve(tiny(family.model_type), family)
    lines = [line for line in str(caught.value).splitlines() if line.startswith("  ") and name in line]
    assert lines, caught.value
    assert "nearest: " in lines[0]


def test_the_nearest_name_is_the_right_one(tiny: Any) -> None:
    family = family_for("ernie4_5_moe")
    assert family.moe is not None
    wrong = dataclasses.replace(family, moe=dataclasses.replace(family.moe, gate_up="gate_upe_proj"))
    with pytest.raises(UnsupportedModelError, match=r"experts\.gate_upe_proj  \(nearest: .*experts\.gate_up_proj"):
        resolve(tiny("ernie4_5_moe"), wrong)


@pytest.mark.parametrize(
    ("model_type", "nearest"), [("qwen2_moe", "qwen3_moe"), ("deepseek_v32", "deepseek_v3"), ("gpt2", "")]
)
def test_unsupported_family_lists_the_supported_and_the_nearest(model_type: str, nearest: str) -> None:
    with pytest.raises(UnsupportedModelError) as caught:
        family_for(model_type)
    message = str(caught.value)
    assert repr(model_type) in message
    assert all(name in message for name in IDS)
    assert (f"nearest: {nearest}" in message) if nearest else ("nearest" not in message)


def test_resolving_something_without_a_config_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="Linear"):
        resolve_model(nn.Linear(2, 2))


ROTATE = {"deepseek_v2": "apply_rotary_emb", "deepseek_v3": "apply_rotary_pos_emb_interleave"}


def rotary_partner(model: Any, family: ModelFamily) -> int:
    """The dimension that dimension 0 is rotated with: both end up in the same two output dimensions."""
    attention = resolve_model(model).layers[0].attention
    apply = getattr(inspect.getmodule(type(attention)), ROTATE.get(family.model_type, "apply_rotary_pos_emb"))
    table = model.get_submodule(family.rotary)(torch.zeros(1, 1, 8), torch.tensor([[3]]))
    tables = table if isinstance(table, tuple) else (table,)
    dim = 2 * model.get_submodule(family.rotary).inv_freq.numel()

    def touched(i: int) -> set[int]:
        unit = torch.zeros(1, 1, 1, dim)
        unit[..., i] = 1.0
        return set(apply(unit, unit, *tables)[0].flatten().nonzero().flatten().tolist())

    return next(i for i in range(1, dim) if touched(i) == touched(0))


@every_family
def test_rope_style_is_as_declared(family: ModelFamily, tiny: Any) -> None:
    model = tiny(family.model_type)
    half = model.get_submodule(family.rotary).inv_freq.numel()
    expected = {"interleaved": 1, "half_split": half}
    assert rotary_partner(model, family) == expected[family.attention.rope_style(model.config)]


def test_rope_style_follows_the_config_where_it_can_change() -> None:
    family = family_for("deepseek_v3")
    config = AutoConfig.for_model("deepseek_v3", **{**family.tiny_config, "rope_interleave": False})
    assert family.attention.rope_style(config) == "half_split"


def record_inputs(resolved: ResolvedModel) -> dict[str, torch.Tensor]:
    """First input of every linear of the first MoE (or first) layer, in call order."""
    layer = next((layer for layer in resolved.layers if layer.experts), resolved.layers[0])
    seen: dict[str, torch.Tensor] = {}

    def recorder(name: str) -> Any:
        def record(_: nn.Module, args: tuple[torch.Tensor]) -> None:
            seen[name] = args[0].flatten()

        return record

    handles = [site.module.register_forward_pre_hook(recorder(site.name)) for site in layer.linears()]
    with torch.no_grad():
        resolved.model(torch.arange(16)[None] + 3)
    for handle in handles:
        handle.remove()
    return seen


@every_family
def test_linears_of_a_stage_share_their_input_and_stages_come_in_order(family: ModelFamily, tiny: Any) -> None:
    resolved = resolve_model(tiny(family.model_type))
    seen = record_inputs(resolved)
    layer = next((layer for layer in resolved.layers if layer.experts), resolved.layers[0])
    assert set(seen) == {site.name for site in layer.linears()}
    for stage in layer.stages:
        for site in stage:
            torch.testing.assert_close(seen[site.name], seen[stage[0].name], rtol=0, atol=0)
    stage_of = {site.name: i for i, stage in enumerate(layer.stages) for site in stage}
    called = [stage_of[name] for name in seen]
    assert called == sorted(called)


@every_family
def test_tiny_config_suits_the_kernels(family: ModelFamily, tiny: Any) -> None:
    model = tiny(family.model_type)
    resolved = resolve_model(model)
    assert 100_000 < sum(p.numel() for p in model.parameters()) < 1_000_000
    for layer in resolved.layers:
        for site in layer.linears():
            assert site.module.in_features % 64 == 0
            assert site.module.out_features % 16 == 0
        if layer.experts is not None:
            for stack in (layer.experts.gate_up, layer.experts.down):
                assert stack.shape[2] % 64 == 0
                assert stack.shape[1] % 16 == 0


@pytest.mark.parametrize(
    ("model_type", "q_lora_rank", "expected"),
    [("deepseek_v2", 64, ["q_a_proj"]), ("deepseek_v3", None, ["q_proj"])],
)
def test_latent_attention_with_and_without_query_compression(
    model_type: str, q_lora_rank: int | None, expected: list[str]
) -> None:
    config = AutoConfig.for_model(model_type, **{**family_for(model_type).tiny_config, "q_lora_rank": q_lora_rank})
    resolved = resolve_model(AutoModelForCausalLM.from_config(config))
    assert [site.attr for site in resolved.layers[0].stages[0]] == expected
    assert unclaimed(resolved) == []


@pytest.mark.parametrize("model_type", ["ernie4_5", "ernie4_5_moe"])
def test_ernie_with_biases_and_without_shared_experts(model_type: str) -> None:
    changes = {"use_bias": True, "moe_num_shared_experts": 0} if model_type == "ernie4_5_moe" else {"use_bias": True}
    config = AutoConfig.for_model(model_type, **{**family_for(model_type).tiny_config, **changes})
    resolved = resolve_model(AutoModelForCausalLM.from_config(config))
    assert all(site.module.bias is not None for layer in resolved.layers for site in layer.linears())
    expected = (7, 4, 4) if model_type == "ernie4_5_moe" else (7, 7)
    assert tuple(len(list(layer.linears())) for layer in resolved.layers) == expected
    assert unclaimed(resolved) == []


def test_importing_the_models_package_does_not_import_transformers() -> None:
    code = (
        "import sys, llmopt.models, llmopt.models.shapes, llmopt.models.validate\n"
        "assert 'transformers' not in sys.modules, 'transformers was imported'"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
