"""OpenVINO on the CPU, from a directory that optimum-cli exported.

    python -m benchmarks.peers.workers.openvino_int4 EXPORTED_DIR THREADS

The exported graph gives logits of every position. As OpenVINO's own generation library does, only the last one is kept,
before the head: a prompt of 4096 tokens would otherwise pay for 4096 rows of logits that nobody reads.
"""

from __future__ import annotations

import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
from openvino import opset13 as ops

from benchmarks.peers.workers import serve

_VOCABULARY = 1000  # ids to draw from; any will do


class OpenVinoEngine:
    """One compiled model with its cache inside (stateful)."""

    def __init__(self, folder: Path, threads: int) -> None:
        model = ov.Core().read_model(folder / "openvino_model.xml")
        self._weights = weights_of(model)
        self.keeps_last = keep_last_position(model)
        settings = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
        compiled = ov.Core().compile_model(model, "CPU", settings)
        self.settings = {
            key: str(compiled.get_property(key))
            for key in ("INFERENCE_NUM_THREADS", "KV_CACHE_PRECISION", "DYNAMIC_QUANTIZATION_GROUP_SIZE",
                        "INFERENCE_PRECISION_HINT")
        }  # fmt: skip
        self._names = {port.get_any_name() for port in compiled.inputs}
        self._request = compiled.create_infer_request()
        self._rng = np.random.default_rng(0)

    def info(self) -> dict[str, Any]:
        packages = ("openvino", "optimum-intel", "nncf", "transformers")
        return {
            "versions": {name: metadata.version(name) for name in packages},
            "settings": self.settings,
            "head": "last position only" if self.keeps_last else "all positions: the graph has another form",
            "weights": self._weights,
        }

    def run(self, depth: int, tokens: int, sequences: int) -> tuple[float, float]:
        self._request.reset_state()
        started = time.perf_counter()
        self._step(sequences, depth, 0)
        read = time.perf_counter()
        for position in range(depth, depth + tokens):
            self._step(sequences, 1, position)
        return read - started, time.perf_counter() - read

    def _step(self, sequences: int, count: int, past: int) -> None:
        inputs = {
            "input_ids": self._rng.integers(0, _VOCABULARY, (sequences, count)),
            "attention_mask": np.ones((sequences, past + count), np.int64),
            "position_ids": np.tile(np.arange(past, past + count, dtype=np.int64), (sequences, 1)),
            "beam_idx": np.arange(sequences, dtype=np.int32),
        }
        self._request.infer({name: value for name, value in inputs.items() if name in self._names})


def keep_last_position(model: Any) -> bool:
    """Slice the hidden states to the last position in front of the head. False, and no change, if it is not found."""
    node = model.output("logits").get_node().input_value(0).get_node()
    while node.get_type_name() in ("Convert", "Reshape", "Transpose"):
        node = node.input_value(0).get_node()
    if node.get_type_name() != "MatMul":
        return False
    hidden = node.input(0)
    last = ops.slice(hidden.get_source_output(), [-1], [np.iinfo(np.int64).max], [1], [1])
    hidden.replace_source_output(last.output(0))
    model.validate_nodes_and_infer_types()
    return True


def weights_of(model: Any) -> list[dict[str, Any]]:
    """What the file stores: each large constant, with its scales, by role."""
    found = []
    for node in model.get_ordered_ops():
        if node.get_type_name() != "Constant" or len(node.get_output_shape(0)) < 2 or not node.get_byte_size():
            continue
        name, kind = node.get_friendly_name(), node.get_element_type().get_type_name()
        is_scale = name.endswith(("scale", "zero_point", "fq_weights_1/scale"))
        numel = int(np.prod(node.get_output_shape(0)))
        found.append((_role(name), "scales" if is_scale else kind, 0 if is_scale else numel, node.get_byte_size()))
    return serve.weight_rows(found)


def _role(name: str) -> str:
    if "embed_tokens" in name:
        return "head"  # tied: the same constant is the head's
    if "lm_head" in name:
        return "head"
    return "linear" if "layers." in name and "norm" not in name else "other"


def main() -> None:
    serve.die_with_parent()
    replies = serve.private_stdout()
    serve.serve(OpenVinoEngine(Path(sys.argv[1]), int(sys.argv[2])), replies)


if __name__ == "__main__":
    main()
