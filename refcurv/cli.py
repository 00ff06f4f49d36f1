"""The command line: one thin function per command, nothing computed here."""

from __future__ import annotations

import argparse
import errno
import os
import sys
import textwrap
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from refcurv import terminal
from refcurv.arguments import files, parser, shares, unfinished
from refcurv.law.checks import RefcurvError, require_choice
from refcurv.terminal import progress_bar

DONE, JUDGED_AND_FAILED, BAD_INPUT, MACHINE, INTERRUPTED = 0, 1, 2, 3, 130

TRACEBACK = "REFCURV_TRACEBACK"
"""The environment variable that asks for the traceback of a bug."""

FAULTS = (
    errno.ENOSPC,
    errno.EIO,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EMFILE,
    errno.ENFILE,
    errno.ENOMEM,
)
"""Errors of the operating system that no other input would have spared."""

HOUSE = Path(__file__).parent


# ------------------------------------------------------------------ commands


def demo(args: argparse.Namespace) -> None:
    """Run the paper on the shipped model: table, plots, report.html, results.json."""
    from refcurv.demo.run import run
    from refcurv.report.plots import require_matplotlib

    require_matplotlib()
    _show(run(Path(args.out), progress_bar), args)


def report(args: argparse.Namespace) -> None:
    """Collect, decompose, edit and evaluate on your own files: table, plots, report.html."""
    from refcurv.demo.run import Job, run
    from refcurv.report.plots import require_matplotlib

    require_matplotlib()
    choices = ("weights", "corpus", "layers", "fisher", "rows", "seed", "bias", "split", "dtype")
    job = Job(rho=shares(args.rho), **{name: getattr(args, name) for name in choices})
    _show(run(Path(args.out), progress_bar, job), args)


def _show(results: dict[str, Any], args: argparse.Namespace) -> None:
    """Print the table; write the plots that there is something for, and the page."""
    from refcurv.law.checks import EmptyError
    from refcurv.report import page, plots
    from refcurv.report.table import format_results

    out = Path(args.out)
    print(format_results(results))
    if why := results["controls"].get("left_out"):
        print(f"\nno other cuts beside it: {why}")
    written = ["results.json", "factors.h5", "basis.h5", "edited.h5"]
    for name, draw in plots.FIGURES.items():
        try:
            figure = draw(results)
        except EmptyError:  # no populations, no bands
            continue
        plots.save(figure, out / f"{name}.png")
        written.append(f"{name}.png")
    page.write_page(results, out / "report.html")
    print(f"\nwritten to {out}/: report.html, {', '.join(sorted(written))}")
    _write_json(args.json, results)


def convert(args: argparse.Namespace) -> None:
    """Turn a checkpoint directory (config.json, *.safetensors) into a weights file."""
    from refcurv.files.huggingface import conversion
    from refcurv.report.conversion import format_conversion, rows

    done = conversion(args.directory, args.weights, args.ignore_key)
    print(format_conversion(done, args.weights, args.verbose))
    keys = ("checkpoint_name", "name", "shape", "dtype")
    _write_json(args.json, [dict(zip(keys, row, strict=True)) for row in rows(done.mapped)])


def export(args: argparse.Namespace) -> None:
    """Turn a weights file into a checkpoint directory that transformers loads."""
    import refcurv as rc
    from refcurv.report.conversion import format_export

    done = rc.export(args.weights, args.directory, args.tokenizer_from)
    print(format_export(done, args.weights, args.directory))


def inspect(args: argparse.Namespace) -> None:
    """Say what a file is, what it was made from, what it holds, and verify its checksums."""
    from refcurv.files.inspect import inspect_file
    from refcurv.report.table import format_inspect

    facts = inspect_file(args.file, progress=progress_bar("verify"))
    print(format_inspect(facts))
    _write_json(args.json, facts)


def corpus(args: argparse.Namespace) -> None:
    """Tokenize texts, JSON lines and arrays of ids into a corpus file with populations."""
    import refcurv as rc

    made = rc.build_corpus(
        args.texts,
        args.tokenizer,
        length=args.length,
        pack=args.pack,
        eos=args.eos,
        separator=args.separator,
        token_dtype=args.token_dtype,
        populations=args.population,
        progress=progress_bar("tokenize"),
    )
    made_from = made.source["made_from"]
    rc.save_corpus(made, args.output)
    print("\n".join(_corpus_lines(made_from["counts"])))
    print(f"→ {args.output}")
    _write_json(args.json, made_from)


def collect(args: argparse.Namespace) -> None:
    """Accumulate the factors A and G of linear layers over a corpus."""
    import refcurv as rc
    from refcurv.curvature.factors import least_certain

    model = rc.load(args.weights, dtype=args.dtype)
    factors = rc.collect(
        model,
        rc.load_corpus(args.corpus),
        args.layers,
        args.fisher,
        args.seed,
        args.draws,
        rows=args.rows,
        checkpoint=unfinished(args.output),
        progress=progress_bar("collect"),
    )
    rc.save_factors(factors, args.output, unfinished(args.output))
    rows = {name: factor.n_A for name, factor in factors.items()}
    most = max(rows.values())
    few = ", ".join(f"{name} {n:,}" for name, n in rows.items() if n != most)  # of images
    print(f"{_layers(len(factors))}, {most:,} rows{few and f' ({few})'} → {args.output}")
    if worst := least_certain(factors):
        layer, share = worst
        print(f"standard error of G over the draws: at most {share:.2%} of |G|, in {layer}")


def decompose(args: argparse.Namespace) -> None:
    """Compute the eigenbases of A and G of every layer in a factors file."""
    import refcurv as rc
    from refcurv.curvature.bases_file import decompose_to

    factors = rc.load_factors(args.factors)
    decompose_to(factors, args.output, args.bias, progress=progress_bar("decompose"))
    print(f"{_layers(len(factors))} → {args.output}")


def edit(args: argparse.Namespace) -> None:
    """Keep the sharpest directions of weight matrices, zero the flat ones."""
    import refcurv as rc
    from refcurv.editing.variants import control
    from refcurv.files import store

    rho, model, basis = shares(args.rho), rc.load(args.weights), rc.load_bases(args.basis)
    came_from = {"inputs": store.inputs(model.source, basis.source)}
    if args.control is None:
        _save_edit(args, *rc.edit(model, basis, rho, force=args.force), **came_from)
    else:
        made = control(model, basis, rho, args.control, args.seed, force=args.force)
        _save_edit(args, *made, seed=args.seed, **came_from)


def truncate(args: argparse.Namespace) -> None:
    """Keep the largest singular values of weight matrices: an edit that needs no data."""
    import refcurv as rc

    energy = shares(args.energy, "truncate: --energy takes PATTERN=SHARE")
    _save_edit(args, *rc.truncate(rc.load(args.weights), energy))


def prune(args: argparse.Namespace) -> None:
    """Learn which weights to zero to forget a population and retain the corpus's own tokens."""
    import refcurv as rc

    corpus = rc.load_corpus(args.corpus)
    forget = require_choice("prune", "--forget", args.forget, corpus.populations)
    scores = rc.train_scores(
        rc.load(args.weights, dtype=args.dtype),
        args.layers,
        corpus.populations[forget],  # type: ignore[arg-type]  # it refuses images
        corpus,
        ratio=args.ratio,
        weight=args.weight,
        steps=args.steps,
        rate=args.rate,
        batch=args.batch,
        seed=args.seed,
        progress=progress_bar("train"),
    )
    edited, record = rc.prune(rc.load(args.weights), scores)
    _save_edit(args, edited, record, bsn=scores.settings(), **scores.source)


def _save_edit(args: argparse.Namespace, edited: Any, record: Any, **made_from: Any) -> None:
    """Write an edited model, print its record."""
    import refcurv as rc
    from refcurv.report.table import format_edit, format_start

    rc.save(edited, args.output, {"edit": record.to_json(), **made_from})
    print(format_edit(record.to_json()))
    print(f"\n{format_start(record.start.to_json())}")
    print(f"{_layers(len(record.layers))} edited → {args.output}")
    _write_json(args.json, record.to_json())


def evaluate(args: argparse.Namespace) -> None:
    """Judge a model on the corpus's populations, beside a baseline if one is given."""
    import refcurv as rc
    from refcurv.evaluation.suite import Evaluation
    from refcurv.report.table import format_evaluation

    baseline = rc.load(args.baseline, dtype=args.dtype) if args.baseline else None
    table: dict[str, Any] = {}

    def keep(so_far: Evaluation) -> None:
        table.update(so_far.to_json())
        _write_json(args.json, table)

    try:
        rc.evaluate(
            rc.load(args.weights, dtype=args.dtype),
            rc.load_corpus(args.corpus),
            split=args.split,
            baseline=baseline,
            progress=progress_bar("evaluate"),
            each=keep,
        )
    finally:  # what was evaluated is not lost to what fails later
        if table:
            print(format_evaluation(table))


def audit(args: argparse.Namespace) -> int:
    """Check every identity that can be checked on this model; exit status 1 if one fails."""
    import refcurv as rc
    from refcurv.report.table import format_audit

    found = rc.audit(
        rc.load(args.weights),
        rc.load_corpus(args.corpus),
        memory=args.memory,
        seed=args.seed,
        progress=progress_bar("audit"),
    )
    print(format_audit(found.to_json()))
    _write_json(args.json, found.to_json())
    return DONE if found.passed else JUDGED_AND_FAILED


COMMANDS = (
    demo, report, convert, export, inspect, corpus, collect, decompose, edit, truncate, prune,
    evaluate, audit,
)  # fmt: skip


# ------------------------------------------------------------------ what they print


def _corpus_lines(counts: dict[str, Any]) -> Iterator[str]:
    """What became of the texts: nothing is left out, cut or ignored without a word."""
    if counts.get("rows"):
        yield (
            "{documents:,} documents, {tokens:,} tokens → {rows:,} rows of {width:,}: {padding:,} "
            "positions of padding, {cuts:,} cuts within documents, {unlabelled:,} tokens without "
            "a label".format_map(counts)
        )
    for name, found in counts["populations"].items():
        yield f"{name}: " + (
            "{kind}, {split}, {rows:,} rows of at most {width:,}: {tokens:,} tokens, {asked:,} of "
            "them asked for".format_map(found)
        )
    parts = [counts, *counts["populations"].values()]
    if empty := sum(part.get("empty", 0) for part in parts):
        yield f"left out: {empty:,} documents without a token"
    if straddling := sum(part.get("straddling", 0) for part in parts):
        yield (
            f"{straddling:,} prefixes end within a token, which is asked for with their suffixes"
        )
    if counts["ignored_keys"]:
        yield f"keys ignored: {', '.join(map(repr, counts['ignored_keys']))}"


def _layers(count: int) -> str:
    return f"{count} layer" + "s" * (count != 1)


def _write_json(path: str | None, data: object) -> None:
    if path:
        from refcurv.files.disk import write_json

        write_json(data, path)


# ------------------------------------------------------------------ entry


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit status. Every error is one line on stderr."""
    with terminal.interrupts():
        return _main(arguments)


def _main(arguments: Sequence[str] | None) -> int:
    try:
        with terminal.streams():
            args = parser(COMMANDS).parse_args(arguments)
            _require_targets(args)
            status = args.work(args)
        return DONE if status is None else int(status)
    except KeyboardInterrupt:
        hint = (
            "interrupted; no output was changed. A collection goes on from its last full block of "
            "64 shards when it is run again"
        )
        return _fail(hint, INTERRUPTED)
    except Exception as error:
        return _fail(*_sentence(error))


def _sentence(error: Exception) -> tuple[str, int]:
    """What an error says in one line, and its exit status: never that of a judgement."""
    if isinstance(error, RefcurvError):
        return str(error), error.status
    if isinstance(error, MemoryError):
        hint = "Fewer --layers, or --dtype float32, need less"
        return f"out of memory: {error}. {hint}", MACHINE
    if isinstance(error, OSError):
        machine = error.errno in FAULTS
        return str(error), MACHINE if machine else BAD_INPUT
    if isinstance(error, ImportError):
        return f"{error}: a package that refcurv needs is missing or broken; install it", MACHINE
    return _bug(error), MACHINE


def _bug(error: Exception) -> str:
    """What nobody foresaw: not the input's fault. With REFCURV_TRACEBACK the traceback first."""
    if os.environ.get(TRACEBACK):
        traceback.print_exception(error)
    frames = traceback.extract_tb(error.__traceback__)
    places = [(Path(frame.filename), frame.lineno) for frame in frames]
    inside = [(path.relative_to(HOUSE.parent), at) for path, at in places if HOUSE in path.parents]
    place = ":".join(map(str, (inside or places)[-1]))
    said = textwrap.shorten(f"{type(error).__name__}: {error}", 300)
    return (
        f"{said} (at {place}). This is a bug of refcurv, whatever the input: please report this "
        f"line, with the traceback that {TRACEBACK}=1 prints"
    )


def _require_targets(args: argparse.Namespace) -> None:
    """Before the work: every output can be written, and takes the place of no input."""
    from refcurv.files.disk import require_apart, require_writable

    reads, writes = files(args)
    require_apart(args.command, {**_of_folder(args), **writes}, reads)
    for path in writes.values():
        require_writable(args.command, path)


def _of_folder(args: argparse.Namespace) -> dict[str, Path]:
    """What `report` and `demo` write into their folder."""
    if not hasattr(args, "out"):
        return {}
    from refcurv.demo.run import WRITTEN
    from refcurv.report.plots import FIGURES

    names = (*WRITTEN, "report.html", *(f"{name}.png" for name in FIGURES))
    return {f"{name} of --out": Path(args.out) / name for name in names}


def _fail(message: str, status: int) -> int:
    terminal.say(message)
    return status


if __name__ == "__main__":
    sys.exit(main())
