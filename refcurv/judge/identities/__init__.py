"""The identities that hold on any model, as checks: each measures its error and derives its budget.

The ids are those of the oracles (O) and of the method's statements (P). An error is relative to
the size of the terms that the identity sums, never to a result that may vanish: the magnitudes of
the products where both sides are made of what was written down, and where two passes are compared
what roundings anywhere in a pass can do (`judge.roundings`). A check yields one `Measure` for each
place where it looked, or none where its subject does not occur in the model.
"""

from collections.abc import Mapping
from types import MappingProxyType

from refcurv.judge.identities.curvature import (
    ggn_is_the_expected_fisher,
    gradient_by_complex_step,
    hessian_is_ggn_plus_residual,
    hessian_is_symmetric_and_linear,
    kl_is_the_quadratic_form,
    last_block_has_no_cross_terms,
    scale_invariance,
)
from refcurv.judge.identities.factors import (
    bases_recompose,
    edits_project,
    factors_add,
    factors_are_second_moments,
    factors_are_the_sums,
    predicted_damage,
)
from refcurv.judge.identities.flow import (
    causality,
    fast_is_the_definition,
    first_queries,
    gated_slopes,
    grouped_queries,
    head_slopes_by_label,
    head_slopes_sum_to_zero,
    last_layer_in_closed_form,
    norm_defect,
    packing,
    padding,
    rotary_rows,
    rotated_key_slopes,
    shared_inputs,
    unreached_positions,
    weight_slopes,
)
from refcurv.judge.identities.measures import Check, Measure

__all__ = ["CHECKS", "Check", "Measure"]

CHECKS: Mapping[str, Check] = MappingProxyType(
    {
        "R6": fast_is_the_definition,
        "O8": last_layer_in_closed_form,
        "O9": hessian_is_ggn_plus_residual,
        "O11": ggn_is_the_expected_fisher,
        "O14": hessian_is_symmetric_and_linear,
        "O15": gradient_by_complex_step,
        "O16": head_slopes_sum_to_zero,
        "O17": kl_is_the_quadratic_form,
        "O18": factors_are_the_sums,
        "O26": factors_are_second_moments,
        "O29": weight_slopes,
        "O30": unreached_positions,
        "O31": first_queries,
        "O32": rotated_key_slopes,
        "O33": grouped_queries,
        "O34": norm_defect,
        "O35": scale_invariance,
        "O36": gated_slopes,
        "O37": shared_inputs,
        "O38": last_block_has_no_cross_terms,
        "O39": causality,
        "O41": head_slopes_by_label,
        "O42": factors_add,
        "O51": padding,
        "O52": packing,
        "O54": edits_project,
        "O61": predicted_damage,
        "P4": bases_recompose,
        "B51": rotary_rows,
    }
)
"""Every check by its id: oracles, statements of the method, the house's rule R6, and a bug, B51."""
