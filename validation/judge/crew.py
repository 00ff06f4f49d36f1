"""Work by several processes, any of which may be killed: its piece is named, and tried again."""

from __future__ import annotations

import time
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from typing import Any

TRIES = 3
"""How often a piece may kill its process before it is given up."""

SERVES = 100
"""Pieces until a process is replaced, so that what it holds of memory is given back."""


@dataclass(frozen=True)
class Done:
    """One piece: its result; why it `raised`, in one line; how each process died that had it.

    It has a result, or it raised, or it is given up after TRIES deaths.
    """

    piece: Any
    result: Any = None
    raised: str = ""
    deaths: tuple[str, ...] = ()


@dataclass
class _Hand:
    """A process, and the piece that it is at."""

    process: Any
    pipe: Connection
    piece: Any = None
    since: float = 0.0
    served: int = 0
    why: str = field(default="")

    def give(self, piece: Any) -> None:
        self.piece, self.since, self.served = piece, time.monotonic(), self.served + 1
        with suppress(OSError):  # one that has died says so when it is read
            self.pipe.send(piece)

    def stop(self) -> str:
        """End the process; how it ended."""
        self.process.kill()
        self.process.join()
        self.pipe.close()
        return self.why or f"its process died with status {self.process.exitcode}"


def crew(
    work: Callable[[Any], Any],
    pieces: Iterable[Any],
    jobs: int,
    limit: float = 900.0,
    context: str = "spawn",
) -> Iterator[Done]:
    """work(piece) of every piece, as they are done; a piece over `limit` seconds is killed."""
    waiting, deaths = deque(pieces), dict[Any, list[str]]()
    made, hands = get_context(context), list[_Hand]()
    try:
        while waiting or any(hand.piece is not None for hand in hands):
            hands = _filled(made, work, hands, waiting, jobs)
            busy = [hand for hand in hands if hand.piece is not None]
            ready = wait([hand.pipe for hand in busy], timeout=1.0)
            for hand in busy:
                late = time.monotonic() - hand.since > limit
                if hand.pipe not in ready and not late:
                    continue
                piece, done = hand.piece, None if late else _received(hand)
                hand.piece = None
                if done is None:
                    hand.why = f"it took more than {limit:g} s" if late else ""
                    hands.remove(hand)
                    deaths.setdefault(piece, []).append(hand.stop())
                    if len(deaths[piece]) < TRIES:
                        waiting.append(piece)
                        continue
                yield Done(piece, *(done or (None, "")), tuple(deaths.get(piece, ())))
    finally:
        for hand in hands:
            hand.stop()


def _filled(
    made: Any, work: Callable[[Any], Any], hands: list[_Hand], waiting: deque[Any], jobs: int
) -> list[_Hand]:
    """So many processes, each with a piece as long as there are any."""
    tired = [hand for hand in hands if hand.piece is None and hand.served >= SERVES]
    for hand in tired:
        hand.stop()
    hands = [hand for hand in hands if hand not in tired]
    while len(hands) < jobs and len(hands) < len(waiting) + sum(h.piece is not None for h in hands):
        ours, theirs = made.Pipe()
        process = made.Process(target=_serve, args=(theirs, work), daemon=True)
        process.start()
        theirs.close()
        hands.append(_Hand(process, ours))
    for hand in hands:
        if waiting and hand.piece is None:
            hand.give(waiting.popleft())
    return hands


def _received(hand: _Hand) -> tuple[Any, str] | None:
    """(result, why it raised); None of a process that died."""
    try:
        return hand.pipe.recv()
    except (EOFError, OSError):
        return None


def _serve(pipe: Connection, work: Callable[[Any], Any]) -> None:
    """What a process does until it is ended."""
    while True:
        piece = pipe.recv()
        try:
            answer = work(piece), ""
        except Exception as error:
            last = traceback.extract_tb(error.__traceback__)[-1]
            answer = None, f"{type(error).__name__}: {error} ({last.name}, line {last.lineno})"
        pipe.send(answer)
