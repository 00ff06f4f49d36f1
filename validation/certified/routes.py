"""Routes x quantities: how far each way to a number is from the certified one, in ulps.

    python -m validation.certified.routes              one tiny twin of every family, a few minutes
    python -m validation.certified.routes --shipped    and sequence 0 of the shipped model

An ulp is eps of the route's dtype times the largest entry of the array. Needs the extras
`certified` and `test`.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

import refcurv as rc
from refcurv import demo
from refcurv.certified.numbers import OF, Found, Task, floats, run
from refcurv.curvature import definition
from refcurv.files.huggingface import read_config
from refcurv.law.conventions import Rows
from refcurv.model.gradient import loss_and_gradient
from refcurv.passes.fast import FAST
from refcurv.terminal import progress_bar
from validation.certified import page
from validation.certified.errors import Arrays, ulps

with page.from_tests():
    import oracles
    from strategies import random_parameters

Given = tuple[rc.Model, rc.Corpus]
ENTRIES = 2
"""Entries of each parameter of which the dear routes take the derivative."""

MLP = "blocks.0.mlp.down"
"""The layer whose A and G the loops make."""


# ------------------------------------------------------------------ the routes


def first(given: Given) -> definition.Sequence:
    model, corpus = given
    return next(iter(definition.sequences(model.config, corpus, Rows.REACHED)))


def fast(dtype: str) -> Callable[[Given], Arrays]:
    """The kernels, which every public function runs on; A and G by `collect`."""

    def made(given: Given) -> Arrays:
        model, corpus = given
        kind, found = replace(floats(dtype), ops=FAST), Found()
        task = Task(model.config, model.parameters, ("logits", "nats", "gradient"), (), {})
        run(kind, task, 0, first(given), found)
        narrow = {name: x.astype(dtype) for name, x in model.parameters.items()}
        wanted = ",".join(model.config.linear_layers())
        sums = rc.collect(rc.Model(model.config, narrow, dtype), corpus, wanted, "empirical")
        found.arrays |= {f"A.{name}": one.A for name, one in sums.items()}
        found.arrays |= {f"G.{name}": one.G for name, one in sums.items()}
        return found.arrays

    return made


def exact_products(given: Given) -> Arrays:
    """`rc.exact.hvp` and `ggnvp`, by complex step."""
    model, corpus = given
    out = {}
    for kind, product in (("hvp", rc.exact.hvp), ("ggnvp", rc.exact.ggnvp)):
        truth = product(model, corpus, wrt="**", vector=signs(model))
        out |= {f"{kind}.0.{name}": x for name, x in truth.items()}
    return out


def signs(model: rc.Model) -> Arrays:
    return {
        name: np.array(oracles.signs(0, 0, i, 0, x.size), np.float64).reshape(x.shape)
        for i, (name, x) in enumerate(model.parameters.items())
    }


def by_entries(given: Given, derivative: Callable[[str, tuple[int, ...]], Any]) -> Arrays:
    """The gradient at some entries of each parameter."""
    rng, out = np.random.default_rng(0), {}
    for name, x in given[0].parameters.items():
        d = np.full(x.shape, np.nan, np.longdouble)
        for flat in rng.permutation(x.size)[:ENTRIES]:
            at = tuple(int(i) for i in np.unravel_index(flat, x.shape))
            d[at] = derivative(name, at)
        out[f"gradient.0.{name}"] = d
    return out


def loss_at(given: Given, dtype: Any) -> Callable[[str, tuple[int, ...], Any], Any]:
    """(parameter, entry, step) → the loss of the definitions with that entry moved."""
    model, one = given[0], first(given)
    own = {name: x.astype(dtype) for name, x in model.parameters.items()}

    def moved(name: str, at: tuple[int, ...], step: Any) -> Any:
        x = own[name].copy()
        x[at] += step
        there = {**own, name: x}
        return loss_and_gradient(model.config, there, one.inputs, one.label_BT, one.layout)[0]

    return moved


def complex_step(given: Given) -> Arrays:
    """Im L(θ + i h e) / h of the definitions in complex128."""
    moved = loss_at(given, np.complex128)
    return by_entries(given, lambda name, at: moved(name, at, 1e-30j).imag / 1e-30)


def differences(given: Given) -> Arrays:
    """Four-point differences of the float64 loss, `oracles.jacobian`'s, h = eps^(1/4)."""
    moved, h = loss_at(given, np.float64), np.finfo(np.float64).eps ** 0.25

    def slope(name: str, at: tuple[int, ...]) -> Any:
        near = moved(name, at, h) - moved(name, at, -h)
        return (8 * near - (moved(name, at, 2 * h) - moved(name, at, -2 * h))) / (12 * h)

    return by_entries(given, slope)


def loops(dtype: str) -> Callable[[Given], Arrays]:
    """The second implementation, loops over positions and heads: logits and nats."""

    def made(given: Given) -> Arrays:
        model, config, one = given[0], given[0].config, first(given)
        own = {name: x.astype(dtype) for name, x in model.parameters.items()}
        label = one.label_BT[0]
        out = {"logits.0": oracles.logits(config, own, sequence(given))}
        every = oracles.nats(config, own, sequence(given))
        nats = [every[t, v] if v >= 0 else every.dtype.type(0) for t, v in enumerate(label)]
        return out | {"nats.0": np.array(nats)}

    return made


def sequence(given: Given) -> Any:
    """What the loops read: tokens, or one image."""
    corpus = given[1]
    return corpus.tokens[0] if corpus.images is None else corpus.images[0].astype(float)


def loop_slopes(given: Given) -> Arrays:
    """The loops in longdouble, by central differences: the gradient, and A and G of one layer."""
    model, config, label = given[0], given[0].config, list(first(given).label_BT[0])
    own = {name: x.astype(np.longdouble) for name, x in model.parameters.items()}

    def slope(name: str, at: tuple[int, ...]) -> Any:
        def moved(x: np.ndarray) -> Any:
            y = own[name].copy()
            y[at] = x[0]
            return oracles.loss(config, {**own, name: y}, sequence(given), label)

        return oracles.gradient(moved, own[name][at].reshape(1))[0]

    out = dict(by_entries(given, slope))
    rows = oracles.rows(config, own, MLP, sequence(given))
    p = np.exp(-oracles.nats(config, own, sequence(given)))
    some = oracles.worlds(p, label, "empirical")
    A, G, n = oracles.factor_sums(rows, some, kept(given))
    return out | {f"A.{MLP}": A / n, f"G.{MLP}": G / n}


def kept(given: Given) -> np.ndarray:
    return np.asarray(first(given).keep_BT[0])


ROUTES: dict[str, tuple[str, Callable[[Given], Arrays]]] = {
    "kernels and collect, float64": ("float64", fast("float64")),
    "kernels and collect, float32": ("float32", fast("float32")),
    "rc.exact": ("float64", exact_products),
    "complex step of the loss": ("float64", complex_step),
    "differences of the loss": ("float64", differences),
    "loops, float64": ("float64", loops("float64")),
    "loops, longdouble": ("longdouble", loops("longdouble")),
    "loops, longdouble, differences": ("longdouble", loop_slopes),
}
"""Name → its dtype, and what it makes."""

LARGE = ("kernels and collect, float64", "kernels and collect, float32", "rc.exact")
"""Those that are no loops."""


def measured(given: Given, names: tuple[str, ...]) -> dict[str, dict[str, float]]:
    """route → quantity → ulps."""
    truth = rc.certify(*given, OF)
    out: dict[str, dict[str, float]] = {}
    for route in truth.routes:
        row = out.setdefault(f"definitions, {route.dtype}", {})
        quantity = route.name.partition(".")[0]
        row[quantity] = max(row.get(quantity, 0.0), route.ulps)
    for name in names:
        dtype, made = ROUTES[name]
        out[name] = ulps(truth, made(given), dtype)
    return out


def twins() -> Iterator[tuple[str, Given]]:
    """One published configuration of each family, with tiny sizes and random weights."""
    rows = json.loads((page.ROOT / "tests/published_configs.json").read_text("utf-8"))
    named = {r["config"]["model_type"]: r for r in reversed(rows.values()) if "becomes" in r}
    for family, row in named.items():
        _, made = read_config("x", json.dumps(row["config"]))
        made = replace(made, vocabulary=min(made.vocabulary, 11), layers=min(made.layers, 2),
                       windows=made.windows[:2], rotary=made.rotary[:2])  # fmt: skip
        rng = np.random.default_rng(0)
        inputs = rng.integers(0, made.vocabulary, (1, 4))
        corpus = rc.Corpus(inputs)
        if made.image is not None:
            shape = (1, made.image.channels, made.image.height, made.image.width)
            pixel = rng.normal(size=shape).astype(np.float32)
            corpus = rc.Corpus(images=pixel, labels=np.array([1]))
        yield family, (rc.Model(made, random_parameters(made, 1)), corpus)


def shipped() -> Given:
    """The shipped model and its first sequence."""
    folder = Path(demo.__file__).parent
    model, corpus = rc.load(folder / "model.h5"), rc.load_corpus(folder / "corpus.h5")
    return model, rc.Corpus(corpus.tokens[:1], corpus.label[:1])


def table(found: list[dict[str, dict[str, float]]]) -> str:
    """Median and largest over models, for each route and quantity."""
    lines = [f"| route | {' | '.join(OF)} |", f"| --- |{' --- |' * len(OF)}"]
    for route in found[0]:
        cells = []
        for quantity in OF:
            some = [one[route][quantity] for one in found if quantity in one[route]]
            middle = f"{np.median(some):.2g}, " if len(some) > 1 else ""
            cells.append(f"{middle}{max(some):.2g}" if some else "")
        lines.append(f"| {route} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> int:
    """Measure every twin, then write the table."""
    parser = argparse.ArgumentParser(prog="python -m validation.certified.routes")
    parser.add_argument("--shipped", action="store_true", help="sequence 0 of the shipped model")
    given = parser.parse_args()
    every = list(twins())
    bar, found = progress_bar("routes"), []
    for n, (family, one) in enumerate(every):
        print(f" {family}", end="", file=sys.stderr, flush=True)
        found.append(measured(one, tuple(ROUTES)))
        bar(n + 1, len(every))
    digest = page.of("routes")
    stamp = page.stamp("validation.certified.routes", digest)
    families = ", ".join(name for name, _ in every)
    page.write("routes", f"{stamp} Twins of {families}.\n\n{table(found)}")
    if given.shipped:
        stamp = page.stamp("validation.certified.routes --shipped", digest)
        page.write("routes of the shipped model",
                   f"{stamp}\n\n{table([measured(shipped(), LARGE)])}")  # fmt: skip
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
