"""refcurv: the ground truth for the loss curvature of transformers.

For a weight matrix W, the second moments A of its inputs and G of its output gradients give the
K-FAC approximation G ⊗ A of the Fisher; its eigenbasis orders the directions of W from high to low
curvature. The sharp ones carry what many inputs share, the flat ones recitation (arXiv 2510.24256).

The public names, in the order in which data flow:

    convert, export                 checkpoint directory ↔ weights file
    load, save, Model, ModelConfig  weights file ↔ model
    load_corpus, save_corpus, Corpus, Population, ImagePopulation
    build_corpus                    texts, JSON lines, arrays of ids → corpus
    logits, loss_and_gradient       forward and backward
    collect, Factors, Factor        A and G         save_factors, load_factors
    collect_blocks, Blocks, Block   F of gains and biases, exactly
    decompose, Bases, Eigenbasis    eigenbasis      save_bases, load_bases
    edit, EditRecord                W' = U_G (C ∘ M) U_Aᵀ
    random_basis, random_pairs, one_sided   controls of the same size
    truncate, singular_bases        without the smallest singular values; their bands
    train_scores, Scores, prune     without the weights that a mask learned to drop
    greedy                          what a model says behind a prompt
    items, Items                    what a model does with each item    own_continuations
    recited, Recited                texts → the passages that a model recites
    evaluate, Evaluation            populations → table
    sweep, Sweep                    many edits by several methods at equal cost    match
    exact                           Hessian, GGN, Fisher, F_tok and K, exactly: rc.exact.hvp(...)
    distance                        F, F_tok and K side by side: rc.distance.compare(...)
    estimators                      K-FAC reduce, EK-FAC's Λ: rc.estimators.reduce(...), ekfac(...)
    matrix_free                     eigenvalues, trace and density of what is too large to write
    certify, Certificate            digits that are proved      save_certificate, load_certificate
    audit, Audit                    every identity that can be checked on a model
    validate, Verdict               another program's factors: how far off, and why
    trace, Trace, first_divergence  every tensor of a pass, and the first in which theirs differs
    RefcurvError                    every refusal is one of these, of one line: what is wrong, and
                                    what to do; a path in the place of a Model, too

The modules that do several steps at once are imported by their full names:

    refcurv.pipeline                collect → decompose → edit → evaluate → compare → results:
                                    `run(Job(weights=..., corpus=..., layers=..., rho=...), folder)`
    refcurv.demo                    the shipped model and corpus, and their `JOB`
    refcurv.report.folder           `draw(results, folder)`: figures and a page of HTML

On the command line `refcurv report` does all of it on your own files, `refcurv demo` on the shipped
ones. The other commands take the steps one by one: convert, export, inspect, corpus, collect,
decompose, edit, truncate, prune, recite, evaluate, sweep, certify, audit, validate, trace, cases.
`refcurv COMMAND --help` has examples.

To check the mathematics, read these files in this order (README counts their lines):

    law.conventions → model.config → model.layers → model.transformer → curvature.definition
    → curvature.eigenbasis → algebra.selection → editing.projection
"""

from refcurv.starting import look_after_imports

look_after_imports()  # before anything large is imported

from refcurv.algebra import matrix_free
from refcurv.certified.certificate import Certificate
from refcurv.certified.certificate_file import load_certificate, save_certificate
from refcurv.certified.certify import certify
from refcurv.curvature import distance, estimators, exact
from refcurv.curvature.bases import Bases, decompose
from refcurv.curvature.bases_file import load_bases, save_bases
from refcurv.curvature.blocks import Block, Blocks, collect_blocks
from refcurv.curvature.eigenbasis import Eigenbasis
from refcurv.curvature.factors import Factor, Factors, collect
from refcurv.curvature.factors_file import load_factors, save_factors
from refcurv.editing.bsn import Scores, prune, train_scores
from refcurv.editing.kfac import edit
from refcurv.editing.record import EditRecord
from refcurv.editing.svd import singular_bases, truncate
from refcurv.editing.variants import one_sided, random_basis, random_pairs
from refcurv.evaluation.decode import greedy
from refcurv.evaluation.graded import Items, items, own_continuations
from refcurv.evaluation.recited import Recited, recited
from refcurv.evaluation.suite import Evaluation, evaluate
from refcurv.files.corpus import load_corpus, save_corpus
from refcurv.files.huggingface import convert, export
from refcurv.files.texts import build_corpus
from refcurv.files.weights import load, save
from refcurv.judge.audit import Audit, audit
from refcurv.judge.divergence import first_divergence
from refcurv.judge.judgement import validate
from refcurv.judge.trace import Trace, trace
from refcurv.judge.verdict import Verdict
from refcurv.law.checks import RefcurvError
from refcurv.model.config import ModelConfig
from refcurv.model.corpus import Corpus, ImagePopulation, Population
from refcurv.model.weights import Model
from refcurv.passes.public import logits, loss_and_gradient
from refcurv.shown import show_records
from refcurv.sweeps.matched import match
from refcurv.sweeps.outcomes import Sweep
from refcurv.sweeps.sweep import sweep

show_records()

__all__ = [
    "Audit",
    "Bases",
    "Block",
    "Blocks",
    "Certificate",
    "Corpus",
    "EditRecord",
    "Eigenbasis",
    "Evaluation",
    "Factor",
    "Factors",
    "ImagePopulation",
    "Items",
    "Model",
    "ModelConfig",
    "Population",
    "Recited",
    "RefcurvError",
    "Scores",
    "Sweep",
    "Trace",
    "Verdict",
    "audit",
    "build_corpus",
    "certify",
    "collect",
    "collect_blocks",
    "convert",
    "decompose",
    "distance",
    "edit",
    "estimators",
    "evaluate",
    "exact",
    "export",
    "first_divergence",
    "greedy",
    "items",
    "load",
    "load_bases",
    "load_certificate",
    "load_corpus",
    "load_factors",
    "logits",
    "loss_and_gradient",
    "match",
    "matrix_free",
    "one_sided",
    "own_continuations",
    "prune",
    "random_basis",
    "random_pairs",
    "recited",
    "save",
    "save_bases",
    "save_certificate",
    "save_corpus",
    "save_factors",
    "singular_bases",
    "sweep",
    "trace",
    "train_scores",
    "truncate",
    "validate",
]
