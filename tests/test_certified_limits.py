"""What a certificate would take is said before; what cannot be had is one line that says why."""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest
from strategies import case, config, random_parameters

import refcurv as rc
from refcurv.certified import certify as driver
from refcurv.certified import estimate, spectra
from refcurv.certified.certify import certify
from refcurv.certified.estimate import Estimate, span
from refcurv.cli import main
from refcurv.law.checks import NonFiniteError, RangeError, RefcurvError, RoomError
from refcurv.report.certificate import format_certificate


def small(**changes: Any) -> tuple[rc.Model, rc.Corpus]:
    one = case(**(dict(batch=2, length=4, layers=1) | changes))
    return rc.Model(one.config, one.parameters), rc.Corpus(one.token, one.label)


def told(of: list[str], **more: Any) -> Estimate:
    """The estimate alone, of a clock that takes a second for whatever it times."""
    seen: list[Estimate] = []
    clock = mock.patch.object(time, "perf_counter", count(0).__next__)
    with clock, pytest.raises(RangeError, match="it would take about"):
        certify(*small(), of, seconds=0, estimate=seen.append, **more)
    return seen[0]


def test_what_takes_too_long_is_refused_before_the_work() -> None:
    def never(*_: Any) -> None:
        raise AssertionError

    with mock.patch.object(driver, "_with_enough", never), pytest.raises(RangeError) as refused:
        certify(*small(), seconds=1e-6)
    said = str(refused.value)
    assert "\n" not in said and "bits" in said and said.endswith("What would fit: nothing of it.")


def test_what_would_fit_is_said() -> None:
    one = Estimate(300, 100.0, 2.0**30, 4, 0, {"nats": 8.0, "hvp": 90.0}, {1: 40.0, 2: 60.0, 3: 80})
    assert one.fits(62) == "2 of the 4 sequences; or nats alone; or 2 digits."
    assert one.fits(30) == "1 of the 4 sequences; or nats alone."
    assert one.fits(9) == "nats alone." and one.fits(1) == "nothing of it."
    assert one.text == "300 bits: about 100 s and 1.0 GiB"
    only = Estimate(300, 100.0, 2.0**30, 1, 0, {"nats": 100.0}, {})
    assert only.fits(99) == "nothing of it."


def test_what_is_kept_of_each_sequence_is_counted() -> None:
    """Thirty digits of a number are three floats and a radius, 32 bytes; A is kept once."""
    for of, numbers in (("nats", 4), ("logits", 4 * 7), ("A", 0)):
        one, two = (told([of], sequences=range(n)).memory for n in (1, 2))
        assert two - one == 32 * numbers


def test_what_comes_out_is_what_was_counted() -> None:
    of = ("logits", "nats", "gradient", "ggnvp", "hvp", "A", "G", "fisher", *spectra.OF)
    with mock.patch.object(estimate, "_memory", wraps=estimate._memory) as asked:
        found = certify(*small(), of, layers="**.up", rho=0.5, digits=1)
    task, (one,) = asked.call_args.args[0], asked.call_args.args[1].values()
    assert {name.partition(".")[0] for name in found} == {*of}
    for name in of:
        own = estimate._numbers(task, (name,), one.label_BT.size)
        joint = estimate._numbers(task, (name,), shared=True)
        kinds = spectra.with_moments((name,))
        came = sum(x.radius.size for n, x in found.items() if n.partition(".")[0] in kinds)
        assert own + joint == came, name
    assert estimate._forwards(task, one, ("logits",)) == 1


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.0123, "0.012 s"), (119, "119 s"), (121, "2 min"), (86400 * 3, "3 days")],
)
def test_times_are_read(seconds: float, text: str) -> None:
    assert span(seconds) == text


def test_an_estimate_is_near_what_it_takes() -> None:
    """Within a factor of eight of a core's time; here milliseconds and caches tell little."""
    seen: list[Estimate] = []
    begin = time.process_time()
    with mock.patch.object(time, "perf_counter", time.process_time):
        certify(*small(), ["gradient", "G"], sequences=[0, 1], estimate=seen.append)
    took = time.process_time() - begin
    assert took / 8 < seen[0].seconds < took * 8


def test_estimates_grow_with_what_is_asked_for() -> None:
    nats, more = told(["nats"]), told(["nats", "gradient", "hvp"])
    assert more.seconds > nats.seconds and more.memory > nats.memory and more.bits > nats.bits
    assert {*more.each} == {"nats", "gradient", "hvp"} and more.each["hvp"] > more.each["nats"]
    assert nats.passes == 0
    twice = told(["nats"], sequences=[0, 1])
    assert twice.sequences == 2 and twice.seconds == pytest.approx(2 * nats.seconds)
    expected = told(["G"], fisher="expected")
    assert expected.passes == 3 * 7 and "21 backward passes a sequence" in expected.text
    assert expected.seconds > 5 * told(["G"]).seconds
    dense = told(["hessian"], layers="blocks.0.attn.k")
    assert dense.seconds > 10 * told(["hvp"]).seconds


def test_what_does_not_fit_is_refused_before_the_work() -> None:
    with (
        mock.patch.object(estimate, "available", lambda: 1000),
        pytest.raises(
            RoomError, match=r"it would need about .* GiB with .* bits; 0.0 GiB are free"
        ),
    ):
        certify(*small(), ["nats"])
    with mock.patch.object(estimate, "available", lambda: None):
        assert certify(*small(), ["nats"], digits=2).digits >= 2


# ------------------------------------------------------------------ where balls lose


def blown(change: Callable[[dict[str, np.ndarray]], None], **changes: Any) -> tuple[Any, Any]:
    made = config(**(dict(layers=2, norm_eps=0.0, qk_norm="none", norm_place="pre") | changes))
    parameters = random_parameters(made, 0)
    change(parameters)
    return rc.Model(made, parameters), rc.Corpus(np.array([[1, 2, 3]]))


def cancelled(parameters: dict[str, np.ndarray]) -> None:
    """The stream behind block 0 is 0, for all that balls know: its norm divides by it."""
    for name in ("blocks.0.attn.o.weight", "blocks.0.mlp.down.weight"):
        parameters[name][:] = 0
    parameters["embed.weight"][:] = 0


def test_what_balls_lose_is_named() -> None:
    """The norm of a vector of zeros: the operation, and the parameter that was read before it."""
    given = blown(cancelled)
    with (
        mock.patch.object(driver, "MOST_BITS", 130),
        pytest.raises(NonFiniteError, match=r"in `rms_norm_forward` behind 'blocks.0.attn_norm"),
    ):
        certify(*given, ["nats"])


def test_a_gradient_without_a_digit_is_named() -> None:
    """A vocabulary of one: p is 1, and every gradient 0. It is where p − 1 is taken."""
    model, corpus = small(vocabulary=1)
    with mock.patch.object(driver, "MOST_BITS", 200):
        found = certify(model, corpus, ["gradient"])
    assert not found.digits and found.source["lost"].startswith("in `cross_entropy` behind 'head")


@pytest.mark.parametrize(
    ("precision", "where"),
    [(34, "in the backward, at the output gradient of 'blocks.0.attn.v'"), (42, "in gradient.0.")],
)
def test_the_layer_of_a_backward_is_named(precision: int, where: str) -> None:
    """With so few bits logits are known, and gradients further down are not."""
    with mock.patch.object(driver, "MOST_BITS", precision):
        found = certify(*small(layers=2), ["logits", "gradient"], digits=5)
    assert found["logits.0"].digits() > 0 and found.source["lost"].startswith(where)
    assert f"Digits are lost {where}" in format_certificate(found.to_json())


# ------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    "more",
    [
        dict(of=None), dict(of=5), dict(of=[None]), dict(of=[["nats"]]), dict(of=["Nats"]),
        dict(digits=None), dict(digits=float("nan")), dict(digits="x"), dict(digits=[30]),
        dict(digits=1j), dict(sequences=None), dict(sequences="0"), dict(sequences=[None]),
        dict(sequences=[float("nan")]), dict(sequences=1.5), dict(layers=None), dict(layers=3),
        dict(layers=["head"]), dict(rows=None), dict(rows=1), dict(fisher=None), dict(seed=None),
        dict(seed=1.5), dict(seconds="x"), dict(seconds=float("nan")), dict(seconds=-1),
        dict(seconds=[1]), dict(direction=5), dict(direction=[1]), dict(direction="head.weight"),
        dict(direction={"head.weight": None}), dict(direction={"head.weight": "x"}),
        dict(direction={"head.weight": [[1], [2, 3]]}), dict(direction={1: np.ones(2)}),
        dict(direction={"head.weight": np.full((7, 8), 1j)}),
        dict(direction={"head.weight": np.full((7, 8), np.nan)}),
        dict(direction={"head.weight": np.ones((8, 7))}),
    ],
    ids=str,
)  # fmt: skip
def test_what_cannot_be_asked_for_is_one_line(more: dict[str, Any]) -> None:
    with pytest.raises(RefcurvError) as refused:
        certify(*small(), **({"of": ["hvp"]} | more))
    assert "\n" not in str(refused.value) and str(refused.value)


def test_an_estimate_knows_which_layers_are_edited() -> None:
    """W' is of rho's layers alone, in seconds and in numbers."""
    of = ["eigenvalues", "edit"]
    one, every = (told(of, rho=rho, digits=5) for rho in ({"blocks.0.mlp.up": 0.5}, 0.5))
    assert one.each["edit"] < every.each["edit"] and one.memory < every.memory
    assert one.each["eigenvalues"] == every.each["eigenvalues"] and one.seconds < every.seconds
    config, some = case(layers=1).config, ("head", "blocks.0.mlp.up")
    tasks: Any = [
        SimpleNamespace(config=config, wanted=some, rho=dict.fromkeys(n, 1))
        for n in (some[:1], some)
    ]
    work = estimate._spectra
    assert work(tasks[0], ("edit",), 3) < work(tasks[1], ("edit",), 3)
    assert work(tasks[0], ("cut",), 3) == work(tasks[1], ("cut",), 3)


def test_the_command_says_what_it_will_take(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, corpus = small()
    weights, texts = str(tmp_path / "w.h5"), str(tmp_path / "c.h5")
    rc.save(model, weights)
    rc.save_corpus(corpus, texts)
    asked = ["certify", weights, texts, "--of", "nats", "--digits", "5"]
    assert main(asked) == 0
    assert " bits: about " in capsys.readouterr().out.splitlines()[0]
    assert main([*asked, "--minutes", "1e-9"]) == 2
    both = capsys.readouterr()
    assert " bits: about " in both.out and "What would fit: " in both.err
    assert len(both.err.strip().splitlines()) == 1
    for bad in (["--minutes", "nan"], ["--minutes", "-1"], ["--fisher", "x"], ["--of", "hessiann"]):
        assert main([*asked, *bad]) == 2
        assert len(capsys.readouterr().err.strip().splitlines()) == 1
