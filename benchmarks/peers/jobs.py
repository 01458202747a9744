"""What is timed: requests of a depth, one by one or several together. A job is one call; a cell is one figure of it."""

from __future__ import annotations

import re
from dataclasses import dataclass

DEFAULT_JOBS = "128,512,4096,8x128"
_WORD = re.compile(r"(?:(\d+)x)?(\d+)")


@dataclass(frozen=True, slots=True)
class Times:
    """Seconds of one job: reading the prompts, then generating ``tokens`` tokens for every sequence."""

    prefill_s: float
    decode_s: float


@dataclass(frozen=True, slots=True)
class Job:
    """``sequences`` prompts of ``depth`` tokens together, then ``tokens`` tokens each."""

    depth: int
    tokens: int = 32
    sequences: int = 1

    @property
    def cells(self) -> tuple[str, ...]:
        """Names of its figures. Prompts read together say nothing that one long prompt does not, so those have one."""
        if self.sequences > 1:
            return (f"decode {self.sequences}x{self.depth}",)
        return f"prefill {self.depth}", f"decode {self.depth}"

    def rates(self, times: Times) -> dict[str, float]:
        """Cell -> tokens a second, of all sequences together."""
        decode = self.sequences * self.tokens / times.decode_s
        if self.sequences > 1:
            return {self.cells[0]: decode}
        return dict(zip(self.cells, (self.depth / times.prefill_s, decode), strict=True))

    def at_least_s(self, other: Job, times: Times) -> float:
        """What this job will take at least, from the times of a smaller one: attention only makes it more."""
        prefill = times.prefill_s * (self.depth * self.sequences) / (other.depth * other.sequences)
        return prefill + times.decode_s * self.tokens / other.tokens


def parse(words: str, tokens: int = 32) -> tuple[Job, ...]:
    """``"128,512,8x128"`` as jobs, small ones first: the small ones foretell whether the large ones take too long.

    Jobs of several sequences generate half as many tokens each.

    Raises:
        ValueError: a word is none of ``DEPTH`` and ``SEQUENCESxDEPTH``.
    """
    jobs = []
    for word in words.split(","):
        found = _WORD.fullmatch(word.strip())
        if found is None or int(found[2]) < 1:
            raise ValueError(f"cells: expected DEPTH or SEQUENCESxDEPTH, such as {DEFAULT_JOBS}, got {word!r}")
        sequences = int(found[1] or 1)
        jobs.append(Job(int(found[2]), tokens if sequences == 1 else max(1, tokens // 2), sequences))
    return tuple(sorted(dict.fromkeys(jobs), key=lambda job: job.depth * job.sequences))
