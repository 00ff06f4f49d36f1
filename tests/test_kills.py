"""Runs that are killed at any moment: nothing is lost, nothing is left, and no bit differs."""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from strategies import config, random_parameters

import refcurv as rc
from refcurv.cli import main
from refcurv.curvature import bases_file
from refcurv.curvature.checkpoint import Checkpoint
from refcurv.curvature.moments import Key, Side
from refcurv.files import disk, huggingface
from refcurv.model.config import ModelConfig
from refcurv.passes.parallel import Turnstile
from refcurv.report import plots
from validation.paper import trainings

pytestmark = pytest.mark.slow

# ------------------------------------------------------------------ every writer, at every step

STEPS = {
    os: ("open", "mkdir", "write", "fsync", "fchmod", "replace", "unlink", "rmdir"),
    fcntl: ("flock",),
}
"""Everything that a writer asks of the system; between two of them nothing changes on the disk."""

MADE = config(layers=1)


@dataclass(frozen=True)
class Recipe:
    seed: int

    def config(self) -> ModelConfig:
        return MADE


def model(seed: int) -> rc.Model:
    return rc.Model(MADE, random_parameters(MADE, seed))


def corpus(seed: int) -> rc.Corpus:
    return rc.Corpus(np.random.default_rng(seed).integers(0, 7, (3, 6)))


def factors(seed: int) -> rc.Factors:
    return rc.collect(model(seed), corpus(seed), "head", "sampled", seed=seed)


def figure(seed: int) -> Figure:
    made = Figure(figsize=(1, 1))
    made.add_subplot().plot([0, seed])
    return made


def training(seed: int) -> trainings.State:
    return trainings.State(seed, dict(model(seed).parameters), {"x": np.full(3, seed)})


class Sums:
    """A moment, as far as a checkpoint asks."""

    shape, rows, variance = (2, 2), 3, np.zeros(2)

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def parts(self) -> tuple[np.ndarray, None]:
        return np.full(self.shape, float(self.seed)), None


def checkpoint(sums: Sums, path: Path) -> None:
    held = {Key(Side.A, "head"): sums}
    Checkpoint(path, {"seed": sums.seed}).save(held, 1, Turnstile())  # type: ignore[arg-type]


def saved(seed: int, path: Path) -> Path:
    rc.save(model(seed), path)
    return path


WRITERS: dict[str, tuple[Callable[[int], Any], Callable[[Any, Path], object]]] = {
    "bytes": (lambda seed: b"%d" % seed * 99, lambda x, path: disk.write_bytes("write", path, x)),
    "JSON": (lambda seed: {"seed": seed}, disk.write_json),
    "weights": (model, rc.save),
    "corpus": (corpus, rc.save_corpus),
    "factors": (factors, rc.save_factors),
    "checkpoint": (Sums, checkpoint),
    "bases": (lambda seed: rc.decompose(factors(seed)), bases_file.save_bases),
    "plot": (figure, plots.save),
    "training": (training, lambda x, path: trainings.save(path, Recipe(x.step), x)),
}
"""What is written, made from a seed, and what writes it. A report's page is written as bytes."""


def killed_before(step: int, write: Callable[[], object]) -> bool:
    """Write in a child that is killed before its `step`-th call to the system; was it?"""
    child = os.fork()
    if not child:
        count = 0

        def counted(right: Callable[..., Any]) -> Callable[..., Any]:
            def call(*arguments: Any, **options: Any) -> Any:
                nonlocal count
                if count == step:
                    os.kill(os.getpid(), signal.SIGKILL)
                count += 1
                return right(*arguments, **options)

            return call

        with suppress(BaseException):
            for module, functions in STEPS.items():
                for name in functions:
                    setattr(module, name, counted(getattr(module, name)))
            write()
            os._exit(0)
        os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WIFSIGNALED(status)


def content(path: Path) -> object:
    """The bytes of a file or of a folder's files; the arrays of a training, whose zip has dates."""
    if path.is_dir():
        return {inner.name: inner.read_bytes() for inner in path.iterdir()}
    if path.suffix == ".npz":
        head, state = trainings.load(path)
        return head, {name: array.tobytes() for name, array in state.parameters.items()}
    return path.read_bytes() if path.exists() else None


@pytest.mark.parametrize("kind", WRITERS)
def test_every_writer_killed_at_any_step_leaves_the_old_or_the_new(kind: str, tmp_path) -> None:
    """SIGKILL before each call to the system, and once more with what that left lying there.

    The run after it leaves its own file and no other.
    """
    make, write = WRITERS[kind]
    path = tmp_path / ("f.npz" if kind == "training" else "f")
    old, new = make(1), make(2)
    write(new, path)
    made = content(path)
    write(old, path)
    before = content(path)
    assert made != before
    step, left = 0, 0
    while killed_before(step, lambda: write(new, path)):
        left += len(list(tmp_path.iterdir())) > 1
        killed_before(step, lambda: write(new, path))
        assert content(path) in (before, made)
        write(old, path)
        assert content(path) == before and list(tmp_path.iterdir()) == [path]
        step += 1
    assert content(path) == made and list(tmp_path.iterdir()) == [path]
    assert step > 5 and left > 2


def test_an_export_killed_at_any_step_leaves_nothing_or_all_of_it(tmp_path: Path) -> None:
    weights, folder = saved(1, tmp_path / "w.h5"), tmp_path / "hf"
    huggingface.export(weights, folder)
    made = content(folder)
    shutil.rmtree(folder)
    step, left = 0, 0
    while killed_before(step, lambda: huggingface.export(weights, folder)):
        left += len(list(tmp_path.iterdir())) > 1 + folder.exists()
        killed_before(step, lambda: huggingface.export(weights, folder))
        assert content(folder) in (None, made)
        huggingface.export(weights, folder)
        assert content(folder) == made and sorted(tmp_path.iterdir()) == [folder, weights]
        shutil.rmtree(folder)
        step += 1
    assert content(folder) == made and sorted(tmp_path.iterdir()) == [folder, weights]
    assert step > 5 and left > 2


# ------------------------------------------------------------------ a long run, at any moment


@pytest.mark.slow(seconds=40)
def test_a_collection_killed_again_and_again_ends_with_the_same_file(tmp_path: Path) -> None:
    """SIGKILL at eight moments between start and end; the last run goes on and cleans up."""
    made = config(vocabulary=20)
    rc.save(rc.Model(made, random_parameters(made, 0)), tmp_path / "w.h5")
    tokens = np.random.default_rng(0).integers(0, 20, (5000, 64))  # three blocks
    rc.save_corpus(rc.Corpus(tokens), tmp_path / "c.h5")
    command = [sys.executable, "-m", "refcurv", "collect", "w.h5", "c.h5", "--layers", "**", "-o"]
    begin = time.monotonic()
    subprocess.run([*command, "whole.h5"], cwd=tmp_path, check=True, capture_output=True)
    takes = time.monotonic() - begin
    killed = 0
    for moment in np.random.default_rng(1).uniform(0.2, 1.0, 8):
        running = subprocess.Popen([*command, "f.h5"], cwd=tmp_path, stdout=subprocess.DEVNULL)
        try:
            running.wait(timeout=takes * moment)
        except subprocess.TimeoutExpired:
            running.kill()
            running.wait()
            killed += 1
        assert running.returncode in (0, -9)
        if (tmp_path / "f.h5").exists():
            assert (tmp_path / "f.h5").read_bytes() == (tmp_path / "whole.h5").read_bytes()
            (tmp_path / "f.h5").unlink()
    subprocess.run([*command, "f.h5"], cwd=tmp_path, check=True, capture_output=True)
    assert killed
    assert (tmp_path / "f.h5").read_bytes() == (tmp_path / "whole.h5").read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["c.h5", "f.h5", "w.h5", "whole.h5"]


def test_a_streamed_collection_killed_at_twenty_moments_ends_with_the_same_file(
    tmp_path: Path, capfd
) -> None:
    """SIGKILL, twenty times; the command is the same each time, and goes on from whole layers."""
    made = config(vocabulary=20)
    rc.save(rc.Model(made, random_parameters(made, 0)), tmp_path / "w.h5")
    tokens = np.random.default_rng(0).integers(0, 20, (200, 64))
    rc.save_corpus(rc.Corpus(tokens), tmp_path / "c.h5")
    model, corpus = rc.load(tmp_path / "w.h5"), rc.load_corpus(tmp_path / "c.h5")
    rc.save_factors(rc.collect(model, corpus, "**"), tmp_path / "one.h5")
    want, out = (tmp_path / "one.h5").read_bytes(), tmp_path / "f.h5"
    words = ["collect", str(tmp_path / "w.h5"), str(tmp_path / "c.h5"), "--layers", "**"]
    words += ["--memory", "64GB", "-o", str(out)]
    begin = time.monotonic()
    assert main(words) == 0
    takes = time.monotonic() - begin
    assert out.read_bytes() == want
    out.unlink()
    killed, kept = 0, 0
    for moment in np.random.default_rng(1).uniform(0.0, 1.0, 20):
        child = os.fork()
        if not child:
            os._exit(main(words))
        time.sleep(takes * moment)
        os.kill(child, signal.SIGKILL)
        killed += os.WIFSIGNALED(os.waitpid(child, 0)[1])
        kept = max(kept, len(list(tmp_path.glob("f.h5.unfinished.layers/*.h5"))))
        if out.exists():
            assert out.read_bytes() == want
            out.unlink()
    assert main(words) == 0
    assert killed > 5 and kept and out.read_bytes() == want
    assert sorted(p.name for p in tmp_path.iterdir()) == ["c.h5", "f.h5", "one.h5", "w.h5"]
