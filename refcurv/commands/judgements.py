"""What a model can still do, whether every identity holds on it, and what is wrong with theirs."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from refcurv.commands.arguments import pairs
from refcurv.commands.output import write_json
from refcurv.terminal import progress_bar

if TYPE_CHECKING:
    from refcurv import Evaluation


def evaluate(args: argparse.Namespace) -> None:
    """Judge a model on the corpus's populations, beside a baseline if one is given."""
    import refcurv as rc
    from refcurv.report.printed import format_evaluation

    baseline = rc.load(args.baseline, dtype=args.dtype) if args.baseline else None
    table: dict[str, Any] = {}

    def keep(so_far: Evaluation) -> None:
        table.update(so_far.to_json())
        write_json(args.json, table)

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


def audit(args: argparse.Namespace) -> bool:
    """Check every identity that can be checked on this model; exit status 1 if one fails."""
    import refcurv as rc
    from refcurv.report.printed import format_audit

    found = rc.audit(
        rc.load(args.weights),
        rc.load_corpus(args.corpus),
        memory=args.memory,
        seed=args.seed,
        progress=progress_bar("audit"),
    )
    print(format_audit(found.to_json()))
    write_json(args.json, found.to_json())
    return found.passed


def validate(args: argparse.Namespace) -> bool:
    """Judge another program's factors, and name what is wrong; exit status 1 if something is."""
    import refcurv as rc
    from refcurv.report.verdict import format_verdict

    found = rc.validate(
        args.theirs,
        args.reference,
        model=rc.load(args.model) if args.model else None,
        corpus=rc.load_corpus(args.corpus) if args.corpus else None,
        basis=args.basis,
        names=pairs("--name", args.name),
        arithmetic=args.arithmetic,
        accept=args.accept,
        declared=pairs("--declare", args.declare),
        layers=args.layers,
        progress=progress_bar("validate"),
    )
    print(format_verdict(found.to_json()))
    write_json(args.json, found.to_json())
    return found.passed


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
    print(f"{len(made)} cases: {counts} → {args.folder}")
    if left := not_planted(made):
        print(f"not planted, for nothing here would show them: {', '.join(left)}")
