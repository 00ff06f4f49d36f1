"""The eigenbases of all layers: matrices side by side, as many as memory holds."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from refcurv.algebra import blas
from refcurv.curvature import room
from refcurv.curvature.eigenbasis import Eigenbasis, eigenbasis
from refcurv.curvature.factors import Factors, require_factors
from refcurv.curvature.factors_file import of_side, parts_of, same_A, shapes_of
from refcurv.curvature.settling import Sample
from refcurv.files import store
from refcurv.law.checks import Array, ConventionError, require_choice
from refcurv.law.conventions import COMPUTE_DTYPES, Bias, Estimator
from refcurv.law.dtypes import require_float
from refcurv.model.config import TABLES
from refcurv.model.given import require_callable, require_record
from refcurv.passes.groups import cores
from refcurv.passes.parallel import stream
from refcurv.progress import Progress, doing, silent, span


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
        samples: of each layer from how many rows it was estimated, and the eigenvalues that half
            of them give, where `collect` kept those.
    """

    layers: Mapping[str, Eigenbasis]
    source: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    bias: Bias = Bias.SEPARATE
    method: str = "kfac"
    weights: str | None = None
    samples: Mapping[str, Sample] = field(default_factory=lambda: MappingProxyType({}))

    def __getitem__(self, name: str) -> Eigenbasis:
        """The eigenbasis of one layer."""
        return self.layers[name]

    def __iter__(self) -> Iterator[str]:
        """Layer names, in file order."""
        return iter(self.layers)

    def __len__(self) -> int:
        """How many layers."""
        return len(self.layers)


def require_bases(who: str, what: str, given: object) -> Bases:
    """`given`, or ConventionError for what are no Bases.

    Proof: tests/test_public.py::test_an_object_is_refused_in_one_line
    """
    how = "rc.decompose(factors) or rc.load_bases(path)"
    return require_record(who, f"{what} must be Bases", given, Bases, how)


def named(basis: Bases) -> str:
    """The basis and its file, for messages."""
    path = basis.source.get("path")
    return "the basis" + (f" {str(path)!r}" if path else "")


def decompose(
    factors: Factors,
    bias: str = "separate",
    *,
    dtype: str = "float64",
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
        dtype: what U_A and U_G are kept in, "float64" or, in half the memory, "float32". Then each
            entry is rounded once, from float64: |ΔU| <= u|U| with u = 2^-24. The eigenvalues stay
            float64, so that the same pairs are kept. An edit W' moves by at most about
            2 u (√O + √I) ‖W‖ in Frobenius norm.
        progress: called with (layers done, layers); told how long the rest will take.

    Returns:
        Bases: layer name → U_A (I, I), mu (I,), U_G (O, O), lam (O,), float64; or U in `dtype`.

    Raises:
        NotSymmetricError, NotPSDError, NonFiniteError: with the layer, the side and the size.
        ConventionError: the factors of a table, whose A is diagonal already; an unknown choice.
        RoomError: a matrix too large for memory or LAPACK's integers; raised before any work.

    Cost: about 9 (I³ + O³) flops per layer; layers that read the same input share one U_A.
    Source: P4; Martens & Grosse 2015 (arXiv 1503.05671) for the homogeneous coordinate.
    Proof: tests/test_eigenbasis.py::test_decompose_divides_by_the_counts_and_shares_equal_inputs,
        tests/test_biases.py::test_O47_a_joint_basis_is_of_the_homogeneous_coordinate,
        tests/test_short_bases.py::test_an_edit_by_a_short_basis_is_as_near_as_is_said
    """
    kind = bias_of(bias)
    pairs = decompose_each(factors, kind, dtype, progress=progress)
    source = MappingProxyType({"inputs": store.inputs(factors.source)})  # read before the work
    layers = MappingProxyType(dict(pairs))
    samples = MappingProxyType(samples_of(factors, kind))
    return Bases(layers, source, kind, method_of(factors), factors.weights, samples)


def samples_of(factors: Factors, bias: Bias) -> dict[str, Sample]:
    """What each layer's spectra are estimated from; of factors in a file no matrix is read.

    Halves are those of A. So a layer whose joint basis has a column for the bias has none.
    """
    out = {}
    for name, parts in parts_of(factors).items():
        one = of_side(factors, name, "")
        joint = bias is Bias.JOINT and "sum_a" in parts
        out[name] = Sample(one.n_A)
        if one.half_mu is not None and one.half_lam is not None and not joint:
            out[name] = Sample(one.n_A, (one.half_lam, one.half_mu))
    return out


def method_of(factors: Factors) -> str:
    """What `Bases.method` says of these factors' bases."""
    return "kfac" if factors.estimator is Estimator.EXPAND else f"kfac {factors.estimator}"


def bias_of(bias: str) -> Bias:
    """The choice of `bias`, checked."""
    return Bias(require_choice("decompose", "bias", bias, list(Bias)))


def decompose_each(
    factors: Factors,
    bias: Bias,
    dtype: str = "float64",
    *,
    known: Mapping[str, Eigenbasis] = MappingProxyType({}),
    memory: int | None = None,
    told: Callable[[dict[str, int], int], object] = lambda *_: None,
    progress: Progress = silent,
) -> Iterator[tuple[str, Eigenbasis]]:
    """`decompose` as an iterator over layers, for factors that do not fit in memory together.

    Several matrices are decomposed at a time: one per core, or fewer if memory is short, or less is
    given (`memory`, with what the process has already). `told` is called with the widths of those
    that are left, and how many at a time. Each is decomposed by itself, so that their
    number changes no bit. A matrix that is too large for memory or LAPACK is refused at once.
    Layers that are `known` are handed on as they are.
    """
    require_factors("decompose", factors)
    require_float("decompose", "dtype", dtype, COMPUTE_DTYPES)
    require_callable("decompose", "progress", progress)
    for table in TABLES:
        if table in factors:
            raise ConventionError(
                f"decompose: {table!r} is a table, whose A is diagonal already; decompose its G "
                "by itself, or collect without it."
            )
    width = widths(factors, bias)
    for side, n in width.items():
        blas.require_solvable(f"decompose: {side}", n)
    need = room.to_decompose(width)
    most = None if memory is None else _within(width, need, memory)
    workers = room.in_flight("decompose", need, most)
    told({side: n for side, n in width.items() if not _is_of(side, known)}, workers)
    return _each(factors, bias, dtype, workers, known, _Left(width, progress))


def _is_of(side: str, known: Mapping[str, Eigenbasis]) -> bool:
    """Is "A of 'layer'" one of a layer that is known?"""
    return any(side.endswith(f" of {name!r}") for name in known)


def _within(width: Mapping[str, int], need: room.Need, memory: int) -> int:
    """How many matrices at a time so much memory holds.

    Beside those at work are the eigenvectors of the layer that is being written.
    """
    has = room.used() + room.CODE
    sizes = list(width.values())  # A and G of each layer in turn
    each = zip(sizes[::2], sizes[1::2], strict=True)
    made = max(8 * (a * a + g * g) for a, g in each)
    for workers in range(cores(), 0, -1):
        if has + made + need.bytes(workers) <= memory:
            return workers
    advice = "Give more, or collect without the largest layer."
    raise room.too_small("decompose", has, made + need.bytes(1), memory, advice)


def _each(
    factors: Factors,
    bias: Bias,
    dtype: str,
    workers: int,
    known: Mapping[str, Eigenbasis],
    left: _Left,
) -> Iterator[tuple[str, Eigenbasis]]:
    facts = (factors.shard_rows, factors.dtype)

    def work(_: int, at: tuple[str, str] | None) -> tuple[Array, Array, int] | None:
        if at is None:
            return None
        side, name = at
        one = of_side(factors, name, side)
        M = one.G if side == "G" else one.A_joint if bias is Bias.JOINT else one.A
        del one  # a sum that was read from a file is not held while its eigenbasis is computed
        U, values, raised = eigenbasis(M, *facts, f"{side} of {name!r}", own=True)
        kept = U.astype(dtype, copy=False)
        kept.flags.writeable = False
        return kept, values, raised

    found = stream(_sides(factors, bias, known), work, in_flight=workers)
    A_side = None
    for name in factors:
        if name in known:
            one = known[name]
            A_side = (one.U_A, one.mu, one.raised_A)
            left.handed_on(name)
            yield name, one
            del one
            continue
        A_side = next(found) or A_side  # None: the layer before reads the same input
        G_side = next(found)
        if A_side is not None and G_side is not None:
            (U_A, mu, raised_A), (U_G, lam, raised_G) = A_side, G_side
            left.computed(name)
            yield name, Eigenbasis(U_A, mu, U_G, lam, raised_A, raised_G, _rounding(factors, name))
            del U_A, U_G, G_side  # A_side may serve the next layer


def _rounding(factors: Factors, name: str) -> float | None:
    """The part of the trace of G that is rounding (NEGATIVE)."""
    one = of_side(factors, name, "")
    return None if one.rounding_G is None else one.rounding_G / one.n_G


class _Left:
    """How many layers are done, and how long the rest will take: work grows as the cube."""

    def __init__(self, width: Mapping[str, int], progress: Progress) -> None:
        self._work: Counter[str] = Counter()
        for side, n in width.items():
            self._work[side.partition(" of ")[2]] += n**3
        self._progress, self._all, self._done = progress, len(self._work), 0
        self._begin, self._computed = time.monotonic(), 0
        progress(0, self._all)

    def handed_on(self, name: str) -> None:
        """This layer was known."""
        del self._work[repr(name)]
        self._tell()

    def computed(self, name: str) -> None:
        """This layer is new."""
        self._computed += self._work.pop(repr(name))
        self._tell()
        if self._work:
            share = sum(self._work.values()) / self._computed
            doing(self._progress, f"about {span((time.monotonic() - self._begin) * share)} left")

    def _tell(self) -> None:
        self._done += 1
        self._progress(self._done, self._all)


def widths(factors: Factors, bias: Bias) -> dict[str, int]:
    """{"A of layer": I, "G of layer": O}, without reading a matrix from a file."""
    biased = {name for name, parts in parts_of(factors).items() if "sum_a" in parts}
    width: dict[str, int] = {}
    for name, (O, I) in shapes_of(factors).items():  # noqa: E741
        width[f"A of {name!r}"] = I + (bias is Bias.JOINT and name in biased)
        width[f"G of {name!r}"] = O
    return width


def _sides(
    factors: Factors, bias: Bias, known: Mapping[str, Eigenbasis]
) -> Iterator[tuple[str, str] | None]:
    """("A", layer) and ("G", layer) of each layer in turn; None for an A that the layer before has.

    Layers that are known are left out.
    """
    before: str | None = None
    for name in factors:
        if name not in known:
            shared = before is not None and same_A(factors, before, name, bias is Bias.JOINT)
            yield None if shared else ("A", name)
            yield "G", name
        before = name
