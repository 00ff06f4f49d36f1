"""What a model can still do, whether every identity holds on it, and what is wrong with theirs."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from stat import S_ISREG
from typing import TYPE_CHECKING, Any

from refcurv.commands.output import made, write_json
from refcurv.commands.values import pairs, seed, shares, undrawn
from refcurv.law.words import number_of
from refcurv.starting import reuse_memory
from refcurv.terminal import progress_bar, say

if TYPE_CHECKING:
    from refcurv import Corpus, Model
    from refcurv.evaluation.suite import Measurement
    from refcurv.files.unchanged import Seen
    from refcurv.model.corpus import Populations


PICTURES = 3
"""Layers of which `validate --html` shows maps and spectra."""


def evaluate(args: argparse.Namespace) -> None:
    """Judge a model on the corpus's populations, beside a baseline if one is given."""
    import refcurv as rc
    from refcurv.evaluation.suite import compare, judged, measure
    from refcurv.files.disk import require_kept
    from refcurv.files.paths import unfinished
    from refcurv.report.printed import format_evaluation

    if args.json:
        require_kept("evaluate", unfinished(args.json), ("rows", "provenance"))
    models = {} if args.baseline is None else {"before": rc.load(args.baseline, dtype=args.dtype)}
    models["after"] = rc.load(args.weights, dtype=args.dtype)
    corpus, table = rc.load_corpus(args.corpus), dict[str, Any]()
    _require_items(args, judged(corpus, args.split, *models.values()))
    found: dict[str, Measurement] = {}
    origin = made({}, *(model.source for model in models.values()), corpus.source)
    reuse_memory()

    def keep(so_far: Measurement) -> None:
        before = found.get("before")
        known = before.only(so_far.populations) if before else None
        table.update(compare(so_far, known).to_json() | origin)
        write_json(args.json and unfinished(args.json), table)

    try:
        for when, model in models.items():
            found[when] = measure(
                model,
                corpus,
                split=args.split,
                progress=progress_bar("baseline" if when == "before" else "evaluate"),
                each=keep if when == "after" else lambda _: None,
                memory=args.memory,
                told=lambda chosen: say(f"evaluate: {chosen.text}"),
            )
        write_json(args.json, table)
        if args.json:
            Path(unfinished(args.json)).unlink(missing_ok=True)
        if args.items:
            _write_items(args, models, found, corpus)
        if args.right:  # what the baseline gets right, if there is one
            first = next(iter(models))
            _write_right(args, models[first], found[first], corpus)
    finally:  # what was evaluated is not lost to what fails later
        if table:
            print(format_evaluation(table))


def _require_items(args: argparse.Namespace, wanted: Populations) -> None:
    """Refuse --items and --right where no item is of their kind."""
    from refcurv.law.checks import ConventionError

    kinds = {one.kind for one in wanted.values()}
    if args.items and kinds == {"label"}:
        raise ConventionError(
            f"evaluate: --items are of tokens, and split {args.split!r} has images alone."
        )
    if args.right and kinds == {"text"}:
        raise ConventionError(
            f"evaluate: --right is of items that are right or wrong, and split {args.split!r} has "
            "texts alone."
        )


def _write_right(
    args: argparse.Namespace, model: Model, found: Measurement, corpus: Corpus
) -> None:
    """Write the corpus without the items that the model gets wrong."""
    import refcurv as rc
    from refcurv.evaluation.right import only_right
    from refcurv.files import store

    kept, counts = only_right(corpus, found)
    inputs = store.inputs(model.source, corpus.source)
    rc.save_corpus(kept, args.right, {"inputs": inputs, "right": counts, "split": args.split})
    for name, (right, items) in counts.items():
        print(f"{name}: {right} of {number_of(items, 'item')} right, which {args.right} keeps")


def _write_items(
    args: argparse.Namespace,
    models: dict[str, Model],
    found: dict[str, Measurement],
    corpus: Corpus,
) -> None:
    """A line for each item of tokens: what each model does with it."""
    import refcurv as rc
    from refcurv.evaluation.held import read_once
    from refcurv.files.disk import write_json_lines

    wanted = {
        name: population
        for name, population in corpus.populations.items()
        if population.split == args.split and isinstance(population, rc.Population)
    }
    graded: dict[str, dict[str, list[dict[str, Any]]]] = {name: {} for name in wanted}
    for when, given in models.items():
        model = read_once("items", given, wanted.values()) if args.memory is None else given
        for name, population in wanted.items():
            one = rc.items(
                model,
                population,
                said=found[when].populations[name].said,
                memory=args.memory,
                progress=progress_bar(f"{name} {when}"),
            )
            graded[name][when] = list(one.rows())
    rows = []
    for name, population in wanted.items():
        for number, each in enumerate(zip(*graded[name].values(), strict=True)):
            true = population.tokens[number, population.prompt_length[number] :]
            rows.append(
                {
                    "population": name, "item": number,
                    "true_ids": true[: each[0]["tokens"]].tolist(),
                    **dict(zip(graded[name], each, strict=True)),
                }
            )  # fmt: skip
    write_json_lines(rows, args.items)


def recite(args: argparse.Namespace) -> None:
    """Find the passages of some texts that a model recites, for `refcurv corpus --population`."""
    import refcurv as rc
    from refcurv.files.disk import write_json_lines
    from refcurv.files.paths import unfinished
    from refcurv.files.whole_texts import read_texts
    from refcurv.report.passages import format_recited

    model = rc.load(args.weights, dtype=args.dtype)
    texts = read_texts(
        args.texts,
        args.tokenizer,
        separator=args.separator,
        token_dtype=args.token_dtype,
        progress=progress_bar("tokenize"),
    )
    found = rc.recited(
        model,
        texts.documents,
        prefix=args.prefix,
        suffix=args.suffix,
        stride=args.stride,
        least=args.run,
        before=texts.before,
        lines=unfinished(args.output),
        progress=progress_bar("recite"),
    )
    write_json_lines(found.rows(texts.names, texts.spelled), args.output)
    Path(unfinished(args.output)).unlink(missing_ok=True)
    print(format_recited(found))
    print(f"→ {args.output}")


def audit(args: argparse.Namespace) -> bool:
    """Check every identity that can be checked on this model; exit status 1 if one fails."""
    import refcurv as rc
    from refcurv.law.checks import ConventionError
    from refcurv.report.printed import format_audit

    if args.seconds is not None and not args.certify:
        raise ConventionError("audit: --seconds is of the proofs; give --certify, or leave it out.")
    model, corpus = rc.load(args.weights), rc.load_corpus(args.corpus)
    found = rc.audit(
        model,
        corpus,
        memory=None if args.memory is None else args.memory / 2**30,  # in GiB
        seed=args.seed,
        certify=args.certify,
        seconds=60 if args.seconds is None else args.seconds,
        say=lambda plan: print(plan, flush=True),
        progress=progress_bar("audit"),
    )
    print(format_audit(found.to_json()))
    write_json(args.json, made(found.to_json(), model.source, corpus.source))
    return found.passed


def certify(args: argparse.Namespace) -> bool:
    """Prove digits of what the model gives, by ball arithmetic; exit status 1 if some are missing.

    What it will take is said before.
    """
    import refcurv as rc
    from refcurv.report.certificate import format_certificate

    drawn = seed("certify", args.seed, undrawn(args.fisher))
    found = rc.certify(
        rc.load(args.weights),
        rc.load_corpus(args.corpus),
        [name.strip() for name in args.of.split(",")],
        digits=args.digits,
        sequences=chain.from_iterable(args.sequences),
        layers=args.layers,
        rows=args.rows,
        rho=None if args.rho is None else shares(args.rho, "certify: --rho takes [PATTERN=]SHARE"),
        fisher=args.fisher,
        seed=drawn,
        seconds=None if args.minutes is None else 60 * args.minutes,
        estimate=lambda found: print(f"{found.text}.", flush=True),
        progress=progress_bar("certify"),
    )
    if args.output:
        rc.save_certificate(found, args.output)
    print(format_certificate(found.to_json()))
    write_json(args.json, found.to_json())
    settled = not any(one["undecided"] for one in found.cuts.values())
    return found.digits >= found.wanted and settled


def trace(args: argparse.Namespace) -> None:
    """Write every tensor of a pass over a few sequences, to find where two programs part."""
    import refcurv as rc
    from refcurv.judge.trace import save_trace

    drawn = seed("trace", args.seed, undrawn(args.fisher))
    model, corpus = rc.load(args.weights, dtype=args.dtype), rc.load_corpus(args.corpus)
    made = rc.trace(model, corpus, chain.from_iterable(args.sequences), args.fisher, drawn)
    save_trace(made, args.output)
    nats, labels = made.tensors["nats"], made.tensors["labels"]
    count = int((labels >= 0).sum())
    print(
        f"{number_of(len(made.tensors), 'tensor')}, {nats.sum() / count:.6g} nats a label, "
        f"{number_of(count, 'label')} "
        f"({made.fisher}) → {args.output}"
    )


def validate(args: argparse.Namespace) -> bool:
    """Judge another program's factors, and name what is wrong; exit status 1 if something is."""
    import refcurv as rc
    from refcurv.law.checks import ConventionError
    from refcurv.report.plots.drawing import require_matplotlib
    from refcurv.report.verdict import format_verdict
    from refcurv.report.verdict_page import write_verdict_page

    if (args.theirs is None) == (args.trace is None):
        raise ConventionError("validate: give THEIRS, or a pass of theirs with --trace.")
    model = None if args.model is None else rc.load(args.model)
    corpus = None if args.corpus is None else rc.load_corpus(args.corpus)
    if args.trace:
        _require_none_but(args)
        return _parted(args, model, corpus)
    if args.html:
        require_matplotlib()
    if args.sequences != [range(1)]:
        raise ConventionError("validate: --sequences is of --trace; factors are of all sequences.")
    read = _read(args.theirs, args.reference, args.basis, args.labels)
    found = rc.validate(
        args.theirs,
        args.reference,
        model=model,
        corpus=corpus,
        basis=args.basis,
        labels=args.labels,
        names=pairs("--name", args.name),
        arithmetic=args.arithmetic,
        accept=args.accept,
        declared=pairs("--declare", args.declare),
        layers=args.layers,
        pictures=PICTURES if args.html else 0,
        progress=progress_bar("validate", pieces="layers"),
    )
    print(format_verdict(found.to_json()))
    if args.json:
        write_json(args.json, made(found.to_json(), *_sources(model, corpus, read)))
    if args.html:
        write_verdict_page(found.to_json(), args.html)
    return found.passed


def _read(*paths: str | None) -> Seen:
    """What the files are now that will be read, those of a folder too."""
    from refcurv.files.paths import is_folder, machine_faults, mode_of
    from refcurv.files.unchanged import seen

    every = [Path(path) for path in paths if path]
    for folder in [path for path in every if is_folder("validate", path)]:
        with machine_faults("validate", folder):
            every += sorted(folder.iterdir())
    return seen("validate", (one for one in every if S_ISREG(mode_of("validate", one))))


def _sources(model: Model | None, corpus: Corpus | None, read: Seen) -> Iterator[Mapping[str, Any]]:
    """What a verdict was made from, with hashes; files are hashed now."""
    from refcurv.files.unchanged import sha256_unchanged

    yield from (one.source for one in (model, corpus) if one is not None)
    for path, sha256 in sha256_unchanged("validate", read).items():
        yield {"path": path, "sha256": sha256}


def _require_none_but(args: argparse.Namespace) -> None:
    """A trace is judged without what only factors need."""
    from refcurv.law.checks import ConventionError

    given = vars(args)
    for name in ("reference", "basis", "labels", "layers", "name", "declare", "accept", "html"):
        if given[name]:
            raise ConventionError(f"validate: --{name} says nothing of a --trace; leave it out.")


def _parted(args: argparse.Namespace, model: Model | None, corpus: Corpus | None) -> bool:
    """Their pass beside ours: every tensor in order, and the first that differs."""
    import refcurv as rc
    from refcurv.judge.foreign import read_arrays
    from refcurv.law.checks import ConventionError
    from refcurv.report.divergence import format_divergences

    if model is None or corpus is None:
        raise ConventionError("validate: --trace needs --model and --corpus.")
    read = _read(args.trace)
    theirs, at = read_arrays(args.trace), chain.from_iterable(args.sequences)
    dtype = args.arithmetic or "float64"
    found = rc.first_divergence(theirs, model, corpus, at, dtype=dtype)
    table = {"agrees": all(one.agrees for one in found), "tensors": [asdict(o) for o in found]}
    print(format_divergences(table))
    if args.json:
        write_json(args.json, made(table, *_sources(model, corpus, read)))
    return bool(table["agrees"])


def cases(args: argparse.Namespace) -> None:
    """Make conformance vectors from a tiny model: the truth, planted bugs, and what is acceptable.

    Any program in any language can be tested with them, and so can its tests.
    """
    import refcurv as rc
    from refcurv.judge.cases import make_cases, not_planted

    made = make_cases(
        rc.load(args.weights),
        rc.load_corpus(args.corpus),
        args.folder,
        layers=args.layers,
        seed=args.seed,
        progress=progress_bar("cases"),
    )
    results = [one["result"] for one in made]
    counts = ", ".join(f"{results.count(r)} {r}" for r in ("valid", "invalid", "acceptable"))
    print(f"{number_of(len(made), 'case')}: {counts} → {args.folder}")
    if left := not_planted(made):
        print(f"not planted, for nothing here would show them: {', '.join(left)}")
