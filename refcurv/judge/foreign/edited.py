"""Edited weights: a weights file, or the checkpoint directory that another program wrote."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from refcurv.files.disk import scratch_folder
from refcurv.files.huggingface import convert
from refcurv.files.lazy import Lazy
from refcurv.files.weights import load
from refcurv.judge.arithmetic import ROUNDOFF, Arithmetic
from refcurv.judge.dump import Dump, Theirs
from refcurv.model.weights import Model


def of_weights(path: Path) -> Dump:
    """The matrices of a refcurv weights file, one layer at a time."""
    return _dump(load(path), "weights", ())


def of_checkpoint(path: Path) -> Dump:
    """The matrices of a checkpoint directory, converted into a temporary file first."""
    folder = scratch_folder()  # lives as long as the dump
    target = Path(folder.name) / "weights.h5"
    convert(path, target)
    recipe = ("the checkpoint was converted as `refcurv convert` does",)
    return _dump(load(target), "checkpoint", recipe, folder)


def _dump(model: Model, program: str, recipe: tuple[str, ...], keep: object = None) -> Dump:
    config, stored = model.config, model.stored

    def read(name: str, _kept: object = keep) -> Theirs:
        W = np.asarray(model.parameters[config.weight_of(name)], np.float64)
        return Theirs(W=W)

    names = list(config.linear_layers())
    dtypes = {stored.get(config.weight_of(name), "float64") for name in names}
    coarsest = max(dtypes & ROUNDOFF.keys(), key=lambda d: ROUNDOFF[d], default=None)
    return Dump(
        program,
        Lazy(names, read),
        dict.fromkeys(names, frozenset({"W"})),
        recipe,
        arithmetic=Arithmetic(stored=coarsest),
    )
