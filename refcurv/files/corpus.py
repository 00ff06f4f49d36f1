"""Corpus files: token sequences or images, and the populations to evaluate on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from refcurv.files import store
from refcurv.files.paths import PathLike
from refcurv.law.checks import RefcurvError, SchemaError, require_choice
from refcurv.model.corpus import IMAGE_KIND, Corpus, ImagePopulation, Population
from refcurv.model.given import require_corpus, require_facts

_OF_TOKENS: Final = {"tokens": "int32", "labels": "int32", "mask": "uint8", "segments": "int32"}
_OF_IMAGES: Final = {"images": "float32", "labels": "int32"}
_OF_CORPUS: Final = {**_OF_TOKENS, **_OF_IMAGES}
_OF_POPULATION: Final = {"tokens": "int32", "prompt_length": "int32", "length": "int32"}


def save_corpus(corpus: Corpus, path: PathLike, made_from: Mapping[str, Any] | None = None) -> None:
    """Write a corpus file.

    Definition
        tokens or images, and labels, mask, segments where the corpus has them; for each population
        populations/NAME/{tokens, prompt_length, length} or {images, labels}, with the attributes
        kind, split and chance on its `tokens` or `images`.

    Args:
        corpus: The Corpus.
        path: The file; one that exists is replaced at the end, or not at all.
        made_from: JSON items for the provenance, beside the source's file name and SHA-256, or what
            `build_corpus` says.

    Raises:
        SchemaError, StorageError: As `store.write`.

    Cost: One pass over the arrays.
    Source: METHOD, Files.
    Proof:  tests/test_corpus.py::test_round_trip
    """
    require_corpus("save_corpus", corpus)
    made_from = require_facts("save_corpus", "made_from", made_from)
    origin: dict[str, Any] = {}
    if "path" in corpus.source:
        origin["inputs"] = {Path(corpus.source["path"]).name: corpus.source["sha256"]}
    store.write(
        path,
        format="refcurv-corpus",
        attributes={},
        arrays=_entries(corpus),
        provenance=store.provenance(
            **{**origin, **corpus.source.get("made_from", {}), **made_from}
        ),
    )


def load_corpus(path: PathLike) -> Corpus:
    """Read a corpus file, every array of it.

    Definition
        The reverse of `save_corpus`: the same arrays, bit for bit.

    Args:
        path: A file that `save_corpus` wrote, or another program after METHOD, Files.

    Returns:
        Corpus; its `source` has path, header, provenance and (hashed when asked for) sha256.

    Raises:
        SchemaError: Not a corpus file; a dataset or attribute is missing, unknown, of another
            dtype, or against the law (the message says which).
        ChecksumError: Damaged bytes.
        StorageError: The disk cannot be read.

    Cost: Reads and hashes the whole file.
    Source: METHOD, Files.
    Proof:  tests/test_corpus.py::test_round_trip
    """
    header = store.open_file(path, format="refcurv-corpus")
    found = _require_datasets(header)
    arrays = {name: store.read(header, name) for name in _OF_CORPUS if name in header.entries}
    populations = {name: _population(header, name, what) for name, what in found.items()}
    try:
        return Corpus(**arrays, populations=populations, source=store.Source(header))
    except RefcurvError as error:
        raise SchemaError(f"load_corpus: {header.path!r}: {error}") from None


def _entries(corpus: Corpus) -> Iterator[store.Entry]:
    for name in _OF_CORPUS:
        if (array := getattr(corpus, name)) is not None:
            yield store.Entry(name, array)
    for name, population in corpus.populations.items():
        judged: dict[str, store.Scalar] = {
            "kind": population.kind, "split": population.split, "chance": population.chance
        }  # fmt: skip
        parts = _OF_POPULATION if isinstance(population, Population) else _OF_IMAGES
        for part in parts:
            attributes = judged if part in ("tokens", "images") else {}
            yield store.Entry(f"populations.{name}.{part}", getattr(population, part), attributes)


def _require_datasets(header: store.Header) -> dict[str, str]:
    """Check names and dtypes; returns {population: "tokens" or "images"} in file order."""
    where = f"load_corpus: {header.path!r}"
    populations: dict[str, str] = {}
    for name in header.entries:
        parts = name.split(".")
        if parts[0] == "populations" and len(parts) == 3:
            seen = populations.get(parts[1])
            populations[parts[1]] = "images" if "images" in (parts[2], seen) else "tokens"
    wanted = dict(_OF_CORPUS)
    needed = ["images", "labels"] if "images" in header.entries else ["tokens"]
    for name, what in populations.items():
        parts_of = _OF_POPULATION if what == "tokens" else _OF_IMAGES
        wanted |= {f"populations.{name}.{part}": dtype for part, dtype in parts_of.items()}
        needed += [f"populations.{name}.{part}" for part in parts_of]
    for name, info in header.entries.items():
        if name not in wanted:
            raise SchemaError(f"{where} holds {name!r}, which a corpus does not have.")
        if info.stored != wanted[name]:
            raise SchemaError(f"{where}: {name!r} must be {wanted[name]}; got {info.stored}.")
    for name in needed:
        if name not in header.entries:
            or_images = " or 'images'" if name == "tokens" else ""
            raise SchemaError(f"{where} lacks {name!r}{or_images}.")
    return populations


def _population(header: store.Header, name: str, what: str) -> Population | ImagePopulation:
    at = f"populations.{name}."
    judged = dict(header.entries[at + what].attributes)
    if set(judged) != {"kind", "split", "chance"}:
        raise SchemaError(
            f"load_corpus: {header.path!r}: {at}{what} must have the attributes kind, split and "
            f"chance; got {sorted(judged)}."
        )
    parts = _OF_POPULATION if what == "tokens" else _OF_IMAGES
    arrays = {part: store.read(header, at + part) for part in parts}
    try:
        if what == "tokens":
            return Population(**arrays, **judged)  # type: ignore[arg-type]  # the record checks
        require_choice("ImagePopulation", "kind", judged.pop("kind"), [IMAGE_KIND])
        return ImagePopulation(**arrays, **judged)  # type: ignore[arg-type]
    except RefcurvError as error:
        raise SchemaError(f"load_corpus: {header.path!r}: {name!r}: {error}") from None
