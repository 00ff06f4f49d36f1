"""Files: writing is whole, what a killed run left is removed, targets are checked."""

from __future__ import annotations

import errno
import os
import re
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from unittest import mock

import pytest
from strategies import config, random_parameters

import refcurv as rc
from refcurv.cli import main
from refcurv.files import disk, paths
from refcurv.files.disk import alone
from refcurv.law.checks import ConventionError, RefcurvError, SchemaError, StorageError

WRITER = """
    import sys, time
    from refcurv.files.disk import replacing
    with replacing("write", sys.argv[1]) as file:
        file.write(b"half")
        print("here", flush=True)
        time.sleep(60)
"""


def writing(path: Path, program: str = WRITER) -> subprocess.Popen[str]:
    """Another process that has written half of `path`."""
    running = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(program), str(path)],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert running.stdout is not None and running.stdout.readline() == "here\n"
    return running


FOLDER = """
    import sys, time
    from refcurv.files.disk import new_folder, write_bytes
    with new_folder("write", sys.argv[1]) as folder:
        write_bytes("write", folder / "half", b"half")
        print("here", flush=True)
        time.sleep(60)
"""


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_a_killed_writer_leaves_nothing_behind_the_next_one(tmp_path: Path) -> None:
    path, other = tmp_path / "f.h5", tmp_path / "g.h5"
    path.write_bytes(b"old")
    killed, elsewhere = writing(path), writing(other)
    for one in (killed, elsewhere):
        one.send_signal(signal.SIGKILL)
        one.wait()
    assert path.read_bytes() == b"old" and len(names(tmp_path)) == 3
    disk.write_bytes("write", path, b"new")
    assert path.read_bytes() == b"new"
    assert len(names(tmp_path)) == 2  # what the other file's writer left is not this one's
    disk.write_bytes("write", other, b"new")
    assert names(tmp_path) == ["f.h5", "g.h5"]


@pytest.mark.slow
def test_a_killed_writer_of_a_folder_leaves_nothing_behind_the_next_one(tmp_path: Path) -> None:
    path = tmp_path / "hf"
    killed = writing(path, FOLDER)
    killed.kill()
    killed.wait()
    assert not path.exists() and len(names(tmp_path)) == 1
    alive = writing(path, FOLDER)
    try:
        assert len(names(tmp_path)) == 1
        with disk.new_folder("write", path) as folder:
            disk.write_bytes("write", folder / "whole", b"new")
            assert len(names(tmp_path)) == 2  # that of the one that lives, and ours
    finally:
        alive.kill()
        alive.wait()
    assert names(path) == ["whole"]
    with pytest.raises(ZeroDivisionError), disk.new_folder("write", tmp_path / "other"):
        raise ZeroDivisionError
    assert "other" not in names(tmp_path) and len(names(tmp_path)) == 2


def test_a_writer_that_lives_keeps_its_file(tmp_path: Path) -> None:
    path = tmp_path / "f.h5"
    alive = writing(path)
    try:
        before = names(tmp_path)
        disk.write_bytes("write", path, b"new")
        assert names(tmp_path) == sorted([*before, "f.h5"])
    finally:
        alive.kill()
        alive.wait()


WRITES = re.compile(
    r"\.write_(text|bytes)\(|\bopen\([^)]*[\"'][wxa]|\.rename\(|\bos\.(replace|link)\(|np\.save|"
    r"\.tofile\(|json\.dump\(|tempfile|shutil\.(copy|move)"
)
"""What writes or moves files in Python, NumPy and json."""


ROOT = Path(disk.__file__).parents[1]


def beside_disk(what: re.Pattern[str]) -> set[tuple[str, str]]:
    """(file, line) of the package, without files/disk.py, where that is."""
    return {
        (path.relative_to(ROOT).as_posix(), line.strip())
        for path in ROOT.rglob("*.py")
        if path != Path(disk.__file__)
        for line in path.read_text(encoding="utf-8").splitlines()
        if what.search(line)
    }


def test_nothing_but_disk_writes_files() -> None:
    """What keeps a file writes it whole or not at all: with files/disk.py."""
    assert not beside_disk(WRITES)


OPENS = re.compile(
    r"\.open\(\"rb|\.read_(text|bytes)\(\)|h5py\.File\([^,]+, \"r|"
    r"ZipFile\((self\.)?(path|folder)|np\.load\("
)
"""What opens files for reading: who opens a pipe waits for its other end."""


def test_nothing_but_disk_opens_files() -> None:
    """With files/disk.py `reading`; HDF5, which opens its files itself, after `require_file`."""
    assert {file for file, _ in beside_disk(OPENS)} == {"files/store/opening.py"}
    opening = (ROOT / "files/store/opening.py").read_text(encoding="utf-8")
    assert re.search(r"require_file\(who, path\)\n    try:\n        with h5py\.File", opening)


def test_a_failure_inside_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_bytes(b"old")
    with pytest.raises(ZeroDivisionError), disk.replacing("write", path) as file:
        file.write(b"half")
        raise ZeroDivisionError
    assert path.read_bytes() == b"old" and names(tmp_path) == ["f"]


def test_a_write_takes_everything_or_says_why(tmp_path: Path, monkeypatch) -> None:
    """The system may take a part of what it is given (2 GiB at most), and fail at the next one."""
    right, room = os.write, [100]

    def write(descriptor: int, data: memoryview) -> int:
        if not room[0]:
            raise OSError(28, "full")
        room[0] -= 1
        return right(descriptor, data[:3])

    monkeypatch.setattr(os, "write", write)
    with disk.replacing("write", tmp_path / "f") as file:
        assert file.write(b"0123456789") == 10
        assert file.write(memoryview(b"")) == 0
        room[0] = 2
        with pytest.raises(StorageError, match=r"/f': No space left .* nothing that existed"):
            file.write(b"abcdefghi")
    assert (tmp_path / "f").read_bytes() == b"0123456789abcdef"
    with pytest.raises(ValueError, match="closed file"):  # and never another file's descriptor
        file.write(b"late")


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_sync_that_fails_at_the_end_says_that_the_new_file_is_there(
    kind: str, tmp_path: Path, monkeypatch
) -> None:
    """The folder is synced after the rename: what existed was changed."""
    path, right = tmp_path / "f", os.fsync

    def fsync(descriptor: int) -> None:
        if os.path.samestat(os.fstat(descriptor), tmp_path.stat()):
            raise OSError(5, "Input/output error")
        right(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(StorageError, match="What was written is in its place") as caught:
        if kind == "file":
            path.write_bytes(b"old")
            disk.write_bytes("write", path, b"new")
        else:
            with disk.new_folder("write", path) as folder:
                (folder / "f").write_bytes(b"new")
    assert "nothing that existed" not in str(caught.value)
    assert (path if kind == "file" else path / "f").read_bytes() == b"new"
    assert names(tmp_path) == ["f"]


def test_a_folder_takes_the_permissions_of_the_empty_one_there(tmp_path: Path) -> None:
    """What only its owner may read stays so; one that not even its owner may write to is filled."""
    for old, new in [(0o700, 0o700), (0o2775, 0o2775), (0o555, 0o755)]:
        path = tmp_path / f"{old:o}"
        path.mkdir()
        path.chmod(old)
        with disk.new_folder("write", path) as folder:
            assert folder.stat().st_mode & 0o7777 == new
            disk.write_bytes("write", folder / "f", b"new")
        assert path.stat().st_mode & 0o7777 == new and names(path) == ["f"]


def test_a_folder_that_is_being_filled_is_removed(tmp_path: Path, monkeypatch) -> None:
    """By another run: a file comes between the last look at the folder and its end."""
    path, right, late = tmp_path / "parts", os.rmdir, ["a", "b"]
    path.mkdir()
    (path / "first").write_bytes(b"x")

    def rmdir(what, **how) -> None:
        if late:
            (path / late.pop()).write_bytes(b"late")
        right(what, **how)

    monkeypatch.setattr(os, "rmdir", rmdir)
    assert disk.remove_folder("write", path, bool)
    assert not late and not names(tmp_path)
    assert disk.remove_folder("write", path, bool)  # there is none
    path.mkdir()
    late[:] = [str(n) for n in range(1000)]
    with pytest.raises(StorageError, match=r"write: .*Directory not empty"):
        disk.remove_folder("write", path, bool)


def test_what_is_not_ours_stays_in_a_folder(tmp_path: Path) -> None:
    path = tmp_path / "parts"
    (path / "b.h5").mkdir(parents=True)
    for name in ("a.h5", "c.txt", ".refcurv-01234567-0123456789ab.partial", "run.json"):
        (path / name).touch()
    (path / "d.h5").symlink_to("a.h5")
    mine = {"a.h5", "b.h5", "d.h5", "run.json"}.__contains__
    assert disk.strangers("write", path, mine) == ["b.h5", "c.txt", "d.h5"]
    assert not disk.remove_folder("write", path, mine)
    assert names(path) == ["b.h5", "c.txt", "d.h5"]
    assert disk.strangers("write", tmp_path / "none", mine) == []


def test_a_pipe_beside_an_output_is_not_waited_for(tmp_path: Path) -> None:
    """It has the name of what a dead writer left."""
    pipe = disk._partial(tmp_path / "f", "0123456789ab")
    os.mkfifo(pipe)
    disk.write_bytes("write", tmp_path / "f", b"new")
    assert (tmp_path / "f").read_bytes() == b"new"


def test_no_path_leads_through_a_folder_that_is_not_there(tmp_path: Path, monkeypatch) -> None:
    """It was written to, and was not found when it was read again."""
    monkeypatch.chdir(tmp_path)
    for path in ("nod/../x", tmp_path / "nod/../x"):
        for refuse in (paths.output_path, paths.output_file, disk.require_writable):
            with pytest.raises(SchemaError, match=r"write: the folder '.*nod/\.\.' does not exist"):
                refuse("write", path)
        with pytest.raises(SchemaError, match="does not exist"):
            disk.write_bytes("write", path, b"new")
    assert main(["demo", "--out", "nod/../made/demo"]) == 2 and not names(tmp_path)
    (tmp_path / "nod").mkdir()
    disk.make_folders("write", "nod/../made/here")
    assert (tmp_path / "made/here").is_dir()
    assert paths.output_path("write", "nod/../x") == tmp_path / "x"


def test_a_working_folder_that_is_gone_is_said(tmp_path: Path, monkeypatch, capsys) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    for refuse in (paths.input_path, lambda path: paths.output_path("open", path)):
        with pytest.raises(SchemaError, match=r"open: 'x\.h5' leads from the folder .* removed"):
            refuse("x.h5")
    for command in (
        ["inspect", "x.h5"],
        ["decompose", "x.h5", "-o", "y.h5"],
        ["demo", "--out", "d"],
    ):
        assert main(command) == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1 and "leads from the folder that you are in" in said, said


def test_what_errors_say_has_no_addresses() -> None:
    told = paths.one_line(ValueError("malformed: <ast.BinOp object at 0x7f7f2a>."))
    assert told.endswith("object>")


def test_a_target_that_cannot_be_written_is_refused_at_once(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    for path, kind, says in [
        (tmp_path / "folder", SchemaError, "is a folder"),
        (tmp_path / "pipe", SchemaError, "is no regular file"),
        (Path(os.devnull), SchemaError, "is no regular file"),
        (tmp_path / "nowhere" / "f", SchemaError, "does not exist"),
        (tmp_path / "pipe" / "f", SchemaError, "pipe' is no folder. Give another path"),
        (Path("/proc/f.h5"), StorageError, "/proc/f.h5"),  # nobody may make a file there
    ]:
        with pytest.raises(kind, match=says):
            disk.require_writable("collect", path)
    (tmp_path / "there").write_bytes(b"old")
    assert disk.require_writable("collect", tmp_path / "there") == tmp_path / "there"
    disk.require_writable("collect", tmp_path / "new")
    assert names(tmp_path) == ["folder", "pipe", "there"]


@pytest.mark.parametrize(
    ("number", "status"), [(errno.EACCES, 3), (errno.ENAMETOOLONG, 2), (errno.ELOOP, 2)]
)
def test_what_may_not_be_looked_at_is_not_called_missing(
    number: int, status: int, tmp_path: Path, capsys, monkeypatch
) -> None:
    """Neither a file nor a folder: one line names the path, with the right exit status."""
    made = config(vocabulary=20)
    rc.save(rc.Model(made, random_parameters(made, 0)), weights := tmp_path / "w.h5")
    hidden, right = tmp_path / "hidden" / "x", Path.stat
    hidden.parent.mkdir()

    def stat(path: Path, **options: bool) -> os.stat_result:
        if path.parent.name == "hidden":
            raise OSError(number, os.strerror(number), str(path))
        return right(path, **options)

    monkeypatch.setattr(Path, "stat", stat)
    out = str(tmp_path / "out")
    for command in (
        ["inspect", str(hidden)],
        ["convert", str(hidden), out],
        ["corpus", "x.txt", "--tokenizer", str(hidden), "-o", out],
        ["export", str(weights), out, "--tokenizer-from", str(hidden)],
        ["inspect", str(weights), "--json", str(hidden)],
        ["demo", "--out", str(hidden)],
    ):
        assert main(command) == status, command
        said = capsys.readouterr().err
        assert said.count("\n") == 1 and f"{str(hidden)!r}: {os.strerror(number)}. " in said, said
    assert paths.mode_of("x", tmp_path / "nothing") == 0 and paths.is_folder("x", tmp_path)


def test_outputs_are_apart_from_inputs_and_from_each_other(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    one.write_bytes(b"1")
    (tmp_path / "soft").symlink_to(one)
    (tmp_path / "dangling").symlink_to(two)
    os.link(one, tmp_path / "hard")
    for name in ("one", "soft", "hard", "../" + tmp_path.name + "/one"):
        with pytest.raises(SchemaError, match=r"--output .* is the same file as WEIGHTS"):
            paths.require_apart("edit", {"--output": tmp_path / name}, {"WEIGHTS": one})
    with pytest.raises(SchemaError, match=r"--json .* is the same file as --output"):
        paths.require_apart("edit", {"--output": two, "--json": tmp_path / "dangling"}, {})
    paths.require_apart("edit", {"--output": two, "--json": tmp_path / "three"}, {"WEIGHTS": one})
    assert issubclass(SchemaError, RefcurvError)


def test_what_was_made_anew_meanwhile_is_not_removed(tmp_path: Path) -> None:
    """Between finding a dead writer's file and locking it, a living one may take its name."""
    target = tmp_path / "out"
    partial = disk._partial(target)
    partial.touch()

    def lock(_descriptor: int, _how: int) -> None:
        partial.unlink()
        partial.write_text("alive")

    with mock.patch.object(disk.fcntl, "flock", lock):
        disk._remove_left_over(target)
    assert partial.read_text() == "alive"
    disk._remove_left_over(target)
    assert not partial.exists()


def test_two_runs_do_not_write_into_one_folder(tmp_path: Path) -> None:
    """In one process or in two; a run that was killed gives its folder free."""
    held = "import sys; from refcurv.files.disk import alone\n"
    held += "with alone('x', sys.argv[1]): print('held', flush=True); sys.stdin.read()"
    with alone("report", tmp_path), pytest.raises(ConventionError, match="another run is writing"):
        with alone("report", tmp_path):
            pass
    with subprocess.Popen(
        [sys.executable, "-c", held, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout is not None and other.stdout.readline() == b"held\n"
        with pytest.raises(ConventionError), alone("report", tmp_path):
            pass
        other.kill()
    with alone("report", tmp_path):
        pass
    with mock.patch("fcntl.flock", side_effect=OSError(errno.ENOLCK, "no locks")):
        with alone("report", tmp_path), alone("report", tmp_path):
            pass
