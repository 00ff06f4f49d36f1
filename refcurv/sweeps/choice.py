"""Which layers to edit, and how much: chosen on dev populations, by a short sweep."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeVar

from refcurv.curvature.bases import Bases
from refcurv.evaluation.lines import Lines
from refcurv.law.checks import EmptyError, RangeError
from refcurv.law.words import number_of
from refcurv.model.config import ModelConfig
from refcurv.model.corpus import Corpus
from refcurv.model.weights import Model
from refcurv.progress import Progress
from refcurv.sweeps.asked import checked, facts, require_basis, require_mass
from refcurv.sweeps.beside import Collecting
from refcurv.sweeps.outcomes import Sweep, dev_cost
from refcurv.sweeps.sweep import begun, swept

Edit = TypeVar("Edit")

SHARES: Final = (0.7, 0.9, 0.97)
"""The ρ that are tried.  Chosen: between them the paper's edits and those of small models lie."""

WHO: Final = "report"
"""Who chooses, for messages."""

MOST: Final = 1.06
"""What an edit may cost: so many times the unedited perplexity of the dev text.  Chosen: about what
the paper's edit of OLMo-2 7B costs."""


@dataclass(frozen=True, slots=True)
class Choice:
    """What dev chose. Fields: layers, a pattern; rho; sentence, what was tried and its cost."""

    layers: str
    rho: float
    sentence: str


def runs(config: ModelConfig, names: Collection[str]) -> tuple[str, ...]:
    """Patterns of the gate and up of neighbouring blocks: a tenth of the blocks, one at least.

    They lie side by side in the last two thirds of the model, the last first. Those of which
    `names` lacks a layer are left out; if all are, it is all of `names` at once.

    Proof: tests/test_choice.py::test_the_runs_that_are_tried
    """
    every = config.linear_layers()
    parts = [part for part in ("gate", "up") if f"blocks.0.mlp.{part}" in every]
    kinds = parts[0] if len(parts) == 1 else f"{{{','.join(parts)}}}"
    size, found = max(1, round(config.layers / 10)), []
    for last in range(config.layers - 1, config.layers // 3 + size - 2, -size):
        blocks = range(last - size + 1, last + 1)
        if {f"blocks.{block}.mlp.{part}" for block in blocks for part in parts} <= set(names):
            where = f"{last}" if size == 1 else f"{{{blocks[0]}-{last}}}"
            found.append(f"blocks.{where}.mlp.{kinds}")
    return tuple(found) or (together(names),)


def together(patterns: Iterable[str]) -> str:
    """One pattern for all of them."""
    return ",".join(patterns)


def require_dev(who: str, corpus: Corpus) -> None:
    """Refuse a corpus by which no edit can be chosen."""
    have = {one.kind for one in corpus.populations.values() if one.split == "dev"}
    if lacking := [kind for kind in ("text", "recite") if kind not in have]:
        raise EmptyError(
            f"{who}: without --rho it is chosen on split dev, by what an edit recites and costs, "
            f"but the corpus has no population of kind {lacking[0]!r} there. Give --rho, or a "
            "corpus that has one."
        )


def least_recited(
    edits: Iterable[tuple[Edit, float, float]], most: float
) -> tuple[Edit, float, float]:
    """The (edit, cost, recited) that recites least among those that cost at most `most`.

    Of as many passages it is the cheaper one; where none is so cheap, the cheapest of all.

    Proof: tests/test_choice.py::test_the_rule
    """
    some = list(edits)
    cheap = [one for one in some if one[1] <= most]
    if not cheap:
        return min(some, key=lambda one: one[1])
    return min(cheap, key=lambda one: (one[2], one[1]))


def what_is_tried(patterns: Sequence[str]) -> str:
    """What `choose` will do, for a person; to be told before its factors are collected."""
    count = len(patterns) * len(SHARES)
    return (
        f"no rho is given, so dev chooses: {number_of(count, 'edit')}, rho "
        f"{', '.join(f'{share:g}' for share in SHARES)} of {', '.join(patterns)}. It takes the one "
        f"that recites least and raises perplexity by at most {MOST - 1:.0%}"
    )


def choose(
    model: Model, corpus: Corpus, patterns: Sequence[str], basis: Bases, seed: int, path: Path,
    progress: Progress, told: Callable[[str], object],
) -> Choice:  # fmt: skip
    """The K-FAC edit, of these patterns and SHARES, that dev chooses by `least_recited`.

    What is found lands in `path`, and is gone on from there. A file of something else begins anew.

    Cost: for each pattern and share a pass over the dev populations.
    Proof: tests/test_choice.py::test_a_report_without_rho_takes_what_dev_chooses
    """
    asked = checked(model, corpus, patterns, SHARES, ("kfac",), "rho", None, "dev", seed, WHO)
    require_basis(model, basis, asked)
    require_mass(basis, asked)
    known = facts(model, corpus, asked, basis, Collecting(seed=seed))
    lines = Lines(path, known, fresh=True, who=WHO)
    made = begun(model, corpus, asked, basis, lines, path, None, None, progress, told)
    return chosen(swept(made, told))


def chosen(found: Sweep) -> Choice:
    """What a sweep's dev populations choose.

    Raises:
        RangeError: every edit, or the unedited model, has no perplexity that is a number.

    Proof: tests/test_choice.py::test_the_sentence_says_what_it_costs,
        ::test_no_edit_that_spoils_all_is_chosen
    """
    base = dev_cost(found.baseline["dev"])
    assert base is not None, "`require_dev` was called"
    edits = []
    for each in found.edits:
        cost = dev_cost(each.populations["dev"]) or (math.inf, math.inf)  # logits are no numbers
        edits.append((each, cost[0] / base[0], cost[1]))
    one, ratio, recited = least_recited(edits, MOST)
    if not (math.isfinite(ratio) and math.isfinite(base[0])):
        raise RangeError(
            f"{WHO}: no rho can be chosen: on dev the perplexity of "
            f"{'every edit that was tried' if math.isfinite(base[0]) else 'the unedited model'} "
            "is infinite, or no number. Give --rho and --layers."
        )
    dear = "" if ratio <= MOST else f"; none costs at most {MOST - 1:.0%}, and this one the least"
    return Choice(
        one.layers, one.rho,
        f"rho {one.rho:g} of {one.layers}, of {number_of(len(edits), 'edit')} on dev: recites "
        f"{recited:.1%} where the unedited model does {base[1]:.1%}, perplexity "
        f"{ratio - 1:+.1%}{dear}",
    )  # fmt: skip
