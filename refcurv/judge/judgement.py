"""`validate`: another program's factors beside the truth, and what explains the difference."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from refcurv.algebra.blas import one_blas_thread
from refcurv.curvature.bases import Bases
from refcurv.curvature.bases_file import load_bases
from refcurv.curvature.eigenbasis import Eigenbasis
from refcurv.curvature.factors import Factors, collect
from refcurv.curvature.factors_file import load_factors, shapes_of
from refcurv.files.lazy import Recent
from refcurv.judge.arithmetic import Arithmetic, parse
from refcurv.judge.bases import Before, basis_of, before, compare_bases
from refcurv.judge.belonging import require_together
from refcurv.judge.biases import with_biases
from refcurv.judge.case import ROOM, Case
from refcurv.judge.compare import Bounds, compare_moments, drawing, said, unless_hidden
from refcurv.judge.corrections import compare_corrections
from refcurv.judge.declared import as_number, require_declared
from refcurv.judge.diagnosis.causes import with_named
from refcurv.judge.diagnosis.faults import FAULTS
from refcurv.judge.diagnosis.procedure import diagnose, remember
from refcurv.judge.diagnosis.simulated import know_kinks
from refcurv.judge.diagnosis.telling import aside, settled
from refcurv.judge.divergence import with_labels
from refcurv.judge.draws import with_drawing
from refcurv.judge.dump import Dump, first_names
from refcurv.judge.dump import Theirs as Held
from refcurv.judge.edits import compare_weight
from refcurv.judge.foreign import match, read_arrays, read_dump
from refcurv.judge.foreign.loss import of_summed_loss
from refcurv.judge.given import accepted, require_options, require_ours
from refcurv.judge.labelled import not_drawn
from refcurv.judge.masks import compare_mask
from refcurv.judge.pictures import Picture
from refcurv.judge.pictures import pictures as draw
from refcurv.judge.truths import Truths
from refcurv.judge.verdict import FAIL, LABELS, LEFT_OUT, MISSING, PASS, Comparison, Verdict
from refcurv.law.checks import (
    Array,
    ConventionError,
    EmptyError,
    SchemaError,
)
from refcurv.law.words import number_of
from refcurv.model.corpus import Corpus
from refcurv.model.patterns import expand
from refcurv.model.weights import Model
from refcurv.progress import Progress, counter, doing, silent, uncounted

Theirs = str | Path | Factors | Mapping[str, Any] | Dump
"""A file or folder, or in memory: Factors, {layer: (A, G, n)}, or what was read already."""


SEARCH = "the search for causes"
"""What follows the comparison, which is not counted."""


def validate(
    theirs: Theirs,
    reference: str | Path | Factors | None = None,
    *,
    model: Model | None = None,
    corpus: Corpus | None = None,
    basis: str | Path | Bases | None = None,
    labels: str | Path | ArrayLike | None = None,
    names: Mapping[str, str] | None = None,
    arithmetic: str = "",
    accept: Sequence[str] = (),
    declared: Mapping[str, str] | None = None,
    layers: str | None = None,
    pictures: int = 0,
    progress: Progress = silent,
) -> Verdict:
    """Judge another program's factors, bases, corrections or edits, layer by layer.

    Definition
        Theirs are brought to our units by the recipe of their format. For each layer the
        reference's and theirs are compared: A/tr A, G/tr G and tr A · tr G, which no choice of
        scale changes; then A and G; then what else the dump holds. An error is judged by the budget
        of *their* arithmetic (`judge.arithmetic`), and by what drawing labels explains. What does
        not agree is diagnosed (`judge.diagnosis`): each known fault is a transformation of the
        truth, and the simplest that brings theirs within budget is the cause.

    Args:
        theirs: a file or folder of a known format (`judge.foreign`), or {layer: (A, G, n)}.
        reference: Factors, or a factors file. Left out, they are collected from model and corpus,
            by the choices that theirs declares.
        model: in float64, for hypotheses that must be recomputed: other labels, rows or tensors.
        corpus: what the reference was collected from.
        basis: of the reference, for theirs that hold eigenvectors, masks or edited weights.
        labels: (N, T) integers, or a file that holds an array `labels`: what theirs drew. The
            reference is then collected with these, and no drawing lies between the two. Where all
            else agrees, and theirs is not declared `empirical`, it is tested that they were drawn
            from the model (`judge.labelled`).
        names: our layer → their name, where names do not match by themselves; a `*` in both is
            one part of a name, `**` several: {"blocks.*.mlp.up": "net/layer_*/fc1"}.
        arithmetic: their dtypes, "float32" or "model=bfloat16,products=float32,sums=float32".
        accept: dtypes of which "equal as" counts as a pass, and with each one those that are finer.
        declared: what theirs does not say of itself, {"fisher": "sampled"} for example.
        layers: a pattern: judge these only.
        pictures: of how many layers the verdict holds maps and spectra, those that failed first.
        progress: called with (done, all): the layers that were compared. Where one differs, the
            search for causes follows, which is not counted and may take longest; then it is called
            once more.

    Returns:
        Verdict: findings, causes, passed.

    Raises:
        SchemaError: no known format, or a file that breaks it. EmptyError: no layer in common, or
        nothing that can be compared. ConventionError: neither a reference nor model and corpus;
        files that do not belong together; a basis beside A and G alone; an unknown dtype,
        declaration or kind of argument.
        NameUnknownError: `layers` or `names` that no layer has. ShapeError, DTypeError: `labels`.

    Cost: reading theirs once, and one norm for each matrix; a failure costs the diagnosis.
    Source: METHOD, Judging.
    Proof: tests/test_judge.py::test_the_truth_passes
    """
    require_ours(model, corpus, reference, basis)
    require_options(names, layers, pictures, progress)
    accept = accepted(accept)
    with _all_missing(reference, layers):
        dump, given = _theirs(theirs, declared, arithmetic)
    if basis is not None:
        _require_edits(dump)
    corpus, own, dump = _labelled(reference, model, corpus, labels, dump)
    truth = _reference(reference, model, corpus, dump.declared, layers, progress)
    wanted, sizes = _wanted(truth, layers), shapes_of(truth)
    truth = replace(truth, layers=Recent(truth.layers, ROOM))
    matched, notes = match(dump, {name: sizes[name] for name in wanted}, names or {})
    if not matched:
        raise _nothing_in_common(dump, wanted, notes)
    bases = load_bases(basis) if isinstance(basis, str | Path) else basis
    require_together(truth, model, corpus, bases)
    say = partial(doing, progress)
    case, biases = with_biases(Case(dump, truth, matched, given, model, corpus, bases, say=say))
    know_kinks(case)
    findings = [*_otherwise(case), *(said("", "dump", FAIL, text) for text in dump.problems)]
    findings += [*notes, *_absent(case, wanted, {note.layer for note in notes}), *biases]
    done = counter(progress, len(matched))
    with one_blas_thread(), np.errstate(over="ignore", invalid="ignore"):  # theirs may be huge
        case = with_drawing(case)
        findings += _compared(case, matched, done)
        _require_compared(findings)
        if search := not settled(findings):
            uncounted(progress, f"{number_of(len(matched), 'layer')} compared; {SEARCH}")
        known, excluded, findings = diagnose(case, findings)
        findings = [*_as_drawn(case, findings), *map(unless_hidden, findings)]
        if model and own and corpus and not any(f.verdict == FAIL for f in findings):
            findings += not_drawn(model, own, corpus)
        shown = tuple(_shown(case, findings, pictures))
    if search:
        progress(len(matched), len(matched))
    return Verdict(
        tuple(findings),
        with_named(case, known, findings),
        excluded,
        dump.program,
        case.dump.recipe,
        dict(matched),
        arithmetic=given.text, accepted=accept, pictures=shown,
    )  # fmt: skip


def _compared(
    case: Case, matched: Mapping[str, str], done: Callable[[], object]
) -> Iterator[Comparison]:
    """All layers; of one that differs, what the search needs is found while it is in memory."""
    truths = Truths(case)
    for layer in matched:
        case.say(f"compare {layer}")
        found = _layer(case, layer, truths)
        yield from found
        if any(one.verdict not in (PASS, LEFT_OUT) for one in found):
            remember(case, layer)
        done()


def _theirs(
    theirs: Theirs, declared: Mapping[str, str] | None, arithmetic: str
) -> tuple[Dump, Arithmetic]:
    """The dump with what is declared of it, and its dtypes; what is declared is checked first."""
    said_too = require_declared({} if declared is None else declared)
    spoken = parse("validate", arithmetic)
    dump = read_dump(theirs)
    dump = of_summed_loss(replace(dump, declared={**dump.declared, **said_too}))
    told = {k: as_number(k, x) if k in ("draws", "rho") else x for k, x in dump.declared.items()}
    dump = replace(dump, declared=told, layers=Recent(dump.layers, ROOM))
    return dump, spoken.or_else(dump.arithmetic)


def _require_edits(dump: Dump) -> None:
    """Refuse a basis that nothing would be judged by."""
    if not any(has & {"U_A", "U_G", "mask", "W"} for has in dump.holds.values()):
        raise ConventionError(
            "validate: a basis is for eigenvectors, masks and edited weights, of which theirs "
            "holds none; leave it (--basis) out."
        )


def _shown(case: Case, findings: Sequence[Comparison], count: int) -> list[Picture]:
    """Pictures of so many layers, those with a failure first."""
    bad = [f.layer for f in findings if f.layer in case.matched and f.verdict == FAIL]
    order = list(dict.fromkeys([*bad, *case.matched]))[:count]
    return [one for layer in order for one in draw(case, layer)]


def _layer(case: Case, layer: str, truths: Truths) -> list[Comparison]:
    """Everything that the dump holds of one layer."""
    theirs = case.theirs(layer)
    bounds = Bounds(case, layer, drawing(case, layer, theirs.n_G))
    findings, measured = compare_moments(bounds, theirs)
    findings += compare_corrections(bounds, theirs, measured, truths)
    if theirs.U_A is None and theirs.U_G is None and theirs.mask is None and theirs.W is None:
        return findings
    if case.ours(layer).sum_A.ndim == 1:
        text = "A of a table is diagonal, and has no basis here"
        return [*findings, said(layer, "basis of A", LEFT_OUT, text)]
    own = basis_of(bounds)
    of_bases = compare_bases(bounds, theirs, own)
    made_by = before(case, layer, theirs, of_bases)
    return [*findings, *of_bases, *_edit(bounds, theirs, own, made_by)]


def _edit(bounds: Bounds, theirs: Held, own: Eigenbasis, made_by: Before) -> Iterator[Comparison]:
    """Their mask and their edited weight; [W b] of a layer that is judged with its bias."""
    case, layer, W = bounds.case, bounds.layer, None
    joint = layer in case.joint
    if case.model is not None:
        W = _weight(case.model, layer, joint)
    declared, masked = case.dump.declared.get("rho"), None
    rho = None if declared is None else float(declared)
    if theirs.mask is not None:
        masked = compare_mask(bounds, theirs, own, W, rho, made_by)
        yield masked
    if theirs.W is None:
        return
    if W is None:
        text = "give --model: an edited weight is judged beside the one before the edit"
        yield said(layer, "W", LEFT_OUT, text)
    elif joint and theirs.W.shape == (len(W), W.shape[1] - 1):
        text = "A is joint, and W has no column for the bias: give [W b]"
        yield said(layer, "W", LEFT_OUT, text)
    else:
        yield compare_weight(bounds, theirs, own, W, rho, made_by, masked)


def _weight(model: Model, layer: str, joint: bool) -> Array:
    """W before any edit; [W b] of a layer that is judged with its bias."""
    W = np.asarray(model.parameters[model.config.weight_of(layer)], np.float64)
    if not joint:
        return W
    return np.column_stack([W, np.asarray(model.parameters[f"{layer}.bias"], np.float64)])


def _reference(
    given: str | Path | Factors | None,
    model: Model | None,
    corpus: Corpus | None,
    declared: Mapping[str, str],
    layers: str | None,
    progress: Progress = silent,
) -> Factors:
    if isinstance(given, Factors):
        return given
    if given is not None:
        return load_factors(given)
    if model is None or corpus is None:
        raise ConventionError(
            "validate: give a reference (--reference), or both a model (--model) and a corpus "
            "(--corpus)."
        )
    fisher, rows = declared.get("fisher", "sampled"), declared.get("rows", "reached")

    def told(done: int, total: int) -> None:
        doing(progress, f"collect the reference: {done / total:.0%}")

    return collect(model, corpus, layers or "**", fisher, rows=rows, progress=told)


def _labelled(
    reference: object,
    model: Model | None,
    corpus: Corpus | None,
    labels: str | Path | ArrayLike | None,
    dump: Dump,
) -> tuple[Corpus | None, Corpus | None, Dump]:
    """The corpus with their labels; with its own, if theirs should be drawn; and the dump.

    The reference is collected with their labels, as if they were the corpus's.
    """
    if labels is None:
        return corpus, None, dump
    if reference is not None or model is None or corpus is None:
        raise ConventionError(
            "validate: labels need a model and a corpus, and no reference: it is collected anew."
        )
    given: Any = labels
    if isinstance(labels, str | Path):
        arrays = read_arrays(labels)
        if "labels" not in arrays:
            raise SchemaError(f"validate: {str(labels)!r} holds no array `labels`.")
        given = arrays["labels"]
    own = None if dump.declared.get("fisher") == "empirical" else corpus
    dump = replace(dump, declared={**dump.declared, "fisher": "empirical"})
    return with_labels(corpus, slice(None), given), own, dump


@contextmanager
def _all_missing(reference: str | Path | Factors | None, layers: str | None) -> Iterator[None]:
    """Of theirs that holds no layer: say what it lacks, and the fault that this is."""
    try:
        yield
    except EmptyError as error:
        if reference is None:
            raise
        wanted = _wanted(_reference(reference, None, None, {}, None), layers)
        text = f"{error} Missing: {first_names(wanted)}. {B48}."
        raise EmptyError(text) from error


B48 = f"B48: {FAULTS['B48'].name}"
"""What a layer that is not there is called."""


def _nothing_in_common(dump: Dump, ours: Iterable[str], notes: Sequence[Comparison]) -> EmptyError:
    why = f" {notes[0].layer}: {notes[0].cause}." if notes else ""
    why += f" Also: {dump.problems[0]}." if dump.problems else ""
    return EmptyError(
        f"validate: no layer in common. Theirs: {first_names(dump.layers)}; "
        f"ours: {first_names(ours)}.{why} Say which layer is which: --name OURS=THEIRS for each, "
        "or with stars ('blocks.*.mlp.up=net/layer_*/fc1'; names={ours: theirs} in Python)."
    )


def _require_compared(findings: Sequence[Comparison]) -> None:
    """Where nothing was compared, nothing passed."""
    if all(one.verdict == LEFT_OUT for one in findings if one.layer):
        causes = dict.fromkeys(one.cause for one in reversed(findings) if one.layer)
        raise EmptyError(f"validate: nothing could be compared: {'; '.join(list(causes)[:4])}.")


def _otherwise(case: Case) -> list[Comparison]:
    """Choices that theirs declares, and that the reference made otherwise."""
    ours = {"fisher": str(case.reference.fisher), "rows": str(case.reference.rows)}
    text = "theirs is {}, the reference {}: collect it as theirs is, or expect a difference"
    declared = case.dump.declared
    return [
        said("", key, LEFT_OUT, text.format(declared[key], own))
        for key, own in ours.items()
        if declared.get(key, own) != own
    ]


def _as_drawn(case: Case, findings: Sequence[Comparison]) -> Iterator[Comparison]:
    """What passes by drawing alone, where nothing tells other labels from drawn ones.

    Theirs less ours is what their labels change and what drawing does. Drawing explains no more
    than the budget, so that other labels change no more than error and budget together.
    """
    drawn = [f for f in findings if f.verdict == PASS and not aside(f)]
    if drawn and (case.model is None or case.corpus is None):
        count = len({f.layer for f in drawn})
        most = max((f.error or 0.0) + (f.budget or 0.0) for f in drawn)
        text = (
            f"whose labels G has is not judged: {number_of(count, 'layer')} of it passed as drawn. "
            f"Labels of the corpus, or any others that change it by {most:.1%} or less, would pass "
            "too: give model and corpus (--model, --corpus), and they are told apart"
        )
        yield said("", LABELS, LEFT_OUT, text)


def _wanted(truth: Factors, layers: str | None) -> list[str]:
    return list(truth) if layers is None else expand(layers, list(truth))


def _absent(case: Case, wanted: Sequence[str], told: Set[str]) -> list[Comparison]:
    """Layers of ours that theirs lacks, but those `told`, and of theirs that ours has not."""
    missing = [name for name in wanted if name not in case.matched and name not in told]
    extra = [name for name in case.dump.layers if name not in case.matched.values()]
    out = [said(name, "names", MISSING, "no layer of the dump stands for it") for name in missing]
    if extra:
        out.append(said("", "names", LEFT_OUT, f"theirs alone: {first_names(extra)}"))
    return out
