"""Bugs (METHOD, Bugs), planted one at a time: the suite must fail, in the test named here.

Each case replaces one function by a plausible wrong one, runs a test on a fixed case, and expects
it to fail; the same test passes without the bug.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import test_eigenbasis
import test_factors
import test_identities
import test_layers
import test_oracles
import test_projection
import test_transformer
from strategies import Case, case
from test_oracles import GEMMA2, GPT2, NEOX, OLMO, PHI, images, padded

from refcurv.curvature import eigenbasis, factors, moments
from refcurv.law.checks import RefcurvError
from refcurv.law.conventions import Fisher
from refcurv.model import fisher as model_fisher
from refcurv.model import images as model_images
from refcurv.model import labels, layers, loss, rows, sampling, transformer
from refcurv.model.config import Activation, Residual, RopeScaling, Scaling
from refcurv.model.layers import ACTIVATIONS, DEFINITIONS, Ops
from refcurv.model.transformer import Slope
from refcurv.passes.sweep import Sweep


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


def default_labels() -> Case:
    """Grouped queries, one padded row, default labels."""
    one = case(length=6)
    real = np.array([[True] * 6, [True] * 4 + [False] * 2])
    return Case(
        one.config, one.parameters, one.token, real, one.segment,
        labels.shift_labels(one.token, real, one.segment),
    )  # fmt: skip


# ------------------------------------------------------------------ the tests that must notice


def naive_sums(fisher: str, one: Case | None = None) -> None:
    test_factors.test_factors_equal_the_naive_sums.hypothesis.inner_test(
        default_labels() if one is None else one, fisher, 3
    )


def unbiased_error() -> None:
    with pytest.MonkeyPatch.context() as patch:
        test_factors.test_O12_the_standard_error_is_unbiased("sampled", patch)


def complex_step(one: Case | None = None) -> None:
    name = "test_gradient_of_every_parameter_equals_complex_step"
    check = getattr(test_transformer, name).hypothesis.inner_test
    check(default_labels() if one is None else one)


def forward(one: Case) -> None:
    test_oracles.test_the_forward_is_the_oracle.hypothesis.inner_test(one)


def rows_and_fishers(one: Case, layer: str, kind: str = "empirical") -> None:
    test_oracles.compare_rows_and_fishers(one, layer, kind)  # test_rows_and_fishers_are_the_oracle


def rotary_by_hand() -> None:
    test_layers.test_rotary_positions_turn_pairs.hypothesis.inner_test(7, 2, 0, 10.0, 0)


def attention_by_loops() -> None:
    test_layers.test_attention_by_loops.hypothesis.inner_test(DEFINITIONS, 2, 2, 5, 0, None, None)


def norm_defect() -> None:
    test_identities.test_O34_the_norm_defect_tells_where_eps_stands(0.1, np.random.default_rng(0))


def order_of_eigenvalues() -> None:
    name = "test_reconstruction_orthogonality_and_order"
    getattr(test_eigenbasis, name).hypothesis.inner_test(9, 20, 0, 0.5)


def swiglu_identity() -> None:
    test_identities.test_O36_gate_and_up.hypothesis.inner_test(default_labels())


def first_query() -> None:
    place, qk = test_identities.ALL[0]
    test_identities.test_O31_the_first_query_has_no_gradient(place, qk)


def unfold_by_loops() -> None:
    test_layers.test_unfold_by_loops.hypothesis.inner_test(2, 2, 3, 2, 0)


def window_by_pairs() -> None:
    test_layers.test_layouts_by_pairs.hypothesis.inner_test(7, 2, 0)


def packed_documents() -> None:
    place, qk = test_identities.ALL[0]
    test_identities.test_O52_packed_documents_are_separate_documents(place, qk)


# ------------------------------------------------------------------ the bugs


def swapped_sides(*given: Any) -> dict[str, factors.Factor]:
    right = FINISH(*given)
    return {n: factors.Factor(f.sum_G, f.n_G, f.sum_A, f.n_A) for n, f in right.items()}


FINISH = factors.finished


def mean_loss(logit: np.ndarray, label: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    nats, slope = CROSS_ENTROPY(logit, label)
    return nats, slope / max(1, (label >= 0).sum())


CROSS_ENTROPY = loss.cross_entropy


def all_real(label: np.ndarray, real: np.ndarray, *more: Any) -> np.ndarray:
    return real


def everything(label: np.ndarray, real: np.ndarray, *more: Any) -> np.ndarray:
    return np.ones_like(real)


def gold(config: Any, parameters: Any, shard: Any, job: Any, take: Any) -> None:
    SWEEP(config, parameters, shard, Sweep(job.layers, Fisher.EMPIRICAL), take)


SWEEP = factors.sweep


def shared_signs(seed: int, draw: int, index: int, t: int, vocabulary: int) -> np.ndarray:
    return SIGNS(seed, draw, index, 0, vocabulary)


SIGNS = sampling.signs


def one_uniform(seed: int, draw: int, index: int, length: int) -> np.ndarray:
    return np.full(length, UNIFORMS(seed, draw, index, 1)[0])


UNIFORMS = sampling.uniforms


def root_everywhere(
    _ops: Any, label: Any, t: int, v: int, row: np.ndarray, logit: np.ndarray
) -> np.ndarray:
    sent = loss.root_product(logit, np.eye(logit.shape[1])[np.full(len(logit), v)])
    sent[row % label.shape[1] != t] = 0
    return sent


def biased_variance(passes: Any) -> np.ndarray:
    return VARIANCE(passes) / 2


VARIANCE = moments.PassSum.variance


def interleaved(x: np.ndarray, cos: np.ndarray, sin: np.ndarray) -> np.ndarray:
    x1, x2 = x[..., ::2], x[..., 1::2]
    return np.stack([x1 * cos - x2 * sin, x2 * cos + x1 * sin], axis=-1).reshape(x.shape)


def tiled_groups(q: np.ndarray, k: np.ndarray, v: np.ndarray, *more: Any) -> Any:
    B, T, H, E = q.shape
    K = k.shape[2]
    turned = q.reshape(B, T, H // K, K, E).swapaxes(2, 3).reshape(q.shape)
    context, saved = ATTENTION(turned, k, v, *more)
    return context.reshape(B, T, K, H // K, E).swapaxes(2, 3).reshape(q.shape), saved


ATTENTION = layers.attention_forward


def eps_outside(x: np.ndarray, gain: np.ndarray, eps: float) -> Any:
    r = 1 / (np.sqrt((x * x).mean(axis=-1, keepdims=True)) + eps)
    return x * r * gain, (x * r, r, x.dtype.type(1), gain)


def ascending(M: np.ndarray, *more: Any) -> Any:
    values, U = EIGH(M, *more)
    return values[::-1], U[:, ::-1]


EIGH = eigenbasis.blas.eigh


def rows_for_columns(M: np.ndarray, *more: Any) -> Any:
    values, U = EIGH(M, *more)
    return values, U.T[::-1, ::-1]


def gate_without_slope(d_h: np.ndarray, saved: Any) -> Any:
    """silu' taken for sigmoid."""
    _activation, gate, up = saved
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


# ------------------------------------------------------------------ architectures taken for others


def taken_for(function: Callable[..., Any], **other: Any) -> Callable[..., Any]:
    """A function of a config, called with another one."""
    return lambda config, *more: function(replace(config, **other), *more)


def offset_forgotten(config: Any, parameters: Any, name: str, x: np.ndarray, ops: Ops) -> Any:
    return NORM(replace(config, norm_offset=False), parameters, name, x, ops)


def gained(config: Any, parameters: Any, name: str, x: np.ndarray, ops: Ops) -> Any:
    y, saved = NORM(config, parameters, name, x, ops)
    return (y if config.norm_gain else y * 1.5), saved


NORM = transformer.norm_forward


def without_mean(config: Any, name: str, *more: Any) -> Any:
    return NORM_BACKWARD(replace(config, norm="rms"), name, *more)


NORM_BACKWARD = transformer.norm_backward


def bias_times(factor: Callable[[np.ndarray], float]) -> Callable[..., Any]:
    """The bias's gradient, times a function of the layer's output gradient g."""

    def wrong(config: Any, parameters: Any, layer: str, a: np.ndarray, g: np.ndarray) -> Any:
        steps = LINEAR_BACKWARD(config, parameters, layer, a, g)
        yield next(steps)
        if config.has_bias(layer):
            slope = next(steps)
            yield Slope(slope.name, slope.d * factor(g))
        return transformer.drain(steps, lambda step: None)

    return wrong


LINEAR_BACKWARD = transformer.linear_backward


def mlp_of_shared_norm_forgotten(*arguments: Any) -> Any:
    return 0 * (yield from MLP_BACKWARD(*arguments))


MLP_BACKWARD = transformer.mlp_backward


def bent_nowhere(function: Callable[..., Any]) -> Callable[..., Any]:
    """The value of clip or soft-cap with the derivative 1."""

    def wrong(x: np.ndarray, bound: float) -> Any:
        y, slope = function(x, bound)
        return y, np.ones_like(slope)

    return wrong


def unscaled(q: np.ndarray, k: np.ndarray, v: np.ndarray, layout: Any, scale: Any, cap: Any) -> Any:
    return ATTENTION(q, k, v, layout, None, cap)


def uncapped_scores(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, layout: Any, scale: Any, cap: Any
) -> Any:
    return ATTENTION(q, k, v, layout, scale, None)


def last_entries(x: np.ndarray, cos: np.ndarray, sin: np.ndarray) -> np.ndarray:
    still = x.shape[-1] - 2 * cos.shape[-1]
    return np.concatenate([x[..., :still], ROTATE(x[..., still:], cos, sin)], axis=-1)


ROTATE = layers.rotate


def ramp_reversed(
    width: int, theta: float, scaling: Any, dtype: Any, length: Any = 0
) -> np.ndarray:
    """f + f/factor − f': the stretched and the others change places."""
    f, right = (FREQUENCIES(width, theta, some, dtype, length) for some in (None, scaling))
    ramp = scaling is not None and scaling.kind is not Scaling.LINEAR
    return f + f / scaling.factor - right if ramp else right


FREQUENCIES = layers.rope_frequencies


def positions_go_on(config: Any, parameters: Any, x: np.ndarray, layout: Any) -> Any:
    """Learned positions do not restart in a packed document."""
    index = np.arange(x.shape[1]) + 0 * layout.position_BT
    return INPUT(config, parameters, x, replace(layout, position_BT=index))


def specials_swapped(config: Any, parameters: Any, *more: Any) -> Any:
    swapped = {"cls.weight": "distillation.weight", "distillation.weight": "cls.weight"}
    return INPUT(config, {n: parameters[swapped.get(n, n)] for n in parameters}, *more)


INPUT = transformer.input_forward


def pixel_by_pixel(image: np.ndarray, patch: int) -> np.ndarray:
    """Patches flattened over (row, column, channel)."""
    B, C, H, W = image.shape
    split = image.reshape(B, C, H // patch, patch, W // patch, patch)
    return split.transpose(0, 2, 4, 3, 5, 1).reshape(B, -1, C * patch * patch)


def with_activation(name: Activation, function: Any) -> dict[Activation, Any]:
    return {**ACTIVATIONS, name: function}


def one_block(**changes: Any) -> Case:
    """Two sequences: one of two documents, one padded."""
    return padded(5, layers=1, **changes)


TABLES = layers.rope_tables
WINDOWED, FORWARD, BACKWARD = (
    layers.windowed, transformer.block_forward, transformer.block_backward
)  # fmt: skip

LLAMA3 = RopeScaling(kind="llama3", factor=4.0, original=30, slow=0.3, fast=9.0)
WIDE = dict(head_width=4, norm_place="pre")

Bug = tuple[str, Any, str, Any, Callable[[], None]]

BUGS: list[Bug] = [
    ("B32 A and G swapped", factors, "finished", swapped_sides, lambda: naive_sums("empirical")),
    ("B1 mean loss", DEFINITIONS, "cross_entropy", mean_loss, complex_step),
    ("B27 last position kept", rows, "reached", all_real, lambda: naive_sums("empirical")),
    ("B15 data labels for sampled", factors, "sweep", gold, lambda: naive_sums("sampled")),
    ("B17 one uniform for all positions", model_fisher, "uniforms", one_uniform,
     lambda: naive_sums("sampled")),
    ("signs shared across positions", model_fisher, "signs", shared_signs,
     lambda: naive_sums("signed")),
    ("B18 joint columns, no signs", model_fisher, "_root_column", test_factors.joint_columns,
     lambda: naive_sums("expected")),
    ("B19 unlabelled positions count too", model_fisher, "_root_column", root_everywhere,
     lambda: naive_sums("expected", test_factors.gappy())),
    ("1/M in the standard error", moments.PassSum, "variance", biased_variance, unbiased_error),
    ("B28 pads counted", rows, "reached", everything, lambda: naive_sums("empirical")),
    ("B51 interleaved rotary", layers, "rotate", interleaved, rotary_by_hand),
    ("B52 tiled query groups", DEFINITIONS, "attention_forward", tiled_groups, attention_by_loops),
    ("B53 eps outside the root", layers, "rms_norm_forward", eps_outside, norm_defect),
    ("B65 ascending spectrum", eigenbasis.blas, "eigh", ascending, order_of_eigenvalues),
    ("B64 eigenvectors in rows", eigenbasis.blas, "eigh", rows_for_columns,
     order_of_eigenvalues),
    ("SwiGLU without silu'", DEFINITIONS, "mlp_backward", gate_without_slope, complex_step),
    ("SwiGLU without silu', by O36", DEFINITIONS, "mlp_backward", gate_without_slope,
     swiglu_identity),
    ("softmax without its Jacobian", DEFINITIONS, "attention_backward", no_softmax_jacobian,
     complex_step),
    ("the same, by O31", DEFINITIONS, "attention_backward", no_softmax_jacobian, first_query),
    ("B50 attention across documents", transformer,
     "causal_layout", leaking, packed_documents),
]  # fmt: skip

ARCHITECTURE: list[Bug] = [
    ("interleaved rotary", DEFINITIONS, "rotate", interleaved, lambda: forward(one_block(**WIDE))),
    ("last entries turned", DEFINITIONS, "rotate", last_entries,
     lambda: forward(one_block(**NEOX))),
    ("yarn's ramp reversed", layers, "rope_frequencies", ramp_reversed,
     lambda: forward(one_block(**OLMO))),
    ("yarn's ramp reversed, by hand", layers, "rope_frequencies", ramp_reversed,
     lambda: test_layers.test_frequencies_by_hand(test_layers.by_the_package)),
    ("llama3's ramp reversed", layers, "rope_frequencies", ramp_reversed,
     lambda: forward(one_block(**WIDE, rope_scaling=LLAMA3))),
    ("cos and sin without yarn's size", DEFINITIONS, "rope_tables",
     lambda position, width, theta, dtype, scaling=None, length=0: TABLES(
         position, width, theta, dtype, scaling and replace(scaling, attention=1.0), length),
     lambda: forward(one_block(**WIDE, rope_scaling=replace(LLAMA3, attention=1.2)))),
    ("positions that go on in a packed document", transformer, "input_forward", positions_go_on,
     lambda: forward(one_block(**GPT2))),
    ("tiled query groups", DEFINITIONS, "attention_forward", tiled_groups,
     lambda: forward(one_block(heads=4, kv_heads=2))),
    ("score scale forgotten", DEFINITIONS, "attention_forward", unscaled,
     lambda: forward(one_block(**GEMMA2))),
    ("score cap forgotten", DEFINITIONS, "attention_forward", uncapped_scores,
     lambda: forward(one_block(**GEMMA2))),
    ("score cap's derivative", layers, "soft_cap", bent_nowhere(layers.soft_cap),
     lambda: complex_step(one_block(**GEMMA2))),
    ("logit cap's derivative", transformer, "uncapped", lambda config, z, d, ops=None: d,
     lambda: complex_step(one_block(**GEMMA2))),
    ("logit cap's derivative, in the expected Fisher", transformer, "uncapped",
     lambda config, z, d, ops=None: d,
     lambda: rows_and_fishers(one_block(**GEMMA2), "blocks.0.mlp.up", "expected")),
    ("clip forgotten", DEFINITIONS, "clip", lambda x, bound: (x, np.ones(x.shape, bool)),
     lambda: forward(one_block(**OLMO))),
    ("clip's derivative", DEFINITIONS, "clip", bent_nowhere(layers.clip),
     lambda: complex_step(one_block(**OLMO))),
    ("window too wide", transformer, "windowed", lambda at, n: WINDOWED(at, n + 1),
     lambda: forward(one_block(**GEMMA2))),
    ("window too narrow", transformer, "windowed", lambda at, n: WINDOWED(at, n - 1),
     lambda: forward(one_block(**GEMMA2))),
    ("window too wide, by pairs", layers, "windowed", lambda at, n: WINDOWED(at, n + 1),
     window_by_pairs),
    ("a bidirectional model that is causal", transformer, "full_layout", layers.causal_layout,
     lambda: forward(images(5))),
    ("eps outside the root", DEFINITIONS, "rms_norm_forward", eps_outside,
     lambda: forward(one_block())),
    ("gain offset forgotten", transformer, "norm_forward", offset_forgotten,
     lambda: forward(one_block(**GEMMA2))),
    ("a gain where there is none", transformer, "norm_forward", gained,
     lambda: forward(one_block(**OLMO))),
    ("LayerNorm without the mean's derivative", transformer, "norm_backward", without_mean,
     lambda: complex_step(one_block(**GPT2))),
    ("tanh for erf", layers, "ACTIVATIONS", with_activation(Activation.GELU, layers.gelu_tanh),
     lambda: forward(one_block(**GPT2))),
    ("erf for tanh", layers, "ACTIVATIONS", with_activation(Activation.GELU_TANH, layers.gelu),
     lambda: forward(one_block(**GEMMA2))),
    ("sequential for parallel", transformer, "block_forward",
     taken_for(FORWARD, residual=Residual.SEQUENTIAL), lambda: forward(one_block(**NEOX))),
    ("parallel for sequential", transformer, "block_forward",
     taken_for(FORWARD, residual=Residual.PARALLEL), lambda: forward(one_block(**GPT2))),
    ("sequential for parallel, backward", transformer, "block_backward",
     taken_for(BACKWARD, residual=Residual.SEQUENTIAL), lambda: complex_step(one_block(**NEOX))),
    ("parallel for sequential, backward", transformer, "block_backward",
     taken_for(BACKWARD, residual=Residual.PARALLEL), lambda: complex_step(one_block(**GPT2))),
    ("shared norm for the MLP's own", transformer, "block_forward",
     taken_for(FORWARD, residual=Residual.SHARED), lambda: forward(one_block(**NEOX))),
    ("shared norm without the MLP's gradient", transformer, "mlp_backward",
     mlp_of_shared_norm_forgotten, lambda: complex_step(one_block(**PHI))),
    ("bias forgotten", transformer, "linear_forward",
     taken_for(transformer.linear_forward, biases=()), lambda: forward(one_block(**GPT2))),
    ("bias without a gradient", transformer, "linear_backward", bias_times(lambda g: 0.0),
     lambda: complex_step(one_block(**GPT2))),
    ("bias counted once a batch", transformer, "linear_backward",
     bias_times(lambda g: 1 / len(g)),
     lambda: complex_step(one_block(**GPT2))),
    ("embedding's gradient without the scale", transformer, "input_taps",
     taken_for(transformer.input_taps, embed_scale=1.0), lambda: complex_step(one_block(**GEMMA2))),
    ("CLS read at the last position", transformer, "pool_forward", lambda config, x: x[:, -1:],
     lambda: forward(images(5))),
    ("mean over the patches alone", transformer, "pool_forward",
     lambda config, x: x[:, 2:].mean(axis=1, keepdims=True),
     lambda: forward(images(5, pool="mean"))),
    ("specials swapped", transformer, "input_forward", specials_swapped,
     lambda: forward(images(5))),
    ("patches by (row, column, channel)", model_images, "unfold", pixel_by_pixel,
     lambda: rows_and_fishers(images(5), "patch")),
    ("patches by (row, column, channel), by loops", layers, "unfold", pixel_by_pixel,
     unfold_by_loops),
]  # fmt: skip

BUGS += ARCHITECTURE


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
