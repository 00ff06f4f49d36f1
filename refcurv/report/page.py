"""One page of HTML with everything a run found."""

from __future__ import annotations

import json
import math
import os
import shlex
from collections.abc import Iterator, Mapping
from html import escape
from typing import Any, NamedTuple

from refcurv.files.disk import write_bytes
from refcurv.law.checks import EmptyError
from refcurv.report import plots
from refcurv.report.cells import (
    MISSING,
    Json,
    decimal,
    number,
    percent,
    population_name,
    relative,
    rho_text,
    whole,
)
from refcurv.report.html import document, facts, figure, html_table, minus, prose, section
from refcurv.report.table import (
    agreement_table,
    band_table,
    certainty_table,
    controls_table,
    edit_table,
    edited_layers,
    evaluation_table,
    interval_text,
    kept_table,
    knows_intervals,
    measured,
    past_table,
)

PAPER = "“From Memorization to Reasoning in the Spectrum of Loss Curvature” (arXiv 2510.24256)"
ABOUT = (
    f"A reference computation, on a CPU in NumPy, of {PAPER}. For each edited weight matrix the "
    "second moments of its inputs and of its output gradients give pairs of directions ordered by "
    "loss curvature; the edit keeps the sharpest pairs that together hold a share ρ of the "
    "curvature and sets all others to zero. Sharp directions carry what many inputs share, flat "
    "ones what few inputs need: the tables and figures below show what this model still recites "
    "and what it can still do."
)


class _Picture(NamedTuple):
    """A figure of the page: its alternative text, what it shows, how to read it."""

    alt: str
    see: str
    read: str


PICTURES: Mapping[str, _Picture] = {
    "retention": _Picture(
        "Horizontal bars: the share of each ability that the edit left, memorised text first.",
        "What the edit takes and what it leaves.",
        "A bar is accuracy after the edit over accuracy before; 100 % means nothing was lost. A "
        "diamond, where an answer can be guessed, is the same above that chance. Brackets are "
        "what the paper reports for a model of 7 billion parameters: there, memorised text suffers "
        "most, then arithmetic, facts, open-book answers and logic. Compare the order, not "
        "the values.",
    ),
    "front": _Picture(
        "Recitation left against perplexity, one line per method of cutting.",
        "What forgetting costs.",
        "Each line starts at the unedited model and follows one way of cutting as it cuts more: "
        "down is text that is no longer recited, right is what that costs in perplexity. A line "
        "further down and left is a better way to forget. The large marks are the edits of the "
        "table above, the dotted line is the perplexity of the K-FAC edit. They "
        "were matched on the dev split: here, on another one, they may stand beside the line.",
    ),
    "spectrum": _Picture(
        "Left: cumulative curvature mass against the share of pairs kept, with each layer's cut. "
        "Right: the eigenvalues of G and of A by rank.",
        "Where the curvature lies, and where the edit cuts.",
        "At the left, pairs of directions are added from the sharpest on; the marker is the cut: "
        "pairs to its right are set to zero. The earlier a curve rises, the more the curvature is "
        "concentrated. At the right are the two spectra whose products these pairs are, each over "
        "its largest eigenvalue. Layers that share their input share μ.",
    ),
    "mask": _Picture(
        "For each edited layer the plane of pairs of directions, coloured by curvature, with the "
        "staircase that separates kept from dropped pairs.",
        "Which pairs the edit keeps.",
        "A point is a pair of an output direction and an input direction, the sharpest of both in "
        "the upper left corner; an area is a share of the pairs. Colour is their curvature, the "
        "product of two eigenvalues, a shade for each power of ten. The edit keeps what lies "
        "inside of the black line, a line of equal curvature: the flatter the output direction, "
        "the sharper the input direction must be, hence a staircase. What is veiled is set to "
        "zero.",
    ),
    "bands": _Picture(
        "Ratio of activation norms, memorised over clean tokens: a row for each layer, a column "
        "for each curvature band, left by pair mass, right by input rank.",
        "Which directions memorised text drives.",
        "Each cell compares memorised with clean tokens within one band of directions, sharpest "
        "at the left: red is driven more by memorised text, blue less. A row that goes from blue "
        "to red is the paper's signature: memorised text leans on flat directions. Left, the "
        "layer's response restricted to pairs of a band of curvature mass; right, its input "
        "projected on a band of eigenvectors of A. Layers in bold were edited.",
    ),
}

CONTROLS = (
    "Any cut costs something. Here the same matrices are cut in other ways, each as strongly as "
    "makes the perplexity of clean text that of the K-FAC edit: matched on the dev split within "
    "{tolerance}, reported on this one. SVD drops the smallest singular values; random pairs keeps "
    "K-FAC’s directions and draws the pairs; random basis cuts K-FAC’s staircase out of random "
    "directions. A method that overshoots costs more even where it cuts least; one that falls "
    "short costs less even where it cuts most."
)
BSN = (
    "BalancedSubnet, which has to be trained to forget, is compared with them in validation/paper."
)


def write_page(results: Json, path: str | os.PathLike[str]) -> None:
    """Write results as one self-contained page of HTML, atomically.

    Args:
        results: the dictionary of `refcurv demo`, results.json. Missing parts are left out.
        path: of the page; its folder must exist.

    Raises:
        RefcurvError: matplotlib is not installed. SchemaError: no such folder. StorageError: the
            machine could not write.

    Proof:  tests/test_report.py::test_page_needs_nothing_else; ::test_page_escapes
    """
    write_bytes("report", path, page(results).encode("utf-8", "replace"))


def page(results: Json) -> str:
    """The page's text; the same for the same results."""
    title = escape(str(results.get("title") or "refcurv"))
    version = escape(str(results.get("refcurv", "")))
    told = [f'<p class="warning">{prose(str(one))}</p>' for one in results.get("warnings") or ()]
    head = [f"<h1>{title}</h1>\n<p>{escape(ABOUT)}</p>", *told, _tiles(results)]
    return document(title, head, _sections(results), f"Made by refcurv {version}.")


def _sections(results: Json) -> Iterator[str]:
    evaluation = results["evaluation"]
    yield section("Settings", facts(_settings(results.get("settings") or {})))
    yield section(
        "Memory versus reasoning",
        "<p>Recitation counts texts continued without a single error (strict), with at most a "
        "quarter of the tokens wrong (loose), and the mean edit distance per token. Retention is "
        "after over before; above chance, both less the accuracy of a guess. nDCG@10 compares the "
        "ten likeliest next tokens of both models in their order; 1: the same ten.</p>",
        html_table(evaluation_table(evaluation)),
        html_table(certainty_table(evaluation)) if knows_intervals(evaluation) else "",
        html_table(agreement_table(evaluation)),
    )
    yield section("The curvature, or the cutting?", *_compared(results))
    figures = [_figure(results, name) for name in PICTURES if name != "front"]
    if any(figures):
        yield section("In pictures", *figures)
    edited = edited_layers(results)
    yield section(
        "The edit",
        "<p>Gap is the relative distance between the last pair kept and the first one dropped; "
        "acceptable pairs lie so close to the cut that another correct program may decide them "
        "differently.</p>",
        html_table(edit_table(results.get("edit") or ())),
        html_table(past_table(results.get("edit") or ())),
        html_table(kept_table(results.get("kept") or ())),
        html_table(band_table(results.get("bands") or {}, edited)),
    )
    yield section("How it was made", *_made(results))
    provenance = json.dumps(results.get("provenance") or {}, indent=2, ensure_ascii=False)
    yield section(
        "Provenance",
        "<details>\n<summary>Versions, machine and conventions</summary>",
        f"<pre>{escape(provenance)}</pre>\n</details>",
    )


def _compared(results: Json) -> list[str]:
    """The controls: table and trade-off, or why there are none."""
    found = results.get("controls") or {}
    if not found.get("compared"):
        reason = str(found.get("left_out") or "no other cuts were made.")
        return [f"<p>Not compared with other cuts: {escape(reason)} {BSN}</p>"]
    text = CONTROLS.format(tolerance=percent(found.get("tolerance")))
    table = html_table(controls_table(results))
    return [f"<p>{text} {BSN}</p>", table, _figure(results, "front")]


# ------------------------------------------------------------------ numbers first


def _tiles(results: Json) -> str:
    """Four numbers that tell the story: recitation, perplexity, worst answer, pairs kept."""
    evaluation = results["evaluation"]
    split = str(evaluation.get("split") or "")
    tiles = [_tile(row, split) for row in evaluation["rows"] if row["kind"] in ("recite", "text")]
    answers = [
        row
        for row in evaluation["rows"]
        if row["kind"] == "answer" and not math.isnan(number(row.get("retention")))
    ]
    if answers:
        worst = min(answers, key=lambda row: number(row["retention"]))
        tiles.append(_tile(worst, split, "most affected ability: "))
    kept = sum(number(row.get("kept")) for row in results.get("edit") or ())
    pairs = sum(number(row.get("pairs")) for row in results.get("edit") or ())
    if pairs > 0:
        share = f"{whole(kept)} of {whole(pairs)}"
        tiles.append(_one_tile("pairs of directions kept", percent(kept / pairs), share))
    return '<dl class="tiles">\n' + "\n".join(tiles) + "\n</dl>" if tiles else ""


def _tile(row: Json, split: str, lead: str = "") -> str:
    """One population: its value after the edit, and the one before."""
    name = population_name(str(row["name"]), split)
    measure = {"recite": "strict", "text": "perplexity"}.get(str(row["kind"]), "accuracy")
    after, before = row["after"], row.get("before") or {}
    words = {"strict": "memorised text recited: ", "perplexity": "perplexity: "}
    note = f"{measured(measure, before)} before the edit" if before else ""
    rise = percent(relative(before.get(measure), after.get(measure)), sign="+")
    if measure == "perplexity" and rise != MISSING:
        note += f" ({rise})"
    if sure := interval_text(str(row["kind"]), row.get("interval")):
        note += f"{'; ' if note else ''}n {whole(row.get('items'))}, 95 % interval {sure}"
    label = (lead or words.get(measure, "")) + name
    return _one_tile(label, measured(measure, after), note, hot=measure == "strict")


def _one_tile(label: str, value: str, note: str, hot: bool = False) -> str:
    kind = ' class="hot"' if hot else ""
    small = f"<small>{minus(note)}</small>" if note else ""
    return f"<div{kind}><dt>{escape(label)}</dt><dd>{minus(value)}{small}</dd></div>"


# ------------------------------------------------------------------ parts


def _settings(settings: Json) -> dict[str, str]:
    """Known settings with readable names, the others as they are called."""
    names = {"rho": "ρ", "layers": "edited layers", "calibration_tokens": "calibration tokens"}
    found = {}
    for key, value in settings.items():
        text = rho_text(value) if key == "rho" else str(value)
        if key == "calibration_tokens":
            text = whole(value)
        found[names.get(key, key.replace("_", " "))] = text
    return found


def _figure(results: Json, name: str) -> str:
    """A plot and its caption; nothing where the results have nothing to draw."""
    try:
        drawn = plots.FIGURES[name](results)
    except EmptyError:
        return ""
    picture = PICTURES[name]
    return figure(plots.svg(drawn), picture.alt, picture.see, picture.read)


def _made(results: Json) -> list[str]:
    """The commands, the files and the seconds."""
    commands = "\n".join(_commands(results.get("settings") or {}, results.get("files") or {}))
    parts = [
        "<p>One command does all of it (<code>refcurv demo</code> on the shipped files, "
        "<code>refcurv report</code> on others); step by step it is:</p>",
        f"<pre>{escape(commands)}</pre>",
    ]
    seconds = [f"{k} {decimal(v, 1)} s" for k, v in (results.get("seconds") or {}).items()]
    if seconds:
        parts.append(f"<p>Time taken: {escape(', '.join(seconds))}.</p>")
    return parts


def _commands(settings: Json, files: Json) -> list[str]:
    """The command lines with this run's settings and file names, quoted for a shell."""
    defaults = {"model": "model.h5", "corpus": "corpus.h5", "factors": "factors.h5"}
    defaults |= {"basis": "basis.h5", "edited": "edited.h5"}
    model, corpus, factors, basis, edited = (
        shlex.quote(str(files.get(name) or default)) for name, default in defaults.items()
    )
    options = {"layers": settings.get("collected", "blocks.*.mlp.*")}
    choices = ("fisher", "rows", "seed", "dtype")
    options |= {key: settings[key] for key in choices if key in settings}
    flags = " ".join(f"--{key} {shlex.quote(str(value))}" for key, value in options.items())
    bias = f" --bias {shlex.quote(str(settings['bias']))}" if "bias" in settings else ""
    narrow = " --dtype float32" if settings.get("dtype") == "float32" else ""
    rho = settings.get("rho")
    shares: Mapping[str, Any]
    shares = rho if isinstance(rho, Mapping) else {str(settings.get("layers", "**")): rho}
    cuts = " ".join(f"--rho {shlex.quote(f'{k}={rho_text(v)}')}" for k, v in shares.items())
    made = [
        f"refcurv collect {model} {corpus} -o {factors} {flags}",
        f"refcurv decompose {factors} -o {basis}{bias}",
        f"refcurv edit {model} {basis} -o {edited} {cuts}",
        f"refcurv evaluate {edited} {corpus} --baseline {model}{narrow}",
    ]
    taken = 2 if "taken basis" in settings else "taken factors" in settings
    return made[taken:]
