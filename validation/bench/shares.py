"""Where the time of a collection goes, found by looking at it a thousand times a second.

A thread notes which line of refcurv runs in every other thread. Products, kernels and syrk run
without the interpreter's lock, so that they are seen as they run. Nothing is wrapped, so that
nothing is slower, and a function that is renamed shows up by its new name under `the rest`.
"""

from __future__ import annotations

import re
import sys
import threading
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from types import FrameType

from validation.bench.candidates import OURS, Subject, refcurv
from validation.bench.measuring import Record, measured
from validation.bench.proxies import Size

LOOK = 1e-3
"""Seconds between two looks."""

RULES = (
    ("what rounding does (NEGATIVE)", r"passes\.rounding:"),
    ("digest of the weights", r"files\.digest:"),
    ("products of the head", r"^(\S+ ){0,2}\S*:linear_\w+ .*:head_transpose"),
    ("products forward", r"^(\S+ ){0,2}\S*:linear_forward"),
    ("products backward", r"^(\S+ ){0,2}\S*:linear_backward"),
    ("attention", r"passes\.\S*attention"),
    ("xᵀ x (syrk)", r"^\S*:add_gram|^algebra\.gram:"),
    ("fold to float64", r"^curvature\.moments:(add|close) |fold"),
    ("mirror, finiteness", r"curvature\.(moments|factors):_?finish"),
    ("cross-entropy and drawing", r"model\.(loss|fisher|sampling):"),
    ("norms, rotary, gate, residuals", r"passes\.fast:|model\.(layers|transformer):"),
)
"""What a look is counted as: the first that fits the stack, innermost first, written as
"module:function module:function ..."."""
REST = "the rest"
BEFORE = {
    "all": {
        "products forward": 0.207, "products backward": 0.169, "xᵀ x (syrk)": 0.288,
        "products of the head": 0.050, "attention": 0.113,
        "norms, rotary, gate, residuals": 0.027, "cross-entropy and drawing": 0.020,
        "fold to float64": 0.086, "mirror, finiteness": 0.039,
    },
    "upper": {
        "products forward": 0.426, "products backward": 0.084, "xᵀ x (syrk)": 0.160,
        "products of the head": 0.104, "attention": 0.125,
        "norms, rotary, gate, residuals": 0.035, "cross-entropy and drawing": 0.037,
        "fold to float64": 0.006, "mirror, finiteness": 0.021,
    },
}  # fmt: skip
"""Shares of 7.83 s and 3.45 s, one thread of an AMD EPYC, 2026-11-27, commit c93c6da. Found by
wrapping functions: what the rest is there is spread over these."""


def category(stack: str) -> str:
    """Which of the rules a stack falls under."""
    return next((name for name, rule in RULES if re.search(rule, stack)), REST)


def shares(folder: Path, size: Size, blocks: list[int], threads: int, rounds: int) -> Record:
    """{category: share of the seconds that were seen}, and the stacks of the rest."""
    candidate = refcurv(Subject(folder, size, tuple(blocks), threads))
    candidate.collect(None)
    seen: Counter[str] = Counter()
    times: list[Record] = []
    for _ in range(rounds):
        one: Record = {}
        with measured(one, "pass"), _Looking(seen):
            candidate.collect(None)
        times.append(one["pass"])
    total = sum(seen.values())
    by: Counter[str] = Counter()
    rest: Counter[str] = Counter()
    for stack, seconds in seen.items():
        by[category(stack)] += seconds / total
        if category(stack) == REST:
            rest[stack.split(" ")[0]] += seconds / total
    return {
        "times": {OURS: times},
        "shares": dict(by.most_common()),
        "rest": dict(rest.most_common(10)),
        "seen": total / rounds,
    }


class _Looking:
    """A thread that adds the seconds since its last look to the stack of each working thread."""

    def __init__(self, seen: Counter[str]) -> None:
        self._seen, self._stop = seen, threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> None:
        self._before = sys.getswitchinterval()
        sys.setswitchinterval(LOOK / 10)
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        sys.setswitchinterval(self._before)

    def _run(self) -> None:
        last = time.perf_counter()
        while not self._stop.wait(LOOK):
            now = time.perf_counter()
            for number, frame in sys._current_frames().items():
                if number != threading.get_ident() and (stack := _stack(frame)):
                    self._seen[stack] += now - last
            last = now


ROOT = str(Path(__file__).resolve().parents[2] / "refcurv")
WAITING = ("threading.py", "queue.py", "selectors.py")


def _stack(frame: FrameType) -> str:
    """Functions of refcurv, innermost first; empty for a thread that waits or is not ours."""
    if frame.f_code.co_filename.endswith(WAITING):
        return ""
    names: list[str] = []
    at: FrameType | None = frame
    while at is not None:
        with suppress(ValueError):
            path = Path(at.f_code.co_filename).relative_to(ROOT)
            names.append(f"{'.'.join(path.with_suffix('').parts)}:{at.f_code.co_name}")
        at = at.f_back
    return " ".join(names)
