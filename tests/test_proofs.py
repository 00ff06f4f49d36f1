"""`audit --certify`: identities proved on balls; a factor that is wrong by 1e-25 is caught."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from types import MappingProxyType
from typing import Any
from unittest import mock

import numpy as np
import pytest
from strategies import case, random_parameters
from test_audit import small
from test_certified import FAMILY, PUBLISHED
from test_planted_bugs import planted

import refcurv as rc
from refcurv.algebra import balls
from refcurv.algebra.balls import bits, exact
from refcurv.algebra.eigen_enclosures import enclose
from refcurv.certified.layers import BALLS, hessian_product
from refcurv.cli import main
from refcurv.files.huggingface import read_config
from refcurv.judge import audit as judge
from refcurv.judge import proofs
from refcurv.judge.bench import plan as bench_plan
from refcurv.judge.bench import prepare
from refcurv.judge.enclosure import Enclosure, Few
from refcurv.judge.identities import CHECKS, proved
from refcurv.judge.identities.proved import PROOFS, Equal, equal
from refcurv.model.config import Image, ModelConfig
from refcurv.report.printed import format_audit


def of(model: rc.Model, corpus: rc.Corpus, width: int = 5) -> proofs.Proofs:
    """The proofs alone, over a few positions."""
    planned = bench_plan(model.config, corpus, 2**32)
    bench = prepare(model.config, model.parameters, corpus, planned, 0)
    fits = proofs.plan_proofs(model.config, planned.width, 2**32, 1e6)
    return proofs.prove(bench, replace(fits, width=min(width, fits.width)))


def verdicts(found: proofs.Proofs) -> dict[str, str]:
    return {one.id: one.verdict for one in found.findings}


MODELS: dict[str, dict[str, Any]] = {
    "post-norm": dict(layers=1),
    "gpt2": dict(layers=1, norm="layer", norm_bias=True, gated=False, rope_theta=None,
                 learned_positions=9, activation="gelu_tanh", biases=("q", "k", "v", "o", "up"),
                 norm_place="pre", qk_norm="none", tied=True),
    "gemma": dict(layers=1, norm_place="both", norm_offset=True, logit_cap=2.0, score_cap=1.5,
                  windows=(2,), activation="gelu_tanh", qk_norm="none"),
}  # fmt: skip

ABSENT = {
    "post-norm": {"O33"},
    "gpt2": {"O8", "O35"},
    "gemma": {"O8", "O16", "O32"},
}
"""What they do not have: an untied head without a cap, scale-free weights, shifts, groups."""


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] if n == "gemma" else []) for n in MODELS]
)
def test_every_identity_is_proved(name: str) -> None:
    """To thirty digits, where it occurs."""
    found = of(*small(**MODELS[name]))
    assert {i for i, v in verdicts(found).items() if v != "proved"} == ABSENT[name]
    assert found.failed == ()
    assert all(f.digits >= 30 and f.places for f in found.findings if f.verdict == "proved")
    assert set(PROOFS) <= set(CHECKS)


def test_images_are_proved() -> None:
    one = ModelConfig(
        vocabulary=3, width=4, layers=1, heads=2, kv_heads=2, head_width=2, mlp_width=3,
        norm="layer", norm_bias=True, gated=False, rope_theta=None, activation="gelu",
        norm_place="pre", qk_norm="none", norm_eps=1e-5, causal=False, tied=False,
        image=Image(channels=1, height=2, width=2, patch=1), learned_positions=5, pool="cls",
    )  # fmt: skip
    rng = np.random.default_rng(0)
    model = rc.Model(one, {n: rng.normal(size=s) for n, s in one.parameter_shapes().items()})
    corpus = rc.Corpus(images=rng.normal(size=(1, 1, 2, 2)).astype(np.float32), labels=[1])
    seen = {i for i, v in verdicts(of(model, corpus)).items() if v == "proved"}
    others = {"P4", "O9", "O18"}
    assert seen == others | {"O8", "O14", "O15", "O16", "O29", "O32", "O34", "O36", "O37", "O41"}


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILY)
def test_every_family_is_proved(family: str) -> None:
    """Its tiny twin: what occurs in it is proved, and nothing is undecided."""
    _, made = read_config("x", json.dumps(PUBLISHED[FAMILY[family]]["config"]))
    made = replace(made, vocabulary=min(made.vocabulary, 11), layers=min(made.layers, 2),
                   windows=made.windows[:2], rotary=tuple(dict.fromkeys(made.rotary)))  # fmt: skip
    rng = np.random.default_rng(0)
    corpus = rc.Corpus(rng.integers(0, made.vocabulary, (2, 6)))
    if made.image is not None:
        shape = (1, made.image.channels, made.image.height, made.image.width)
        corpus = rc.Corpus(images=rng.normal(size=shape).astype(np.float32), labels=np.array([1]))
    found = verdicts(of(rc.Model(made, random_parameters(made, 1)), corpus, 6))
    assert set(found.values()) <= {"proved", "left out"}
    assert list(found.values()).count("proved") >= 10


@pytest.mark.slow
def test_packed_padded_and_partly_labelled_sequences_are_proved() -> None:
    one = case(1, batch=2, length=9, layers=1)
    model, t = rc.Model(one.config, one.parameters), np.arange(9)
    mask = t < np.array([[6], [9]])
    segments = np.array([[0] * 3 + [1] * 6, [0] * 9])
    labels = np.where(mask & (t % 3 != 1), (one.token + 1) % 7, -1)
    for corpus in (
        rc.Corpus(one.token, mask=mask),
        rc.Corpus(one.token, mask=mask, segments=segments),
        rc.Corpus(one.token, labels, mask, segments),
        rc.Corpus(one.token, np.where(t == 8, one.token, -1)),
        rc.Corpus(one.token[:, :1], one.token[:, 1:2]),
    ):
        found = verdicts(of(model, corpus, 9))
        assert set(found.values()) <= {"proved", "left out"}, found
        assert {"O14", "O15", "O16", "O34"} <= {i for i, v in found.items() if v == "proved"}


# ------------------------------------------------------------------ planted


def off(x: Any) -> Any:
    """1e-25 too large: far below what float64 could see."""
    return x + x * 1e-25


def factor(name: str, which: int) -> tuple[str, Callable[..., Any]]:
    """A layer function of which one result is wrong by a factor."""
    right = getattr(BALLS, name)

    def wrong(*args: Any) -> tuple[Any, ...]:
        made = list(right(*args))
        made[which] = off(made[which])
        return tuple(made)

    return name, wrong


PLANTED: dict[str, tuple[str, int, set[str]]] = {
    "the slopes of the loss": ("cross_entropy", 1, {"O9", "O15", "O41"}),
    "the nats": ("cross_entropy", 0, {"O15", "O41"}),
    "the gradient below a norm": ("rms_norm_backward", 0, {"O15", "O34"}),
    "the gradient of a gate": ("mlp_backward", 0, {"O15", "O36"}),
    "the gradient of up": ("mlp_backward", 1, {"O15", "O36"}),
    "the gradient of queries": ("attention_backward", 0, {"O15"}),
}
"""What is wrong, and the identities that must say so; others may."""


@pytest.mark.parametrize(
    "what",
    [pytest.param(n, marks=[pytest.mark.slow] if k % 3 else []) for k, n in enumerate(PLANTED)],
)
def test_a_wrong_factor_is_caught(what: str) -> None:
    """Though all of float64's identities hold of it."""
    name, which, ids = PLANTED[what]
    with planted(BALLS, *factor(name, which)):
        found = of(*small(layers=1))
    assert ids <= set(found.failed)
    worst = {f.id: f.digits for f in found.findings}
    assert all(worst[i] == -math.inf for i in found.failed)


RIGHT = BALLS.attention_backward


def leaking(*args: Any) -> tuple[Any, ...]:
    """Gradients of queries, of which 1e-25 reaches the position after them."""
    d_q, *rest = RIGHT(*args)
    return d_q + np.concatenate([d_q[:, -1:], d_q[:, :-1]], axis=1) * 1e-25, *rest


def wrong_values(A: Any, X: Any) -> Any:
    """An eigenvalue that is 1e-25 too large."""
    one = enclose(A, X)
    return replace(one, values=off(one.values))


@pytest.mark.parametrize(
    ("where", "name", "wrong", "id"),
    [
        (BALLS, "attention_backward", leaking, "O38"),
        (proved, "enclose", wrong_values, "P4"),
        (proved, "_trace", lambda S: off((S * exact(np.eye(len(S)))).sum()), "O18"),
        (proved, "hessian_product", lambda *a: off(hessian_product(*a)), "O9"),
    ],
    ids=["O38", "P4", "O18", "O9"],
)
def test_a_wrong_side_is_caught(where: Any, name: str, wrong: Any, id: str) -> None:
    with planted(where, name, wrong):
        assert id in of(*small(layers=1)).failed


def test_an_identity_with_a_wrong_factor_is_caught(capsys, tmp_path) -> None:
    """By the command, with status 1, and its text names it."""

    def wrong(run: Any) -> Any:
        """Something is twice what it is."""
        for one in proved.head_slopes_by_label(run):
            yield Equal(one.where, one.left, off(one.right), one.size)

    model, corpus = small(layers=1)
    files = [str(tmp_path / "w.h5"), str(tmp_path / "c.h5")]
    rc.save(model, files[0])
    rc.save_corpus(corpus, files[1])
    table = MappingProxyType({"O41": wrong, "O16": PROOFS["O16"]})
    with mock.patch.object(proofs, "PROOFS", table), mock.patch.object(judge, "CHECKS", {}):
        assert main(["audit", *files, "--certify", "--json", str(tmp_path / "a.json")]) == 1
    said, told = capsys.readouterr().out, json.loads((tmp_path / "a.json").read_text())
    assert said.startswith("certify: to be proved are 2 of 2 identities, over ")
    assert "FAIL O41: Something is twice what it is. Proved to be otherwise: head" in said
    assert "1 of 2 identities proved" in said and max(map(len, said.splitlines())) <= 100
    assert told["failed"] == ["O41"] and told["proofs"]["findings"][0]["digits"] == "differ"


def test_a_run_is_of_its_blocks_and_its_directions() -> None:
    """Where nothing is rotated, at position 0, keys' gradients are those of the layer."""
    one = case(batch=1, length=3, qk_norm="none", norm_place="pre")
    label = (one.token + 1) % one.config.vocabulary
    with bits(100):
        few = Few(one.token, one.layout, label, label >= 0)
        run = Enclosure(one.config, one.parameters, few)
        for i in range(one.config.layers):
            g: Any = run.plain.taps[f"blocks.{i}.attn.k"].g
            assert run.plain.keys[i][:, 0].reshape(-1).overlaps(g[:, 0].reshape(-1)).all()
        u, v = (run.direction(n)["embed.weight"].rounded() for n in (0, 1))
    assert one.config.layers > 1 and (u != v).any() and (u == v).any()


def test_digits_are_of_the_terms() -> None:
    one = exact(np.array([1.0, 0.0]))
    with bits(100):
        third = one / 3
        assert 28 < equal("x", third * 3, one).digits(0) < 31
        assert equal("x", one, one).digits(0) == math.inf
        assert equal("x", one, one + 1e-20 * one).digits(0) == -math.inf
        nothing, small = exact(np.zeros(1)), third[:1] * 3 - 1
        assert equal("x", nothing, None).digits(0) == math.inf
        assert equal("x", small, None).digits(0) == 0 and equal("x", small, None).digits(1) > 28
        assert equal("x", small, None, one).digits(0) > 28
        assert equal("x", one / nothing, None).digits(1) == 0
        tiny = one[:1]
        for _ in range(4):
            tiny = tiny * 2.0**-300  # below float64: a bound of its size is 0 there, and it is not
        assert equal("x", tiny, tiny).digits(1) == math.inf
        assert equal("x", tiny, 2 * tiny).digits(1) == equal("x", tiny, None).digits(1) == -math.inf
        assert equal("x", tiny * third[:1] * 3, tiny).digits(1) == 0


def test_it_is_said_from_what_digits_count() -> None:
    """Of gradients that are 0 by theory, from others; where there is none, from the head's."""
    found = rc.audit(*small(layers=1), certify=True, seconds=1e6)
    of = {f.id: f.counted for f in found.proofs.findings}
    assert of["O31"] == proved.OTHERS and of["O16"] == of["O34"] == ""
    one = case(batch=1, length=1, layers=1)
    short = rc.audit(rc.Model(one.config, one.parameters),
                                rc.Corpus(one.token, one.token), certify=True)  # fmt: skip
    of_scale = {f.id: f.counted for f in short.proofs.findings}
    assert of_scale["O31"] == of_scale["O32"] == "the head's output gradients"
    said = format_audit(short.to_json())
    assert "those of O9, O31, O32, O34, which may all be 0, from the largest of the head's" in said
    assert "those of" not in format_audit({**short.to_json(), "proofs": None})


def test_what_is_too_small_for_float64_is_not_proved_by_it() -> None:
    """Where all terms lie below float64, no digit of them is known by its bounds."""
    one = case(batch=1, length=3, layers=1)
    model = rc.Model(one.config, {name: x * 1e-200 for name, x in one.parameters.items()})
    found = rc.audit(model, rc.Corpus(one.token), certify=True).proofs
    undecided = {f.id for f in found.findings if (f.verdict, f.digits) == ("undecided", 0.0)}
    assert undecided >= {"O8", "O15", "O29", "O39"} and not found.failed


# ------------------------------------------------------------------ what fits


def test_what_does_not_fit_is_named() -> None:
    """Less time: fewer positions, then no products; less memory: nothing."""
    config = case(layers=2, width=64, mlp_width=64, vocabulary=64, heads=4, head_width=16).config
    with mock.patch.object(proofs._Cost, "measured", lambda: proofs._Cost(1e-6, 1e-8, 1e-6)):
        fits = {s: proofs.plan_proofs(config, 64, 2**32, s) for s in (1e6, 40, 20, 8, 3, 0.1)}
        full = fits[1e6]
        tight = proofs.plan_proofs(config, 64, 4.5 * 250 * 1e5, 1e6)
    assert full.width == 64 and full.ids == tuple(PROOFS) and not full.left_out
    widths = [one.width for one in fits.values()]
    assert widths[-1] == 0 and not fits[0.1].ids and set(fits[0.1].left_out) == set(PROOFS)
    assert all(one.seconds <= limit for limit, one in fits.items())
    assert len(set(widths)) > 3
    for one in (*fits.values(), tight):
        assert set(one.ids) | set(one.left_out) == set(PROOFS)
        assert not set(one.ids) & set(one.left_out)
    assert {*full.ids} - {*tight.ids} == {"O9", "O14", "O15"}
    assert "GiB" in tight.left_out["O14"] and "nothing fits" in str(fits[0.1])
    assert str(full).startswith(
        f"certify: to be proved are {len(PROOFS)} of {len(PROOFS)} identities, over 64"
    )


def test_too_few_bits_are_raised_and_a_kink_is_not_decided() -> None:
    """A ReLU at 0 has two slopes, whatever the bits: nothing is proved, nothing fails."""
    model, corpus = small(layers=1)
    planned = bench_plan(model.config, corpus, 2**32)
    bench = prepare(model.config, model.parameters, corpus, planned, 0)
    fits = proofs.plan_proofs(model.config, planned.width, 2**32, 1e6)
    one = replace(fits, width=3, bits=64, ids=("O16", "O34"))
    found = proofs.prove(bench, replace(one, left_out=dict.fromkeys(set(PROOFS) - {*one.ids}, "")))
    assert found.bits == 256 and verdicts(found)["O34"] == "proved"
    short = proofs.prove(bench, replace(one, given=0.0, left_out=found.plan.left_out))
    assert short.bits == 64 and verdicts(short)["O34"] == "undecided" and short.failed == ()


def test_without_flint_it_is_one_line(capsys, tmp_path) -> None:
    model, corpus = small(layers=1)
    files = [str(tmp_path / "w.h5"), str(tmp_path / "c.h5")]
    rc.save(model, files[0])
    rc.save_corpus(corpus, files[1])
    with mock.patch.object(balls, "flint", None):
        assert main(["audit", *files, "--certify"]) == 2
    said = capsys.readouterr().err
    assert "pip install 'refcurv[certified]'" in said and len(said.splitlines()) == 1
    assert main(["audit", *files, "--certify", "--seconds", "-1"]) == 2
    assert "seconds" in capsys.readouterr().err
    with mock.patch.object(judge, "CHECKS", {}):
        assert main(["audit", *files, "--certify", "--seconds", "0"]) == 0
    said = capsys.readouterr().out
    assert (
        said.startswith("certify: nothing fits") and f"0 of {len(PROOFS)} identities proved" in said
    )
    assert "s are needed: " in said
