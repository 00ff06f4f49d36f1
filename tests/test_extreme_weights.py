"""Every command on weights of 1e200, of 1e-310, and that are none: it works, or one line says why.

NumPy's warnings of overflow are no line of it: whoever reads a number that is not finite says so.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from strategies import config, random_parameters

import refcurv as rc
from refcurv.cli import main
from refcurv.files.weights import parameter_entry, write

TINY: dict[str, Any] = dict(
    vocabulary=5, width=4, heads=2, kv_heads=1, head_width=2, mlp_width=3, layers=1
)

WEIGHTS = {"huge": 1e200, "vast": 1e307, "least": 1e-310, "infinite": np.inf, "none": np.nan}
"""What the parameters are multiplied by."""

COMMANDS = {
    "inspect": "W",
    "collect": "W C -o new.h5 --layers ** --fisher sampled",
    "collect in float32": "W C -o new.h5 --layers ** --fisher empirical --dtype float32",
    "evaluate": "W C --split dev",
    "truncate": "W -o new.h5 --energy **.up=0.9",
    "prune": "W C -o new.h5 --layers **.up --forget some --ratio 0.1",
    "trace": "W C -o new.h5",
    "export": "W new",
    "audit": "W C",
    "audit --certify": "W C --certify --seconds 1",
    "certify": "W C --of nats,A --digits 2 --layers **.up",
    "cases": "W C -o new",
    "validate": "theirs.npz --model W --corpus C",
    "validate a trace": "--trace theirs.npz --model W --corpus C",
}

SOON = {("huge", c) for c in COMMANDS if c != "certify"} | {
    ("least", c) for c in ("audit", "collect", "trace")
} | {("none", c) for c in ("inspect", "collect", "certify")}  # fmt: skip
"""Those that take no second."""


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """Weights of each size, a corpus, and what another program might give."""
    folder, made = tmp_path_factory.mktemp("extreme"), config(**TINY)
    every = random_parameters(made, 0)
    for name, factor in WEIGHTS.items():
        scaled = ((n, np.clip(x, -1, 1) * factor) for n, x in every.items())
        entries = (parameter_entry(n, x, "float64") for n, x in scaled)
        write(folder / f"{name}.h5", made, entries, {})
    tokens = np.random.default_rng(0).integers(0, 5, (3, 5))
    some = rc.Population(tokens, np.full(3, 2), np.full(3, 5), "text", "dev")
    rc.save_corpus(rc.Corpus(tokens, populations={"some": some}), folder / "c.h5")
    layer, (d_out, d_in) = "blocks.0.mlp.up", every["blocks.0.mlp.up.weight"].shape
    one = {f"{layer}.A": np.eye(d_in), f"{layer}.G": np.eye(d_out), f"{layer}.n": np.array(9)}
    np.savez(folder / "theirs.npz", allow_pickle=False, **one)
    return folder


@pytest.mark.filterwarnings("always")
@pytest.mark.parametrize(
    ("size", "command"),
    [
        pytest.param(w, c, marks=[] if (w, c) in SOON else [pytest.mark.slow])
        for w in WEIGHTS
        for c in COMMANDS
    ],
)
def test_one_line_or_the_work(size: str, command: str, files: Path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(files)
    named = {"W": f"{size}.h5", "C": "c.h5"}
    words = [named.get(word, word) for word in COMMANDS[command].split()]
    status = main([command.partition(" ")[0], *words])
    out, err = capsys.readouterr()
    lines = [line for line in err.splitlines() if " after " not in line]  # of progress
    assert "bug of refcurv" not in err and "warning" not in err.lower()
    if status == 2:
        assert len(lines) == 1, err
    else:
        assert status in (0, 1) and not lines, err
        assert size not in ("infinite", "none") or command in ("inspect", "truncate", "export")
        # a certificate says so where floats have lost a number that balls know
        assert not re.search(r"\bnan\b" if command == "certify" else r"\b(nan|inf)\b", out.lower())
