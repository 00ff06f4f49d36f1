"""The whole method at once: on the shipped model, and on a user's own."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from refcurv.commands.output import made, write_json
from refcurv.commands.values import shares
from refcurv.law.checks import EmptyError, RangeError
from refcurv.report.text import filled
from refcurv.starting import reuse_memory
from refcurv.terminal import progress_bar, say

if TYPE_CHECKING:
    from refcurv import Bases
    from refcurv.pipeline import Job


def demo(args: argparse.Namespace) -> None:
    """Run the paper on the shipped model: table, plots, report.html, results.json."""
    from refcurv.demo import JOB

    _report(JOB, args)


def report(args: argparse.Namespace) -> None:
    """Collect, decompose, edit and evaluate on your own files: table, plots, report.html."""
    from refcurv.pipeline import Job

    _require_unmade("report", args, {"factors": HOW, "basis": (*HOW, "bias")})
    choices = ("weights", "corpus", "split", "dtype", "factors", "basis", "seed", *HOW, "bias")
    given = {name: x for name in choices if (x := getattr(args, name)) is not None}
    rho = shares(args.rho, "report: --rho takes [PATTERN=]SHARE") if args.rho else None
    if args.layers == "":
        raise EmptyError("report: --layers names no layer; leave it out, or give a pattern.")
    default = "" if rho is None else "**" if args.factors or args.basis else "blocks.*.mlp.*"
    _report(Job(rho=rho, layers=args.layers or default, **given), args)


HOW = ("fisher", "rows")
"""How factors are collected. The seed is also that of random controls."""


def sweep(args: argparse.Namespace) -> None:
    """Many edits, by several methods at equal cost: what each leaves, a table and a plot.

    Dev chooses, test reports. The table marks the K-FAC edits on the front of dev.
    """
    import refcurv as rc
    from refcurv.files.disk import read_bytes, write_bytes
    from refcurv.files.paths import mode_of, unfinished
    from refcurv.report.plots import require_front, require_matplotlib, save, sweep_front
    from refcurv.report.sweep import format_sweep
    from refcurv.sweeps.beside import Collecting

    _require_unmade("sweep", args, {"basis": HOW, "factors": HOW})
    how = {name: x for name in HOW if (x := getattr(args, name)) is not None}
    if args.plot:
        require_matplotlib()
    reuse_memory()
    model, corpus = rc.load(args.weights, dtype=args.dtype), rc.load_corpus(args.corpus)
    if args.plot:
        judged = {n: p.kind for n, p in corpus.populations.items() if p.split == args.split}
        require_front(args.split, judged)
    choices = {name: getattr(args, name) for name in ("match", "on", "split", "seed", "states")}
    if args.methods is not None:
        choices["methods"] = [name.strip() for name in args.methods.split(",")]
    # what an earlier run finished, or wrote to in an earlier version, is gone on with in its place
    lines = args.output if mode_of("sweep", args.output) else unfinished(args.output)
    found = rc.sweep(
        model,
        corpus,
        args.layers,
        [share for text in args.rho for share in text.split(",")],
        **choices,
        basis=_basis(args),
        collecting=Collecting(seed=args.seed, **how),
        lines=lines,
        memory=args.memory,
        stage=progress_bar,
        told=lambda text: say(f"sweep: {text}"),
    ).to_json()
    if lines != args.output:
        write_bytes("sweep", args.output, read_bytes("sweep", lines))
    Path(unfinished(args.output)).unlink(missing_ok=True)
    print(format_sweep(found))
    if args.plot:
        save(sweep_front(found), args.plot)
    print(f"\n→ {args.output}" + (f", {args.plot}" if args.plot else ""))
    write_json(args.json, made(found, model.source, corpus.source))


def _require_unmade(
    command: str, args: argparse.Namespace, taken: Mapping[str, Sequence[str]]
) -> None:
    """Refuse options that say how to make what is given: {what is given: such options}."""
    for what, made_with in taken.items():
        if (path := getattr(args, what)) and (
            more := [name for name in made_with if getattr(args, name) is not None]
        ):
            raise RangeError(
                f"{command}: --{more[0]} says how to make what --{what} {path} has already. Leave "
                "one of the two out."
            )


def _basis(args: argparse.Namespace) -> Bases | None:
    """That of --basis, or of --factors, decomposed now."""
    import refcurv as rc
    from refcurv.law.checks import ConventionError

    if args.basis and args.factors:
        raise ConventionError("sweep: give --basis or --factors, not both.")
    if args.factors:
        return rc.decompose(rc.load_factors(args.factors), progress=progress_bar("decompose"))
    return rc.load_bases(args.basis) if args.basis else None


def _report(job: Job, args: argparse.Namespace) -> None:
    """Run the job; print its table, draw its figures and its page."""
    from refcurv.pipeline import run
    from refcurv.report import folder, plots
    from refcurv.report.printed import format_results

    plots.require_matplotlib()
    results = run(job, args.out, progress_bar, lambda text: say(f"report: {text}"))
    print(format_results(results))
    if why := results["controls"].get("left_out"):
        print(filled(f"\nno other cuts beside it: {why}"))
    written = folder.draw(results, args.out)
    print(filled(f"\nwritten to {Path(args.out)}/: {', '.join(written)}"))
    write_json(args.json, results)
