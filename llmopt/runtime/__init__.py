"""What runs a fused model: the KV cache, the decoder as calls of our ops, and the loop behind ``generate``."""
