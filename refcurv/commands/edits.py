"""Edits of weights: by curvature, by singular values, by a mask that learned to forget."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from refcurv.commands.arguments import shares
from refcurv.commands.output import layers, write_json
from refcurv.law.checks import require_choice
from refcurv.terminal import progress_bar

if TYPE_CHECKING:
    from refcurv import EditRecord, Model


def edit(args: argparse.Namespace) -> None:
    """Keep the sharpest directions of weight matrices, zero the flat ones."""
    import refcurv as rc
    from refcurv.editing.variants import control
    from refcurv.files import store

    rho, model, basis = shares(args.rho), rc.load(args.weights), rc.load_bases(args.basis)
    came_from = {"inputs": store.inputs(model.source, basis.source)}
    if args.control is None:
        _save(args, rc.edit(model, basis, rho, force=args.force), came_from)
    else:
        made = control(model, basis, rho, args.control, args.seed, force=args.force)
        _save(args, made, {"seed": args.seed, **came_from})


def truncate(args: argparse.Namespace) -> None:
    """Keep the largest singular values of weight matrices: an edit that needs no data."""
    import refcurv as rc

    energy = shares(args.energy, "truncate: --energy takes PATTERN=SHARE")
    _save(args, rc.truncate(rc.load(args.weights), energy), {})


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
    made = rc.prune(rc.load(args.weights), scores)
    _save(args, made, {"bsn": scores.settings(), **scores.source})


def _save(
    args: argparse.Namespace, made: tuple[Model, EditRecord], made_from: Mapping[str, Any]
) -> None:
    """Write an edited model, print its record."""
    import refcurv as rc
    from refcurv.report.printed import format_edit, format_start

    edited, record = made
    rc.save(edited, args.output, {"edit": record.to_json(), **made_from})
    print(format_edit(record.to_json()))
    print(f"\n{format_start(record.start.to_json())}")
    print(f"{layers(len(record.layers))} edited → {args.output}")
    write_json(args.json, record.to_json())
