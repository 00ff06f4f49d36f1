"""Edits of weights: by curvature, by singular values, by a mask that learned to forget."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from refcurv.commands.output import layers, write_json
from refcurv.commands.values import seed, shares
from refcurv.law.checks import require_choice
from refcurv.terminal import progress_bar

if TYPE_CHECKING:
    from refcurv import EditRecord, Model


def edit(args: argparse.Namespace) -> None:
    """Keep the sharpest directions of weight matrices, zero the flat ones."""
    import refcurv as rc
    from refcurv.editing.kfac import edit_work
    from refcurv.editing.record import done_to
    from refcurv.editing.variants import control_work
    from refcurv.files import store

    nothing = "without --control random-basis or random-pairs"
    drawn = seed("edit", args.seed, "" if str(args.control).startswith("random") else nothing)
    rho, model, basis = shares(args.rho), rc.load(args.weights), rc.load_bases(args.basis)
    made_from: dict[str, Any] = {"inputs": store.inputs(model.source, basis.source)}
    if args.control is None:
        work = edit_work(model, basis, rho, force=args.force)
    else:
        work = control_work(model, basis, rho, args.control, drawn, force=args.force)
        made_from = {"seed": drawn, **made_from}
    said = partial(_made_from, made_from)
    _tell(args, done_to(work, args.output, said))


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
    """Write an edited model, tell its record."""
    import refcurv as rc

    edited, record = made
    rc.save(edited, args.output, _made_from(made_from, record))
    _tell(args, record)


def _made_from(more: Mapping[str, Any], record: EditRecord) -> dict[str, Any]:
    return {"edit": record.to_json(), **more}


def _tell(args: argparse.Namespace, record: EditRecord) -> None:
    """Print the record, and write it where that is asked for."""
    from refcurv.report.printed import format_edit, format_start

    print(format_edit(record.to_json()))
    print(f"\n{format_start(record.start.to_json())}")
    print(f"{layers(len(record.layers))} edited → {args.output}")
    write_json(args.json, record.to_json())
