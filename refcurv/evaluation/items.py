"""What a model does item by item. The values of `rc.evaluate` are means of these.

They show what a mean hides: facts by frequency, the damage that an edit does to each item
(suffix_nats after minus before), and whether the damage tells memorised items from others (auc).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from refcurv.evaluation.classify import classify, image_batches, require_image_population
from refcurv.evaluation.decode import (
    at_scored,
    batches,
    by_item,
    decode_population,
    require_population,
    suffixes,
)
from refcurv.evaluation.held import held
from refcurv.evaluation.metrics import edit_distances, exact_match
from refcurv.law.checks import (
    Array,
    ConventionError,
    DTypeError,
    EmptyError,
    ShapeError,
    overflow_hint,
    require_finite,
)
from refcurv.model.corpus import ImagePopulation, Population
from refcurv.model.loss import cross_entropy
from refcurv.model.weights import Model
from refcurv.progress import Progress, counter, silent


def hits(
    model: Model,
    population: Population | ImagePopulation,
    *,
    progress: Progress = silent,
) -> Array:
    """Which items the model gets right.

    Definition
        answer, recite: every token of the greedy continuation is the true one (strict).
        label, of images: the likeliest class, the lowest id on ties, is the label.

    Args:
        model: computes in its `dtype`.
        population: of kind `answer`, `recite` or `label`.
        progress: called with (batches done, batches).

    Returns:
        (N,) bool, in the population's order; its mean is `rc.evaluate`'s accuracy or strict.

    Raises:
        ConventionError: a population of kind `text`, which is not decoded; tokens for a model of
            images or the reverse; a bidirectional model of tokens.
        RangeError: a token or label outside the vocabulary, or more positions than were learned.
        ShapeError: images of another size than the model's.
        NonFiniteError: a logit is NaN or infinite.

    Cost: one forward pass over the population.
    Source: METHOD, Recitation; METHOD, Task accuracy.
    Proof:  tests/test_items.py::test_by_hand; ::test_the_whole_chain_by_another_route;
            tests/test_items.py::test_images_by_hand
    """
    if isinstance(population, ImagePopulation):
        require_image_population("hits", population.kind, population, model.config)
        total = len(image_batches(model.config, population))
        progress(0, total)
        done = counter(progress, total)
        said = classify(model.config, held("hits", model, [population]), population, done)
        return np.asarray(said == population.labels)
    require_decoded("hits", model, population)
    return exact_match(decoded_rows(model, population, progress), suffixes(population))


def distances(model: Model, population: Population, *, progress: Progress = silent) -> Array:
    """How far each greedy continuation is from the true one, as a share of its length.

    Definition
        d/L, d the Levenshtein distance over token ids, L the suffix's length

    Args:
        model: computes in its `dtype`.
        population: of kind `recite` or `answer`.
        progress: called with (batches done, batches).

    Returns:
        (N,) float64 in [0, 1], in the population's order; the mean is `rc.evaluate`'s distance.

    Raises:
        ConventionError, RangeError, NonFiniteError: as `hits`; images have no distance.

    Cost: one forward pass over the population.
    Source: METHOD, Recitation.
    Proof:  tests/test_items.py::test_by_hand; ::test_the_whole_chain_by_another_route
    """
    require_decoded("distances", model, population)
    decoded = decoded_rows(model, population, progress)
    return np.array([d / L for d, L in edit_distances(decoded, suffixes(population))])


def suffix_nats(model: Model, population: Population, *, progress: Progress = silent) -> Array:
    """The nats of each item's true tokens behind the prompt, when the true ones before are given.

    Definition
        nats_n = Σ_t −log p(token t | tokens before t)      t = prompt_length .. length − 1

    Args:
        model: computes in its `dtype`; the sums are float64.
        population: of any kind of tokens.
        progress: called with (batches done, batches).

    Returns:
        (N,) float64 [nats], each summed over length − prompt_length tokens; 0 if there are none.

    Raises:
        ConventionError, RangeError: as `hits`; images have no suffix.
        NonFiniteError: a logit is NaN or infinite.

    Cost: one forward pass over the population's tokens; logits of HEAD_ROWS positions per thread.
    Source: METHOD, Perplexity; METHOD, Later work.
    Proof:  tests/test_items.py::test_suffix_nats_is_the_naive_loop;
            tests/test_items.py::test_the_whole_chain_by_another_route
    """
    _require_tokens("suffix_nats", population)
    require_population("suffix_nats", population.kind, population, model.config)

    def take(logit_NV: Array, label_N: Array) -> Array:
        require_finite("suffix_nats", "the logits", logit_NV, overflow_hint(logit_NV.dtype))
        return cross_entropy(logit_NV, label_N)[0].astype(np.float64)

    parts = batches(population)
    progress(0, len(parts))
    done = counter(progress, len(parts))
    found = at_scored(
        model.config, held("suffix_nats", model, [population]), population, take, done
    )
    return by_item(population, np.concatenate([np.empty(0), *found]))


def auc(positive: ArrayLike, negative: ArrayLike) -> float:
    """How well a score tells two groups apart: the area under the ROC curve.

    Definition
        mean over all pairs (p, n) of [p > n] + ½ [p = n]

    Args:
        positive: (P,) scores of those that should be high, P >= 1; infinite ones are allowed.
        negative: (N,) scores of the others, N >= 1.

    Returns:
        A number in [0, 1]; 0.5 where the score tells nothing.

    Raises:
        EmptyError: a group without scores.
        ShapeError: a group that is not one score per item.
        DTypeError: scores that are not real numbers.
        NonFiniteError: a score is NaN, which has no place in an order.

    Cost: O((P + N) log (P + N)).
    Source: Mann & Whitney 1947: AUC = U / (P N), U from the ranks, ties at their mean rank.
    Proof:  tests/test_items.py::test_auc_is_the_mean_over_pairs
    """
    p, n = (_scores(what, x) for what, x in (("positive", positive), ("negative", negative)))
    from scipy.stats import rankdata  # half a second, which who reads no ranks is spared

    rank = rankdata(np.concatenate([p, n]))
    # Ranks are halves of integers. So these sums are exact, in any order of the scores.
    # Σ ranks of p = |p|(|p| + 1)/2, their ranks among themselves, + the pairs in which p is above.
    above = rank[: len(p)].sum() - len(p) * (len(p) + 1) / 2
    return float(above / (len(p) * len(n)))


def _scores(what: str, x: ArrayLike) -> Array:
    array = np.asarray(x)
    if array.dtype.kind not in "biuf":
        raise DTypeError(f"auc: {what} must hold real numbers; got {array.dtype}.")
    if array.ndim != 1:
        raise ShapeError(f"auc: {what} must be (N,), one score an item; got {array.shape}.")
    if not array.size:
        raise EmptyError(f"auc: {what} has no scores; there is nothing to tell apart.")
    if array.dtype.kind == "f":
        require_finite("auc", what, np.where(np.isinf(array), 0, array))
    return array


# ------------------------------------------------------------------ shared with `perturb`


def decoded_rows(model: Model, population: Population, progress: Progress) -> list[Array]:
    """Every row's greedy continuation, as `decode_population`."""
    total = len(batches(population))
    progress(0, total)
    done = counter(progress, total)
    return decode_population(model.config, held("decode", model, [population]), population, done)


def require_decoded(who: str, model: Model, population: Population) -> None:
    """Refuse a population that cannot be decoded: images, text, tokens the model cannot read."""
    _require_tokens(who, population)
    if population.kind == "text":
        raise ConventionError(
            f"{who}: a population of kind 'text' is not decoded; take suffix_nats."
        )
    require_population(who, population.kind, population, model.config)


def _require_tokens(who: str, population: Population) -> None:
    if not isinstance(population, Population):
        what = "images" if isinstance(population, ImagePopulation) else type(population).__name__
        raise ConventionError(f"{who}: needs a Population of tokens; got {what}.")
