"""Errors a caller can catch. Each names the argument or object, what was expected and what came.

Every class also derives from the built-in a caller would guess, so ``except ValueError`` works too.
"""

from __future__ import annotations


class LlmoptError(Exception):
    """Base of everything llmopt raises on purpose."""


class InputError(LlmoptError, ValueError):
    """An argument cannot be used. Nothing has been changed."""

    @classmethod
    def argument(cls, name: str, *, expected: str, got: object) -> InputError:
        return cls(f"{name}: expected {expected}, got {got!r}")


class UnsupportedModelError(InputError):
    """The model is not a causal LM of a supported family."""


class ModelStateError(InputError):
    """The model is of a supported family, but not in a state that can be optimized (training mode, meta tensors...)."""


class CheckpointError(LlmoptError, ValueError):
    """A checkpoint directory is missing, malformed, inconsistent or unsafe to read."""


class CalibrationError(InputError):
    """The calibration data cannot be used."""


class QuantizationError(LlmoptError, ArithmeticError):
    """Numbers went wrong during quantization (NaN, Inf, a Hessian that cannot be factorised); names the layer."""


class PassError(LlmoptError, RuntimeError):
    """A pass failed half-way, or did not apply under ``strict=True``. The model has been rolled back."""


class NativeLibraryError(LlmoptError, RuntimeError):
    """The compiled kernel library is missing or cannot be loaded."""


class MissingDependencyError(LlmoptError, ImportError):
    """An optional package is needed; the message carries the pip line."""
