"""One seed of the vision transformer: train it, then every table and figure of the paper on it.

    python -m validation.paper.vit --seed 1 --runs runs --out validation/paper/results/vit-1.json

The stages run one after the other; each is kept in RUNS/ when it is done, so that a run which is
killed goes on from there. Strengths are chosen on the dev halves (`digits.halves`) and reported on
the test halves; seed 0 is the one on which the recipe was found, and is not reported.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

import refcurv as rc
from refcurv.evaluation.bands import Quantity, bands
from refcurv.law.conventions import Rows
from refcurv.model.config import Pool
from validation.paper import stages
from validation.paper.digits import Recipe, corpus, populations, train
from validation.paper.train import choose_ops
from validation.paper.trainings import trained

Array = np.ndarray
Json = Any
Edit = Callable[[float], tuple[rc.Model, rc.EditRecord]]

MLPS = "blocks.*.mlp.*"
CUT = "blocks.*.mlp.down"
"""Where the methods are compared: of all sets of layers tried on seed 0 the one from which most
images come back. Both matrices of every MLP are tried as well, by K-FAC and by SVD."""

DECAYS = (0.1, 0.5, 2.0)
"""The weight-decay study: these beside the recipe's own."""

FALL = 0.02
"""By how much dev validation accuracy may fall at the chosen strength. The goal is 0.03 on test;
the margin is the standard error of one half of 250 images."""

MASS = (0.005, 0.01, 0.02, 0.03, 0.04, 0.05, 0.06, 0.07, 0.08, 0.09, 0.1, 0.12, 0.14, 0.17, 0.2,
        0.25, 0.3, 0.4)  # fmt: skip
COARSE = (0.02, 0.04, 0.06, 0.08, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5)
ENERGY = (0.02, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.45, 0.5, 0.55, 0.6, 0.7, 0.8)
IN_RANDOM_BASIS = (1e-9, 1e-8, 1e-7, 1e-6, 1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 0.01, 0.03, 0.1)
PAIRS = (0.001, 0.003, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.7)


@dataclass(frozen=True, slots=True)
class Method:
    """One way to cut: share removed → (model, record), and the shares of its curve, rising."""

    cut: Edit
    grid: tuple[float, ...]


# ------------------------------------------------------------------ the bench


class Lab:
    """One trained model, what it is asked, and what is computed from it once."""

    def __init__(self, recipe: Recipe, folder: Path) -> None:
        self.recipe, self.folder = recipe, folder
        self.digits = recipe.digits()
        state = train(recipe, self.digits, folder / f"decay-{recipe.decay:g}.npz",
                      choose_ops("fast"))  # fmt: skip
        self.seconds = state.seconds
        self.model = trained(recipe.config(), state)

    @cached_property
    def corpus(self) -> rc.Corpus:
        """The training images and all populations, `returned` among them.

        returned: noised images that the unedited model gives their false label; what they show.
        """
        asked = populations(self.digits)
        for split in ("dev", "test"):
            false, true = asked[f"memorised_{split}"], asked[f"true_{split}"]
            known = rc.logits(self.model, false.images).argmax(axis=-1) == false.labels
            if known.any():
                asked[f"returned_{split}"] = replace(
                    true, images=true.images[known], labels=true.labels[known]
                )
        return corpus(self.digits, asked)

    @cached_property
    def factors(self) -> rc.Factors:
        """Of all positions of all training images, exact over the ten classes."""
        return self.collected(Rows.ALL)

    def collected(self, rows: Rows) -> rc.Factors:
        """The exact factors of every MLP."""
        return rc.collect(self.model, self.corpus, MLPS, fisher="expected", rows=rows)

    @cached_property
    def bases(self) -> rc.Bases:
        """Of `factors`, the biases left alone."""
        return rc.decompose(self.factors)

    def outcome(self, model: rc.Model) -> Json:
        """Split → population → accuracy."""
        return {
            split: {
                row.name.removesuffix(f"_{split}"): round(row.after["accuracy"], 5)
                for row in rc.evaluate(model, self.corpus, split=split).rows
            }
            for split in ("dev", "test")
        }

    def curve(self, name: str, method: Method) -> list[Json]:
        """What is left along a method's strengths."""
        out = []
        for removed in tqdm(method.grid, desc=f"  {name}", leave=False):
            edited, record = method.cut(removed)
            out.append({"removed": removed, "kept": round(record.kept, 5)} | self.outcome(edited))
        return out

    def kfac(self, basis: rc.Bases, layers: str = CUT) -> Edit:
        """The edit of some layers as a function of the curvature mass that it removes."""
        return lambda removed: rc.edit(self.model, basis, {layers: 1 - removed})

    def svd(self, layers: str = CUT) -> Edit:
        """The truncation of some layers as a function of the share of Σ σ² that it removes."""
        return lambda removed: rc.truncate(self.model, {layers: 1 - removed})

    @cached_property
    def methods(self) -> Mapping[str, Method]:
        """Every edit that is compared."""
        basis, seed = self.bases, self.recipe.seed
        joint = rc.decompose(self.factors, "joint")

        def pairs(removed: float) -> tuple[rc.Model, rc.EditRecord]:
            return rc.random_pairs(self.model, basis, {CUT: 1 - removed}, seed)

        found = {
            "kfac": Method(self.kfac(basis), MASS),
            "svd": Method(self.svd(), ENERGY),
            "random pairs": Method(pairs, PAIRS),
            "random basis": Method(self.kfac(rc.random_basis(basis, seed)), IN_RANDOM_BASIS),
            "inputs only": Method(self.kfac(rc.one_sided(basis, "inputs")), MASS),
            "outputs only": Method(self.kfac(rc.one_sided(basis, "outputs")), MASS),
            "kfac, bias joint": Method(self.kfac(joint), MASS),
            "kfac, up and down": Method(self.kfac(basis, MLPS), MASS),
            "svd, up and down": Method(self.svd(MLPS), ENERGY),
        }
        if self.recipe.pool is Pool.CLS:
            of_cls = rc.decompose(self.collected(Rows.CLS))
            found["kfac, CLS rows"] = Method(self.kfac(of_cls), MASS)
        return found

    def done(self, stage: str) -> Json:
        """What an earlier stage found."""
        return stages.done(self.folder, stage)


# ------------------------------------------------------------------ choosing, on dev alone


def most_returned(curve: Sequence[Json], before: Json) -> Json | None:
    """The point that gives most memorised images their true label and leaves validation alone.

    That is: dev validation accuracy falls by FALL at most. The weakest of equals; None if every
    point costs more.
    """
    least = before["dev"]["validation"] - FALL
    allowed = [point for point in curve if point["dev"]["validation"] >= least]
    return max(allowed, key=lambda point: point["dev"].get("returned", 0.0), default=None)


def first_below(curve: Sequence[Json], memorised: float) -> Json | None:
    """The weakest point that leaves at most so many false labels on dev; None if there is none."""
    return next((point for point in curve if point["dev"]["memorised"] <= memorised), None)


# ------------------------------------------------------------------ stages


def baseline(lab: Lab) -> Json:
    """What the unedited model says, and how many images each number is of."""
    sizes = {name: len(asked.labels) for name, asked in lab.corpus.populations.items()}
    return lab.outcome(lab.model) | {"images": sizes}


def curves(lab: Lab) -> Json:
    """What is left along the strengths of every method."""
    return {name: lab.curve(name, method) for name, method in lab.methods.items()}


def compared(lab: Lab) -> Json:
    """Table 2: each method at its own best, and as little memorised as K-FAC's best leaves.

    A method's `best` is `most_returned` of its own curve, so that all are compared where they cost
    about as much validation accuracy; `matched` is `first_below` K-FAC's dev memorised accuracy. A
    method that never gets there has None.
    """
    before, found = lab.done("baseline"), lab.done("curves")
    ours = most_returned(found["kfac"], before)
    target = None if ours is None else ours["dev"]["memorised"]
    return {
        name: {
            "best": most_returned(curve, before),
            "matched": None if target is None else first_below(curve, target),
        }
        for name, curve in found.items()
    }


def places(layers: int) -> dict[str, str]:
    """Where an edit may act: each block, each pair of blocks, and one kind of matrix alone."""
    chosen = [(n,) for n in range(layers)] + list(combinations(range(layers), 2))
    names = {", ".join(map(str, c)): f"blocks.{{{','.join(map(str, c))}}}.mlp.*" for c in chosen}
    kinds = {"all": MLPS, "up": "blocks.*.mlp.up", "down": "blocks.*.mlp.down"}
    return names | kinds


def by_layer(lab: Lab) -> Json:
    """Blocks one by one and in pairs; the paper edits the first and the last."""
    before, out = lab.done("baseline"), {}
    for name, layers in places(lab.recipe.layers).items():
        curve = lab.curve(name, Method(lab.kfac(lab.bases, layers), COARSE))
        out[name] = {"curve": curve, "best": most_returned(curve, before)}
    return out


def activation(lab: Lab) -> Json:
    """Figure 2: band ratios of noised to clean training images, by curvature and by SVD."""
    singular = rc.singular_bases(lab.model, MLPS)
    return {
        "pair_mass": ratios(lab, lab.bases, Quantity.PAIR_MASS),
        "input_rank": ratios(lab, lab.bases, Quantity.INPUT_RANK),
        "svd": ratios(lab, singular, Quantity.INPUT_RANK),
    }


def ratios(lab: Lab, basis: rc.Bases, quantity: Quantity) -> Json:
    """Layer → bands, of the images of both splits: nothing is chosen by them."""
    noised, clean = (
        _joined(*(lab.corpus.populations[f"{kind}_{split}"] for split in ("dev", "test")))
        for kind in ("memorised", "clean")
    )
    found = bands(lab.model, basis, noised, clean, quantity=quantity, rows="all")
    return {
        layer: {"sizes": list(one.sizes), "ratio": _rounded(one.ratio)}
        for layer, one in found.items()
    }


def _joined(one: rc.ImagePopulation, other: rc.ImagePopulation) -> rc.ImagePopulation:
    return replace(
        one,
        images=np.concatenate([one.images, other.images]),
        labels=np.concatenate([one.labels, other.labels]),
    )


def _rounded(values: Sequence[float]) -> list[float | None]:
    """Five decimals; an empty band has no ratio."""
    return [round(x, 5) if np.isfinite(x) else None for x in values]


def decay(lab: Lab) -> Json:
    """H.1: the same training with other weight decays, its bands and its edits."""
    out = {}
    for strength in tqdm((*DECAYS, lab.recipe.decay), desc="  decay", leave=False):
        own = strength == lab.recipe.decay
        one = lab if own else Lab(replace(lab.recipe, decay=strength), lab.folder)
        before = one.outcome(one.model)
        cuts = {"kfac": Method(one.kfac(one.bases), COARSE), "svd": Method(one.svd(), ENERGY)}
        curves = {name: one.curve(f"decay {strength:g}", cut) for name, cut in cuts.items()}
        out[f"{strength:g}"] = {
            "before": before,
            "curves": curves,
            "best": {name: most_returned(curve, before) for name, curve in curves.items()},
            "pair_mass": ratios(one, one.bases, Quantity.PAIR_MASS),
            "input_rank": ratios(one, one.bases, Quantity.INPUT_RANK),
            "seconds": round(one.seconds, 1),
        }
    return out


# ------------------------------------------------------------------ the run


STAGES = (baseline, curves, compared, by_layer, activation, decay)


def run(recipe: Recipe, folder: Path) -> Json:
    """Train, then every stage that is not done yet; returns what the result file holds."""
    folder.mkdir(parents=True, exist_ok=True)
    return {"recipe": asdict(recipe)} | stages.run(Lab(recipe, folder), folder, STAGES)


def main() -> None:
    """Read the command line, run, write the result file."""
    args = stages.parser(__doc__).parse_args()
    stages.main(args, lambda: run(Recipe(seed=args.seed), args.runs / f"vit-{args.seed}"))


if __name__ == "__main__":
    main()
