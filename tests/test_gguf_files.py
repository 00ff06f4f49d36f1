"""files/gguf/reading.py: split files, damaged files, and GGUF files where none is wanted."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

gguf = pytest.importorskip("gguf", reason="extra `gguf`")

from gguf_twins import KEYS, TWINS, numbers, tensors_in_gguf, write  # noqa: E402

import refcurv as rc  # noqa: E402
from refcurv.cli import main  # noqa: E402
from refcurv.files.gguf.reading import open_gguf, read_tensor  # noqa: E402
from refcurv.files.texts import build_corpus  # noqa: E402
from refcurv.files.tokenizer import find_tokenizer, load_tokenizer  # noqa: E402
from refcurv.judge.foreign import read_dump  # noqa: E402
from refcurv.law.checks import ConventionError, RefcurvError, SchemaError  # noqa: E402

TOKENS = {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "gpt-2",
    "tokenizer.ggml.tokens": [*"abcdefghij", "ab"],
    "tokenizer.ggml.token_type": [1] * 11,
    "tokenizer.ggml.merges": ["a b"],
}


def tensors() -> dict[str, np.ndarray]:
    return tensors_in_gguf("llama", TWINS["llama"], numbers(TWINS["llama"].config))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("gguf") / "x.gguf", "llama", KEYS, tensors(), TOKENS)


@cache
def bytes_of(path: Path) -> bytes:
    return path.read_bytes()


# ------------------------------------------------------------------ damage


@given(at=st.floats(0, 1), bit=st.integers(0, 7), cut=st.booleans(), header=st.booleans())
@example(at=1.0, bit=0, cut=True, header=False)
def test_any_flipped_byte_is_refused_in_one_line(
    whole: Path, at: float, bit: int, cut: bool, header: bool
) -> None:
    """Or it changes a number, a name or a value that may be such: then the file is another one."""
    data = bytearray(bytes_of(whole))
    i = int(at * ((1500 if header else len(data)) - 1))
    data[i] ^= 1 << bit
    path = whole.with_name("flipped.gguf")
    path.write_bytes(bytes(data[:i]) if cut else bytes(data))
    target = whole.with_name("flipped.h5")
    for act in (lambda: rc.convert(path, target), lambda: load_tokenizer(path, None)):
        try:
            act()
        except RefcurvError as error:
            assert "\n" not in str(error)
    if cut:
        assert not target.exists()
    target.unlink(missing_ok=True)


def refused(path: Path, message: str, kind: type[RefcurvError] = SchemaError) -> None:
    with pytest.raises(kind, match=message) as caught:
        rc.convert(path, path.with_name("w.h5"))
    assert "\n" not in str(caught.value) and not path.with_name("w.h5").exists()


def changed(whole: Path, folder: Path, old: bytes, new: bytes, at: int = 0) -> Path:
    """The file with the bytes at `at` after the first `old` replaced by `new`."""
    data = bytearray(bytes_of(whole))
    i = data.index(old) + len(old) + at
    data[i : i + len(new)] = new
    (folder / "x.gguf").write_bytes(bytes(data))
    return folder / "x.gguf"


def u64(n: int) -> bytes:
    return n.to_bytes(8, "little")


@pytest.mark.parametrize(
    ("old", "at", "new", "message"),
    [
        (b"GGUF", 0, b"\x01", "is of version 1"),
        (b"GGUF", 0, b"\x00\x00\x00\x03", "is big-endian"),
        (b"GGUF", 4, u64(2**62), "beyond the end of the file"),
        (b"GGUF", 12, u64(2**62), "beyond the end of the file"),
        (b"tokenizer.ggml.token_type", 8, u64(2**62), "beyond the end of the file"),
        (b"tokenizer.ggml.tokens", 12, u64(2**40), "beyond the end of the file"),
        (b"token_embd.weight", 0, (2**31).to_bytes(4, "little"), "beyond the end of the file"),
        (b"token_embd.weight", 4, u64(2**63), "damaged"),
        (b"token_embd.weight", 20, b"\xc8\x00\x00\x00", "a quantisation that the package gguf"),
        (b"token_embd.weight", 24, u64(64), "leaves a gap or overlaps"),
        (b"token_embd.weight", 24, u64(2**50), "beyond the end of the file"),
        (b"blk.1.ffn_up.weigh", 0, b"\xff", "damaged"),
    ],
)
def test_lying_sizes_and_offsets(
    whole: Path, tmp_path: Path, old: bytes, at: int, new: bytes, message: str
) -> None:
    known = ConventionError if "version" in message or "big" in message else SchemaError
    kind = ConventionError if "quantisation" in message else known
    refused(changed(whole, tmp_path, old, new, at), message, kind)


def test_a_file_of_the_other_order_of_bytes(tmp_path: Path) -> None:
    path = write(tmp_path / "x.gguf", "llama", KEYS, tensors(), None, gguf.GGUFEndian.BIG)
    refused(path, "is big-endian", ConventionError)


def test_what_is_named_gguf_and_is_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "x.gguf").write_bytes(b"GGML")
    refused(tmp_path / "x.gguf", "is no GGUF file, or cut short")
    (tmp_path / "y.gguf").write_bytes(b"GGUF\x03")
    assert main(["convert", str(tmp_path / "y.gguf"), str(tmp_path / "w.h5")]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1 and len([*tmp_path.iterdir()]) == 2


def test_a_pipe_is_refused_and_never_read(tmp_path: Path) -> None:
    """A reader may wait for ever. Here it need not: what was written is still there."""
    os.mkfifo(tmp_path / "x.gguf")
    end = os.open(tmp_path / "x.gguf", os.O_RDWR | os.O_NONBLOCK)
    os.write(end, full := b"GGUF" * 2**14)
    refused(tmp_path / "x.gguf", "is no ")
    with pytest.raises(SchemaError, match="is no regular file"):
        load_tokenizer(find_tokenizer(tmp_path / "x.gguf"), None)
    assert os.read(end, len(full)) == full
    os.close(end)


# ------------------------------------------------------------------ split files


def parts(folder: Path, **wrong: Any) -> list[Path]:
    of, paths = list(tensors().items()), []
    for k in range(3):
        split = {"split.no": k, "split.count": 3, "split.tensors.count": len(of)} | (
            wrong if k == 1 else {}
        )
        path = folder / f"x-{k + 1:05d}-of-00003.gguf"
        paths.append(write(path, "llama", KEYS if k == 0 else {}, dict(of[k::3]), split))
    return paths


def test_parts_are_joined_whichever_is_given(whole: Path, tmp_path: Path) -> None:
    one = open_gguf(whole)
    for path in parts(tmp_path):
        found = open_gguf(path)
        assert found.tensors.keys() == one.tensors.keys() and len(found.files) == 3
        for name, tensor in found.tensors.items():
            assert np.array_equal(read_tensor(tensor), read_tensor(one.tensors[name]))
    rc.convert(tmp_path / "x-00002-of-00003.gguf", tmp_path / "w.h5")
    rc.convert(whole, tmp_path / "one.h5")
    a, b = (rc.load(tmp_path / name).parameters for name in ("w.h5", "one.h5"))
    assert all(np.array_equal(a[name], b[name]) for name in b)


def test_a_first_part_may_have_metadata_alone(whole: Path, tmp_path: Path) -> None:
    of = tensors()
    for k, keys, held in ((0, KEYS, {}), (1, {}, of)):
        split = {"split.no": k, "split.count": 2, "split.tensors.count": len(of)}
        write(tmp_path / f"x-0000{k + 1}-of-00002.gguf", "llama", keys, held, split)
    rc.convert(tmp_path / "x-00001-of-00002.gguf", tmp_path / "w.h5")
    rc.convert(whole, tmp_path / "one.h5")
    a, b = (rc.load(tmp_path / name).parameters for name in ("w.h5", "one.h5"))
    assert all(np.array_equal(a[name], b[name]) for name in b)


def test_parts_that_are_not_all_there(tmp_path: Path) -> None:
    paths = parts(tmp_path)
    paths[2].rename(tmp_path / "z.gguf")
    refused(paths[0], r"is one of 3 parts; there is no x-00003-of-00003.gguf beside it")
    refused(tmp_path / "z.gguf", "but is not named like one: NAME-00001-of-00003")


@pytest.mark.parametrize("key", ["split.no", "split.count", "split.tensors.count"])
def test_parts_that_do_not_belong_together(tmp_path: Path, key: str) -> None:
    paths = parts(tmp_path, **{key: 7})
    refused(paths[0], f"{key} is 7, where")


# ------------------------------------------------------------------ typed elsewhere


@pytest.mark.parametrize(
    "command",
    [
        ["inspect", "GGUF"],
        ["collect", "GGUF", "GGUF", "-o", "OUT"],
        ["evaluate", "GGUF", "GGUF"],
        ["export", "GGUF", "OUT"],
        ["decompose", "GGUF", "-o", "OUT"],
    ],
    ids=lambda command: command[0],
)
def test_a_gguf_file_typed_elsewhere(
    whole: Path, tmp_path: Path, command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    named = {"GGUF": str(whole), "OUT": str(tmp_path / "out")}
    assert main([named.get(word, word) for word in command]) == 2
    assert "refcurv convert FILE WEIGHTS makes a weights file of it" in capsys.readouterr().err


def test_a_gguf_file_as_a_text_and_as_factors(whole: Path) -> None:
    with pytest.raises(SchemaError, match="the model to refcurv convert"):
        build_corpus([whole], whole, length=4)
    with pytest.raises(SchemaError, match="no factors; refcurv convert reads it"):
        read_dump(whole)


def test_no_output_takes_the_place_of_the_file(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(bytes_of(whole))
    assert main(["convert", str(path), str(path)]) == 2
    assert "which it would destroy" in capsys.readouterr().err
    assert path.read_bytes() == bytes_of(whole)


def test_a_folder_of_gguf_files(whole: Path) -> None:
    with pytest.raises(ConventionError, match="Give the file itself, not its folder"):
        rc.convert(whole.parent, whole.with_name("w.h5"))
