"""A decomposition straight into its file, which goes on where it was when it is killed."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from refcurv.curvature.bases import bias_of, decompose_each, method_of, samples_of, widths
from refcurv.curvature.bases_file import about_of, load_bases, write_bases
from refcurv.curvature.eigenbasis import Eigenbasis
from refcurv.curvature.factors import Factors, require_factors
from refcurv.curvature.forecast import Told, of_decomposition
from refcurv.curvature.parts import Parts, add_part, discard, open_parts
from refcurv.files import store
from refcurv.files.paths import free_bytes, require_space
from refcurv.law.checks import StorageError
from refcurv.law.conventions import COMPUTE_DTYPES, describe
from refcurv.law.dtypes import require_float
from refcurv.law.words import number_of
from refcurv.progress import Progress, goes_on, silent


def decompose_to(
    factors: Factors,
    path: str | Path,
    bias: str = "separate",
    *,
    dtype: str = "float64",
    memory: int | None = None,
    told: Told | None = None,
    progress: Progress = silent,
) -> None:
    """`decompose` straight into a basis file, one layer in memory at a time.

    Each layer that is done is also kept in a folder beside the file, PATH.unfinished.layers, if the
    disk has room for both. A run that was killed goes on from there, with the same bits, if it is
    the same (FINGERPRINT). The folder is removed once the file is whole.

    Args: memory, bytes that the process may take, with what it has already; by default what is
    free. It decides how many matrices are decomposed at a time, and no bit. told, called before
    the work with what it will take.

    Raises:
        ConventionError: the folder belongs to another run. StorageError: too little room on the
        disk, before any work. RoomError: too little memory; says what the least would be. What
        `decompose` raises.

    Proof: tests/test_resumed_bases.py::test_a_killed_decomposition_goes_on_with_the_same_bits,
        ::test_a_figure_is_kept
    """
    kind = bias_of(bias)
    require_factors("decompose", factors)
    require_float("decompose", "dtype", dtype, COMPUTE_DTYPES)
    about = about_of(kind, method_of(factors), factors.weights)
    came_from = store.inputs(factors.source)
    parts = _parts(path, factors, about, dtype) if "sha256" in factors.source else None
    known = parts.layers if parts else {}
    nbytes = _bytes(factors, widths(factors, kind), dtype)

    def tell(width: dict[str, int], workers: int) -> None:
        if known:
            goes_on(progress, f"{len(known)} of {number_of(len(factors), 'layer')}")
        if told is not None:
            told(of_decomposition(len(factors), width, workers, sum(nbytes.values())))

    how: dict[str, Any] = {"known": known, "memory": memory, "told": tell, "progress": progress}
    pairs = decompose_each(factors, kind, dtype, **how)
    require_space("decompose", path, sum(nbytes.values()))
    if parts:
        missing = sum(size for name, size in nbytes.items() if name not in known)
        if sum(nbytes.values()) + missing <= free_bytes(path):
            pairs = _keeping(pairs, parts, about)
    write_bases(pairs, about, path, came_from, samples_of(factors, kind))
    if parts:
        discard(parts)


def _parts(
    path: str | Path, factors: Factors, about: Mapping[str, str], dtype: str
) -> Parts[Eigenbasis]:
    """The layers that are done, each in a basis file, and the facts of the run."""
    made_with = {**about, "dtype": dtype, "law": describe(), **store.machine()}
    facts = {"factors": factors.source["sha256"], **made_with}
    return open_parts("decompose", path, facts, factors, load_bases)


def _keeping(
    pairs: Iterable[tuple[str, Eigenbasis]], parts: Parts[Eigenbasis], about: Mapping[str, str]
) -> Iterator[tuple[str, Eigenbasis]]:
    """The same layers; those that are not known are kept, as long as that can be done."""
    kept = True
    for name, one in pairs:
        if kept and name not in parts.layers:
            kept = _keep(name, one, parts, about)
        yield name, one
        del one  # before the next one is made


def _keep(name: str, one: Eigenbasis, parts: Parts[Eigenbasis], about: Mapping[str, str]) -> bool:
    try:
        add_part(parts, {name: one}, lambda file: write_bases([(name, one)], about, file, {}))
    except StorageError as error:
        text = f"decompose: what comes now cannot be kept until the end: {error}"
        warnings.warn(text, stacklevel=2)
        return False
    return True


def _bytes(factors: Factors, widths: Mapping[str, int], dtype: str) -> dict[str, int]:
    """What each layer's eigenvectors and eigenvalues take in a file."""
    each = np.dtype(dtype).itemsize
    return {
        name: sum(
            each * n * n + 8 * n for n in (widths[f"A of {name!r}"], widths[f"G of {name!r}"])
        )
        for name in factors
    }
