"""What the paper says, as statements with a direction that was fixed before the seeds were run.

Each is judged by one number per seed: it holds if its 95 % t interval lies on the side that the
claim says; if only the mean does, that is said.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

from validation.paper.results import (
    ORDER,
    Json,
    Runs,
    cut_layers,
    named,
    over,
    retained,
    rows,
    strict,
    table,
)


@dataclass(frozen=True, slots=True)
class Claim:
    """`value` of a run is to be above `bound`, or below; shown times `scale`."""

    text: str
    value: Callable[[Json], float]
    bound: float
    above: bool = True
    scale: float = 100

    def row(self, runs: Runs) -> list[str]:
        """Statement, what was found, verdict."""
        found, side = over(runs, self.value), 1 if self.above else -1
        excess = side * (found.mean - self.bound)
        verdict = "no"
        if excess >= 0:
            verdict = "**yes**" if excess >= found.half else "in the mean"
        limit = f"{'≥' if self.above else '≤'} {self.scale * self.bound:g}"
        digits = 1 if self.scale > 1 else 2
        return [self.text, limit, found.text(digits, self.scale), f"{len(runs)}", verdict]


# ------------------------------------------------------------------ language model


def kept(name: str) -> Callable[[Json], float]:
    """What the chosen K-FAC edit leaves of a population of the test split."""
    return lambda run: retained(rows(run["compared"]["kfac"])[name])


def margin(run: Json) -> float:
    """The most damaged other population less quotes."""
    return min(kept(name)(run) for name in ORDER[1:]) - kept("quotes")(run)


def less_than(method: str) -> Callable[[Json], float]:
    """Strict recitation of the half that was not told: K-FAC less another method."""
    return lambda run: strict(run["compared"]["kfac"]) - strict(run["compared"][method])


def rare_less_frequent(run: Json) -> float:
    """Facts known after the edit: the rarest three tenths less the most frequent three."""
    after = run["facts"]["after"]
    return (sum(after[-3:]) - sum(after[:3])) / 3


def flat_less_sharp(kind: str) -> Callable[[Json], float]:
    """Ratio of quotes to language: the flattest band less the sharpest, mean over cut layers."""

    def value(run: Json) -> float:
        ratio = [run["activation"][kind][name]["ratio"] for name in cut_layers(run)]
        return sum(one[-1] - one[0] for one in ratio) / len(ratio)

    return value


def ascending(kind: str) -> Callable[[Json], float]:
    """The share of cut layers whose ratios rise from each band to the next flatter one."""

    def value(run: Json) -> float:
        ratio = [run["activation"][kind][name]["ratio"] for name in cut_layers(run)]
        return sum(all(a < b for a, b in pairwise(one)) for one in ratio) / len(ratio)

    return value


def extra_nats(run: Json) -> float:
    """Nats per word that quotes lose beyond what fresh sentences of the language lose."""
    lost = {
        name: run["special"][name]["after"] - run["special"][name]["before"]
        for name in ("quotes", "fresh")
    }
    return lost["quotes"] - lost["fresh"]


LANGUAGE = (
    Claim("memorised text keeps least: the next most damaged ability less quotes [points]",
          margin, 0),
    Claim("quotes left by the K-FAC edit [%]", kept("quotes"), 0.1, above=False),
    Claim("logic left (boolean) [%]", kept("boolean"), 0.95),
    Claim("copying left [%]", kept("copying"), 0.95),
    Claim("open book left [%]", kept("open_book"), 0.93),
    Claim("facts left [%]", kept("facts"), 0.74),
    Claim("arithmetic left (addition) [%]", kept("addition"), 0.66),
    *(Claim(f"K-FAC less {named(m)} at one perplexity, quotes recited [points]", less_than(m), 0,
            above=False) for m in ("svd", "random pairs", "random basis", "bsn")),
    Claim("rare facts less frequent ones after the edit [points]", rare_less_frequent, 0,
          above=False),
    Claim("activation by rank in A: flattest band less sharpest [ratio]",
          flat_less_sharp("input_rank"), 0, scale=1),
    Claim("cut layers whose four bands are sorted, by rank in A [%]", ascending("input_rank"), 1),
    Claim("cut layers whose four bands are sorted, by SVD [%]", ascending("svd"), 0, above=False),
    Claim("quotes from factors without quotes [%]", lambda run: strict(run["left_out"]), 0.1,
          above=False),
    Claim("extra loss of quotes over fresh sentences [nats a word]", extra_nats, 0, scale=1),
)  # fmt: skip

ABSENT = Claim("the same in models that never saw the quotes [nats a word]", extra_nats, 0.05,
               above=False, scale=1)  # fmt: skip

# ------------------------------------------------------------------ vision transformer


def returned(method: str) -> Callable[[Json], float]:
    """The memorised images that are given their true label at a method's best strength."""

    def value(run: Json) -> float:
        best = run["compared"][method]["best"]
        return 0.0 if best is None else best["test"]["returned"]

    return value


def fall(run: Json) -> float:
    """By how much validation accuracy falls there."""
    best = run["compared"]["kfac"]["best"]
    return run["baseline"]["test"]["validation"] - best["test"]["validation"]


def more_than(method: str) -> Callable[[Json], float]:
    """Images given back by K-FAC, less those of another method."""
    return lambda run: returned("kfac")(run) - returned(method)(run)


VISION = (
    Claim("ViT: memorised images given their true label [%]", returned("kfac"), 0.5),
    Claim("ViT: fall of validation accuracy [points]", fall, 0.03, above=False),
    *(Claim(f"ViT: K-FAC less {named(m)}, true labels given [points]", more_than(m), 0)
      for m in ("svd", "random pairs", "random basis")),
)  # fmt: skip


def table_of(runs: Runs, controls: Runs, pictures: Runs | None = None) -> str:
    """Every claim, what was found, and whether it holds; `pictures` are the ViT's runs."""
    body = [*(claim.row(runs) for claim in LANGUAGE), ABSENT.row(controls)]
    body += [claim.row(pictures) for claim in VISION] if pictures else []
    return table(["claim", "should be", "found", "seeds", "holds"], body)
