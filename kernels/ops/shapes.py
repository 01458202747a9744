"""Linear shapes of published models, ``(out_features, in_features)``, for tests and benchmarks."""

from __future__ import annotations

QWEN3_0_6B = {"q": (2048, 1024), "kv": (1024, 1024), "o": (1024, 2048), "gate_up": (3072, 1024), "down": (1024, 3072)}
QWEN3_8B = {"q": (4096, 4096), "kv": (1024, 4096), "o": (4096, 4096), "gate_up": (12288, 4096), "down": (4096, 12288)}
ERNIE_4_5_0_3B = {
    "q": (2048, 1024),
    "kv": (256, 1024),
    "o": (1024, 2048),
    "gate_up": (3072, 1024),
    "down": (1024, 3072),
}
DEEPSEEK_V2_LITE = {
    "dense_down": (2048, 10944),
    "expert_gate": (1408, 2048),
    "expert_down": (2048, 1408),
    "q": (3072, 2048),
}
HEAD_QWEN3_0_6B = (151936, 1024)
