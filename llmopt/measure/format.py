"""Numbers as people read them: three significant digits, the unit in the heading, intervals beside the value."""

from __future__ import annotations

import math

from llmopt.measure.report import Interval

NONE = "-"


def number(x: float | None) -> str:
    """Three significant digits without an exponent where that stays short: 1234, 62.1, 0.0123, 4.5e-06."""
    if x is None:
        return NONE
    if not math.isfinite(x):
        return str(x)
    if x == 0:
        return "0"
    if abs(x) < 1e-3:
        return f"{x:.1e}"
    return f"{x:.{_decimals(x)}f}"


def interval(value: Interval | None) -> str:
    """``62.1 [61.0, 63.4]``, all three with the decimals of the value."""
    if value is None:
        return NONE
    d = _decimals(value.value)
    return f"{value.value:.{d}f} [{value.low:.{d}f}, {value.high:.{d}f}]"


def ratio(value: Interval | None) -> str:
    """``3.87x [3.70, 4.02]``; three decimals close to 1; a leading ``≈`` says that the interval contains 1."""
    if value is None:
        return NONE
    precise = abs(value.value - 1) < 0.1 and value.high - value.low < 0.2
    d = 3 if precise else 2 if value.value < 10 else 1
    sign = "" if value.excludes(1.0) else "≈"
    return f"{sign}{value.value:.{d}f}x [{value.low:.{d}f}, {value.high:.{d}f}]"


def times(x: float | None) -> str:
    """``3.87x`` without an interval."""
    return NONE if x is None else f"{x:.2f}x" if x < 100 else f"{x:.0f}x"


def size(num_bytes: float | None) -> str:
    """Decimal units, as in GB/s: ``1.19 GB``, ``335 MB``, ``12.3 kB``."""
    if num_bytes is None:
        return NONE
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if num_bytes >= scale:
            return f"{number(num_bytes / scale)} {unit}"
    return f"{num_bytes:.0f} B"


def percent(fraction: float | None, decimals: int = 1) -> str:
    return NONE if fraction is None else f"{100 * fraction:.{decimals}f}%"


def count(x: float | None) -> str:
    """A large count with thousands separated: ``12,300``; rounded to three digits from 1000 on."""
    if x is None:
        return NONE
    if not math.isfinite(x):
        return str(x)
    if abs(x) >= 1000:
        x = round(x, 2 - math.floor(math.log10(abs(x))))
    return f"{x:,.0f}"


def parameters(n: float | None) -> str:
    """``596 M`` or ``21.8 B``."""
    if n is None:
        return NONE
    for unit, scale in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if n >= scale:
            return f"{number(n / scale)} {unit}"
    return f"{n:.0f}"


def _decimals(x: float) -> int:
    """Decimals that leave three significant digits, never more than four."""
    return 0 if x == 0 else min(4, max(0, 2 - math.floor(math.log10(abs(x)))))
