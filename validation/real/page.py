"""The tables of README.md, from the results alone; what is not measured says so."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from itertools import pairwise

import numpy as np

from refcurv.evaluation.bands import MASS_EDGES, RANK_PERCENT
from refcurv.evaluation.intervals import paired
from validation.bench.page import table, with_block
from validation.real import fetch
from validation.real.choosing import best, chosen, edits, is_complete
from validation.real.parts import DOSES, METHODS, kinds
from validation.real.plan import CALIBRATIONS, HERE, PLANS, Plan, Record, claims, claims_sha256
from validation.real.results import Results, load
from validation.real.verdicts import (
    ABLE,
    AT_PERPLEXITY,
    Replicate,
    Verdict,
    judged_sets,
    replicates,
    share,
    share_interval,
    verdicts,
)

README = HERE / "README.md"
BEGIN, END = "<!-- real: begin -->", "<!-- real: end -->"
NOT = "not measured"
NAMES = {"smollm2": "SmolLM2-135M-Instruct, Q4_1", "gemma3": "Gemma 3 270M, Q4_K_M",
         "small": "the model that ships with refcurv"}  # fmt: skip
TASKS = ("facts_frequent", "facts_middle", "facts_rare", "open_book_one", "open_book_two",
         "addition", "addition_words", "logic", "copying", "ordering")  # fmt: skip
GROUPS = ("recited", "own", "arithmetic", "facts", "open_book", "logic", "copying", "ordering")


def percent(x: float | None) -> str:
    return "–" if x is None or not math.isfinite(x) else f"{100 * x:.0f} %"


def within(pair: tuple[float, float] | None) -> str:
    """An interval in percent."""
    return "" if pair is None else f" ({100 * pair[0]:.0f}–{100 * pair[1]:.0f})"


def number(x: float | None, digits: int = 2) -> str:
    return "–" if x is None or not math.isfinite(x) else f"{x:.{digits}f}"


# ------------------------------------------------------------------ one table each


def facts(results: Results, plan: Plan) -> str:
    """The model, its texts, its passages, what it can do."""
    known = results.found("models")
    if "unedited" not in known:
        return NOT
    one, parts = known["unedited"], []
    parts.append(
        f"{one['parameters']:,} parameters, {one['blocks']} blocks, width {one['width']}, MLP "
        f"{one['mlp']}, vocabulary {one['vocabulary']:,}. Tokens: "
        + ", ".join(f"`{name}` {n:,}" for name, n in one["tokens"].items())
        + "."
    )
    lines = []
    for name in TASKS:
        dev, test = (one["accuracy"].get(f"{name}_{split}") for split in ("dev", "test"))
        lines.append((f"`{name}`", *(_accuracy(x) for x in (dev, test)), _able(test)))
    parts.append(table(("set", "right of dev", "right of test (95 %)", "judged"), lines))
    parts.append(_passages(known.get("recited"), plan))
    return "\n\n".join(parts)


def _accuracy(one: Record | None) -> str:
    if one is None:
        return "–"
    return f"{percent(one['accuracy'])}{within(one['interval'])} of {one['items']}"


def _able(one: Record | None) -> str:
    right = 0 if one is None else round(one["accuracy"] * one["items"])
    return "yes" if right >= ABLE else f"no: {right} right"


def _passages(known: Record | None, plan: Plan) -> str:
    if known is None:
        return f"Passages: {NOT}."
    count = kinds(known["passages"])
    lines = [
        (f"`{name}`", *(str(count[name, split]) for split in ("dev", "test")))
        for name in sorted({name for name, _ in count})
    ]
    total = [sum(n for (_, to), n in count.items() if to == split) for split in ("dev", "test")]
    lines.append(("together", *map(str, total)))
    of = {(one["document"], one["split"]) for one in known["passages"]}
    lines.append(("from documents", *(str(sum(to == x for _, to in of)) for x in ("dev", "test"))))
    said = float(np.mean([one["said"] for one in known["passages"]]))
    text = (
        f"Passages: windows of {plan.prefix} + {plan.suffix} tokens every {plan.stride}, with "
        f"{plan.least} right tokens in a row or more, of {plan.chapters} chapters of the Bible and "
        f"all of the other two; {said:.1f} tokens are said on average."
    )
    return f"{text}\n\n{table(('passages', 'dev', 'test'), lines)}"


def table_one(results: Results, match: str) -> str:
    """Every method of the first calibration."""
    found = results.found(f"table at equal {match}").get("1")
    if found is None:
        return NOT
    test = found["baseline"]["test"]
    rows = [("none", "", "", test)]
    rows += [(one["method"], percent(one["kept"]), one["verdict"], one["populations"]["test"])
             for one in found["edits"]]  # fmt: skip
    head = ("method", "kept", "match", "perplexity (95 %)", "recited: strict, n (95 %)", "loose",
            "distance", "nats a token", "nats ÷ Δ ln perplexity", "p against K-FAC")  # fmt: skip
    kfac = next(left for name, *_, left in rows if name == "kfac")
    lines = [_method(*row, test, kfac) for row in rows]
    lines.append(("BSN", *[NOT] * (len(head) - 1)))
    clean = test["clean_test"]["tokens"]
    return f"{table(head, lines)}\n\nPerplexity of {clean:,} tokens of `clean_test`."


def _method(
    name: str, kept: str, verdict: str, left: Record, before: Record, kfac: Record
) -> tuple[str, ...]:
    text, said = left["clean_test"], left["recited_test"]
    values, low_high = said["values"], text["interval"] or (None, None)
    rise = nats = math.nan
    if name != "none" and text["values"]["perplexity"]:
        rise = math.log(text["values"]["perplexity"] / before["clean_test"]["values"]["perplexity"])
        nats = values["nats"] - before["recited_test"]["values"]["nats"]
    flags = [np.array([x == "1" for x in one["recited_test"]["right"]]) for one in (left, kfac)]
    p = "" if name in ("none", "kfac") else _p(paired(*flags))
    return (
        name, kept, verdict,
        f"{number(text['values']['perplexity'])} ({number(low_high[0])}–{number(low_high[1])})",
        f"{percent(values['strict'])} of {said['items']}{within(said['interval'])}",
        percent(values["loose"]), number(values["distance"]), number(values["nats"]),
        number(nats / rise, 1) if name != "none" else "", p,
    )  # fmt: skip


def _p(x: float) -> str:
    return "< 0.001" if x < 0.001 else f"{x:.3f}"


def spectrum(results: Results) -> str:
    """What each method leaves of each ability, within the first calibration."""
    runs = replicates(results)
    if "1" not in results.found(AT_PERPLEXITY):
        return NOT
    one = runs[0]
    lines = []
    for group in (*GROUPS, *(name for name in TASKS if name not in GROUPS)):
        whole = judged_sets(one.before, group) if group in GROUPS else [f"{group}_test"]
        names = [name for name in whole if name in one.before]
        if not names:
            lines.append((group, "not judged", *[""] * len(METHODS)))
            continue
        items = sum(one.before[name]["right"].count("1") for name in names)
        cells = []
        for method in METHODS:
            left = one.methods[method]
            cells.append(percent(share(one.before, left, names))
                         + (within(share_interval(one.before, left, names))
                            if method == "kfac" else ""))  # fmt: skip
        lines.append((f"**{group}**" if group in GROUPS else f"`{group}`", str(items), *cells))
    return table(("left of", "items right before", *METHODS), lines)


def answered(results: Results) -> str:
    """Where a guess is often right: how many items are right, by what the answer is."""
    known, runs = results.found("models").get("answers"), replicates(results)
    if known is None or not runs:
        return NOT
    if not known:
        return "No set is one."
    after = [(f"K-FAC, {run.k}", run.methods["kfac"]) for run in runs]
    after += [(name, runs[0].methods[name]) for name in METHODS if name != "kfac"]
    lines, columns = [], [runs[0].before, *(left for _, left in after)]
    for name, answers in known.items():
        before = runs[0].before[name]
        for answer in sorted(set(answers)):
            own = [said == answer for said in answers]
            always = before | {"right": "".join("01"[one] for one in own)}
            lines.append((
                f"`{name.removesuffix('_test')}`", answer,
                *(str(_right(left[name], own)) for left in columns),
                percent(share({name: before}, {name: always}, [name])),
            ))  # fmt: skip
    head = ("set", "answer", "right before", *(what for what, _ in after), "always said, it leaves")
    return table(head, lines)


def _right(left: Record, own: list[bool]) -> int:
    """How many of some items are right."""
    return sum(mark == "1" for mark, one in zip(left["right"], own, strict=True) if one)


def swept(results: Results, plan: Plan) -> str:
    """Layers x rho, of dev: the rise of perplexity, and what is still recited."""
    known = list(edits(results))
    rho = claims()["choice"]["rho"]
    if not known:
        return NOT
    found = {(layers, share): (cost, one) for layers, share, cost, one in known}
    lines = []
    for begin in sorted(plan.runs):
        layers = plan.layers(begin)
        cells = [_cell(found.get((layers, share))) for share in rho]
        lines.append((f"{begin}–{begin + plan.run - 1}", *cells))
    layers, share = chosen(results)
    of = f"{len({one[0] for one in known})} of {len(plan.runs)} runs are measured"
    passages = known[0][3]["items"]
    thirds = (best(results, plan, name) or NOT for name in ("middle", "late"))
    return (
        f"{table(('blocks, gate and up', *(f'ρ {x:g}' for x in rho)), lines)}\n\nDev: rise of "
        f"perplexity, and recited of {passages} passages. {of}. Chosen: `{layers}` at ρ = "
        f"{share:g}{'' if is_complete(results, plan) else ', of those measured so far'}. Best of "
        + "the middle third `{}`, of the late third `{}`.".format(*thirds)
    )


def _cell(one: tuple[float, Record] | None) -> str:
    if one is None:
        return NOT
    cost, said = one
    return f"{100 * (cost - 1):+.1f} %, {percent(said['values']['strict'])}"


def banded(results: Results) -> str:
    """Recited over clean, by curvature, mean over the edited layers; t over calibrations."""
    known = dict(sorted(results.found("bands").items()))
    if not known:
        return NOT
    parts = []
    for kind, edges, what in (
        ("input_rank", [x / 100 for x in RANK_PERCENT], "eigenvectors of A by rank"),
        ("pair_mass", MASS_EDGES, "pairs by curvature mass"),
    ):
        ratio = [np.array([one["ratio"] for one in some[kind]], float) for some in known.values()]
        lines = [
            (f"{100 * a:g}–{100 * b:g} %", *(number(np.nanmean(one[:, at])) for one in ratio))
            for at, (a, b) in enumerate(pairwise(edges))
        ]
        parts.append(table((what, *(f"calibration {k}" for k in known)), lines))
    return "\n\n".join(parts)


def claimed(results: Results, plan: Plan) -> str:
    """Every claim with its verdict."""
    return table(
        ("claim", "should be", "found (t over calibrations)", "verdict"),
        [_claim(one) for one in verdicts(results, plan)],
    )


def _claim(one: Verdict) -> tuple[str, ...]:
    claim = one.claim
    bound = f"below {claim['below']:g}" if "below" in claim else f"above {claim['above']:g}"
    found = NOT if one.found is None else f"{one.found.text(2)} (n = {one.found.n})"
    return claim["says"], bound, found, one.word


def sized(results: Results) -> str:
    """The chosen edit from fewer tokens."""
    lines = []
    for k, whole in results.found(AT_PERPLEXITY).items():
        edit = next(one for one in whole["edits"] if one["method"] == "kfac")
        lines.append(_size(f"{k}, all", edit["kept"], edit["populations"]["test"]))
    for name, one in results.found("sizes").items():
        lines.append(_size(f"{name}: {one['tokens']:,} tokens", one["kept"], one["left"]))
    head = ("calibration", "pairs kept", "perplexity", "recited", "own continuations")
    return table(head, sorted(lines)) if lines else NOT


def _size(name: str, kept: float, left: Record) -> tuple[str, ...]:
    shares = (left[f"{one}_test"]["values"]["strict"] for one in ("recited", "own"))
    perplexity = number(left["clean_test"]["values"]["perplexity"])
    return name, percent(kept), perplexity, *map(percent, shares)


def dosed(results: Results) -> str:
    """The weights quantised again."""
    known = results.found("doses")
    if "none" not in known:
        return NOT
    before, lines = known["none"], []
    for dose in ("none", *DOSES):
        if dose not in known:
            lines.append((dose, *[NOT] * (2 + len(GROUPS))))
            continue
        left = known[dose]
        cells = [number(left["clean_test"]["values"]["perplexity"]),
                 number(left["recited_test"]["values"]["nats"])]  # fmt: skip
        for group in GROUPS:
            names = judged_sets(before, group)
            cells.append(percent(share(before, left, names)) if names else "not judged")
        lines.append((dose, *cells))
    return table(("dose", "perplexity", "nats of a recited token", *GROUPS), lines)


def repeated(results: Results) -> str:
    """How many calibrations there are, and what each left."""
    runs, known = replicates(results), results.found(AT_PERPLEXITY)
    lines = [
        (run.k, number(run.methods["kfac"]["clean_test"]["values"]["perplexity"]),
         *(_left(run, method) for method in METHODS), percent(run.kept("own")))
        for run in runs
    ]  # fmt: skip
    lines += [(str(k), *[NOT] * (2 + len(METHODS))) for k in CALIBRATIONS if str(k) not in known]
    head = ("calibration", "perplexity, K-FAC", *(f"recited, {x}" for x in METHODS), "own, K-FAC")
    return table(head, lines)


def _left(run: Replicate, method: str) -> str:
    """kept(recited), and the word of a search that did not reach K-FAC's perplexity."""
    word = run.match[method]
    more = "" if word in ("given", "matched") else f", {word}"
    return f"{percent(run.kept('recited', method))}{more}"


def costs(results: Results) -> str:
    """Time and memory of each step and part."""
    lines = [
        (f"{row['part']}: {row['key']}" if row["part"] != "steps" else row["key"],
         f"{row['seconds']:,.0f}", f"{row['peak']:,}", row["date"], row["code"])
        for row in results.rows
    ]  # fmt: skip
    head = ("step or part", "processor seconds", "peak MiB", "date", "code")
    return "\n\n".join([*_whole(results), table(head, lines)]) if lines else NOT


def _whole(results: Results) -> Iterator[str]:
    """What an edit costs from the weights on, and what sweeps cost."""
    cost = {f"{row['part']}: {row['key']}": row["seconds"] for row in results.rows}
    made = {
        step: max((x for name, x in cost.items() if name.startswith(f"steps: {step} ")), default=0)
        for step in ("collect", "decompose")
    }
    judged = cost.get("doses: none")
    if all(made.values()) and judged:
        yield (
            f"Factors and eigenbases of all layers of the grid, and one evaluation of all that is "
            f"judged: {sum(made.values()) + judged:,.0f} processor seconds."
        )
    edits = sum(len(found["edits"]) for found in results.found("grid").values())
    if edits:
        spent = sum(x for name, x in cost.items() if name.startswith("grid: "))
        yield f"The grid: {edits} edits on dev, {spent:,.0f} processor seconds."


# ------------------------------------------------------------------ the page


def sections(results: Results, plan: Plan) -> Mapping[str, Callable[[], str]]:
    """Every table by its heading."""
    return {
        "Claims": lambda: claimed(results, plan),
        "What it is, and what it can do unedited": lambda: facts(results, plan),
        "Table 1, at equal perplexity": lambda: table_one(results, "perplexity"),
        "Table 1, at equal forgetting": lambda: table_one(results, "forgetting"),
        "The spectrum of abilities (Figure 3), at equal perplexity": lambda: spectrum(results),
        "Where a guess is often right: items right, by answer": lambda: answered(results),
        "Layers × ρ": lambda: swept(results, plan),
        "Bands by curvature (Figure 2): recited over clean": lambda: banded(results),
        "Five calibrations": lambda: repeated(results),
        "Size of the calibration": lambda: sized(results),
        "Doses of quantisation": lambda: dosed(results),
        "Time and memory": lambda: costs(results),
    }


def block(known: Mapping[str, Results]) -> str:
    """All that is generated."""
    parts = [f"SHA-256 of claims.toml: `{claims_sha256()}`"]
    for model, results in known.items():
        parts.append(f"## {NAMES[model]}")
        for heading, made in sections(results, PLANS[model]).items():
            parts += [f"### {heading}", made()]
    return "\n\n".join(parts)


def render() -> None:
    """README.md, from what is known of both models."""
    known = {model: load(model) for model in fetch.MODELS}
    text = README.read_text(encoding="utf-8")
    README.write_text(with_block(README, text, BEGIN, END, block(known)), encoding="utf-8")
