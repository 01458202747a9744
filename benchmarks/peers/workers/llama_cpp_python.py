"""llama.cpp through llama-cpp-python's C interface.

    python -m benchmarks.peers.workers.llama_cpp_python MODEL.gguf THREADS SEQUENCES CONTEXT

No token is sampled: logits of the last position are computed, and the next token is random. That is a little less work
than ``generate`` does.
"""

from __future__ import annotations

import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import numpy as np

from benchmarks.peers.workers import serve

_BATCH, _MICRO_BATCH = 2048, 512
_VOCABULARY = 1000  # ids to draw from; any will do


class LlamaCppEngine:
    """One model and one context, whose cache is cleared for every job."""

    def __init__(self, path: Path, threads: int, sequences: int, context: int) -> None:
        self.path, self.threads = path, threads
        llama_cpp.llama_backend_init()
        settings = llama_cpp.llama_model_default_params()
        settings.n_gpu_layers = 0
        self._model = llama_cpp.llama_model_load_from_file(str(path).encode(), settings)
        if not self._model:
            raise RuntimeError(f"llama.cpp does not load {path.name}")
        options = llama_cpp.llama_context_default_params()
        options.n_ctx, options.n_batch, options.n_ubatch = context, _BATCH, _MICRO_BATCH
        options.n_seq_max, options.kv_unified = sequences, True
        options.n_threads = options.n_threads_batch = threads
        self.flash_attention = int(options.flash_attn_type)
        self._context = llama_cpp.llama_init_from_model(self._model, options)
        if not self._context:
            raise RuntimeError(f"llama.cpp makes no context of {context} tokens")
        self._memory = llama_cpp.llama_get_memory(self._context)
        self._batch = llama_cpp.llama_batch_init(_BATCH, 0, sequences)
        self._rng = np.random.default_rng(0)

    def info(self) -> dict[str, Any]:
        system = llama_cpp.llama_print_system_info().decode()
        return {
            "versions": {name: metadata.version(name) for name in ("llama_cpp_python", "gguf")},
            "system": system,
            "flash_attention": {-1: "auto", 0: "off", 1: "on"}.get(self.flash_attention, self.flash_attention),
            "threads": self.threads,
            "weights": weights_of(self.path),
        }

    def run(self, depth: int, tokens: int, sequences: int) -> tuple[float, float]:
        llama_cpp.llama_memory_clear(self._memory, True)
        started = time.perf_counter()
        for sequence in range(sequences):
            for begin in range(0, depth, _BATCH):
                end = min(depth, begin + _BATCH)
                self._decode([(position, sequence, position == depth - 1) for position in range(begin, end)])
        read = time.perf_counter()
        for position in range(depth, depth + tokens):
            self._decode([(position, sequence, True) for sequence in range(sequences)])
        return read - started, time.perf_counter() - read

    def _decode(self, items: list[tuple[int, int, bool]]) -> None:
        """Run one batch of ``(position, sequence, are its logits wanted)``."""
        batch, ids = self._batch, self._rng.integers(0, _VOCABULARY, len(items))
        batch.n_tokens = len(items)
        for i, (position, sequence, is_wanted) in enumerate(items):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = int(ids[i]), position, 1, is_wanted
            batch.seq_id[i][0] = sequence
        failed = llama_cpp.llama_decode(self._context, batch)
        if failed:
            raise RuntimeError(f"llama_decode returned {failed}")
        llama_cpp.llama_synchronize(self._context)


def weights_of(path: Path) -> list[dict[str, Any]]:
    """What the file stores, by role."""
    tensors = gguf.GGUFReader(str(path)).tensors
    is_tied = all(t.name != "output.weight" for t in tensors)
    return serve.weight_rows(
        [(_role(t.name, is_tied), t.tensor_type.name, int(t.n_elements), int(t.n_bytes)) for t in tensors]
    )


def _role(name: str, is_tied: bool) -> str:
    if name == "output.weight" or (name == "token_embd.weight" and is_tied):
        return "head"
    if name == "token_embd.weight":
        return "embedding"
    if name.endswith("_exps.weight"):
        return "experts"
    return "other" if "norm" in name or "gate_inp" in name or name.endswith("bias") else "linear"


def main() -> None:
    serve.die_with_parent()
    replies = serve.private_stdout()
    path, threads, sequences, context = Path(sys.argv[1]), *(int(word) for word in sys.argv[2:5])
    serve.serve(LlamaCppEngine(path, threads, sequences, context), replies)


if __name__ == "__main__":
    main()
