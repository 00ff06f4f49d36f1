"""Memory: what there is, what a job takes, and the refusal of one that cannot end."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from types import MappingProxyType

import numpy as np
import pytest
from strategies import config, random_parameters

import refcurv as rc
from refcurv.algebra import blas, buffers, kernels
from refcurv.curvature import accumulate, bases, resumed_bases, room
from refcurv.curvature.factors import Factor, Factors
from refcurv.law.checks import RoomError
from refcurv.law.conventions import Bias, Fisher, Rows
from refcurv.model.config import ModelConfig
from refcurv.model.weights import Model
from refcurv.passes import groups, parallel
from refcurv.passes.shards import Shard
from refcurv.passes.sweep import Sweep

GIB = 2**30
WORDS = 49_152


# ------------------------------------------------------------------ what there is


def machine(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


HOST = {"proc/meminfo": "MemTotal:  9000 kB\nMemFree:  10 kB\nMemAvailable:   8000 kB\n"}
V2 = {"proc/self/cgroup": "0::/pod/job\n", "sys/fs/cgroup/pod/job/memory.max": "max\n",
      "sys/fs/cgroup/pod/job/memory.current": "5000\n"}  # fmt: skip
POD = {"sys/fs/cgroup/pod/memory.max": "9000\n", "sys/fs/cgroup/pod/memory.current": "7000\n"}
CACHE = {"sys/fs/cgroup/pod/memory.stat": "anon 4000\nactive_file 1000\ninactive_file 2000\n"}
V1 = {"proc/self/cgroup": "9:cpu:/x\n4:cpuset,memory:/docker/abc\n",
      "sys/fs/cgroup/memory/memory.limit_in_bytes": "9000\n",
      "sys/fs/cgroup/memory/memory.usage_in_bytes": "5000\n",
      "sys/fs/cgroup/memory/memory.stat": "inactive_file 1\ntotal_inactive_file 500\n"}  # fmt: skip
SPENT = {"sys/fs/cgroup/pod/memory.current": "10000\n"}


@pytest.mark.parametrize(
    ("files", "want"),
    [
        (HOST, 8000 * 1024),
        (HOST | V2, 8000 * 1024),  # no limit
        (HOST | V2 | POD, 2000),  # the parent's
        (HOST | V2 | POD | CACHE, 5000),  # the page cache is given up
        (HOST | V2 | POD | SPENT, 0),
        (HOST | V1, 4500),  # in a container its own group is seen as the root
        (HOST | {"proc/self/cgroup": "nonsense\n\n"}, 8000 * 1024),
    ],
    ids=["host", "no-limit", "parent", "cache", "spent", "version-1", "nonsense"],
)
def test_what_is_available_is_the_least_of_host_and_groups(
    files: dict[str, str], want: int, tmp_path: Path
) -> None:
    assert room.available(machine(tmp_path, files)) == want


QUOTA = {"proc/self/cgroup": "0::/pod/job\n", "sys/fs/cgroup/pod/job/cpu.max": "max 100000\n"}
OF_POD = {"sys/fs/cgroup/pod/cpu.max": "250000 100000\n"}
QUOTA_1 = {"proc/self/cgroup": "9:memory:/x\n4:cpu,cpuacct:/docker/abc\n",
           "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n"}  # fmt: skip
OWN = "sys/fs/cgroup/cpu/cpu.cfs_quota_us"


@pytest.mark.parametrize(
    ("files", "want"),
    [
        ({}, 9),
        (QUOTA, 9),
        (QUOTA | OF_POD, 3),  # two and a half, the parent's
        (QUOTA | {"sys/fs/cgroup/cpu.max": "1000 100000\n"}, 1),
        (QUOTA | {"sys/fs/cgroup/pod/cpu.max": "6400000 100000\n"}, 9),  # more than there are
        (QUOTA_1 | {OWN: "-1\n"}, 9),
        (QUOTA_1 | {OWN: "200000\n"}, 2),
        (QUOTA_1 | {OWN: "200000\n", "sys/fs/cgroup/cpu/cpu.cfs_period_us": "0\n"}, 9),
        (QUOTA | {"sys/fs/cgroup/pod/cpu.max": "nonsense\n"}, 9),
    ],
)
def test_a_quota_of_processors_is_not_exceeded(
    files: dict[str, str], want: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a machine of many a process may be given few: taskset, cpusets, quotas of containers."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: {*range(9)}, raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    assert groups.cores(machine(tmp_path, files)) == want


LIMITED = {"proc/self/status": "Name:\tpython\nVmPeak:\t    4000 kB\nVmSize:\t    3000 kB\n"}


def test_an_address_space_is_memory_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`ulimit -v` leaves what is not mapped yet; each thread takes its share for its buffers."""
    root = machine(tmp_path, HOST | LIMITED)
    assert room.address_space(root) is None and room.available(root) == 8000 * 1024
    for limit, want in ((5000, 2000), (20_000, 8000), (3000, 0), (2000, 0)):
        monkeypatch.setattr(buffers.resource, "getrlimit", lambda _, n=limit: (1024 * n, -1))
        assert room.available(root) == 1024 * want
    taken: list[int] = []
    monkeypatch.setattr(room, "cores", lambda: 4)
    monkeypatch.setattr(buffers, "_taken", set())
    monkeypatch.setattr(buffers, "take_buffers", taken.append)
    need = room.Need(100, (50, 50, 20), "G of 'head', 9 x 9")
    for free, pieces in ((220 + 4 * buffers.THREAD, 4), (200 + 2 * buffers.THREAD, 2)):
        monkeypatch.setattr(buffers, "address_space", lambda free=free: free)
        monkeypatch.setattr(room, "available", lambda free=free: free)
        assert room.in_flight("collect", need) == pieces
    assert taken == [4, 2]
    monkeypatch.setattr(room, "available", lambda: buffers.THREAD)
    with pytest.raises(RoomError, match=r"needs 0\.1 GiB .* 0\.1 GiB are free"):
        room.in_flight("collect", need)


def test_threads_have_their_buffers_or_are_fewer(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []
    known: set[int] = set()
    monkeypatch.setattr(buffers, "_taken", known)
    monkeypatch.setattr(buffers, "take_buffers", lambda n: [taken.append(n), known.add(n)])
    for left, threads, want in (
        (None, 9, 9),  # no limit: nothing is taken
        (buffers.THREAD, 9, 1),
        (2 * buffers.THREAD - 1, 9, 2),  # one has its buffers already
        (0, 2, 2),
        (0, 1, 1),
        (buffers.THREAD, 9, 3),
    ):
        monkeypatch.setattr(buffers, "address_space", lambda left=left: left)
        assert buffers.with_buffers(threads) == want
    assert taken == [1, 2, 3]
    known.clear()
    for left, threads, want in ((3 * buffers.THREAD, 3, 3), (0, 3, 3), (buffers.THREAD, 9, 4)):
        monkeypatch.setattr(buffers, "address_space", lambda left=left: left)
        assert buffers.with_buffers(threads) == want  # all at one time, whoever asked before
    assert taken == [1, 2, 3, 3, 4]
    known.clear()
    monkeypatch.setattr(buffers, "address_space", lambda: buffers.THREAD - 1)
    with pytest.raises(MemoryError, match="takes 128 MiB, but 127 MiB of the address space"):
        buffers.with_buffers(2)
    with pytest.raises(MemoryError):
        parallel.run([1, 2], lambda _, x: x)
    monkeypatch.setattr(buffers, "address_space", lambda: 3 * buffers.THREAD)
    names: set[str] = set()
    parallel.run(range(40), lambda *_: names.add(threading.current_thread().name), in_flight=9)
    assert 1 <= len(names) <= 3 and taken == [1, 2, 3, 3, 4, 3]


@pytest.mark.slow
@pytest.mark.parametrize("kib", range(527_000, 690_000, 48_000))
def test_no_limit_of_the_address_space_makes_a_command_hang(kib: int, tmp_path: Path) -> None:
    """Where BLAS has no room for its buffers it asks for ever, and no signal ends it."""
    one, other = tmp_path / "w.h5", tmp_path / "c.h5"
    made = wide()
    rc.save(rc.Model(made, random_parameters(made, 0)), one)
    rc.save_corpus(rc.Corpus(np.random.default_rng(0).integers(0, made.vocabulary, (4, 9))), other)
    model, corpus = rc.load(one), rc.load_corpus(other)
    rc.save_bases(rc.decompose(rc.collect(model, corpus, "**.up")), tmp_path / "b.h5")
    for command in ("edit w.h5 b.h5 -o e.h5 --rho 0.7", "evaluate w.h5 c.h5"):
        done = subprocess.run(
            f"ulimit -v {kib}; exec {sys.executable} -m refcurv {command}",
            shell=True, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
        assert done.returncode in (0, 3), done.stderr
        assert done.returncode == 0 or done.stderr.count("\n") == 1, done.stderr


@pytest.mark.skipif(bool(os.environ.get("NUMBA_DISABLE_JIT")), reason="nothing is compiled")
def test_no_kernel_is_compiled_where_the_compiler_has_no_room(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """LLVM would end the process. What is compiled already goes on."""

    @kernels.njit(cache=False)
    def twice(x):
        return x + x

    assert twice(2) == 4
    monkeypatch.setattr(buffers, "address_space", lambda: buffers.COMPILER - 1)
    assert twice(2) == 4
    with pytest.raises(MemoryError, match="to compile twice takes 64 MiB, but 63 MiB of the"):
        twice(2.0)
    monkeypatch.setattr(buffers, "address_space", lambda: buffers.COMPILER)
    assert twice(2.0) == 4.0


@pytest.mark.skipif(bool(os.environ.get("NUMBA_DISABLE_JIT")), reason="nothing is compiled")
@pytest.mark.parametrize("error", [MemoryError, KeyboardInterrupt])
def test_a_compilation_that_ends_within_a_kernel_that_is_called_is_done_anew(
    error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error comes as it is, not as one of types; afterwards both kernels are compiled."""

    @kernels.njit(cache=False)
    def inner(x):
        return x * x

    @kernels.njit(cache=False)
    def outer(x):
        return inner(x) + 1

    def stopped(kernel: str) -> None:
        if kernel == "inner":
            raise error("inner")

    with monkeypatch.context() as patch, pytest.raises(error, match="inner"):
        patch.setattr(kernels, "require_compiler", stopped)
        outer(3.0)
    assert outer(3.0) == 10.0


@pytest.mark.slow
@pytest.mark.parametrize("cache", ["cold", "warm"])
@pytest.mark.parametrize("mib", [300, 560, 680, 740, 950, 1500])
def test_a_limited_address_space_ends_with_status_3_or_with_the_job(
    mib: int, cache: str, tmp_path: Path
) -> None:
    """`ulimit -v`: too little to start, to compile, for sums, buffers, activations; enough."""
    made = wide(width=256, head_width=32, mlp_width=1024, vocabulary=50)
    rc.save(rc.Model(made, random_parameters(made, 0)), tmp_path / "w.h5")
    rc.save_corpus(
        rc.Corpus(np.random.default_rng(0).integers(0, 50, (16, 512))), tmp_path / "c.h5"
    )
    command = "collect w.h5 c.h5 -o f.h5 --layers '**'"
    done = subprocess.run(
        f"ulimit -v {1024 * mib}; exec {sys.executable} -m refcurv {command}",
        shell=True, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False,
        env=os.environ | ({"NUMBA_CACHE_DIR": str(tmp_path)} if cache == "cold" else {}),
    )  # fmt: skip
    on_the_way = re.compile(r"refcurv: collect: .*(after \d+ s|about .* on disk)")
    lines = [one for one in done.stderr.splitlines() if not on_the_way.match(one)]
    assert (done.returncode, len(lines)) in ((0, 0), (3, 1)), done.stderr
    assert done.returncode == 3 or mib > 700
    assert mib < 1500 or done.returncode == 0


@pytest.mark.parametrize("threads", [1, 2, None])
@pytest.mark.parametrize("mib", [60, 140, 210, 240, 400])
def test_what_is_too_little_to_import_is_said_at_once(mib: int, threads: int | None) -> None:
    """Of these 140 and 210 make the one or the other BLAS ask for ever."""
    own = {} if threads is None else {"OPENBLAS_NUM_THREADS": str(threads)}
    done = subprocess.run(
        f"ulimit -v {1024 * mib}; exec {sys.executable} -m refcurv --help",
        shell=True, capture_output=True, text=True, timeout=20, check=False,
        env=os.environ | own,
    )  # fmt: skip
    assert done.returncode == 3 and done.stderr.count("\n") == 1, done.stderr
    assert f"the address space has {mib} MiB (`ulimit -v`)" in done.stderr


def test_without_proc_it_is_all_memory_or_unknown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sysconf", {"SC_PHYS_PAGES": 100, "SC_PAGE_SIZE": 4096}.__getitem__)
    assert room.available(tmp_path) == 409_600
    monkeypatch.delattr(os, "sysconf")
    assert room.available(tmp_path) is None


def test_of_this_machine_something_is_known() -> None:
    assert (room.available() or 0) > 2**20


# ------------------------------------------------------------------ what a job takes


def peak(work: Callable[[], object]) -> int:
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        work()
        return tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()


def one_large(n: int) -> Factors:
    x = np.random.default_rng(0).normal(size=(n + 8, n))
    layers = {"patch": Factor(np.eye(2), 9, x.T @ x, 9), "head": Factor(np.eye(3), 9, np.eye(2), 9)}
    return Factors(MappingProxyType(layers), Fisher.EMPIRICAL, Rows.REACHED, 0, 1, "float64", 9)


@pytest.mark.parametrize("read", [False, True], ids=["in-memory", "from-a-file"])
def test_an_eigenbasis_takes_the_memory_that_is_foreseen(
    read: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Never more is asked for than is used, or what could be done would be refused."""
    monkeypatch.setattr(room, "cores", lambda: 1)
    n, factors = 400, one_large(400)
    if read:
        rc.save_factors(factors, tmp_path / "f.h5")
        factors = rc.load_factors(tmp_path / "f.h5")
    need = room.to_decompose({"G": n, "A": 2}).bytes(1)
    assert need == 3 * 8 * n * n
    assert 0.95 * need <= peak(lambda: rc.decompose(factors)) <= 1.2 * need


def test_numpys_route_makes_two_copies_more() -> None:
    n = 32_766
    assert room.eigh_bytes(n) == 2 * 8 * n**2
    assert room.eigh_bytes(n + 1) == 5 * 8 * (n + 1) ** 2


def wide(**changes: object) -> ModelConfig:
    return config(**dict(vocabulary=500, width=4, head_width=2, mlp_width=500, layers=1) | changes)


def model_of(made: ModelConfig, dtype: str) -> Model:
    parameters = {k: v.astype(dtype) for k, v in random_parameters(made, 0).items()}
    return Model(made, parameters, dtype)


@pytest.mark.parametrize("layers", ["head", "blocks.0.mlp.{up,down}", "**"])
@pytest.mark.parametrize(
    ("dtype", "draws", "blocks"),
    [("float64", 1, 1), ("float32", 1, 2), ("float64", 2, 1), ("float32", 1, 0)],
)
def test_a_collection_takes_the_memory_that_is_foreseen(
    layers: str, dtype: str, draws: int, blocks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three shards, one at a time, in one block of the law's or in two; in one with halves (0)."""
    if blocks == 2:
        for module in (accumulate, room):
            monkeypatch.setattr(module, "BLOCK_SHARDS", 2)
    monkeypatch.setattr("refcurv.law.conventions.SHARD_TOKENS", 3)
    found: list[room.Need] = []
    foresee = room.to_collect

    def spy(config: ModelConfig, job: Sweep, itemsize: int, units: list[Shard]) -> room.Need:
        assert len(units) == 3
        found.append(foresee(config, job, itemsize, units))
        return found[-1]

    monkeypatch.setattr(room, "to_collect", spy)
    model = model_of(wide(), dtype)
    corpus = rc.Corpus(np.random.default_rng(0).integers(0, 300, (3, 3)))

    def work() -> None:
        rc.collect(model, corpus, layers, draws=draws, in_flight=1, halves=not blocks)

    work()  # what is made once
    used, need = peak(work), found[-1].bytes(1)
    tiles = 4 * 8 * 256**2 if draws > 1 else 0  # of the standard errors, whatever the width
    assert 0.95 * need <= used <= 1.15 * need + tiles


# ------------------------------------------------------------------ what is refused, and when


def test_weights_that_do_not_fit_are_refused_before_they_are_read(tmp_path, monkeypatch) -> None:
    made = wide()
    model, corpus = model_of(made, "float32"), rc.Corpus(np.zeros((2, 3), int))
    rc.save(model, tmp_path / "w.h5")
    nbytes = sum(x.nbytes for x in model.parameters.values())
    of_file = rc.load(tmp_path / "w.h5", "float32")
    assert (room.unread(model), room.unread(of_file)) == (0, nbytes)
    monkeypatch.setattr(room, "available", lambda: nbytes)
    rc.collect(model, corpus, "blocks.0.attn.q")
    with pytest.raises(RoomError, match=r"block by block \(refcurv collect --memory\)"):
        rc.collect(of_file, corpus, "blocks.0.attn.q")


def test_fewer_are_in_flight_where_memory_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    need = room.Need(100, (50, 50, 20), "G of 'head', 9 x 9")
    monkeypatch.setattr(room, "cores", lambda: 4)
    for free, want in ((None, 4), (500, 4), (220, 4), (219, 2), (200, 2), (199, 1), (150, 1)):
        monkeypatch.setattr(room, "available", lambda free=free: free)
        assert room.in_flight("collect", need) == want
        assert room.in_flight("collect", need, 3) == min(want, 3)
    monkeypatch.setattr(room, "available", lambda: 149)
    with pytest.raises(RoomError, match="'head', 9 x 9") as refused:
        room.in_flight("collect", need)
    assert refused.value.status == 3
    assert refused.value.values == {"need": 150, "room": 149}


def test_memory_changes_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Room for three shards and sides at a time, and for one."""
    monkeypatch.setattr("refcurv.law.conventions.SHARD_TOKENS", 3)
    monkeypatch.setattr(room, "cores", lambda: 3)
    model = model_of(wide(), "float64")
    corpus = rc.Corpus(np.random.default_rng(0).integers(0, 300, (4, 3)))
    made = []
    for room_to_collect, room_to_decompose in ((None, None), (4_100_000, 8_100_000)):
        monkeypatch.setattr(room, "available", lambda free=room_to_collect: free)
        factors = rc.collect(model, corpus, "head")
        monkeypatch.setattr(room, "available", lambda free=room_to_decompose: free)
        basis = rc.decompose(factors)["head"]
        made.append([factors["head"].sum_G.tobytes(), basis.U_G.tobytes(), basis.lam.tobytes()])
    assert made[0] == made[1]


class Unread(dict[str, np.ndarray]):
    """The parameters of a model too large for a test: whoever reads one has begun to work."""

    def __getitem__(self, name: str) -> np.ndarray:
        raise AssertionError(f"{name} was read")


def test_a_head_that_memory_does_not_hold_is_refused_before_any_work(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """G of 49,152 words: 9 GiB in the sum, 18 in a shard's product; 108 to decompose it."""
    monkeypatch.setattr(room, "available", lambda: 24 * GIB)
    made = config(vocabulary=WORDS, width=2048, head_width=128, mlp_width=8192)
    model = Model(made, Unread(dict.fromkeys(made.parameter_shapes())), "float64")  # type: ignore[arg-type]
    corpus = rc.Corpus(np.arange(12).reshape(3, 4))
    with pytest.raises(RoomError, match=r"collect: needs 27\.0 GiB") as refused:
        rc.collect(model, corpus, "head")
    for part in ("G of 'head', 49,152 x 49,152", "24.0 GiB are free", "--layers"):
        assert part in str(refused.value)
    assert "\n" not in str(refused.value)
    with pytest.raises(AssertionError, match="was read"):
        rc.collect(model, corpus, "blocks.0.attn.q")
    many = rc.Corpus(np.zeros((65 * 512, 4), int))  # 65 shards: a total and a block
    with pytest.raises(RoomError, match=r"collect: needs 36\.1 GiB"):
        rc.collect(model, many, "head")
    need = room.to_decompose({"G of 'head'": WORDS})
    with pytest.raises(RoomError) as refused:
        room.in_flight("decompose", need)
    assert "--memory" not in str(refused.value)  # less is no help where all is too little
    assert need.bytes(1) >= 58e9
    monkeypatch.setattr(room, "available", lambda: need.bytes(1) - 1)
    with pytest.raises(RoomError, match=r"decompose: needs 108\.0 GiB"):
        room.in_flight("decompose", need)


def factors_unread(n: int) -> Factors:
    """Of a head of n words: numbers that take no memory, in matrices whose widths are real."""
    flat = np.broadcast_to(np.float64(1), (n, n))
    layers = MappingProxyType({"head": Factor(np.eye(2), 9, flat, 9)})
    return Factors(layers, Fisher.EMPIRICAL, Rows.REACHED, 0, 1, "float64", 9)


@pytest.fixture
def idle(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Whatever decomposes a matrix fails."""

    def begun(*_: object) -> None:
        raise AssertionError("a matrix was decomposed")

    monkeypatch.setattr(bases, "eigenbasis", begun)
    yield


@pytest.mark.usefixtures("idle")
def test_a_decomposition_is_refused_before_any_work(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    out = tmp_path / "b.h5"
    monkeypatch.setattr(room, "available", lambda: 24 * GIB)
    for work in (
        lambda: rc.decompose(factors_unread(WORDS)),
        lambda: resumed_bases.decompose_to(factors_unread(WORDS), out),
    ):
        with pytest.raises(RoomError, match=r"needs 108.0 GiB.*24.0 GiB are free.*--layers"):
            work()
    assert not out.exists()
    monkeypatch.setattr(room, "available", lambda: None)  # unknown memory refuses nothing
    bases.decompose_each(factors_unread(WORDS), Bias.SEPARATE)
    monkeypatch.setattr(blas, "has_long_integers", lambda: False)
    with pytest.raises(RoomError, match=r"G of 'head' is 49,152 x 49,152.*32 bits.*--layers"):
        rc.decompose(factors_unread(WORDS))
    bases.decompose_each(factors_unread(32_766), Bias.SEPARATE)
