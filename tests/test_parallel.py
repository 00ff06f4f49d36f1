"""Work in flight: order, turns, and whose failure is reported."""

from __future__ import annotations

import threading
import time

import pytest
from threadpoolctl import threadpool_info

from refcurv.passes.parallel import Turnstile, run, stream


@pytest.mark.parametrize("in_flight", [1, 2, 5])
def test_results_come_in_order(in_flight: int) -> None:
    def work(n: int, item: int) -> int:
        time.sleep(0.002 * (item % 3))
        return n * 100 + item

    count = 0

    def done() -> None:
        nonlocal count
        count += 1

    assert run(range(20), work, in_flight=in_flight, done=done) == [n * 101 for n in range(20)]
    assert count == 20


@pytest.mark.parametrize("in_flight", [1, 2, 4])
def test_turns_are_taken_in_order(in_flight: int) -> None:
    gate, passed = Turnstile(), {"a": [], "b": []}

    def work(n: int, _: int) -> None:
        for point in ("a", "b"):
            time.sleep(0.001 * ((7 * n) % 4))
            with gate.turn(point, n):
                passed[point].append(n)

    run(range(30), work, in_flight=in_flight, turnstile=gate)
    assert passed == {"a": list(range(30)), "b": list(range(30))}


def test_the_failure_that_stopped_the_others_is_raised() -> None:
    """Item 1 fails while item 0 waits for a turn that will never come."""
    gate = Turnstile()

    def work(n: int, _: int) -> None:
        if n == 2:
            raise ValueError("the cause")
        with gate.turn("x", n + (n == 0)):  # item 0 waits for ordinal 1's turn for ever
            pass

    with pytest.raises(ValueError, match="the cause"):
        run(range(5), work, in_flight=3, turnstile=gate)


def test_nothing_starts_after_a_failure() -> None:
    started = []

    def work(n: int, _: int) -> None:
        started.append(n)
        raise ValueError(str(n))

    with pytest.raises(ValueError, match="0"):
        run(range(100), work, in_flight=1)
    assert len(started) <= 2


def test_results_that_nobody_takes_do_not_pile_up() -> None:
    finished, before = [], threading.active_count()
    results = stream(range(50), lambda n, _: finished.append(n), in_flight=2)
    next(results)
    time.sleep(0.1)
    assert len(finished) <= 4
    results.close()
    assert threading.active_count() <= before + 2


def test_work_runs_with_one_blas_thread_and_leaves_the_setting() -> None:
    def threads() -> set[int]:
        return {lib["num_threads"] for lib in threadpool_info() if lib["user_api"] == "blas"}

    before = threads()
    assert run([0], lambda *_: threads(), in_flight=1) == [{1}]
    assert threads() == before
