"""The command line: one thin function per command, nothing computed here."""

from __future__ import annotations

import argparse
import errno
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from refcurv.arguments import parser, shares
from refcurv.law.checks import RefcurvError, require_choice

DONE, JUDGED_AND_FAILED, BAD_INPUT, MACHINE, INTERRUPTED = 0, 1, 2, 3, 130


# ------------------------------------------------------------------ commands


def demo(args: argparse.Namespace) -> None:
    """Run the paper on the shipped model: table, plots, report.html, results.json."""
    from refcurv.demo.run import run

    _show(run(Path(args.out), progress_bar), args)


def report(args: argparse.Namespace) -> None:
    """Collect, decompose, edit and evaluate on your own files: table, plots, report.html."""
    from refcurv.demo.run import Job, run

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
    import refcurv as rc
    from refcurv.report.table import format_rows

    mapped = rc.convert(args.directory, args.weights)
    rows = [[m.checkpoint_name, m.name or "(ignored)", _shape(m.shape), m.dtype] for m in mapped]
    print(format_rows(["checkpoint", "refcurv", "shape", "stored as"], rows, "llll"))
    parameters = sum(m.name is not None for m in mapped)
    print(f"\n{len({m.checkpoint_name for m in mapped})} tensors → {parameters} parameters in "
          f"{args.weights}")  # fmt: skip
    _write_json(args.json, [dict(zip(("checkpoint_name", "name", "shape", "dtype"), r, strict=True))
                            for r in rows])  # fmt: skip


def export(args: argparse.Namespace) -> None:
    """Turn a weights file into a checkpoint directory that transformers loads."""
    import refcurv as rc

    rc.export(args.weights, args.directory)
    print(f"{args.weights} → {args.directory}/config.json, model.safetensors")


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
    from refcurv.files.texts import require_apart
    from refcurv.files.tokenizer import find_tokenizer

    inputs = [*args.texts, *([find_tokenizer(args.tokenizer)] if args.tokenizer else [])]
    require_apart(args.output, inputs, args.population)
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
    from refcurv.files.disk import output_path

    output_path("collect", args.output)  # before the work, not after it
    model = rc.load(args.weights, dtype=args.dtype)
    factors = rc.collect(
        model,
        rc.load_corpus(args.corpus),
        args.layers,
        args.fisher,
        args.seed,
        args.draws,
        rows=args.rows,
        checkpoint=f"{args.output}.unfinished",
        progress=progress_bar("collect"),
    )
    rc.save_factors(factors, args.output)
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
    from refcurv.curvature.eigenbasis import decompose_to

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
        _save_edit(args, *rc.edit(model, basis, rho), **came_from)
    else:
        made = control(model, basis, rho, args.control, args.seed)
        _save_edit(args, *made, seed=args.seed, **came_from)


def truncate(args: argparse.Namespace) -> None:
    """Keep the largest singular values of weight matrices: an edit that needs no data."""
    import refcurv as rc

    energy = shares(args.energy, "truncate: --energy takes PATTERN=SHARE")
    _save_edit(args, *rc.truncate(rc.load(args.weights), energy))


def prune(args: argparse.Namespace) -> None:
    """Learn which weights to zero to forget a population and retain the corpus's own tokens."""
    import refcurv as rc
    from refcurv.files.disk import output_path

    output_path("prune", args.output)  # before the work, not after it
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
    from refcurv.report.table import format_edit

    rc.save(edited, args.output, {"edit": record.to_json(), **made_from})
    print(format_edit(record.to_json()))
    print(f"\n{_layers(len(record.layers))} edited → {args.output}")
    _write_json(args.json, record.to_json())


def evaluate(args: argparse.Namespace) -> None:
    """Judge a model on the corpus's populations, beside a baseline if one is given."""
    import refcurv as rc
    from refcurv.report.table import format_evaluation

    baseline = rc.load(args.baseline, dtype=args.dtype) if args.baseline else None
    table = rc.evaluate(
        rc.load(args.weights, dtype=args.dtype),
        rc.load_corpus(args.corpus),
        split=args.split,
        baseline=baseline,
        progress=progress_bar("evaluate"),
    )
    print(format_evaluation(table.to_json()))
    _write_json(args.json, table.to_json())


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


def _shape(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape))


def _write_json(path: str | None, data: object) -> None:
    if path:
        from refcurv.files.disk import write_json

        write_json(data, path)


def progress_bar(label: str) -> Callable[[int, int], None]:
    """A bar on stderr, if that is a terminal; called with (done, all)."""
    from tqdm import tqdm

    bar: Any = None

    def update(done: int, total: int) -> None:
        nonlocal bar
        if bar is None:
            bar = tqdm(total=total, desc=f"{label:>10}", disable=None, file=sys.stderr)
        bar.update(done - bar.n)
        if done >= total:
            bar.close()

    return update


# ------------------------------------------------------------------ entry


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit status. Every error is one line on stderr."""
    try:
        args = parser(COMMANDS).parse_args(arguments)
        if getattr(args, "json", None):
            from refcurv.files.disk import output_path

            output_path(args.command, args.json)  # before the work, not after it
        status = args.work(args)
        sys.stdout.flush()
        return DONE if status is None else int(status)
    except RefcurvError as error:
        return _fail(str(error), error.status)
    except KeyboardInterrupt:
        hint = (
            "interrupted; no output was changed. A collection goes on where it was when run again"
        )
        return _fail(hint, INTERRUPTED)
    except MemoryError as error:
        return _fail(
            f"out of memory: {error}. Fewer --layers, or --dtype float32, need less", MACHINE
        )
    except BrokenPipeError:  # the reader of our output has left, as in `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return DONE
    except OSError as error:
        kind = MACHINE if error.errno in (errno.ENOSPC, errno.EIO, errno.EDQUOT) else BAD_INPUT
        return _fail(str(error), kind)


def _fail(message: str, status: int) -> int:
    print(f"refcurv: {' '.join(message.split())}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
