"""``python -m benchmarks.gpu_check``: everything llmopt does on an NVIDIA GPU, checked and timed."""
