"""Files and interrupted runs: the kinds of fault that public reports of other projects describe.

validation/REPORTS.md says which report each test answers.
"""

from __future__ import annotations

import errno
import fcntl
import gc
import importlib.util
import json
import multiprocessing
import os
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import h5py
import numba
import numpy as np
import pytest
from numba import config as numba_config
from numba.core import caching
from strategies import config, random_parameters

import refcurv as rc
from refcurv.algebra import kernels
from refcurv.cli import main
from refcurv.curvature import accumulate
from refcurv.files import disk, paths, safetensors, store
from refcurv.files.disk import file_sha256
from refcurv.law import conventions
from refcurv.law.checks import SchemaError


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """w.h5 and c.h5 of a small random model; v.h5, other weights in as many bytes."""
    folder = tmp_path_factory.mktemp("reports")
    made = config(layers=1)
    for name, seed in (("w", 0), ("v", 1)):
        rc.save(rc.Model(made, random_parameters(made, seed)), folder / f"{name}.h5")
    rows = np.random.default_rng(0).integers(0, 7, (6, 8))
    rc.save_corpus(rc.Corpus(rows), folder / "c.h5")
    return folder


@pytest.fixture
def here(files: Path, tmp_path: Path) -> Path:
    """The same files, to be changed."""
    for name in ("w.h5", "v.h5", "c.h5"):
        (tmp_path / name).write_bytes((files / name).read_bytes())
    return tmp_path


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o777


# ------------------------------------------------------------------ the file in place of the old


@pytest.mark.parametrize("old", [0o600, 0o640, 0o664, 0o444])
def test_a_replaced_file_keeps_its_permissions(old: int, tmp_path: Path) -> None:
    """What only its owner may read stays so, from the first byte; what a group may write too."""
    path = tmp_path / "w.h5"
    path.write_bytes(b"old")
    path.chmod(old)
    with disk.replacing("write", path) as file:
        assert os.fstat(file.fileno()).st_mode & 0o777 == old
        file.write(b"new")
    assert path.read_bytes() == b"new" and mode(path) == old


@pytest.mark.parametrize("mask", [0o022, 0o027, 0o077])
def test_a_new_file_has_the_permissions_that_the_umask_leaves(mask: int, tmp_path: Path) -> None:
    before = os.umask(mask)
    try:
        disk.write_bytes("write", tmp_path / "w.h5", b"new")
    finally:
        os.umask(before)
    assert mode(tmp_path / "w.h5") == 0o666 & ~mask


def test_a_model_may_be_saved_over_the_file_that_it_is_read_from(here: Path) -> None:
    """Parameters are read one by one while the new file is written: it is another until the end."""
    model = rc.load(here / "w.h5")
    want = {name: model.parameters[name] for name in model.parameters}
    changed = model.with_parameters({"head.weight": want["head.weight"] * 2})
    rc.save(changed, here / "w.h5")
    again = rc.load(here / "w.h5").parameters
    assert all(
        np.array_equal(again[name], array * (1 + (name == "head.weight")))
        for name, array in want.items()
    )
    with pytest.raises(SchemaError, match="was replaced or changed"):
        model.parameters["head.weight"]


def test_writers_of_one_file_at_one_time_leave_one_of_theirs(tmp_path: Path) -> None:
    path, failures = tmp_path / "w", []

    def write(letter: bytes) -> None:
        try:
            for _ in range(5):
                disk.write_bytes("write", path, letter * 10_000)
                assert len(set(path.read_bytes())) == 1
        except BaseException as failure:
            failures.append(failure)

    threads = [threading.Thread(target=write, args=(bytes([65 + n]),)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert [p.name for p in tmp_path.iterdir()] == ["w"] and path.stat().st_size == 10_000


def test_a_file_system_without_locks_is_written_to(tmp_path: Path, monkeypatch) -> None:
    """As some network ones: the file is written, and nobody's partial one is taken for a dead's."""

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    path = tmp_path / "w"
    with disk.replacing("write", path) as first:
        disk.write_bytes("write", path, b"second")
        first.write(b"first")
    assert path.read_bytes() == b"first"
    with disk.new_folder("export", tmp_path / "d") as folder:
        (folder / "config.json").touch()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["d", "w"]


@pytest.mark.parametrize("make", [disk.replacing, disk.new_folder])
def test_what_is_taken_for_a_dead_writers_is_made_anew(make, tmp_path: Path, monkeypatch) -> None:
    """Another writer meets it after it was made and before it was locked, and removes it."""
    right, others = fcntl.flock, []

    def flock(descriptor: int, how: int) -> None:
        if not others:
            (partial,) = tmp_path.iterdir()
            held = os.open(partial, os.O_RDONLY)
            right(held, fcntl.LOCK_EX | fcntl.LOCK_NB)

            def remove() -> None:
                partial.rmdir() if partial.is_dir() else partial.unlink()
                os.close(held)

            others.append(threading.Timer(0.05, remove))
            others[0].start()
        right(descriptor, how)

    monkeypatch.setattr(fcntl, "flock", flock)
    with make("write", tmp_path / "w") as made:
        others[0].join()
        if isinstance(made, Path):
            (made / "config.json").touch()
        else:
            made.write(b"new")
    assert [p.name for p in tmp_path.iterdir()] == ["w"]


# ------------------------------------------------------------------ where a file is


def test_a_path_that_no_file_can_have_is_bad_input(tmp_path: Path, capsys) -> None:
    """Too long, or a link to itself: the name is at fault, not the machine."""
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    long = tmp_path / ("x" * 300)
    for path, says in ((long, "File name too long"), (tmp_path / "loop", "symbolic links")):
        for refuse in (paths.input_path, store.open_file):
            with pytest.raises(SchemaError, match=f"{says}. Give another path"):
                refuse(path)
    with pytest.raises(SchemaError, match="File name too long"):
        disk.write_bytes("write", long, b"")
    for command in (
        ["inspect", str(long)],
        ["convert", str(long), str(tmp_path / "w.h5")],
        ["corpus", "x.txt", "-o", str(tmp_path / "c.h5"), "--tokenizer", str(long)],
        ["demo", "--out", str(long)],
    ):
        assert main(command) == 2, command
        said = capsys.readouterr().err
        assert said.count("\n") == 1 and "long. Give another path" in said, command


def test_a_name_may_be_as_long_as_the_disk_allows(tmp_path: Path) -> None:
    """What the file is called while it is written is no longer than any name."""
    path = tmp_path / ("x" * 255)
    disk.write_bytes("write", path, b"new")
    assert path.read_bytes() == b"new"


def test_names_that_are_no_text_are_names_all_the_same(files: Path, tmp_path: Path, capsys) -> None:
    folder = tmp_path / os.fsdecode(b"d\xff \n")
    folder.mkdir()
    w, f, b, e = (folder / os.fsdecode(bytes([letter]) + b"\xfe'.h5") for letter in b"wfbe")
    w.write_bytes((files / "w.h5").read_bytes())
    for command in (
        ["collect", w, files / "c.h5", "-o", f],
        ["decompose", f, "-o", b],
        ["edit", w, b, "-o", e, "--rho", "0.7", "--json", folder / "e.json"],
        ["inspect", e, "--json", folder / "i.json"],
    ):
        assert main([str(word) for word in command]) == 0, capsys.readouterr().err
    facts = json.loads((folder / "i.json").read_text(encoding="utf-8"))
    assert facts["format"] == "refcurv-weights"
    assert sorted(p.suffix for p in folder.iterdir()) == [".h5"] * 4 + [".json"] * 2


def test_relative_paths_mean_the_folder_that_they_were_given_in(
    here: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch
) -> None:
    """A model and a corpus are read, a checkpoint is kept, after the folder was changed."""
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    monkeypatch.chdir(here)
    model, corpus = rc.load("w.h5"), rc.load_corpus("c.h5")
    rc.collect(
        model, corpus, checkpoint="kept.h5", progress=lambda done, total: os.chdir(elsewhere)
    )
    assert (here / "kept.h5").exists() and not list(elsewhere.iterdir())
    assert model.source["sha256"] == file_sha256(here / "w.h5")


# ------------------------------------------------------------------ which file it is


def test_a_change_within_a_tick_of_the_clock_is_noticed(here: Path) -> None:
    """As many bytes, the same inode and time, other weights: no checksum of them is believed."""
    path = here / "w.h5"
    model, before = rc.load(path), path.stat()
    with path.open("r+b") as file:
        file.write((here / "v.h5").read_bytes())
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert disk.identity(path) == store.open_file(path).identity == model.source["header"].identity
    with pytest.raises(SchemaError, match="was replaced or changed"):
        model.source["sha256"]
    with pytest.raises(SchemaError, match="was replaced or changed"):
        model.parameters["head.weight"]


def test_offsets_beyond_four_gigabytes(tmp_path: Path) -> None:
    """Sparse files of 5 GiB: what lies behind is read, and a file cut at 2 GiB is refused."""
    big, x = 5 << 30, np.arange(3, dtype="<f4")
    header = {"filler": {"dtype": "U8", "shape": [big], "data_offsets": [0, big]},
              "x": {"dtype": "F32", "shape": [3], "data_offsets": [big, big + 12]}}  # fmt: skip
    text = json.dumps(header).encode()
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.seek(big, os.SEEK_CUR)
        file.write(x.tobytes())
    _, found = safetensors.read_header(tmp_path / "model.safetensors")
    assert np.array_equal(safetensors.read_tensor(found), x)

    path = tmp_path / "w.h5"
    with h5py.File(path, "w", libver=("v108", "v108")) as file:
        for key, value in (("format", "refcurv-weights"), ("provenance", "{}")):
            file.attrs[key] = np.bytes_(value)
        file.attrs["version"] = 1
        create = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        create.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
        create.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
        space = h5py.h5s.create_simple((big,))
        made = h5py.h5d.create(file.id, b"filler", h5py.h5t.STD_U8LE, space, create)
        h5py.Dataset(made).attrs["sha256"] = np.bytes_("0" * 64)
        file.create_dataset("x", data=x).attrs["sha256"] = np.bytes_(store.sha256(x))
    opened = store.open_file(path)
    assert opened.entries["filler"].nbytes == big
    assert np.array_equal(store.read(opened, "x"), x)
    os.truncate(path, 2**31 - 1)
    with pytest.raises(SchemaError, match="truncated"):
        store.open_file(path)


# ------------------------------------------------------------------ interrupted, forked


class Own(Exception):
    """Of the caller's."""


@pytest.mark.parametrize("kind", [KeyboardInterrupt, Own])
def test_what_a_callback_raises_comes_out_and_the_run_goes_on_from_there(
    kind: type[BaseException], files: Path, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setattr(conventions, "SHARD_TOKENS", 8)
    monkeypatch.setattr(accumulate, "BLOCK_SHARDS", 2)
    model, corpus = rc.load(files / "w.h5"), rc.load_corpus(files / "c.h5")
    whole = rc.collect(model, corpus)

    def stop(done: int, _: int) -> None:
        if done == 5:
            raise kind

    with pytest.raises(kind):
        rc.collect(model, corpus, checkpoint=tmp_path / "kept.h5", progress=stop)
    counts: list[int] = []
    again = rc.collect(
        model, corpus, checkpoint=tmp_path / "kept.h5",
        progress=lambda done, total: counts.append(done),
    )  # fmt: skip
    assert counts[0] >= 5
    assert all(again[name].sum_G.tobytes() == whole[name].sum_G.tobytes() for name in whole)
    with pytest.raises(kind):
        rc.decompose(whole, progress=lambda done, total: stop(5, total))


def _forked(model: rc.Model, corpus: rc.Corpus, out: object) -> None:
    out.put(rc.collect(model, corpus)["blocks.0.mlp.up"].sum_G.tobytes())  # type: ignore


def test_a_forked_process_computes_the_same_bits(files: Path) -> None:
    """BLAS was used before the fork: some lock up in the child then."""
    model, corpus = rc.load(files / "w.h5"), rc.load_corpus(files / "c.h5")
    want = rc.collect(model, corpus)["blocks.0.mlp.up"].sum_G.tobytes()
    fork = multiprocessing.get_context("fork")
    out = fork.SimpleQueue()
    child = fork.Process(target=_forked, args=(model, corpus, out))
    child.start()
    child.join(timeout=60)
    assert child.exitcode == 0 and out.get() == want


# ------------------------------------------------------------------ the compiled kernels


@pytest.fixture
def compiled(tmp_path: Path, monkeypatch):
    """Makes a small kernel anew, as another process does; and the files that keep it."""
    if numba.config.DISABLE_JIT:
        pytest.skip("nothing is compiled")
    (tmp_path / "small.py").write_text("def add(x):\n    return x + 1\n", encoding="utf-8")
    spec = importlib.util.spec_from_file_location("small", tmp_path / "small.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setitem(sys.modules, "small", module)
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path / "cache"))

    def make():
        gc.collect()  # what was compiled before is found on disk alone
        return kernels.njit(cache=True)(module.add)

    return SimpleNamespace(make=make, files=lambda: [*(tmp_path / "cache").rglob("*.nb?")])


@pytest.mark.slow
def test_compiled_code_that_was_cut_short_is_compiled_anew(compiled) -> None:
    assert compiled.make()(1) == 2
    assert len(compiled.files()) == 2
    again = compiled.make()
    assert again(1) == 2 and sum(again.stats.cache_hits.values()) == 1
    for path in compiled.files():
        whole = path.read_bytes()
        for data in (b"", whole[:20], whole[:-1], b"\0" * len(whole)):
            path.write_bytes(data)
            assert compiled.make()(1) == 2, (path.suffix, len(data))
            healed = compiled.make()
            assert healed(1) == 2 and sum(healed.stats.cache_hits.values()) == 1


@pytest.mark.slow
def test_compiled_code_of_other_settings_is_other_code(compiled, monkeypatch) -> None:
    """Numba itself takes what a run with NUMBA_OPT=0 or NUMBA_LOOP_VECTORIZE=0 left behind."""
    for name, value in (("LOOP_VECTORIZE", 0), ("OPT", numba_config._OptLevel(0))):
        assert compiled.make()(1) == 2
        with monkeypatch.context() as patch:
            patch.setattr(numba_config, name, value)
            other = compiled.make()
            assert other(1) == 2 and not other.stats.cache_hits
        again = compiled.make()
        assert again(1) == 2 and sum(again.stats.cache_hits.values()) == 1


def test_the_key_of_compiled_code_has_its_settings(monkeypatch) -> None:
    monkeypatch.setattr(caching.FunctionCache, "_index_key", lambda *_: ("numba's",))
    cache, known = object.__new__(kernels._Kept), set()
    for value in ("first", "second", "first"):
        monkeypatch.setattr(numba_config, "LOOP_VECTORIZE", value)
        known.add(cache._index_key(None, None))
    assert len(known) == 2 and all(key[0] == "numba's" for key in known)


def test_compiled_code_that_can_be_kept_nowhere_is_compiled_anew(compiled, monkeypatch) -> None:
    """A read-only installation and no home; a disk without room."""
    monkeypatch.setattr(caching.CompileResultCacheImpl, "_locator_classes", [])
    assert compiled.make()(1) == 2
    monkeypatch.undo()

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(caching.IndexDataCacheFile, "_save_index", full)
    assert compiled.make()(1) == 2
