"""Bugs of ORACLES.md, planted one at a time: the suite must fail, in the test named here.

Each case replaces one function by a plausible wrong one, runs a test on a fixed case, and expects
it to fail; the same test passes without the bug.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import strategies
import test_eigenbasis
import test_factors
import test_identities
import test_layers
import test_projection
import test_transformer
from strategies import Case, case

from refcurv.curvature import eigenbasis, factors
from refcurv.law.checks import RefcurvError
from refcurv.law.conventions import Fisher
from refcurv.model import layers, loss, transformer
from refcurv.model.layers import DEFINITIONS, Ops
from refcurv.passes import memory, shards


@contextmanager
def planted(where: Any, name: str, wrong: Any) -> Iterator[None]:
    """Replace an attribute of a module, or a field of a frozen record, for a while."""
    right = getattr(where, name)
    put = object.__setattr__ if isinstance(where, Ops) else setattr
    put(where, name, wrong)
    try:
        yield
    finally:
        put(where, name, right)


def padded() -> Case:
    """Grouped queries, one padded row, default labels."""
    one = case(length=6)
    real = np.array([[True] * 6, [True] * 4 + [False] * 2])
    return Case(
        one.config, one.parameters, one.token, real, one.segment,
        loss.shift_labels(one.token, real, one.segment),
    )  # fmt: skip


# ------------------------------------------------------------------ the tests that must notice


def naive_sums(fisher: str, one: Case | None = None) -> None:
    test_factors.test_factors_equal_the_naive_sums.hypothesis.inner_test(
        padded() if one is None else one, fisher, 3
    )


def unbiased_error() -> None:
    with pytest.MonkeyPatch.context() as patch:
        test_factors.test_O12_the_standard_error_is_unbiased("sampled", patch)


def complex_step() -> None:
    name = "test_gradient_of_every_parameter_equals_complex_step"
    getattr(test_transformer, name).hypothesis.inner_test(padded())


def rotary_by_hand() -> None:
    test_layers.test_rotary_positions_turn_pairs.hypothesis.inner_test(7, 2, 10.0, 0)


def attention_by_loops() -> None:
    test_layers.test_attention_by_loops.hypothesis.inner_test(DEFINITIONS, 2, 2, 5, 0)


def norm_defect() -> None:
    test_identities.test_O34_the_norm_defect_tells_where_eps_stands(0.1, np.random.default_rng(0))


def order_of_eigenvalues() -> None:
    name = "test_reconstruction_orthogonality_and_order"
    getattr(test_eigenbasis, name).hypothesis.inner_test(9, 20, 0, 0.5)


def swiglu_identity() -> None:
    test_identities.test_O36_gate_and_up_of_swiglu.hypothesis.inner_test(padded())


def first_query() -> None:
    place, qk = test_identities.ALL[0]
    test_identities.test_O31_the_first_query_has_no_gradient(place, qk)


def packed_documents() -> None:
    place, qk = test_identities.ALL[0]
    test_identities.test_O52_packed_documents_are_separate_documents(place, qk)


# ------------------------------------------------------------------ the bugs


def swapped_sides(config: Any, names: Any, moments: Any) -> dict[str, factors.Factor]:
    right = FINISH(config, names, moments)
    return {n: factors.Factor(f.sum_G, f.n_G, f.sum_A, f.n_A) for n, f in right.items()}


FINISH = factors._finish


def mean_loss(logit: np.ndarray, label: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    nats, slope = CROSS_ENTROPY(logit, label)
    return nats, slope / max(1, (label >= 0).sum())


CROSS_ENTROPY = loss.cross_entropy


def all_real(label: np.ndarray, real: np.ndarray, segment: np.ndarray) -> np.ndarray:
    return real


def everything(label: np.ndarray, real: np.ndarray, segment: np.ndarray) -> np.ndarray:
    return np.ones_like(real)


def gold(config: Any, parameters: Any, shard: Any, job: Any, take: Any) -> None:
    SWEEP(config, parameters, shard, memory.Sweep(job.layers, Fisher.EMPIRICAL), take)


SWEEP = memory.sweep


def shared_signs(seed: int, draw: int, index: int, t: int, vocabulary: int) -> np.ndarray:
    return SIGNS(seed, draw, index, 0, vocabulary)


SIGNS = loss.signs


def one_uniform(seed: int, draw: int, index: int, length: int) -> np.ndarray:
    return np.full(length, UNIFORMS(seed, draw, index, 1)[0])


UNIFORMS = loss.uniforms


def root_everywhere(shard: Any, t: int, v: int, row: np.ndarray, logit: np.ndarray) -> np.ndarray:
    sent = loss.root_product(logit, np.eye(logit.shape[1])[np.full(len(logit), v)])
    sent[row % shard.label_BT.shape[1] != t] = 0
    return sent


def biased_variance(passes: Any) -> np.ndarray:
    return VARIANCE(passes) / 2


VARIANCE = factors._Passes.variance


def interleaved(x: np.ndarray, cos: np.ndarray, sin: np.ndarray) -> np.ndarray:
    x1, x2 = x[..., ::2], x[..., 1::2]
    return np.stack([x1 * cos - x2 * sin, x2 * cos + x1 * sin], axis=-1).reshape(x.shape)


def tiled_groups(q: np.ndarray, k: np.ndarray, v: np.ndarray, layout: Any) -> Any:
    B, T, H, E = q.shape
    K = k.shape[2]
    turned = q.reshape(B, T, H // K, K, E).swapaxes(2, 3).reshape(q.shape)
    context, saved = ATTENTION(turned, k, v, layout)
    return context.reshape(B, T, K, H // K, E).swapaxes(2, 3).reshape(q.shape), saved


ATTENTION = layers.attention_forward


def eps_outside(x: np.ndarray, gain: np.ndarray, eps: float) -> Any:
    r = 1 / (np.sqrt((x * x).mean(axis=-1, keepdims=True)) + eps)
    return x * r * gain, (x * r, r, gain)


def ascending(M: np.ndarray) -> Any:
    values, U = EIGH(M)
    return values[::-1], U[:, ::-1]


EIGH = eigenbasis.blas.eigh


def rows_for_columns(M: np.ndarray) -> Any:
    values, U = EIGH(M)
    return values, U.T[::-1, ::-1]


def ungated_slope(d_h: np.ndarray, saved: Any) -> Any:
    gate, up = saved
    s = layers.sigmoid(gate)
    return d_h * up * s, d_h * gate * s


def no_softmax_jacobian(d_context: np.ndarray, saved: Any) -> Any:
    q, k, v, p, scale = saved
    B, (K, R, T, E) = len(d_context), q.shape[1:]
    d = d_context.reshape(B, T, K, R, E).transpose(0, 2, 3, 1, 4)
    d_score = p * (d @ v.swapaxes(-1, -2))
    d_q = (d_score @ k * scale).transpose(0, 3, 1, 2, 4).reshape(B, T, K * R, E)
    d_k = (d_score.swapaxes(-1, -2) @ q).sum(axis=2) * scale
    d_v = (p.swapaxes(-1, -2) @ d).sum(axis=2)
    return d_q, d_k.transpose(0, 2, 1, 3), d_v.transpose(0, 2, 1, 3)


def leaking(real: np.ndarray, segment: np.ndarray) -> layers.Layout:
    return layers.causal_layout(real, np.zeros_like(segment))


BUGS: list[tuple[str, Any, str, Any, Callable[[], None]]] = [
    ("B32 A and G swapped", factors, "_finish", swapped_sides, lambda: naive_sums("empirical")),
    ("B1 mean loss", transformer, "cross_entropy", mean_loss, complex_step),
    ("B27 last position kept", shards, "reached", all_real, lambda: naive_sums("empirical")),
    ("B15 data labels for sampled", memory, "sweep", gold, lambda: naive_sums("sampled")),
    ("B17 one uniform for all positions", memory, "uniforms", one_uniform,
     lambda: naive_sums("sampled")),
    ("signs shared across positions", memory, "signs", shared_signs, lambda: naive_sums("signed")),
    ("B18 joint columns, no signs", memory, "_root_column", test_factors.joint_columns,
     lambda: naive_sums("expected")),
    ("B19 unlabelled positions count too", memory, "_root_column", root_everywhere,
     lambda: naive_sums("expected", test_factors.gappy())),
    ("1/M in the standard error", factors._Passes, "variance", biased_variance, unbiased_error),
    ("B28 pads counted", shards, "reached", everything, lambda: naive_sums("empirical")),
    ("B51 interleaved rotary", layers, "rotate", interleaved, rotary_by_hand),
    ("B52 tiled query groups", DEFINITIONS, "attention_forward", tiled_groups, attention_by_loops),
    ("B53 eps outside the root", layers, "rms_norm_forward", eps_outside, norm_defect),
    ("B65 ascending spectrum", eigenbasis.blas, "eigh", ascending, order_of_eigenvalues),
    ("B64 eigenvectors in rows", eigenbasis.blas, "eigh", rows_for_columns,
     order_of_eigenvalues),
    ("SwiGLU without silu'", DEFINITIONS, "swiglu_backward", ungated_slope, complex_step),
    ("SwiGLU without silu', by O36", DEFINITIONS, "swiglu_backward", ungated_slope,
     swiglu_identity),
    ("softmax without its Jacobian", DEFINITIONS, "attention_backward", no_softmax_jacobian,
     complex_step),
    ("the same, by O31", DEFINITIONS, "attention_backward", no_softmax_jacobian, first_query),
    ("B50 attention across documents", strategies,
     "causal_layout", leaking, packed_documents),
]  # fmt: skip


@pytest.mark.parametrize(("where", "name", "wrong", "notices"), [b[1:] for b in BUGS],
                         ids=[b[0] for b in BUGS])  # fmt: skip
def test_a_planted_bug_is_noticed(
    where: Any, name: str, wrong: Any, notices: Callable[[], None]
) -> None:
    notices()  # passes as it stands
    with planted(where, name, wrong), pytest.raises((AssertionError, RefcurvError)):
        notices()


def test_edit_tests_notice_a_wrong_mask() -> None:
    """The complement kept, and rows cut for columns: the projection tests fail."""
    right = test_projection.project

    def complement(W: np.ndarray, basis: Any, counts: np.ndarray) -> np.ndarray:
        return W - right(W, basis, counts)

    check = test_projection.test_O54_edit_is_an_orthogonal_projection.hypothesis.inner_test
    check(5, 4, 0, 0.5)
    with planted(test_projection, "project", complement), pytest.raises(AssertionError):
        check(5, 4, 0, 0.5)
