"""A model that memory need not hold: collect, decompose and edit under a figure, as commands.

The model is a random OLMo-2 in bfloat16, which the package writes itself. Each command runs in a
fresh process, whose peak the kernel counts.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from validation.bench.fresh import spawn
from validation.bench.measuring import Record, measured, tell, today
from validation.bench.proxies import TINY, Size, olmo2

ALL = ("collect", "decompose", "edit")


@dataclass(frozen=True, slots=True)
class Streamed:
    """One run.

    Fields: name, in the record; layers, a pattern; memory, the figure that commands are given;
    disk, GiB that its files take at most; phases.
    """

    name: str
    size: Size
    layers: str
    memory: str
    disk: int
    phases: tuple[str, ...] = ALL


def _olmo(width: int, layers: int, heads: int, mlp_width: int, vocabulary: int) -> Size:
    return Size(width, layers, heads, mlp_width, vocabulary, sequences=8)


RUNS = {
    "200m": Streamed(
        "200M", _olmo(1024, 10, 16, 2816, 32_000), "blocks.{7-9}.mlp.{gate,up}", "1.2GB", 4
    ),
    "1b": Streamed(
        "1B", _olmo(2048, 16, 16, 8192, 100_352), "blocks.*.mlp.*", "3.3GB", 62, ("collect",)
    ),
    "7b": Streamed(
        "7B", _olmo(4096, 32, 32, 11_008, 100_352), "blocks.{23-25}.mlp.{gate,up}", "5GB", 60
    ),
}
SMALL = Streamed("TINY", TINY, "blocks.2.mlp.{gate,up}", "1GB", 1)


def streamed(place: Path, run: Streamed) -> Record:
    """{run: its record}: for each phase seconds and MiB, and the largest peak. Leaves no file."""
    folder = place / "streamed"
    folder.mkdir()
    try:
        tell(f"streamed: a random {run.name} OLMo-2 is written")
        made = spawn(write, folder, run.size)
        phases: Record = {}
        for phase in run.phases:
            tell(f"streamed: {phase}")
            phases |= spawn(command, folder, run.size, words=_words(run)[phase], phase=phase)
    finally:
        shutil.rmtree(folder)
    times = {phase: [one] for phase, one in phases.items()}
    most = max(one["peak"] for one in phases.values())
    about = {"layers": run.layers, "memory": run.memory, "date": today(), **made}
    return {run.name: {"times": times, "peak": most, **about}}


def _words(run: Streamed) -> dict[str, list[str]]:
    """What the command line is given, by phase."""
    memory = ["--memory", run.memory]
    wanted = ["--layers", run.layers, "--dtype", "float32"]
    return {
        "collect": ["collect", "w.h5", "c.h5", "-o", "f.h5", *wanted, *memory],
        "decompose": ["decompose", "f.h5", "-o", "b.h5", *memory],
        "edit": ["edit", "w.h5", "b.h5", "-o", "edited.h5", "--rho", "0.6"],
    }


# ------------------------------------------------------------------ in fresh processes


def write(folder: Path, size: Size) -> Record:
    """`w.h5`, whose parameters are made one by one, and `c.h5`, a corpus of random tokens."""
    import numpy as np

    import refcurv as rc
    from refcurv.files.lazy import Lazy

    config = olmo2(size)
    shapes = config.parameter_shapes()
    order = {name: n for n, name in enumerate(shapes)}

    def parameter(name: str) -> np.ndarray:
        if len(shapes[name]) < 2:
            return np.ones(shapes[name], np.float32)
        drawn = np.random.default_rng(order[name]).standard_normal(shapes[name], np.float32)
        drawn *= np.float32(0.02)
        return drawn

    stored = dict.fromkeys(shapes, "bfloat16")
    rc.save(rc.Model(config, Lazy(list(shapes), parameter), "float32", stored), folder / "w.h5")
    rng = np.random.default_rng(0)
    token_BT = rng.integers(0, size.vocabulary, (size.sequences, size.positions))
    rc.save_corpus(rc.Corpus(token_BT), folder / "c.h5")
    return {"parameters": size.parameters, "tokens": token_BT.size}


def command(folder: Path, _size: Size, words: Sequence[str], phase: str) -> Record:
    """One command, measured from its start: libraries count."""
    import os

    records: Record = {}
    os.chdir(folder)
    with measured(records, phase, base=0.0):
        from refcurv.cli import main

        status = main(list(words))
    if status:
        raise SystemExit(status)
    return records
