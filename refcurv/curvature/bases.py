"""The eigenbases of all layers: matrices side by side, as many as memory holds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

import numpy as np

from refcurv.algebra import blas
from refcurv.curvature import room
from refcurv.curvature.eigenbasis import Eigenbasis, eigenbasis
from refcurv.curvature.factors import Factor, Factors
from refcurv.files import store
from refcurv.files.lazy import Lazy
from refcurv.law.checks import Array, ConventionError, require_choice
from refcurv.law.conventions import Bias, Estimator
from refcurv.model.config import TABLES
from refcurv.passes.parallel import stream
from refcurv.progress import Progress, silent


@dataclass(frozen=True, slots=True)
class Bases(Mapping[str, Eigenbasis]):
    """The eigenbases of some layers, by name in file order.

    Fields:
        layers: the Eigenbasis of each layer, by name.
        source: for provenance.
        bias: separate, of W alone; joint, of [W b] for layers that have a b (BIAS).
        method: what made the bases; `decompose` says "kfac", and "kfac reduce" where segments
            stand in the place of rows (ESTIMATOR). An edit copies it into its record.
        weights: the digest of the model's weights (`refcurv.files.digest`); None if unknown.
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


def named(basis: Bases) -> str:
    """The basis and its file, for messages."""
    path = basis.source.get("path")
    return "the basis" + (f" {str(path)!r}" if path else "")


def decompose(
    factors: Factors,
    bias: str = "separate",
    *,
    progress: Progress = silent,
) -> Bases:
    """The eigenbases of every layer's A and G.

    Definition
        A = U_A diag(mu) U_Aᵀ, G = U_G diag(lam) U_Gᵀ; eigenvalues descending, sign fixed (ORDER);
        eigenvalues that rounding made negative become 0 and are counted (NEGATIVE).

    Args:
        factors: of `collect` or `load_factors`.
        bias: "separate" or "joint". With "joint", A of a layer with a bias is that of [a; 1], so
            that an edit moves weight and bias as one matrix (BIAS). Other layers are the same.
        progress: called with (layers done, layers).

    Returns:
        Bases: layer name → U_A (I, I), mu (I,), U_G (O, O), lam (O,), float64.

    Raises:
        NotSymmetricError, NotPSDError, NonFiniteError: with the layer, the side and the size.
        ConventionError: the factors of a table, whose A is diagonal already; an unknown choice.
        RoomError: a matrix too large for memory or LAPACK's integers; raised before any work.

    Cost: about 9 (I³ + O³) flops per layer; layers that read the same input share one U_A.
    Source: P4; Martens & Grosse 2015 (arXiv 1503.05671) for the homogeneous coordinate.
    Proof: tests/test_eigenbasis.py::test_decompose_divides_by_the_counts_and_shares_equal_inputs,
        tests/test_biases.py::test_O47_a_joint_basis_is_of_the_homogeneous_coordinate
    """
    kind = bias_of(bias)
    layers = MappingProxyType(dict(decompose_each(factors, kind, progress=progress)))
    source = MappingProxyType({"inputs": store.inputs(factors.source)})
    return Bases(layers, source, kind, method_of(factors), factors.weights)


def method_of(factors: Factors) -> str:
    """What `Bases.method` says of these factors' bases."""
    return "kfac" if factors.estimator is Estimator.EXPAND else f"kfac {factors.estimator}"


def bias_of(bias: str) -> Bias:
    """The choice of `bias`, checked."""
    return Bias(require_choice("decompose", "bias", bias, list(Bias)))


def decompose_each(
    factors: Factors, bias: Bias, *, progress: Progress = silent
) -> Iterator[tuple[str, Eigenbasis]]:
    """`decompose` as an iterator over layers, for factors that do not fit in memory together.

    Several matrices are decomposed at a time: one per core, or fewer if memory is short. Each is
    decomposed by itself, so that their number changes no bit. A matrix that is too large for memory
    or LAPACK is refused at once.
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
    """{"A of layer": I, "G of layer": O}, without reading a matrix from a file."""
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
    """A and G of each layer in turn; None for an A that the layer before has too (O37).

    Each factor is read once. Its rounding goes to `rounding`, by layer.
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
    """Do two layers share A? gate and up do, and q, k, v (O37); jointly, not if one lacks a b."""
    if bias is Bias.JOINT and (one.sum_a is None) != (other.sum_a is None):
        return False
    return one.n_A == other.n_A and (
        one.sum_A is other.sum_A or np.array_equal(one.sum_A, other.sum_A)
    )
