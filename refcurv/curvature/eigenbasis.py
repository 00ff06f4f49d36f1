"""The eigenbasis of the block G ⊗ A: directions u_i v_jᵀ, with curvature λ_i μ_j (P4).

With bias="joint" the block is that of [W b] and A that of [a; 1] (BIAS).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from refcurv.algebra import blas
from refcurv.algebra.blas import one_blas_thread
from refcurv.algebra.scaling import far_exponent, norm, shifted
from refcurv.curvature import room
from refcurv.curvature.factors import Factor, Factors
from refcurv.files import store
from refcurv.files.digest import recorded
from refcurv.files.lazy import Lazy
from refcurv.law import tolerance
from refcurv.law.checks import (
    Array,
    ConventionError,
    EmptyError,
    NotPSDError,
    NotSymmetricError,
    RangeError,
    SchemaError,
    require_choice,
    require_dtype,
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
        weights: which the model had (`refcurv.files.digest`); None where a file does not say.
    """

    layers: Mapping[str, Eigenbasis]
    source: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    bias: Bias = Bias.SEPARATE
    method: str = "kfac"
    weights: str | None = None

    def __getitem__(self, name: str) -> Eigenbasis:
        """The eigenbasis of one layer."""
        return self.layers[name]

    def __iter__(self) -> Iterator[str]:
        """Layer names, in file order."""
        return iter(self.layers)

    def __len__(self) -> int:
        """How many layers."""
        return len(self.layers)


PROBES = 8
"""Random vectors that orthogonality is measured on."""


def require_basis(who: str, layer: str, one: Eigenbasis) -> None:
    """Refuse what is no eigenbasis: as given by a caller, or read from a file.

    Definition
        U square, finite, ‖UᵀU − I‖ <= budget·‖I‖; values finite, descending and >= 0 (ORDER).
        The norm is measured as ‖Uᵀ(U x) − x‖/‖x‖ over 8 random x, whose square has the mean
        ‖UᵀU − I‖²/n. A U that misses the budget tenfold passes at most once in 10⁷ draws.

    The budget is that of an eigensolver in the dtype of U, and the rounding of U x and Uᵀ(U x).

    Cost: O(n²) for each side, where UᵀU would take n³.
    Proof: tests/test_eigenbasis.py::test_what_is_no_basis_is_refused
    """
    for side, U, values in (("A", one.U_A, one.mu), ("G", one.U_G, one.lam)):
        spectrum, what = f"{'mu' if side == 'A' else 'lam'} of {layer!r}", f"U_{side} of {layer!r}"
        require_spectrum(who, spectrum, values)
        n = len(values)
        require_shape(who, what, U, (n, n), f"(n, n), n the length of {spectrum}")
        require_dtype(who, what, U, "f", "real numbers")
        require_finite(who, what, U)
        x = np.random.default_rng(0).standard_normal((n, PROBES))
        with one_blas_thread():
            error = float(np.linalg.norm(U.T @ (U @ x) - x) / np.linalg.norm(x))
        solver = tolerance.eigenpair(n, U.dtype)
        budget = solver + 2 * tolerance.gamma(n, np.float64) * math.sqrt(n)
        if not error <= budget:  # NaN if it overflows
            raise ConventionError(
                f"{who}: {what} has |UᵀU − I|/|I| = {error:.1e} > {budget:.1e}: its columns are "
                "not orthonormal. Were they scaled, or stored in a shorter float than their dtype?"
            )


def named(basis: Bases) -> str:
    """The basis and its file, for messages."""
    path = basis.source.get("path")
    return "the basis" + (f" {str(path)!r}" if path else "")


def require_spectrum(who: str, what: str, values: Array) -> None:
    """Refuse eigenvalues that are no vector of finite numbers, descending and >= 0 (ORDER)."""
    require_shape(who, what, values, (None,), "(n,)")
    require_dtype(who, what, values, "f", "real numbers")
    require_finite(who, what, values)
    if not len(values):
        raise EmptyError(f"{who}: {what} is empty.")
    wrong = np.flatnonzero((values < 0) | (np.diff(values, prepend=values[0]) > 0))
    if len(wrong):
        raise ConventionError(
            f"{who}: {what} must be descending and >= 0 (ORDER, NEGATIVE); entry {wrong[0]} is "
            f"{values[wrong[0]]:.6g} after {values[max(wrong[0] - 1, 0)]:.6g}. eigh ascends: was "
            "the order left as it came?"
        )


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
        RangeError: an eigenvalue that overflows. SolverError, RoomError: as `blas.eigh`.

    Cost: about 9 n³ flops, 3 n² float64 of memory; 5 n² above n = 32,766.
    Proof: tests/test_eigenbasis.py::test_reconstruction_orthogonality_and_order,
        ::test_powers_of_two_change_no_bit
    """
    who, n = f"decompose: {what}", max(len(M), 1) if np.ndim(M) else 1
    require_shape("decompose", what, M, (n, n), "(n, n)")
    require_finite("decompose", what, M)
    k = far_exponent(M)
    inside = shifted(M, -k) if k else M
    size, skew = norm(inside), norm(inside - inside.T)
    budget = tolerance.asymmetry(shard_rows, dtype)
    del inside
    if skew > budget * size:
        raise NotSymmetricError(
            f"{who} has |M - Mᵀ|/|M| = {skew / size:.1e} > {budget:.1e}. Rounding "
            "cannot explain this; look for a missed transpose or a partial (sharded) sum."
        )
    with one_blas_thread():
        values, U = blas.eigh(M, who, k)
    values, U = values[::-1].copy(), signed(U[:, ::-1])
    underflow = float(shifted(tolerance.underflow(n, shard_rows, dtype), -k))
    least = -tolerance.negative(n, shard_rows, dtype) * max(values[0], 0.0) - underflow
    if values[-1] < least:
        lowest, bound, highest = shifted(np.array([values[-1], least, values[0]]), k)
        raise NotPSDError(
            f"{who} has eigenvalue {lowest:.3e} < {bound:.1e}, the largest being "
            f"{highest:.3e}. A second moment cannot; was it centred, averaged in a short float, "
            "or is it a difference of two?"
        )
    raised = int((values < 0).sum())
    values = shifted(np.where(values > 0, values, 0.0), k)
    if values[0] == np.inf:
        raise RangeError(f"{who} has an eigenvalue beyond the largest float64; rescale it.")
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
        RoomError: matrices that memory does not hold or LAPACK cannot count, before any work.

    Cost: about 9 (I³ + O³) flops per layer; layers that read the same input share one U_A.
    Source: P4; Martens & Grosse 2015 (arXiv 1503.05671) for the homogeneous coordinate.
    Proof: tests/test_eigenbasis.py::test_decompose_divides_by_the_counts_and_shares_equal_inputs,
        tests/test_biases.py::test_O47_a_joint_basis_is_of_the_homogeneous_coordinate
    """
    kind = _bias(bias)
    layers = MappingProxyType(dict(decompose_each(factors, kind, progress=progress)))
    source = MappingProxyType({"inputs": store.inputs(factors.source)})
    return Bases(layers, source, kind, weights=factors.weights)


def _bias(bias: str) -> Bias:
    return Bias(require_choice("decompose", "bias", bias, list(Bias)))


def decompose_each(
    factors: Factors, bias: Bias, *, progress: Progress = lambda done, total: None
) -> Iterator[tuple[str, Eigenbasis]]:
    """`decompose`, a layer at a time, for factors that do not fit in memory together.

    Matrices are decomposed side by side, one per core or as many as memory holds; each by itself,
    so no bit depends on it. What no memory or no LAPACK here can hold is refused at once.
    """
    for table in TABLES:
        if table in factors:
            raise ConventionError(
                f"decompose: {table!r} is a table, whose A is diagonal already; decompose its G "
                "by itself, or collect without it."
            )
    width = _widths(factors, bias)
    for side, n in width.items():
        blas.require_solvable(f"decompose: {side}", n)
    workers = room.in_flight("decompose", room.to_decompose(width))
    return _each(factors, bias, workers, progress)


def _each(
    factors: Factors, bias: Bias, workers: int, progress: Progress
) -> Iterator[tuple[str, Eigenbasis]]:
    facts = (factors.shard_rows, factors.dtype)
    rounding: dict[str, float | None] = {}

    def work(_: int, side: tuple[str, Array | None]) -> tuple[Array, Array, int] | None:
        what, M = side
        return None if M is None else eigenbasis(M, *facts, what)

    progress(0, len(factors))
    found = stream(_sides(factors, bias, rounding), work, in_flight=workers)
    A_side = None
    for done, name in enumerate(factors, start=1):
        A_side = next(found) or A_side  # None: the layer before reads the same input
        G_side = next(found)
        if A_side is not None and G_side is not None:
            (U_A, mu, raised_A), (U_G, lam, raised_G) = A_side, G_side
            yield name, Eigenbasis(U_A, mu, U_G, lam, raised_A, raised_G, rounding[name])
        progress(done, len(factors))


def _widths(factors: Factors, bias: Bias) -> dict[str, int]:
    """{"A of layer": I, "G of layer": O}; no matrix is read from a file for it."""
    if isinstance(factors.layers, Lazy):
        entries = factors.source["header"].entries
        shapes = {key: entry.shape for key, entry in entries.items()}
    else:
        parts = ("sum_A", "sum_a", "sum_G")
        shapes = {
            f"{name}.{part}": array.shape
            for name, factor in factors.items()
            for part in parts
            if (array := getattr(factor, part)) is not None
        }
    width: dict[str, int] = {}
    for name in factors:
        joint = bias is Bias.JOINT and f"{name}.sum_a" in shapes
        width[f"A of {name!r}"] = shapes[f"{name}.sum_A"][0] + joint
        width[f"G of {name!r}"] = shapes[f"{name}.sum_G"][0]
    return width


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
        del A
        G = factor.G
        before = replace(factor, sum_G=_READ)
        del factor  # a sum that was read from a file is not held while its eigenbasis is computed
        yield f"G of {name!r}", G
        del G


_READ = np.zeros((0, 0))


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

    The root attributes say what the columns are of (`bias`), what made the bases (`method`), and
    from which weights (`weights`).
    What is no eigenbasis is refused.
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
    progress: Progress = lambda done, total: None,
) -> None:
    """`decompose` straight into a basis file, one layer in memory at a time."""
    kind = _bias(bias)
    pairs = decompose_each(factors, kind, progress=progress)
    about = _about(kind, "kfac", factors.weights)
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
