"""Basis files."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from refcurv.curvature.bases import Bases, bias_of, decompose_each, method_of
from refcurv.curvature.checks import require_basis
from refcurv.curvature.eigenbasis import Eigenbasis
from refcurv.curvature.factors import Factors
from refcurv.files import store
from refcurv.files.digest import recorded
from refcurv.files.lazy import Lazy
from refcurv.law.checks import SchemaError, require_choice
from refcurv.law.conventions import Bias
from refcurv.progress import Progress, silent


def save_bases(bases: Bases, path: str | Path) -> None:
    """Write a basis file: LAYER/{U_A, mu, U_G, lam}, with the counts of raised eigenvalues.

    The root attributes say whether the bases are of W or [W b] (`bias`), what made them (`method`)
    and from which weights (`weights`). What is no eigenbasis is refused.
    """
    about = _about(bases.bias, bases.method, bases.weights)
    came_from = bases.source.get("inputs") or store.inputs(bases.source)

    def checked() -> Iterator[tuple[str, Eigenbasis]]:
        for name, one in bases.items():
            require_basis("save_bases", name, one)
            yield name, one

    _write(checked(), about, path, came_from)


def decompose_to(
    factors: Factors,
    path: str | Path,
    bias: str = "separate",
    *,
    progress: Progress = silent,
) -> None:
    """`decompose` straight into a basis file, one layer in memory at a time."""
    kind = bias_of(bias)
    pairs = decompose_each(factors, kind, progress=progress)
    about = _about(kind, method_of(factors), factors.weights)
    _write(pairs, about, path, store.inputs(factors.source))


def _about(bias: Bias, method: str, weights: str | None) -> dict[str, str]:
    return {"bias": str(bias), "method": method, **({"weights": weights} if weights else {})}


def _write(
    pairs: Iterable[tuple[str, Eigenbasis]],
    about: Mapping[str, str],
    path: str | Path,
    inputs: Mapping[str, str],
) -> None:
    def entries() -> Iterator[store.Entry]:
        for name, basis in pairs:
            yield store.Entry(f"{name}.U_A", basis.U_A)
            yield store.Entry(f"{name}.mu", basis.mu, {"raised": basis.raised_A})
            yield store.Entry(f"{name}.U_G", basis.U_G)
            known = {} if basis.rounding is None else {"rounding": basis.rounding}
            yield store.Entry(f"{name}.lam", basis.lam, {"raised": basis.raised_G, **known})

    store.write(
        path,
        format="refcurv-basis",
        attributes=dict(about),
        arrays=entries(),
        provenance=store.provenance(inputs=dict(inputs), **about),
    )


def load_bases(path: str | Path) -> Bases:
    """Open a basis file; each layer is read, and its checksums verified, on use."""
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
        for U, values in (("U_A", "mu"), ("U_G", "lam")):
            n = store.require_entry(header, f"{name}.{values}", "float64", (None,))
            store.require_entry(header, f"{name}.{U}", "float64", n * 2)
    return Bases(
        Lazy(names, lambda name: _read_basis(header, name)),
        store.Source(header),
        Bias(bias),
        method,
        recorded(header),
    )


def _read_basis(header: store.Header, name: str) -> Eigenbasis:
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
