"""llmopt: make a Hugging Face causal LM fast, and measure what each optimization gained."""

from __future__ import annotations

__version__ = "0.1.0"
