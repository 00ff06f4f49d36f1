"""The parts of the page: what each finds, from the files of a plan, as plain values."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np

import refcurv as rc
from refcurv.evaluation.bands import bands
from refcurv.evaluation.matching import search_share, text_perplexity
from refcurv.evaluation.suite import finite, measure
from refcurv.files.tokenizer import load_tokenizer
from refcurv.sweeps.methods import STRONGEST, WEAKEST
from validation.real import texts
from validation.real.choosing import best, chosen
from validation.real.files import Files
from validation.real.plan import CALIBRATIONS, DEV, JUDGED, Record, claims, short

METHODS = ("kfac", "svd", "random-basis", "random-pairs")
SIZES = (2, 4, 8)
"""Of the first calibration: a half, a quarter, an eighth of its tokens. Of the others a half."""
DOSES = ("Q8_0", "Q5_0", "Q4_0")


def loaded(files: Files) -> rc.Model:
    return rc.load(files.weights(), dtype="float32")


# ------------------------------------------------------------------ 1: the models


def models(files: Files) -> None:
    """Facts, tokens of each text, passages, and what the unedited model can do and is asked."""

    def prepare() -> tuple[Path, Path]:
        return files.able()

    def make(right: Path, dev: Path) -> Record:
        test = right.with_suffix(".json")
        model = rc.load(files.weights())
        config, shapes = model.config, model.config.parameter_shapes()
        rows = {path: json.loads(path.read_text())["rows"] for path in (dev, test)}
        return {
            "parameters": sum(int(np.prod(shape)) for shape in shapes.values()),
            "blocks": config.layers, "width": config.width, "mlp": config.mlp_width,
            "vocabulary": config.vocabulary,
            "accuracy": {
                one["name"]: {"items": one["items"], "accuracy": one["after"]["accuracy"],
                              "interval": one["interval"], "chance": one["chance"]}
                for some in rows.values() for one in some
            },
            "tokens": {name: _count(files, name) for name in texts.SHA256},
        }  # fmt: skip

    def passages(made: list[Record]) -> Record:
        return {"passages": made}

    plan = files.plan
    files.results.once("models", "unedited", plan.recipe("sets", "texts"), prepare, make)
    files.results.once(
        "models", "recited", _recipe(files, *DEV), lambda: (files.passages(),), passages
    )
    files.results.once(
        "models", "answers", _recipe(files, *JUDGED), lambda: (files.judged(),),
        lambda corpus: _answers(files, corpus),
    )  # fmt: skip


def _answers(files: Files, corpus: rc.Corpus) -> Record:
    """The answer of each item of the judged sets in which a guess is often right."""
    if files.gguf is None:
        return {}
    library = load_tokenizer(files.gguf, None).library
    return {
        name: [library.decode(row[begin:end].tolist()).strip(" \u2581") for row, begin, end in
               zip(one.tokens, one.prompt_length, one.length, strict=True)]
        for name, one in corpus.populations.items()
        if isinstance(one, rc.Population) and one.chance > 0
    }  # fmt: skip


def _count(files: Files, name: str) -> int:
    lines = [json.loads(x) for x in files.text(name).read_text(encoding="utf-8").splitlines()]
    if files.gguf is None:
        return sum(len(one["input_ids"]) for one in lines)
    library = load_tokenizer(files.gguf, None).library
    some = library.encode_batch([one["text"] for one in lines], add_special_tokens=False)
    return sum(len(one.ids) for one in some)


# ------------------------------------------------------------------ 3: layers x rho, on dev


def grid(files: Files) -> None:
    """Every run of blocks at every rho: perplexity and recitation of dev."""
    plan, rho = files.plan, claims()["choice"]["rho"]

    def prepare() -> tuple[rc.Model, rc.Corpus, rc.Bases]:
        basis = files.basis(1, plan.grid, plan.tokens)
        return loaded(files), files.dev(), rc.load_bases(basis)

    for begin in plan.runs:
        layers = plan.layers(begin)
        inputs = _recipe(files, *DEV, "tokens") | {"rho": rho}
        lines = _lines(files, f"grid-{begin}", inputs)

        def make(model: rc.Model, corpus: rc.Corpus, basis: rc.Bases) -> Record:
            found = rc.sweep(model, corpus, [layers], rho, ["kfac"], basis=basis,  # noqa: B023
                             match="rho", split="dev", lines=lines)  # noqa: B023  # fmt: skip
            return found.to_json()

        files.results.once("grid", layers, inputs, prepare, make)


# ------------------------------------------------------------------ 2, 6: the table, five times


def table(files: Files) -> None:
    """All methods on the chosen layers, of the first calibration, at both matches."""
    for match in ("perplexity", "forgetting"):
        _table(files, 1, match)


def replicates(files: Files) -> None:
    """The same at equal perplexity with the other calibrations; all else that is judged by five."""
    for k in CALIBRATIONS:
        _table(files, k, "perplexity")
        _bands(files, k)
        _thirds(files, k)
        _size(files, k, SIZES[0])


def _table(files: Files, k: int, match: str) -> None:
    layers, rho = _chosen(files)
    inputs = _recipe(files, *JUDGED, "tokens") | {"layers": layers, "rho": rho, "k": k}
    lines = _lines(files, f"table-{k}-{match}", inputs)

    def prepare() -> tuple[rc.Model, rc.Corpus, rc.Bases]:
        return loaded(files), files.judged(), _basis(files, k)

    def make(model: rc.Model, corpus: rc.Corpus, basis: rc.Bases) -> Record:
        return rc.sweep(model, corpus, [layers], [rho], METHODS, basis=basis, match=match,
                        lines=lines).to_json()  # fmt: skip

    files.results.once(f"table at equal {match}", str(k), inputs, prepare, make)


def figures(files: Files) -> None:
    """Bands of the first calibration."""
    _bands(files, 1)


def _bands(files: Files, k: int) -> None:
    """Recited over clean, by curvature, of the chosen layers."""
    layers, _ = _chosen(files)
    inputs = _recipe(files, *JUDGED, "tokens") | {"layers": layers, "k": k}

    def prepare() -> tuple[rc.Model, rc.Corpus, rc.Bases]:
        return loaded(files), files.judged(), _basis(files, k)

    def make(model: rc.Model, corpus: rc.Corpus, basis: rc.Bases) -> Record:
        pair = corpus.populations["recited_test"], corpus.populations["clean_test"]
        return {
            kind: [one.to_json() for one in
                   bands(model, basis, *pair, layers=layers, quantity=kind).values()]
            for kind in ("input_rank", "pair_mass")
        }  # fmt: skip

    files.results.once("bands", str(k), inputs, prepare, make)


def _thirds(files: Files, k: int) -> None:
    """The best run of each third, as strong as costs the chosen edit's perplexity on dev."""
    runs = {third: best(files.results, files.plan, third) for third in ("middle", "late")}
    layers, rho = _chosen(files)
    inputs = _recipe(files, *DEV, "tokens") | {
        "layers": layers, "rho": rho, "k": k, "runs": {name: one for name, one in runs.items()}
    }  # fmt: skip

    def prepare() -> tuple[rc.Model, rc.Corpus, rc.Bases]:
        return loaded(files), files.judged(), _basis(files, k)

    def make(model: rc.Model, corpus: rc.Corpus, basis: rc.Bases) -> Record:
        dev = corpus.populations["clean_dev"]
        target = text_perplexity(rc.edit(model, basis, {layers: rho})[0], dev)
        found: Record = {"target": target}
        for name, run in runs.items():
            if run is None:
                continue

            def cost(removed: float, run: str = run) -> float:
                return text_perplexity(rc.edit(model, basis, {run: 1 - removed})[0], dev)

            match = search_share(cost, target, weakest=WEAKEST["kfac"], strongest=STRONGEST)
            edited = rc.edit(model, basis, {run: 1 - match.strength})[0]
            found[name] = {"layers": run, "removed": match.strength, "verdict": match.verdict,
                           "left": left(edited, corpus, "recited_test")}  # fmt: skip
        return found

    files.results.once("thirds", str(k), inputs, prepare, make)


def sizes(files: Files) -> None:
    """The chosen edit from a part of the first calibration's tokens."""
    for part in SIZES:
        _size(files, 1, part)


def _size(files: Files, k: int, part: int) -> None:
    layers, rho = _chosen(files)
    tokens = files.plan.tokens // part
    inputs = _recipe(files, *JUDGED) | {"layers": layers, "rho": rho, "tokens": tokens, "k": k}

    def prepare() -> tuple[rc.Model, rc.Corpus, rc.Bases]:
        return loaded(files), files.judged(), rc.load_bases(files.basis(k, layers, tokens))

    def make(model: rc.Model, corpus: rc.Corpus, basis: rc.Bases) -> Record:
        edited, record = rc.edit(model, basis, {layers: rho})
        return {"tokens": tokens, "kept": record.kept,
                "left": left(edited, corpus, "clean_test", "recited_test", "own_test")}  # fmt: skip

    files.results.once("sizes", f"{k}, 1/{part}", inputs, prepare, make)


# ------------------------------------------------------------------ 7: doses of quantisation


def doses(files: Files) -> None:
    """The matrices of the blocks, quantised by the package `gguf` and dequantised."""
    from gguf.constants import GGMLQuantizationType
    from gguf.quants import dequantize, quantize

    for dose in ("none", *DOSES):

        def make(model: rc.Model, corpus: rc.Corpus) -> Record:
            def rounded(name: str) -> np.ndarray:
                kind = GGMLQuantizationType[dose]  # noqa: B023
                weight = np.asarray(model.parameters[name], np.float32)
                return np.asarray(dequantize(quantize(weight, kind), kind), np.float32)

            if dose != "none":  # noqa: B023
                names = [model.config.weight_of(one) for one in model.config.linear_layers()
                         if one.startswith("blocks.")]  # fmt: skip
                model = model.with_parameters({name: rounded(name) for name in names})
            return left(model, corpus, *corpus.populations)

        files.results.once(
            "doses", dose, _recipe(files, *JUDGED), lambda: (loaded(files), files.judged()), make
        )


def left(model: rc.Model, corpus: rc.Corpus, *names: str) -> Record:
    """What a model does on some populations of test, as a line of a sweep says it."""
    wanted = {n: p for n, p in corpus.populations.items() if n in names and p.split == "test"}
    found = measure(model, replace(corpus, populations=wanted)).populations
    return {
        name: {
            "kind": one.kind, "items": one.items, "tokens": one.tokens, "chance": one.chance,
            "values": {**{key: finite(x) for key, x in one.values.items()},
                       **_nats(model, wanted[name])},
            "interval": None if one.interval is None else [finite(x) for x in one.interval],
            "right": None if one.right is None else "".join("01"[int(x)] for x in one.right),
        } for name, one in found.items()
    }  # fmt: skip


def _nats(model: rc.Model, population: object) -> Record:
    """Of passages: nats of a token that is asked for."""
    if not isinstance(population, rc.Population) or population.kind != "recite":
        return {}
    graded = rc.items(model, population)
    return {"nats": finite(float(graded.nats.sum() / graded.tokens.sum()))}


# ------------------------------------------------------------------ shared


def _recipe(files: Files, *of: str) -> Record:
    return files.plan.recipe(*dict.fromkeys(of))


def _chosen(files: Files) -> tuple[str, float]:
    """The edit that dev chose, among the runs that are measured; the first run is, if none is."""
    if not files.results.found("grid"):
        raise SystemExit("The part `grid` comes first: it chooses the edit.")
    return chosen(files.results)


def _basis(files: Files, k: int) -> rc.Bases:
    """Of the first calibration that of the grid; of the others, of the layers that are edited."""
    plan = files.plan
    thirds = (best(files.results, plan, third) for third in ("middle", "late"))
    runs = [chosen(files.results)[0], *thirds]
    some = plan.together([at for at in plan.runs if plan.layers(at) in runs])
    return rc.load_bases(files.basis(k, plan.grid if k == 1 else some, plan.tokens))


def _lines(files: Files, name: str, inputs: Record) -> Path:
    """Where a sweep keeps its lines until it is done."""
    return files.folder / f"{files.plan.model}-{name}-{short(inputs)}.jsonl"


PARTS: dict[str, Callable[[Files], None]] = {
    "models": models,
    "grid": grid,
    "table": table,
    "bands": figures,
    "replicates": replicates,
    "sizes": sizes,
    "doses": doses,
}
"""In the order of the work. The other tables of the page are read from these."""


def kinds(passages: list[Record]) -> Counter[tuple[str, str]]:
    """How many passages of which file and split; a chosen part of a file is `MODEL-FILE`."""
    files = [one["document"].partition(".")[0].rpartition("-")[2] for one in passages]
    return Counter(zip(files, (one["split"] for one in passages), strict=True))
