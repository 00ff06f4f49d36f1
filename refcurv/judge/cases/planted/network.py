"""Bugs of the network, its labels and its exact curvature: what a forward pass shows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from refcurv.curvature import exact
from refcurv.files.bfloat16 import from_bfloat16, to_bfloat16
from refcurv.judge.cases.flows import Flow, against, flow, seen
from refcurv.judge.cases.planted.bug import Bug, Changed, Plant
from refcurv.judge.cases.planted.sums import gram
from refcurv.judge.cases.truth import Truth, dense_layer, outputs
from refcurv.law.checks import Array, RefcurvError
from refcurv.law.conventions import NO_LABEL
from refcurv.model.config import Activation, ModelConfig
from refcurv.model.weights import resident


def _network(
    change: Callable[[ModelConfig, dict[str, Array]], tuple[ModelConfig, dict[str, Array]] | None],
) -> Plant:
    """Another network than the file says: what it makes is claimed for the file's."""

    def plant(made: Truth) -> Changed:
        model = made.subject.model
        found = change(model.config, resident(model, np.float64))
        if found is None:
            return {}
        config, parameters = found
        corpus = made.subject.corpus
        if corpus.tokens is not None:  # a network that sees ahead has no default labels
            corpus = replace(corpus, labels=made.seen.label)
        one = seen(config, corpus)
        return _claims(made, flow(config, parameters, one, against(one, one.label)))

    return plant


def _claims(made: Truth, there: Flow) -> Changed:
    out = dict(outputs(made.seen, there))
    return out | {f"gradients.{n}": there.gradient[n] for n in made.subject.model.parameters}


Pair = tuple[ModelConfig, dict[str, Array]]


def _acausal(config: ModelConfig, p: dict[str, Array]) -> Pair | None:
    return (replace(config, causal=False, windows=()), p) if config.causal else None


def _no_window(config: ModelConfig, p: dict[str, Array]) -> Pair | None:
    return (replace(config, windows=()), p) if any(config.windows) else None


def _head_order(
    config: ModelConfig, p: dict[str, Array], order: Array, kinds: str
) -> dict[str, Array]:
    """The entries of q, k or o in another order; `order` within all heads of q, or of k."""
    out = dict(p)
    for name, x in p.items():
        kind = name.split(".")[-2]
        if not name.startswith("blocks.") or kind.removesuffix("_norm") not in kinds:
            continue
        size = x.shape[1] if kind == "o" and x.ndim == 2 else len(x)
        if kind == "o":
            out[name] = x[:, order[:size]] if x.ndim == 2 else x
        elif size >= config.head_width:
            out[name] = x[order[:size]]
    return out


def _interleaved(config: ModelConfig, p: dict[str, Array]) -> Pair | None:
    """Pairs (2j, 2j + 1) turn: the same as turning (j, j + E/2) of rows in another order."""
    E = config.head_width
    if config.rope_theta is None or config.rope_width not in (None, E) or E < 4:
        return None
    within = np.concatenate([np.arange(0, E, 2), np.arange(1, E, 2)])
    order = (np.arange(config.heads)[:, None] * E + within).ravel()
    return config, _head_order(config, p, order, "qk")


def _tiled(config: ModelConfig, p: dict[str, Array]) -> Pair | None:
    """Query head h reads key-value head h mod K."""
    H, K, E = config.heads, config.kv_heads, config.head_width
    if K in (1, H):
        return None
    heads = np.argsort(np.arange(H) % K, kind="stable")
    order = (heads[:, None] * E + np.arange(E)).ravel()
    return config, _head_order(config, p, order, "qo")


def _other_eps(config: ModelConfig, p: dict[str, Array]) -> Pair | None:
    return replace(config, norm_eps=10 * config.norm_eps + 1e-4), p


def _offset_gain(config: ModelConfig, p: dict[str, Array]) -> Pair | None:
    return (replace(config, norm_offset=not config.norm_offset), p) if config.norm_gain else None


OTHER = {
    Activation.GELU: Activation.GELU_TANH,
    Activation.GELU_TANH: Activation.GELU,
    Activation.SILU: Activation.GELU,
    Activation.RELU: Activation.GELU,
}


def _other_activation(config: ModelConfig, p: dict[str, Array]) -> Pair | None:
    return replace(config, activation=OTHER[config.activation]), p


def _no_cap(config: ModelConfig, p: dict[str, Array]) -> Pair | None:
    if config.score_cap is None and config.logit_cap is None:
        return None
    return replace(config, score_cap=None, logit_cap=None), p


def _short_weights(config: ModelConfig, p: dict[str, Array]) -> Pair | None:
    return config, {n: from_bfloat16(to_bfloat16(x)).astype(np.float64) for n, x in p.items()}


def _no_segments(made: Truth) -> Changed:
    """Documents of a packed row see one another."""
    corpus = made.subject.corpus
    if corpus.segments is None:
        return {}
    one = seen(made.subject.model.config, replace(corpus, segments=None, labels=made.seen.label))
    parameters = resident(made.subject.model, np.float64)
    try:
        there = flow(made.subject.model.config, parameters, one, against(one, one.label))
    except RefcurvError:  # longer than the table of positions
        return {}
    return _claims(made, there)


def _shifted(by: int) -> Plant:
    """The label of another position: −1 predicts the token itself, +1 shifts twice."""

    def plant(made: Truth) -> Changed:
        corpus, config = made.subject.corpus, made.subject.model.config
        if corpus.tokens is None or corpus.labels is not None:
            return {}
        token, real, segment = corpus.tokens, corpus.real, corpus.segment
        label, width = np.full(made.seen.label.shape, NO_LABEL), token.shape[1]
        for n, t in np.argwhere(made.seen.label >= 0).tolist():
            s = t + 1 + by
            if s < width and real[n, s] and segment[n, s] == segment[n, t]:
                label[n, t] = token[n, s]
        if not (label >= 0).any():
            return {}
        one = replace(made.seen, label=label)
        parameters = resident(made.subject.model, np.float64)
        there = flow(config, parameters, one, against(one, label))
        out = dict(outputs(one, there))
        return out | {f"gradients.{n}": there.gradient[n] for n in parameters}

    return plant


# ------------------------------------------------------------------ exact curvature


def _column_major(made: Truth) -> Changed:
    layer = dense_layer(made.subject)
    if layer is None:
        return {}
    O, I = made.subject.model.config.linear_layers()[layer]  # noqa: E741
    order = np.arange(O * I).reshape(O, I).T.ravel()
    out = {}
    for kind in ("ggn", "fisher", "hessian", "f_tok"):
        name = f"exact.{layer}.{kind}"
        out[name] = made.arrays[name][np.ix_(order, order)]
    return out


def _joint_columns(made: Truth) -> Changed:
    """Column v of the root is sent back from all positions at once, for each v."""
    config, one = made.subject.model.config, made.seen
    parameters, problem = resident(made.subject.model, np.float64), exact.problem
    loss = problem(made.subject.model, made.subject.corpus).loss
    out: dict[str, Array] = {}
    for v in range(config.vocabulary):
        unit = np.zeros(config.vocabulary)
        unit[v] = 1

        def column(z: Array, unit: Array = unit) -> Array:
            return loss.root(z, np.tile(unit, (len(z), 1)))

        there = flow(config, parameters, one, column)
        for name in made.subject.layers:
            keep, key = made.arrays[f"rows.{name}.kept"] != 0, f"expected.{name}.sum_G"
            out[key] = out.get(key, 0.0) + gram(there.taps[name].g, keep)
    return out


NETWORK = (
    Bug("B18", "LABELS", "columns of the root sent back from all positions at once",
        "forward", _joint_columns),
    Bug("B22", "LABELS", "labels are shifted twice", "forward", _shifted(1)),
    Bug("B23", "LABELS", "labels are not shifted: a position predicts itself",
        "forward", _shifted(-1)),
    Bug("B50", "MASKING", "attention sees what comes later", "forward", _network(_acausal)),
    Bug("B50-packed", "MASKING", "documents of one row see one another", "forward", _no_segments),
    Bug("B50-window", "MASKING", "the attention window is ignored",
        "forward", _network(_no_window)),
    Bug("B51", "LAYOUT", "rotary pairs are (2j, 2j + 1), not (j, j + E/2)",
        "forward", _network(_interleaved)),
    Bug("B52", "LAYOUT", "query head h reads key-value head h mod K", "forward", _network(_tiled)),
    Bug("B53", "PRECISION", "another eps in the norms", "forward", _network(_other_eps)),
    Bug("B53-gain", "LAYOUT", "1 + gain where the file holds the gain, or the reverse",
        "forward", _network(_offset_gain)),
    Bug("B54", "LAYOUT", "another activation: tanh for erf, GELU for SiLU",
        "forward", _network(_other_activation)),
    Bug("B54-cap", "LAYOUT", "the soft-caps are left out", "forward", _network(_no_cap)),
    Bug("B57", "PRECISION", "the weights went through bfloat16",
        "forward", _network(_short_weights)),
    Bug("B78", "LAYOUT", "the dense blocks are those of the columns of W end to end",
        "forward", _column_major),
)  # fmt: skip
"""Bugs that only a forward pass shows."""
