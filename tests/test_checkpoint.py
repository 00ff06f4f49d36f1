"""Checkpoints of a collection: taken by time, while shards are in flight, and on an interrupt."""

from __future__ import annotations

import errno
import io
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from strategies import config, random_parameters

import refcurv as rc
from refcurv.cli import main
from refcurv.curvature import accumulate, checkpoint, factors
from refcurv.curvature.checkpoint import Checkpoint, Pace
from refcurv.curvature.moments import RunningSum
from refcurv.files import disk, store
from refcurv.law import conventions
from refcurv.law.checks import SchemaError
from refcurv.passes import rounding

LAYERS = "blocks.1.mlp.{gate,up},embed"


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A collection of 9 shards in two blocks, its checkpoint, and the whole result."""
    monkeypatch.setattr(conventions, "SHARD_TOKENS", 8)  # one sequence to a shard
    for module in (accumulate, rounding):
        monkeypatch.setattr(module, "BLOCK_SHARDS", 6)
    made = config(biases=("up",))
    rc.save(rc.Model(made, random_parameters(made, 1)), tmp_path / "w.h5")
    tokens = np.random.default_rng(0).integers(0, 7, (9, 8))
    rc.save_corpus(rc.Corpus(tokens), tmp_path / "c.h5")
    model, corpus = rc.load(tmp_path / "w.h5"), rc.load_corpus(tmp_path / "c.h5")
    state = tmp_path / "f.h5.unfinished"

    def collect(draws: int = 1, in_flight: int = 3, **choices: object) -> rc.Factors:
        return rc.collect(
            model, corpus, LAYERS, "sampled", 0, draws,
            in_flight=in_flight, checkpoint=state, **choices,
        )  # fmt: skip

    def whole(draws: int = 1, halves: bool = False) -> rc.Factors:
        return rc.collect(model, corpus, LAYERS, "sampled", 0, draws, halves=halves)

    return SimpleNamespace(folder=tmp_path, state=state, collect=collect, whole=whole)


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint after every shard."""
    monkeypatch.setattr(checkpoint, "LEAST_SECONDS", 0.0)
    monkeypatch.setattr(checkpoint, "MOST_SHARE", 0)


def same_bits(one: rc.Factors, other: rc.Factors) -> None:
    for name in one:
        sums = ("sum_A", "n_A", "sum_a", "sum_G", "n_G", "half_mu", "half_lam")
        for part in (*sums, "error_G", "rounding_G", "noise_G"):
            a, b = getattr(one[name], part), getattr(other[name], part)
            assert np.asarray(a).tobytes() == np.asarray(b).tobytes(), (name, part)


# ------------------------------------------------------------------ when


def test_the_pace_is_two_minutes_or_twenty_times_what_the_last_one_took(monkeypatch) -> None:
    now = [1000.0]
    monkeypatch.setattr(checkpoint, "time", SimpleNamespace(monotonic=lambda: now[0]))
    pace = Pace()

    def due_after(seconds: float) -> bool:
        begin, now[0] = now[0], now[0] + seconds
        due, now[0] = pace.due(), begin
        return due

    assert not due_after(119.9) and due_after(120)
    for took, wait in ((1, 120), (6, 120), (7, 140), (60, 1200)):
        with pytest.raises(OSError), pace.writing():  # one that failed took its time too
            now[0] += took
            raise OSError
        assert not due_after(wait - 0.1) and due_after(wait)


def test_a_short_run_writes_its_sums_once(run, monkeypatch) -> None:
    calls = []
    monkeypatch.setattr(
        Checkpoint, "save", lambda *a, right=Checkpoint.save: calls.append(right(*a))
    )
    run.collect()
    assert len(calls) == 1 and store.open_file(run.state).attributes["blocks"] == 2


# ------------------------------------------------------------------ any of them will do


@pytest.mark.parametrize("draws", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_every_checkpoint_within_a_block_leads_to_the_same_bits(
    draws: int, run, always, monkeypatch
) -> None:
    """As SIGKILL would leave it: sums of 9 shards and of halves, in two blocks, three in flight.

    Folding takes its time, so that at a checkpoint some sums have shards that others lack.
    """
    rng, right, kept = np.random.default_rng(0), RunningSum.add, []
    waits = iter(rng.uniform(0, 0.004, 10_000))

    def slow(self: RunningSum, *arguments: object) -> None:
        time.sleep(next(waits))
        right(self, *arguments)  # type: ignore[arg-type]

    def copying(self: Checkpoint, *arguments: object, save=Checkpoint.save) -> None:
        save(self, *arguments)
        kept.append(shutil.copy(self.path, run.folder / f"{len(kept)}.h5"))

    want = run.whole(draws, halves=True)
    with monkeypatch.context() as patch:
        patch.setattr(RunningSum, "add", slow)
        patch.setattr(Checkpoint, "save", copying)
        same_bits(want, run.collect(draws, halves=True))
    places = [store.open_file(path) for path in kept]
    counts = [{i.attributes.get("shards", 0) for i in p.entries.values()} for p in places]
    assert any(len(count - {0, 1}) > 1 for count in counts), "all sums had the same shards"
    assert {p.attributes["blocks"] for p in places} == {0, 1, 2}
    assert len(kept) > 8
    monkeypatch.setattr(checkpoint, "LEAST_SECONDS", 1e9)
    for path in kept[1:-1:2]:
        shutil.copy(path, run.state)
        same_bits(want, run.collect(draws, halves=True))


def test_what_is_in_a_checkpoint_is_not_computed_again(run, monkeypatch) -> None:
    """Sums of different lengths: the run begins with the first shard that one of them lacks."""
    swept: list[int] = []
    right = factors.sweep

    def counting(config, parameters, shard, job, take) -> None:
        swept.append(shard.number)
        if shard.number == 7 and len(swept) == 8:
            raise KeyboardInterrupt
        right(config, parameters, shard, job, take)

    monkeypatch.setattr(factors, "sweep", counting)
    with pytest.raises(KeyboardInterrupt):
        run.collect(in_flight=1)
    assert swept[:8] == list(range(8))  # the worker may have begun the next one
    swept.clear()
    counts: list[int] = []
    again = run.collect(progress=lambda done, _: counts.append(done))
    assert sorted(swept) == [7, 8] and counts == [7, 8, 9]
    same_bits(again, run.whole())


def test_before_the_first_shard_is_whole_nothing_is_kept(run, monkeypatch) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(factors, "sweep", stop)
    with pytest.raises(KeyboardInterrupt):
        run.collect()
    assert not run.state.exists()


def test_a_checkpoint_that_no_run_writes_is_refused(run, always, monkeypatch) -> None:
    """Of open blocks: more shards than a block has, none, a total too many, a sum too few."""

    def stop(done: int, _: int) -> None:
        if done == 8:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run.collect(in_flight=1, progress=stop)
    header = store.open_file(run.state)
    entries = {
        name: store.Entry(name, store.read(header, name), info.attributes)
        for name, info in header.entries.items()
    }
    facts, key = dict(header.attributes), "block.G.blocks.1.mlp.up"
    assert entries[key].attributes["shards"] == 2 and facts["blocks"] == 1

    def refused(changed: dict[str, store.Entry], **other: object) -> None:
        store.write(run.state, format="refcurv-factors", attributes=facts | other,
                    arrays=changed.values(), provenance={})  # fmt: skip
        with pytest.raises(SchemaError):
            run.collect()

    one = entries[key]
    for shards in (0, -1, conventions.BLOCK_SHARDS + 1, 2.0, "2"):
        changed = store.Entry(key, one.array, {**one.attributes, "shards": shards})
        refused(entries | {key: changed})
    refused(entries | {key: store.Entry(key, one.array[:1], one.attributes)})
    for lost in ("G.blocks.1.mlp.up", "A.embed"):
        refused({name: entry for name, entry in entries.items() if name != lost})
    refused(entries | {"block.G.more": store.Entry("block.G.more", one.array, one.attributes)})
    for blocks in (0, 2, 3, -1):
        refused(entries, blocks=blocks)
    refused({})


# ------------------------------------------------------------------ the disk


def test_a_full_disk_ends_no_run(run, always, monkeypatch) -> None:
    """From the third checkpoint on: the second one stays, a warning is given, no bit differs."""
    want, right, saves = run.whole(), os.write, []

    def write(descriptor: int, data: object) -> int:
        if len(saves) > 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return right(descriptor, data)  # type: ignore[arg-type]

    def counted(self: Checkpoint, *arguments: object, save=Checkpoint.save) -> None:
        saves.append(run.state.read_bytes() if run.state.exists() else b"")
        save(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", write)
        patch.setattr(Checkpoint, "save", counted)
        with pytest.warns(UserWarning, match="no checkpoint; .* No space left on device"):
            made = run.collect()
    same_bits(want, made)
    assert len(saves) > 8 and len(set(saves[2:])) == 1 and saves[2]
    assert run.state.read_bytes() == saves[2]
    assert sorted(p.name for p in run.folder.iterdir()) == ["c.h5", "f.h5.unfinished", "w.h5"]
    same_bits(want, run.collect())


# ------------------------------------------------------------------ the inputs


@pytest.mark.parametrize("name", ["w.h5", "c.h5"])
def test_a_file_that_changes_during_the_run_is_noticed(name: str, run) -> None:
    """Replaced, written to, removed: all was read before, so that no bit is of the other file."""
    want, path = run.whole(), run.folder / name
    sha256 = store.file_sha256(path)
    acts = {
        "replaced": lambda: shutil.copy(path, run.folder / "x").rename(path),
        "touched": lambda: os.utime(path, ns=(0, 0)),
        "removed": path.unlink,
    }
    for act in acts.values():
        model, corpus = rc.load(run.folder / "w.h5"), rc.load_corpus(run.folder / "c.h5")

        def change(done: int, _: int, act=act) -> None:
            if done == 4:
                act()

        with pytest.warns(UserWarning, match=f"{name}' changed during the run"):
            made = rc.collect(model, corpus, LAYERS, progress=change)
        same_bits(want, made)
        assert made.source["inputs"][name] == sha256


# ------------------------------------------------------------------ SIGTERM, Ctrl-C


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_keeps_the_sums_and_says_how_to_go_on(
    number: signal.Signals, run, monkeypatch, capsys
) -> None:
    monkeypatch.setattr(factors, "sweep", at_shard(4, lambda: signal.raise_signal(number)))
    monkeypatch.chdir(run.folder)
    command = ["collect", "w.h5", "c.h5", "--layers", LAYERS, "-o", "f.h5"]
    assert main(command) == 130
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "Give the same command again" in err
    held = store.open_file(run.state).entries["block.G.blocks.1.mlp.up"].attributes
    assert held["shards"] >= 3
    monkeypatch.undo()
    monkeypatch.chdir(run.folder)
    for module in (accumulate, rounding):
        monkeypatch.setattr(module, "BLOCK_SHARDS", 6)
    monkeypatch.setattr(conventions, "SHARD_TOKENS", 8)
    assert main(command) == 0
    assert "refcurv: collect: goes on from shard " in capsys.readouterr().err
    same_bits(run.whole(), rc.load_factors("f.h5"))
    assert sorted(p.name for p in run.folder.iterdir()) == ["c.h5", "f.h5", "w.h5"]


def at_shard(number: int, act: Callable[[], object]) -> Callable[..., None]:
    """The sweep of a shard, which first does something at one of them and then waits a little."""
    right = factors.sweep

    def sweep(config, parameters, shard, job, take) -> None:
        if shard.number == number:
            act()
            time.sleep(0.05)
        right(config, parameters, shard, job, take)

    return sweep


def test_a_second_signal_stops_at_once(run, monkeypatch) -> None:
    """The first waits for the shards that are at work; the second for nothing."""
    began = run.folder / "began"

    def act() -> None:
        os.kill(os.getpid(), signal.SIGTERM)  # as from outside, for whichever thread waits
        began.touch()
        time.sleep(60)

    monkeypatch.setattr(factors, "sweep", at_shard(4, act))
    child = os.fork()
    if not child:
        os.chdir(run.folder)
        os._exit(main(["collect", "w.h5", "c.h5", "--layers", LAYERS, "-o", "f.h5"]))
    end = time.monotonic() + 60
    while not (began.exists() and run.state.exists()) and time.monotonic() < end:
        time.sleep(0.01)
    assert run.state.exists() and os.waitpid(child, os.WNOHANG) == (0, 0), "it did not wait"
    begin = time.monotonic()
    os.kill(child, signal.SIGTERM)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 130
    assert time.monotonic() - begin < 30
    store.verify(store.open_file(run.state))


def test_a_signal_while_a_checkpoint_is_written_is_no_bug(run, always, monkeypatch) -> None:
    """HDF5 is at work: the write is given up, and the sums are written anew."""
    seeks = [0]

    def seek(self: disk.NewFile, offset: int, whence: int = 0) -> int:
        seeks[0] += 1
        if seeks[0] == 30:
            signal.raise_signal(signal.SIGTERM)
        return io.FileIO.seek(self, offset, whence)

    monkeypatch.chdir(run.folder)
    monkeypatch.setattr(disk.NewFile, "seek", seek, raising=False)
    assert main(["collect", "w.h5", "c.h5", "--layers", LAYERS, "-o", "f.h5"]) == 130
    assert seeks[0] > 30
    assert all(good for _, good in store.verify(store.open_file(run.state)))
    same_bits(run.whole(), run.collect())


# ------------------------------------------------------------------ SIGKILL


@pytest.mark.slow
@pytest.mark.parametrize("draws", [1, 2])
def test_killed_at_fifty_random_moments_the_bits_are_the_same(draws: int, run, always) -> None:
    """kill -9: what had been counted before the last checkpoint is never computed again."""
    want = run.whole(draws)
    rng, killed, lost = np.random.default_rng(draws), 0, []
    out = run.folder / "f.h5"
    while killed < 50:
        read, write = os.pipe()
        child = os.fork()
        if not child:
            made = run.collect(
                draws, progress=lambda done, _, end=write: os.write(end, bytes([done]))
            )
            rc.save_factors(made, out, run.state)
            os._exit(0)
        os.close(write)
        first = os.read(read, 1)
        time.sleep(rng.uniform(0, 0.15))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        done = [*first, *os.read(read, 100)]
        os.close(read)
        if os.WIFSIGNALED(status):
            killed += 1
            assert not lost or done[0] >= lost[-1], "more than the last shard was lost"
            lost.append(max(done[-1] - 1, 0) if len(done) > 1 else done[0])
        if out.exists():
            same_bits(want, rc.load_factors(out))
            out.unlink()
            lost.clear()
            if run.state.exists():  # killed between the two
                run.state.unlink()
    same_bits(want, run.collect(draws))
