"""The weights of a model's modules, as they are now, in the form the ops take them."""

from __future__ import annotations

import torch
from torch import nn

from llmopt.errors import UnsupportedModelError
from llmopt.ops.fused_linear import Weight
from llmopt.packed import QuantEmbedding, QuantLinear

_PLAIN = (torch.float32, torch.bfloat16, torch.float16)


def weight_of(module: nn.Module, name: str = "") -> Weight:
    """The weight of a linear or an embedding, packed or plain.

    Raises:
        UnsupportedModelError: the module is something else, its columns are permuted, or its dtype is not floating.
    """
    if isinstance(module, QuantLinear):
        if module.perm is not None:
            raise UnsupportedModelError(f"{name}: packed in activation order (desc_act)")
        bias = None if module.bias is None else module.bias.detach().float()
        return Weight(
            module.packed, module.out_features, module.in_features, module.bits, module.kernel_group,
            module.asymmetric, bias,
        )  # fmt: skip
    if isinstance(module, QuantEmbedding):
        return Weight(
            module.packed, module.num_embeddings, module.embedding_dim, module.bits, module.group_size
        )  # fmt: skip
    weight = getattr(module, "weight", None)
    if (
        type(module) not in (nn.Linear, nn.Embedding)
        or not isinstance(weight, torch.Tensor)
        or weight.dtype not in _PLAIN
    ):
        raise UnsupportedModelError(f"{name}: {type(module).__name__} is not a layer the fused ops know")
    data = weight.detach().contiguous()
    plain_bias: torch.Tensor | None = getattr(module, "bias", None)
    return Weight(
        data, data.shape[0], data.shape[1], 8 * data.element_size(),
        bias=None if plain_bias is None else plain_bias.detach().float(),
    )  # fmt: skip


def norm_of(module: nn.Module) -> tuple[torch.Tensor, float]:
    """Weight (float32) and epsilon of an RMSNorm, whatever its class calls them."""
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    weight = getattr(module, "weight", None)
    if eps is None or not isinstance(weight, torch.Tensor):
        raise UnsupportedModelError(f"{type(module).__name__} is not an RMSNorm the fused ops know")
    return weight.detach().float().contiguous(), float(eps)
