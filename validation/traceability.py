"""Which function computes each statement, which tests prove it, and what they last measured.

What each id states is in validation/METHOD.md.

    python -m pytest -n 0 --measured=validation/measured.json    the errors, anew
    refcurv audit refcurv/demo/{model,corpus}.h5 --memory 4 --certify --seconds 300
        --json validation/demo.json
    python -m validation.traceability                            validation/AUDIT.md, anew

`ROWS` is written by hand. A test named test_O31_... belongs to O31 without being listed. The test
tests/test_traceability.py fails when a function or test does not exist, when an id is missing,
when a row that is not marked as unbuilt has no function or no test, and when AUDIT.md is stale.
"""

from __future__ import annotations

import ast
import importlib
import json
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from validation import method

ROOT = Path(__file__).parents[1]
PAGE, MEASURED, DEMO = (
    ROOT / "validation" / name for name in ("AUDIT.md", "measured.json", "demo.json")
)


@dataclass(frozen=True)
class Row:
    """An id, the functions under `refcurv.`, further tests, what is not built."""

    id: str
    functions: tuple[str, ...] = ()
    tests: tuple[str, ...] = ()
    waits: str = ""


def _row(id: str, functions: str = "", tests: str = "", waits: str = "") -> Row:
    return Row(id, tuple(functions.split()), tuple(tests.split()), waits)


ESTIMATORS = "the estimators FOOF, TKFAC, Shampoo"

EXACT, LAYERS, ESTIMATED = "curvature.exact.", "model.layers.", "curvature.estimators."
CASES, IDENTITIES = "test_exact_cases.py::", "test_identities.py::"
PEERS = "test_peers.py::test_logits_loss_gradients_and_factors"
CURVED_PEERS = "test_peers_curvature.py::test_exact_curvature_is_torchs"
REDUCE = "test_estimators.py::test_reduce_equals_its_dense_definition"
EKFAC = "test_estimators.py::test_lambda_equals_its_dense_definition"
NAIVE = "test_exact.py::test_F_F_tok_and_K_equal_the_naive_sums"

ROWS = (
    _row("P1", "curvature.factors.collect " + EXACT +
         "moments", f"test_factors.py::test_factors_equal_the_naive_sums {PEERS} "
         "test_exact.py::test_moments_are_collected"),
    _row("P2", "algebra.kron.kron_dense " + EXACT +
         "kfac", f"{NAIVE} {CASES}test_O1_one_datum_makes_kfac_exact"),
    _row("P3", f"model.sampling.draw_labels {EXACT}fisher {EXACT}ggn",
         "test_loss.py::test_labels_are_drawn_by_the_law "
         f"test_exact.py::test_O11_ggn_is_the_expected_fisher {CURVED_PEERS}"),
    _row("P4", "curvature.bases.decompose",
         "test_eigenbasis.py::test_reconstruction_orthogonality_and_order"),
    _row("P5", "editing.projection.project",
         "test_projection.py::test_O54_edit_is_an_orthogonal_projection"),
    _row("P6", "algebra.staircase.cut",
         "test_staircase.py::test_O58_coverage_and_minimality"),
    _row("P7", "algebra.staircase.cut",
         "test_staircase.py::test_cut_equals_brute_force"),
    _row("P8", "editing.kfac.edit",
         "test_projection.py::test_edit_of_a_model"),
    _row("P9", "evaluation.bands.bands",
         "test_bands.py::test_norms_are_the_definition"),
    _row("P10", "editing.svd.truncate editing.svd.singular_bases",
         "test_svd.py::test_the_cut_equals_brute_force "
         "test_svd.py::test_bands_over_right_singular_vectors"),
    _row("P11", "editing.bsn.train_scores editing.bsn.prune",
         "test_bsn.py::test_the_gradient_is_the_complex_step_of_a_soft_mask "
         "test_bsn.py::test_the_training_is_the_recipe_in_loops"),
    _row("O1", EXACT + "kfac"),
    _row("O2", EXACT + "kfac"),
    _row("O3", f"{EXACT}kfac {ESTIMATED}reduced"),
    _row("O4", ESTIMATED + "reduced", REDUCE),
    _row("O5", f"{LAYERS}unfold curvature.factors.collect {ESTIMATED}reduced"),
    _row("O6", EXACT + "f_tok"),
    _row("O7", f"{EXACT}moments {ESTIMATED}reduced"),
    _row("O8", EXACT + "fisher"),
    _row("O9", EXACT + "operator"),
    _row("O10", EXACT + "hessian"),
    _row("O11", f"{EXACT}ggn {EXACT}fisher model.loss.root_product model.loss.hessian_product",
         CURVED_PEERS),
    _row("O12", "curvature.factors.collect"),
    _row("O13", "curvature.factors.collect "
         + EXACT + "moments"),
    _row("O14", EXACT + "hvp"),
    _row("O15", f"{EXACT}derivative "
         "model.gradient.loss_and_gradient",
         "test_transformer.py::test_gradient_of_every_parameter_equals_complex_step "
         "test_exact.py::test_the_step_is_never_seen"),
    _row("O16", "model.loss.cross_entropy"),
    _row("O17", EXACT + "ggnvp"),
    _row("O18", f"{EXACT}f_tok {EXACT}kfac"),
    _row("O19", f"{EXACT}f_tok {ESTIMATED}ekfac",
         "test_exact.py::test_O18_O19_traces_and_marginals_of_F_tok",
         "as the factors of TKFAC and Shampoo: " + ESTIMATORS),
    _row("O20", EXACT + "moments"),
    _row("O21", ESTIMATED + "ekfac", EKFAC),
    _row("O22", ESTIMATED + "ekfac", EKFAC),
    _row("O23", ESTIMATED + "diagonal", EKFAC),
    _row("O24", "curvature.distance.compare"),
    _row("O25", f"{EXACT}moments {EXACT}fisher",
         "test_exact.py::test_O20_O25_O26_traces_ranks_and_signs"),
    _row("O26", "curvature.eigenbasis.eigenbasis",
         "test_exact.py::test_O20_O25_O26_traces_ranks_and_signs "
         "test_eigenbasis.py::"
         "test_float32_products_push_null_eigenvalues_below_zero_within_budget"),
    _row("O27", EXACT + "moments"),
    _row("O28", waits=ESTIMATORS),
    _row("O29", "model.gradient.loss_and_gradient"),
    _row("O30", "model.rows.reached"),
    _row("O31", LAYERS + "attention_backward"),
    _row("O32", LAYERS + "attention_backward"),
    _row("O33", LAYERS + "attention_backward"),
    _row("O34", LAYERS + "rms_norm_backward"),
    _row("O35", f"{EXACT}ggnvp {EXACT}hvp"),
    _row("O36", LAYERS + "mlp_backward"),
    _row("O37", "curvature.factors.collect"),
    _row("O38", f"{EXACT}f_tok"),
    _row("O39", "model.transformer.forward"),
    _row("O40", "model.sampling.draw_labels"),
    _row("O41", "model.loss.cross_entropy"),
    _row("O42", "curvature.factors.collect"),
    _row("O43", "model.transformer.backward"),
    _row("O44", "model.transformer.backward"),
    _row("O45", "curvature.factors.collect editing.kfac.edit",
         "test_projection.py::test_rotated_inputs_leave_the_edited_function_unchanged"),
    _row("O46", "curvature.factors.collect"),
    _row("O47", "curvature.factors.collect curvature.bases.decompose editing.kfac.edit"),
    _row("O48", EXACT + "fisher curvature.factors.collect"),
    _row("O49", EXACT + "fisher curvature.blocks.collect_blocks"),
    _row("O50", EXACT + "fisher"),
    _row("O51", "curvature.factors.collect " + EXACT + "problem"),
    _row("O52", f"{LAYERS}causal_layout {EXACT}fisher curvature.blocks.collect_blocks"),
    _row("O53", "model.sampling.uniforms"),
    _row("O54", "editing.projection.project"),
    _row("O55", "algebra.staircase.cut"),
    _row("O56", "editing.kfac.edit"),
    _row("O57", "algebra.staircase.cut"),
    _row("O58", "algebra.staircase.cut"),
    _row("O59", "algebra.staircase.cut"),
    _row("O60", "editing.projection.project"),
    _row("O61", "editing.projection.project"),
    _row("O62", "algebra.staircase.cut"),
    _row("O63", "curvature.eigenbasis.eigenbasis"),
    _row("O64", "editing.kfac.edit"),
    _row("O65", "editing.kfac.edit"),
    _row("O66", "evaluation.metrics.perplexity evaluation.metrics.ndcg"),
)  # fmt: skip


PROVED = "test_proofs.py::test_every_identity_is_proved"
OTHER_BITS = "test_cases_certified.py::test_balls_of_other_bits_agree"
ANEW = "test_cases_certified.py::test_every_certified_case_holds"
CUTS = "test_certified_cuts.py::test_"
ANGLES = "test_eigen_enclosures.py::test_subspaces_lie_within_their_angles"

SMALL = "test_certified_identities.py::test_"

CERTIFIED = {
    "P6": (f"{SMALL}O62_the_mass_is_the_product_of_traces_and_no_rectangle_is_smaller",),
    "P1": ("test_certified.py::test_factors_are_those_of_the_definition", OTHER_BITS),
    "P3": (OTHER_BITS,),
    "P4": ("test_eigen_enclosures.py::test_eigenvalues_lie_in_their_balls", ANGLES, ANEW,
           PROVED),
    "P5": (ANEW,),
    "P7": (f"{CUTS}the_cut_of_fractions_is_proved", ANEW),
    "P8": (f"{CUTS}the_edit_of_fractions_lies_in_its_balls", ANEW),
    "O11": (OTHER_BITS,),
    "O14": ("test_certified.py::test_products_are_those_of_exact", PROVED),
    "O15": ("test_certified.py::test_gradients_of_the_loops_lie_in_the_balls", PROVED),
    "O54": (ANEW,),
    "O55": ("test_cases_certified.py::test_a_larger_share_keeps_more",),
    "O56": (f"{CUTS}nothing_and_everything",),
    "O57": (ANEW,),
    "O58": (ANEW,),
    "O63": (ANGLES, "test_eigen_enclosures.py::test_a_false_angle_is_caught"),
} | {
    id: (PROVED,)
    for id in ("O8", "O9", "O16", "O18", "O29", "O30", "O31", "O32", "O33", "O34", "O35", "O36",
               "O37", "O38", "O39", "O41", "O51", "O52")
}  # fmt: skip
"""Rows whose numbers, or both of whose sides, ball arithmetic encloses, and the tests of that.
Tests of `ENCLOSED` that are named after a row's id belong to it without being listed."""

ENCLOSED = ("test_certified_identities.py", "test_certified_blocks.py")

NETS = "of nets that are no transformer, which `certify` runs"
STATISTICAL = "statistical: it holds up to a standard error"
FLOATS = "about the rounding of floats, and not about real numbers"
MEASURE = "a definition of what is measured, and no identity"

NOT_CERTIFIED = {
    "P2": "an approximation; where it is exact: O1, O6",
    "P9": MEASURE,
    "P10": "its cut is of singular values, which are not enclosed",
    "P11": "a training in floats",
    "O2": NETS, "O3": NETS, "O4": NETS, "O5": NETS, "O6": "of rows that are made by hand",
    "O7": NETS,
    "O12": STATISTICAL,
    "O13": "a mean over 2^n patterns of signs: too many passes over balls",
    "O17": "a limit of small steps; what it tends to is GGN v, see O9",
    "O28": "not built",
    "O50": "no model here has a temperature",
    "O53": "about drawn labels, and SAMPLING is a law about floats",
    "O64": "no arithmetic: each edit writes a weight of its own",
    "O65": FLOATS,
    "O66": MEASURE,
}  # fmt: skip
"""Why ball arithmetic proves nothing of the other rows."""


def certified_by(row: Row) -> tuple[str, ...]:
    """The tests that enclose both sides of a row."""
    named = (t for t in tests_of(row) if t.partition("::")[0] in ENCLOSED)
    return tuple(dict.fromkeys((*CERTIFIED.get(row.id, ()), *named)))


def certificates(row: Row, demo: dict[str, dict[str, Any]]) -> str:
    """The tests that prove digits of a row, and how many are proved on the demo model."""
    found = [f"`{test}`" for test in certified_by(row)]
    proved = demo.get(row.id, {})
    if proved.get("verdict") == "proved":
        digits = proved["digits"]
        found.append(f"demo: {digits if isinstance(digits, str) else f'{int(digits)} digits'}")
    return "<br>".join(found) or f"not certified: {NOT_CERTIFIED[row.id]}"


def tests_of(row: Row) -> list[str]:
    """The tests named after the row's id, and those listed, as file::name; no test twice."""
    number = row.id.removeprefix("O")
    named = [
        test
        for test in all_tests()
        if row.id[0] == "O" and re.search(rf"::test_(O\d+_)*O{number}_", test)
    ]
    return list(dict.fromkeys([*named, *row.tests]))


@cache
def all_tests() -> tuple[str, ...]:
    """Every test function of tests/, as file::name, the file as `tests/` knows it."""
    folder = ROOT / "tests"
    return tuple(
        f"{path.relative_to(folder).as_posix()}::{node.name}"
        for path in sorted(folder.rglob("test_*.py"))
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    )


def function(name: str) -> Any:
    """The function under `refcurv.`; AttributeError or ModuleNotFoundError if there is none."""
    module, _, attribute = name.rpartition(".")
    return getattr(importlib.import_module(f"refcurv.{module}"), attribute)


def built(row: Row) -> bool:
    """Is there anything of it yet?"""
    return bool(row.functions)


def page() -> str:
    """AUDIT.md."""
    measured = json.loads(MEASURED.read_text(encoding="utf-8"))
    statements = dict(method.statements(method.PAGE.read_text(encoding="utf-8")))
    told = json.loads(DEMO.read_text(encoding="utf-8"))
    demo, proved = ({f["id"]: f for f in one["findings"]} for one in (told, told["proofs"]))
    lines = [
        "# What is proved, by what",
        "",
        "Generated by `python -m validation.traceability` from the table in that file, the names",
        "of the tests, and the errors that",
        "`python -m pytest -n 0 --measured=validation/measured.json` wrote down. Do not edit.",
        "",
        "The column before the last names the tests that enclose the row's numbers by ball",
        "arithmetic, and says how many digits `refcurv audit --certify` proves on the demo model;",
        "a row without either is *not certified*, and says why. The last column is the error",
        "that came nearest to its budget in any of the row's tests, relative to the size of the",
        "terms summed, and that budget; *holds* where the tests compare bits, ranks or",
        "inequalities; below it, what `refcurv audit` measures on the demo model",
        "(validation/demo.json). The statements are those of METHOD.md.",
        "",
        "| id | statement | computed by `refcurv.` | proved by `tests/` | certified "
        "| error / budget |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row in ROWS:
        functions = "<br>".join(f"`{name}`" for name in row.functions)
        tests = "<br>".join(f"`{test}`" for test in tests_of(row))
        waits = f"<br>not built yet: {row.waits}" if row.waits else ""
        error = _error(row, measured) if built(row) else ""
        if (found := demo.get(row.id)) and found["error"] is not None:
            error += f"<br>demo: {found['error']:.1e} / {found['budget']:.1e}"
        statement = statements[row.id] + waits
        sure = certificates(row, proved)
        lines.append(f"| {row.id} | {statement} | {functions} | {tests} | {sure} | {error} |")
    waiting = [row.id for row in ROWS if not built(row)]
    certified = sum(bool(certified_by(row)) for row in ROWS)
    lines += ["", f"{len(ROWS) - len(waiting)} of {len(ROWS)} have a proof; not built yet: "
              f"{', '.join(waiting)}. {certified} are certified.",
              ""]  # fmt: skip
    return "\n".join(lines)


def _error(row: Row, measured: dict[str, list[float]]) -> str:
    pairs = [measured[f"tests/{test}"] for test in tests_of(row) if f"tests/{test}" in measured]
    if not pairs:
        return "holds"
    error, budget = max(pairs, key=lambda pair: pair[0] / pair[1])
    return f"{error:.1e} / {budget:.1e}"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(f"{PAGE.relative_to(ROOT)}: {len(ROWS)} rows")
