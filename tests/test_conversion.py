"""report/conversion.py, and what convert and export keep, say and leave out."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_families import checkpoint, config_of
from test_naming import with_names

import refcurv as rc
from refcurv.cli import main
from refcurv.files import huggingface, safetensors
from refcurv.files.checkpoints import BESIDE
from refcurv.files.gguf import converting
from refcurv.files.huggingface import Mapped, convert, export
from refcurv.files.store import open_file
from refcurv.law.checks import ConventionError, RefcurvError, SchemaError, StorageError
from refcurv.model.patterns import expand
from refcurv.report import conversion
from refcurv.report.blocks import by_block

# ------------------------------------------------------------------ inputs that change


MEANWHILE: dict[str, Callable[[Path], object]] = {
    "written to": lambda path: path.open("r+b").write(path.read_bytes()[:-9] + bytes(9)),
    "replaced": lambda path: Path(shutil.copy(path, f"{path}-")).replace(path),
    "cut": lambda path: os.truncate(path, 999),
    "gone": Path.unlink,
}


@pytest.mark.parametrize("change", MEANWHILE)
@pytest.mark.parametrize("kind", ["safetensors", "gguf", "config.json"])
def test_a_checkpoint_that_changes_meanwhile_is_refused(
    kind: str, change: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was read and what provenance names by its SHA-256 are the same; a map would die."""
    given = tmp_path / "hf"
    if kind == "gguf":
        twins = pytest.importorskip("gguf_twins", reason="extra `gguf`")
        twin = twins.TWINS["llama"]
        of = twins.tensors_in_gguf("llama", twin, twins.numbers(twin.config))
        given = changes = twins.write(tmp_path / "x.gguf", "llama", twin.keys, of)
    else:
        checkpoint(given, config_of("llama"), ("float32",))
        changes = given / ("model.safetensors" if kind == "safetensors" else kind)
    module = converting if kind == "gguf" else safetensors
    read, calls = module.read_tensor, iter(range(99))

    def meanwhile(tensor: Any) -> Any:
        if next(calls) == 3:
            MEANWHILE[change](changes)
        return read(tensor)

    monkeypatch.setattr(module, "read_tensor", meanwhile)
    (tmp_path / "w.h5").write_text("earlier")
    with pytest.raises(RefcurvError) as caught:
        convert(given, tmp_path / "w.h5")
    assert str(changes) in str(caught.value) and "\n" not in str(caught.value)
    early = change in ("cut", "gone") and kind != "config.json"
    assert early or "replaced or changed meanwhile" in str(caught.value)
    assert (tmp_path / "w.h5").read_text() == "earlier"
    assert not [*tmp_path.glob(".refcurv*")]


# ------------------------------------------------------------------ convert's table


def printed(capsys: pytest.CaptureFixture[str], *command: object) -> str:
    assert main([str(part) for part in command]) == 0
    return capsys.readouterr().out


def test_a_model_of_thirty_blocks_is_a_short_table(tmp_path: Path) -> None:
    config = config_of("llama", num_hidden_layers=30, tie_word_embeddings=True, mlp_bias=False)
    folder = checkpoint(tmp_path / "hf", config, ("bfloat16",))
    done = huggingface.conversion(folder, tmp_path / "w.h5")
    lines = [" ".join(t.split()) for t in conversion.format_conversion(done, "w.h5").splitlines()]
    at = "model.layers.{0-29}."
    assert (
        f"blocks.{{0-29}}.attn.q.weight 30 x (8, 8) bfloat16 {at}self_attn.q_proj.weight" in lines
    )
    assert "embed.weight (7, 8) bfloat16 model.embed_tokens.weight" in lines
    assert len(lines) == 2 + 11 + 2 and lines[-1] == "272 tensors → 272 parameters in w.h5"
    whole = conversion.format_conversion(done, "w.h5", verbose=True)
    assert len(whole.splitlines()) == 2 + 272 + 2 and "model.layers.17.mlp.up_proj.weight" in whole


def test_the_whole_table_is_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = checkpoint(tmp_path / "hf", config_of("llama"), ("float32",))
    command = ["convert", folder, tmp_path / "w.h5", "--json", tmp_path / "j"]
    assert "blocks.{0-1}.mlp.up.weight" in printed(capsys, *command)
    assert "blocks.1.mlp.up.weight" in printed(capsys, *command, "--verbose")
    assert len(json.loads((tmp_path / "j").read_text())) == 27


def test_every_tensor_is_on_one_line_of_the_summary() -> None:
    """The pattern of a line matches its own parameters; the counts add up to all of them."""
    mapped = [
        Mapped(f"h.{i}.up.weight", f"blocks.{i}.mlp.up.weight", (3, 2), dtype)
        for i, dtype in enumerate(["float16", "float16", "float32", "float16", "float16"])
    ]
    mapped += [Mapped("wte.weight", "embed.weight", (7, 2), "float16")]
    mapped += [Mapped(f"h.{i}.attn.bias", None, (1, 1), "BOOL") for i in range(2)]
    names = [m.name for m in mapped if m.name is not None]
    found = conversion.kinds(mapped)
    assert [(row[0], row[1], row[2]) for row in found] == [
        ("blocks.{0-1,3-4}.mlp.up.weight", "4 x (3, 2)", "float16"),
        ("blocks.2.mlp.up.weight", "(3, 2)", "float32"),
        ("embed.weight", "(7, 2)", "float16"),
        ("(ignored)", "2 x (1, 1)", "BOOL"),
    ]
    assert found[3][3] == "h.{0-1}.attn.bias"
    matched = [name for row in found[:3] for name in expand(row[0], names)]
    assert sorted(matched) == sorted(names)


@given(st.lists(st.tuples(st.integers(0, 12), st.sampled_from("ab"), st.integers(0, 12))))
def test_rows_of_one_kind_are_one_row(some: list[tuple[int, str, int]]) -> None:
    """Each row is in one, whose cells match its names, and whose other cell is its own."""
    rows = [(f"h.{n}.{kind}", f"blocks.{n}.{kind}.w", str(size)) for n, kind, size in some]
    found = by_block(rows, (0, 1))
    assert sorted(at for _, members in found for at in members) == list(range(len(rows)))
    assert [members[0] for _, members in found] == sorted(members[0] for _, members in found)
    for (theirs, ours, size), members in found:
        for at in members:
            for pattern, name in ((theirs, rows[at][0]), (ours, rows[at][1])):
                assert expand(pattern, [name]) == [name]
            assert size == rows[at][2]
    assert len(found) == len({(kind, size) for _, kind, size in some})


def test_convert_says_what_it_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = checkpoint(tmp_path / "hf", config_of("llama"))
    with_names(folder, lambda name: "module." + name)
    (folder / "config.json").write_text(json.dumps(config_of("llama", mood="calm")))
    (folder / "adapter_model.safetensors").write_bytes(b"x")
    (folder / "tokenizer.json").write_text("{}")
    out = printed(capsys, "convert", folder, tmp_path / "w.h5", "--ignore-key", "mood")
    assert out.splitlines()[-4:] == [
        "left out 'module.' before the names",
        "ignored as asked: the keys mood of config.json",
        "not read: adapter_model.safetensors",
        "not part of a weights file: tokenizer.json",
    ]


# ------------------------------------------------------------------ keys to ignore

ODD = {"mood": "calm", "zeal": None, "Attn": {"deep": 1}}


def test_all_unknown_keys_are_named_at_once(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "hf", config_of("llama"))
    (folder / "config.json").write_text(json.dumps(config_of("llama", **ODD)))
    with pytest.raises(ConventionError, match="the keys 'Attn', 'mood', 'zeal' are unknown and"):
        convert(folder, tmp_path / "w.h5")
    many = {f"odd_{n}": n for n in range(1000)}
    (folder / "config.json").write_text(json.dumps(config_of("llama", **many)))
    with pytest.raises(ConventionError, match=r"'odd_0', 'odd_1', .* and 988 more are") as caught:
        convert(folder, tmp_path / "w.h5")
    assert len(str(caught.value)) < 700


def test_keys_are_ignored_by_name_and_written_down(tmp_path: Path) -> None:
    """Recorded, carried through an edit, and the checkpoint's own config.json comes back."""
    folder = checkpoint(tmp_path / "hf", config_of("llama"))
    convert(folder, tmp_path / "plain.h5")
    text = json.dumps(config_of("llama", **ODD))
    (folder / "config.json").write_text(text)
    rc.convert(folder, tmp_path / "w.h5", ignore_keys=["zeal", "mood", "Attn"])
    assert open_file(tmp_path / "w.h5").provenance["ignored_keys"] == ["Attn", "mood", "zeal"]
    assert "ignored_keys" not in open_file(tmp_path / "plain.h5").provenance
    rc.save(rc.load(tmp_path / "w.h5"), tmp_path / "edited.h5")
    export(tmp_path / "edited.h5", tmp_path / "back")
    assert (tmp_path / "back/config.json").read_text() == text
    with pytest.raises(ConventionError, match="'mood' is unknown"):
        convert(folder, tmp_path / "w2.h5", ignore_keys=["zeal", "Attn"])


@pytest.mark.parametrize(
    "key, said",
    [
        ("hidden_size", "'hidden_size' cannot be ignored: the model is computed from it"),
        ("rope_scaling", "'rope_scaling' cannot be ignored"),
        ("model_type", "'model_type' cannot be ignored"),
        ("quantization_config", "'quantization_config' cannot be ignored"),
        ("rope_interleaved", "'rope_interleaved' cannot be ignored"),
        ("absent", "'absent' is to be ignored, but is not there"),
    ],
)
def test_a_key_that_is_read_cannot_be_hidden(tmp_path: Path, key: str, said: str) -> None:
    folder = checkpoint(tmp_path / "hf", config_of("llama"))
    with pytest.raises(RefcurvError, match=said):
        convert(folder, tmp_path / "w.h5", ignore_keys=key)
    assert not (tmp_path / "w.h5").exists()


def test_what_another_family_reads_may_be_ignored(tmp_path: Path) -> None:
    """transformers' Llama has no window, whatever its config.json says; the user may know that."""
    folder = checkpoint(tmp_path / "hf", config_of("llama"))
    (folder / "config.json").write_text(json.dumps(config_of("llama", sliding_window=4)))
    with pytest.raises(ConventionError, match="sliding_window is 4"):
        convert(folder, tmp_path / "w.h5")
    convert(folder, tmp_path / "w.h5", ignore_keys=["sliding_window"])
    assert rc.load(tmp_path / "w.h5").config.windows == ()


def test_own_code_may_be_vouched_for(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "hf", config_of("llama"))
    code = {"auto_map": {"AutoModelForCausalLM": "modeling_mine.MineForCausalLM"}}
    (folder / "config.json").write_text(json.dumps(config_of("llama", **code)))
    with pytest.raises(ConventionError, match="auto_map names code of its own"):
        convert(folder, tmp_path / "w.h5")
    convert(folder, tmp_path / "w.h5", ignore_keys=["auto_map"])


# ------------------------------------------------------------------ a tokenizer beside the weights


def with_tokenizer(folder: Path) -> Path:
    for name in BESIDE:
        (folder / name).write_bytes(f"{name} é\r\n".encode())
    (folder / "notes.txt").write_text("mine")
    return folder


def test_a_tokenizer_comes_from_the_folder_that_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = with_tokenizer(checkpoint(tmp_path / "hf", config_of("llama")))
    convert(folder, tmp_path / "w.h5")
    out = printed(capsys, "export", tmp_path / "w.h5", tmp_path / "e", "--tokenizer-from", folder)
    assert {p.name for p in (tmp_path / "e").iterdir()} == {*BESIDE, "config.json",
                                                           "model.safetensors"}  # fmt: skip
    for name in BESIDE:
        assert (tmp_path / "e" / name).read_bytes() == (folder / name).read_bytes()
    assert "not copied" not in out and "tokenizer.json" in out


def test_export_says_what_it_does_not_copy(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = with_tokenizer(checkpoint(tmp_path / "hf", config_of("llama")))
    convert(folder, tmp_path / "w.h5")
    rc.save(rc.load(tmp_path / "w.h5"), tmp_path / "edited.h5")
    out = printed(capsys, "export", tmp_path / "edited.h5", tmp_path / "e")
    told = " ".join(out.split())
    assert f"not copied: {', '.join(BESIDE)}, which lay beside the checkpoint" in told
    assert all(len(line) <= 80 for line in out.splitlines() if "/" not in line)
    assert "--tokenizer-from" in out
    assert len(list((tmp_path / "e").iterdir())) == 2
    plain = checkpoint(tmp_path / "hf2", config_of("llama"))
    convert(plain, tmp_path / "w2.h5")
    assert "no tokenizer: --tokenizer-from" in printed(
        capsys, "export", tmp_path / "w2.h5", tmp_path / "e2"
    )


def test_a_strangers_weights_file_names_no_file_to_read(tmp_path: Path) -> None:
    """Its provenance may say anything; nothing outside of what the user names is opened."""
    secret = tmp_path / "secret"
    secret.write_text("key")
    folder = checkpoint(tmp_path / "hf", config_of("llama"))
    convert(folder, tmp_path / "w.h5")
    model = rc.load(tmp_path / "w.h5")
    for beside in (
        {"../secret": "0" * 64, str(secret): "0" * 64, "tokenizer.json": str(secret)},
        [str(secret)],
        "tokenizer.json",
    ):
        rc.save(model, tmp_path / "theirs.h5", {"beside": beside, "ignored_keys": {"x": 1}})
        done = export(tmp_path / "theirs.h5", tmp_path / f"e{type(beside).__name__}")
        assert set(done.left) <= {"tokenizer.json"}
        for path in (tmp_path / f"e{type(beside).__name__}").iterdir():
            assert b"key" not in path.read_bytes() or path.name != "tokenizer.json"


def test_a_tokenizer_of_another_model_is_refused(tmp_path: Path) -> None:
    folder = with_tokenizer(checkpoint(tmp_path / "hf", config_of("llama")))
    convert(folder, tmp_path / "w.h5")
    other = with_tokenizer(checkpoint(tmp_path / "hf2", config_of("llama")))
    (other / "vocab.json").write_text("{}")
    with pytest.raises(ConventionError, match=r"vocab\.json' is not the file that lay beside the"):
        export(tmp_path / "w.h5", tmp_path / "e", tokenizer_from=other)
    with pytest.raises(SchemaError, match="there is no folder"):
        export(tmp_path / "w.h5", tmp_path / "e", tokenizer_from=tmp_path / "none")
    with pytest.raises(SchemaError, match=r"has no tokenizer\.json"):
        export(tmp_path / "w.h5", tmp_path / "e", tokenizer_from=tmp_path)
    assert not (tmp_path / "e").exists()


def test_what_is_no_regular_file_is_no_tokenizer(tmp_path: Path) -> None:
    """Neither opened nor recorded; a link of the Hub's cache is followed."""
    folder = checkpoint(tmp_path / "hf", config_of("llama"))
    os.mkfifo(folder / "tokenizer.json")
    (folder / "vocab.json").mkdir()
    (folder / "merges.txt").symlink_to("merges.txt")
    (tmp_path / "blob").write_text("{}")
    (folder / "generation_config.json").symlink_to(tmp_path / "blob")
    convert(folder, tmp_path / "w.h5")
    assert set(open_file(tmp_path / "w.h5").provenance["beside"]) == {"generation_config.json"}
    done = export(tmp_path / "w.h5", tmp_path / "e", tokenizer_from=folder)
    assert done.files == ("config.json", "model.safetensors", "generation_config.json")
    assert not (tmp_path / "e/generation_config.json").is_symlink()


# ------------------------------------------------------------------ an export that is repeated


def test_an_export_that_is_there_is_done(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run that was killed behind its rename: the same command again finds its own work whole."""
    folder = with_tokenizer(checkpoint(tmp_path / "hf", config_of("llama")))
    convert(folder, tmp_path / "w.h5")
    command = ["export", tmp_path / "w.h5", tmp_path / "e", "--tokenizer-from", folder]
    first = printed(capsys, *command)
    before = {p: (p.stat().st_ino, p.stat().st_mtime_ns) for p in (tmp_path / "e").iterdir()}
    second = printed(capsys, *command)
    assert "there already" in second and "there already" not in first
    assert before == {p: (p.stat().st_ino, p.stat().st_mtime_ns) for p in before}
    assert not list(tmp_path.glob(".refcurv-*"))


CHANGES = {
    "a byte of a tensor": lambda e: flip(e / "model.safetensors", -1),
    "a byte of the header": lambda e: flip(e / "model.safetensors", 20),
    "a longer file": lambda e: append(e / "model.safetensors"),
    "another config": lambda e: append(e / "config.json"),
    "a file more": lambda e: (e / "notes.txt").write_text("mine"),
    "a file less": lambda e: (e / "config.json").unlink(),
    "a link": lambda e: relink(e / "config.json"),
    "a folder more": lambda e: (e / "sub").mkdir(),
}


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def append(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b" ")


def relink(path: Path) -> None:
    moved = path.parent.parent / "moved"
    path.rename(moved)
    path.symlink_to(moved)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with w.h5 and its export e."""
    folder = tmp_path_factory.mktemp("exported")
    convert(checkpoint(folder / "hf", config_of("llama")), folder / "w.h5")
    export(folder / "w.h5", folder / "e")
    return folder


@pytest.mark.parametrize("name", CHANGES)
def test_anything_else_is_refused_and_kept(exported: Path, tmp_path: Path, name: str) -> None:
    shutil.copytree(exported / "e", tmp_path / "e")
    CHANGES[name](tmp_path / "e")
    before = {p.name: p.read_bytes() for p in (tmp_path / "e").iterdir() if p.is_file()}
    with pytest.raises(SchemaError, match="exists and is no empty folder"):
        export(exported / "w.h5", tmp_path / "e")
    assert before == {p.name: p.read_bytes() for p in (tmp_path / "e").iterdir() if p.is_file()}


def test_an_export_that_fails_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    convert(checkpoint(tmp_path / "hf", config_of("llama")), tmp_path / "w.h5")

    right = Path.replace

    def full(self: Path, target: Path) -> None:
        if self.is_dir():  # the files in it are there by now
            raise OSError(28, "No space left on device")
        right(self, target)

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(StorageError, match="No space left"):
        export(tmp_path / "w.h5", tmp_path / "e")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hf", "w.h5"]
