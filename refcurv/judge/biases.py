"""Layers whose dump has the bias as a column of the matrix: they are judged so (BIAS)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from refcurv.curvature.factors_file import parts_of
from refcurv.judge.case import Case
from refcurv.judge.compare import said
from refcurv.judge.verdict import FAIL, Comparison
from refcurv.law.conventions import Bias
from refcurv.law.words import number_of

NO_COLUMN = "the dump joins weight and bias, the layer has a bias, and A has no column of ones"
"""What is said of a layer whose bias is declared to be a column, and that has none."""

A_COLUMN = "the dump declares the bias a block of its own, and A has a column of ones"
"""What is said of a layer whose bias is declared not to be a column, and that has one."""


def with_biases(case: Case) -> tuple[Case, list[Comparison]]:
    """The case with `joint` set, and what is to be said of layers that are not as declared.

    A layer is joint if it has a bias, its reference holds Σ a, and theirs is one wider than its
    input; or if its G is, and its A has the size of our G (B32). Where the dump does not declare
    it, the recipe says so.

    Proof: tests/test_judge_biases.py::test_a_joint_A_is_judged_beside_A_joint
    """
    bias = case.dump.declared.get("bias")
    declared = bias == Bias.JOINT
    joint, without, parts = [], [], parts_of(case.reference)
    for layer in case.matched:
        if "sum_a" not in parts[layer]:
            continue
        one = case.reference[layer]
        assert one.sum_a is not None
        width, plain = _width(case, layer), len(one.sum_a)
        if width == plain + 1 or _swapped(case, layer):
            joint.append(layer)
        elif declared and width == plain:
            without.append(layer)
        elif declared and width is not None:
            joint.append(layer)  # of a shape that neither explains
    dump = case.dump
    if joint and bias is None:
        dump = replace(dump, recipe=(*dump.recipe, _guess(joint)))
    extra = joint if bias == Bias.SEPARATE else []
    findings = [
        replace(said(layer, "A", FAIL, words), fault="B31")
        for some, words in ((without, NO_COLUMN), (extra, A_COLUMN))
        for layer in some
    ]
    return replace(case, dump=dump, joint=frozenset(joint), known={}), findings


def _guess(joint: Sequence[str]) -> str:
    return (
        f"A of {number_of(len(joint), 'layer')} that have a bias ({joint[0]}, ...) is one "
        f"wider than their "
        "input; its last row and column are taken for those of the 1 in [a; 1]"
    )


def _swapped(case: Case, layer: str) -> bool:
    """Has their A the shape of our G, and their G that of our A with the bias?"""
    one, inputs = case.reference[layer], len(case.reference[layer].sum_A) + 1
    if case.dump.shapes.get(case.matched[layer], (None,))[0] not in (None, inputs):
        return False
    theirs = case.theirs(layer)
    if theirs.A is None or theirs.G is None:
        return False
    return (theirs.A.shape, theirs.G.shape) == (one.sum_G.shape, (inputs, inputs))


def _width(case: Case, layer: str) -> int | None:
    """The width of their input, from the shapes if these are known without reading."""
    known = case.dump.shapes.get(case.matched[layer], (None, None))[1]
    if known is not None:
        return known
    theirs = case.theirs(layer)
    held = (theirs.A, theirs.U_A, theirs.Lambda, theirs.mask)
    return next((X.shape[-1] for X in held if X is not None and X.ndim), None)
