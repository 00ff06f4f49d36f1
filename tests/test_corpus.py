"""files/corpus.py: the law's rules on tokens, labels, masks and segments, and the round trip."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import config, random_parameters

import refcurv as rc
from refcurv.files import store
from refcurv.files.corpus import load_corpus, save_corpus
from refcurv.law.checks import (
    ConventionError,
    DTypeError,
    EmptyError,
    RangeError,
    RefcurvError,
    SchemaError,
    ShapeError,
    as_integers,
)
from refcurv.model.corpus import Corpus, Population
from refcurv.model.rows import reached

TOKENS = [[5, 6, 7, 8], [1, 2, 3, 0]]
MASK = [[1, 1, 1, 1], [1, 1, 1, 0]]
SEGMENTS = [[9, 9, 4, 4], [0, 0, 0, 0]]


def population(**changed: Any) -> Population:
    plain = dict(
        tokens=TOKENS, prompt_length=[1, 2], length=[4, 3], kind="recite", split="test", chance=0.25
    )
    return Population(**{**plain, **changed})


# ------------------------------------------------------------------ records


def test_derived_arrays_by_hand() -> None:
    corpus = Corpus(TOKENS, mask=MASK, segments=SEGMENTS)
    assert corpus.tokens.dtype == np.int32 and corpus.mask.dtype == np.uint8
    assert corpus.real.tolist() == [[True] * 4, [True] * 3 + [False]]
    assert corpus.label.tolist() == [[6, -1, 8, -1], [2, 3, -1, -1]]
    assert corpus.label.dtype == np.int64
    assert reached(corpus.label, corpus.real, corpus.segment).tolist() == [
        [True, False, True, False],
        [True, True, False, False],
    ]
    bare = Corpus(TOKENS)
    assert bare.real.all() and not bare.segment.any()
    assert bare.label.tolist() == [[6, 7, 8, -1], [2, 3, 0, -1]]
    own = Corpus(TOKENS, labels=[[-7, 1, -1, 0], [2, 2, 2, -1]], mask=MASK)
    assert own.label.tolist() == [[-7, 1, -1, 0], [2, 2, 2, -1]]


def test_records_own_read_only_copies() -> None:
    tokens = np.array(TOKENS, np.int32)
    corpus = Corpus(tokens)
    tokens[0, 0] = 99  # the caller's array is his own, before and after
    assert corpus.tokens[0, 0] == 5
    with pytest.raises(ValueError, match="read-only"):
        corpus.tokens[0, 0] = 1
    with pytest.raises(TypeError):
        corpus.populations["x"] = population()  # type: ignore[index]


def test_one_position_is_legal() -> None:
    assert Corpus([[3]]).label.tolist() == [[-1]]
    assert population(tokens=[[3]], prompt_length=[1], length=[1], kind="text").chance == 0.25
    assert Corpus(np.zeros((0, 4), int), populations={"p": population()}).label.shape == (0, 4)


REFUSED: dict[str, tuple[dict[str, Any], type[RefcurvError], str]] = {
    "float tokens": ({"tokens": [[1.0]]}, DTypeError, "tokens must hold integers"),
    "bool tokens": ({"tokens": [[True]]}, DTypeError, "tokens must hold integers"),
    "one axis": ({"tokens": [1, 2]}, ShapeError, r"tokens must be \(any, any\)"),
    "ragged": ({"tokens": [[1, 2], [3]]}, ShapeError, "tokens must be"),
    "negative id": ({"tokens": [[1, 2], [3, -1]]}, RangeError, r"tokens \[1, 1\] is -1; ids are"),
    "huge id": ({"tokens": [[1, 2**31]]}, RangeError, "tokens must fit int32"),
    "uint64": ({"tokens": np.array([[2**64 - 1]], np.uint64)}, RangeError, "must fit int32"),
    "no sequence": ({"tokens": np.zeros((0, 4), int)}, EmptyError, "no sequence"),
    "no width": ({"tokens": np.zeros((2, 0), int)}, EmptyError, "one position wide"),
    "labels' shape": ({"labels": [[1, 2, 3]]}, ShapeError, r"labels must be \(2, 4\)"),
    "float labels": ({"labels": np.zeros((2, 4))}, DTypeError, "labels must hold integers"),
    "label on padding": (
        {"labels": [[1, 1, 1, 1]] * 2, "mask": MASK},
        ConventionError,
        r"labels \[1, 3\] is 1 on padding",
    ),
    "mask's shape": ({"mask": [1, 1, 1, 1]}, ShapeError, r"mask must be \(2, 4\)"),
    "mask of 2": ({"mask": [[2, 1, 1, 1]] * 2}, RangeError, "mask holds 0 .* and 1"),
    "mask of -1": ({"mask": [[-1, 1, 1, 1]] * 2}, RangeError, "mask must fit uint8"),
    "left padding": (
        {"mask": [[1, 1, 1, 1], [0, 1, 1, 1]]},
        ConventionError,
        "in sequence 1 position 0 is padding and 1 is real",
    ),
    "hole": ({"mask": [[1, 0, 1, 1]] * 2}, ConventionError, "padding on the right only"),
    "segment comes back": (
        {"segments": [[1, 1, 1, 1], [1, 2, 1, 1]]},
        ConventionError,
        "one contiguous run; in sequence 1",
    ),
    "dots in a name": ({"populations": {"a.b": population()}}, ConventionError, "no dots"),
    "slashes in a name": ({"populations": {"a/b": population()}}, ConventionError, "no dots"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_a_corpus_against_the_law(name: str) -> None:
    arguments, error, fragment = REFUSED[name]
    with pytest.raises(error, match=fragment):
        Corpus(**{"tokens": TOKENS, **arguments})


class Stubborn:
    """What says that it is an array and then is none, as a tensor on another device does."""

    def __array__(self, *_: object, **__: object) -> np.ndarray:
        raise TypeError("can't convert device tensor\nto numpy")


NO_IDS: dict[str, tuple[Any, str]] = {
    "ragged": ([[1, 2], [3]], "row 0 is of length 2, row 1 is of length 1. Pad"),
    "ragged arrays": ([np.arange(3), np.arange(2)], "row 1 is of length 2"),
    "a number for a row": ([[1, 2], 3], "row 1 is no list"),
    "ragged within": ([[[1], [2, 3]], [[1], [2]]], "must be"),
    "text": ("ab", "must hold integers; got <U2"),
    "texts": ([["a", "b"]], "must hold integers; got <U1"),
    "None within": ([[None, 1]], "must hold integers; got object"),
    "floats": ([[1.5, 2.0]], "must hold integers; got float64"),
    "whole floats": ([[1.0, 2.0]], "must hold integers; got float64"),
    "complex": ([[1j, 2]], "must hold integers; got complex128"),
    "booleans": ([[True, False]], "must hold integers; got bool"),
    "beyond 63 bits": (np.array([[2**63 + 1, 2]], np.uint64), "must fit int"),
    "minus one in 64 bits": (np.array([[2**64 - 1, 2]], np.uint64), "must fit int"),
    "beyond 64 bits": ([[2**70, 1]], "must hold integers; got object"),
    "one axis": ([1, 2], "got (2,)"),
    "nothing": ([], "got (0,)"),
    "a mapping": ({1: 2}, "must hold integers; got object"),
    "no array at all": (Stubborn(), "can't convert device tensor to numpy"),
}


def doors() -> dict[str, Callable[[Any], object]]:
    """Every public function that takes token ids or labels, as a function of them."""
    made = config(vocabulary=9)
    model = rc.Model(made, random_parameters(made, 0), "float64")
    ids = [[1, 2]]
    return {
        "Corpus.tokens": Corpus,
        "Corpus.labels": lambda x: Corpus(ids, labels=x),
        "Corpus.segments": lambda x: Corpus(ids, segments=x),
        "Population.tokens": lambda x: population(tokens=x),
        "logits": lambda x: rc.logits(model, x),
        "loss": lambda x: rc.loss_and_gradient(model, x),
        "loss.labels": lambda x: rc.loss_and_gradient(model, ids, x),
        "exact": lambda x: rc.exact.hessian(model, x, wrt="final_norm.weight"),
        "exact.labels": lambda x: rc.exact.hessian(model, ids, x, wrt="final_norm.weight"),
    }


DOORS = doors()


@pytest.mark.parametrize("what", NO_IDS)
@pytest.mark.parametrize("door", DOORS)
def test_what_is_no_matrix_of_ids_is_refused_everywhere(door: str, what: str) -> None:
    """In one sentence that says what came; never a bare error, nothing rounded or wrapped."""
    thing, says = NO_IDS[what]
    with pytest.raises(RefcurvError) as refused:
        DOORS[door](thing)
    text = str(refused.value)
    assert says in text
    assert "\n" not in text and len(text) < 250


junk = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=2),
    lambda inner: st.lists(inner, max_size=3),
    max_leaves=8,
)


@given(junk)
def test_integers_are_taken_exactly_or_refused(thing: Any) -> None:
    try:
        got = as_integers("who", "what", thing, (None, None), "(N, T)", np.int32)
    except RefcurvError:
        return
    assert got.dtype == np.int32
    every = [x for row in thing for x in row]  # NumPy takes True for 1 beside integers
    assert got.tolist() == thing and not (every and all(isinstance(x, bool) for x in every))


def test_ragged_images_are_refused() -> None:
    with pytest.raises(ShapeError, match="row 1 is of length 1"):
        Corpus(images=[[[[0.0]], [[0.0]]], [[[0.0]]]], labels=[0, 0])


def test_padding_may_repeat_an_earlier_segment_id() -> None:
    segments = [[0, 0, 1, 1], [0, 1, 1, 0]]
    assert Corpus(TOKENS, mask=MASK, segments=segments).label[1].tolist() == [-1, 3, -1, -1]
    with pytest.raises(ConventionError):
        Corpus(TOKENS, segments=segments)


LENGTHS: dict[str, tuple[dict[str, Any], type[RefcurvError], str]] = {
    "kind": ({"kind": "quiz"}, ConventionError, "kind must be one of text, recite, answer"),
    "split": ({"split": "train"}, ConventionError, "split must be one of dev, test"),
    "chance": ({"chance": 1.5}, RangeError, r"chance must lie in \[0, 1\]"),
    "chance is NaN": ({"chance": np.nan}, RangeError, "chance must lie"),
    "empty": ({"tokens": np.zeros((0, 4), int)}, EmptyError, "no sequence"),
    "no prompt": ({"prompt_length": [0, 2]}, RangeError, "sequence 0 has prompt_length 0"),
    "nothing asked": ({"prompt_length": [1, 3]}, RangeError, "sequence 1 .* 3 and length 3"),
    "too long": ({"length": [5, 3]}, RangeError, "length <= 4 .* length 5"),
    "prompt beyond": ({"prompt_length": [1, 4], "kind": "text"}, RangeError, "prompt_length 4"),
    "number of lengths": ({"length": [4]}, ShapeError, r"length must be \(2\)"),
    "float length": ({"length": [4.0, 3.0]}, DTypeError, "length must hold integers"),
}


@pytest.mark.parametrize("name", LENGTHS)
def test_a_population_against_the_law(name: str) -> None:
    changed, error, fragment = LENGTHS[name]
    with pytest.raises(error, match=fragment):
        population(**changed)


# ------------------------------------------------------------------ files


def full() -> Corpus:
    return Corpus(
        TOKENS,
        labels=[[1, 2, 3, -1], [4, 5, -1, -5]],
        mask=MASK,
        segments=SEGMENTS,
        populations={
            "zoo": population(),
            "boolean-logic": population(kind="answer", split="dev", chance=0.5),
            "base_text": population(kind="text", prompt_length=[4, 1], chance=0),
        },
    )


def assert_same(one: Corpus, two: Corpus) -> None:
    for name in ("tokens", "labels", "mask", "segments"):
        a, b = getattr(one, name), getattr(two, name)
        assert (a is None) == (b is None)
        assert a is None or (a.dtype == b.dtype and (a == b).all())
    assert list(one.populations) == list(two.populations)
    for p, q in zip(one.populations.values(), two.populations.values(), strict=True):
        assert (p.kind, p.split, p.chance) == (q.kind, q.split, q.chance)
        for name in ("tokens", "prompt_length", "length"):
            assert getattr(p, name).dtype == np.int32
            assert (getattr(p, name) == getattr(q, name)).all()


@pytest.mark.parametrize(
    "corpus",
    [full(), Corpus(TOKENS), Corpus(np.zeros((0, 2), int), populations={"p": population()})],
    ids=["full", "tokens", "populations"],
)
def test_round_trip(tmp_path: Path, corpus: Corpus) -> None:
    save_corpus(corpus, tmp_path / "c.h5", {"seed": 4})
    back = load_corpus(tmp_path / "c.h5")
    assert_same(back, corpus)
    assert back.source["provenance"]["seed"] == 4
    save_corpus(back, tmp_path / "c2.h5")
    one, two = store.open_file(tmp_path / "c.h5"), store.open_file(tmp_path / "c2.h5")
    assert one.entries == two.entries
    assert two.provenance["inputs"] == {"c.h5": store.file_sha256(tmp_path / "c.h5")}


def test_on_disk_as_the_design_says(tmp_path: Path) -> None:
    save_corpus(full(), tmp_path / "c.h5")
    entries = store.open_file(tmp_path / "c.h5", format="refcurv-corpus").entries
    assert {name: entries[name].dtype for name in ("tokens", "labels", "mask", "segments")} == {
        "tokens": "int32", "labels": "int32", "mask": "uint8", "segments": "int32"
    }  # fmt: skip
    judged = entries["populations.boolean-logic.tokens"].attributes
    assert judged == {"kind": "answer", "split": "dev", "chance": 0.5}


TOKEN = np.array(TOKENS, np.int32)
JUDGED = {"kind": "text", "split": "dev", "chance": 0.0}
LENGTH = np.array([4, 3], np.int32)


def files(**changed: Any) -> list[store.Entry]:
    entries = {
        "tokens": (TOKEN, {}),
        "populations.p.tokens": (TOKEN, JUDGED),
        "populations.p.prompt_length": (LENGTH, {}),
        "populations.p.length": (LENGTH, {}),
    }
    entries |= {name.replace("__", "."): value for name, value in changed.items()}
    return [store.Entry(n, v[0], v[1]) for n, v in entries.items() if v is not None]


BAD_FILES = {
    "no tokens": (files(tokens=None), "lacks 'tokens'"),
    "no length": (files(populations__p__length=None), r"lacks 'populations\.p\.length'"),
    "pictures": (files(pictures=(TOKEN, {})), "holds 'pictures', which a corpus does not have"),
    "tokens.x": (files(tokens=None, tokens__x=(TOKEN, {})), "holds 'tokens.x'"),
    "too deep": (files(populations__p__q__tokens=(TOKEN, {})), "holds 'populations.p.q.tokens'"),
    "int64": (files(tokens=(TOKEN.astype(np.int64), {})), "'tokens' must be int32; got int64"),
    "int32 mask": (files(mask=(TOKEN, {})), "'mask' must be uint8; got int32"),
    "encoded": (files(mask=(TOKEN.astype(np.uint16), {"encoding": "bfloat16"})), "got bfloat16"),
    "negative": (files(tokens=(-TOKEN, {})), r"Corpus: tokens \[0, 0\] is -5"),
    "no kind": (files(populations__p__tokens=(TOKEN, {"split": "dev"})), "attributes kind, split"),
    "kind is 3": (files(populations__p__tokens=(TOKEN, {**JUDGED, "kind": 3})), "'p': .*kind must"),
    "chance": (files(populations__p__tokens=(TOKEN, {**JUDGED, "chance": "1/2"})), "a number"),
    "lengths": (files(populations__p__length=(LENGTH + 3, {})), "'p': Population: .*length 7"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_corpus_file_against_the_law(tmp_path: Path, name: str) -> None:
    entries, fragment = BAD_FILES[name]
    path = tmp_path / "c.h5"
    store.write(path, format="refcurv-corpus", attributes={}, arrays=entries, provenance={})
    with pytest.raises(SchemaError, match=fragment) as caught:
        load_corpus(path)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)
