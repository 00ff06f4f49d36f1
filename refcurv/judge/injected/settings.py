"""Faults of labels, rows, sums, tensors and arithmetic: A and G made anew by a `Setting`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from refcurv.judge.diagnosis.variants import Setting
from refcurv.judge.diagnosis.variants.networks import CHANGES
from refcurv.judge.diagnosis.variants.positions import Positions, positions
from refcurv.judge.injected.injection import Choose, Injection
from refcurv.judge.injected.truth import Truth
from refcurv.model.config import Activation, NormPlace


def _made(
    id: str,
    what: str,
    at: str = "",
    only: tuple[str, ...] = (),
    drawn: bool = False,
    **fields: Any,
) -> Injection:
    """One that is the same in every model; `at`: a kind of positions that the corpus must have."""
    setting = Setting(**fields)

    def choose(truth: Truth) -> Setting | None:
        return setting if not at or _positions(truth).kinds[at].any() else None

    return Injection(id, what, "corpus", choose, only, drawn)


def _positions(truth: Truth) -> Positions:
    assert truth.model is not None and truth.corpus is not None
    return positions(truth.corpus, truth.model.config, truth.factors.rows)


def _where(id: str, what: str, choose: Choose) -> Injection:
    """One that depends on the model."""
    return Injection(id, what, "corpus", choose)


def _network(*names: str, level: Callable[[Truth], float] = lambda _: 0.0) -> Choose:
    """Those of these changes of the arithmetic that can occur."""

    def choose(truth: Truth) -> Setting | None:
        assert truth.model is not None
        config, at = truth.model.config, _positions(truth)
        some = tuple((name, level(truth)) for name in names if CHANGES[name].where(config, at))
        return Setting(network=some) if some else None

    return choose


def _other_eps(truth: Truth) -> float:
    assert truth.model is not None
    return 10 * truth.model.config.norm_eps + 1e-4


OTHER: Final = {
    Activation.GELU: Activation.GELU_TANH,
    Activation.GELU_TANH: Activation.GELU,
    Activation.SILU: Activation.GELU,
    Activation.RELU: Activation.GELU,
}
"""The activation that each is taken for."""


def _other_activation(truth: Truth) -> Setting:
    assert truth.model is not None
    return Setting(network=((f"activation {OTHER[truth.model.config.activation]}", 0.0),))


def _before_norm(truth: Truth) -> Setting | None:
    assert truth.model is not None
    post = truth.model.config.norm_place is NormPlace.POST
    return None if post else Setting(tensor_A="norm's input")


LABELS: Final = (
    _made("B15", "the corpus's labels where labels should be drawn", drawn=True,
          labels="empirical"),
    _made("B16", "the likeliest labels where labels should be drawn", labels="argmax"),
    _made("B17", "one drawn number for all positions of a sequence", drawn=True,
          labels="one uniform"),
    _made("B18", "columns of the root sent back from all positions at once", labels="joint"),
    _made("B19", "labels are drawn at padding too", "pads", drawn=True, where="pads", pads="real"),
    _made("B19-prompts", "labels are drawn in prompts too", "prompts", drawn=True,
          where="prompts"),
    _made("B21", "labels are drawn at a temperature of 0.6", drawn=True,
          labels="tempered", amount=0.6),
    _made("B21-nucleus", "labels are drawn from the likeliest 0.85", drawn=True,
          labels="nucleus", amount=0.85),
    _made("B22", "labels are shifted twice", labels="double shift"),
    _made("B23", "labels are not shifted: a position predicts itself", labels="no shift"),
    _made("B24", "prompts have labels, which the loss was to ignore", "prompts",
          where="ignored prompts"),
    _made("B25", "the token that pads, and ends texts, is taken for padding", "eos",
          where="without eos", rows_A="without eos", rows_G="without eos"),
    _made("B26", "labels are smoothed by 0.15", smoothing=0.15),
    _where("B26-cap", "the backward leaves out the soft-cap of logits",
           _network("no soft-cap in the backward")),
)  # fmt: skip

ROWS: Final = (
    _made("B4", "rows are counted as sequences", count="sequences"),
    _made("B20", "rows without a label are dropped", "prompts",
          rows_A="without prompts", rows_G="without prompts"),
    _made("B27", "the last position, which has no label, is a row", "last",
          rows_A="with last", rows_G="with last"),
    _made("B28", "padding is a row", "pads",
          rows_A="with pads", rows_G="with pads", pads="real"),
    _made("B29", "the mask is left out where shapes differ, and n is not", "pads",
          (".o", ".down"), rows_A="with pads", count="reference", pads="real"),
    _made("B49", "the first token is missing", rows_A="without first", rows_G="without first"),
    _made("B49-double", "there are two first tokens", rows_A="first twice", rows_G="first twice"),
    _made("B36", "positions are summed before the square", pooling_A="sum", pooling_G="sum"),
    _made("B36-mean", "positions are averaged in a, and summed in g, before the square",
          pooling_A="mean", pooling_G="sum"),
    _made("B44", "g is averaged over two sequences before the square",
          pooling_G="batch", batch=2),
    _made("B45", "A is centred: a covariance", pooling_A="centred"),
    _made("B34", "A of the MLP's output", tensor_A="mlp's output"),
    _where("B34-norm", "A of what the norm reads", _before_norm),
    _made("B35", "g of the layer's input", tensor_G="input"),
    _made("B35-activation", "g behind the activation", only=(".gate", ".up"),
          tensor_G="activation"),
    _made("B42", "the activation overwrites what the hook received", only=(".gate", ".up"),
          tensor_G="activation"),
)  # fmt: skip

NETWORK: Final = (
    _where("B50", "attention sees what comes later", _network("no causal mask")),
    _where("B50-packed", "documents of one row see one another",
           _network("documents see each other")),
    _where("B50-window", "the attention window is ignored", _network("no windows")),
    _where("B51", "rotary pairs are (2j, 2j + 1), not (j, j + E/2)",
           _network("rotary pairs interleaved")),
    _where("B51-base", "the base of rotary frequencies is three times as large",
           _network("rotary base times", level=lambda _: 3.0)),
    _where("B51-shift", "learned positions start from 1",
           _network("positions shifted", level=lambda _: 1.0)),
    _where("B52", "query head h reads key-value head h mod K", _network("grouped heads tiled")),
    _where("B53", "another eps in the norms", _network("eps", level=_other_eps)),
    _where("B53-outside", "eps is added to the root", _network("eps outside the root")),
    _where("B53-gain", "1 + gain where the file holds the gain, or the reverse",
           _network("gain and gain − 1")),
    _where("B54", "another activation: tanh for erf, GELU for SiLU", _other_activation),
    _where("B54-cap", "the soft-cap of scores is left out", _network("no soft-cap of scores")),
    _where("B57", "the weights went through bfloat16", _network("weights as bfloat16")),
)  # fmt: skip
