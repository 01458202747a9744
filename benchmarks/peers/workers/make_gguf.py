"""Writes a GGUF of a published shape with random weights, as f16 or straight in Q4_0, one tensor in memory at a time.

    python -m benchmarks.peers.workers.make_gguf SHAPE.json OUT.gguf f16|q4_0
    python -m benchmarks.peers.workers.make_gguf --quantize IN.gguf OUT.gguf q4_0|q4_k_m THREADS

SHAPE.json is ``{"model_type": ..., "config": {...}}``. Straight in Q4_0 every matrix is (the head too), as llama.cpp's
``--pure`` would make it; its own mixes come from ``--quantize``. Runs in the environment that has gguf and llama_cpp.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from benchmarks.peers.gguf_tensors import ARCHITECTURES, Tensor, head_dim_of, moe_of, tensors

_BLOCK, _BLOCK_BYTES = 32, 18  # Q4_0: 32 weights, and an f16 scale before them
_STD, _Q4_STEP = 0.02, 0.02 / 4.61  # the codes are uniform: 4.61 is their standard deviation
_NUM_RANDOM = 2**22 - 3  # prime, so that no two rows are equal
_FTYPES = {"q4_0": "LLAMA_FTYPE_MOSTLY_Q4_0", "q4_k_m": "LLAMA_FTYPE_MOSTLY_Q4_K_M"}


def write(shape: Mapping[str, Any], out: Path, kind: str) -> None:
    model_type, config = shape["model_type"], shape["config"]
    writer = gguf.GGUFWriter(str(out), ARCHITECTURES[model_type])
    add_settings(writer, config, model_type, kind)
    listed = list(tensors(config, model_type))
    for tensor in listed:
        _announce(writer, tensor, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    values = _Values(kind)
    for tensor in listed:
        writer.write_tensor_data(values.of(tensor))
    writer.close()


def add_settings(writer: Any, config: Mapping[str, Any], model_type: str, kind: str) -> None:
    moe, head_dim = moe_of(config, model_type), head_dim_of(config)
    writer.add_context_length(32768)
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_string("tokenizer.ggml.model", "no_vocab")
    types = gguf.LlamaFileType
    writer.add_file_type(types.MOSTLY_F16 if kind == "f16" else types.MOSTLY_Q4_0)
    if config.get("kv_lora_rank"):
        rope = config["qk_rope_head_dim"]
        writer.add_key_length(config["qk_nope_head_dim"] + rope)
        writer.add_value_length(config["v_head_dim"])
        writer.add_kv_lora_rank(config["kv_lora_rank"])
        writer.add_rope_dimension_count(rope)
        writer.add_expert_weights_scale(1.0)
        writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SOFTMAX)
    else:
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
    if moe.experts:
        writer.add_expert_count(moe.experts)
        writer.add_expert_used_count(moe.used)
        writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
    if moe.dense_first:
        writer.add_leading_dense_block_count(moe.dense_first)
    if moe.shared:
        writer.add_expert_shared_count(moe.shared)
        writer.add_expert_shared_feed_forward_length(moe.shared * config["moe_intermediate_size"])
    if model_type == "ernie4_5_moe":
        writer.add_interleave_moe_layer_step(1)


def _announce(writer: Any, tensor: Tensor, kind: str) -> None:
    if tensor.is_quantized and kind == "q4_0":
        shape = (*tensor.shape[:-1], tensor.shape[-1] // _BLOCK * _BLOCK_BYTES)
        num_bytes = tensor.numel // _BLOCK * _BLOCK_BYTES
        q4 = gguf.GGMLQuantizationType.Q4_0
        writer.add_tensor_info(tensor.name, shape, np.dtype(np.uint8), num_bytes, raw_dtype=q4)
        return
    dtype = np.dtype(np.float16 if tensor.is_quantized else np.float32)
    writer.add_tensor_info(tensor.name, tensor.shape, dtype, tensor.numel * dtype.itemsize)


class _Values:
    """Random values by tiling one block: drawing 30 billion would take longer than the benchmark."""

    def __init__(self, kind: str) -> None:
        rng = np.random.default_rng(0)
        self.normal = (rng.standard_normal(_NUM_RANDOM, dtype=np.float32) * _STD).astype(np.float16)
        self.codes = rng.integers(0, 256, _NUM_RANDOM, dtype=np.uint8) if kind == "q4_0" else None
        self._start = 0

    def of(self, tensor: Tensor) -> Any:
        if tensor.name.endswith("norm.weight"):
            return np.ones(tensor.shape, np.float32)
        if tensor.name.endswith("bias"):
            return np.zeros(tensor.shape, np.float32)
        if tensor.is_quantized and self.codes is not None:
            raw = self._tiled(self.codes, tensor.numel // _BLOCK * _BLOCK_BYTES).reshape(-1, _BLOCK_BYTES)
            raw[:, :2] = np.frombuffer(np.float16(_Q4_STEP).tobytes(), np.uint8)
            return raw.reshape(*tensor.shape[:-1], -1)
        values = self._tiled(self.normal, tensor.numel).reshape(tensor.shape)
        return values if tensor.is_quantized else values.astype(np.float32)

    def _tiled(self, block: Any, count: int) -> Any:
        # each tensor starts elsewhere, so that no two layers are equal
        self._start = (self._start + 1_000_003) % len(block)
        return np.resize(np.roll(block, -self._start), count)


def quantize(source: Path, out: Path, kind: str, threads: int) -> None:
    """llama.cpp's own quantization, with its own choice of formats for head and embedding."""
    import llama_cpp

    settings = llama_cpp.llama_model_quantize_default_params()
    settings.ftype = getattr(llama_cpp, _FTYPES[kind])
    settings.nthread = threads
    failed = llama_cpp.llama_model_quantize(str(source).encode(), str(out).encode(), settings)
    if failed:
        raise RuntimeError(f"llama_model_quantize returned {failed}")


def main() -> None:
    words = sys.argv[1:]
    if words[0] == "--quantize":
        quantize(Path(words[1]), Path(words[2]), words[3], int(words[4]))
    else:
        write(json.loads(Path(words[0]).read_text(encoding="utf-8")), Path(words[1]), words[2])


if __name__ == "__main__":
    main()
