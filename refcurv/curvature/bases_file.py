"""Basis files."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType

from refcurv.curvature.bases import Bases, require_bases
from refcurv.curvature.checks import require_basis
from refcurv.curvature.eigenbasis import Eigenbasis
from refcurv.curvature.factors import HALVES
from refcurv.curvature.halves import require_half
from refcurv.curvature.settling import Sample, Settling, settling
from refcurv.files import store
from refcurv.files.digest import recorded
from refcurv.files.lazy import Lazy
from refcurv.law.checks import Array, SchemaError, require_choice, require_range
from refcurv.law.conventions import COMPUTE_DTYPES, Bias


def save_bases(bases: Bases, path: str | Path) -> None:
    """Write a basis file: LAYER/{U_A, mu, U_G, lam}, with the counts of raised eigenvalues.

    The root attributes say whether the bases are of W or [W b] (`bias`), what made them (`method`)
    and from which weights (`weights`). U_A and U_G are float64, or float32 if that is what they are
    kept in. The rows and half spectra that are known are written too.

    Args:
        bases: of `decompose`, or made by hand.
        path: of the file, which is written whole or not at all.

    Raises:
        StorageError: the disk is full, or the path cannot be written to. What `require_basis`
        refuses.

    Cost: the arrays once, one layer at a time, and O(n²) more for each (n, n) to check it.
    Proof: tests/test_eigenbasis.py::test_what_is_no_basis_is_refused
    """
    require_bases("save_bases", "bases", bases)
    about = about_of(bases.bias, bases.method, bases.weights)
    came_from = bases.source.get("inputs") or store.inputs(bases.source)

    def checked() -> Iterator[tuple[str, Eigenbasis]]:
        for name, one in bases.items():
            require_basis("save_bases", name, one)
            yield name, one

    write_bases(checked(), about, path, came_from, bases.samples)


def about_of(bias: Bias, method: str, weights: str | None) -> dict[str, str]:
    """The root's attributes."""
    return {"bias": bias.value, "method": method, **({"weights": weights} if weights else {})}


def write_bases(
    pairs: Iterable[tuple[str, Eigenbasis]],
    about: Mapping[str, str],
    path: str | Path,
    inputs: Mapping[str, str],
    samples: Mapping[str, Sample] = MappingProxyType({}),
) -> None:
    """Write a basis file with these root attributes, one layer in memory at a time."""

    def entries() -> Iterator[store.Entry]:
        for name, basis in pairs:
            yield store.Entry(f"{name}.U_A", basis.U_A)
            rows = {"rows": samples[name].rows} if name in samples else {}
            yield store.Entry(f"{name}.mu", basis.mu, {"raised": basis.raised_A, **rows})
            yield store.Entry(f"{name}.U_G", basis.U_G)
            known = {} if basis.rounding is None else {"rounding": basis.rounding}
            yield store.Entry(f"{name}.lam", basis.lam, {"raised": basis.raised_G, **known})
            del basis  # before the next one is made
            if name in samples and (halves := samples[name].halves):
                yield store.Entry(f"{name}.half_lam", halves[0])
                yield store.Entry(f"{name}.half_mu", halves[1])

    store.write(
        path,
        format="refcurv-basis",
        attributes=dict(about),
        arrays=entries(),
        provenance=store.provenance(inputs=dict(inputs), **about),
    )


def load_bases(path: str | Path) -> Bases:
    """Open a basis file; each layer is read, and its checksums verified, on use.

    Raises:
        SchemaError: not a basis file, or layers whose entries are missing or misshapen.
        ConventionError, RangeError: a choice or a number of rows that the law does not have.
        ChecksumError, NonFiniteError: on use: damaged bytes, NaN or infinity.
        StorageError: the disk cannot be read.
    """
    header = store.open_file(path, format="refcurv-basis")
    bias = require_choice(
        str(path), "bias", header.attributes.get("bias", Bias.SEPARATE), list(Bias)
    )
    method = header.attributes.get("method", "kfac")  # files without it are older
    if not isinstance(method, str) or not method.isprintable() or not method:
        raise SchemaError(f"{path}: attribute 'method' must be a printable text; got {method!r}.")
    names = list(dict.fromkeys(key.rpartition(".")[0] for key in header.entries))
    if not names:
        raise SchemaError(f"{path}: holds no layer; was its decomposition interrupted?")
    for name in names:
        require_layer(header, name)
    return Bases(
        Lazy(names, lambda name: read_basis(header, name)),
        store.Source(header),
        Bias(bias),
        method,
        recorded(header),
        MappingProxyType({name: one for name in names if (one := _sample(header, name))}),
    )


def spectra_of(bases: Bases) -> Iterator[tuple[str, Array, Array]]:
    """(layer, lam, mu) of each layer; of bases in a file no eigenvectors are read."""
    header = bases.source.get("header")
    for name in bases:
        if header is None or not isinstance(bases.layers, Lazy):
            yield name, bases[name].lam, bases[name].mu
        else:
            lam, mu = (store.read(header, f"{name}.{part}", finite=True) for part in ("lam", "mu"))
            yield name, lam, mu


def kept_by(bases: Bases) -> list[Settling]:
    """Which share of the pairs each share of the mass keeps, and where that settles, by layer."""
    samples = bases.samples
    return [settling(name, lam, mu, samples.get(name)) for name, lam, mu in spectra_of(bases)]


def _sample(header: store.Header, name: str) -> Sample | None:
    """What a layer was estimated from; older files do not say."""
    at = header.entries[f"{name}.mu"].attributes
    if "rows" not in at:
        return None
    where = f"{header.path}: mu of {name!r}"
    rows = int(require_range(where, "rows", store.fact(where, at, "rows", int), 1, 2**62))
    if f"{name}.half_mu" not in header.entries:
        return Sample(rows)
    mu, lam = (
        require_half(
            f"{header.path}: {half} of {name!r}",
            store.read(header, f"{name}.{half}", finite=True),
            float(store.read(header, f"{name}.{part}", finite=True).sum()),
        )
        for half, part in zip(HALVES, ("mu", "lam"), strict=True)
    )
    return Sample(rows, (lam, mu))


def kept_in(bases: Bases) -> str:
    """The dtype of the eigenvectors; of bases in a file none is read."""
    header, name = bases.source.get("header"), next(iter(bases))
    if header is None or not isinstance(bases.layers, Lazy):
        return bases[name].U_A.dtype.name
    return str(header.entries[f"{name}.U_A"].stored)


def require_layer(header: store.Header, name: str) -> None:
    """SchemaError unless the file has the layer's eigenvalues, and its U in a dtype of theirs."""
    for part, values in (("U_A", "mu"), ("U_G", "lam")):
        n, U = store.require_entry(header, f"{name}.{values}", "float64", (None,)), f"{name}.{part}"
        kept = header.entries[U].stored if U in header.entries else "float64"
        store.require_entry(header, U, kept if kept in COMPUTE_DTYPES else "float64", n * 2)
        if any(f"{name}.{half}" in header.entries for half in HALVES):
            store.require_entry(header, f"{name}.half_{values}", "float64", n)


def read_basis(header: store.Header, name: str) -> Eigenbasis:
    """One layer of a basis file."""
    U_A, mu, U_G, lam = (
        store.read(header, f"{name}.{part}", finite=True) for part in ("U_A", "mu", "U_G", "lam")
    )

    def attribute(part: str, key: str, kind: type[store.Fact]) -> store.Fact | None:
        at = header.entries[f"{name}.{part}"].attributes
        where = f"{header.path}: {part} of {name!r}"
        return store.fact(where, at, key, kind) if key in at else None

    raised = [attribute(part, "raised", int) or 0 for part in ("mu", "lam")]
    rounding = attribute("lam", "rounding", float)  # of older files unknown
    return Eigenbasis(U_A, mu, U_G, lam, raised[0], raised[1], rounding)
