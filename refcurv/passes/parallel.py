"""Shards in flight: several at a time, and the same bits as one after the other."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Generator, Hashable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, TypeVar

from refcurv.algebra import buffers
from refcurv.algebra.blas import one_blas_thread
from refcurv.passes.groups import cores

Item = TypeVar("Item")
Result = TypeVar("Result")


class Stopped(Exception):
    """Another piece of work failed or was interrupted; this one gives up quietly."""


class Turnstile:
    """Lets pieces of work pass a named point one by one, in the order of their ordinals.

    Sums folded inside `turn` are folded in that order. So the number of workers changes no bit, and
    no worker needs to hold a partial total.

    Args:
        passed: how many have passed each point already, in a run that this one goes on from.
    """

    def __init__(self, passed: Mapping[Any, int] | None = None) -> None:
        self._condition = threading.Condition()
        self._next: dict[Hashable, int] = dict(passed or {})
        self._inside: set[Hashable] = set()
        self._closed: set[Hashable] = set()
        self._stopped = self._torn = False

    @contextmanager
    def turn(self, point: Hashable, ordinal: int) -> Iterator[bool]:
        """Wait until all ordinals below this one have left `point`; then pass.

        False for one that has passed already: what it would add is there.
        """
        with self._condition:
            self._condition.wait_for(lambda: self._stopped or self._is_open(point, ordinal))
            if self._stopped:
                raise Stopped
            due = self._next.get(point, 0) == ordinal
            if due:
                self._inside.add(point)
        left = False
        try:
            yield due
            left = True
        finally:
            if due:
                with self._condition:
                    self._next[point] = ordinal + left
                    self._torn |= not left
                    self._inside.discard(point)
                    self._condition.notify_all()

    def _is_open(self, point: Hashable, ordinal: int) -> bool:
        due = self._next.get(point, 0)
        return due > ordinal or (due == ordinal and point not in self._closed)

    def passed(self, point: Hashable) -> int:
        """How many have passed a point."""
        with self._condition:
            return self._next.get(point, 0)

    @contextmanager
    def closed(self, point: Hashable) -> Iterator[int]:
        """Within, nobody passes `point`; yields how many have passed it.

        Raises:
            Stopped: somebody failed inside a turn, and may have left half of a sum.

        Proof: tests/test_parallel.py::test_nobody_passes_a_point_that_is_closed
        """
        try:
            with self._condition:
                self._closed.add(point)
                self._condition.wait_for(lambda: point not in self._inside)
                if self._torn:
                    raise Stopped
                passed = self._next.get(point, 0)
            yield passed
        finally:
            with self._condition:
                self._closed.discard(point)
                self._condition.notify_all()

    def stop(self) -> None:
        """Wake everybody who waits, and let nobody pass any more."""
        with self._condition:
            self._stopped = True
            self._condition.notify_all()


def stream(
    items: Iterable[Item],
    work: Callable[[int, Item], Result],
    *,
    in_flight: int | None = None,
    turnstile: Turnstile | None = None,
    stopping: Callable[[], object] = lambda: None,
) -> Generator[Result, None, None]:
    """Do `work(ordinal, item)` for every item on threads; results in order, BLAS on one thread.

    Items start in order. At most `in_flight` + 1 results (by default one per core, and one) wait to
    be taken. Under a limit of the address space there are as many threads as it has room for.

    The first failure, or Ctrl-C, stops the others and is raised here. After Ctrl-C, and where
    nobody takes the results any more, `stopping` is called before what is at work has ended.
    """
    gate, workers = turnstile or Turnstile(), buffers.with_buffers(in_flight or cores())

    def guarded(ordinal: int, item: Item) -> Result:
        try:
            return work(ordinal, item)
        except BaseException:
            gate.stop()
            raise

    pending: deque[Future[Result]] = deque()
    with one_blas_thread(), ThreadPoolExecutor(workers) as pool:
        try:
            for ordinal, item in enumerate(items):
                pending.append(pool.submit(guarded, ordinal, item))
                if len(pending) > workers:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        except BaseException as error:
            gate.stop()
            for future in pending:
                future.cancel()
            if isinstance(error, KeyboardInterrupt | GeneratorExit):
                stopping()
            raise _first_cause(pending, error)  # noqa: B904


def run(
    items: Sequence[Item],
    work: Callable[[int, Item], Result],
    *,
    in_flight: int | None = None,
    turnstile: Turnstile | None = None,
    done: Callable[[], object] = lambda: None,
) -> list[Result]:
    """All results of `stream`; `done` is called once per result (a progress bar's update)."""
    results = []
    for result in stream(items, work, in_flight=in_flight, turnstile=turnstile):
        results.append(result)
        done()
    return results


def _first_cause(pending: Iterable[Future[Result]], error: BaseException) -> BaseException:
    """The failure behind a Stopped: an item gives up quietly because another one failed."""
    if not isinstance(error, Stopped):
        return error
    for future in pending:
        cause = None if future.cancelled() else future.exception()
        if cause is not None and not isinstance(cause, Stopped):
            return cause
    return error
