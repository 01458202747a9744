"""Reading and writing checkpoints: standard Hugging Face directories in the GPTQ format, plus ``llmopt.json``."""

from __future__ import annotations

from llmopt.checkpoint.reader import load, recorded_passes, recorded_report
from llmopt.checkpoint.writer import save

__all__ = ["load", "recorded_passes", "recorded_report", "save"]
