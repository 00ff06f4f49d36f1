"""judge/foreign: other programs' files hold what was put in, or are refused in one line."""

from __future__ import annotations

import json
import shutil
import struct
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from strategies import config, random_parameters
from test_foreign_pickles import layers, save

import refcurv as rc
from refcurv.files.bfloat16 import from_bfloat16, to_bfloat16
from refcurv.files.families import FAMILIES
from refcurv.judge.dump import Dump, Theirs
from refcurv.judge.foreign import match, names, read_dump, stored
from refcurv.judge.foreign.arrays import AXES, COUNTS
from refcurv.judge.foreign.kronfluence import BASES
from refcurv.judge.foreign.memory import of_arrays
from refcurv.law.checks import EmptyError, NameUnknownError, RefcurvError, RoomError, SchemaError

UP, DOWN = "blocks.0.mlp.up", "blocks.1.mlp.down"
SIZES = {UP: (5, 3), DOWN: (3, 5)}  # (O, I)
Arrays = dict[str, np.ndarray]


def moment(width: int, seed: int, rows: int = 40) -> np.ndarray:
    x = np.random.default_rng(seed).normal(size=(rows, width))
    return x.T @ x


def a_layer(name: str) -> Arrays:
    """Everything that a file can hold of one layer."""
    high, wide = SIZES[name]
    rng = np.random.default_rng(high)
    A, G = moment(wide, 1) / 40, moment(high, 2) / 40
    (mu, U_A), (lam, U_G) = np.linalg.eigh(A), np.linalg.eigh(G)
    return {
        **{"A": A, "G": G, "U_A": U_A, "mu": mu, "U_G": U_G, "lam": lam},
        **{"Lambda": rng.random((high, wide)), "mask": rng.random((high, wide)) < 0.5},
        "W": rng.normal(size=(high, wide)),
    }


def write_tensors(path: Path, arrays: Mapping[str, np.ndarray], **texts: str) -> None:
    """A safetensors file, written naively; uint16 is taken for bfloat16."""
    header: dict[str, Any] = {"__metadata__": texts} if texts else {}
    kinds = {"float64": "F64", "float32": "F32", "float16": "F16", "uint16": "BF16"}
    kinds |= {"int64": "I64", "bool": "BOOL"}
    data = b""
    for name, array in arrays.items():
        ends = [len(data), len(data) + array.nbytes]
        kind = kinds[array.dtype.name]
        header[name] = {"dtype": kind, "shape": list(array.shape), "data_offsets": ends}
        data += array.tobytes()
    text = json.dumps(header).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def write_hdf5(path: Path, arrays: Mapping[str, np.ndarray], **options: Any) -> None:
    with h5py.File(path, "w") as file:
        for name, array in arrays.items():
            file.create_dataset(name, data=array, **(options if array.ndim else {}))


def read_all(dump: Dump) -> dict[str, Theirs]:
    return {name: dump.layers[name] for name in dump.layers}


# ------------------------------------------------------------------ files of arrays

WRITERS: dict[str, tuple[str, Callable[[Path, Arrays], None], str]] = {
    "npz": ("x.npz", lambda path, arrays: np.savez(path, **arrays), "/"),
    "compressed": ("x.npz", lambda path, arrays: np.savez_compressed(path, **arrays), "/"),
    "hdf5": ("x.h5", write_hdf5, "/"),
    "safetensors": ("x.safetensors", write_tensors, "/"),
    "dotted": ("x.safetensors", write_tensors, "."),
    "misnamed": ("x.pt", lambda path, arrays: np.savez(path.open("wb"), **arrays), "/"),
}


@pytest.mark.parametrize("kind", WRITERS)
def test_a_file_of_arrays_holds_what_was_put_in(kind: str, tmp_path: Path) -> None:
    file, write, dot = WRITERS[kind]
    flat = {f"{n}{dot}{key}": x for n in SIZES for key, x in a_layer(n).items()}
    flat |= {f"{n}{dot}n": np.array(40) for n in SIZES}
    write(tmp_path / file, flat | {"extra": np.zeros(2)})
    dump = read_dump(tmp_path / file)
    assert list(dump.layers) == sorted(SIZES) and dump.problems == ()
    assert dump.recipe == ("left aside: 'extra'",)
    assert dump.arithmetic.stored is None
    for name, theirs in read_all(dump).items():
        for key, wanted in a_layer(name).items():
            got = getattr(theirs, key)
            assert np.array_equal(got, wanted), key
            assert got.dtype == wanted.dtype and theirs.stored[key] == wanted.dtype.name
        assert (theirs.n_A, theirs.n_G) == (40, 40)
        assert dump.holds[name] == frozenset(AXES) | {"n_A", "n_G"}
        assert dump.shapes[name] == SIZES[name]


@pytest.mark.parametrize(
    "dtype", ["float32", "float16", "bfloat16", ">f4", "f4 in Fortran's order"]
)
def test_shorter_floats_are_widened_exactly(dtype: str, tmp_path: Path) -> None:
    A = moment(4, 0)
    if dtype == "bfloat16":
        given = to_bfloat16(A)
        write_tensors(tmp_path / "x", {f"{UP}.A": given})
        wanted = from_bfloat16(given)
    else:
        given = np.asfortranarray(A + np.triu(A), "f4") if "Fortran" in dtype else A.astype(dtype)
        np.savez((tmp_path / "x").open("wb"), **{f"{UP}/A": given})
        wanted = given
    dump = read_dump(tmp_path / "x")
    assert np.array_equal(dump.layers[UP].A, wanted.astype(float))
    known = "float32" if "f4" in dtype else dtype
    assert dump.arithmetic.stored == dump.layers[UP].stored["A"] == known
    assert dump.layers[UP].n_A is None and dump.holds[UP] == {"A"}


SAID: dict[str, Any] = {"fisher": "empirical", "rows": "all", "draws": 3}
SAID |= {"model_dtype": "bfloat16", "products_dtype": "tf32", "sums_dtype": "float32"}


@pytest.mark.parametrize("kind", ["npz", "hdf5", "attributes", "header"])
def test_a_file_says_how_it_was_made(kind: str, tmp_path: Path) -> None:
    path, A = tmp_path / "x", {f"{UP}/A": moment(3, 0)}
    texts = {
        key: np.bytes_(value) if isinstance(value, str) else value for key, value in SAID.items()
    }
    if kind == "npz":
        np.savez(path.open("wb"), **A, **SAID)
    elif kind == "header":
        write_tensors(path, A, **{key: str(value) for key, value in SAID.items()})
    else:
        write_hdf5(path, A)
        with h5py.File(path, "r+") as file:
            for key, value in texts.items():
                (file if kind == "hdf5" else file.attrs)[key] = value
    dump = read_dump(path)
    assert dict(dump.declared) == {"fisher": "empirical", "rows": "all", "draws": "3"}
    known = dump.arithmetic
    assert (known.model, known.products, known.sums) == ("bfloat16", "tf32", "float32")
    assert dump.problems == ()


def test_what_the_law_does_not_know_is_a_problem(tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    said = {"fisher": "true", "sums_dtype": "f32", "draws": 0, "rows": np.zeros(2)}
    np.savez(path, **{f"{UP}/A": moment(3, 0), f"{UP}/n": -1, f"{UP}/n_G": 2.5}, **said)
    dump = read_dump(path)
    told = " | ".join(dump.problems)
    for piece in ("fisher must be one of", "sums_dtype must", "draws is 0", "rows must be a text"):
        assert piece in told
    assert f"n of {UP!r} is" in told and f"n_G of {UP!r} is" in told and len(dump.problems) == 6
    assert dump.layers[UP].n_A is None
    assert dump.declared == {}


def test_what_holds_no_real_numbers_is_a_problem(tmp_path: Path) -> None:
    bad = {"A": np.zeros((2, 2), complex), "U_A": np.zeros(2), "W": np.zeros((2, 2, 2)),
           "mu": np.array(["a"]), "lam": np.zeros(2, "V2"), "Lambda": np.zeros((1, 2))}  # fmt: skip
    np.savez(tmp_path / "x.npz", **{f"{UP}/{key}": x for key, x in bad.items()})
    dump = read_dump(tmp_path / "x.npz")
    assert dump.holds[UP] == {"Lambda"} and len(dump.problems) == 5
    assert "complex128" in dump.problems[0] and "bfloat16?" in " ".join(dump.problems)


def test_refcurvs_own_files_are_known_by_content(tmp_path: Path) -> None:
    _, _, factors = setting()
    rc.save_factors(factors, tmp_path / "factors.bin")
    rc.save_bases(rc.decompose(factors), tmp_path / "basis.bin")
    assert rc.validate(tmp_path / "factors.bin", factors).passed
    dump = read_dump(tmp_path / "basis.bin")
    assert dump.program == "refcurv" and dump.holds[UP] == {"U_A", "mu", "U_G", "lam"}
    assert np.array_equal(read_dump(rc.decompose(factors)).layers[UP].mu, dump.layers[UP].mu)


def setting() -> tuple[rc.Model, rc.Corpus, rc.Factors]:
    made = config()
    model = rc.Model(made, random_parameters(made, 3))
    corpus = rc.Corpus(np.random.default_rng(0).integers(0, made.vocabulary, (6, 7)))
    return model, corpus, rc.collect(model, corpus, "blocks.*.mlp.*", "expected")


def test_every_format_is_judged_alike(tmp_path: Path) -> None:
    """The truth, written by hand in each format under a checkpoint's names, passes."""
    _, _, factors = setting()
    flat: Arrays = {}
    for name, one in factors.items():
        theirs = name.replace("blocks", "model.layers") + "_proj.weight"
        flat |= {f"{theirs}/A": one.A, f"{theirs}/G": one.G, f"{theirs}/n": np.array(one.n_A)}
    for file, write, _ in list(WRITERS.values())[:4]:
        write(tmp_path / file, flat)
        verdict = rc.validate(tmp_path / file, factors)
        assert verdict.passed and set(verdict.matched or {}) == set(factors)
        write(tmp_path / file, flat | {f"{theirs}/G": 2 * one.G})
        assert {f.layer for f in rc.validate(tmp_path / file, factors).failed} == {name}


# ------------------------------------------------------------------ hostile files


def lying(path: Path, shape: tuple[int, ...]) -> None:
    """An .npz whose header declares a shape, with 72 bytes behind it."""
    text = f"{{'descr': '<f8', 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
    member = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text.encode() + bytes(72)
    with zipfile.ZipFile(path, "w") as file:
        file.writestr(f"{UP}/A.npy", member)


def test_a_bomb_does_not_burst(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x"
    lying(path, (3, 3))
    assert read_dump(path).layers[UP].A.shape == (3, 3)
    for shape in ((2**31, 2**31), (3, 4), (3, 2), (10**30, 0), (0, 10**30)):
        lying(path, shape)
        with pytest.raises(RefcurvError, match=r"said to be|no \.npz|holds no array"):
            read_all(read_dump(path))
    np.savez_compressed(path.open("wb"), **{f"{UP}/A": np.zeros((2500, 2500))})
    assert path.stat().st_size < 100_000
    dump = read_dump(path)
    monkeypatch.setattr(stored, "available", lambda: 10**7)
    with pytest.raises(RoomError, match=r"A of .*takes 0 GiB"):
        dump.layers[UP]
    with h5py.File(path, "w") as file:
        file.create_dataset(f"{UP}/A", (10**6, 10**6), "f8")
        file.create_dataset(f"{UP}/G", data=np.zeros((99, 99)), compression="gzip")
    with pytest.raises(SchemaError, match="8000000000000 bytes, which the file has not"):
        read_dump(path)
    with h5py.File(path, "w") as file:  # declared and never written, it reads as zeros
        file.create_dataset(f"{UP}/A", (3, 3), "f8")
        file["beside"] = np.zeros(99)
    with pytest.raises(SchemaError, match="72 bytes, which the file has not"):
        read_dump(path)


def test_blocks_in_one_array_are_told_where_no_layer_is_left(tmp_path: Path) -> None:
    """As scans over layers hold them."""
    factors = setting()[2]
    one = factors[UP]
    held = {f"layers.up/{k}": np.stack([X, X]) for k, X in (("A", one.A), ("G", one.G))}
    np.savez(tmp_path / "d.npz", **held, **{"layers.head/A": one.A, "layers.head/G": one.G})
    told = (
        "no layer in common.*A of 'layers.up' is .2, .*If its first axis is blocks, store 2 layers"
    )
    with pytest.raises(rc.RefcurvError, match=told):
        rc.validate(tmp_path / "d.npz", factors)


FORMATS = ("npz", "safetensors", "hdf5", "torch", "memory", "kronfluence")


@pytest.mark.parametrize("format", FORMATS)
def test_an_array_of_other_axes_is_a_problem_in_every_format(tmp_path: Path, format: str) -> None:
    """What is sound of the layer is judged."""
    _, _, factors = setting()
    sound, path = factors[UP].G, tmp_path / "x"
    for shape in ((), (2, 2, 2)):
        held = {"A": np.zeros(shape), "G": sound}
        if format == "npz":
            with path.open("wb") as file:
                np.savez(file, **{f"{UP}/{key}": X for key, X in held.items()})
        elif format == "safetensors":
            write_tensors(path, {f"{UP}/{key}": X for key, X in held.items()})
        elif format == "hdf5":
            with h5py.File(path, "w") as file:
                for key, X in held.items():
                    file[f"{UP}/{key}"] = X
        elif format == "torch":
            save(path, *layers({UP: held}))
        elif format == "kronfluence":
            shutil.rmtree(path, ignore_errors=True)
            kronfluence(path)
            write_tensors(path / "activation_covariance.safetensors", {K_UP: held["A"]})
        given = {UP: held} if format == "memory" else path
        dump = of_arrays(given) if format == "memory" else read_dump(path)
        (layer,) = dump.layers
        told = " ".join(dump.problems)
        assert f"{shape}; a matrix is needed" in told
        assert ("If its first axis is blocks, store 2 layers" in told) == (len(shape) == 3)
        assert "A" not in dump.holds[layer] and dump.layers[layer].A is None
        assert dump.layers[layer].G is not None
        if format != "kronfluence":
            assert not rc.validate(given, factors).passed


@pytest.mark.parametrize("kind", ["lambda_matrix", *BASES.values()])
def test_every_array_of_kronfluence_has_its_axes(kind: str, tmp_path: Path) -> None:
    kronfluence(tmp_path / "x")
    write_tensors(tmp_path / f"x/{kind}.safetensors", {K_UP: np.zeros((2, 2, 2))})
    dump = read_dump(tmp_path / "x")
    assert f"{kind} of '{K_UP}' is (2, 2, 2); a " in " ".join(dump.problems)
    assert {"A", "G"} <= dump.holds[K_UP]


@pytest.mark.parametrize("key", ["sum_A", "sum_G", *AXES])
def test_every_array_of_torch_has_its_axes(key: str, tmp_path: Path) -> None:
    axes = AXES[key.removeprefix("sum_")]
    shape = next(s for s in ((3,), (3, 3), (3, 3, 3)) if len(s) not in axes)
    held = {key: np.zeros(shape)} | ({"lam": np.ones(3)} if key != "lam" else {"mu": np.ones(3)})
    save(tmp_path / "x", *layers({UP: held}))
    dump = read_dump(tmp_path / "x")
    assert f"is {shape}; a " in " ".join(dump.problems)
    assert dump.holds[UP] == held.keys() - {key}


def test_a_packed_member_that_cannot_be_so_long_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    np.savez_compressed(path, **{f"{UP}/A": np.zeros((300, 300))})
    data = path.read_bytes()
    size = struct.pack("<I", 128 + 8 * 300 * 300)
    assert data.count(size) >= 1
    path.write_bytes(data.replace(size, struct.pack("<I", 2**31)))
    with pytest.raises(SchemaError, match=r"said to hold 2147483648 bytes in"):
        read_dump(path)


def test_objects_are_never_unpickled(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "sprung",))

    np.savez(tmp_path / "x.npz", **{f"{UP}/A": np.array([Trap()], object)})
    with pytest.raises(SchemaError, match="objects are not read: they would run code"):
        read_dump(tmp_path / "x.npz")
    assert not (tmp_path / "sprung").exists()


HDF5: dict[str, tuple[Callable[[h5py.File], Any], str]] = {
    "soft loop": (lambda f: f.__setitem__("s", h5py.SoftLink("/s")), "'s' is a soft link"),
    "external": (
        lambda f: f.__setitem__("e", h5py.ExternalLink("/etc/x", "/")),
        "an external link",
    ),
    "two links": (lambda f: f.__setitem__("t", f[UP]), "two links lead to"),
    "control": (lambda f: f.create_dataset("a\nb", data=1), "no plain name"),
    "attribute": (lambda f: f.attrs.__setitem__("fisher", "sampled"), "text of fixed length"),
}
PARTLY: dict[str, tuple[Callable[[h5py.File], Any], str]] = {
    "objects": (lambda f: f.create_dataset(f"{UP}/G", (1,), h5py.ref_dtype), "is reference"),
    "vlen": (lambda f: f.create_dataset(f"{UP}/G", (1,), h5py.vlen_dtype("i4")), "is vlen"),
    "text": (lambda f: f.create_dataset("fisher", data="sampled"), "numpy.bytes_"),
    "gzip": (lambda f: f.create_dataset(f"{UP}/G", data=np.eye(3), compression=1), "h5repack"),
    "elsewhere": (
        lambda f: f.create_dataset(f"{UP}/G", (1, 1), "f4", external=[("/etc/hostname", 0, 8)]),
        "stored in another file",
    ),
    "empty": (lambda f: f.create_dataset(f"{UP}/G", data=h5py.Empty("f4")), "of no shape"),
}  # fmt: skip


@pytest.mark.parametrize("name", [*HDF5, *PARTLY])
def test_hdf5_of_others_is_read_with_suspicion(name: str, tmp_path: Path) -> None:
    change, fragment = (HDF5 | PARTLY)[name]
    path = tmp_path / "x.h5"
    write_hdf5(path, {f"{UP}/A": np.eye(3)})
    with h5py.File(path, "r+") as file:
        change(file)
    if name in HDF5:
        with pytest.raises(SchemaError, match=fragment) as caught:
            read_dump(path)
        assert "\n" not in str(caught.value)
    else:
        dump = read_dump(path)
        assert dump.holds[UP] == {"A"} and fragment in dump.problems[0]


def test_hdf5_is_read_in_either_order_of_bytes(tmp_path: Path) -> None:
    for dtype in (">f4", ">f8", "<f2", ">i4"):
        write_hdf5(tmp_path / "x.h5", {"a/b.c/A": np.arange(4).reshape(2, 2).astype(dtype)})
        dump = read_dump(tmp_path / "x.h5")
        assert dump.layers["a/b.c"].A.tolist() == [[0, 1], [2, 3]]


def samples(folder: Path) -> Iterator[tuple[Path, Path]]:
    """(what is read, the file that noise is put in), of every format."""
    flat = {f"{n}/{key}": x for n in SIZES for key, x in a_layer(n).items() if key in ("A", "G")}
    flat |= {f"{UP}/n": np.array(40), "draws": np.array(2)}
    for name, (file, write, _) in list(WRITERS.items())[:4]:
        (folder / name).mkdir()
        write(folder / name / file, flat)
        yield (folder / name / file,) * 2
    kronfluence(folder / "factors_x")
    for file in ("factor_arguments.json", "activation_covariance.safetensors"):
        yield folder / "factors_x", folder / "factors_x" / file
    bergson(folder / "b", 2)
    for file in ("total_processed.pt", "factor_eig_a/shard_0.safetensors"):
        yield folder / "b", folder / "b" / file


def noisy(data: bytes, rng: np.random.Generator) -> bytes:
    """Cut short, or with some bytes changed, most often near the ends, where headers lie."""
    if rng.random() < 0.3:
        return data[: int(rng.integers(len(data)))]
    out = bytearray(data)
    for _ in range(int(rng.integers(1, 4))):
        near = int(rng.integers(min(len(data), 300)))
        at = [near, len(data) - 1 - near, int(rng.integers(len(data)))][int(rng.integers(3))]
        out[at] = int(rng.integers(256))
    return bytes(out)


def test_noise_is_refused_in_one_line(tmp_path: Path) -> None:
    """Whatever is in a file, it is read, or refused by an error of refcurv's."""
    rng = np.random.default_rng(5)
    refused = 0
    for given, file in samples(tmp_path):
        data = file.read_bytes()
        for _ in range(60):
            file.write_bytes(noisy(data, rng))
            try:
                dump = read_dump(given)
                read_all(dump)
                refused += bool(dump.problems)
            except RefcurvError as error:
                refused += 1
                assert "\n" not in str(error) and len(str(error)) < 1500
        file.write_bytes(data)
        read_all(read_dump(given))
    assert refused > 150


# ------------------------------------------------------------------ kronfluence

K_UP = "model.layers.0.mlp.up_proj"
ARGUMENTS: dict[str, Any] = {
    "use_empirical_fisher": True,
    "amp_dtype": "torch.bfloat16",
    "activation_covariance_dtype": "torch.float32",
    "gradient_covariance_dtype": "torch.float32",
    "eigendecomposition_dtype": "torch.float64",
    "covariance_data_partitions": 1,
    "covariance_module_partitions": 1,
}
A_SUM, G_SUM, L_SUM = moment(4, 0), moment(6, 1), np.arange(24.0).reshape(6, 4)


def kronfluence(folder: Path, parts: int = 1) -> None:
    """A folder as kronfluence writes it; with parts, 2 of the modules, and so many of the data."""
    folder.mkdir()
    given = ARGUMENTS
    if parts > 1:
        given = ARGUMENTS | {"covariance_data_partitions": parts, "covariance_module_partitions": 2}
    (folder / "factor_arguments.json").write_text(json.dumps(given))
    shares = {i: (i + 1) / sum(range(1, parts + 1)) for i in range(parts)}
    for name, X, n in (("activation", A_SUM, 60), ("gradient", G_SUM, 120)):
        for i, share in shares.items():
            for j, module in enumerate((K_UP, "lm_head") if parts > 1 else (K_UP,)):
                end = f"_data_partition{i}_module_partition{j}" if parts > 1 else ""
                write_tensors(folder / f"{name}_covariance{end}.safetensors", {module: X * share})
                count = {module: np.array([round(n * share)])}
                file = folder / f"num_{name}_covariance_processed{end}.safetensors"
                write_tensors(file, count)


def test_kronfluence(tmp_path: Path) -> None:
    folder = tmp_path / "factors_x"
    kronfluence(folder)
    mu, U = np.linalg.eigh(A_SUM / 60)
    write_tensors(folder / "activation_eigenvectors.safetensors", {K_UP: U})
    write_tensors(folder / "activation_eigenvalues.safetensors", {K_UP: mu})
    write_tensors(folder / "lambda_matrix.safetensors", {K_UP: L_SUM})
    write_tensors(folder / "num_lambda_processed.safetensors", {K_UP: np.array([8])})
    dump = read_dump(folder)
    one = dump.layers[K_UP]
    assert dump.program == "kronfluence" and dump.problems == ()
    assert np.array_equal(one.A, A_SUM / 60) and np.array_equal(one.G, G_SUM / 120)
    assert (one.n_A, one.n_G) == (60, 120)
    assert (np.diff(one.mu) <= 0).all(), "ours descend"
    assert np.abs(one.A @ one.U_A - one.U_A * one.mu).max() < 1e-13
    assert np.array_equal(one.Lambda, L_SUM[::-1, ::-1] / 8)
    assert dump.holds[K_UP] == {"A", "n_A", "G", "n_G", "U_A", "mu", "Lambda"}
    assert dump.shapes[K_UP] == (6, 4)
    assert dump.declared["fisher"] == "empirical" and dump.declared["bias"] == "joint"
    known = dump.arithmetic
    assert (known.model, known.sums, known.solver) == ("bfloat16", "float32", "float64")


def test_kronfluence_says_its_arguments_in_a_header_too(tmp_path: Path) -> None:
    folder = tmp_path / "factors_x"
    kronfluence(folder)
    (folder / "factor_arguments.json").unlink()
    texts = {key: str(value) for key, value in ARGUMENTS.items()}
    write_tensors(folder / "activation_covariance.safetensors", {K_UP: A_SUM}, **texts)
    dump = read_dump(folder)
    assert dump.declared["fisher"] == "empirical" and dump.arithmetic.sums == "float32"


def test_kronfluence_whose_arguments_are_damaged(tmp_path: Path) -> None:
    kronfluence(folder := tmp_path / "factors_x")
    (folder / "factor_arguments.json").write_text("{")
    assert read_dump(folder).problems[0].startswith("factor_arguments.json is not valid JSON")


def test_partitions_of_data_are_summed(tmp_path: Path) -> None:
    kronfluence(tmp_path / "factors_x", parts=3)
    dump = read_dump(tmp_path / "factors_x")
    assert set(dump.layers) == {K_UP, "lm_head"} and dump.problems == ()
    one = dump.layers[K_UP]
    assert (one.n_A, one.n_G) == (60, 120)
    assert np.allclose(one.A, A_SUM / 60, rtol=1e-14) and np.allclose(
        one.G, G_SUM / 120, rtol=1e-14
    )


@pytest.mark.parametrize(
    "gone", ["_data_partition1_module_partition1", "_data_partition2_module_partition0"]
)
def test_a_missing_partition_is_named(gone: str, tmp_path: Path) -> None:
    folder = tmp_path / "factors_x"
    kronfluence(folder, parts=3)
    (folder / f"gradient_covariance{gone}.safetensors").unlink()
    told = " | ".join(read_dump(folder).problems)
    assert f"gradient_covariance: {gone} missing" in told
    assert "activation_covariance:" not in told


def test_sums_without_a_count_are_left_out(tmp_path: Path) -> None:
    folder = tmp_path / "factors_x"
    kronfluence(folder)
    (folder / "num_gradient_covariance_processed.safetensors").unlink()
    dump = read_dump(folder)
    assert dump.holds[K_UP] == {"A", "n_A"} and dump.layers[K_UP].G is None
    assert "num_gradient_covariance_processed" in dump.problems[0]
    write_tensors(folder / "num_gradient_covariance_processed.safetensors", {K_UP: np.array([0])})
    assert "is 0.0, which is no number of rows" in read_dump(folder).problems[0]


# ------------------------------------------------------------------ bergson

REAL = Path(__file__).parent / "data/foreign"
B_UP, TOTAL = "layers.0.mlp.up_proj", 36


def in_shards(folder: Path, X: np.ndarray, ranks: int, whole: bool = False) -> None:
    """Rows as bergson deals them: rank 0 takes what is left over."""
    base, rest = divmod(len(X), ranks)
    for k in range(ranks):
        rows = X[: base + rest] if k == 0 else X[rest + k * base : rest + (k + 1) * base]
        file = folder / f"shard_{k}.safetensors"
        write_tensors(file, {B_UP: np.ascontiguousarray(X if whole else rows, "f4")})


def bergson(folder: Path, ranks: int, documents: int = 1) -> None:
    """`documents` 1 is the older layout too."""
    folder.mkdir()
    for side, X in (("activation", A_SUM), ("gradient", G_SUM)):
        values, U = np.linalg.eigh(X.astype("f4").astype(float) / TOTAL)
        in_shards(folder / f"{side}_sharded", X, ranks)
        in_shards(folder / f"eigen_{side}_sharded", U, ranks)
        eigenvalues, whole = folder / f"factor_eig_{side[0]}", side == "activation"
        in_shards(eigenvalues, values * (TOTAL / documents) ** 0.5, ranks, whole)
    in_shards(folder / "eigenvalue_correction_sharded", L_SUM / documents, ranks)
    (folder / "config.yaml").write_text(
        "steps:\n- hessian:\n    method: kfac\n    use_dataset_labels: true\n"
        "    include_bias: false\n"
    )
    with zipfile.ZipFile(folder / "total_processed.pt", "w") as file:
        file.writestr("total_processed/data.pkl", b"\x80\x02.")
        file.writestr("total_processed/byteorder", "little")
        file.writestr("total_processed/data/0", struct.pack("<q", TOTAL))


@pytest.mark.parametrize(("ranks", "documents"), [(1, 1), (2, 1), (3, 4), (4, 9)])
def test_bergson(ranks: int, documents: int, tmp_path: Path) -> None:
    bergson(tmp_path / "b", ranks, documents)
    dump = read_dump(tmp_path / "b")
    one = dump.layers[B_UP]
    assert dump.program == "bergson" and dump.problems == () and not dump.scale_free
    assert np.array_equal(one.A, A_SUM.astype("f4") / np.float64(TOTAL))
    assert np.array_equal(one.G, G_SUM.astype("f4") / np.float64(TOTAL))
    assert one.n_A == one.n_G == TOTAL
    for X, U, values in ((one.A, one.U_A, one.mu), (one.G, one.U_G, one.lam)):
        assert (np.diff(values) <= 0).all(), "ours descend"
        assert np.abs(X @ U - U * values).max() < 1e-5 * values[0]
    assert np.allclose(one.Lambda, L_SUM[::-1, ::-1] / TOTAL, rtol=1e-6, atol=0)
    said = "documents: 1, or an older layout" if documents == 1 else f"documents: {documents};"
    assert said in dump.recipe[-1] and "inferred" in dump.recipe[-1]
    assert dump.shapes[B_UP] == (6, 4) and dump.arithmetic.sums == "float32"
    assert dump.declared["fisher"] == "empirical" and dump.declared["bias"] == "separate"


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    for k, text in (
        (0, "shard_0.safetensors missing"),
        (2, "have 4 rows of 6; a shard is missing"),
    ):
        bergson(tmp_path / f"b{k}", 3)
        (tmp_path / f"b{k}" / "gradient_sharded" / f"shard_{k}.safetensors").unlink()
        dump = read_dump(tmp_path / f"b{k}")
        assert text in " | ".join(dump.problems) and "gradient_sharded" in dump.problems[0]
        assert dump.layers[B_UP].G is None and dump.layers[B_UP].A is not None


@pytest.mark.parametrize("ranks", [2, 3])
def test_shards_out_of_order_are_named(ranks: int, tmp_path: Path) -> None:
    bergson(tmp_path / "b", ranks)
    folder = tmp_path / "b" / "gradient_sharded"
    last = f"shard_{ranks - 1}.safetensors"
    (folder / "shard_0.safetensors").rename(folder / "x")
    (folder / last).rename(folder / "shard_0.safetensors")
    (folder / "x").rename(folder / last)
    order = ", ".join(map(str, [ranks - 1, *range(1, ranks - 1), 0]))
    assert f"not symmetric; in the order {order} they are" in read_dump(tmp_path / "b").problems[0]


def test_without_the_total_the_scale_is_unknown(tmp_path: Path) -> None:
    for k, data in enumerate((None, b"", b"PK\x03\x04", bytes(100))):
        bergson(tmp_path / f"b{k}", 1)
        path = tmp_path / f"b{k}" / "total_processed.pt"
        path.unlink() if data is None else path.write_bytes(data)
        dump = read_dump(tmp_path / f"b{k}")
        assert dump.scale_free == {"A", "G"} and "total_processed.pt" in dump.problems[0]
        one = dump.layers[B_UP]
        assert one.n_A is None and one.mu is None and np.array_equal(one.A, A_SUM.astype("f4"))


def test_without_eigenvalues_documents_are_unknown(tmp_path: Path) -> None:
    bergson(tmp_path / "b", 1, 4)
    in_shards(tmp_path / "b" / "factor_eig_g", np.full(6, 1e6), 1)  # of another matrix
    assert "tr A" in read_dump(tmp_path / "b").recipe[-1], "the smaller matrix tells"
    in_shards(tmp_path / "b" / "factor_eig_a", np.full(4, 1e6), 1, True)
    dump = read_dump(tmp_path / "b")
    assert "are not those of A" in dump.problems[0] and dump.declared["Lambda_over"] == "unknown"
    for side in "ag":
        shutil.rmtree(tmp_path / "b" / f"factor_eig_{side}")
    dump = read_dump(tmp_path / "b")
    assert dump.problems == () and "no file tells" in dump.recipe[-1]
    assert dump.declared["Lambda_over"] == "unknown"


@pytest.mark.parametrize("program", ["bergson", "kronfluence", "official"])
def test_real_files_are_read_in_one_scale(program: str) -> None:
    """Eigenvalues are those of A and G, and Λ has their size (it is K where they factor)."""
    dump = read_dump(REAL / program)
    assert dump.problems == ()
    if program == "bergson":
        assert dump.recipe[-1].startswith("documents: 6; inferred")
    for one in dump.layers.values():
        for X, U, values in ((one.A, one.U_A, one.mu), (one.G, one.U_G, one.lam)):
            assert (U is None) == (program == "official")
            if U is not None:
                assert np.abs(X @ U - U * values).max() < 1e-5 * values[0]


def test_other_methods_of_bergson_are_no_k_fac(tmp_path: Path) -> None:
    bergson(tmp_path / "b", 1)
    (tmp_path / "b" / "config.yaml").write_text("hessian:\n  method: tkfac\n")
    assert "the method is tkfac" in read_dump(tmp_path / "b").problems[0]


@pytest.mark.peers
def test_a_total_of_torchs_own_is_read(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch", reason="extra `peers`")
    bergson(tmp_path / "b", 1)
    torch.save(torch.tensor(0) + 12345, tmp_path / "b" / "total_processed.pt")
    assert read_dump(tmp_path / "b").layers[B_UP].n_A == 12345


# ------------------------------------------------------------------ names


def named(*theirs: str) -> Dump:
    return Dump("memory", dict.fromkeys(theirs, Theirs()), {}, shapes={theirs[0]: (7, None)})


EVERY = [f"blocks.{b}.{kind}" for b in (0, 3, 11) for kind in (
    "attn.q", "attn.k", "attn.v", "attn.o", "mlp.gate", "mlp.up", "mlp.down")]  # fmt: skip
SHAPES = {name: (4, 3) for name in [*EVERY, "head", "embed", "position", "patch"]}


def test_no_name_means_two_layers() -> None:
    """But for norms, which have no factors."""
    meant: dict[str, set[tuple[str, ...]]] = {}
    for family in FAMILIES:
        for slot in family.slots:
            meant.setdefault(slot.theirs.removeprefix(family.prefix), set()).add(slot.ours)
    double = {name: ours for name, ours in meant.items() if len(ours) > 1}
    assert all("norm" in one for ours in double.values() for layers in ours for one in layers)
    assert len(meant) >= 60 and not double.keys() & names.known_names().keys()


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.model_type)
def test_names_of_every_family_are_known(family: Any) -> None:
    slots = [s for s in family.slots if len(s.ours) == 1 and s.ours[0].replace("*", "3") in SHAPES]
    wanted = {s.ours[0].replace("*", "3"): s.theirs.replace("*", "3") for s in slots}
    assert len(wanted) >= 3
    for change in (
        lambda name: name,
        lambda name: f"{name}.weight",
        lambda name: name.removeprefix(family.prefix),
        lambda name: f"module._orig_mod.{name}",
        lambda name: f"base_model.model.{name}.weight",
        lambda name: f"model.{name}".replace(".", "/"),
        lambda name: name.replace(".3.", ".3._checkpoint_wrapped_module."),
    ):
        theirs = {ours: change(name) for ours, name in wanted.items()}
        assert match(named(*theirs.values()), SHAPES, {}) == (theirs, [])


def test_names_of_the_official_code_and_ours() -> None:
    theirs = {"blocks.3.mlp.up": "blk3.up", "blocks.11.mlp.down": "blk11.down"}
    theirs["blocks.0.mlp.gate"] = "layers.0.mlp.gate_proj"
    theirs |= {"blocks.0.attn.q": "blocks.0.attn.q", "head": "module.head.weight"}
    assert match(named(*theirs.values()), SHAPES, {})[0] == theirs
    strange = named("blk03.up", "blk3.Up", "up", "layers.3.mlp", "x.layers.3.mlp.up_proj", "", ".")
    assert match(strange, SHAPES, {}) == ({}, [])


def test_nothing_is_guessed() -> None:
    two = named("model.layers.0.mlp.up_proj", "h.0.mlp.c_fc")
    matched, (note,) = match(two, SHAPES, {})
    assert matched == {} and note.layer == "blocks.0.mlp.up" and note.verdict == "missing"
    assert "'model.layers.0.mlp.up_proj' (7, ?), 'h.0.mlp.c_fc'; ours is (4, 3)" in note.cause
    exact = named("blocks.0.mlp.up", "h.0.mlp.c_fc")
    assert match(exact, SHAPES, {}) == ({"blocks.0.mlp.up": "blocks.0.mlp.up"}, [])
    chosen = {"blocks.0.mlp.up": "h.0.mlp.c_fc"}
    assert match(two, SHAPES, chosen)[0] == chosen
    other = {"blocks.3.mlp.up": "h.0.mlp.c_fc"}  # then the other name is not ambiguous
    assert match(two, SHAPES, other)[0] == other | {"blocks.0.mlp.up": "model.layers.0.mlp.up_proj"}


def test_fused_layers_are_said_to_be_fused() -> None:
    theirs = named("transformer.h.3.attn.c_attn", "layers.0.mlp.gate_up_proj")
    matched, notes = match(theirs, SHAPES, {})
    assert matched == {} and [note.layer for note in notes] == [
        *(f"blocks.0.mlp.{x}" for x in ("gate", "up")), *(f"blocks.3.attn.{x}" for x in "qkv")
    ]  # fmt: skip
    assert "theirs has q, k, v as one layer, 'transformer.h.3.attn.c_attn'" in notes[-1].cause


def test_given_names_must_exist() -> None:
    dump = named("a.weight", "b.weight")
    assert match(dump, SHAPES, {"head": "b.weight"})[0] == {"head": "b.weight"}
    with pytest.raises(NameUnknownError, match=r"'b' is not a layer of theirs.*'b.weight'"):
        match(dump, SHAPES, {"head": "b"})
    with pytest.raises(NameUnknownError, match=r"'heads' is not a layer that is judged.*'head'"):
        match(dump, SHAPES, {"heads": "b.weight"})


def test_a_name_with_stars_is_a_name_for_each() -> None:
    shapes = {f"blocks.{n}.mlp.{x}": (2, 2) for n in (0, 1, 10) for x in ("up", "down")}
    theirs = [f"net/layer_{n}/{x}" for n in (0, 1, 10) for x in ("fc1", "fc2")]
    dump = named(*theirs, "net.blocks.0.mlp.up", "net.blocks.1.mlp.down")
    up = {f"blocks.{n}.mlp.up": f"net/layer_{n}/fc1" for n in (0, 1, 10)}
    assert match(dump, shapes, {"blocks.*.mlp.up": "net/layer_*/fc1"})[0] == up
    own = {"blocks.1.mlp.up": "net/layer_1/fc2", "blocks.*.mlp.up": "net/layer_*/fc1"}
    assert match(dump, shapes, own)[0] == up | {"blocks.1.mlp.up": "net/layer_1/fc2"}
    assert match(dump, shapes, {"**": "net.**"})[0] == {  # of those that are there
        "blocks.0.mlp.up": "net.blocks.0.mlp.up", "blocks.1.mlp.down": "net.blocks.1.mlp.down"
    }  # fmt: skip
    for wrong, text in (
        ({"blocks.*.mlp.up": "net/fc1"}, "must have the same stars"),
        ({"blocks.*.mlp.up": "net/**/fc1"}, "must have the same stars"),
        ({"*" * 9: "*" * 9}, "must have the same stars"),
        ({"blocks.*.mlp.up": 3}, "must have the same stars"),
        ({b"blocks.*.mlp.up": "net/layer_*/fc1"}, "is not a layer that is judged"),
        ({"blocks.*.mlp.up": "net/layer_*/fc3"}, r"layer_0/fc3' is not a layer of theirs"),
        ({"layers.*.mlp.up": "net/layer_*/fc1"}, r"layers\.\*\.mlp\.up' is not a layer that is"),
    ):
        with pytest.raises(NameUnknownError, match=text):
            match(dump, shapes, wrong)


def test_what_is_not_matched_is_listed_once() -> None:
    _, _, factors = setting()
    name, *rest = factors
    theirs = {"x.y": (np.eye(2), None, None), name: (factors[name].A, factors[name].G, None)}
    theirs |= {"layers.1.mlp.up_proj": (None, None, None), "h.1.mlp.c_fc": (None, None, None)}
    verdict = rc.validate(theirs, factors)
    found = [(f.layer, f.verdict) for f in verdict.findings if f.quantity == "names"]
    assert sorted(found) == sorted([(n, "missing") for n in rest] + [("", "left out")])
    assert "x.y" in next(f.cause for f in verdict.findings if f.layer == "")
    with pytest.raises(EmptyError, match=r"in common.*qkv_proj.*as one layer.*--name OURS=T"):
        rc.validate({"layers.0.self_attn.qkv_proj": (np.eye(2), None, 1)}, one_of("attn.q"))


def one_of(pattern: str) -> rc.Factors:
    model, corpus, _ = setting()
    return rc.collect(model, corpus, f"blocks.0.{pattern}", "expected")


# ------------------------------------------------------------------ memory


class Convertible:
    """As a tensor of torch: an array by `__array__`, or a reason why not."""

    def __init__(self, array: np.ndarray | None) -> None:
        self.array = array

    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
        if self.array is None:
            raise RuntimeError("Can't call numpy() on Tensor that requires grad.\nUse detach().")
        return self.array


def test_dumps_in_memory() -> None:
    A, G = moment(3, 0), moment(2, 1)
    for one in (
        (A, G, 5),
        [A.tolist(), G, np.int64(5)],
        (Convertible(A), G, np.array([5.0])),
        {"A": A, "G": G, "n": 5},
        {"A": A, "G": G, "n_A": 5, "n_G": 5, "U_A": None},
        (np.ma.masked_array(A, np.zeros((3, 3), bool)), G, 5),
    ):
        dump = read_dump({UP: one})
        theirs = dump.layers[UP]
        assert np.array_equal(theirs.A, A) and np.array_equal(theirs.G, G)
        assert theirs.n_A == theirs.n_G == 5 and not dump.problems
        assert dump.holds[UP] == {"A", "G", "n_A", "n_G"}
    whole = read_dump({UP: a_layer(UP) | {"n": 4}})
    assert whole.holds[UP] == frozenset(AXES) | {"n_A", "n_G"}
    assert np.array_equal(whole.layers[UP].mask, a_layer(UP)["mask"])
    ints = read_dump({UP: (np.eye(3, dtype=int), None, None)}).layers[UP]
    assert ints.A.dtype == float and ints.G is None and ints.n_A is None
    short = read_dump({UP: (A.astype("f4"), G.astype("f4"), 5), DOWN: (None, None, None)})
    assert short.arithmetic.stored == "float32"


@pytest.mark.parametrize("n", [0, -3, 2.5, float("nan"), float("inf"), "7", [1, 2], None, True, 1j])
def test_what_is_no_number_of_rows_is_a_problem(n: Any) -> None:
    dump = read_dump({UP: (np.eye(2), np.eye(2), n)})
    assert dump.layers[UP].n_A is None
    assert len(dump.problems) == (n is not None)
    assert all("no number of rows" in one and "\n" not in one for one in dump.problems)


WRONG: dict[str, tuple[Any, str]] = {
    "empty": ({}, "theirs is empty"),
    "no text": ({3: (1, 2, 3)}, "name must be a text; got 3"),
    "pair": ({UP: (np.eye(2), np.eye(2))}, "must be .A, G, n.*got tuple of 2"),
    "array": ({UP: np.eye(3)}, "got ndarray"),
    "nothing": ({UP: None}, "got NoneType"),
    "key": ({UP: {"a": np.eye(2)}}, "must be one of A, G.*got 'a'"),
    "ragged": ({UP: ([[1, 2], [3]], None, 1)}, "row 1 is of length 1"),
    "objects": ({UP: (np.array([[None]]), None, 1)}, "real numbers; got object"),
    "complex": ({UP: (np.eye(2) * 1j, None, 1)}, "real numbers; got complex"),
    "texts": ({UP: ("A", None, 1)}, "real numbers; got"),
    "masked": ({UP: (np.ma.masked_array(np.eye(2), np.eye(2)), None, 1)}, "masked entries"),
    "gradient": ({UP: (Convertible(None), None, 1)}, "Use detach"),
    "number": (7, "must be a path, Factors.*got int"),
    "list": ([np.eye(2)], "got list"),
    "none": (None, "got NoneType"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_what_is_no_dump_in_memory_is_refused(name: str) -> None:
    given, fragment = WRONG[name]
    with pytest.raises(RefcurvError, match=fragment) as caught:
        read_dump(given)
    assert "\n" not in str(caught.value)


def test_a_matrix_of_another_shape_is_a_verdict() -> None:
    _, _, factors = setting()
    name = next(iter(factors))
    one = factors[name]
    for A in (one.A[:-1, :-1], one.A[0], one.A[None], np.float64(3), np.full_like(one.A, np.nan)):
        verdict = rc.validate({name: (A, one.G, one.n_A)}, factors, layers=name)
        assert not verdict.passed


# ------------------------------------------------------------------ what lies at a path

LFS = b"version https://git-lfs.github.com/spec/v1\noid"
FOUND: dict[str, tuple[Callable[[Path], Any], str]] = {
    "missing": (lambda p: None, "there is nothing at"),
    "empty folder": (lambda p: p.mkdir(), "is an empty folder"),
    "empty file": (lambda p: p.touch(), "is empty"),
    "text": (lambda p: p.write_text("hello"), r"no known format.*\.npz"),
    "npy": (lambda p: np.save(p.open("wb"), np.eye(2)), r"is one array, an \.npy"),
    "lfs": (lambda p: p.write_bytes(LFS), "pointer of git-lfs"),
    "gzip": (lambda p: p.write_bytes(b"\x1f\x8b\x08"), "gzip"),
    "json": (lambda p: p.write_text('{"A": [1]}'), "JSON"),
    "zip": (lambda p: zipfile.ZipFile(p, "w").writestr("a.txt", "x"), "holds no array .*nothing"),
    "strangers": (lambda p: np.savez(p.open("wb"), x=1, y=2), "it holds 'x', 'y'"),
    "hdf5": (lambda p: write_hdf5(p, {"x": np.eye(2)}), "it holds 'x'"),
    "tensors": (lambda p: write_tensors(p, {"model.x.weight": np.eye(2)}), "'model.x.weight'"),
    "parent": (lambda p: p.mkdir() or kronfluence(p / "factors_a"), "lie within, in '.*factors_a'"),
    "folder": (lambda p: p.mkdir() or (p / "notes.txt").touch(), "a folder with 'notes.txt'"),
    "scores": (lambda p: (p / "scores_a").mkdir(parents=True), "holds scores of kronfluence"),
    "no layer": (lambda p: (p / "activation_sharded").mkdir(parents=True), "no layer of bergson"),
}  # fmt: skip


@pytest.mark.parametrize("name", FOUND)
def test_what_is_no_dump_is_named(name: str, tmp_path: Path) -> None:
    make, fragment = FOUND[name]
    make(tmp_path / "x")
    with pytest.raises(SchemaError, match=fragment) as caught:
        read_dump(tmp_path / "x")
    assert "\n" not in str(caught.value) and str(tmp_path / "x") in str(caught.value)


def test_a_corpus_given_by_mistake_is_named(tmp_path: Path) -> None:
    _, corpus, _ = setting()
    rc.save_corpus(corpus, tmp_path / "c.h5")
    with pytest.raises(SchemaError, match=r"refcurv-corpus file.*holds no factors.*Known are"):
        read_dump(tmp_path / "c.h5")


def test_counts_stand_for_both_sides_or_for_one() -> None:
    assert COUNTS == ("n", "n_A", "n_G")
    one = read_dump({UP: {"A": np.eye(2), "n": 4, "n_G": 8}}).layers[UP]
    assert (one.n_A, one.n_G) == (4, 8)
