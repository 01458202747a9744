"""What differs between model families, as data, and the lookup that turns it into modules of one given model.

A ``ModelFamily`` is one frozen value per ``model_type``. ``resolve`` walks a model along the declared paths and either
finds every one of them or raises, naming what is missing and the nearest names that are there: a misspelt path must
never leave part of a model untouched without a word.
"""

from __future__ import annotations

import difflib
import functools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn

from llmopt.errors import UnsupportedModelError

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # of the models that can be optimized


@dataclass(frozen=True, slots=True)
class AttentionSpec:
    """Where the attention of a decoder layer keeps its parts; paths are relative to the attention module."""

    kind: Literal["gqa", "mla"]
    rope: Literal["half_split", "interleaved"]
    # linears in the order in which inputs become known: all of one tuple read the same input.
    # 'name?field' is there only where config.field is not None, 'name?!field' only where it is None
    stages: tuple[tuple[str, ...], ...]
    module: str = "self_attn"
    # norms inside attention: on the heads of q and k (GQA), or on the compressed latents (MLA)
    qk_norms: tuple[str, ...] = ()
    # linears that stay in the model's dtype: small, and everything downstream hangs on them
    keep: tuple[str, ...] = ()
    # boolean config field that overrides `rope`: True is interleaved, False is half_split
    rope_key: str | None = None
    # transformers' own layers rotate interleaved pairs but leave them in halves, and so they lie in its cache
    rotated_as_halves: bool = False

    def rope_style(self, config: Any) -> Literal["half_split", "interleaved"]:
        """Rope style of a model with this config."""
        if self.rope_key is None:
            return self.rope
        return "interleaved" if getattr(config, self.rope_key) else "half_split"


@dataclass(frozen=True, slots=True)
class MlpSpec:
    """A gated dense MLP; paths are relative to the module that holds it."""

    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"


@dataclass(frozen=True, slots=True)
class MoeSpec:
    """A mixture-of-experts block; paths are relative to the block."""

    scoring: Literal["softmax", "sigmoid"]
    num_experts_key: str  # field of the config
    router: str = "gate"
    experts: str = "experts"
    gate_up: str = "gate_up_proj"  # parameter [E, 2I, H], relative to `experts`
    down: str = "down_proj"  # parameter [E, H, I]
    shared: str | None = "shared_experts"  # None where the family has none
    correction_bias: str | None = None
    group_limited: bool = False
    renormalize: bool = False
    group_best: int = 1  # a group of experts counts as the sum of its best one, or best two
    sum_eps: float = 0.0  # renormalizing divides by max(sum + sum_eps, config.<sum_min_key>)
    sum_min_key: str | None = None
    # name of one expert's linear on disk, where other tools write them unfused
    disk_name: str = "experts.{expert}.{proj}"


@dataclass(frozen=True, slots=True)
class ModelFamily:
    """One ``model_type`` of transformers: where things are, and what must be left alone."""

    model_type: str
    attention: AttentionSpec
    mlp: MlpSpec = field(default_factory=MlpSpec)
    moe: MoeSpec | None = None
    layers: str = "model.layers"
    embedding: str = "model.embed_tokens"
    final_norm: str = "model.norm"
    head: str = "lm_head"
    rotary: str = "model.rotary_emb"
    input_norm: str = "input_layernorm"
    post_norm: str = "post_attention_layernorm"
    mlp_module: str = "mlp"
    tiny_config: dict[str, Any] = field(default_factory=dict)  # a config of a few 100k parameters, for tests

    @property
    def keep_fp32(self) -> tuple[str, ...]:
        """Name fragments of parameters and buffers that stay float32, as the installed transformers has them."""
        return _kept_in_fp32(self.model_type)


@functools.cache
def _kept_in_fp32(model_type: str) -> tuple[str, ...]:
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    cls: Any = getattr(transformers, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type])
    return tuple(sorted(cls._keep_in_fp32_modules_strict or ()))


@dataclass(frozen=True, slots=True)
class LinearSite:
    """One ``nn.Linear`` and where it hangs."""

    name: str  # full dotted name in the model
    module: nn.Linear
    parent: nn.Module
    attr: str


@dataclass(frozen=True, slots=True)
class ExpertsSite:
    """One fused-experts module (3-D parameters) and where it hangs."""

    name: str
    module: nn.Module
    parent: nn.Module
    attr: str
    spec: MoeSpec

    @property
    def gate_up(self) -> torch.Tensor:
        """``[E, 2I, H]``"""
        tensor: torch.Tensor = _walk(self.module, self.spec.gate_up)
        return tensor

    @property
    def down(self) -> torch.Tensor:
        """``[E, H, I]``"""
        tensor: torch.Tensor = _walk(self.module, self.spec.down)
        return tensor


@dataclass(frozen=True, slots=True)
class ResolvedLayer:
    """One decoder layer with every declared part found."""

    index: int
    name: str
    module: nn.Module
    attention: nn.Module
    mlp: nn.Module
    input_norm: nn.Module
    post_norm: nn.Module
    # linears grouped by common input, in the order their inputs become known
    stages: tuple[tuple[LinearSite, ...], ...]
    kept: tuple[LinearSite, ...]
    experts: ExpertsSite | None
    router: nn.Module | None

    def linears(self) -> Iterator[LinearSite]:
        for stage in self.stages:
            yield from stage


@dataclass(frozen=True, slots=True)
class ResolvedModel:
    """A model seen through its family."""

    family: ModelFamily
    model: nn.Module
    embedding: nn.Embedding
    head: LinearSite
    final_norm: nn.Module
    layers: tuple[ResolvedLayer, ...]

    @property
    def tied(self) -> bool:
        """Head and embedding share one weight."""
        return self.head.module.weight is self.embedding.weight

    @property
    def dtype(self) -> torch.dtype:
        """The model's own dtype: that of its norms, which no pass touches."""
        dtype: torch.dtype = self.final_norm.weight.dtype  # type: ignore[assignment]
        return dtype

    @property
    def vocab_size(self) -> int:
        config: Any = self.model.config
        return int(config.get_text_config().vocab_size)

    @property
    def device(self) -> torch.device:
        device: torch.device = self.final_norm.weight.device  # type: ignore[assignment]
        return device

    def parent_of_embedding(self) -> tuple[nn.Module, str]:
        path, _, attr = self.family.embedding.rpartition(".")
        return (_walk(self.model, path) if path else self.model), attr


def _walk(root: Any, path: str) -> Any:
    for part in path.split("."):
        root = root[int(part)] if part.isdigit() else getattr(root, part)
    return root


class _Finder:
    """Looks paths up, and gathers what is missing so that one error can name all of it."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.missing: list[str] = []

    def get(self, prefix: str, path: str) -> Any:
        full = f"{prefix}.{path}" if prefix else path
        try:
            found = _walk(self.model, full)
        except (AttributeError, IndexError):
            found = None
        # what hangs below a missing module is missing too, and not worth a line
        if found is None and not any(full.startswith(f"{above}.") for above in self.missing):
            self.missing.append(full)
        return found

    def linear(self, prefix: str, path: str) -> LinearSite | None:
        full = f"{prefix}.{path}" if prefix else path
        module = self.get(prefix, path)
        parent_path, _, attr = full.rpartition(".")
        if module is None:
            return None
        return LinearSite(full, module, _walk(self.model, parent_path) if parent_path else self.model, attr)

    def linears(self, prefix: str, paths: tuple[str, ...]) -> tuple[LinearSite, ...]:
        return tuple(site for path in paths if (site := self.linear(prefix, path)) is not None)

    def raise_if_missing(self, family: ModelFamily) -> None:
        if not self.missing:
            return
        known = [name for name, _ in self.model.named_modules()] + [name for name, _ in self.model.named_parameters()]
        lines = []
        for path in self.missing[:8]:
            near = difflib.get_close_matches(path, known, n=2)
            lines.append(f"  {path}" + (f"  (nearest: {', '.join(near)})" if near else ""))
        more = f"\n  and {len(self.missing) - 8} more" if len(self.missing) > 8 else ""
        raise UnsupportedModelError(
            f"model does not have every part that family '{family.model_type}' declares; missing:\n"
            + "\n".join(lines)
            + more
        )


def resolve(model: nn.Module, family: ModelFamily) -> ResolvedModel:
    """Find every path that ``family`` declares in ``model``.

    Raises:
        UnsupportedModelError: one or more paths are missing; lists them with the nearest names.
    """
    find = _Finder(model)
    embedding = find.get("", family.embedding)
    head = find.linear("", family.head)
    final_norm = find.get("", family.final_norm)
    find.get("", family.rotary)
    layers = find.get("", family.layers)
    resolved = [_resolve_layer(find, family, i) for i in range(len(layers))] if layers is not None else []
    find.raise_if_missing(family)
    assert head is not None
    return ResolvedModel(family, model, embedding, head, final_norm, tuple(r for r in resolved if r is not None))


def unclaimed(resolved: ResolvedModel) -> list[str]:
    """Names of every ``nn.Linear`` and 3-D parameter in the decoder layers that the family says nothing about.

    Empty for a supported model. Anything else would be left unoptimized without a word.
    """
    names: list[str] = []
    for layer in resolved.layers:
        claimed = {id(site.module) for site in (*layer.linears(), *layer.kept)}
        if layer.experts is not None:
            claimed.update(id(tensor) for tensor in (layer.experts.gate_up, layer.experts.down))
        if layer.router is not None:
            claimed.update(id(module) for module in layer.router.modules())
        weights = [(n, m) for n, m in layer.module.named_modules() if isinstance(m, nn.Linear)]
        stacks = [(n, p) for n, p in layer.module.named_parameters() if p.ndim == 3]
        names += [f"{layer.name}.{n}" for n, found in (*weights, *stacks) if id(found) not in claimed]
    return names


def _resolve_layer(find: _Finder, family: ModelFamily, index: int) -> ResolvedLayer | None:
    name = f"{family.layers}.{index}"
    layer = find.get("", name)
    attention_name = f"{name}.{family.attention.module}"
    attention = find.get("", attention_name)
    mlp_name = f"{name}.{family.mlp_module}"
    mlp = find.get("", mlp_name)
    input_norm, post_norm = find.get(name, family.input_norm), find.get(name, family.post_norm)
    config = find.model.config
    stages = [find.linears(attention_name, _present(config, paths)) for paths in family.attention.stages]
    kept = find.linears(attention_name, _present(config, family.attention.keep))
    for path in _present(config, family.attention.qk_norms):
        find.get(attention_name, path)
    experts, router = None, None
    # what does not look dense counts as MoE, so that a misspelt `experts` is itself the name reported
    dense = any(hasattr(mlp, path) for path in (family.mlp.gate, family.mlp.up, family.mlp.down))
    if family.moe is not None and not dense:
        experts, router, shared = _resolve_moe(find, family.moe, mlp, mlp_name)
        mlp_stages = _dense_stages(find, family.mlp, shared) if shared else []
    else:
        mlp_stages = _dense_stages(find, family.mlp, mlp_name)
    if layer is None or attention is None or mlp is None:
        return None
    return ResolvedLayer(
        index, name, layer, attention, mlp, input_norm, post_norm,
        tuple(s for s in (*stages, *mlp_stages) if s), kept, experts, router,
    )  # fmt: skip


def _present(config: Any, paths: tuple[str, ...]) -> tuple[str, ...]:
    """Names of the paths that a model with this config has, conditions ('name?field', 'name?!field') taken off.

    The config decides, not the module: a misspelt name would look the same as an absent one.
    """
    kept = []
    for path in paths:
        name, _, condition = path.partition("?")
        field_name = condition.removeprefix("!")
        wants_none = condition != field_name
        if condition and (getattr(config, field_name) is None) != wants_none:
            continue
        kept.append(name)
    return tuple(kept)


def _resolve_moe(
    find: _Finder, spec: MoeSpec, mlp: nn.Module, mlp_name: str
) -> tuple[ExpertsSite | None, nn.Module | None, str | None]:
    experts = find.get(mlp_name, spec.experts)
    router = find.get(mlp_name, spec.router)
    # experts already replaced by packed ones (a model loaded quantized) have no 3-D parameters
    for path in () if getattr(experts, "is_packed", False) else (spec.gate_up, spec.down):
        find.get(f"{mlp_name}.{spec.experts}", path)
    if spec.correction_bias:
        find.get(mlp_name, spec.correction_bias)
    site = ExpertsSite(f"{mlp_name}.{spec.experts}", experts, mlp, spec.experts, spec) if experts is not None else None
    shared = None
    # a config with zero shared experts leaves the attribute at None
    if spec.shared is not None and not (hasattr(mlp, spec.shared) and getattr(mlp, spec.shared) is None):
        shared = f"{mlp_name}.{spec.shared}" if find.get(mlp_name, spec.shared) is not None else None
    return site, router, shared


def _dense_stages(find: _Finder, spec: MlpSpec, prefix: str) -> list[tuple[LinearSite, ...]]:
    return [find.linears(prefix, (spec.gate, spec.up)), find.linears(prefix, (spec.down,))]
