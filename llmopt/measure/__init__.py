"""Timing, memory, quality, machine ceilings, and the receipt they end in. Import the submodule you need."""
