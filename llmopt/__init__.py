"""llmopt: make a Hugging Face causal LM fast, and measure what each optimization gained.

import llmopt
model = llmopt.optimize(model)
llmopt.report(model).print()
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from llmopt import errors

__version__ = "0.1.0"

if TYPE_CHECKING:
    from llmopt.loop import optimize
    from llmopt.measure.comparison import Comparison
    from llmopt.measure.report import Report
    from llmopt.threads import get_num_threads, set_num_threads
    from llmopt.verbs import compare, load, report, restore, save

__all__ = [
    "Comparison", "Report", "compare", "errors", "get_num_threads", "load", "optimize", "report", "restore", "save",
    "set_num_threads",
]  # fmt: skip

_HOME = dict.fromkeys(("compare", "load", "report", "restore", "save"), "llmopt.verbs")
_HOME |= dict.fromkeys(("get_num_threads", "set_num_threads"), "llmopt.threads")
_HOME |= {"optimize": "llmopt.loop", "Report": "llmopt.measure.report", "Comparison": "llmopt.measure.comparison"}


def __getattr__(name: str) -> Any:
    # torch and transformers take seconds to import: `import llmopt` alone, and `llmopt --help`, stay instant
    if name not in _HOME:
        raise AttributeError(f"module 'llmopt' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOME[name]), name)
