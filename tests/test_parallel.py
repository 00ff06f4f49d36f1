"""Work in flight: order, turns, and whose failure is reported."""

from __future__ import annotations

import threading
import time

import pytest
from threadpoolctl import threadpool_info, threadpool_limits

from refcurv.algebra.blas import one_blas_thread
from refcurv.passes.parallel import Stopped, Turnstile, run, stream


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


def test_nobody_passes_a_point_that_is_closed() -> None:
    """Whoever is inside leaves first, others wait; other points stay open."""
    gate, inside, leave, passed = Turnstile(), threading.Event(), threading.Event(), []
    seen: list[tuple[int, list[int]]] = []

    def work(n: int, _: int) -> None:
        with gate.turn("a", n):
            inside.set()
            if n == 0:
                leave.wait(20)
            passed.append(n)
        with gate.turn("b", n):
            pass

    def close() -> None:
        inside.wait(20)
        threading.Timer(0.05, leave.set).start()
        with gate.closed("a") as count:
            seen.append((count, list(passed)))
            time.sleep(0.05)
            seen.append((gate.passed("a"), list(passed)))

    closing = threading.Thread(target=close)
    closing.start()
    run(range(4), work, in_flight=3, turnstile=gate)
    closing.join()
    assert seen == [(1, [0]), (1, [0])]
    with gate.closed("a") as count:
        assert count == 4 and passed == [0, 1, 2, 3]


def test_what_has_passed_already_is_not_due() -> None:
    gate, due = Turnstile({"a": 3, "b": 1}), {"a": [], "b": []}

    def work(n: int, _: int) -> None:
        for point, found in due.items():
            with gate.turn(point, n + 1) as mine:
                found.append((n + 1, mine))

    run(range(4), work, in_flight=2, turnstile=gate)
    assert sorted(due["a"]) == [(1, False), (2, False), (3, True), (4, True)]
    assert sorted(due["b"]) == [(1, True), (2, True), (3, True), (4, True)]


def test_what_a_failure_left_half_done_is_not_handed_out() -> None:
    gate = Turnstile()
    with pytest.raises(ValueError, match="half"), gate.turn("a", 0):
        raise ValueError("half")
    with pytest.raises(Stopped), gate.closed("a"):
        pass


@pytest.mark.parametrize("kind", [KeyboardInterrupt, GeneratorExit, ValueError])
def test_an_interrupt_is_told_of_before_what_is_at_work_has_ended(kind) -> None:
    """So is a caller who takes no more results; a failure is not."""
    order: list[str] = []

    def work(n: int, _: int) -> None:
        if n == 1 and kind is not GeneratorExit:
            raise kind
        if n == 2:
            time.sleep(0.2)
            order.append("worked")

    found = stream(range(3), work, in_flight=2, stopping=lambda: order.append("told"))
    next(found)
    if kind is GeneratorExit:
        found.close()
    else:
        with pytest.raises(kind):
            list(found)
    assert order == (["worked"] if kind is ValueError else ["told", "worked"])


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


def blas_threads() -> set[int]:
    return {lib["num_threads"] for lib in threadpool_info() if lib["user_api"] == "blas"}


def test_threads_of_the_caller_share_the_limit() -> None:
    """One leaves while another is inside: that one keeps its single thread. The last undoes it."""
    entered, both, left, seen = *(threading.Event() for _ in range(3)), []

    def first() -> None:
        with one_blas_thread():
            entered.set()
            both.wait(60)
        left.set()

    def second() -> None:
        entered.wait(60)
        with one_blas_thread():
            both.set()
            left.wait(60)
            seen.append(blas_threads())

    with threadpool_limits(2):
        one, other = threading.Thread(target=first), threading.Thread(target=second)
        one.start()
        other.start()
        one.join(60)
        other.join(60)
        assert seen == [{1}] and blas_threads() == {2}


def test_work_runs_with_one_blas_thread_and_leaves_the_setting() -> None:
    before = blas_threads()
    assert run([0], lambda *_: blas_threads(), in_flight=1) == [{1}]
    assert blas_threads() == before
