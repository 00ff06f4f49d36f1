"""The curvature of a model: its factors, and their eigenbases."""

from __future__ import annotations

import argparse

from refcurv.commands.output import layers
from refcurv.terminal import progress_bar


def collect(args: argparse.Namespace) -> None:
    """Accumulate the factors A and G of linear layers over a corpus."""
    import refcurv as rc
    from refcurv.curvature.factors import least_certain
    from refcurv.files.disk import unfinished

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
    print(f"{layers(len(factors))}, {most:,} rows{few and f' ({few})'} → {args.output}")
    if worst := least_certain(factors):
        layer, share = worst
        print(f"standard error of G over the draws: at most {share:.2%} of |G|, in {layer}")


def decompose(args: argparse.Namespace) -> None:
    """Compute the eigenbases of A and G of every layer in a factors file."""
    import refcurv as rc
    from refcurv.curvature.bases_file import decompose_to

    factors = rc.load_factors(args.factors)
    decompose_to(factors, args.output, args.bias, progress=progress_bar("decompose"))
    print(f"{layers(len(factors))} → {args.output}")
