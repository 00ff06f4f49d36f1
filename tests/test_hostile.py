"""What a stranger gives to `certify`, `trace` and `validate` is refused in one sentence, or works.

Wrong types, sequences that are none, certificates that are none, corpora without a label.
"""

from __future__ import annotations

import inspect
import json
import os
import signal
import tempfile
from functools import cache
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import config, few, random_parameters

import refcurv as rc
from refcurv.algebra import balls
from refcurv.algebra.balls import exact
from refcurv.certified.certificate import Enclosed
from refcurv.cli import main
from refcurv.evaluation.intervals import bootstrap
from refcurv.evaluation.metrics import ndcg_of_ids, perplexity, top_ids
from refcurv.files import store
from refcurv.files.disk import alone
from refcurv.judge.cases import make_cases, making
from refcurv.law.checks import DTypeError, EmptyError, SchemaError, ShapeError
from refcurv.report.certificate import format_certificate
from refcurv.report.folder import prepare


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model, a corpus, one without a label, and a trace."""
    at, made = tmp_path_factory.mktemp("hostile"), config(layers=1)
    tokens = np.random.default_rng(0).integers(0, made.vocabulary, (6, 5))
    rc.save_corpus(rc.Corpus(tokens), at / "c.h5")
    rc.save_corpus(rc.Corpus(tokens[:, :1]), at / "single.h5")
    rc.save(rc.Model(made, random_parameters(made, 3)), at / "w.h5")
    assert main(["trace", *map(str, (at / "w.h5", at / "c.h5")), "-o", str(at / "t.h5")]) == 0
    return at


@pytest.fixture
def setting(folder):
    return rc.load(folder / "w.h5"), rc.load_corpus(folder / "c.h5")


@pytest.fixture
def command(folder, monkeypatch, capsys):
    """Runs a command in the folder; its status, and all that it says."""
    monkeypatch.chdir(folder)

    def run(*arguments):
        try:
            status = main([*arguments])
        except SystemExit as end:  # argparse
            status = end.code
        seen = capsys.readouterr()
        assert "Traceback" not in seen.err and "bug of refcurv" not in seen.err
        return status, seen.out + seen.err

    return run


# ------------------------------------------------------------------ arguments


def test_a_path_is_no_model_and_no_corpus(folder, setting):
    """A reference may be a path, so that a stranger gives one in a model's place."""
    model, corpus = setting
    path = folder / "w.h5"
    theirs = {"blocks.0.mlp.up": (np.eye(8), np.eye(8), 1)}
    for call in (
        lambda: rc.certify(path, corpus, ["nats"]),
        lambda: rc.trace(str(path), corpus),
        lambda: rc.first_divergence({}, path, corpus),
        lambda: rc.validate(theirs, model=path, corpus=corpus),
    ):
        with pytest.raises(rc.RefcurvError, match=r"such as rc\.load\(path\); got (str|PosixPath)"):
            call()
    for call in (
        lambda: rc.certify(model, path, ["nats"]),
        lambda: rc.trace(model, None),
        lambda: rc.first_divergence({}, model, path),
        lambda: rc.validate(theirs, model=model, corpus=path),
    ):
        with pytest.raises(rc.RefcurvError, match=r"such as rc\.load_corpus\(path\)"):
            call()


@pytest.mark.parametrize("wrong", [[0.5], ["0"], [True], [None], [[0]], 0.5, None, [6], [-1], []])
def test_sequences_are_whole_numbers_in_range(wrong, setting):
    """0.5 is no sequence; certify took it for 0, and a name in a list was a bug of refcurv."""
    model, corpus = setting
    for call in (
        lambda: rc.certify(model, corpus, ["nats"], sequences=wrong),
        lambda: rc.trace(model, corpus, wrong),
        lambda: rc.first_divergence({"labels": np.zeros((1, 5), int)}, model, corpus, wrong),
    ):
        with pytest.raises(rc.RefcurvError, match="sequence"):
            call()


def test_other_arguments_of_wrong_types(setting, folder):
    model, corpus = setting
    factors = rc.collect(model, corpus, "blocks.0.mlp.up")
    for wrong in (None, 1):
        with pytest.raises(rc.RefcurvError, match="must name some of"):
            rc.certify(model, corpus, wrong)
        with pytest.raises(rc.RefcurvError, match="arithmetic must be a text"):
            rc.validate(factors, factors, arithmetic=wrong)
    assert rc.validate(factors, factors, accept="float32").accepted == ("float32",)


WRONG = {
    "none": None, "flag": True, "zero": 0, "five": 5, "negative": -1, "half": 0.5, "nan": np.nan,
    "complex": 1j, "text": "x", "no text": "", "bytes": b"x", "list": [1], "no list": [],
    "ragged": [[1], [1, 2]], "texts": ["x", None], "set": {1}, "tuple": (1, "x"), "map": {"x": 1},
    "map of numbers": {1: 2}, "map of none": {None: None}, "array": np.ones((2, 3)),
    "array of objects": np.array([None, "x"]), "no array": np.zeros(0), "path": Path("nowhere"),
    "function": lambda *_: None, "type": int, "object": object(),
}  # fmt: skip
"""What a stranger may give in the place of any argument."""


@cache
def calls():
    """Function → right arguments, by name; every argument that it has."""
    made = config(layers=1, width=4, head_width=2, mlp_width=3)
    tokens = np.random.default_rng(0).integers(0, made.vocabulary, (3, 4))
    model, corpus = rc.Model(made, random_parameters(made, 3)), rc.Corpus(tokens)
    own = {"model": model, "corpus": corpus}
    factors = rc.collect(model, corpus, "**", "empirical")
    passed = dict(rc.trace(model, corpus, fisher="empirical").tensors)
    right = {
        rc.validate: {"theirs": factors, "reference": factors, **own},
        rc.trace: own,
        rc.first_divergence: {"theirs": passed, **own},
        make_cases: {**own, "folder": Path(tempfile.gettempdir()) / "refcurv-no-such-set"},
        rc.estimators.reduce: own,
        rc.estimators.ekfac: {**own, "bases": rc.decompose(factors), "per": "token"},
    }
    return {f: dict.fromkeys(inspect.signature(f).parameters) | given for f, given in right.items()}


def refused_or_works(function, argument, wrong):
    """Whatever is given, it is refused in one line, or it works."""
    names = inspect.signature(function).parameters
    own = {k: v for k, v in calls()[function].items() if v is not None}
    assert argument in names
    if argument == "progress" and callable(wrong):
        return  # it is called, and what it raises is its own
    with mock.patch.object(making, "truth", side_effect=EmptyError("here the work begins")):
        try:
            function(**{**own, argument: wrong})
        except rc.RefcurvError as error:
            assert str(error) and "\n" not in str(error) and len(str(error)) < 1000


ARGUMENTS = [
    (f, name)
    for f in (rc.validate, rc.trace, rc.first_divergence, make_cases,
              rc.estimators.reduce, rc.estimators.ekfac)
    for name in inspect.signature(f).parameters
]  # fmt: skip


@few(100)
@given(st.sampled_from(ARGUMENTS), st.sampled_from(sorted(WRONG)))
def test_arguments_of_any_type_are_refused_in_one_line(at, wrong):
    """A TypeError of NumPy says nothing to who gave `names=3`."""
    refused_or_works(*at, WRONG[wrong])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("function", "argument"), ARGUMENTS, ids=lambda x: getattr(x, "__name__", x)
)
def test_every_argument_of_any_type_is_refused_in_one_line(function, argument):
    for wrong in WRONG.values():
        refused_or_works(function, argument, wrong)


@pytest.mark.parametrize("name", ["certify", "trace", "validate"])
def test_sequences_read_alike_in_every_command(name, command):
    one = {
        "certify": ("certify", "w.h5", "c.h5", "--of", "nats", "--digits", "5"),
        "trace": ("trace", "w.h5", "c.h5", "-o", "o.h5"),
        "validate": ("validate", "--trace", "t.h5", "--model", "w.h5", "--corpus", "c.h5"),
    }[name]
    if name != "validate":
        assert command(*one, "--sequences", "0-1", "3")[0] == 0
    for text in ("9", "0-9", "0-999999999999"):  # the last was out of memory
        status, said = command(*one, "--sequences", text)
        assert status == 2 and "does not exist; the corpus has 6" in said
    assert "must not be above" in command(*one, "--sequences", "3-1")[1]


def test_names_after_a_comma_may_have_a_space(command):
    assert command("certify", "w.h5", "c.h5", "--of", "nats, logits", "--digits", "5")[0] == 0


# ------------------------------------------------------------------ corpora, and many digits


def test_without_a_label_only_logits_are_certified(command):
    status, said = command("certify", "w.h5", "single.h5", "--of", "logits,A")
    assert status == 2 and "A and G of these sequences have no row" in said
    assert command("certify", "w.h5", "single.h5", "--of", "logits")[0] == 0
    status, said = command("trace", "w.h5", "single.h5", "-o", "o.h5", "--sequences", "0-1")
    assert status == 2 and "no position of sequences [0, 1] has a label" in said


def test_a_product_of_no_rows_is_zero():
    """Of a sequence without a label, beside others that have some."""
    none = exact(np.zeros((0, 3)))
    assert (none.T @ none).rounded().tolist() == np.zeros((3, 3)).tolist()


def test_weights_that_are_huge_are_named_for_what_overflows(setting):
    """It printed an object, and called its dtype the range that was left."""
    model, corpus = setting
    huge = {name: np.full_like(x, 1e200) for name, x in model.parameters.items()}
    found = rc.certify(model.with_parameters(huge), corpus, ["nats"], digits=5)
    assert found.digits >= 5
    assert {one.dtype for one in found.routes if np.isinf(one.error)} >= {"float64", "float32"}


def test_digits_have_no_ceiling_of_numpy(setting):
    """A ufunc has at most 64 operands; 63 parts and a radius are 64."""
    model, corpus = setting
    found = rc.certify(model, corpus, ["nats"], digits=200)
    assert found.digits >= 200
    wide = balls.exact(np.array([1])) / 3
    assert len(wide.split(63)) == 64


# ------------------------------------------------------------------ files


def test_files_say_which_model_and_corpus_they_are_of(folder, setting):
    """The provenance of every file has its inputs; that of these two had none."""
    model, corpus = setting
    rc.save_certificate(rc.certify(model, corpus, ["nats"], digits=5), folder / "cert.h5")
    wanted = {"w.h5": model.source["sha256"], "c.h5": corpus.source["sha256"]}
    for name in ("cert.h5", "t.h5"):
        assert store.open_file(folder / name).provenance["inputs"] == wanted
    assert rc.load_certificate(folder / "cert.h5").source["inputs"] == wanted


def test_a_damaged_trace_is_not_judged(folder, command):
    data = bytearray((folder / "t.h5").read_bytes())
    number = store.read(store.open_file(folder / "t.h5"), "logits").reshape(-1)[3].tobytes()
    at = data.index(number)
    data[at] ^= 1
    (folder / "damaged.h5").write_bytes(data)
    status, said = command(
        "validate", "--trace", "damaged.h5", "--model", "w.h5", "--corpus", "c.h5"
    )
    assert status == 2 and "logits" in said


P, R = np.array([[1.0, 2.0, 3.0], [0.0, 1e-17, 0.0]]), np.full(3, 1e-30)
GOOD = {"nats.0.parts": P, "nats.0.radius": R}
ATTRIBUTES = {
    "bits": 100,
    "wanted": 10.0,
    "rows": "{}",
    "source": "{}",
    "routes": '[["nats.0", "float64", "1e-16"]]',
}


def written(path, arrays=GOOD, **attributes):
    store.write(
        path,
        format="refcurv-certificate",
        attributes={k: x for k, x in {**ATTRIBUTES, **attributes}.items() if x is not None},
        arrays=(store.Entry(name, x) for name, x in arrays.items()),
        provenance=store.provenance(inputs={}),
    )
    return path


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({**GOOD, "nats.0.radius": R * np.nan}, "negative or NaN"),
        ({**GOOD, "nats.0.radius": -R}, "negative or NaN"),
        ({**GOOD, "nats.0.radius": R.astype("f4")}, "both are float64"),
        ({**GOOD, "nats.0.parts": P.astype(int)}, "both are float64"),
        ({**GOOD, "nats.0.parts": P[:0]}, r"parts \(0, 3\)"),
        ({**GOOD, "nats.0.parts": P[::-1]}, "half an ulp"),
        ({**GOOD, "nats.0.parts": P + 1e308}, "half an ulp"),
        ({"nats.0.parts": P}, "it holds parts"),
        ({"nats.0.radius": R}, "it holds radius"),
        ({**GOOD, "other": R}, "it holds other"),
    ],
)
def test_arrays_that_are_no_certificate_are_refused(arrays, words, tmp_path):
    with pytest.raises(SchemaError, match=words):
        rc.load_certificate(written(tmp_path / "c.h5", arrays))


@pytest.mark.parametrize("key", ATTRIBUTES)
def test_attributes_that_are_no_certificate_are_refused(key, tmp_path):
    """Whatever loads can also be printed."""
    wrong = [None, "null", "[1]", '"text"', "[" * 5000, float("nan"), -1, "1e999"]
    if key == "routes":
        one = ("nats.0", "float64", "1")
        for at, bad in ((0, "other"), (1, "int8"), (1, 2), (2, "nan"), (2, "-1"), (2, None)):
            wrong.append(json.dumps([[*one[:at], bad, *one[at + 1 :]]]))
        long = (*one, "1", None, "2")
        for at, bad in ((3, None), (3, "nan"), (4, "-1"), (5, "x")):
            wrong.append(json.dumps([[*long[:at], bad, *long[at + 1 :]]]))
        wrong.append(json.dumps([long[:5]]))
    for bad in wrong:
        with pytest.raises(SchemaError, match="attribute of the certificate"):
            rc.load_certificate(written(tmp_path / "c.h5", **{key: bad}))


SPECTRUM = dict(size=4, zeros=1, unsure=0, clusters=0, fewest=3.5, median=4.0, angle=1e-9)
CUT = dict(rho=0.5, pairs=4, kept=1, cut=3, undecided=0, nearest=0, float64=None)


@pytest.mark.parametrize(("key", "good"), [("spectra", SPECTRUM), ("cuts", CUT)])
def test_what_is_told_of_spectra_and_cuts_is_checked(key, good, tmp_path):
    """Whatever loads can also be printed; a file without them loads, as older ones have none."""
    assert rc.load_certificate(written(tmp_path / "c.h5")).spectra == {}
    read = rc.load_certificate(written(tmp_path / "c.h5", **{key: json.dumps({"A.x": good})}))
    assert getattr(read, key) == {"A.x": good} and format_certificate(read.to_json())
    wrong = [[1], 1, {"A.x": 1}, {"A.x": {}}, {"A.x": good | {"more": 1}}]
    wrong += [{"A.x": good | {name: bad}} for name in good for bad in ("x", -1, [1], float("nan"))]
    wrong += [{"A.x": good | {name: None}} for name in ("size", "kept", "median") if name in good]
    for bad in wrong:
        with pytest.raises(SchemaError, match="attribute of the certificate"):
            rc.load_certificate(written(tmp_path / "c.h5", **{key: json.dumps(bad)}))


def test_what_is_no_path_is_refused():
    for wrong in (None, 1, [1], b"x"):
        with pytest.raises(SchemaError, match="is no path"):
            rc.load_certificate(wrong)


def test_an_entry_that_is_not_there_has_no_text():
    one = Enclosed(P.reshape(2, 1, 3), R.reshape(1, 3))
    assert one.text((0, 1)).startswith("2.") and one.text() == one.text((0, 0))
    for wrong in ((0, 3), (-1, 0), (0,), 5, "ab", (0.0, 1.0), (True, 0), (0, 0, 0), None):
        with pytest.raises(rc.RefcurvError, match=r"no entry .* shape \(1, 3\)"):
            one.text(wrong)


def test_an_infinite_radius_is_said(tmp_path):
    found = rc.load_certificate(
        written(tmp_path / "c.h5", {**GOOD, "nats.0.radius": np.array([np.inf, 0, 0])})
    )
    assert found.digits == 0 and found["nats.0"].text() == "nothing is known"
    assert json.dumps(found.to_json(), allow_nan=False)


def test_what_the_caller_does_about_float_errors_changes_nothing(setting):
    """`np.seterr(all="raise")`: numbers that vanish are ordinary here."""
    model, corpus = setting

    def work():
        factors = rc.collect(model, corpus, "**")
        basis = rc.decompose(factors)
        edited, _ = rc.edit(model, basis, 0.5)
        short, _ = rc.truncate(model, {"blocks.0.mlp.up": 0.5})
        theirs = {name: (one.A, one.G, one.n_A) for name, one in factors.items()}
        assert rc.validate(theirs, factors).passed
        return [rc.logits(one, corpus.tokens).tobytes() for one in (model, edited, short)]

    with np.errstate(all="raise"):
        strict = work()
    assert strict == work()


# ------------------------------------------------------------------ pipes and shapes


@pytest.fixture
def in_time():
    """What waits longer than this waits for ever."""

    def late(*_):
        raise TimeoutError("it waits")

    old = signal.signal(signal.SIGALRM, late)
    signal.alarm(30)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, old)


CHECKPOINT = ("config.json", "model.safetensors", "model.safetensors.index.json")
PIPES = {
    "kronfluence": (["activation_covariance.safetensors"], "validate"),
    "kronfluence's sums of G": (["activation_covariance.safetensors",
                                 "gradient_covariance.safetensors"], "validate"),
    "bergson": (["activation_sharded/shard_0.safetensors"], "validate"),
    "bergson's total": (["activation_sharded/", "total_processed.pt"], "validate"),
    "the official code": (["kfac_factors_blk_0.pt"], "validate"),
    "a checkpoint for theirs": (["config.json"], "validate"),
    **{f"{name} of a checkpoint": ([*CHECKPOINT[:k], name], "convert")
       for k, name in enumerate(CHECKPOINT)},
    "an adapter": (["adapter_config.json"], "convert"),
    "a tokenizer": (["tokenizer.json"], "corpus"),
}  # fmt: skip
"""The last file of each is a pipe, the others are empty JSON, and folders end with a slash."""


@pytest.mark.parametrize("kind", PIPES)
def test_a_pipe_within_a_folder_is_refused(kind, tmp_path, folder, command, in_time):
    """It was waited for, until somebody writes to it."""
    (*others, pipe), which = PIPES[kind]
    at = tmp_path / "d"
    for name in (*others, pipe):
        (at / name).parent.mkdir(parents=True, exist_ok=True)
        if name.endswith("/"):
            (at / name).mkdir()
        elif name == pipe:
            os.mkfifo(at / name)
        else:
            (at / name).write_text("{}")
    (tmp_path / "x.txt").write_text("x")
    if which == "validate":
        model, corpus = rc.load(folder / "w.h5"), rc.load_corpus(folder / "c.h5")
        rc.save_factors(rc.collect(model, corpus, "blocks.0.mlp.up"), tmp_path / "f.h5")
    arguments = {
        "validate": (str(at), "--reference", str(tmp_path / "f.h5")),
        "convert": (str(at), str(tmp_path / "w.h5")),
        "corpus": (str(tmp_path / "x.txt"), "--tokenizer", str(at), "-o", str(tmp_path / "c.h5")),
    }[which]
    status, said = command(which, *arguments)
    assert status == 2 and said.startswith("refcurv: "), said
    assert said.count("\n") == 1, said


@pytest.mark.parametrize("shape", [[2**40, 0, 2**40], [0, 2**70], [2**62, 0]])
def test_a_shape_of_nothing_that_numpy_has_not_is_refused(shape, tmp_path, command):
    """It was a bug of refcurv: one length is 0, so that the others took no bytes."""
    header = {"blocks.0.mlp.up/A": {"dtype": "F32", "shape": shape, "data_offsets": [0, 0]}}
    data = json.dumps(header).encode()
    (tmp_path / "x.safetensors").write_bytes(len(data).to_bytes(8, "little") + data)
    status, said = command("validate", str(tmp_path / "x.safetensors"), "--reference", "w.h5")
    assert status == 2 and "has shape [" in said


@pytest.mark.parametrize("theirs", ["thesis", '{"mine": 1}', "3"])
@pytest.mark.parametrize("name", ["results.json", "controls.jsonl", "choice.jsonl", "e.json"])
def test_what_a_run_would_write_over_is_refused(name, theirs, tmp_path, folder, command):
    """A stranger's text was written over, and removed at the end."""
    path = tmp_path / f"{name}.unfinished"
    path.write_text(theirs)
    text = rc.Population([[1, 2, 3, 4]], [2], [4], "recite", "test")
    corpus = rc.load_corpus(folder / "c.h5")
    rc.save_corpus(rc.Corpus(corpus.tokens, populations={"p": text}), tmp_path / "c.h5")
    arguments = ["w.h5", str(tmp_path / "c.h5"), "--rho", "0.7", "--out", str(tmp_path)]
    which = "evaluate" if name == "e.json" else "report"
    if which == "evaluate":
        arguments = ["w.h5", str(tmp_path / "c.h5"), "--json", str(tmp_path / name)]
    status, said = command(which, *arguments)
    assert status == 2 and "where a run keeps what it knows" in said and said.count("\n") == 1
    assert path.read_text() == theirs


@pytest.mark.parametrize(
    "name", ["bands.png", "front.png", "retention.png", "report.html", "results.json", "factors.h5",
             "basis.h5", "edited.h5"],
)  # fmt: skip
def test_what_no_report_has_written_is_not_written_over(name, tmp_path, folder, command):
    """They were, or were removed, whatever they were; a folder of a report takes the next one."""
    text = rc.Population([[1, 2, 3, 4]], [2], [4], "recite", "test")
    corpus = rc.load_corpus(folder / "c.h5")
    rc.save_corpus(rc.Corpus(corpus.tokens, populations={"p": text}), tmp_path / "c.h5")
    path = tmp_path / "out" / name
    path.parent.mkdir()
    path.write_text('{"mine": 1}')
    (path.parent / "notes.txt").write_text("of no report's name")
    arguments = ["w.h5", str(tmp_path / "c.h5"), "--rho", "0.7", "--out", str(path.parent)]
    status, said = command("report", *arguments)
    assert status == 2 and said.count("\n") == 1 and f"{name}' would be written over" in said
    assert {one.name for one in path.parent.iterdir()} == {name, "notes.txt"}
    assert path.read_text() == '{"mine": 1}'
    path.unlink()
    whole = "results.json" if name != "results.json" else "results.json.unfinished"
    (path.parent / whole).write_text(json.dumps({"title": "", "refcurv": "0"}))
    prepare(path.parent, {})
    with alone("report", path.parent):
        status, said = command("report", *arguments)
    assert status == 2 and "another run is writing into" in said and said.count("\n") == 1


def spoiled(x, kind):
    """The same numbers, one of them under a mask; or as complex ones."""
    return (
        np.ma.masked_array(x, np.arange(x.size).reshape(x.shape) == 0) if kind == "mask" else x + 0j
    )


@pytest.mark.parametrize("kind", ["mask", "complex"])
def test_what_is_under_a_mask_is_refused(setting, kind):
    """Wherever numbers come in, for NumPy would take them; and numbers that are not real."""
    model, corpus = setting
    names = dict(model.parameters)
    name, x = next((n, x) for n, x in names.items() if x.ndim == 2)
    one = np.arange(1.0, 4)
    taken = {
        "tokens": lambda: rc.Corpus(spoiled(corpus.tokens, kind)),
        "labels": lambda: rc.Corpus(corpus.tokens, spoiled(corpus.label, kind)),
        "Model": lambda: rc.Model(model.config, names | {name: spoiled(x, kind)}),
        "with_parameters": lambda: model.with_parameters({name: spoiled(x, kind)}),
        "vector": lambda: rc.exact.hvp(
            model, corpus.tokens, corpus.label, wrt=name, vector={name: spoiled(x, kind)}
        ),
        "validate": lambda: rc.validate(
            {"blocks.0.mlp.up": {"A": spoiled(np.eye(len(x)), kind)}}, model=model, corpus=corpus
        ),
        "total": lambda: bootstrap(spoiled(one, kind), one),
        "count": lambda: bootstrap(one, spoiled(one, kind)),
        "nats": lambda: perplexity(spoiled(one, kind), 3),
        "perplexity: count": lambda: perplexity(1.0, spoiled(np.array([1, 2]), kind)),
        "logits": lambda: top_ids(spoiled(x, kind), 1),
        "baseline": lambda: ndcg_of_ids(spoiled(np.array([[1]]), kind), np.array([[1]])),
    }
    for what, give in taken.items():
        with pytest.raises((DTypeError, ShapeError)) as got:
            give()
        told = str(got.value).lower()
        assert "\n" not in told and ("masked" if kind == "mask" else "complex") in told, (
            what,
            told,
        )
