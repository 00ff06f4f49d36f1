"""F, F_tok and K on the shipped model: how their distances change with depth, mixing and training.

    nice -n 5 python -m validation.curvature.distances              # measures what is missing
    python -m validation.curvature.distances --tables               # README.md and the plot alone

Each setting is a model, a few tokens and a part of every layer, small enough to be exact; all its
layers come from one sweep. What `distances.json` holds of a setting is kept, unless the setting,
the model or the corpus has changed: a killed run goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

import refcurv as rc
from refcurv.algebra.blas import one_blas_thread
from refcurv.curvature.distance import compare
from refcurv.curvature.exact import Problem, of_outputs, problem
from refcurv.demo import CORPUS, MODEL
from refcurv.files import store
from refcurv.files.disk import write_json
from validation.curvature.under_head import under_head
from validation.paper.train import Recipe, start

HERE = Path(__file__).parent
RESULTS, README, PLOT = HERE / "distances.json", HERE / "README.md", HERE / "distances.png"
BEGIN, END = "<!-- distances: begin -->", "<!-- distances: end -->"
KINDS = ("attn.q", "attn.k", "attn.v", "attn.o", "mlp.gate", "mlp.up", "mlp.down")
TOP = (1, 10, 100)
HIGHEST = 2.2
"""The plot's highest distance; what lies above it is in the tables."""

LENGTH = 32
"""Tokens that are read of each sequence of the corpus; the next one is the last one's label."""


@dataclass(frozen=True, slots=True)
class Setting:
    """One run: `weights` as `model_of` has them, sequences cut into segments, rows first .. +8."""

    weights: str = "trained"
    sequences: int = 2
    segment: int = LENGTH
    first: int = 0
    rows: int = 8


SETTINGS = {
    "trained": Setting(),
    **{f"segments of {T}": Setting(segment=T) for T in (1, 4, 16)},
    "start": Setting("start"),
    "random": Setting("random"),
    **{f"{100 * s:.0f} % trained": Setting(f"mixed {s}") for s in (0.25, 0.5, 0.75)},
    **{f"{n} sequences": Setting(sequences=n) for n in (1, 4)},
    "other rows": Setting(first=64),
}


# ------------------------------------------------------------------ measuring


def model_of(weights: str) -> rc.Model:
    """The model of a setting, float64.

    trained: the shipped one. start: as its training began (validation/paper/train.py). random:
    each matrix of the shipped one replaced by normal entries of the same Frobenius norm, gains
    kept. mixed s: (1 − s) random + s trained.
    """
    trained = rc.load(MODEL, dtype="float64")
    if weights == "trained":
        return trained
    if weights == "start":
        begun = {name: W.astype(np.float64) for name, W in start(Recipe()).parameters.items()}
        return trained.with_parameters(begun)
    share = 0.0 if weights == "random" else float(weights.removeprefix("mixed "))
    rng = np.random.Generator(np.random.Philox(key=20251024))
    mixed = {}
    for name in trained.config.parameter_shapes():
        W = np.asarray(trained.parameters[name])
        if W.ndim == 2:
            noise = rng.standard_normal(W.shape)
            noise *= np.linalg.norm(W) / np.linalg.norm(noise)
            mixed[name] = (1 - share) * noise + share * W
    return trained.with_parameters(mixed)


def measure(setting: Setting, bar: tqdm[Any]) -> dict[str, Any]:
    """Every layer's Distances in one setting, and how sure the model is there."""
    model = model_of(setting.weights)
    text = rc.load_corpus(CORPUS).tokens[: setting.sequences, : LENGTH + 1]
    shape = (-1, setting.segment)
    made = problem(model, text[:, :-1].reshape(shape), text[:, 1:].reshape(shape))
    z_NV, _ = made.forward(made.parameters)
    p_NV = np.exp(z_NV - z_NV.max(axis=1, keepdims=True))
    p_NV /= p_NV.sum(axis=1, keepdims=True)
    part: Problem = under_head(made)
    end = setting.first + setting.rows
    for layer in model.config.linear_layers():
        if layer != "head":
            part = of_outputs(part, f"{layer}.weight", setting.first, end)
    # q and k have no gradient where a segment has one row: softmax over one key is constant (O31)
    attn = "attn.{v,o}" if setting.segment == 1 else "attn.*"
    wrt = ",".join(f"blocks.*.{kind}.weight[{setting.first}:{end}]" for kind in (attn, "mlp.*"))

    def progress(done: int, total: int) -> None:
        bar.set_postfix_str(f"{done} of {total} segments")

    return {
        "nats": float(made.loss.terms(z_NV)[0].mean()),
        "entropy": float(-(p_NV * np.log(np.maximum(p_NV, 1e-300))).sum(axis=1).mean()),
        "layers": {
            name.split(".weight")[0]: one.to_json()
            for name, one in compare(part, wrt=wrt, top=TOP, progress=progress).items()
        },
    }


def run() -> dict[str, Any]:
    """Measure every setting that `distances.json` does not hold."""
    held: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    inputs = store.inputs(rc.load(MODEL).source, rc.load_corpus(CORPUS).source)
    made_with = {
        key: value
        for key, value in store.provenance().items()
        if key in ("refcurv", "libraries", "python", "blas")
    }
    for name in (bar := tqdm(SETTINGS, unit="setting")):
        bar.set_description(name)
        about = {"setting": asdict(SETTINGS[name]), "inputs": inputs, "top": list(TOP)}
        if {key: held.get(name, {}).get(key) for key in about} == about:
            continue
        begun = time.process_time()
        with one_blas_thread():
            found = measure(SETTINGS[name], bar)
        held[name] = about | {
            "cpu_seconds": round(time.process_time() - begun, 1),
            "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
            "provenance": made_with,
            **found,
        }
        held = {one: held[one] for one in SETTINGS if one in held}
        write_json(held, RESULTS)
    return held


# ------------------------------------------------------------------ tables


Held = dict[str, Any]
BLOCKS = (0, 1, 2)
"""Averaged over in tables by setting: in the last block F − F_tok is 0 by theory (O38)."""


COLUMNS = {
    "F − F_tok": "F_F_tok",
    "F_tok − K": "F_tok_K",
    "F − K": "F_K",
    "F − cK": "F_cK",
    "c": "scale",
    "floor": "floor",
    "tr F_tok": "trace_F_tok",
    "tr K": "trace_K",
}


def depth_table(layers: Held) -> Iterator[str]:
    """Every layer of one setting."""
    columns = ("layer", *COLUMNS, "rank of F",
               *(f"with {M}, {k}" for M in ("F_tok", "K") for k in TOP[1:]))  # fmt: skip
    yield "| " + " | ".join(columns) + " |"
    yield "| --- |" + " ---: |" * (len(columns) - 1)
    for kind in KINDS:
        for name in (one for one in layers if one.endswith(kind)):
            d = layers[name]
            two = [d["overlap"][str(k)][i] for i in (0, 1) for k in TOP[1:]]
            numbers = [*(d[key] for key in COLUMNS.values()), (d["trace"] / d["norm"]) ** 2]
            yield f"| {name} | " + " | ".join(map(decimal, numbers + two)) + " |"


def setting_table(held: Held, names: Sequence[str]) -> Iterator[str]:
    """F − F_tok / F_tok − K / floor by kind of layer and setting."""
    yield "| mean of blocks 0 to 2 | " + " | ".join(names) + " |"
    yield "| --- |" + " ---: |" * len(names)
    for kind in KINDS:
        cells = (" / ".join(decimal(x) for x in means(held[name], kind)) for name in names)
        yield f"| {kind} | " + " | ".join(cells) + " |"
    for what, key in (("nats per token", "nats"), ("entropy of p", "entropy")):
        yield f"| {what} | " + " | ".join(f"{held[name][key]:.2f}" for name in names) + " |"


def means(found: Held, kind: str, blocks: Sequence[int] = BLOCKS) -> list[float | None]:
    """Mean F − F_tok, F_tok − K and floor of one kind of layer over some blocks."""
    layers = [found["layers"].get(f"blocks.{b}.{kind}") for b in blocks]
    if None in layers:
        return [None] * len(SHOWN)
    return [float(np.mean([one[key] for one in layers])) for key in SHOWN]


SHOWN = ("F_F_tok", "F_tok_K", "floor")
HIGHEST = 3.2
"""Of the plot; what is above it is written there."""


def decimal(x: float | None) -> str:
    """Two decimals; 0 for what rounding left of a 0, – for what there is not."""
    return "–" if x is None else "0" if abs(x) < 1e-12 else f"{x:.2f}"


def tables(held: Held) -> str:
    """The generated part of README.md."""
    trained = held["trained"]
    with_ = trained["provenance"]
    libraries = ", ".join(f"{name} {version}" for name, version in with_["libraries"].items())
    dates = sorted(one["date"] for one in held.values())
    seconds = sum(one["cpu_seconds"] for one in held.values())
    lines = [
        f"Made by `python -m validation.curvature.distances`, {dates[0]} to {dates[-1]}, "
        f"{seconds / 60:.0f} minutes of one core: refcurv {with_['refcurv']}, python "
        f"{with_['python']}, {libraries}; "
        + ", ".join(
            f"{b['internal_api']} {b['version']} {b['architecture']}" for b in with_["blas"]
        )
        + ".",
        "",
        f"**Depth and kind.** The trained model, 2 x {LENGTH} tokens, rows 0 to 7 of each layer. "
        "Traces are over tr F; the last columns are overlaps of the 10 and 100 top eigenvectors.",
        "",
        *depth_table(trained["layers"]),
        "",
        "**Position mixing.** The same 64 tokens and labels in segments of T. Cells: ‖F − F_tok‖ / "
        "‖F_tok − K‖ / floor. With T = 1, q and k have no gradient, so F = 0.",
        "",
        *setting_table(held, ["segments of 1", "segments of 4", "segments of 16", "trained"]),
        "",
        "**Training.** Cells as above.",
        "",
        *setting_table(
            held, ["start", "random", "25 % trained", "50 % trained", "75 % trained", "trained"]
        ),
        "",
        "**Does the choice matter?** More or fewer tokens, and rows 64 to 71. Cells as above.",
        "",
        *setting_table(held, ["1 sequences", "trained", "4 sequences", "other rows"]),
    ]
    return "\n".join(lines)


def plot(held: Held) -> None:
    """Small multiples: a column for each kind of layer; by block, segment length, training."""
    from matplotlib.figure import Figure

    mixing = ["segments of 1", "segments of 4", "segments of 16", "trained"]
    training = ["random", "25 % trained", "50 % trained", "75 % trained", "trained"]
    figure = Figure(figsize=(11, 5.2), layout="constrained")
    grid = figure.subplots(3, len(KINDS), sharey=True, sharex="row")
    look = (("‖F − F_tok‖", "#0072b2", "o-"), ("‖F_tok − K‖", "#d55e00", "s-"),
            ("floor of any G ⊗ A", "#777777", ":"))  # fmt: skip
    for column, kind in zip(grid.T, KINDS, strict=True):
        rows = (
            ("block", "0123", [means(held["trained"], kind, [b]) for b in range(4)]),
            ("T", ("1", "4", "16", "32"), [means(held[name], kind) for name in mixing]),
            ("% trained", ("0", "25", "50", "75", "100"), [means(held[n], kind) for n in training]),
        )
        for axes, (what, ticks, values) in zip(column, rows, strict=True):
            for (label, colour, style), y in zip(look, zip(*values, strict=True), strict=True):
                shown = [np.nan if one is None else one for one in y]
                axes.plot(range(len(shown)), shown, style, color=colour, label=label, ms=3, lw=1.2)
                for x, high in enumerate(shown):
                    if high > HIGHEST:
                        axes.text(x, HIGHEST, f"{high:.1f}", fontsize=7, ha="right", va="top")
            axes.set_xticks(range(len(ticks)), ticks, fontsize=7)
            axes.set_xlabel(what, fontsize=7, labelpad=1)
            axes.tick_params(labelsize=7)
            axes.grid(axis="y", lw=0.3)
            axes.set_ylim(0, HIGHEST)
        column[0].set_title(kind, fontsize=9)
    figure.legend(*grid[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=3,
                  fontsize=8, frameon=False)  # fmt: skip
    figure.supylabel("relative to ‖F‖", fontsize=8)
    figure.savefig(PLOT, dpi=110)


def main() -> None:
    """Measure what is missing; write the tables between README's marks, and the plot."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tables", action="store_true", help="measure nothing")
    held = json.loads(RESULTS.read_text()) if parser.parse_args().tables else run()
    before, _, rest = README.read_text(encoding="utf-8").partition(BEGIN)
    after = rest.partition(END)[2]
    README.write_text(f"{before}{BEGIN}\n\n{tables(held)}\n\n{END}{after}", encoding="utf-8")
    plot(held)


if __name__ == "__main__":
    main()
