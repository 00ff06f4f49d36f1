"""The whole method at once: on the shipped model, and on a user's own."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from refcurv.commands.arguments import shares
from refcurv.commands.output import write_json
from refcurv.terminal import progress_bar

if TYPE_CHECKING:
    from refcurv.pipeline import Job


def demo(args: argparse.Namespace) -> None:
    """Run the paper on the shipped model: table, plots, report.html, results.json."""
    from refcurv.demo import JOB

    _report(JOB, args)


def report(args: argparse.Namespace) -> None:
    """Collect, decompose, edit and evaluate on your own files: table, plots, report.html."""
    from refcurv.pipeline import Job

    choices = ("weights", "corpus", "layers", "fisher", "rows", "seed", "bias", "split", "dtype")
    _report(Job(rho=shares(args.rho), **{name: getattr(args, name) for name in choices}), args)


def _report(job: Job, args: argparse.Namespace) -> None:
    """Run the job; print its table, draw its figures and its page."""
    from refcurv.pipeline import run
    from refcurv.report import folder, plots
    from refcurv.report.printed import format_results

    plots.require_matplotlib()
    results = run(job, args.out, progress_bar)
    print(format_results(results))
    if why := results["controls"].get("left_out"):
        print(f"\nno other cuts beside it: {why}")
    written = folder.draw(results, args.out)
    print(f"\nwritten to {Path(args.out)}/: {', '.join(written)}")
    write_json(args.json, results)
