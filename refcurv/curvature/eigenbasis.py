"""The eigenbasis of the block G ⊗ A: directions u_i v_jᵀ, with curvature λ_i μ_j (P4).

With bias="joint" the block is that of [W b] and A that of [a; 1] (BIAS).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from refcurv.algebra import blas
from refcurv.algebra.blas import one_blas_thread
from refcurv.curvature.factors import Factor, Factors
from refcurv.files import store
from refcurv.files.lazy import Lazy
from refcurv.law import tolerance
from refcurv.law.checks import (
    Array,
    ConventionError,
    NotPSDError,
    NotSymmetricError,
    SchemaError,
    require_choice,
    require_finite,
    require_shape,
)
from refcurv.law.conventions import Bias
from refcurv.model.transformer import TABLES
from refcurv.passes.parallel import Progress, stream


@dataclass(frozen=True, slots=True)
class Eigenbasis:
    """A = U_A diag(mu) U_Aᵀ and G = U_G diag(lam) U_Gᵀ of one layer, by ORDER.

    Fields:
        U_A (I, I), mu (I,); U_G (O, O), lam (O,): float64, eigenvalues descending and >= 0. For
            [W b] jointly I is d_in + 1.
        raised_A, raised_G: how many eigenvalues rounding had made negative; they are 0 now.
        rounding: how much of Σ lam, the trace of G, is rounding (NEGATIVE); None if not known.
    """

    U_A: Array
    mu: Array
    U_G: Array
    lam: Array
    raised_A: int = 0
    raised_G: int = 0
    rounding: float | None = None


@dataclass(frozen=True, slots=True)
class Bases(Mapping[str, Eigenbasis]):
    """The eigenbases of some layers, by name in file order.

    Fields:
        layers; source, for provenance.
        bias: of W alone, or of [W b] where there is a b (BIAS).
        method: what made the bases, "kfac" of `decompose`; an edit copies it into its record.
    """

    layers: Mapping[str, Eigenbasis]
    source: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    bias: Bias = Bias.SEPARATE
    method: str = "kfac"

    def __getitem__(self, name: str) -> Eigenbasis:
        """The eigenbasis of one layer."""
        return self.layers[name]

    def __iter__(self) -> Iterator[str]:
        """Layer names, in file order."""
        return iter(self.layers)

    def __len__(self) -> int:
        """How many layers."""
        return len(self.layers)


def signed(U: Array) -> Array:
    """Columns with their entry of largest magnitude positive, the lowest index on ties (ORDER)."""
    largest = np.abs(U).argmax(axis=0)
    return np.ascontiguousarray(U * np.where(U[largest, np.arange(U.shape[1])] < 0, -1.0, 1.0))


def eigenbasis(M: Array, shard_rows: int, dtype: str, what: str) -> tuple[Array, Array, int]:
    """(U, values, raised): M = U diag(values) Uᵀ, by ORDER and NEGATIVE.

    Args:
        M: (n, n) second moment, symmetric, positive semi-definite up to the rounding of its sums.
        shard_rows: rows of the products behind M, for the budget.
        dtype: of those products.
        what: name for messages, e.g. "A of 'blocks.0.mlp.up'".

    Raises:
        ShapeError, NonFiniteError, NotSymmetricError, NotPSDError (more than rounding explains).

    Cost: about 9 n³ flops, 3 n² float64 of memory.
    Proof: tests/test_eigenbasis.py::test_reconstruction_orthogonality_and_order
    """
    require_shape("decompose", what, M, (M.shape[0], M.shape[0]), "(n, n)")
    require_finite("decompose", what, M)
    size = float(np.linalg.norm(M))
    skew = float(np.linalg.norm(M - M.T))
    budget = tolerance.asymmetry(shard_rows, dtype)
    if skew > budget * size:
        raise NotSymmetricError(
            f"decompose: {what} has |M - Mᵀ|/|M| = {skew / size:.1e} > {budget:.1e}. Rounding "
            "cannot explain this; look for a missed transpose or a partial (sharded) sum."
        )
    with one_blas_thread():
        values, U = blas.eigh(M)
    values, U = values[::-1].copy(), signed(U[:, ::-1])
    least = -tolerance.negative(len(values), shard_rows, dtype) * max(values[0], 0.0)
    if values[-1] < least:
        raise NotPSDError(
            f"decompose: {what} has eigenvalue {values[-1]:.3e} < {least:.1e}, the largest being "
            f"{values[0]:.3e}. A second moment cannot; was it centred, averaged in a short float, "
            "or is it a difference of two?"
        )
    raised = int((values < 0).sum())
    values = np.where(values > 0, values, 0.0)
    for array in (U, values):
        array.flags.writeable = False
    return U, values, raised


def decompose(
    factors: Factors,
    bias: str = "separate",
    *,
    progress: Progress = lambda done, total: None,
) -> Bases:
    """The eigenbases of every layer's A and G.

    Definition
        A = U_A diag(mu) U_Aᵀ, G = U_G diag(lam) U_Gᵀ; eigenvalues descending, sign fixed (ORDER);
        eigenvalues that rounding made negative become 0 and are counted (NEGATIVE).

    Args:
        factors: of `collect` or `load_factors`.
        bias: "separate", or "joint": A is then that of [a; 1] for layers with a bias, so that an
            edit moves weight and bias as one matrix (BIAS). Layers without one are the same.
        progress: called with (layers done, layers).

    Returns:
        Bases: layer name → U_A (I, I), mu (I,), U_G (O, O), lam (O,), float64.

    Raises:
        NotSymmetricError, NotPSDError, NonFiniteError: names the layer, the side and the size.
        ConventionError: the factors of a table, whose A is diagonal already; an unknown choice.

    Cost: about 9 (I³ + O³) flops per layer; layers that read the same input share one U_A.
    Source: P4; Martens & Grosse 2015 (arXiv 1503.05671) for the homogeneous coordinate.
    Proof: tests/test_eigenbasis.py::test_reconstruction_orthogonality_and_order,
        tests/test_biases.py::test_O47_a_joint_basis_is_of_the_homogeneous_coordinate
    """
    kind = _bias(bias)
    layers = MappingProxyType(dict(decompose_each(factors, kind, progress=progress)))
    return Bases(layers, MappingProxyType({"inputs": store.inputs(factors.source)}), kind)


def _bias(bias: str) -> Bias:
    return Bias(require_choice("decompose", "bias", bias, list(Bias)))


def decompose_each(
    factors: Factors, bias: Bias, *, progress: Progress = lambda done, total: None
) -> Iterator[tuple[str, Eigenbasis]]:
    """`decompose`, a layer at a time, for factors that do not fit in memory together.

    Matrices are decomposed side by side, one per core; each by itself, so no bit depends on it.
    """
    for table in TABLES:
        if table in factors:
            raise ConventionError(
                f"decompose: {table!r} is a table, whose A is diagonal already; decompose its G "
                "by itself, or collect without it."
            )
    facts = (factors.shard_rows, factors.dtype)
    rounding: dict[str, float | None] = {}

    def work(_: int, side: tuple[str, Array | None]) -> tuple[Array, Array, int] | None:
        what, M = side
        return None if M is None else eigenbasis(M, *facts, what)

    progress(0, len(factors))
    found = stream(_sides(factors, bias, rounding), work)
    A_side = None
    for done, name in enumerate(factors, start=1):
        A_side = next(found) or A_side  # None: the layer before reads the same input
        G_side = next(found)
        if A_side is not None and G_side is not None:
            (U_A, mu, raised_A), (U_G, lam, raised_G) = A_side, G_side
            yield name, Eigenbasis(U_A, mu, U_G, lam, raised_A, raised_G, rounding[name])
        progress(done, len(factors))


def _sides(
    factors: Factors, bias: Bias, rounding: dict[str, float | None]
) -> Iterator[tuple[str, Array | None]]:
    """A and G of each layer in turn; no A where it is the layer's before (gate and up: O37).

    Each factor is read once; what it says of its rounding goes to `rounding`, by name.
    """
    before: Factor | None = None
    for name, factor in factors.items():
        known = factor.rounding_G
        rounding[name] = None if known is None else known / factor.n_G
        shared = before is not None and _same(before, factor, bias)
        A = factor.A_joint if bias is Bias.JOINT else factor.A
        yield f"A of {name!r}", None if shared else A
        yield f"G of {name!r}", factor.G
        before = factor


def _same(one: Factor, other: Factor, bias: Bias) -> bool:
    """Do two layers share their A? gate and up do, and q, k, v (O37), if their biases let them."""
    if bias is Bias.JOINT and (one.sum_a is None) != (other.sum_a is None):
        return False
    return one.n_A == other.n_A and (
        one.sum_A is other.sum_A or np.array_equal(one.sum_A, other.sum_A)
    )


# ------------------------------------------------------------------ file


def save_bases(bases: Bases, path: str | Path) -> None:
    """Write a basis file: LAYER/{U_A, mu, U_G, lam}, with the counts of raised eigenvalues.

    The root attributes say what the columns are of (`bias`) and what made the bases (`method`).
    """
    about = {"bias": str(bases.bias), "method": bases.method}
    came_from = bases.source.get("inputs") or store.inputs(bases.source)
    _write(bases.items(), about, path, came_from)


def decompose_to(
    factors: Factors,
    path: str | Path,
    bias: str = "separate",
    *,
    progress: Progress = lambda done, total: None,
) -> None:
    """`decompose` straight into a basis file, one layer in memory at a time."""
    kind = _bias(bias)
    pairs = decompose_each(factors, kind, progress=progress)
    about = {"bias": str(kind), "method": "kfac"}
    _write(pairs, about, path, store.inputs(factors.source))


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
        shapes = {
            part: header.entries[f"{name}.{part}"].shape
            for part in ("U_A", "mu", "U_G", "lam")
            if f"{name}.{part}" in header.entries
        }
        square = all(
            shapes.get(U) == (*shapes.get(v, ()), *shapes.get(v, ()))
            and len(shapes.get(v, ())) == 1
            for U, v in (("U_A", "mu"), ("U_G", "lam"))
        )
        if not square:
            raise SchemaError(
                f"{path}: layer {name!r} needs U_A (I, I), mu (I,), U_G (O, O), lam (O,); "
                f"got {shapes}."
            )
    return Bases(
        Lazy(names, lambda name: _read_basis(header, name)),
        store.Source(header),
        Bias(bias),
        method,
    )


def _read_basis(header: store.Header, name: str) -> Eigenbasis:
    U_A, mu, U_G, lam = (
        store.read(header, f"{name}.{part}", finite=True) for part in ("U_A", "mu", "U_G", "lam")
    )
    raised = [
        int(header.entries[f"{name}.{part}"].attributes.get("raised", 0)) for part in ("mu", "lam")
    ]
    rounding = header.entries[f"{name}.lam"].attributes.get("rounding")  # of older files unknown
    known = None if rounding is None else float(rounding)
    return Eigenbasis(U_A, mu, U_G, lam, raised[0], raised[1], known)
