"""The second route to every number of a valid case, and how far the two may lie apart."""

from __future__ import annotations

import math
from collections import ChainMap
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import numpy as np

from refcurv.algebra.kron import kron_dense
from refcurv.algebra.scaling import norm
from refcurv.algebra.selection import select
from refcurv.curvature import definition, exact
from refcurv.judge.cases.case import Check
from refcurv.judge.cases.flows import Flow, Seen, against, flow
from refcurv.judge.cases.truth import SHARES, Truth, blank, dense_layer, gram, share_name
from refcurv.judge.identities.measures import LEAST
from refcurv.judge.roundings import RUNS, Runs, shaken
from refcurv.law import tolerance
from refcurv.law.checks import Array
from refcurv.model import transformer
from refcurv.model.config import ModelConfig
from refcurv.model.transformer import Parameters
from refcurv.model.weights import resident
from refcurv.progress import Progress, counter, silent

STEP = 1e-30
"""h of the complex step; its square is below every rounding."""

Part = Callable[[Flow], Array]


def checks(made: Truth, progress: Progress = silent) -> Iterator[Check]:
    """Every quantity of a case by a second route.

    Proof: tests/test_cases.py::test_every_number_has_two_routes_within_budget
    """
    gold, sampled = (Plain(made, label) for label in (made.seen.label, made.labels))
    yield from _outputs(made, gold)
    yield _drawn(made)
    for layer in made.subject.layers:
        yield _rows(made, gold, layer, "a")
        yield _rows(made, gold, layer, "g")
        yield _rows(made, sampled, layer, "g_sampled")
    yield from _gradients(made, gold, progress)
    yield from _sums(made, gold, sampled)
    yield from _bases(made)
    yield from _edits(made)
    yield from _dense(made, gold)


class Plain:
    """The definition's flow against labels, and the budget of whole passes.

    The budget is that of one rounding at each operation, by runs that are shaken
    (`judge.roundings`).
    """

    def __init__(self, made: Truth, label: Array) -> None:
        config, one = made.subject.model.config, made.seen
        self.parameters = resident(made.subject.model, np.float64)
        sides = [n for shape in config.linear_layers().values() for n in shape]
        self.budget = tolerance.probable(max(*sides, one.keep.size), np.float64)
        send = against(one, label)
        self.here = flow(config, self.parameters, one, send)
        self._moved = [flow(config, self.shaken(n), one, send) for n in range(RUNS)]

    def shaken(self, run: int) -> Parameters:
        """The parameters, shaken."""
        return shaken(self.parameters, [run])

    def size(self, part: Part) -> float:
        """The root of the sum of the squares of the terms of a part of the flow."""
        runs = Runs(np.asarray(part(self.here)), lambda n: np.asarray(part(self._moved[n])))
        return runs.size(RUNS)

    def check(
        self, quantity: str, routes: tuple[str, str], one: Array, other: Array, size: float
    ) -> Check:
        """Two results of whole passes whose terms have this size."""
        return within(quantity, routes, one, other, size, self.budget)


def apart(one: Array, other: Array, size: float) -> float:
    """|one − other| over a size; infinite between shapes. What underflows has no size."""
    if np.shape(one) != np.shape(other):
        return math.inf
    error = float(norm(np.asarray(one, np.float64) - np.asarray(other, np.float64)))
    return error / max(size, LEAST)


def within(
    quantity: str, routes: tuple[str, str], one: Array, other: Array, size: float, budget: float
) -> Check:
    """Two results whose terms have this size."""
    return Check(quantity, routes, apart(one, other, size), budget, size)


def exactly(quantity: str, routes: tuple[str, str], one: Array, other: Array) -> Check:
    """What no rounding may change."""
    return Check(
        quantity, routes, 0.0 if np.array_equal(one, other) else math.inf, 0.0, 0.0, "exact"
    )


# ------------------------------------------------------------------ passes


FAST_AND_PLAIN = ("fast kernels", "the layers' definitions in plain NumPy")


def _outputs(made: Truth, gold: Plain) -> Iterator[Check]:
    one, real = made.seen, made.seen.real
    size = gold.size(lambda x: blank(x.logits, real))
    plain = blank(gold.here.logits, real)
    yield gold.check("logits", FAST_AND_PLAIN, made.arrays["logits"], plain, size)
    nats = plain_nats(one, gold.here.logits)
    routes = ("cross-entropy of the fast logits", "−log softmax, written out, of the plain ones")
    size = gold.size(lambda x: plain_nats(one, x.logits))
    yield gold.check("nats", routes, made.arrays["nats"], nats, size)
    size = gold.size(lambda x: plain_nats(one, x.logits).sum()) + float(np.abs(nats).sum())
    yield gold.check("loss", routes, made.arrays["loss"], np.asarray(nats.sum()), size)


def _rows(made: Truth, plain: Plain, layer: str, part: str) -> Check:
    keep = made.arrays[f"rows.{layer}.kept"] != 0
    size = plain.size(lambda x: _side(x, layer, part)[keep])
    got, want = made.arrays[f"rows.{layer}.{part}"][keep], _side(plain.here, layer, part)[keep]
    return plain.check(f"rows.{layer}.{part}", FAST_AND_PLAIN, got, want, size)


def _side(x: Flow, layer: str, part: str) -> Array:
    return x.taps[layer].a if part == "a" else x.taps[layer].g


def plain_nats(one: Seen, logits: Array) -> Array:
    """−log softmax at the labels, as it is written in a book."""
    out = np.zeros(one.label.shape)
    for n, t in np.argwhere(one.label >= 0):
        z = logits[n, t]
        out[n, t] = np.log(np.exp(z - z.max()).sum()) + z.max() - z[one.label[n, t]]
    return out


def _drawn(made: Truth) -> Check:
    """The label is where p − onehot, which is sent back, is negative."""
    one, logits = made.seen, made.arrays["logits"]
    found = np.full(one.label.shape, -1)
    for n, t in np.argwhere(one.label >= 0):
        e, total = np.exp(logits[n, t] - logits[n, t].max()), 0.0
        u = _uniform(made.subject.seed, int(n), int(t)) * np.cumsum(e)[-1]
        for v, part in enumerate(e):
            total += part
            if total > u:
                found[n, t] = v
                break
    routes = ("draw_labels", "SAMPLING in a loop, of NumPy's own Philox")
    return exactly("drawn", routes, made.arrays["drawn"], found)


def _uniform(seed: int, sequence: int, t: int) -> float:
    """SAMPLING's u by NumPy's generator, whose counter is raised before each block."""
    key = np.array([seed, 0], np.uint64)
    counter = np.array([t // 4, 0, 0, sequence], np.uint64)
    word = np.random.Philox(key=key, counter=counter).random_raw(4)[t % 4]
    return int(word >> np.uint64(11)) * 2.0**-53


# ------------------------------------------------------------------ gradients


def _gradients(made: Truth, gold: Plain, progress: Progress) -> Iterator[Check]:
    """Every entry by a complex step of the forward: no backward has a part in it.

    The step has roundings of its own. They are looked at where those of the backward alone do not
    explain the difference.
    """
    config, one = made.subject.model.config, made.seen
    routes = ("backward with fast kernels", "complex step of the forward, entry by entry")
    done = counter(progress, sum(x.size for x in gold.parameters.values()))

    def step(name: str, parameters: Parameters, done: Callable[[], None] = lambda: None) -> Array:
        return complex_gradient(config, parameters, one, name, done)

    for name in gold.parameters:
        got, want = made.arrays[f"gradients.{name}"], step(name, gold.parameters, done)
        check = partial(gold.check, f"gradients.{name}", routes, got, want)
        size = gold.size(lambda x, name=name: x.gradient[name])  # type: ignore[misc]
        if not check(size).passed:
            again = Runs(want, lambda n, name=name: step(name, gold.shaken(n)))  # type: ignore[misc]
            size += again.size(FEW_RUNS)
        yield check(size)


def complex_gradient(
    config: ModelConfig, parameters: Parameters, one: Seen, name: str, done: Callable[[], None]
) -> Array:
    """Im L(θ + i h e)/h for every entry e of one parameter.

    Cost: one complex forward for each entry, after which `done` is called.
    """
    array = parameters[name]
    slope, moved = np.empty(array.shape), array.astype(complex)
    for at in np.ndindex(array.shape):
        moved[at] += 1j * STEP
        slope[at] = _loss(config, ChainMap({name: moved}, parameters), one).imag / STEP  # type: ignore[arg-type]
        moved[at] = array[at]
        done()
    return slope


def _loss(config: ModelConfig, parameters: Parameters, one: Seen) -> complex:
    final, _ = transformer.forward(config, parameters, one.inputs, one.layout)
    at = one.label >= 0
    y = transformer.linear_forward(config, parameters, "head", final[at])
    z = transformer.capped(config, y)
    z = z - z.real.max(axis=-1, keepdims=True)
    chosen = z[np.arange(len(z)), one.label[at]]
    return complex((np.log(np.exp(z).sum(axis=-1)) - chosen).sum())


# ------------------------------------------------------------------ factors


def _sums(made: Truth, gold: Plain, sampled: Plain) -> Iterator[Check]:
    """A and G: of the stored rows, of `collect`, and of the definition."""
    given = made.subject.model, made.subject.corpus, made.subject.layers
    defined = {
        kind: definition.factors(*given, kind, made.subject.seed if kind == "sampled" else 0)
        for kind in made.collected
    }
    for layer in made.subject.layers:
        yield from _counts(made, layer, defined["sampled"][layer])
        keep = made.arrays[f"rows.{layer}.kept"] != 0
        for pattern, kind, plain, part in (
            ("factors.{}.sum_A", "sampled", gold, "a"),
            ("factors.{}.sum_G", "sampled", sampled, "g_sampled"),
            ("empirical.{}.sum_G", "empirical", gold, "g"),
            ("expected.{}.sum_G", "expected", gold, "g"),
        ):
            name = pattern.format(layer)
            rows = partial(_kept_side, layer, part, keep)
            size = _moved(plain, rows)
            key = name.rpartition(".")[2]
            want = getattr(defined[kind][layer], f"S_{key[-1]}")
            first = f"Σ x xᵀ over the stored {part}"
            if kind == "expected":
                size *= _ratio(want, plain, rows)
                first = "collect"
            else:
                other = getattr(made.collected[kind][layer], key)
                yield plain.check(name, (first, "collect"), made.arrays[name], other, size)
                yield _by_rows(made, name, made.arrays[f"rows.{layer}.{part}"][keep])
            routes = (first, "the definition, one sequence at a time")
            yield plain.check(name, routes, made.arrays[name], want, size)


def _kept_side(layer: str, part: str, keep: Array, x: Flow) -> Array:
    return _side(x, layer, part)[keep]


def _moved(plain: Plain, rows: Part) -> float:
    """The terms of Σ x xᵀ: what the rows bring with them, and its own, which are at most tr."""
    size = plain.size(lambda x: gram(rows(x)))
    return size + float(norm(rows(plain.here))) ** 2


def _ratio(want: Array, plain: Plain, rows: Part) -> float:
    """How much larger the sum of `expected` is than that of the corpus's labels.

    The rows of `expected` are many; they are taken to be as sensitive as those of the labels.
    """
    own = float(norm(rows(plain.here))) ** 2
    return max(1.0, float(np.trace(want)) / own) if own else 1.0


def _counts(made: Truth, layer: str, defined: definition.Sums) -> Iterator[Check]:
    routes = ("rows that are kept", "the definition, one sequence at a time")
    for side in "AG":
        name = f"factors.{layer}.n_{side}"
        yield exactly(name, routes, made.arrays[name], np.asarray(getattr(defined, f"n_{side}")))
    name = f"factors.{layer}.sum_a"
    if name in made.arrays:
        rows = made.arrays[f"rows.{layer}.a"][made.arrays[f"rows.{layer}.kept"] != 0]
        want = np.array([math.fsum(column) for column in rows.T])
        size, budget = float(np.abs(rows).sum()), tolerance.gamma(len(rows), np.float64)
        routes = ("Σ x over the stored a", "correctly rounded sums (fsum)")
        yield within(name, routes, made.arrays[name], want, size, budget)


def _by_rows(made: Truth, name: str, rows: Array) -> Check:
    """What a reader in any language does: one row at a time."""
    want = np.zeros(made.arrays[name].shape)
    for row in rows:
        want += np.outer(row, row)
    routes, size = ("syrk of the stored rows", "one row at a time"), float(np.trace(want))
    return within(name, routes, made.arrays[name], want, size, sum_budget(len(rows)))


def sum_budget(rows: int) -> float:
    """|S' − Σ x xᵀ| over tr S, of two programs that sum the stored rows in any order.

    Each errs by gamma(rows + 1) |X|ᵀ|X|, whose Frobenius norm is at most tr S. The nearest bug, one
    row more or less, is off by about 1 / rows.

    Kind: worst case; 5 to 30 % is usual of a dozen rows.
    """
    return 2 * tolerance.gamma(rows + 1, np.float64)


# ------------------------------------------------------------------ bases and edits


def basis_budget(size: int) -> float:
    """|M − U diag(values) Uᵀ| over |M|, and |UᵀU − I| over |I|: solver, and two products.

    Kind: worst case; 5 to 10 % is usual.
    """
    return tolerance.eigenpair(size) + 2 * tolerance.gamma(size, np.float64) * math.sqrt(size)


def _bases(made: Truth) -> Iterator[Check]:
    for layer in made.subject.layers:
        at = f"basis.{layer}"
        for side, key in (("A", "mu"), ("G", "lam")):
            M, U, values = (
                getattr(made.factors[layer], side),
                made.arrays[f"{at}.U_{side}"],
                made.arrays[f"{at}.{key}"],
            )
            n = len(values)
            name, budget, recomposed = f"{at}.U_{side}", basis_budget(n), (U * values) @ U.T
            routes = ("LAPACK", f"{side} = U diag(values) Uᵀ, the definition")
            yield Check(name, routes, apart(recomposed, M, float(norm(M))), budget)
            routes = ("LAPACK", "UᵀU = I")
            yield Check(name, routes, apart(U.T @ U, np.eye(n), math.sqrt(n)), budget)
            turned = np.linalg.svd(M, compute_uv=False)
            routes = ("LAPACK's eigensolver", "singular values of the symmetric matrix")
            size = float(norm(turned))
            yield within(f"{at}.{key}", routes, values, turned, size, tolerance.eigenvalues(n))


def edit_budget(d_out: int, d_in: int) -> float:
    """|W' − U_G (C ∘ M) U_Aᵀ| over |W|, in any order of summation.

    Four products with U, each within gamma(d) |U| of its terms, and ‖|U|‖₂ <= √d.

    Kind: worst case; 0.1 % is usual. The nearest bug, another pair, is off by one coefficient of W.
    """
    return 2 * d_out * d_in * tolerance.gamma(2 * (d_out + d_in), np.float64)


def _edits(made: Truth) -> Iterator[Check]:
    config = made.subject.model.config
    for layer in made.subject.layers:
        one = made.bases[layer]
        W = made.subject.model.parameters[config.weight_of(layer)]
        for rho in SHARES:
            at = f"edits.{share_name(rho)}.{layer}"
            if f"{at}.mask" not in made.arrays:
                continue
            mask = select(one.lam, one.mu, rho)
            routes = ("the staircase", "sorting all pairs")
            yield exactly(f"{at}.mask", routes, made.arrays[f"{at}.mask"], mask)
            want = np.zeros(W.shape)
            for i, j in np.argwhere(mask):
                u, v = one.U_G[:, i], one.U_A[:, j]
                want += (u @ W @ v) * np.outer(u, v)
            routes = ("U_G (C ∘ M) U_Aᵀ", "Σ (uᵀ W v) u vᵀ over the kept pairs")
            got, size = made.arrays[f"{at}.weight"], float(norm(W))
            yield within(f"{at}.weight", routes, got, want, size, edit_budget(*W.shape))


# ------------------------------------------------------------------ dense curvature


def _dense(made: Truth, gold: Plain) -> Iterator[Check]:
    layer = dense_layer(made.subject)
    if layer is None:
        return
    wrt, given = f"{layer}.weight", (made.subject.model, made.subject.corpus)
    at = f"exact.{layer}."
    ggn, fisher, hessian, f_tok = (
        made.arrays[at + kind] for kind in ("ggn", "fisher", "hessian", "f_tok")
    )
    problem = exact.problem(*given)

    def size(result: Callable[..., Array]) -> float:
        def of(parameters: Parameters) -> Array:
            return result(replace(problem, parameters=parameters), wrt=wrt)

        moved = Runs(of(gold.parameters), lambda n: of(gold.shaken(n)))
        return moved.size(FEW_RUNS)

    routes, terms = ("GGN: forward first", "expected Fisher: backward only"), size(exact.ggn)
    yield gold.check(at + "ggn", routes, ggn, fisher, terms)
    yield gold.check(at + "fisher", routes[::-1], fisher, ggn, terms)
    residual = exact.operator(*given, wrt=wrt, kind="residual") @ np.eye(len(ggn))
    routes = ("complex step of the backward", "GGN + Σ r ∂²z, each by its own route")
    yield gold.check(at + "hessian", routes, hessian, ggn + residual, size(exact.hessian) + terms)
    routes, want = ("batched sums", "Σ (g gᵀ) ⊗ (a aᵀ), one term at a time"), np.zeros(ggn.shape)
    rows = exact.rows(*given, wrt=wrt)
    for a, g in rows:
        for g_TO in g:
            for s in range(len(a)):
                want += kron_dense(np.outer(g_TO[s], g_TO[s]), np.outer(a[s], a[s]))
    count = sum(g.shape[0] * g.shape[1] for _, g in rows)
    trace, budget = float(np.trace(want)), 2 * tolerance.gamma(count + 4, np.float64)
    yield within(at + "f_tok", routes, f_tok, want, trace, budget)  # its terms are positive


FEW_RUNS = 2
"""Shaken runs of a dense matrix, whose many entries move together but rarely too little."""
