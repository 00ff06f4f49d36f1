"""Long runs of variations: what dies is named and replaced, and what was found is kept."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from validation.judge import crew as crews
from validation.judge.crew import crew
from validation.judge.legitimate import Outcome, cut_off, read, settled

ONCE, ALWAYS, RAISES, SLOW = 3, 5, 7, 8


def work(piece):
    number, folder = piece
    first = not (Path(folder) / str(number)).exists()
    (Path(folder) / str(number)).touch()
    if number == ALWAYS or (number == ONCE and first):
        os.kill(os.getpid(), signal.SIGKILL)
    if number == RAISES:
        raise ValueError("no such model")
    if number == SLOW and first:
        time.sleep(60)
    return number**2


@pytest.mark.parametrize("jobs", [1, 3])
def test_a_process_that_dies_is_named_and_its_piece_tried_again(jobs, tmp_path, monkeypatch):
    monkeypatch.setattr(crews, "SERVES", 4)
    pieces = [(n, str(tmp_path)) for n in range(10)]
    found = {one.piece[0]: one for one in crew(work, pieces, jobs, limit=0.5, context="fork")}
    assert sorted(found) == list(range(10))
    for number, one in found.items():
        if number not in (ALWAYS, RAISES):
            assert one.result == number**2 and not one.raised
        assert len(one.deaths) == {ONCE: 1, ALWAYS: 3, SLOW: 1}.get(number, 0)
    assert "status -9" in found[ONCE].deaths[0] and "more than 0.5 s" in found[SLOW].deaths[0]
    assert found[ALWAYS].result is None
    assert found[RAISES].raised == "ValueError: no such model (work, line 29)"


def test_what_dies_or_raises_is_a_false_alarm():
    done = crews.Done(4, None, "", ("its process died with status -9",) * 3)
    assert "status -9" in settled(done).alarm
    assert settled(crews.Done(4, None, "KeyError: 'x'")).alarm == "raised KeyError: 'x'"
    fine = Outcome(4, ("gauge", "all"), "", False, False)
    assert settled(crews.Done(4, fine)) is fine


def test_a_run_goes_on_from_the_records_of_its_code(tmp_path):
    path = tmp_path / "records.jsonl"
    one = (
        '{"code": "a", "seed": 3, "ways": ["all"], "alarm": "", "undecided": true, "missed": false}'
    )
    path.write_text(one + "\n" + one.replace('"a"', '"b"') + "\n" + one[:40])
    assert read(path, "a") == {3: Outcome(3, ("all",), "", True, False)}
    assert cut_off(path) == "\n" and read(tmp_path / "none", "a") == {}
    path.write_text(one + "\n")
    assert cut_off(path) == ""
