"""files/json_lines.py: masks and labels beside ids are honoured or refused, never dropped."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import logsumexp
from strategies import assert_within, config, random_parameters

import refcurv as rc
from refcurv.files.texts import build_corpus
from refcurv.law.checks import ConventionError, RefcurvError

NONE = -100


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("lines")


def built(folder: Path, lines: list[dict[str, Any]], suffix: str = ".jsonl", **how: Any) -> Any:
    path = folder / f"ids{suffix}"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return build_corpus([path], **how)


def test_labels_by_hand(folder: Path) -> None:
    """A prompt of two tokens that is not asked for, then padding; position t predicts t + 1."""
    line = {
        "input_ids": [5, 6, 7, 8, 0, 0],
        "attention_mask": [1, 1, 1, 1, 0, 0],
        "labels": [NONE, NONE, 7, 8, NONE, NONE],
        "token_type_ids": [0] * 6,
        "position_ids": [0, 1, 2, 3, 0, 0],
        "special_tokens_mask": [1, 0, 0, 0, 1, 1],
    }
    made = built(folder, [line, {"input_ids": [1, 2, 3]}])
    assert made.tokens.tolist() == [[5, 6, 7, 8], [1, 2, 3, 0]]
    assert made.mask.tolist() == [[1, 1, 1, 1], [1, 1, 1, 0]]
    assert made.labels.tolist() == [[-1, 7, 8, -1], [2, 3, -1, -1]]
    counts = made.source["made_from"]["counts"]
    assert counts["ignored_keys"] == ["special_tokens_mask"]
    assert (counts["tokens"], counts["unlabelled"]) == (7, 3)
    packed = built(folder, [line, {"input_ids": [1, 2, 3]}], length=4, pack=True)
    assert packed.tokens.tolist() == [[5, 6, 7, 8], [1, 2, 3, 0]]
    assert packed.labels.tolist() == [[-1, 7, 8, -1], [2, 3, -1, -1]]
    in_one = built(folder, [line, {"input_ids": [1, 2, 3]}], length=7, pack=True)
    assert in_one.labels.tolist() == [[-1, 7, 8, -1, 2, 3, -1]]


def test_the_loss_of_labels_is_hugging_faces(folder: Path) -> None:
    """Its loss shifts: the logits at t - 1 against labels[t], unless that is -100."""
    made = config()
    model = rc.Model(made, random_parameters(made, 3), "float64")
    rng = np.random.default_rng(4)
    ids = rng.integers(0, made.vocabulary, 9)
    labels = np.where(rng.random(9) < 0.5, ids, NONE)
    corpus = built(folder, [{"input_ids": ids.tolist(), "labels": labels.tolist()}])
    loss, _ = rc.loss_and_gradient(model, corpus.tokens, corpus.labels)
    logits = rc.logits(model, ids[None])[0]
    nats = [logsumexp(logits[t - 1]) - logits[t - 1, ids[t]] for t in range(1, 9) if labels[t] >= 0]
    assert 0 < len(nats) < 8
    assert_within(loss, sum(nats), 1e-13, sum(nats), "loss")


LINES = st.lists(
    st.tuples(
        st.lists(st.tuples(st.integers(0, 9), st.booleans()), min_size=1, max_size=12),
        st.integers(0, 3),
        st.booleans(),
    ),
    min_size=1,
    max_size=6,
)


@given(lines=LINES, length=st.integers(2, 9), pack=st.booleans())
def test_masks_and_labels_equal_loops(
    folder: Path, lines: list[Any], length: int, pack: bool
) -> None:
    """Padding changes nothing; a label stands where its token is next in the same segment."""
    written, bare = [], []
    for tokens, padding, has_labels in lines:
        ids = [token for token, _ in tokens]
        line: dict[str, Any] = {"input_ids": ids + [0] * padding}
        if padding:
            line["attention_mask"] = [1] * len(ids) + [0] * padding
        if has_labels:
            labels = [token if asked else NONE for token, asked in tokens]
            line["labels"] = labels + [NONE] * padding
        written.append(line)
        bare.append({"input_ids": ids})
    made = built(folder, written, length=length, pack=pack)
    plain = built(folder, bare, length=length, pack=pack)
    assert made.tokens.tolist() == plain.tokens.tolist()
    assert made.real.tolist() == plain.real.tolist()
    asked_of = [asked or not has for tokens, _, has in lines for _, asked in tokens]
    flat = dict(zip(map(tuple, np.argwhere(made.real).tolist()), asked_of, strict=True))
    for (n, t), _ in flat.items():
        default = int(plain.label[n, t])
        want = default if default < 0 or flat[n, t + 1] else -1
        assert int(made.label[n, t]) == want


IDS = {"input_ids": [5, 6, 7]}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "left padding": ({**IDS, "attention_mask": [0, 1, 1]}, "stands on the right only"),
    "a hole": ({**IDS, "attention_mask": [1, 0, 1]}, "stands on the right only"),
    "numbered documents": ({**IDS, "attention_mask": [1, 1, 2]}, "must be 1 on tokens and 0 on"),
    "a short mask": ({**IDS, "attention_mask": [1, 1]}, "'attention_mask' has 2 entries for 3 ids"),
    "a square mask": ({**IDS, "attention_mask": [[1, 0, 0]] * 3}, "[0] must be an integer; got [1"),
    "a mask of floats": ({**IDS, "attention_mask": [1.0, 1, 1]}, "must be an integer; got 1.0"),
    "shifted": ({**IDS, "labels": [6, 7, NONE]}, "labels[0] is 6 and input_ids[0] is 5"),
    "other labels": ({**IDS, "labels": [5, 6, 8]}, "labels[2] is 8 and input_ids[2] is 7"),
    "labels of padding": ({**IDS, "labels": [5, 6, 7], "attention_mask": [1, 1, 0]},
                          "labels[2] is 7 and that is padding"),
    "short labels": ({**IDS, "labels": [5]}, "'labels' has 1 entry for 3 ids"),
    "positions again": ({**IDS, "position_ids": [0, 1, 0]}, "Are several documents in the line?"),
    "types": ({**IDS, "token_type_ids": [0, 1, 1]}, "no types of tokens"),
    "loss_mask": ({**IDS, "loss_mask": [0, 1, 1]}, "'loss_mask', which says how its tokens count"),
    "completion_mask": ({**IDS, "completion_mask": [0, 1, 1]}, "'completion_mask', which says"),
    "both": ({**IDS, "attention_mask": [1, 1, 1], "completion_mask": [0, 1, 1]}, "'completion_m"),
    "any mask": ({**IDS, "Prompt_Mask_2": [0, 1, 1]}, "'Prompt_Mask_2', which says"),
    "segments": ({**IDS, "segment_ids": [0, 1, 1]}, "'segment_ids', which says"),
    "lengths": ({**IDS, "seq_lens": [1, 2]}, "'seq_lens', which says"),
    "mask of a text": ({"text": "a", "attention_mask": [1]}, "'attention_mask', which says"),
    "labels of a text": ({"text": "a", "labels": [NONE, 5]}, "'labels', which says"),
    "mask of a pair": ({"prefix_ids": [1], "suffix_ids": [2], "attention_mask": [1, 0]},
                       "'attention_mask', which says"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_honoured_is_refused(folder: Path, name: str) -> None:
    line, says = REFUSED[name]
    with pytest.raises(RefcurvError) as caught:
        built(folder, [line])
    assert says in str(caught.value) and "line 1" in str(caught.value)


@pytest.mark.parametrize(
    "more",
    [
        {"labels": [5, 6, 7]},
        {"attention_mask": [1, 1, 1]},
        {"attention_mask": [True, True, True], "position_ids": [0, 1, 2]},
        {"labels": 1},
        {"labels": ["sport", "news"]},
        {"label": 1, "mask": "a word", "special_tokens_mask": [1, 0, 0]},
        {"attention_mask": None, "labels": None},
    ],
)
def test_what_says_nothing_changes_nothing(folder: Path, more: dict[str, Any]) -> None:
    made = built(folder, [{**IDS, **more}])
    assert made.tokens.tolist() == [[5, 6, 7]] and made.mask is None and made.labels is None


def test_nothing_is_asked_for(folder: Path) -> None:
    made = built(folder, [{**IDS, "labels": [NONE] * 3}])
    assert made.labels.tolist() == [[-1, -1, -1]]


def test_a_population_takes_a_mask_and_no_labels(folder: Path) -> None:
    path = folder / "p.jsonl"
    path.write_text(json.dumps({**IDS, "attention_mask": [1, 1, 0]}))
    made = build_corpus([], populations=[f"p:text:dev={path}"])
    assert made.populations["p"].tokens.tolist() == [[5, 6]]
    path.write_text(json.dumps({**IDS, "labels": [NONE, 6, 7]}))
    with pytest.raises(ConventionError, match="has labels, and population 'p' asks for all of a"):
        build_corpus([], populations=[f"p:text:dev={path}"])


def test_a_line_ends_where_json_lines_say_and_nowhere_else(folder: Path) -> None:
    """Letters at which `str.splitlines` cuts are letters of a text; \\r\\n is an end too."""
    texts = [f"a{end}b" for end in "\u2028\u2029\x85\x0b\x0c\x1c\x1d\x1e"]
    lines = [json.dumps({"input_ids": [k], "said": x}, ensure_ascii=False)
             for k, x in enumerate(texts)]  # fmt: skip
    assert any(len(line.splitlines()) > 1 for line in lines)
    for end in ("\n", "\r\n"):
        path = folder / "ends.jsonl"
        path.write_bytes("".join(line + end for line in lines).encode())
        assert build_corpus([path]).tokens[:, 0].tolist() == list(range(len(texts)))


@pytest.mark.parametrize("suffix", [".jsonl", ".ndjson", ".jsonlines", ".JSONL"])
def test_suffixes_of_json_lines(folder: Path, suffix: str) -> None:
    assert built(folder, [IDS, IDS], suffix).tokens.tolist() == [[5, 6, 7]] * 2
