"""Layers whose dump has the bias as a column of the matrix: they are judged so (BIAS)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from refcurv.curvature.factors_file import parts_of
from refcurv.judge.case import Case
from refcurv.judge.compare import said
from refcurv.judge.verdict import FAIL, Comparison


def with_biases(case: Case) -> tuple[Case, list[Comparison]]:
    """The case with `joint` set, and what is to be said of layers that lack the column.

    A layer is joint if it has a bias, its reference holds Σ a, and theirs is one wider than its
    input. Where the dump does not declare it, the recipe says so.

    Proof: tests/test_judge_biases.py::test_a_joint_A_is_judged_beside_A_joint
    """
    declared = case.dump.declared.get("bias") == "joint"
    joint, without, parts = [], [], parts_of(case.reference)
    for layer in case.matched:
        if "sum_a" not in parts[layer]:
            continue
        one = case.reference[layer]
        assert one.sum_a is not None
        width = _width(case, layer)
        if width == len(one.sum_a) + 1:
            joint.append(layer)
        elif declared and width == len(one.sum_a):
            without.append(layer)
    dump = case.dump
    if joint and not declared:
        dump = replace(dump, recipe=(*dump.recipe, _guess(joint)))
    cause = "the dump joins weight and bias, the layer has a bias, and A has no column of ones"
    findings = [replace(said(layer, "A", FAIL, cause), fault="B31") for layer in without]
    return replace(case, dump=dump, joint=frozenset(joint), known={}), findings


def _guess(joint: Sequence[str]) -> str:
    return (
        f"A of {len(joint)} layers that have a bias ({joint[0]}, ...) is one wider than their "
        "input; its last row and column are taken for those of the 1 in [a; 1]"
    )


def _width(case: Case, layer: str) -> int | None:
    """The width of their input, from the shapes if these are known without reading."""
    known = case.dump.shapes.get(case.matched[layer], (None, None))[1]
    if known is not None:
        return known
    theirs = case.theirs(layer)
    held = (theirs.A, theirs.U_A, theirs.Lambda)
    return next((X.shape[-1] for X in held if X is not None and X.ndim), None)
