"""How far rounding takes this network: its passes run in the short float that theirs declares.

A budget holds for any network, and allows much for rows that may err most. What this network's own
rounding does is known where it can be run, and is often a tenth of that. So hypotheses are told
apart that all lie within the budget. A verdict passes by the budget alone. Only where an activation
has a kink the budget is not less than what rounding does here: it takes numbers across the kink, in
proportion to u itself, and changes all of a gradient there.
"""

from __future__ import annotations

from dataclasses import replace

from refcurv.algebra.scaling import norm
from refcurv.judge.case import Case
from refcurv.judge.compare import who_draws
from refcurv.judge.diagnosis.ladders import DECLARED, Ladder
from refcurv.judge.diagnosis.variants import REFERENCE, Setting, inputs, moments
from refcurv.judge.diagnosis.work import extent, few_positions, is_large
from refcurv.law.checks import Array
from refcurv.model.config import Activation

ORDER = 6.0
"""How many times further off theirs may be than ours in the same dtype.  Chosen: honest programs
that round in another order were 0.4 to 2.9 times as far, over 11 models."""


def sharpened(case: Case, layer: str, side: str, steps: Ladder) -> Ladder:
    """The ladder with a first step of what this network's rounding explains, where that is less.

    Definition
        ORDER |X' − X| / |X|, X' ours in their dtype, and the budget of everything else.

    Proof: tests/test_judge_simulated.py::test_a_run_in_their_dtype_sharpens_the_budget
    """
    far = case.once("simulated", lambda: _simulated(case)).get((layer, side))
    if far is None:
        return steps
    finest, budget = steps.steps[0]
    long = replace(case, arithmetic=replace(case.arithmetic, model="float32"))
    sharp = ORDER * far + long.budget(layer, finest, side)
    if sharp >= budget:
        return steps
    return replace(steps, steps=((finest, sharp), (DECLARED, budget), *steps.steps[1:]))


def know_kinks(case: Case) -> None:
    """Let the budgets of a model whose activation has a kink count what crosses it.

    Definition: ORDER |X' − X| / |X| at least, X' ours in the short float that theirs declares.
    Proof: tests/test_judge_simulated.py::test_budgets_count_what_rounding_takes_across_a_kink
    """
    config = None if case.model is None else case.model.config
    if config is None or not (config.activation is Activation.RELU or config.qkv_clip is not None):
        return
    found = case.once("simulated", lambda: _simulated(case))
    known = {key: ORDER * far for key, far in found.items()}
    case.once(("kinks", case.arithmetic.model), lambda: known)


def _simulated(case: Case) -> dict[tuple[str, str], float]:
    """(layer, side) → |X' − X| / |X|; of G where its labels are known. Empty where it is not run.

    Both of the same sequences, which are a sample of a large corpus.
    """
    dtype = case.arithmetic.model
    if dtype not in ("bfloat16", "float16") or case.model is None or case.corpus is None:
        return {}
    if is_large(case):
        return {}
    short, limit = Setting(network=((f"all in {dtype}", 0.0),)), few_positions(case)
    wanted = [short] if extent(case) <= limit else [short, REFERENCE]
    made = _made(case, wanted, limit)
    out = {}
    for (layer, side), Y in made.get(short, {}).items():
        X = made.get(REFERENCE, {}).get((layer, side))
        X = case.means(layer)["AG".index(side)] if X is None else X
        if Y.shape == X.shape and X.any():
            out[layer, side] = float(norm(Y - X) / norm(X))
    return out


def _made(
    case: Case, wanted: list[Setting], limit: int
) -> dict[Setting, dict[tuple[str, str], Array]]:
    """Each setting's A, and G where its labels are known, by layer and side."""
    layers = list(case.matched)
    if any(who_draws(case)):
        alone = inputs(case, wanted, layers, limit)
        return {one: {(x, "A"): A for x, (A, _) in of.items()} for one, of in alone}
    both = moments(case, wanted, layers, limit)
    return {
        one: {(x, side): getattr(m, side) for x, m in of.items() for side in "AG"}
        for one, of in both
    }
