"""Which function computes each statement, which tests prove it, and what they last measured.

    python -m pytest -n 0 --measured=validation/measured.json    the errors, anew
    refcurv audit refcurv/demo/{model,corpus}.h5 --memory 4 --json validation/demo.json
    python -m validation.traceability                            validation/AUDIT.md, anew

`ROWS` is written by hand; a test named test_O31_... belongs to O31 without being listed. The test
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

ROOT = Path(__file__).parents[1]
PAGE, MEASURED, DEMO = (
    ROOT / "validation" / name for name in ("AUDIT.md", "measured.json", "demo.json")
)


@dataclass(frozen=True)
class Row:
    """An id, what it states, the functions under `refcurv.`, further tests, what is not built."""

    id: str
    statement: str
    functions: tuple[str, ...] = ()
    tests: tuple[str, ...] = ()
    waits: str = ""


def _row(id: str, statement: str, functions: str = "", tests: str = "", waits: str = "") -> Row:
    return Row(id, statement, tuple(functions.split()), tuple(tests.split()), waits)


ESTIMATORS = "the estimators: EK-FAC, reduce, FOOF, TKFAC, Shampoo"

EXACT, LAYERS = "curvature.exact.", "model.layers."
CASES, IDENTITIES = "test_exact_cases.py::", "test_identities.py::"
PEERS = "test_peers.py::test_logits_loss_gradients_and_factors"
CURVED_PEERS = "test_peers_curvature.py::test_exact_curvature_is_torchs"
NAIVE = "test_exact.py::test_F_F_tok_and_K_equal_the_naive_sums"

ROWS = (
    _row("P1", "A = E[a aᵀ], G = E[g gᵀ], uncentred", "curvature.factors.collect " + EXACT +
         "moments", f"test_factors.py::test_factors_equal_the_naive_sums {PEERS} "
         "test_exact.py::test_moments_are_collected"),
    _row("P2", "the block of the Fisher is about G ⊗ A", "algebra.kron.kron_dense " + EXACT +
         "kfac", f"{NAIVE} {CASES}test_O1_one_datum_makes_kfac_exact"),
    _row("P3", "labels sampled from the model; the Fisher is the GGN",
         f"model.loss.draw_labels {EXACT}fisher {EXACT}ggn",
         "test_loss.py::test_labels_are_drawn_by_the_law "
         f"test_exact.py::test_O11_ggn_is_the_expected_fisher {CURVED_PEERS}"),
    _row("P4", "eigenbases of A and G; curvature of u_i v_jᵀ is λ_i μ_j",
         "curvature.eigenbasis.decompose",
         "test_eigenbasis.py::test_reconstruction_orthogonality_and_order"),
    _row("P5", "C = U_Gᵀ W U_A", "editing.projection.project",
         "test_projection.py::test_O54_edit_is_an_orthogonal_projection"),
    _row("P6", "mass M = (Σλ)(Σμ)", "algebra.staircase.cut",
         "test_staircase.py::test_O58_coverage_and_minimality"),
    _row("P7", "pairs by descending λ_i μ_j until their mass reaches ρ M", "algebra.staircase.cut",
         "test_staircase.py::test_cut_equals_brute_force"),
    _row("P8", "W' = U_G (C ∘ M_S) U_Aᵀ", "editing.projection.edit",
         "test_projection.py::test_edit_of_a_model"),
    _row("P9", "bands of eigenvectors and the activation ratio", "evaluation.bands.bands",
         "test_bands.py::test_norms_are_the_definition"),
    _row("P10", "control: bands and truncation by the SVD of W",
         "editing.svd.truncate editing.svd.singular_bases",
         "test_svd.py::test_the_cut_equals_brute_force "
         "test_svd.py::test_bands_over_right_singular_vectors"),
    _row("P11", "baseline: BalancedSubnet", "editing.bsn.train_scores editing.bsn.prune",
         "test_bsn.py::test_the_gradient_is_the_complex_step_of_a_soft_mask "
         "test_bsn.py::test_the_training_is_the_recipe_in_loops"),
    _row("O1", "one datum at one position: K is the exact block", EXACT + "kfac"),
    _row("O2", "deep linear net, square loss: K is the GGN", EXACT + "kfac"),
    _row("O3", "pooled before the loss: K is exact behind the pool only; reduce before it",
         EXACT + "kfac", waits="the reduce half: " + ESTIMATORS),
    _row("O4", "reduce right before a pool is K of the averaged input", waits=ESTIMATORS),
    _row("O5", "shallow convolution; patches as a linear layer",
         LAYERS + "unfold curvature.factors.collect",
         waits="the shallow convolution: " + ESTIMATORS),
    _row("O6", "a full design of inputs and gradients: K = F_tok", EXACT + "f_tok"),
    _row("O7", "FOOF: G = I", waits=ESTIMATORS),
    _row("O8", "the head: F = Σ (diag p − p pᵀ) ⊗ h hᵀ = F_tok = H", EXACT + "fisher"),
    _row("O9", "H = GGN + Σ r ∂²z", EXACT + "operator"),
    _row("O10", "H = GGN where the output is affine in the block", EXACT + "hessian"),
    _row("O11", "GGN = E over labels of the squared gradient; S Sᵀ = diag p − p pᵀ",
         f"{EXACT}ggn {EXACT}fisher model.loss.root_product model.loss.hessian_product",
         CURVED_PEERS),
    _row("O12", "sampled labels are unbiased; the error falls as 1/√M, as stated",
         "curvature.factors.collect"),
    _row("O13", "expected: per loss position, or with random signs", "curvature.factors.collect "
         + EXACT + "moments"),
    _row("O14", "H symmetric, products linear, GGN and Fisher ≥ 0", EXACT + "hvp"),
    _row("O15", "complex step is exact to rounding", f"{EXACT}derivative "
         "model.transformer.loss_and_gradient",
         "test_transformer.py::test_gradient_of_every_parameter_equals_complex_step "
         "test_exact.py::test_the_step_is_never_seen"),
    _row("O16", "head gradients sum to 0 over the vocabulary", "model.loss.cross_entropy"),
    _row("O17", "KL = ½ d F d + O(d³)", EXACT + "ggnvp"),
    _row("O18", "tr F_tok = Σ‖a‖²‖g‖²; tr K by the means", f"{EXACT}f_tok {EXACT}kfac"),
    _row("O19", "partial traces of F_tok", EXACT + "f_tok",
         "test_exact.py::test_O18_O19_traces_and_marginals_of_F_tok",
         "as the factors of TKFAC and Shampoo: " + ESTIMATORS),
    _row("O20", "tr A = mean ‖a‖², tr G = mean ‖g‖²", EXACT + "moments"),
    _row("O21", "EK-FAC keeps the trace", waits=ESTIMATORS),
    _row("O22", "EK-FAC is the best diagonal in its basis", waits=ESTIMATORS),
    _row("O23", "Schur-Horn and Hadamard for EK-FAC", waits=ESTIMATORS),
    _row("O24", "the best Kronecker fit is a singular pair of the rearrangement",
         "curvature.distance.compare"),
    _row("O25", "ranks: A ≤ n, F ≤ Σ (V − 1), K = A · G", f"{EXACT}moments {EXACT}fisher",
         "test_exact.py::test_O20_O25_O26_traces_ranks_and_signs"),
    _row("O26", "A, G, F, K symmetric and ≥ 0", "curvature.eigenbasis.eigenbasis",
         "test_exact.py::test_O20_O25_O26_traces_ranks_and_signs "
         "test_eigenbasis.py::"
         "test_float32_products_push_null_eigenvalues_below_zero_within_budget"),
    _row("O27", "more data, larger sums", EXACT + "moments"),
    _row("O28", "FOOF's trace", waits=ESTIMATORS),
    _row("O29", "∇W = Σ g aᵀ", "model.transformer.loss_and_gradient"),
    _row("O30", "no reachable label, no gradient", "model.loss.reached"),
    _row("O31", "the first query has no gradient", LAYERS + "attention_backward"),
    _row("O32", "gradients of rotated keys sum to 0", LAYERS + "attention_backward"),
    _row("O33", "a key-value head sums its group", LAYERS + "attention_backward"),
    _row("O34", "the norm's defect tells where eps stands", LAYERS + "rms_norm_backward"),
    _row("O35", "post-norm scale invariance: GGN·W = 0, H·W = −∇W", f"{EXACT}ggnvp {EXACT}hvp"),
    _row("O36", "SwiGLU: g_up z_up = g_h h", LAYERS + "mlp_backward"),
    _row("O37", "gate and up share A; q, k, v too", "curvature.factors.collect"),
    _row("O38", "last block: F = F_tok for q, o, gate, up, down, head", f"{EXACT}f_tok"),
    _row("O39", "causality", "model.transformer.forward"),
    _row("O40", "E g = 0 over the model's labels", "model.loss.draw_labels"),
    _row("O41", "the head's trace by kind of label", "model.loss.cross_entropy"),
    _row("O42", "sums add over disjoint data", "curvature.factors.collect"),
    _row("O43", "a mean loss shrinks G by m²", "model.transformer.backward"),
    _row("O44", "a weighted loss scales g linearly", "model.transformer.backward"),
    _row("O45", "orthogonal changes of inputs and outputs",
         "curvature.factors.collect editing.projection.edit",
         "test_projection.py::test_rotated_inputs_leave_the_edited_function_unchanged"),
    _row("O46", "permutations, residual rotations and rope layouts", "curvature.factors.collect"),
    _row("O47", "the homogeneous coordinate of a bias",
         "curvature.factors.collect curvature.eigenbasis.decompose editing.projection.edit"),
    _row("O48", "tied weights: both parts and their cross terms; no K of the shared one",
         EXACT + "fisher curvature.factors.collect"),
    _row("O49", "norm gains have a d x d Fisher", EXACT + "fisher curvature.blocks.collect_blocks"),
    _row("O50", "temperature: F falls by τ²", EXACT + "fisher"),
    _row("O51", "padding adds nothing", "curvature.factors.collect " + EXACT + "problem"),
    _row("O52", "packed documents are separate documents",
         f"{LAYERS}causal_layout {EXACT}fisher curvature.blocks.collect_blocks"),
    _row("O53", "labels do not depend on the batch", "model.loss.uniforms"),
    _row("O54", "the edit is an orthogonal projection", "editing.projection.project"),
    _row("O55", "nested and monotone in ρ", "algebra.staircase.cut"),
    _row("O56", "ρ = 1 is W itself, ρ = 0 nothing", "editing.projection.edit"),
    _row("O57", "what is kept is a staircase", "algebra.staircase.cut"),
    _row("O58", "just enough mass", "algebra.staircase.cut"),
    _row("O59", "scales and signs change nothing", "algebra.staircase.cut"),
    _row("O60", "transposing swaps the sides", "editing.projection.project"),
    _row("O61", "predicted damage ½ Σ λ μ C²", "editing.projection.project"),
    _row("O62", "a rectangle of the same mass is never smaller", "algebra.staircase.cut"),
    _row("O63", "Davis-Kahan: sin θ ≤ ‖E‖/gap", "curvature.eigenbasis.eigenbasis"),
    _row("O64", "edits of different layers commute", "editing.projection.edit"),
    _row("O65", "rounding to the stored dtype", "editing.projection.edit"),
    _row("O66", "perplexity and nDCG by definition",
         "evaluation.metrics.perplexity evaluation.metrics.ndcg"),
)  # fmt: skip


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
    demo = {f["id"]: f for f in json.loads(DEMO.read_text(encoding="utf-8"))["findings"]}
    lines = [
        "# What is proved, by what",
        "",
        "Generated by `python -m validation.traceability` from the table in that file, the names",
        "of the tests, and the errors that",
        "`python -m pytest -n 0 --measured=validation/measured.json` wrote down. Do not edit.",
        "",
        "The last column is the error that came nearest to its budget in any of the row's tests,",
        "relative to the size of the terms summed, and that budget; *holds* where the tests",
        "compare bits, ranks or inequalities; below it, what `refcurv audit` measures on the demo",
        "model (validation/demo.json). Ids: PAPER and ORACLES.",
        "",
        "| id | statement | computed by `refcurv.` | proved by `tests/` | error / budget |",
        "| --- | --- | --- | --- | --- |",
    ]
    for row in ROWS:
        functions = "<br>".join(f"`{name}`" for name in row.functions)
        tests = "<br>".join(f"`{test}`" for test in tests_of(row))
        waits = f"<br>not built yet: {row.waits}" if row.waits else ""
        error = _error(row, measured) if built(row) else ""
        if (found := demo.get(row.id)) and found["error"] is not None:
            error += f"<br>demo: {found['error']:.1e} / {found['budget']:.1e}"
        lines.append(f"| {row.id} | {row.statement}{waits} | {functions} | {tests} | {error} |")
    waiting = [row.id for row in ROWS if not built(row)]
    proved = len(ROWS) - len(waiting)
    lines += ["", f"{proved} of {len(ROWS)} have a proof; the others wait for their subject: "
              f"{', '.join(waiting)}.", ""]  # fmt: skip
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
