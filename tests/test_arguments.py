"""What the command line takes: its examples are commands, and its options reach their function."""

from __future__ import annotations

import argparse
import re
import shlex
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest

import refcurv as rc
from refcurv.cli import main
from refcurv.commands import COMMANDS
from refcurv.commands.arguments import ARGUMENTS, parser
from refcurv.commands.examples import EXAMPLES
from refcurv.demo import CORPUS, MODEL
from refcurv.sweeps.beside import Collecting

ROOT = Path(__file__).parents[1]


PARSER = parser(COMMANDS)


def parsed(line: str) -> argparse.Namespace:
    """A line of a shell, as `refcurv` reads it."""
    name, *words = shlex.split(line.replace("\\\n", " "), comments=True)
    assert name == "refcurv"
    return PARSER.parse_args(words)


def test_every_command_has_examples_that_are_commands() -> None:
    assert EXAMPLES.keys() == ARGUMENTS.keys() == {work.__name__ for work in COMMANDS}
    for name, lines in EXAMPLES.items():
        assert name in [parsed(line).command for line in lines]


@pytest.mark.parametrize("page", ["README.md", "validation/real/README.md"])
def test_a_pages_commands_are_commands(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    blocks = "\n".join(re.findall(r"^```sh\n(.*?)^```", text, re.MULTILINE | re.DOTALL))
    lines = re.findall(r"^refcurv .*$", blocks.replace("\\\n", " "), re.MULTILINE)
    assert len(lines) >= 5
    for line in lines:
        parsed(line.replace("$(cat tasks/populations)", ""))


W, C = str(MODEL), str(CORPUS)
LAYERS = ("--layers", "**.up")
REACHED = {
    "corpus": (
        ["ids.bin", "--token-dtype", "uint16", "--separator", "|", "--limit", "9", "--eos", "x"],
        "refcurv.build_corpus",
        {"token_dtype": "uint16", "separator": "|", "limit": 9, "eos": "x"},
    ),
    "recite": (
        [W, "ids.bin", "--token-dtype", "uint16", "--separator", "|"],
        "refcurv.files.whole_texts.read_texts",
        {"token_dtype": "uint16", "separator": "|"},
    ),
    "prune": (
        [W, C, *LAYERS, "--forget", "quotes_dev", "--ratio", "0.1", "--weight", "0.7", "--steps",
         "3", "--rate", "0.1", "--batch", "5", "--seed", "4"],
        "refcurv.train_scores",
        {"ratio": 0.1, "weight": 0.7, "steps": 3, "rate": 0.1, "batch": 5, "seed": 4},
    ),
    "sweep": (
        [W, C, *LAYERS, "--rho", "0.9", "--on", "language_dev", "--states", "2GB", "--memory",
         "3GB", "--rows", "all", "--seed", "4"],
        "refcurv.sweep",
        {"on": "language_dev", "states": 2 * 10**9, "memory": 3 * 10**9, "seed": 4,
         "collecting": Collecting("sampled", "all", 4)},
    ),
    "certify": (
        [W, C, "--rows", "labelled", "--fisher", "sampled", "--seed", "4", "--minutes", "2"],
        "refcurv.certify",
        {"rows": "labelled", "fisher": "sampled", "seed": 4, "seconds": 120.0},
    ),
    "audit": (
        [W, C, "--certify", "--seconds", "9", "--memory", "2GiB", "--seed", "4"],
        "refcurv.audit",
        {"certify": True, "seconds": 9.0, "memory": 2.0, "seed": 4},
    ),
    "validate": (
        ["theirs.npz", "--model", W, "--corpus", C, "--labels", "labels.npz", *LAYERS],
        "refcurv.validate",
        {"labels": "labels.npz", "layers": "**.up"},
    ),
}  # fmt: skip
"""Options that no other test gives: the words, what the command calls, and with which of them."""


class Called(Exception):
    """In the place of the work."""


@pytest.mark.parametrize("command", REACHED)
def test_options_reach_what_they_are_for(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words, called, wanted = REACHED[command]
    monkeypatch.chdir(tmp_path)
    np.arange(9, dtype="<u2").tofile("ids.bin")
    for name in ("theirs", "labels"):
        np.savez(f"{name}.npz", labels=np.zeros((2, 3)))
    more = ["-o", "out"] if command not in ("certify", "audit", "validate") else []
    with patch(called, side_effect=Called) as work:
        assert main([command, *words, *more]) == 3  # what nobody foresaw
    given = work.call_args.kwargs
    assert {key: given[key] for key in wanted} == wanted


WITH_DTYPE = {
    "collect": [W, C],
    "decompose": ["f.h5"],
    "prune": [W, C, *LAYERS, "--forget", "quotes_dev", "--ratio", "0.1"],
    "recite": [W, "ids.bin", "--token-dtype", "uint16"],
    "evaluate": [W, C],
    "sweep": [W, C, *LAYERS, "--rho", "0.9"],
    "report": [W, C, "--rho", "0.9"],
    "trace": [W, C],
}
"""Every command with --dtype, and what else it needs."""


def test_the_commands_with_a_dtype_are_known() -> None:
    (commands,) = (x for x in PARSER._actions if isinstance(x, argparse._SubParsersAction))
    options = {name: one.format_help().split() for name, one in commands.choices.items()}
    assert {name for name, words in options.items() if "--dtype" in words} == WITH_DTYPE.keys()


@pytest.mark.parametrize("wrong", ["bfloat16", "fp32", "", "FLOAT32", "True", "1e3", "nan"])
@pytest.mark.parametrize("command", WITH_DTYPE)
def test_a_dtype_that_is_none_is_refused_in_one_line(
    command: str,
    wrong: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """NumPy's TypeError was taken for a bug of refcurv."""
    monkeypatch.chdir(tmp_path)
    np.arange(9, dtype="<u2").tofile("ids.bin")
    one = rc.Factor(np.eye(2), 1, np.eye(2), 1)
    about = ("empirical", "reached", 0, 1, "float64", 1)
    rc.save_factors(rc.Factors({"blocks.0.mlp.up": one}, *about), "f.h5")  # type: ignore[arg-type]
    out = [] if command == "evaluate" else ["--out" if command == "report" else "-o", "out"]
    assert main([command, *WITH_DTYPE[command], *out, "--dtype", wrong]) == 2
    said = capsys.readouterr().err
    assert "dtype must be one of float64, float32; got" in said and said.count("\n") == 1


def test_an_audit_without_seconds_has_a_minute(capsys: pytest.CaptureFixture[str]) -> None:
    with patch("refcurv.audit", side_effect=Called) as work:
        main(["audit", W, C, "--certify"])
    assert work.call_args.kwargs["seconds"] == rc.audit.__kwdefaults__["seconds"] == 60
