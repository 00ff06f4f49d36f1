"""The pass with the weights of one block in memory: the bits of the pass that holds them all."""

from __future__ import annotations

import gc
import os
import platform
import re
import shutil
import subprocess
import sys
import threading
import weakref
from collections import deque
from collections.abc import Iterator
from contextlib import closing, contextmanager, nullcontext
from dataclasses import fields, replace
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import Case, case, cases, config, few, opened_for_lies, random_parameters
from test_factors import BIASED, corpus_of, model_of
from test_images import corpus_of as images_of
from test_images import labelled_images
from test_room import peak

import refcurv as rc
from refcurv.cli import main
from refcurv.curvature import room
from refcurv.curvature import streamed as streamed_file
from refcurv.curvature.factors import Factor
from refcurv.curvature.plan import Plan, plan, plans
from refcurv.curvature.streamed import collect_to, each_group
from refcurv.files.lazy import Lazy
from refcurv.files.scratch import Scratch
from refcurv.law.checks import ConventionError, RoomError, SchemaError, StorageError
from refcurv.law.conventions import Rows
from refcurv.model.patterns import expand
from refcurv.passes.shards import shards
from refcurv.passes.streaming import Stage
from refcurv.passes.sweep import Sweep, sweep_of


@contextmanager
def small_units(tokens: int, block: int) -> Iterator[None]:
    """Shards of so many tokens, and blocks of so many shards."""
    with (
        patch("refcurv.law.conventions.SHARD_TOKENS", tokens),
        patch("refcurv.curvature.accumulate.BLOCK_SHARDS", block),
        patch("refcurv.passes.rounding.BLOCK_SHARDS", block),
    ):
        yield


def streamed(
    model: rc.Model, corpus: rc.Corpus, job: Sweep, groups: list[frozenset[str]], in_flight: int
) -> dict[str, Factor]:
    units, states = shards(corpus, model.config, Rows.REACHED), {}
    out: dict[str, Factor] = {}
    for factors in each_group(model, units, job, groups, states, in_flight):
        assert not out.keys() & factors.keys()
        out |= factors
    return out


def parts_of(pick: np.random.Generator, model: rc.Model, names: list[str]) -> list[frozenset[str]]:
    """Each block's layers in one group or several, and those below all blocks in one."""
    by_place: dict[str, list[str]] = {}
    for name in names:
        place = name.split(".")[1] if "." in name else "head" if name == "head" else "input"
        by_place.setdefault(place, []).append(name)
    out = []
    for place, some in by_place.items():
        which = pick.integers(1 if place == "input" else 3, size=len(some))
        out += [frozenset(np.array(some)[which == k]) for k in set(which.tolist())]
    return out


def assert_same_bits(got: Factor, want: Factor, what: str) -> None:
    for field in fields(Factor):
        one, two = getattr(got, field.name), getattr(want, field.name)
        assert np.array_equal(one, two), f"{field.name} of {what}: {one} is not {two}"


labelled = cases().filter(lambda one: (one.label >= 0).any()).map(lambda one: (one, corpus_of(one)))
pictured = labelled_images.map(lambda both: (both[0], images_of(*both)))


@few(15)
@given(st.one_of(labelled, pictured), st.integers(0, 2**32 - 1))
def test_every_bit_is_that_of_the_pass_in_memory(both: tuple[Case, rc.Corpus], seed: int) -> None:
    (one, corpus), pick = both, np.random.default_rng(seed)
    dtype = str(pick.choice(["float32", "float64"]))
    fisher = str(pick.choice(["sampled", "signed", "empirical", "expected"]))
    draws = int(pick.integers(1, 4)) if fisher in ("sampled", "signed") else 1
    model = model_of(one, dtype)
    every = [*model.config.linear_layers(), *model.config.tables()]
    names = [name for name in every if pick.random() < 0.6] or every[:1]
    with small_units(int(pick.integers(1, 9)), int(pick.integers(1, 4))):
        want = rc.collect(model, corpus, ",".join(names), fisher, 3, draws)
        job = sweep_of("collect", names, fisher, 3, draws)
        got = streamed(model, corpus, job, parts_of(pick, model, names), int(pick.integers(1, 3)))
    assert set(got) == set(want)
    for name in names:
        assert_same_bits(got[name], want[name], name)


# ------------------------------------------------------------------ into a file, within a figure


@pytest.fixture
def files(tmp_path: Path) -> tuple[rc.Model, rc.Corpus, Path]:
    """A model and a corpus that lie in files, and a folder."""
    one = case(batch=5, length=6, biases=BIASED)
    rc.save(model_of(one, "float32"), tmp_path / "w.h5")
    rc.save_corpus(corpus_of(one), tmp_path / "c.h5")
    return rc.load(tmp_path / "w.h5", "float32"), rc.load_corpus(tmp_path / "c.h5"), tmp_path


LAYERS, FEW = "**,embed", "blocks.*.mlp.*,embed"
PLENTY = 2**40


def test_a_file_is_that_of_the_pass_in_memory(files) -> None:
    """In float64: sums of a few float32 products are exact, and show no order; nor do two alone."""
    _, corpus, folder = files
    model = rc.load(folder / "w.h5", "float64")
    with small_units(7, 3):
        rc.save_factors(rc.collect(model, corpus, LAYERS, halves=True), folder / "one.h5")
        collect_to(model, corpus, folder / "two.h5", LAYERS, memory=PLENTY, halves=True)
    assert (folder / "one.h5").read_bytes() == (folder / "two.h5").read_bytes()
    assert sorted(path.name for path in folder.iterdir()) == ["c.h5", "one.h5", "two.h5", "w.h5"]


@pytest.mark.parametrize(("share", "kept"), [(0, 0), (0.5, 0), (0.7, 1), (0.85, 2), (1, 3)])
def test_a_killed_run_goes_on(files, share: float, kept: int, capsys) -> None:
    """Killed when so much of the work is done; so many parts are whole then."""
    model, corpus, folder = files

    def interrupt(done: int, total: int) -> None:
        if done >= share * total:
            raise KeyboardInterrupt

    with small_units(7, 2):
        rc.save_factors(rc.collect(model, corpus, LAYERS), folder / "one.h5")
        with pytest.raises(KeyboardInterrupt):
            collect_to(model, corpus, folder / "two.h5", LAYERS, memory=PLENTY, progress=interrupt)
        parts = sorted((folder / "two.h5.unfinished.layers").glob("*.h5"))
        assert len(parts) == kept
        if parts:
            with pytest.raises(ConventionError, match="another run: seed is 1 here, 0 there"):
                collect_to(model, corpus, folder / "two.h5", LAYERS, seed=1, memory=PLENTY)
        command = ["collect", *map(str, (folder / "w.h5", folder / "c.h5"))]
        command += ["-o", str(folder / "two.h5"), "--layers", LAYERS, "--dtype", "float32"]
        assert main([*command, "--memory", "900000"]) == 0
    found = re.findall(r"collect: goes on from (\d+) of 16 layers, which", capsys.readouterr().err)
    assert [int(n) > 0 for n in found] == [True] * (kept > 0)
    assert (folder / "one.h5").read_bytes() == (folder / "two.h5").read_bytes()


@pytest.mark.slow
def test_sums_are_given_up_before_the_next_are_made(files) -> None:
    """Of the arrays of earlier groups none is alive when a stage begins."""
    model, corpus, folder = files
    right, made, alive = streamed_file._sums_of, [], []

    def spied(stage: Stage, *rest: object) -> object:
        gc.collect()
        alive.append(sum(ref() is not None for ref in made))
        found = right(stage, *rest)
        arrays = [x for one in found.values() for x in (one.sum_A, one.sum_G)]
        made.extend(map(weakref.ref, arrays))
        return found

    with patch.object(streamed_file, "_sums_of", spied):
        collect_to(model, corpus, folder / "f.h5", FEW, memory=PLENTY)
    assert len(made) >= 8 and set(alive) == {0}


def test_layers_that_are_kept_are_not_made_again(files) -> None:
    model, corpus, folder = files
    seen: list[frozenset[str]] = []
    right = streamed_file._sums_of

    def spied(stage: Stage, *rest: object) -> object:
        seen.append(stage.layers)
        return right(stage, *rest)

    def interrupt(done: int, total: int) -> None:
        if done >= 0.85 * total:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        collect_to(model, corpus, folder / "f.h5", LAYERS, memory=PLENTY, progress=interrupt)
    kept = {p.stem for p in (folder / "f.h5.unfinished.layers").glob("*.h5")}
    with patch.object(streamed_file, "_sums_of", spied):
        collect_to(model, corpus, folder / "f.h5", LAYERS, memory=PLENTY)
    assert kept and not kept & {name for layers in seen for name in layers}


@pytest.mark.parametrize("moment", [0.1, 0.7])
def test_weights_that_change_meanwhile_are_refused(files, moment: float) -> None:
    """They are read block by block: what comes from another file is no part of this model."""
    model, corpus, folder = files
    other = {name: 2 * np.asarray(x) for name, x in model.parameters.items()}

    def change(done: int, total: int) -> None:
        if done < moment * total:
            return
        rc.save(rc.Model(model.config, other, model.dtype), folder / "w.h5")

    with pytest.raises(SchemaError, match="replaced or changed after it was opened"):
        collect_to(model, corpus, folder / "f.h5", LAYERS, memory=PLENTY, progress=change)
    assert not (folder / "f.h5").exists()


def test_a_corpus_that_changes_meanwhile_is_noticed(files) -> None:
    """All of it was read before, so that the factors are of what it held."""
    model, corpus, folder = files
    want = rc.collect(model, corpus, LAYERS)

    def change(done: int, total: int) -> None:
        os.utime(folder / "c.h5", ns=(0, done))

    with pytest.warns(UserWarning, match="c.h5' changed during the run"):
        collect_to(model, corpus, folder / "f.h5", LAYERS, memory=PLENTY, progress=change)
    made = rc.load_factors(folder / "f.h5")
    for name, one in want.items():
        assert_same_bits(made[name], one, name)


def test_states_on_disk_have_the_same_bits(files) -> None:
    """In a folder that is gone meanwhile, too; on a full disk nothing is left but what is whole."""
    model, corpus, folder = files
    right, there = streamed_file.plan, folder / "there"
    there.mkdir()

    def on_disk(*of: object) -> Plan:
        return replace(right(*of), on_disk=True)

    def away(done: int, total: int) -> None:
        if done == total // 2:
            there.rename(folder / "elsewhere")
            (folder / "elsewhere").rename(there)

    with small_units(7, 2), patch.object(streamed_file, "plan", on_disk):
        rc.save_factors(rc.collect(model, corpus, FEW), folder / "one.h5")
        collect_to(model, corpus, there / "two.h5", FEW, memory=PLENTY, progress=away)
        assert (folder / "one.h5").read_bytes() == (there / "two.h5").read_bytes()
        (there / "two.h5").unlink()
        full = OSError(28, "No space left on device")
        count = iter(range(10**6))

        def pwrite(*of: object, write=os.pwrite) -> int:
            if next(count) == 20:
                raise full
            return write(*of)

        with patch("os.pwrite", pwrite), pytest.raises(StorageError, match="No space left"):
            collect_to(model, corpus, there / "two.h5", FEW, memory=PLENTY)
        collect_to(model, corpus, there / "two.h5", FEW, memory=PLENTY)
    assert (folder / "one.h5").read_bytes() == (there / "two.h5").read_bytes()
    assert [path.name for path in there.iterdir()] == ["two.h5"]


@pytest.mark.slow
def test_two_runs_of_one_output_do_not_mix(files) -> None:
    """Of another seed: who keeps a layer second is refused. Of the same: who finds theirs gone."""
    model, corpus, folder = files
    out, parts = folder / "f.h5", folder / "f.h5.unfinished.layers"

    def stopped(done: int, total: int) -> None:
        if done == total:
            raise KeyboardInterrupt

    def other(done: int, total: int) -> None:
        if done == total // 2:  # before this run keeps a layer
            with pytest.raises(KeyboardInterrupt):
                collect_to(model, corpus, out, FEW, memory=PLENTY, progress=stopped)

    with pytest.raises(ConventionError, match="another run: seed is 1 here, 0 there"):
        collect_to(model, corpus, out, FEW, seed=1, memory=PLENTY, progress=other)
    collect_to(model, corpus, out, FEW, memory=PLENTY)
    whole = out.read_bytes()
    rc.save_factors(rc.collect(model, corpus, FEW), folder / "one.h5")
    assert whole == (folder / "one.h5").read_bytes()

    def removed(done: int, total: int) -> None:
        if done == total:
            shutil.rmtree(parts)

    with pytest.raises(ConventionError, match="is no longer in"):
        collect_to(model, corpus, out, FEW, memory=PLENTY, progress=removed)
    assert whole == out.read_bytes()


@pytest.mark.parametrize("damage", ["bytes", "layers", "run", "run gone"])
def test_damaged_parts_are_refused(files, damage: str) -> None:
    model, corpus, folder = files
    parts = folder / "f.h5.unfinished.layers"

    def interrupt(done: int, total: int) -> None:
        if done == total:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        collect_to(model, corpus, folder / "f.h5", LAYERS, memory=PLENTY, progress=interrupt)
    one = parts / "blocks.1.attn.k.h5"
    if damage == "bytes":
        with opened_for_lies(one) as file:
            file["blocks/1/attn/k/sum_A"][0, 0] += 1
    elif damage == "layers":
        one.write_bytes(b"nothing")
    elif damage == "run":
        (parts / "run.json").write_text("{")
    else:
        (parts / "run.json").unlink()
    there = sorted(parts.iterdir())
    says = "not known to be of any run" if damage == "run gone" else r"delete|not valid JSON"
    with pytest.raises(SchemaError, match=says) as caught:
        collect_to(model, corpus, folder / "f.h5", LAYERS, memory=PLENTY)
    assert str(caught.value).count("collect: ") <= 1
    assert {*there} <= {*parts.iterdir()}


def test_too_small_a_figure_is_refused_with_the_least(files) -> None:
    model, corpus, folder = files
    with pytest.raises(RoomError, match=r"at least .* GiB") as refused:
        collect_to(model, corpus, folder / "f.h5", LAYERS, memory=1)
    assert refused.value.status == 3
    need = refused.value.values["need"]
    chosen: list[Plan] = []
    assert not (folder / "f.h5.unfinished.layers").exists()
    enough = need + 2**24
    collect_to(model, corpus, folder / "f.h5", LAYERS, memory=enough, told=chosen.append)
    assert chosen[0].bytes <= enough


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("layers", ["blocks.{1-2}.mlp.*", "blocks.2.attn.*", "**"])
def test_a_plan_takes_the_memory_that_it_says(dtype: str, layers: str) -> None:
    """Of the largest and the least; weights are read anew. Observed 0.82 to 0.95."""
    made = config(
        width=96, layers=3, heads=6, kv_heads=6, head_width=16, mlp_width=384, vocabulary=400
    )
    stored = {name: x.astype(dtype) for name, x in random_parameters(made, 0).items()}
    copies = Lazy(list(stored), lambda name: stored[name].copy())
    model = rc.Model(made, copies, dtype)
    corpus = rc.Corpus(np.random.default_rng(0).integers(0, 400, (9, 64)))
    job = sweep_of("collect", expand(layers, list(made.linear_layers())), "sampled", 0, 1)
    with small_units(192, 9), patch("refcurv.passes.rounding.POSITIONS", 64):
        units = shards(corpus, made, Rows.REACHED)
        every = list(plans(model, units, job, 1))
        for chosen in (every[0], every[-1]):
            with closing(Scratch(Path())) if chosen.on_disk else nullcontext({}) as states:

                def work(states=states, chosen=chosen) -> None:
                    deque(each_group(model, units, job, chosen.groups, states, 1), maxlen=0)

                used = peak(work)
            assert 0.8 * chosen.bytes <= used <= 1.05 * chosen.bytes, (chosen.text, used)


def labelled_at(
    shape: tuple[int, int], entries: int, *every: int, real: int | None = None
) -> rc.Corpus:
    """Text of so many `real` positions, of which row i has a label at each `every[i]`-th."""
    token = np.random.default_rng(0).integers(0, entries, shape)
    at = np.arange(shape[1]) % np.array(every)[:, None] == 0
    mask = np.zeros(shape, np.uint8)
    mask[:, :real] = 1
    return rc.Corpus(token, np.where(at & (mask > 0), token, -1), mask)


UNCUT, SLIM = dict(causal=False), dict(width=5, mlp_width=7, heads=1, kv_heads=1, head_width=4)
LOOKED_AT = {
    "uncut": (UNCUT | dict(layers=16), labelled_at((1, 256), 50, 1), "blocks.*.mlp.*"),
    "short": (dict(mlp_width=197), labelled_at((1, 64), 50, 1), "blocks.*.mlp.*"),
    "few labels": ({}, labelled_at((1, 256), 50, 255), "blocks.*.mlp.*"),
    "another shard": ({}, labelled_at((2, 256), 50, 125, 1), "blocks.*.mlp.*"),
    "head": (UNCUT | SLIM | dict(vocabulary=397), labelled_at((1, 700), 397, 1), "head"),
    "padded": (
        UNCUT | dict(mlp_width=499, gated=False, layers=1),
        labelled_at((1, 256), 50, 1, real=240),
        "blocks.*.mlp.*",
    ),
    "rising": (UNCUT | dict(vocabulary=199), labelled_at((1, 700), 199, 1), "head"),
    "wide rows": (dict(mlp_width=499), labelled_at((1, 256), 50, 1), "blocks.*.mlp.down"),
}
"""Where most is taken by the runs that look at rounding."""


@pytest.mark.parametrize("on_disk", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", LOOKED_AT)
def test_a_plan_foresees_what_is_looked_at(kind: str, on_disk: bool) -> None:
    """By two or three copies of a sequence, as large as its shard or larger."""
    changes, corpus, layers = LOOKED_AT[kind]
    made = config(
        **dict(width=31, layers=2, heads=5, kv_heads=5, head_width=6, mlp_width=83, vocabulary=50)
        | changes
    )
    stored = {name: x.astype("float32") for name, x in random_parameters(made, 0).items()}
    model = rc.Model(made, Lazy(list(stored), lambda name: stored[name].copy()), "float32")
    job = sweep_of("collect", expand(layers, list(made.linear_layers())), "sampled", 0, 1)
    with (
        small_units(256, 9),
        patch("refcurv.model.transformer.HEAD_ROWS", 16),
        patch("refcurv.curvature.plan.HEAD_ROWS", 16),
    ):
        units = shards(corpus, made, Rows.REACHED)
        chosen = list(plans(model, units, job, 1))[int(on_disk)]
        assert chosen.on_disk is on_disk

        def work() -> None:
            with closing(Scratch(Path())) if on_disk else nullcontext({}) as states:
                deque(each_group(model, units, job, chosen.groups, states, 1), maxlen=0)

        work()  # what is made once
        used = peak(work)
    assert 0.95 * used <= chosen.bytes <= 1.3 * used, chosen.bytes / used


def test_states_of_every_column_are_foreseen() -> None:
    """`expected` sends back a gradient for each label and word."""
    made = config(layers=2)
    model = rc.Model(made, random_parameters(made, 0))
    units = shards(rc.Corpus(np.arange(40).reshape(2, 20) % 7), made, Rows.REACHED)
    job = sweep_of("collect", ["blocks.0.mlp.up"], "expected", 0, 1)
    assert [job.passes(unit, 7) for unit in units] == [19 * 7]
    assert len(list(job.cotangents(units[0], 7))) == job.passes(units[0], 7) == 19 * 7
    kept, on_disk = list(plans(model, units, job, 1))[:2]
    positions, looked_at = units[0].label_BT.size, 3 * 19 * 2
    states = positions * (2 + 19 * 7) + looked_at * (2 + 1)
    assert kept.bytes - on_disk.bytes == 8 * made.width * states


@pytest.mark.parametrize("draws", [1, 3])
def test_states_in_memory_are_foreseen_with_every_draw(draws: int) -> None:
    """What each block reads, and a gradient for each draw; one for what is looked at again."""

    class Counted(dict):
        most = 0

        def __setitem__(self, key, value) -> None:
            super().__setitem__(key, value)
            self.most = max(self.most, sum(one.nbytes for one in self.values()))

    made = config(layers=3)
    model = rc.Model(made, random_parameters(made, 0))
    units = shards(rc.Corpus(np.arange(4000).reshape(400, 10) % 7), made, Rows.REACHED)
    names = expand("blocks.{1-2}.mlp.up", list(made.linear_layers()))
    job = sweep_of("collect", names, "sampled", 0, draws)
    kept, on_disk = list(plans(model, units, job, 1))[:2]
    assert not kept.on_disk and on_disk.on_disk and kept.groups == on_disk.groups
    states = Counted()
    deque(each_group(model, units, job, kept.groups, states, 1), maxlen=0)
    assert states.most <= kept.bytes - on_disk.bytes <= 1.01 * states.most
    quick = plan("collect", model, units, job, PLENTY, 2)  # where there is room, of least time
    assert (quick.in_flight, quick.on_disk, len(quick.groups)) == (2, False, 2)


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other heaps have other gaps")
@pytest.mark.parametrize("share", [1.0, 1.3])
def test_the_command_stays_within_its_figure(share: float, tmp_path: Path) -> None:
    """At the least figure, and where more is given, by the peak that the kernel counts."""
    made = config(
        width=256, layers=4, heads=4, kv_heads=4, head_width=64, mlp_width=2048, vocabulary=4000
    )
    stored = {name: x.astype("float32") for name, x in random_parameters(made, 0).items()}
    rc.save(rc.Model(made, stored, "float32"), tmp_path / "w.h5")
    tokens = np.random.default_rng(0).integers(0, 4000, (8, 512))
    rc.save_corpus(rc.Corpus(tokens), tmp_path / "c.h5")
    program = """
import sys
from refcurv.cli import main
status = main(sys.argv[1:])
print([line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")][0])
"""
    words = ["collect", "w.h5", "c.h5", "--dtype", "float32", "-o", "f.h5", "--memory"]

    def run(memory: int) -> tuple[str, int]:
        """What it says, and the most memory that it took; a fork's count begins with ours."""
        done = subprocess.run(
            [sys.executable, "-c", program, *words, f"{memory / 1e6:.3f}MB"],
            cwd=tmp_path, capture_output=True, text=True, check=True,
        )  # fmt: skip
        return done.stderr, 1024 * int(done.stdout.split()[-1])

    said, _ = run(10**6)
    least = float(re.search(r"at least ([0-9.]+) GiB", said)[1]) * room.GIB
    said, used = run(int(share * least))
    assert "foresees" in said
    assert used <= 1.05 * share * least


# ------------------------------------------------------------------ what it stands on


def test_a_scratch_file_is_a_mapping_of_arrays(tmp_path: Path) -> None:
    rng, truth = np.random.default_rng(0), {}
    with closing(Scratch(tmp_path)) as scratch:
        assert not list(tmp_path.iterdir())
        for step in range(200):
            key = int(rng.integers(12))
            if rng.random() < 0.3 and key in truth:
                assert np.array_equal(scratch.pop(key), truth.pop(key))
            else:
                shape, dtype = (int(rng.integers(4)), 3), rng.choice(["float32", "float64"])
                truth[key] = rng.normal(size=shape).astype(dtype).T
                scratch[key] = truth[key]
            assert set(scratch) == set(truth), step
            for name, array in truth.items():
                got = scratch[name]
                assert (got.dtype, got.tolist()) == (array.dtype, array.tolist())
        with pytest.raises(KeyError):
            del scratch["nothing"]
        assert os.fstat(scratch.fileno()).st_size <= 12 * 2 * 9 * 8  # places serve again


def test_what_the_system_takes_in_pieces_is_whole(tmp_path: Path) -> None:
    """A call may write or read less than it was asked for."""
    write, read = os.pwrite, os.preadv
    with (
        closing(Scratch(tmp_path)) as scratch,
        patch("os.pwrite", lambda file, data, at: write(file, data[:5], at)),
        patch("os.preadv", lambda file, views, at: read(file, [views[0][:7]], at)),
    ):
        for key in "ab":
            scratch[key] = np.arange(9.0) + ord(key)
        for key in "ab":
            assert np.array_equal(scratch[key], np.arange(9.0) + ord(key))


def test_what_is_read_of_a_scratch_file_is_not_written_over(tmp_path: Path) -> None:
    """Another thread that removes an array and writes another waits for one that reads it."""
    with closing(Scratch(tmp_path)) as scratch:
        scratch["a"], real, others = np.zeros(9), os.preadv, []

        def slow(*args: object) -> int:
            def other() -> None:
                del scratch["a"]
                scratch["b"] = np.ones(9)

            others.append(threading.Thread(target=other))
            others[0].start()
            others[0].join(0.2)
            return real(*args)

        with patch("os.preadv", slow):
            assert not scratch["a"].any()
        others[0].join()
        assert list(scratch) == ["b"] and scratch["b"].all()


def test_a_scratch_file_without_room_says_so(tmp_path: Path) -> None:
    with closing(Scratch(tmp_path)) as scratch:
        with patch("os.pwrite", side_effect=OSError(28, "No space left on device")):
            with pytest.raises(StorageError, match="No space left"):
                scratch["a"] = np.ones(3)
        assert "a" not in scratch


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's options")
@pytest.mark.slow
def test_memory_that_is_given_up_serves_again() -> None:
    """Twenty arrays of 64 MiB, one after the other: the first one alone asks for its pages."""
    program = """
import resource, sys
import numpy as np
from refcurv.starting import reuse_memory
if sys.argv[1] == "reuse":
    reuse_memory()
np.ones(2**23)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    np.ones(2**23)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
    faults = {
        how: int(subprocess.run([sys.executable, "-c", program, how], capture_output=True,
                                check=True, text=True).stdout)
        for how in ("reuse", "leave")
    }  # fmt: skip
    assert faults["reuse"] < 100 < faults["leave"]
