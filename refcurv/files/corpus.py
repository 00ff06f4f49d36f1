"""The corpus: token sequences to compute curvature on, and populations to evaluate on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

import numpy as np
from numpy.typing import DTypeLike

from refcurv.files import store
from refcurv.files.disk import PathLike
from refcurv.law.checks import (
    Array,
    ConventionError,
    EmptyError,
    RangeError,
    RefcurvError,
    SchemaError,
    ShapeError,
    require_choice,
    require_dtype,
    require_range,
    require_shape,
)
from refcurv.model.loss import shift_labels

KINDS: Final = ("text", "recite", "answer")
"""How a population is judged: perplexity; greedy suffix; exact match of the generated answer."""

SPLITS: Final = ("dev", "test")
"""What a population is for: to tune on, or to report."""

_DATASETS: Final = {"tokens": "int32", "labels": "int32", "mask": "uint8", "segments": "int32"}
_OF_POPULATION: Final = {"tokens": "int32", "prompt_length": "int32", "length": "int32"}


@dataclass(frozen=True, slots=True, eq=False)
class Population:
    """Sequences that are judged alike.

    Fields:
        tokens: (N, T) int32; what lies at or beyond `length` is padding.
        prompt_length: (N,) int32, at least 1: what is given.
        length: (N,) int32, at most T: prompt and what is asked. A `recite` or `answer` population
            asks for at least one token; exactly length − prompt_length of them are decoded.
        kind: One of KINDS.
        split: One of SPLITS.
        chance: The score in [0, 1] that guessing gets.
    """

    tokens: Array
    prompt_length: Array
    length: Array
    kind: str
    split: str
    chance: float = 0.0

    def __post_init__(self) -> None:
        """Own read-only copies; refuse lengths that contradict one another."""
        who = "Population"
        _own_tokens(self, who)
        N, T = self.tokens.shape
        if N == 0:
            raise EmptyError(f"{who}: tokens hold no sequence.")
        for name in ("prompt_length", "length"):
            _own(self, who, name, np.int32, (N,), "(N,)")
        require_choice(who, "kind", self.kind, KINDS)
        require_choice(who, "split", self.split, SPLITS)
        chance = require_range(who, "chance", self.chance, 0.0, 1.0)
        object.__setattr__(self, "chance", chance)
        asked = 0 if self.kind == "text" else 1
        good = (self.prompt_length >= 1) & (self.prompt_length + asked <= self.length)
        good &= self.length <= T
        if not good.all():
            n = int(np.argmin(good))
            relation = "<" if asked else "<="
            raise RangeError(
                f"{who}: 1 <= prompt_length {relation} length <= {T} must hold for kind "
                f"{self.kind!r}; sequence {n} has prompt_length {self.prompt_length[n]} and length "
                f"{self.length[n]}.",
                index=n,
            )


@dataclass(frozen=True, slots=True, eq=False)
class Corpus:
    """Token sequences of one width, right-padded or packed, and named populations.

    Fields:
        tokens: (N, T) int32.
        labels: (N, T) int32 or None: what each position should predict, negative = none. None
            means the next token of the segment (LABELS).
        mask: (N, T) uint8 or None: 1 = real; padding stands on the right.
        segments: (N, T) int32 or None: packed documents, each one contiguous run.
        populations: Mapping from name to Population; with some, N may be 0.
        source: What the corpus was read from, for provenance (may be empty).
    """

    tokens: Array
    labels: Array | None = None
    mask: Array | None = None
    segments: Array | None = None
    populations: Mapping[str, Population] = field(default_factory=lambda: MappingProxyType({}))
    source: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))

    def __post_init__(self) -> None:
        """Own read-only copies; refuse what the law does not allow."""
        who = "Corpus"
        _own_tokens(self, who)
        shape = self.tokens.shape
        if shape[0] == 0 and not self.populations:
            raise EmptyError(f"{who}: tokens hold no sequence, and there are no populations.")
        for name in ("labels", "mask", "segments"):
            if getattr(self, name) is not None:
                dtype = np.uint8 if name == "mask" else np.int32
                _own(self, who, name, dtype, shape, "(N, T), as tokens")
        _require_mask(who, self.mask)
        _require_runs(who, self.segment, self.real)
        _require_labels(who, self.labels, self.real)
        for name in self.populations:
            if "." in name:
                raise ConventionError(f"{who}: a population's name has no dots; got {name!r}.")
            store.to_path(name)
        object.__setattr__(self, "populations", MappingProxyType(dict(self.populations)))

    @property
    def real(self) -> Array:
        """(N, T) bool: False on padding."""
        if self.mask is None:
            return np.ones(self.tokens.shape, dtype=bool)
        return self.mask.astype(bool)

    @property
    def segment(self) -> Array:
        """(N, T) int: which document a position belongs to, zeros unless sequences are packed."""
        return np.zeros(self.tokens.shape, np.int32) if self.segments is None else self.segments

    @property
    def label(self) -> Array:
        """(N, T) int64: the corpus's own labels, or LABELS' default; negative = none."""
        if self.labels is not None:
            return self.labels.astype(np.int64)
        return shift_labels(self.tokens, self.real, self.segment)


def _own_tokens(record: Corpus | Population, who: str) -> None:
    """Replace `record.tokens` by a checked copy: (N, T) int32, T >= 1, no negative id."""
    _own(record, who, "tokens", np.int32, (None, None), "(N, T)")
    if record.tokens.shape[1] == 0:
        raise EmptyError(
            f"{who}: tokens must be at least one position wide; got (N, T) with T = 0."
        )
    if record.tokens.size and record.tokens.min() < 0:
        index = [int(i) for i in np.argwhere(record.tokens < 0)[0]]
        raise RangeError(
            f"{who}: tokens {index} is {record.tokens[tuple(index)]}; ids are not negative. Pad "
            "with any id and say so in the mask or the length.",
            index=index,
        )


def _own(
    record: object, who: str, name: str, dtype: DTypeLike, shape: tuple[int | None, ...], axes: str
) -> None:
    """Replace a field by a read-only copy of the dtype, exactly; the caller's array stays his."""
    try:
        array = np.asarray(getattr(record, name))
    except ValueError as error:  # ragged lists
        raise ShapeError(f"{who}: {name} must be {axes}: {error}.") from None
    require_dtype(who, name, array, "iub" if name == "mask" else "iu", "integers")
    require_shape(who, name, array, shape, axes)
    info = np.iinfo(np.dtype(dtype))
    if array.size and not (info.min <= array.min() and array.max() <= info.max):
        raise RangeError(f"{who}: {name} must fit {np.dtype(dtype)}; they span {array.min()} to "
                         f"{array.max()}.")  # fmt: skip
    copy = array.astype(dtype, order="C")
    copy.flags.writeable = False
    object.__setattr__(record, name, copy)


def _require_mask(who: str, mask: Array | None) -> None:
    if mask is None:
        return
    if mask.size and mask.max() > 1:
        raise RangeError(f"{who}: mask holds 0 (padding) and 1 (real); got {mask.max()}.")
    gap = mask[:, 1:] > mask[:, :-1]
    if gap.any():
        n, t = (int(i) for i in np.argwhere(gap)[0])
        raise ConventionError(
            f"{who}: mask allows padding on the right only; in sequence {n} position {t} is "
            f"padding and {t + 1} is real. Was the batch padded on the left?",
            index=(n, t),
        )


def _require_runs(who: str, segment: Array, real: Array) -> None:
    """Each segment id occupies one contiguous run of real positions."""
    ids = np.where(real, segment.astype(np.int64), np.iinfo(np.int64).max)
    runs = (ids[:, 1:] != ids[:, :-1]).sum(axis=1)
    kinds = (np.diff(np.sort(ids, axis=1), axis=1) != 0).sum(axis=1)
    if (runs != kinds).any():
        n = int(np.argmax(runs != kinds))
        raise ConventionError(
            f"{who}: each segment must be one contiguous run; in sequence {n} an id comes back "
            "after another one.",
            index=n,
        )


def _require_labels(who: str, labels: Array | None, real: Array) -> None:
    if labels is None:
        return
    stray = (labels >= 0) & ~real
    if stray.any():
        n, t = (int(i) for i in np.argwhere(stray)[0])
        raise ConventionError(
            f"{who}: labels [{n}, {t}] is {labels[n, t]} on padding, which predicts nothing. Use "
            "-1 there.",
            index=(n, t),
        )


# ------------------------------------------------------------------ files


def save_corpus(corpus: Corpus, path: PathLike, made_from: Mapping[str, Any] | None = None) -> None:
    """Write a corpus file.

    Definition
        tokens, and labels, mask, segments where the corpus has them; for each population
        populations/NAME/{tokens, prompt_length, length}, with the attributes kind, split and
        chance on its `tokens`.

    Args:
        corpus: The Corpus.
        path: The file; one that exists is replaced at the end, or not at all.
        made_from: JSON items for the provenance, beside the source's file name and SHA-256.

    Raises:
        SchemaError, StorageError: As `store.write`.

    Cost: One pass over the arrays.
    Source: DESIGN §4, Files.
    Proof:  tests/test_corpus.py::test_round_trip
    """
    origin: dict[str, Any] = {}
    if "path" in corpus.source:
        origin["inputs"] = {Path(corpus.source["path"]).name: corpus.source["sha256"]}
    store.write(
        path,
        format="refcurv-corpus",
        attributes={},
        arrays=_entries(corpus),
        provenance=store.provenance(**{**origin, **(made_from or {})}),
    )


def load_corpus(path: PathLike) -> Corpus:
    """Read a corpus file, every array of it.

    Definition
        The reverse of `save_corpus`: the same arrays, bit for bit.

    Args:
        path: A file that `save_corpus` wrote, or another program after DESIGN §4.

    Returns:
        Corpus; its `source` has path, header, provenance and (hashed when asked for) sha256.

    Raises:
        SchemaError: Not a corpus file; a dataset or attribute is missing, unknown, of another
            dtype, or against the law (the message says which).
        ChecksumError: Damaged bytes.
        StorageError: The disk cannot be read.

    Cost: Reads and hashes the whole file.
    Source: DESIGN §4, Files.
    Proof:  tests/test_corpus.py::test_round_trip
    """
    header = store.open_file(path, format="refcurv-corpus")
    names = _require_datasets(header)
    arrays = {name: store.read(header, name) for name in _DATASETS if name in header.entries}
    populations = {name: _population(header, name) for name in names}
    try:
        return Corpus(**arrays, populations=populations, source=store.Source(header))
    except RefcurvError as error:
        raise SchemaError(f"load_corpus: {header.path!r}: {error}") from None


def _entries(corpus: Corpus) -> Iterator[store.Entry]:
    for name in _DATASETS:
        if (array := getattr(corpus, name)) is not None:
            yield store.Entry(name, array)
    for name, population in corpus.populations.items():
        at = f"populations.{name}."
        judged: dict[str, store.Scalar] = {
            "kind": population.kind, "split": population.split, "chance": population.chance
        }  # fmt: skip
        yield store.Entry(at + "tokens", population.tokens, judged)
        yield store.Entry(at + "prompt_length", population.prompt_length)
        yield store.Entry(at + "length", population.length)


def _require_datasets(header: store.Header) -> list[str]:
    """Check names and dtypes; returns the populations' names in file order."""
    where = f"load_corpus: {header.path!r}"
    found: dict[str, set[str]] = {}
    for name, info in header.entries.items():
        parts = name.split(".")
        known = _DATASETS
        if parts[0] == "populations" and len(parts) == 3:
            known = _OF_POPULATION
            found.setdefault(parts[1], set()).add(parts[2])
        elif len(parts) != 1:
            known = {}
        wanted = known.get(parts[-1])
        if wanted is None:
            raise SchemaError(f"{where} holds {name!r}, which a corpus does not have.")
        if info.stored != wanted:
            raise SchemaError(f"{where}: {name!r} must be {wanted}; got {info.stored}.")
    missing = [] if "tokens" in header.entries else ["tokens"]
    missing += [
        f"populations.{name}.{part}"
        for name, parts in found.items()
        for part in _OF_POPULATION
        if part not in parts
    ]
    if missing:
        raise SchemaError(f"{where} lacks {missing[0]!r}.")
    return list(found)


def _population(header: store.Header, name: str) -> Population:
    at = f"populations.{name}."
    judged = header.entries[at + "tokens"].attributes
    if set(judged) != {"kind", "split", "chance"}:
        raise SchemaError(
            f"load_corpus: {header.path!r}: {at}tokens must have the attributes kind, split and "
            f"chance; got {sorted(judged)}."
        )
    arrays = {part: store.read(header, at + part) for part in _OF_POPULATION}
    try:
        return Population(**arrays, **judged)  # type: ignore[arg-type]  # the record checks them
    except RefcurvError as error:
        raise SchemaError(f"load_corpus: {header.path!r}: {name!r}: {error}") from None
