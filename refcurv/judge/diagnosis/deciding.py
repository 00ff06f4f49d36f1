"""What of a setting decides A, and what decides G; which settings can change a side; its words."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

from refcurv.judge.case import Case
from refcurv.judge.diagnosis.seen import states
from refcurv.judge.diagnosis.variants import REFERENCE, Setting, combined, fitting, settings
from refcurv.judge.diagnosis.variants.positions import BUT, positions
from refcurv.judge.diagnosis.variants.stopped import BACKWARD, SILENT
from refcurv.judge.diagnosis.variants.texts import PROMPT, TEXTS, reads_alike, unlabelled

SIDES: Mapping[str, tuple[str, ...]] = {
    "A": ("rows_A", "pooling_A", "tensor_A", "count", "text", "token", "network", "pads"),
    "G": ("labels", "amount", "smoothing", "z_loss", "where", "rows_G", "pooling_G", "tensor_G",
          "batch", "count", "text", "token", "network", "pads", "mean", "redraw"),
}  # fmt: skip
"""The fields of a setting that decide A, and those that decide G."""

_UNSAID = ("batch", "amount", "token", "pads", "mean", "redraw")
"""Fields that are said with another, or that are no fault."""


def part(setting: Setting, side: str) -> Setting:
    """What of a setting decides one side."""
    return Setting(**{name: getattr(setting, name) for name in SIDES[side]})


def parts(setting: Setting) -> set[tuple[str, Setting]]:
    """What of a setting decides A, and what decides G."""
    return {(side, own) for side in SIDES if (own := part(setting, side)).faults}


def labels_of(setting: Setting) -> Setting:
    """What of a setting decides whose labels there are, and where."""
    names = ("labels", "amount", "smoothing", "where", "mean")
    return Setting(**{name: getattr(setting, name) for name in names})


def stages(case: Case, side: str) -> Iterator[list[Setting]]:
    """The single deviations that can change a side, the cheapest first."""
    every = [one for one in settings(case) if part(one, side).faults and one.count != "labels"]
    every = [one for one in every if side == "G" or not _leaves_A(case, one)]
    plain = [one for one in every if one.run == REFERENCE.run or one.run == Setting(pads=one.pads)]
    plain += fitting(case, every)
    plain += [one for one in every if is_silent(case, one)]
    network = [one for one in every if one.network and one not in plain]
    yield plain
    yield [one for one in every if one not in plain and one not in network]
    yield network


def _leaves_A(case: Case, setting: Setting) -> bool:
    """Does it change labels of a text alone, or a backward pass?"""
    if setting.network:
        return all(name in BACKWARD for name, _ in setting.network)
    if setting.text not in TEXTS:
        return False
    assert case.model is not None and case.corpus is not None
    corpus, config, rows = case.corpus, case.model.config, case.reference.rows
    at = case.once("positions", lambda: positions(corpus, config, rows))
    return reads_alike(at, setting.text, setting.token, config, rows)


def is_silent(case: Case, setting: Setting) -> bool:
    """Does it send nothing to those layers of every block whose G is 0 in theirs, and no others?"""
    silent = {x for name, _ in setting.network for x in SILENT.get(name, ())}
    asked = [x for x in case.matched if x.rpartition(".")[2] in silent]
    each = {x: side["G"].filled for x in case.matched if "G" in (side := states(case, x))}
    return bool(asked) and {*asked} == {x for x, filled in each.items() if not filled}


def partners(case: Case, setting: Setting | None) -> list[Setting]:
    """The deviations that have this part on side A."""
    if setting is None:
        return []
    found = [one for one in settings(case) if part(one, "A") == setting]
    if setting.rows_A.startswith(BUT):
        found.append(replace(setting, rows_G=setting.rows_A))
    if setting.text.startswith(PROMPT):
        found.append(replace(setting, text=unlabelled(setting.text)))
    return list(dict.fromkeys([*found, setting]))


def joined(base: Sequence[Setting], others: Iterable[Setting]) -> list[Setting]:
    """Each of the base with each of the others, where they go together."""
    pairs = (combined(one, other) for one in base for other in others)
    return list(dict.fromkeys(pair for pair in pairs if pair is not None))


def words(setting: Setting) -> str:
    """What differs, field by field."""
    out = []
    for name in dict.fromkeys(n for names in SIDES.values() for n in names):
        value = getattr(setting, name)
        if value == getattr(REFERENCE, name) or name in _UNSAID:
            continue
        if name == "network":
            out += [f"`{change} {size:g}`" if size else f"`{change}`" for change, size in value]
            continue
        label = name.removesuffix("_A").removesuffix("_G").replace("_", "-")
        more = {"labels": setting.amount, "pooling_G": setting.batch}.get(name, 0)
        value = f"{value:.4g}" if isinstance(value, float) else value
        out.append(f"{label} `{value}`" + (f" ({more:g})" if more else ""))
        out[-1] += f" (token {setting.token})" if name == "text" and setting.token >= 0 else ""
    return "as with " + ", ".join(out) if out else "as ours"
