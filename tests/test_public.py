"""Every public function with every kind of wrong argument: it works, or is a RefcurvError.

`CALLS` has one call that works of each public function. Whoever adds a function adds its call.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from strategies import config, random_parameters
from test_hostile import WRONG

import refcurv as rc
from refcurv.law.checks import LONGEST

LAYER, WEIGHT, NORM = "blocks.0.mlp.up", "blocks.0.mlp.up.weight", "blocks.0.attn_norm.weight"
SPACES = (rc, rc.exact, rc.distance, rc.estimators, rc.matrix_free)
CALLED = {"progress", "each", "told", "say", "stage", "estimate"}
"""Parameters that are called: what a function of the caller's raises is its own."""

MORE = WRONG | {
    "real": 3.5, "infinite": np.inf, "huge": 10**30, "number in an array": np.array(3),
    "NUL": "a\0b", "surrogate": "\ud800", "long": "x" * 10**5, "nans": np.full((9, 9), np.nan),
    "dates": np.zeros(3, "M8[s]"), "records": np.zeros(3, [("a", "f4")]),
    "masked": np.ma.ones((2, 2)),
    "map of arrays": {LAYER: np.ones((2, 2))}, "map of names": {LAYER: 0.5}, "deep": [[[[[]]]]],
    "generator": "made anew", "class": SimpleNamespace(),
}  # fmt: skip


def functions() -> dict[str, Callable[..., Any]]:
    """All that is public and checks what it is given, by name: `collect`, `exact.hvp`.

    Records without a check of their own hold whatever they are given, until a function reads them.
    """
    found: dict[str, Callable[..., Any]] = {}
    for space in SPACES:
        own = [n for n, x in vars(space).items() if getattr(x, "__module__", 0) == space.__name__]
        for name in getattr(space, "__all__", own):
            one = getattr(space, name)
            if name.startswith("_") or isinstance(one, ModuleType) or not callable(one):
                continue
            if inspect.isclass(one) and not hasattr(one, "__post_init__"):
                if dataclasses.is_dataclass(one) or not issubclass(one, Exception):
                    continue  # a record, or a type for annotations
            prefix = "" if space is rc else space.__name__.rpartition(".")[2] + "."
            found[prefix + name] = one
            if inspect.isclass(one) and one is not rc.ModelConfig:  # its names are its own
                methods = {n: x for n, x in vars(one).items() if inspect.isfunction(x)}
                found |= {f"{name}.{n}": x for n, x in methods.items() if _asks(n, x)}
    return found


def _asks(name: str, method: Callable[..., Any]) -> bool:
    return not name.startswith("_") and len(inspect.signature(method).parameters) > 1


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """What the calls give: records in memory, and files of them."""
    at, shape = tmp_path_factory.mktemp("public"), config(layers=1, width=4, mlp_width=3)
    tokens = np.random.default_rng(0).integers(0, shape.vocabulary, (3, 6))
    row = dict(tokens=tokens, prompt_length=[3] * 3, length=[6] * 3)
    dev = rc.Population(**row, kind="recite", split="dev")
    clean = rc.Population(tokens, [1] * 3, [6] * 3, "text", "dev")
    test = rc.Population(**row, kind="recite", split="test")
    corpus = rc.Corpus(tokens, populations={"dev": dev, "clean": clean, "test": test})
    model = rc.Model(shape, random_parameters(shape, 3))
    factors = rc.collect(model, corpus, LAYER, "empirical")
    bases = rc.decompose(factors)
    rc.save(model, at / "w.h5")
    rc.save_corpus(corpus, at / "c.h5")
    rc.save_factors(factors, at / "f.h5")
    rc.save_bases(bases, at / "b.h5")
    made = rc.certify(model, corpus, ["nats"], digits=5)
    rc.save_certificate(made, at / "cert.h5")
    rc.export(at / "w.h5", at / "exported")
    (at / "ids.jsonl").write_text(json.dumps({"input_ids": [1, 2, 3, 4]}) + "\n")
    (at / "pairs.jsonl").write_text(json.dumps({"prefix_ids": [1, 2], "suffix_ids": [3]}) + "\n")
    vector = {WEIGHT: np.ones(shape.parameter_shapes()[WEIGHT])}
    return SimpleNamespace(
        at=at, model=model, corpus=corpus, tokens=tokens, dev=dev, clean=clean, factors=factors,
        bases=bases, vector=vector, certificate=made,
        scores=rc.train_scores(model, LAYER, dev, corpus, ratio=0.1, steps=1),
        trace=dict(rc.trace(model, corpus, fisher="empirical").tensors),
        operator=rc.exact.operator(model, corpus, wrt=WEIGHT),
        problem=rc.exact.problem(model, corpus),
    )  # fmt: skip


Own = SimpleNamespace


def _both(own: Own) -> dict[str, Any]:
    return {"model": own.model, "corpus": own.corpus}


def _block(own: Own) -> dict[str, Any]:
    return {"model": own.model, "tokens": own.corpus, "wrt": WEIGHT}


def _row(own: Own, **more: object) -> dict[str, Any]:
    return {"tokens": own.tokens, "prompt_length": [3] * 3, "length": [6] * 3, **more}


def _edit(own: Own) -> dict[str, Any]:
    return {"model": own.model, "basis": own.bases, "rho": 0.5}


CALLS: dict[str, Callable[[Own], dict[str, Any]]] = {
    "Corpus": lambda own: {"tokens": own.tokens},
    "ImagePopulation": lambda _: {"images": np.zeros((2, 3, 4, 4)), "labels": [0, 1],
                                  "split": "dev"},
    "Model": lambda own: {"config": own.model.config, "parameters": dict(own.model.parameters)},
    "Model.with_parameters": lambda own: {"self": own.model, "changed": own.vector},
    "ModelConfig": lambda own: {
        one.name: getattr(own.model.config, one.name) for one in dataclasses.fields(rc.ModelConfig)
    },
    "Population": lambda own: _row(own, kind="recite", split="dev"),
    "RefcurvError": lambda _: {"message": "refused"},
    "audit": _both,
    "build_corpus": lambda own: {"texts": [own.at / "ids.jsonl"]},
    "certify": lambda own: {**_both(own), "of": ["nats"], "digits": 5},
    "collect": lambda own: {**_both(own), "layers": LAYER},
    "collect_blocks": lambda own: {**_both(own), "parameters": NORM},
    "convert": lambda own: {"directory": own.at / "exported", "path": "made.h5"},
    "decompose": lambda own: {"factors": own.factors},
    "edit": _edit,
    "evaluate": lambda own: {**_both(own), "baseline": own.model},
    "export": lambda own: {"path": own.at / "w.h5", "directory": "made"},
    "first_divergence": lambda own: {"theirs": own.trace, **_both(own)},
    "greedy": lambda own: {"model": own.model, "prompt": [[1, 2]], "steps": 1},
    "items": lambda own: {"model": own.model, "population": own.dev},
    "load": lambda own: {"path": own.at / "w.h5"},
    "load_bases": lambda own: {"path": own.at / "b.h5"},
    "load_certificate": lambda own: {"path": own.at / "cert.h5"},
    "load_corpus": lambda own: {"path": own.at / "c.h5"},
    "load_factors": lambda own: {"path": own.at / "f.h5"},
    "logits": lambda own: {"model": own.model, "tokens": own.tokens},
    "loss_and_gradient": lambda own: {"model": own.model, "tokens": own.tokens},
    "match": lambda own: {**_edit(own), "method": "svd", "population": own.clean, "most": 2},
    "one_sided": lambda own: {"basis": own.bases, "side": "inputs"},
    "own_continuations": lambda own: {"model": own.model, "text": own.clean, "prompt": 2,
                                      "count": 1},
    "prune": lambda own: {"model": own.model, "scores": own.scores},
    "random_basis": lambda own: {"basis": own.bases, "seed": 0},
    "random_pairs": lambda own: {"model": own.model, "basis": own.bases, "share": 0.5, "seed": 0},
    "recited": lambda own: {"model": own.model, "documents": list(own.tokens), "prefix": 2,
                            "suffix": 2},
    "save": lambda own: {"model": own.model, "path": "made.h5"},
    "save_bases": lambda own: {"bases": own.bases, "path": "made.h5"},
    "save_certificate": lambda own: {"made": own.certificate, "path": "made.h5"},
    "save_corpus": lambda own: {"corpus": own.corpus, "path": "made.h5"},
    "save_factors": lambda own: {"factors": own.factors, "path": "made.h5"},
    "singular_bases": lambda own: {"model": own.model},
    "sweep": lambda own: {**_both(own), "layers": [LAYER], "rho": [0.5], "methods": ["kfac"],
                          "basis": own.bases},
    "trace": _both,
    "train_scores": lambda own: {"model": own.model, "layers": LAYER, "forget": own.dev,
                                 "retain": own.corpus, "ratio": 0.1, "steps": 1},
    "truncate": lambda own: {"model": own.model, "energy": {LAYER: 0.5}},
    "validate": lambda own: {"theirs": own.factors, "reference": own.factors, **_both(own)},
    "exact.derivative": lambda own: {"model": own.model, "tokens": own.corpus,
                                     "vector": own.vector},
    "exact.f_tok": _block,
    "exact.fisher": _block,
    "exact.fisher_along": lambda own: {"model": own.model, "tokens": own.corpus,
                                       "vector": own.vector},
    "exact.ggn": _block,
    "exact.ggnvp": lambda own: {**_block(own), "vector": own.vector},
    "exact.gradient": _block,
    "exact.hessian": _block,
    "exact.hvp": lambda own: {**_block(own), "vector": own.vector},
    "exact.kfac": _block,
    "exact.moments": _block,
    "exact.of_outputs": lambda own: {"made": own.problem, "weight": WEIGHT, "first": 0, "last": 1},
    "exact.operator": _block,
    "exact.problem": lambda own: {"model": own.model, "tokens": own.corpus},
    "exact.rows": _block,
    "distance.compare": _block,
    "distance.distances": lambda own: {
        "three": rc.distance.Three(np.eye(6), np.eye(6), rc.exact.Moments(np.eye(2), np.eye(3), 4))
    },
    "distance.nearest_kronecker": lambda _: {"F": np.eye(6), "shape": (3, 2)},
    "estimators.diagonal": lambda _: {"F": np.eye(6), "U_G": np.eye(3), "U_A": np.eye(2)},
    "estimators.ekfac": lambda own: {**_both(own), "bases": own.bases, "per": "token"},
    "estimators.reduce": lambda own: {**_both(own), "layers": LAYER},
    "estimators.reduced": _block,
    "matrix_free.extreme_eigenvalues": lambda own: {"operator": own.operator},
    "matrix_free.hutchinson": lambda own: {"operator": own.operator, "samples": 2, "seed": 0},
    "matrix_free.spectral_density": lambda own: {"operator": own.operator, "probes": 2, "steps": 2,
                                                 "seed": 0},
    "matrix_free.xtrace": lambda own: {"operator": own.operator, "samples": 4, "seed": 0},
}  # fmt: skip
"""Public function → arguments with which it works."""


def parameters(function: Callable[..., Any]) -> list[str]:
    """The names of all parameters; those of `Sent` where it takes them."""
    out: list[str] = []
    for name, one in inspect.signature(function).parameters.items():
        if name == "sent":
            out += rc.exact.Sent.__annotations__
        elif one.kind is not inspect.Parameter.VAR_KEYWORD and name != "self":
            out.append(name)
    return out


ARGUMENTS = [(name, one) for name, made in functions().items() for one in parameters(made)]


def refused_or_works(own: Own, name: str, parameter: str, kind: str) -> None:
    """Of a wrong object for one parameter."""
    wrong = iter([1]) if kind == "generator" else MORE[kind]
    if parameter in CALLED and callable(wrong):
        return
    try:
        functions()[name](**{**CALLS[name](own), parameter: wrong})
    except rc.RefcurvError as error:
        said = str(error)
        assert said and len(said.splitlines()) == 1 and len(said) <= LONGEST


def test_the_table_has_every_public_function() -> None:
    assert CALLS.keys() == functions().keys()


def test_the_calls_of_the_table_work(
    own: Own, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("exact.hvp", "edit", "build_corpus", "save"):
        functions()[name](**CALLS[name](own))


@pytest.mark.parametrize("wrong", ["6GB", True, -1, np.nan, [1], 1j])
def test_bytes_are_a_number(wrong: object, own: Own) -> None:
    """The command line reads 6GB; a function is given the number."""
    calls: dict[str, tuple[str, ...]] = {"evaluate": ("memory",), "items": ("memory",),
                                         "sweep": ("memory", "states")}  # fmt: skip
    for name, figures in calls.items():
        for what in figures:
            with pytest.raises(
                rc.RefcurvError, match=rf"^{name}: {what} must be a number of bytes"
            ):
                functions()[name](**{**CALLS[name](own), what: wrong})


@pytest.mark.parametrize("wrong", ["2", -1, np.nan, 1.5, True, [1], np.ones(2)])
def test_pieces_at_a_time_are_a_whole_number(wrong: object, own: Own) -> None:
    """NaN made `collect_blocks` wait for ever."""
    for name in ("collect", "collect_blocks", "estimators.reduce", "estimators.ekfac"):
        with pytest.raises(rc.RefcurvError, match="in_flight must be an integer of at least 0"):
            functions()[name](**{**CALLS[name](own), "in_flight": wrong})
    assert rc.collect_blocks(own.model, own.corpus, NORM, in_flight=0)


@pytest.mark.parametrize("name", CALLS)
def test_an_object_is_refused_in_one_line(
    name: str, own: Own, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A thing of no use anywhere, in the place of each argument: the answer is quick."""
    monkeypatch.chdir(tmp_path)
    for parameter in parameters(functions()[name]):
        refused_or_works(own, name, parameter, "object")


@pytest.mark.slow(seconds=5)
@pytest.mark.parametrize("name", CALLS)
def test_every_call_of_the_table_works(
    name: str, own: Own, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    functions()[name](**CALLS[name](own))


@pytest.mark.slow(seconds=40)
@pytest.mark.parametrize(("name", "parameter"), ARGUMENTS)
def test_whatever_is_given_is_refused_in_one_line(
    name: str, parameter: str, own: Own, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for kind in MORE:
        refused_or_works(own, name, parameter, kind)
