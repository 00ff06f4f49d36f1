"""files/store/: what is written comes back bit for bit, whole or not at all; lies are refused."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import signal
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import threadpoolctl
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from refcurv.files import store
from refcurv.files.disk import parse_json
from refcurv.files.store import Entry
from refcurv.law import conventions
from refcurv.law.checks import (
    ChecksumError,
    ConventionError,
    DTypeError,
    NameUnknownError,
    NonFiniteError,
    SchemaError,
    StorageError,
)

W = np.arange(6, dtype=np.float32).reshape(2, 3)
LONG = "x" * 100_000  # beyond the 64 KiB of an ordinary HDF5 attribute


def put(path: Path, *entries: Entry, **attributes: Any) -> Path:
    store.write(
        path, format="refcurv-basis", attributes=attributes, arrays=entries, provenance={"seed": 1}
    )
    return path


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return put(tmp_path / "f.h5", Entry("a.W", W), Entry("a.n", np.int64(7)), Entry("b", W[:, 0]))


def only(folder: Path, *names: str) -> bool:
    return sorted(p.name for p in folder.iterdir()) == sorted(names)


# ------------------------------------------------------------------ round trip

NUMBERS = [
    f"{order}{kind}" for order in "<>" for kind in ("f2", "f4", "f8", "i1", "i4", "i8", "u2")
]
ARRAYS = st.sampled_from(NUMBERS).flatmap(
    lambda kind: hnp.arrays(kind, hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4))
)


@given(ARRAYS, st.booleans())
def test_write_then_read_is_bit_equal(array: np.ndarray, turned: bool) -> None:
    array = array.T if turned else array
    with tempfile.TemporaryDirectory() as folder:
        header = store.open_file(put(Path(folder) / "f.h5", Entry("a.b", array)))
        back = store.read(header, "a.b")
    little = array.astype(array.dtype.newbyteorder("<"))
    assert back.shape == array.shape and back.dtype == little.dtype
    assert back.tobytes() == little.tobytes()
    assert header.entries["a.b"].nbytes == array.nbytes


def test_attributes_and_order_come_back(tmp_path: Path) -> None:
    entries = [Entry("z.9", W, {"meaning": "A in Größe ∑", "n": 3, "share": 0.5}), Entry("a.10", W)]
    header = store.open_file(put(tmp_path / "f.h5", *entries, config=LONG, empty="", rho=0.1, k=2))
    assert header.attributes == {"config": LONG, "empty": "", "rho": 0.1, "k": 2}
    assert list(header.entries) == ["z.9", "a.10"]
    assert header.entries["z.9"].attributes == entries[0].attributes
    assert header.provenance == {"seed": 1} and header.version == 2
    assert isinstance(header.attributes["k"], int) and isinstance(header.attributes["rho"], float)


def test_an_attribute_may_be_no_number(tmp_path: Path) -> None:
    """A variance whose squares overflowed."""
    header = store.open_file(put(tmp_path / "f.h5", Entry("a", W, {"x": np.nan, "y": np.inf})))
    assert np.isnan(header.entries["a"].attributes["x"])
    assert (store.read(header, "a") == W).all()


def test_anyone_can_read_it(path: Path) -> None:
    """With plain h5py and no refcurv: names, bytes, layout, byte order, checksum."""
    with h5py.File(path) as file:
        assert file.attrs["format"] == b"refcurv-basis" and file.attrs["version"] == 2
        assert json.loads(file.attrs["provenance"]) == {"seed": 1}
        data = file["a/W"]
        assert data.chunks is None and data.dtype == "<f4" and (data[()] == W).all()
        assert data.id.get_create_plist().get_layout() == h5py.h5d.CONTIGUOUS
        # SHA-256 of the 24 bytes, from sha256sum
        assert data.attrs["sha256"].decode() == subprocess.run(
            ["sha256sum"], input=W.tobytes(), capture_output=True, check=True
        ).stdout.decode()[:64]  # fmt: skip


def test_same_input_same_file(tmp_path: Path) -> None:
    one, two = (put(tmp_path / f"{k}.h5", Entry("a.W", W), Entry("b", W)) for k in "12")
    assert one.read_bytes() == two.read_bytes()
    assert store.Source(store.open_file(one))["sha256"] == store.file_sha256(two)


def by_hand(path: Path) -> str:
    """The root's sha256 as its definition reads, from plain h5py."""
    facts: list[bytes] = []

    def attributes(node: Any) -> None:
        for key in sorted(node.attrs):
            value = node.attrs[key]
            if node.name == "/" and key == "sha256":
                continue
            facts.append(key.encode())
            if isinstance(value, bytes):
                facts.append(value)
            elif value.dtype.kind == "f":
                facts.append(np.array(value, ">f8").tobytes().hex().encode())
            else:
                facts.append(b"%d" % value)

    with h5py.File(path) as file:
        facts.append(b"")
        attributes(file)
        found = {}
        file.visititems(lambda n, d: found.update({n.replace("/", "."): d})
                        if isinstance(d, h5py.Dataset) else None)  # fmt: skip
        for name in sorted(found):
            data = found[name]
            shape = ",".join(str(n) for n in data.shape)
            facts += [name.encode(), data.dtype.name.encode(), shape.encode()]
            attributes(data)
    text = b"".join(str(len(fact)).encode() + b":" + fact + b"," for fact in facts)
    return hashlib.sha256(text).hexdigest()


def test_the_root_declares_what_its_definition_says(tmp_path: Path) -> None:
    entries = [
        Entry("z.W", W, {"meaning": "Größe", "empty": "", "n": -3, "share": -0.0}),
        Entry("a", np.float64(2), {"error": 5e-324}),
        Entry("b.u", np.zeros((2, 0, 3), np.uint16), {"encoding": "bfloat16"}),
    ]
    path = put(tmp_path / "f.h5", *entries, k=2**60, rho=np.float32(0.1), half="a\udcff")
    with h5py.File(path) as file:
        assert file.attrs["sha256"].decode() == by_hand(path)
    store.open_file(path)


@pytest.mark.parametrize("count", [3, 12])  # of more than 8, HDF5 checks no long one itself
def test_every_bit_of_an_attribute_is_checked(tmp_path: Path, count: int) -> None:
    """Any bit of any attribute's name or value, flipped: refused, or it changes no fact."""
    known = {f"some_fact_{i}": f"of value {i} in {i * 7:03d} " * 300 for i in range(count)}
    path = put(tmp_path / "f.h5", Entry("a", W, {"raised": 5}), **known)
    good = store.open_file(path)
    data = path.read_bytes()
    at = [
        i
        for text in [*known, *(v[:20] for v in known.values())]
        if (i := data.find(text.encode())) > 0
    ]
    at = [i + k for i in at for k in range(0, 11, 5)]
    assert len(at) > 2 * count
    for place in at:
        for bit in range(8):
            flipped = bytearray(data)
            flipped[place] ^= 1 << bit
            path.write_bytes(flipped)
            try:
                found = store.open_file(path)
            except SchemaError:
                continue
            assert (found.attributes, found.entries) == (good.attributes, good.entries)


def test_provenance_says_what_and_with_what() -> None:
    made = store.provenance(inputs={"w.h5": "ab"}, seed=3)
    assert made["inputs"] == {"w.h5": "ab"} and made["seed"] == 3
    assert made["conventions"] == conventions.describe()
    assert made["libraries"]["numpy"] == np.__version__
    assert {"refcurv", "python", "platform", "blas", "cpu_features"} <= set(made)
    assert made["blas"] and all(b["architecture"] for b in made["blas"])
    assert made["blas_threads"] == 1
    assert json.loads(json.dumps(made)) == made == store.provenance(inputs={"w.h5": "ab"}, seed=3)


def test_provenance_does_not_depend_on_what_was_loaded_first(monkeypatch) -> None:
    blas = {"user_api": "blas", "internal_api": "openblas", "version": "0.3"}
    found = [blas | {"architecture": name} for name in ("Haswell", "SkylakeX", "Zen")]
    made = []
    for order in itertools.permutations(found):
        monkeypatch.setattr(threadpoolctl, "threadpool_info", lambda order=order: list(order))
        made.append(json.dumps(store.provenance()))
    assert len(set(made)) == 1


def test_provenance_may_name_a_file_that_is_not_utf8(tmp_path: Path) -> None:
    inputs = {"inputs": {os.fsdecode(b"w\xff.h5"): "ab"}}
    path = tmp_path / "f.h5"
    store.write(path, format="refcurv-basis", attributes={}, arrays=[], provenance=inputs)
    assert store.open_file(path).provenance == inputs


# ------------------------------------------------------------------ writing: all or nothing


@pytest.mark.parametrize("failure", [RuntimeError("no"), KeyboardInterrupt()], ids=type)
def test_a_failure_midway_leaves_the_old_file_alone(path: Path, failure: BaseException) -> None:
    before = path.read_bytes()

    def entries() -> Iterator[Entry]:
        yield Entry("a.W", W + 1)
        raise failure

    with pytest.raises(type(failure)):
        store.write(path, format="refcurv-basis", attributes={}, arrays=entries(), provenance={})
    assert path.read_bytes() == before and only(path.parent, "f.h5")


def limited(program: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run a program in which writing beyond a limit fails, as on a full disk, with EFBIG."""
    prelude = """
        import os, resource, signal, sys
        import numpy as np
        from refcurv.files import store
        from refcurv.law.checks import StorageError
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        def limit(size): resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
        def write(path, arrays):
            store.write(path, format="refcurv-basis", attributes={}, arrays=arrays, provenance={})
        """
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(prelude) + textwrap.dedent(program)]
        + [str(argument) for argument in arguments],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(Path(store.__file__).parents[3])},
    )


@pytest.mark.parametrize("size", [100, 3000, 20_000, 900_000])
def test_a_full_disk_is_one_line_and_leaves_the_old_file(path: Path, size: int) -> None:
    """HDF5 itself dies by SIGSEGV here when it writes to the file directly (100 and 20000)."""
    before = path.read_bytes()
    program = """
        drawn = []
        def arrays():
            for i, n in enumerate([10] * 300 + [10**6] + [10] * 300):
                drawn.append(i)
                yield store.Entry(f"g.d{i}", np.ones(n))
        limit(int(sys.argv[2]))
        try:
            write(sys.argv[1], arrays())
        except StorageError as error:
            print(error, len(drawn) <= 301, error.status)
        """
    run = limited(program, path, size)
    assert run.returncode == 0 and run.stderr == ""
    assert run.stdout.count("\n") == 1 and str(path) in run.stdout
    assert "File too large" in run.stdout and run.stdout.endswith(" True 3\n")
    assert path.read_bytes() == before and only(path.parent, "f.h5")


@pytest.mark.parametrize(
    "failure, seen",
    [(OSError(28, "full"), StorageError), (KeyboardInterrupt(), KeyboardInterrupt)],
    ids=["full", "interrupted"],
)
def test_a_disk_that_fails_at_any_write(
    path: Path, monkeypatch: pytest.MonkeyPatch, failure: BaseException, seen: Any
) -> None:
    """From the first byte to the last header, which HDF5 writes on closing."""
    entries, left = [Entry("a.W", W), Entry("b", W)], [10**6]

    def write(descriptor: int, data: Any, right: Any = os.write) -> int:
        left[0] -= 1
        if left[0] < 0:
            raise failure
        return right(descriptor, data)

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", write)
        put(path, *entries)
        writes = 10**6 - left[0]
        for left[0] in range(writes):
            with pytest.raises(seen):
                put(path, *entries, Entry("other", W))
    assert writes > 5 and only(path.parent, "f.h5")
    assert store.verify(store.open_file(path)) == [("a.W", True), ("b", True)]


def test_the_old_file_is_replaced_not_rewritten(path: Path, tmp_path: Path) -> None:
    """A reader that has it open, or another name of it, keeps the old one whole."""
    before = path.read_bytes()
    os.link(path, tmp_path / "kept.h5")
    put(path, Entry("other", W))
    assert (tmp_path / "kept.h5").read_bytes() == before != path.read_bytes()


def test_a_link_is_followed_and_stays(path: Path, tmp_path: Path) -> None:
    link = tmp_path / "link.h5"
    link.symlink_to(path)
    put(link, Entry("other", W))
    assert link.is_symlink() and list(store.open_file(path).entries) == ["other"]


def test_writing_where_nothing_can_be_written(tmp_path: Path) -> None:
    with pytest.raises(SchemaError, match=r"folder .*nowhere' does not exist"):
        put(tmp_path / "nowhere" / "f.h5", Entry("a", W))
    with pytest.raises(SchemaError, match="is a folder"):
        put(tmp_path, Entry("a", W))
    with pytest.raises(SchemaError, match="no regular file"):
        put(Path(os.devnull), Entry("a", W))
    with pytest.raises(SchemaError, match="File name too long"):
        put(tmp_path / ("n" * 300), Entry("a", W))
    with pytest.raises(SchemaError, match="is no path"):
        put(Path("a\0b"), Entry("a", W))
    assert only(tmp_path)


@pytest.mark.parametrize(
    "number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)]
)
def test_an_interrupt_at_any_moment_of_a_write_is_an_interrupt(
    number: signal.Signals, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Ctrl-C inside one of HDF5's calls to our file does not come out as another error."""
    before = signal.signal(number, signal.default_int_handler)
    request.addfinalizer(lambda: signal.signal(number, before))
    path = put(tmp_path / "f.h5", Entry("old", W))
    old, stopped = path.read_bytes(), 0
    for delay in np.linspace(0, 0.03, 60):
        timer = threading.Timer(delay, os.kill, (os.getpid(), number))
        try:
            timer.start()
            put(path, *(Entry(f"a{i}", np.zeros((50, 50))) for i in range(60)), **{"k": LONG})
            timer.join()
            time.sleep(0.01)
        except KeyboardInterrupt:
            stopped += 1
        timer.join()
        assert only(tmp_path, "f.h5")
        if stopped and path.read_bytes() != old:
            store.open_file(path)
            path.write_bytes(old)
    assert stopped


def test_an_interrupt_while_hdf5_begins_a_file_leaves_none_open(path: Path, monkeypatch) -> None:
    """HDF5 closes at exit what is open, and dies there: the file of Python's is gone by then."""
    before, right = path.read_bytes(), h5py.File

    def interrupted(*arguments: Any, **options: Any) -> h5py.File:
        os.kill(os.getpid(), signal.SIGINT)
        return right(*arguments, **options)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(h5py, "File", interrupted)
        put(path, Entry("a", W))
    assert not h5py.h5f.get_obj_count(h5py.h5f.OBJ_ALL, h5py.h5f.OBJ_FILE)
    assert path.read_bytes() == before and only(path.parent, "f.h5")


@pytest.mark.parametrize(
    "name", ["", ".", "a..b", "a/b", "a b", "ü", "a.", "x" * 101, "a." * 16 + "a"]
)
def test_names_are_plain(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConventionError, match="cannot name a dataset"):
        put(tmp_path / "f.h5", Entry(name, W))
    assert only(tmp_path)


@pytest.mark.parametrize("names", [("a", "a"), ("a", "a.b"), ("a.b.c", "a.b"), ("a.b", "a.b.c.d")])
def test_names_do_not_collide(tmp_path: Path, names: tuple[str, str]) -> None:
    with pytest.raises(ConventionError, match="occurs twice, or is inside or above"):
        put(tmp_path / "f.h5", *(Entry(name, W) for name in names))


@pytest.mark.parametrize("dtype", [bool, complex, np.longdouble, "S3", object])
def test_other_dtypes_are_not_written(tmp_path: Path, dtype: Any) -> None:
    with pytest.raises(DTypeError, match="files hold float16"):
        put(tmp_path / "f.h5", Entry("a", np.zeros(2, dtype)))


def test_an_entry_is_what_is_asked_for_or_refused(path: Path) -> None:
    header = store.open_file(path)
    assert store.require_entry(header, "a.W", "float32", (2, None)) == (2, 3)
    assert store.require_entry(header, "a.n", "int64", ()) == ()
    wrong = [("a.x", "float32", (2, 3)), ("a.W", "float64", (2, 3)), ("a.W", "float32", (2,)),
             ("a.W", "float32", (3, 2)), ("a.n", "int64", (1,))]  # fmt: skip
    for name, dtype, shape in wrong:
        with pytest.raises(SchemaError, match=r"f\.h5.*a\."):
            store.require_entry(header, name, dtype, shape)
    empty = store.open_file(put(path, Entry("e", np.zeros((0, 3), np.float32))))
    with pytest.raises(SchemaError, match="any, 3"):
        store.require_entry(empty, "e", "float32", (None, 3))


def test_an_attribute_is_what_is_asked_for_or_refused() -> None:
    facts = {"n": 3, "x": 0.5, "t": "text", "inf": np.inf, "long": "x" * 10**6}
    assert store.fact("f", facts, "n", int) == 3 and store.fact("f", facts, "n", float) == 3.0
    assert store.fact("f", facts, "x", float) == 0.5 and store.fact("f", facts, "t", str) == "text"
    for key, kind in [("x", int), ("t", int), ("n", str), ("inf", float), ("t", float),
                      ("none", int), ("long", float)]:  # fmt: skip
        with pytest.raises(SchemaError, match=f"f: attribute '{key}' must be") as caught:
            store.fact("f", facts, key, kind)
        assert len(str(caught.value)) < 200


# ------------------------------------------------------------------ opening: nothing is believed


def add(name: str, **options: Any) -> Callable[[h5py.File], None]:
    def change(file: h5py.File) -> None:
        data = file.create_dataset(name, **options)
        data.attrs["sha256"] = np.bytes_("0" * 64)

    return change


def attribute(key: str, value: Any, on: str = "/") -> Callable[[h5py.File], None]:
    fixed = np.bytes_(value) if isinstance(value, str) else value
    return lambda file: file[on].attrs.__setitem__(key, fixed)


def without(key: str, on: str = "/") -> Callable[[h5py.File], None]:
    return lambda file: file[on].attrs.__delitem__(key)


def link(name: str, target: Any) -> Callable[[h5py.File], None]:
    return lambda file: file.__setitem__(name, target)


def virtual(file: h5py.File) -> None:
    layout = h5py.VirtualLayout((2, 3), "f4")
    layout[:] = h5py.VirtualSource("/etc/hostname", "x", (2, 3))
    file.create_virtual_dataset("v", layout)


def odd_float() -> h5py.h5t.TypeFloatID:
    """Four bytes whose exponents are off by 27."""
    kind = h5py.h5t.IEEE_F32LE.copy()
    kind.set_ebias(100)
    return kind


def low_level(kind: Any, length: int, layout: int | None = None) -> Callable[[h5py.File], None]:
    def change(file: h5py.File) -> None:
        plist = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        if layout is not None:
            plist.set_layout(layout)
        h5py.h5d.create(file.id, b"x", kind, h5py.h5s.create_simple((length,)), plist)

    return change


def two_links(file: h5py.File) -> None:
    file["again"] = file["a/W"]


def cycle(file: h5py.File) -> None:
    file["a/loop"] = file["a"]


def deep(file: h5py.File) -> None:
    file.create_group("/".join("d" * 17))


def object_name(file: h5py.File) -> None:
    file.move("b", "b b")


HOSTILE: dict[str, tuple[Callable[[h5py.File], None], str]] = {
    "no format": (without("format"), "not a refcurv file: its attribute 'format' is None"),
    "foreign format": (attribute("format", "netcdf"), "its attribute 'format' is 'netcdf'"),
    "other format": (attribute("format", "refcurv-corpus"), "is a refcurv-corpus file .*deco"),
    "no version": (without("version"), "has version None; this refcurv reads 1"),
    "newer version": (attribute("version", 3), "version 3; .*newer"),
    "no checksum": (attribute("version", 2), "do not match their SHA-256"),
    "version is text": (attribute("version", "1"), "version '1'"),
    "version is a float": (attribute("version", 1.0), "version 1.0"),
    "no provenance": (without("provenance"), "no text attribute 'provenance'"),
    "provenance is a list": (attribute("provenance", "[1]"), "must be a JSON object; got list"),
    "provenance cut short": (attribute("provenance", '{"a": '), "provenance is not valid JSON"),
    "provenance nested": (attribute("provenance", '{"a":' * 100_000), "not valid JSON"),
    "key twice": (attribute("provenance", '{"a": 1, "a": 2}'), "a key occurs twice"),
    "NaN in JSON": (attribute("provenance", '{"a": NaN}'), "NaN is not JSON"),
    "variable length": (
        lambda file: file.attrs.__setitem__("x", "text"),
        r"'x' of variable length; .* numpy\.bytes_",
    ),
    "vast attribute": (
        lambda file: file.attrs.create("x", np.bytes_(), dtype="S20000000"),
        "'x' that is no text or number of at most 16777216 bytes",
    ),
    "not UTF-8": (attribute("x", np.bytes_(b"\xff")), "can't decode"),
    "array attribute": (attribute("x", np.zeros(3)), "attribute 'x' that is no text or number"),
    "null attribute": (attribute("x", h5py.Empty("f4")), "attribute 'x' that is no text"),
    "many attributes": (
        lambda file: [file.attrs.__setitem__(f"k{i}", i) for i in range(70)] and None,
        "more than 64 attributes",
    ),
    "no sha256": (without("sha256", "b"), "'b' has no attribute 'sha256'"),
    "short sha256": (attribute("sha256", "abc", "b"), "'b' has no attribute 'sha256' of 64"),
    "encoding": (attribute("encoding", "zip", "b"), "encoding 'zip'"),
    "bfloat16 in float32": (attribute("encoding", "bfloat16", "b"), "'b', float32, has encoding"),
    "soft link": (link("s", h5py.SoftLink("/a/W")), "'s' is a soft link"),
    "dangling soft link": (link("a/s", h5py.SoftLink("/nowhere")), "'a/s' is a soft link"),
    "external link": (link("e", h5py.ExternalLink("/etc/passwd", "/")), "'e' is an external link"),
    "named type": (link("t", np.dtype("f4")), "'t' is a Datatype"),
    "two links": (two_links, "two links lead to the object"),
    "cycle": (cycle, "two links lead to the object"),
    "deep": (deep, "16 levels"),
    "odd name": (object_name, "'b b' is no plain name"),
    "chunked": (add("c", data=W, chunks=(1, 3)), "dataset 'c' is chunked"),
    "compressed": (add("c", data=W, compression="gzip"), "dataset 'c' is chunked"),
    "resizable": (add("c", data=W, maxshape=(None, 3)), "dataset 'c' is chunked"),
    "external storage": (
        add("c", shape=(2,), dtype="f4", external=[("/etc/hostname", 0, 8)]),
        "stored in another file",
    ),
    "virtual": (virtual, "dataset 'v' is virtual"),
    "compact": (low_level(h5py.h5t.IEEE_F32LE, 2, h5py.h5d.COMPACT), "'x' is compact"),
    "big-endian": (add("c", data=W.astype(">f4")), "type big-endian"),
    "odd float": (low_level(odd_float(), 2), "type float"),
    "compound": (add("c", data=np.zeros(2, "i4,f4")), "type compound"),
    "object reference": (add("c", shape=(1,), dtype=h5py.ref_dtype), "type reference"),
    "strings": (add("c", data=["a", "b"]), "type string"),
    "ragged": (add("c", shape=(1,), dtype=h5py.vlen_dtype("i4")), "type vlen"),
    "bool": (add("c", data=np.zeros(2, bool)), "type enum"),
    "no dataspace": (link("c", h5py.Empty("f4")), "got shape None"),
    "a terabyte never written": (
        low_level(h5py.h5t.IEEE_F64LE, 2**37),
        "declares 1099511627776 bytes of shape .* but stores 0",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_file_is_refused_in_one_line(path: Path, name: str) -> None:
    change, fragment = HOSTILE[name]
    with h5py.File(path, "r+", libver=("v108", "latest")) as file:
        file.attrs["version"] = 1  # which needs no checksum of what it declares
        del file.attrs["sha256"]
        change(file)
    with pytest.raises(SchemaError, match=fragment) as caught:
        store.open_file(path, format="refcurv-basis")
    assert "\n" not in str(caught.value) and repr(str(path)) in str(caught.value)


def test_a_cut_file_is_refused_at_every_length(path: Path) -> None:
    whole = path.read_bytes()
    for length in [0, 1, 8, 100, *range(200, len(whole), 97), len(whole) - 1]:
        path.write_bytes(whole[:length])
        with pytest.raises(SchemaError, match="is not HDF5, or damaged"):
            store.open_file(path)


def test_a_flipped_bit_is_never_believed(path: Path) -> None:
    """Anywhere in the file: refused, or caught by a checksum, or in bytes that nothing reads."""
    whole = path.read_bytes()
    good = store.open_file(path)
    values = {name: store.read(good, name) for name in good.entries}
    caught = 0
    for at in range(0, len(whole), 7):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 16]) + whole[at + 1 :])
        try:
            header = store.open_file(path)
            for name in header.entries:
                assert store.read(header, name).tobytes() == values[name].tobytes()
            assert header.entries == good.entries and header.attributes == good.attributes
            assert header.provenance == good.provenance
        except SchemaError:
            caught += 1
    assert caught > len(whole) / 7 / 3


def test_no_file_at_all(tmp_path: Path) -> None:
    for bad, fragment in [
        (tmp_path / "none.h5", "there is no file"),
        (tmp_path, "is a folder"),
        (Path("/dev/zero"), "no regular file"),
        (Path("a\0b"), "is no path"),
        (Path(__file__), "is not HDF5"),
        (Path(__file__) / "x", "there is no file"),
    ]:
        with pytest.raises(SchemaError, match=fragment):
            store.open_file(bad)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_no_permission_is_the_machines_fault(path: Path) -> None:
    path.chmod(0)
    with pytest.raises(StorageError, match="Permission denied"):
        store.open_file(path)


def test_two_datasets_on_the_same_bytes_are_refused(tmp_path: Path) -> None:
    """Only a forger can do it: the second dataset's address is overwritten in the old format."""
    path = tmp_path / "f.h5"
    with h5py.File(path, "w") as file:  # the old format has no checksums over its headers
        texts = {"format": np.bytes_("refcurv-basis"), "provenance": np.bytes_("{}")}
        file.attrs.update({**texts, "version": 1})
        for name in "ab":
            file.create_dataset(name, data=W).attrs["sha256"] = np.bytes_("0" * 64)
        a, b = (file[name].id.get_offset().to_bytes(8, "little") for name in "ab")
    data = path.read_bytes()
    assert data.count(b) == 1 and store.open_file(path)
    path.write_bytes(data.replace(b, a))
    with pytest.raises(SchemaError, match="overlaps"):
        store.open_file(path)
    path.write_bytes(data.replace(b, (10**6).to_bytes(8, "little")))
    # newer HDF5 libraries see this one themselves
    with pytest.raises(SchemaError, match=r"declares data up to byte 1000024|file corruption"):
        store.open_file(path)


def test_json_is_an_object() -> None:
    assert parse_json("who: what", '{"a": [1, null]}') == {"a": [1, None]}
    with pytest.raises(SchemaError, match="who: what is not valid JSON"):
        parse_json("who: what", b"\xff")


# ------------------------------------------------------------------ reading


def flip(path: Path, name: str) -> None:
    with h5py.File(path, "r") as file:
        at = file[name].id.get_offset()
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def test_a_flipped_bit_is_named(path: Path) -> None:
    flip(path, "a/W")
    header = store.open_file(path)
    with pytest.raises(ChecksumError, match=r"dataset 'a\.W' do not match"):
        store.read(header, "a.W")
    assert store.read(header, "a.W", verify=False).shape == (2, 3)
    assert store.verify(header) == [("a.W", False), ("a.n", True), ("b", True)]


@pytest.mark.parametrize(
    "now",
    [
        [Entry("a.W", W + 1)],
        [Entry("a.W", W.reshape(3, 2))],
        [Entry("a.W", W.view(np.int32))],
        [Entry("a", W)],
        [Entry("a.W.x", W)],
        [],
    ],
    ids=["values", "shape", "dtype", "dataset above", "group", "nothing"],
)
def test_a_file_replaced_meanwhile_is_noticed(path: Path, now: list[Entry]) -> None:
    header = store.open_file(path)
    put(path, *now)
    with pytest.raises(SchemaError, match="was replaced or changed"):
        store.read(header, "a.W")
    with pytest.raises(SchemaError, match="was replaced or changed"):
        store.Source(header)["sha256"]


def test_a_link_put_in_meanwhile_is_not_followed(path: Path) -> None:
    header = store.open_file(path)
    with h5py.File(path, "r+") as file:
        file.move("a", "c")
        file["a"] = h5py.SoftLink("/c")
    with pytest.raises(SchemaError, match="is a soft link"):
        store.read(header, "a.W")


def test_a_name_that_is_not_there(path: Path) -> None:
    with pytest.raises(NameUnknownError, match=r"no dataset 'a\.V'"):
        store.read(store.open_file(path), "a.V")


def test_nan_is_named_when_asked(tmp_path: Path) -> None:
    bad = W.copy()
    bad[1, 2] = np.nan
    bits = np.array([0x3F80, 0xFF80], np.uint16)
    entries = Entry("a", bad), Entry("b", bits, {"encoding": "bfloat16"}), Entry("c", bits)
    header = store.open_file(put(tmp_path / "f.h5", *entries))
    assert np.isnan(store.read(header, "a")[1, 2])
    with pytest.raises(NonFiniteError, match=r"dataset 'a' holds nan at \[1, 2\]"):
        store.read(header, "a", finite=True)
    with pytest.raises(NonFiniteError, match=r"dataset 'b' holds -inf at \[1\]"):
        store.read(header, "b", finite=True)
    assert (store.read(header, "c", finite=True) == bits).all()
