"""The curvature of a model: its factors, and their eigenbases."""

from __future__ import annotations

import argparse
from functools import partial
from typing import TYPE_CHECKING, Any

from refcurv.commands.output import layers
from refcurv.commands.values import seed, undrawn
from refcurv.law.words import number_of
from refcurv.progress import goes_on, gone_on
from refcurv.report.text import filled
from refcurv.starting import reuse_memory
from refcurv.terminal import progress_bar, say

if TYPE_CHECKING:
    from refcurv.curvature.forecast import Forecast

SHORT = 5
"""Seconds of a job that nobody needs to be told of beforehand."""


def _foretell(who: str, found: Forecast) -> None:
    """One line of what a job will take, unless it is short."""
    from refcurv.report.printed import format_forecast

    if found.seconds >= SHORT:
        say(f"{who}: {format_forecast(found)}")


def collect(args: argparse.Namespace) -> None:
    """Accumulate the factors A and G of linear layers over a corpus."""
    import refcurv as rc
    from refcurv.curvature.factors import asked, least_certain
    from refcurv.curvature.plan import Plan
    from refcurv.curvature.streamed import collect_to
    from refcurv.files.paths import unfinished

    drawn = seed("collect", args.seed, undrawn(args.fisher))
    what = args.layers, args.fisher, drawn, args.draws
    reuse_memory()
    model, corpus = rc.load(args.weights, dtype=args.dtype), rc.load_corpus(args.corpus)
    how: dict[str, Any] = {"rows": args.rows, "halves": args.halves}
    progress = progress_bar("collect", corpus.label.size)
    if args.memory is not None:

        def told(chosen: Plan) -> None:
            wanted = len(asked(model.config, *what, args.rows)[0].layers)
            if left := wanted - sum(map(len, chosen.groups)):
                goes_on(progress, f"{left} of {number_of(wanted, 'layer')}")
            say(f"collect: {chosen.text}")

        how |= {"memory": args.memory, "told": told, "progress": progress}
        collect_to(model, corpus, args.output, *what, **how)
        factors = rc.load_factors(args.output)
    else:
        how |= {"told": partial(_foretell, "collect"), "progress": gone_on(progress, "shard")}
        factors = rc.collect(model, corpus, *what, checkpoint=unfinished(args.output), **how)
        rc.save_factors(factors, args.output, unfinished(args.output))
    rows = {name: factor.n_A for name, factor in factors.items()}
    most = max(rows.values())
    few = ", ".join(f"{name} {n:,}" for name, n in rows.items() if n != most)  # of images
    rows_said = number_of(most, "row") + (few and f" ({few})")
    print(filled(f"{layers(len(factors))}, {rows_said} → {args.output}"))
    if worst := least_certain(factors):
        layer, share = worst
        print(filled(f"standard error of G over the draws: at most {share:.2%} of |G|, in {layer}"))


def decompose(args: argparse.Namespace) -> None:
    """Compute the eigenbases of A and G of every layer in a factors file."""
    import refcurv as rc
    from refcurv.curvature.bases_file import kept_by
    from refcurv.curvature.resumed_bases import decompose_to
    from refcurv.curvature.settling import warning_of
    from refcurv.report.printed import format_kept

    factors = rc.load_factors(args.factors)
    decompose_to(
        factors,
        args.output,
        args.bias,
        dtype=args.dtype,
        memory=args.memory,
        told=partial(_foretell, "decompose"),
        progress=progress_bar("decompose"),
    )
    print(filled(f"{layers(len(factors))} → {args.output}"))
    found = kept_by(rc.load_bases(args.output))
    print(f"\n{format_kept([one.to_json() for one in found])}")
    if warning := warning_of(found):
        say(f"warning: {warning}")
