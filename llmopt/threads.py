"""How many threads compute: one number for torch and for our kernels, which share torch's OpenMP pool."""

from __future__ import annotations

import os

from llmopt.errors import InputError

_MOST = 1024


def usable_cores() -> int:
    """Cores that this process may keep busy: its affinity mask, or what a cgroup grants it if that is less. At least 1."""
    from llmopt.measure.environment import core_limit, visible_cores

    limit = core_limit()
    return visible_cores() if limit is None else max(1, min(visible_cores(), int(limit)))


def get_num_threads() -> int:
    """Threads that torch and the kernels compute with when called from this thread."""
    import torch

    return torch.get_num_threads()


def set_num_threads(count: int | None = None) -> int:
    """Set the threads of torch and of the kernels; ``torch.set_num_threads`` does the same.

    torch starts with the cores of the affinity mask (or OMP_NUM_THREADS), and knows nothing of a cgroup's CPU quota.

    Args:
        count: 1 to 1024; None: :func:`usable_cores`, as they are now. More threads than cores are slower than too few.

    Returns:
        What has been set.

    Raises:
        InputError: a count that is no such number.
    """
    import torch

    if count is None:
        count = usable_cores()
    if type(count) is not int or not 1 <= count <= _MOST:
        raise InputError.argument("count", expected=f"1 to {_MOST}, or None", got=count)
    torch.set_num_threads(count)
    return count


def one_in_forked_children() -> None:
    """From now on a forked child starts with one thread.

    libgomp does not survive a fork: torch's loops and products would wait for threads that stayed in the parent. Our
    kernels see to themselves (kernels/cpu/threads.h).
    """
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=lambda: set_num_threads(1))
