"""The cases of the score: a program, a setting, labels, dtypes, and a fault or two, or none."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from importlib import import_module
from typing import Any

import numpy as np

import refcurv as rc
from refcurv.judge.verdict import FAIL, MISSING
from refcurv.model.part import part_of
from validation.judge.models import GROUPS, SETTINGS
from validation.judge.programs.editor import Editor
from validation.judge.setting import Setting

COLLECTORS = ("torch", "numpy")
FISHER = {"gold": "empirical", "given": "sampled", "own": "sampled", "expected": "expected"}
"""Labels of a program → fisher of the reference; `given` are the reference's draws."""
DRAWS = 32
"""Of a reference beside a program that draws for itself: it then knows what drawing does."""
ARITHMETIC = {
    "float64": "float64",
    "float32": "float32",
    "bfloat16": "model=bfloat16,products=float32,sums=float32,solver=float32,stored=float32",
}
EXPECTED = ("olmo2-padded", "llama-left", "siglip-mean", "gptj-few", "olmo3-few", "esm2-tags",
            "vit22b-gray", "stablelm-systems", "eva-bands", "imagegpt-clusters",
            "aimv2-sorted")  # fmt: skip
"""The settings of labels "expected", which take a backward pass for each position and entry."""
BUDGETS = 10.0
"""A fault counts where it moves some number by more than so many budgets."""


def faults_of(program: str) -> dict[str, Any]:
    """The faults planted in "torch", "numpy" or "editor", by name; PyTorch is imported late."""
    found: dict[str, Any] = import_module(f"validation.judge.planted_{program}").FAULTS
    return found


@dataclass(frozen=True)
class Case:
    """One run of one program. faults: their class names, none of an honest run."""

    program: str
    setting: str
    labels: str
    dtype: str
    faults: tuple[str, ...] = ()

    @property
    def id(self) -> str:
        """A name that says everything."""
        fault = "+".join(self.faults) or "honest"
        return "/".join((self.program, self.setting, self.labels, self.dtype, fault))

    @property
    def honest(self) -> Case:
        """The same without a fault."""
        return replace(self, faults=())

    @property
    def yardsticks(self) -> list[Case]:
        """The honest runs whose budgets the effect of a fault is measured by.

        Beside a program that draws its own labels it is also that of float64, where nothing but
        drawing can explain what it differs by.
        """
        more = [replace(self.honest, dtype="float64")] if self.labels == "own" else []
        return [self.honest, *more]

    def program_class(self) -> Any:
        """The collector, or one with its faults for bases."""
        if not self.faults:
            name = f"validation.judge.programs.{self.program}_collector"
            return import_module(name).Collector
        faults = faults_of(self.program)
        return type("Planted", tuple(faults[name] for name in self.faults), {})


@cache
def setting_of(name: str) -> Setting:
    """A setting, made once."""
    return SETTINGS[name]()


@cache
def reference(setting: str, labels: str) -> rc.Factors:
    """The truth for a setting and what its labels are."""
    s, draws = setting_of(setting), DRAWS if labels == "own" else 1
    return rc.collect(s.model, s.corpus, s.layers, FISHER[labels], draws=draws)


def dump_of(case: Case) -> dict[str, Any]:
    """What the program writes."""
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        made = case.program_class()(setting_of(case.setting), case.labels, case.dtype)
        return dict(made.collect())


def judged(case: Case, dump: dict[str, Any]) -> rc.Verdict:
    """The verdict of a dump, everything declared that an author knows."""
    s = setting_of(case.setting)
    declared = {"fisher": FISHER[case.labels], "rows": "reached"}
    declared |= {"labels": "given"} if case.labels == "given" else {}
    declared |= {"bias": "joint"} if s.joint else {}
    truth = reference(case.setting, case.labels)
    return rc.validate(
        dump, truth, model=s.model, corpus=s.corpus, declared=declared,
        arithmetic=ARITHMETIC[case.dtype],
    )  # fmt: skip


def effect(verdict: rc.Verdict, *honest: rc.Verdict) -> float:
    """By how many of the honest runs' budgets the fault moves what it moves most.

    Of two honest runs the larger budget counts: one that had to, allows for drawing. Infinite
    where a number became none: a shape, a NaN, a count, a layer that is missing.
    """
    budget: dict[tuple[str, str], float] = {}
    for f in (f for one in honest for f in one.findings):
        at = f.layer, f.quantity
        budget[at] = max(budget.get(at, 0.0), f.budget or 0.0)
    most = 0.0
    for f in verdict.findings:
        limit = budget.get((f.layer, f.quantity))
        if f.verdict in (FAIL, MISSING) and (f.error is None or not limit):
            return np.inf
        if f.error is not None and limit:
            most = max(most, f.error / limit)
    return most


# ------------------------------------------------------------------ which there are


def singles(quick: bool = False) -> Iterator[Case]:
    """Honest runs, then each fault, wherever its class says that it may show."""
    settings = ("olmo2-padded", "gpt2-joint") if quick else tuple(SETTINGS)
    dtypes = ("float64",) if quick else tuple(ARITHMETIC)
    labels = ("gold", "given") if quick else ("gold", "given", "own")
    for program in COLLECTORS:
        for setting in settings:
            for dtype in dtypes:
                for kind in labels:
                    yield Case(program, setting, kind, dtype)
                if program == "torch" and setting in EXPECTED:
                    yield Case(program, setting, "expected", dtype)
        for name, fault in faults_of(program).items():
            for setting in fault.settings or settings:
                if setting not in settings:
                    continue
                for dtype in [d for d in fault.dtypes if d in dtypes]:
                    for kind in [k for k in fault.kinds if k in labels]:
                        yield Case(program, setting, kind, dtype, (name,))
                    if "expected" in fault.kinds and setting in EXPECTED:
                        yield Case(program, setting, "expected", dtype, (name,))


def pairs(group: str, seed: int = 0) -> Iterator[Case]:
    """Random pairs of faults of the PyTorch program in a group of settings, without end."""
    rng = np.random.default_rng(seed)
    faults, settings = faults_of("torch"), list(GROUPS[group])
    while settings:
        one, two = (str(name) for name in rng.choice(list(faults), 2, replace=False))
        setting, kind = str(rng.choice(settings)), str(rng.choice(["gold", "given"]))
        dtype = str(rng.choice(list(ARITHMETIC)))
        fit = all(
            kind in f.kinds and dtype in f.dtypes and setting in (f.settings or SETTINGS)
            for f in (faults[one], faults[two])
        )
        if fit and one.split("_")[0] != two.split("_")[0]:
            yield Case("torch", setting, kind, dtype, (one, two))


# ------------------------------------------------------------------ edits

EDITED = {
    "olmo2-padded": "blocks.*.mlp.*",
    "olmo2-square": "blocks.1.mlp.up",
    "gemma-packed": "blocks.*.attn.*",
    "llama-left": "blocks.{0,2}.mlp.*",
    "neox-packed": "blocks.*.attn.{q,o}",
    "gemma3-prompts": "blocks.{0,2}.mlp.*",
    "mistral-ragged": "blocks.*.{attn.o,mlp.down}",
    "gptj-few": "blocks.*.attn.{q,o}",
    "falcon-packed": "blocks.*.{attn.o,mlp.down}",
    "smollm3-chats": "blocks.*.mlp.{up,down}",
    "gptneo-repeated": "blocks.*.attn.{q,v}",
    "phi4-half": "blocks.*.{attn.o,mlp.down}",
    "vaultgemma-stream": "blocks.*.attn.{q,o}",
    "starcoder2-fim": "blocks.*.attn.{q,o}",
    "stablelm-systems": "blocks.*.mlp.*",
    "exaone4-choices": "blocks.{1,3}.*.*",
    "imagegpt-clusters": "blocks.{0,2}.attn.{q,o}",
}


def edited(setting: str, few: bool) -> Setting:
    """A setting for the editor: of two sequences alone where factors must lack rank."""
    s = replace(setting_of(setting), layers=EDITED[setting])
    return replace(s, corpus=part_of(s.corpus, slice(0, 2))) if few else s


def judged_edit(setting: str, fault: str) -> tuple[rc.Verdict, rc.Verdict]:
    """The verdict of an editor's dump, and of an honest one; `fault` may be ""."""
    made = faults_of("editor")[fault] if fault else Editor
    s = edited(setting, getattr(made, "few", False))
    truth = rc.collect(s.model, s.corpus, s.layers, "empirical")
    declared = {"fisher": "empirical", "rows": "reached", "rho": repr(made.rho)}
    declared |= {"Lambda": "token"}

    def verdict(program: Any) -> rc.Verdict:
        return rc.validate(
            program(s).edit(), truth, model=s.model, corpus=s.corpus, basis=rc.decompose(truth),
            declared=declared, arithmetic="float64",
        )  # fmt: skip

    return verdict(made), verdict(type("Honest", (Editor,), {"rho": made.rho}))
