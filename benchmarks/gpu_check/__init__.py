"""``python -m benchmarks.gpu_check``: everything llmopt does on an NVIDIA GPU, checked and timed."""

from importlib.util import find_spec
from pathlib import Path

import llmopt

# a GPU machine's python has torch, Triton and transformers, and need not have llmopt installed: in a checkout the ops lie
# where setup.py takes them from
if find_spec("llmopt.ops") is None:
    llmopt.__path__.append(str(Path(__file__).parents[2] / "kernels"))
