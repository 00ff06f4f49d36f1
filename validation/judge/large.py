"""How long the judge takes over a dump of a 100 M parameter model, and how much memory.

    python -m validation.judge.large             everything; 8 GiB of disk below TMPDIR
    python -m validation.judge.large --small     a tiny model: does it run? Writes no page
    python -m validation.judge.large --only right.npz,gold   some dumps

The model is the 100 M one of validation/bench: 12 blocks, width 768, MLP width 3072. Its 36
MLP projections are judged. Two references are made:

  - one whose A and G are made from their eigenvectors, so that its basis costs no decomposition.
    The dumps that no model is needed for are made of it.
  - one that is collected from 8 x 128 random tokens. The dumps beside it are collected in float32,
    and are judged with model and corpus.

Every dump is judged in a fresh process. Linux only: peaks are ru_maxrss, started anew before each
measurement through /proc/self/clear_refs.
"""

from __future__ import annotations

import argparse
import shlex
import shutil
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from validation.bench.fresh import spawn
from validation.bench.measuring import BUSY, Record, describe_machine, measured, tell, today
from validation.bench.page import with_block
from validation.bench.proxies import LARGE, TINY, Size, make

if TYPE_CHECKING:
    import numpy as np

    import refcurv as rc
    from refcurv.judge.verdict import Verdict

PAGE = Path(__file__).resolve().parent / "LARGE.md"
BEGIN, END = "<!-- large: begin -->", "<!-- large: end -->"
FULL = replace(LARGE, positions=128)
SMALL = replace(TINY, width=128, mlp_width=512, vocabulary=500, sequences=8, positions=128)
LAYERS = "blocks.*.mlp.*"
LIMIT_SECONDS, LIMIT_MIB = 120.0, 2048.0


@dataclass(frozen=True, slots=True)
class Subject:
    """A dump: its file's name, what is wrong with it, the fault to be named, and how it is judged.

    Fields: recomputed, with model and corpus; arithmetic, what is declared of it.
    """

    file: str
    what: str
    fault: str | None = None
    recomputed: bool = False
    arithmetic: str = ""


SUBJECTS = (
    Subject("right.npz", "right"),
    Subject("right.pt", "right, a file of torch.save"),
    Subject("basis.npz", "right, with eigenvectors"),
    Subject("mean.npz", "G of a mean over tokens", "B1"),
    Subject("layer.npz", "`up` of the block before", "B38"),
    Subject("sums.npz", "sums in bfloat16", "B58"),
    Subject("drawn.npz", "right, with model and corpus", None, recomputed=True),
    Subject("gold.npz", "labels of the corpus", "B15", recomputed=True),
    Subject("last.npz", "A with the last position", "B27", recomputed=True),
    Subject("reduce.npz", "K-FAC reduce", "B36", recomputed=True),
    Subject("next.npz", "of the next block", "B38", recomputed=True),
    Subject("short.npz", "sums in bfloat16", "B58", recomputed=True),
)

# ------------------------------------------------------------------ references


def layers_of(size: Size) -> dict[str, tuple[int, int]]:
    """(O, I) of every MLP projection."""
    D, M = size.width, size.mlp_width
    kinds = {"gate": (M, D), "up": (M, D), "down": (D, M)}
    return {f"blocks.{i}.mlp.{k}": s for i in range(size.layers) for k, s in kinds.items()}


def make_model(folder: Path, size: Size) -> Record:
    """A random model, and tokens, in the house's format."""
    import numpy as np

    import refcurv as rc

    made = make(folder, size)
    shutil.rmtree(folder / "checkpoint")
    rc.save_corpus(rc.Corpus(np.load(folder / "tokens.npy")), folder / "c.h5")
    return made


def make_reference(folder: Path, size: Size) -> Record:
    """A and G with spectra that decay, and their basis: U diag(μ) Uᵀ, U a few reflections."""
    import refcurv as rc
    from refcurv.curvature.eigenbasis import Eigenbasis
    from refcurv.files.lazy import Lazy

    shapes = layers_of(size)
    rows = size.sequences * (size.positions - 1)

    def basis(name: str) -> Eigenbasis:
        block, kind = int(name.split(".")[1]), name.rpartition(".")[2]
        out, into = shapes[name]
        a, g = {"gate": 0, "up": 0, "down": 1}[kind], {"gate": 2, "up": 3, "down": 4}[kind]
        mu, lam = 10 * spectrum(into, 1.0 + 0.02 * a), 1e-3 * spectrum(out, 1.3 + 0.02 * g)
        return Eigenbasis(
            rotation(into, [block, a]), mu * (1 + block / 7), rotation(out, [block, g]), lam
        )

    def factor(name: str) -> rc.Factor:
        one, known = basis(name), {}
        for side, U, values in (("A", one.U_A, one.mu), ("G", one.U_G, one.lam)):
            S = rows * ((U * values) @ U.T)
            known[f"sum_{side}"] = (S + S.T) / 2
        return rc.Factor(
            known["sum_A"], rows, known["sum_G"], rows, error_G=0.02 * size_of(one.lam) / rows,
            error_trace_G=0.01 * float(one.lam.sum()), rounding_G=0.0,
        )  # fmt: skip

    from refcurv.law.conventions import Fisher, Rows

    made = rc.Factors(
        Lazy(list(shapes), factor), Fisher.EMPIRICAL, Rows.REACHED, 0, 1, "float64", rows
    )
    rc.save_factors(made, folder / "f.h5")
    rc.save_bases(rc.Bases(Lazy(list(shapes), basis)), folder / "b.h5")
    return {}


def size_of(values: np.ndarray) -> float:
    return float((values**2).sum() ** 0.5)


def spectrum(size: int, power: float) -> np.ndarray:
    """1, 2^-p, 3^-p, ..."""
    import numpy as np

    return np.arange(1.0, size + 1) ** -power


def rotation(size: int, seed: list[int], count: int = 3) -> np.ndarray:
    """A product of a few reflections: orthogonal and dense."""
    import numpy as np

    rng, U = np.random.default_rng([size, *seed]), np.eye(size)
    for _ in range(count):
        v = rng.normal(size=size)
        U -= np.outer(U @ v, 2 * v / (v @ v))
    return U


def collect_reference(folder: Path, _size: Size) -> Record:
    """The collected reference, two draws, so that it says what drawing varies by."""
    import refcurv as rc

    model, corpus = rc.load(folder / "w.h5"), rc.load_corpus(folder / "c.h5")
    factors = rc.collect(model, corpus, LAYERS, "sampled", draws=2, in_flight=1)
    rc.save_factors(factors, folder / "real.h5")
    return {}


# ------------------------------------------------------------------ dumps


def make_dump(folder: Path, size: Size, file: str) -> Record:
    """One foreign dump, as another program would have written it in float32."""
    import numpy as np

    import refcurv as rc

    path = folder / file
    if file in [one.file for one in SUBJECTS if one.recomputed]:
        write_npz(path, collected(folder, file.removesuffix(".npz")))
        return {}
    if file == "basis.npz":
        bases = rc.load_bases(folder / "b.h5")
        parts = ("U_A", "mu", "U_G", "lam")
        write_npz(path, ((f"{n}/{p}", getattr(bases[n], p)) for n in bases for p in parts))
        return {}
    factors = rc.load_factors(folder / "f.h5")
    moments = planted(factors, file.removesuffix(".npz"), size)
    if file.endswith(".pt"):
        import torch

        found: dict[str, dict[str, Any]] = {}
        for key, X in moments:
            name, _, part = key.partition("/")
            of = X if isinstance(X, int) else torch.from_numpy(X.astype(np.float32))
            found.setdefault(name, {})[part] = of
        torch.save(found, path)
    else:
        write_npz(path, moments)
    return {}


def planted(factors: rc.Factors, fault: str, size: Size) -> Iterator[tuple[str, Any]]:
    """LAYER/A, LAYER/G and LAYER/n with the fault that the name says, if it is one."""
    from refcurv.judge.diagnosis.variants.networks import rounded

    rows = size.sequences * (size.positions - 1)
    for name in factors:
        _, block, _, kind = name.split(".")
        before = (int(block) - 1) % size.layers
        read = name.replace(f".{block}.", f".{before}.") if kind == "up" else name
        one = factors[read if fault == "layer" else name]
        A, G = one.A, one.G
        if fault == "mean":
            G = G / rows**2
        if fault == "sums":
            A, G = (rounded(X, "bfloat16") for X in (A, G))
        yield from ((f"{name}/A", A), (f"{name}/G", G), (f"{name}/n", one.n_A))


def collected(folder: Path, kind: str) -> Iterator[tuple[str, Any]]:
    """As another program collects in float32: as we do, but for what `kind` says."""
    import numpy as np

    import refcurv as rc
    from refcurv.curvature.estimators import reduce
    from refcurv.judge.diagnosis.variants.networks import rounded

    model, corpus = rc.load(folder / "w.h5", dtype="float32"), rc.load_corpus(folder / "c.h5")
    fisher, draws = ("empirical", 1) if kind == "gold" else ("sampled", 2)
    collect = reduce if kind == "reduce" else rc.collect
    factors = collect(model, corpus, LAYERS, fisher, draws=draws, in_flight=1)
    inputs: rc.Factors = factors
    if kind == "last":
        labelled = rc.Corpus(corpus.tokens, np.full(corpus.tokens.shape, 0))
        inputs = rc.collect(model, labelled, LAYERS, "empirical", in_flight=1)
    for name in factors:
        read = following(name, list(factors)) if kind == "next" else name
        A, G, n_A, n_G = inputs[read].A, factors[read].G, inputs[read].n_A, factors[read].n_G
        if kind == "short":
            A, G = rounded(A, "bfloat16"), rounded(G, "bfloat16")
        yield from ((f"{name}/A", A), (f"{name}/G", G), (f"{name}/n_A", n_A), (f"{name}/n_G", n_G))
    yield "fisher", "sampled"
    yield "draws", draws


def following(name: str, names: list[str]) -> str:
    """The layer of this kind in the next block; of the last block in the first."""
    block, kind = name.split(".")[1], name.rpartition(".")[2]
    own = [one for one in names if one.endswith(kind)]
    return own[([one.split(".")[1] for one in own].index(block) + 1) % len(own)]


def write_npz(path: Path, arrays: Iterator[tuple[str, Any]]) -> None:
    """As numpy.savez, one array in memory at a time; floats as float32."""
    import numpy as np

    with zipfile.ZipFile(path, "w") as file:
        for name, given in arrays:
            X = np.asarray(given)
            X = X.astype(np.float32) if X.dtype == np.float64 else X
            stream: IO[bytes]
            with file.open(f"{name}.npy", "w", force_zip64=True) as stream:
                np.lib.format.write_array(stream, X, allow_pickle=False)


# ------------------------------------------------------------------ judging


def judge(folder: Path, _size: Size, file: str) -> Record:
    """`rc.validate` on one dump: what it says, its seconds and its memory."""
    import refcurv as rc

    one = next(subject for subject in SUBJECTS if subject.file == file)
    records: Record = {}
    last = [0, 0]

    def progress(done: int, total: int) -> None:
        last[:] = done, total

    given: dict[str, Any] = {"reference": folder / ("real.h5" if one.recomputed else "f.h5")}
    if not one.recomputed:
        given["basis"] = folder / "b.h5"
    with measured(records, "judge"):
        if one.recomputed:
            given["model"] = rc.load(folder / "w.h5")
            given["corpus"] = rc.load_corpus(folder / "c.h5")
        found = rc.validate(folder / file, arithmetic=one.arithmetic, progress=progress, **given)
    return {**records["judge"], "verdict": verdict_of(found), "progress": last}


def verdict_of(found: Verdict) -> Record:
    """The causes, and how many comparisons came out how."""
    counts: dict[str, int] = {}
    for one in found.findings:
        counts[one.verdict] = counts.get(one.verdict, 0) + 1
    causes = [
        {"fault": c.fault, "layers": len(c.layers), "sentence": c.sentence, "alike": c.alike}
        for c in found.causes
    ]
    return {"passed": found.passed, "causes": causes, "counts": counts}


def machine(_folder: Path, _size: Size) -> Record:
    return describe_machine()


def measure(folder: Path, size: Size, subjects: list[Subject]) -> Record:
    """Each dump is made, judged and deleted."""
    result: Record = {
        "command": shlex.join(["python", "-m", "validation.judge.large", *sys.argv[1:]]),
        "date": today(),
        "machine": spawn(machine, folder, size),
        "rows": [],
    }
    made: set[str] = set()
    for one in sorted(subjects, key=lambda subject: subject.recomputed):
        needs = [(make_reference, "f.h5")]
        if one.recomputed:
            needs = [(make_model, "w.h5"), (collect_reference, "real.h5")]
        for job, file in needs:
            if not (folder / file).exists():
                tell(f"make {file}")
                spawn(job, folder, size)
        tell(f"make {one.file}: {one.what}")
        spawn(make_dump, folder, size, file=one.file)
        made.add(one.file)
        row = spawn(judge, folder, size, file=one.file)
        (folder / one.file).unlink()
        result["rows"].append({**asdict(one), **row})
        tell(
            f"judged {one.file}: {row['seconds']:.1f} s, {row['user'] + row['system']:.1f} s of "
            f"processors, {row['peak']:.0f} MiB, {shown(row['verdict'])}"
        )
    return result


# ------------------------------------------------------------------ the page


def shown(verdict: Record) -> str:
    """pass, or the ids of the causes."""
    if verdict["causes"]:
        return ", ".join(f"{c['fault']} ({c['layers']} layers)" for c in verdict["causes"])
    return "passed" if verdict["passed"] else f"no cause: {verdict['counts']}"


def right(row: Record) -> bool:
    """Is it named, within the limits?"""
    verdict, first = row["verdict"], row["fault"]
    causes = [c["fault"] for c in verdict["causes"]]
    return verdict["passed"] if first is None else not verdict["passed"] and first in causes


def table(rows: list[Record]) -> str:
    head = ("dump", "what it is", "said", "seconds", "processor seconds", "others'", "peak MiB")
    lines = [head]
    for row in rows:
        cpu = row["user"] + row["system"]
        numbers = (row["seconds"], cpu, row["others"], row["peak"])
        text = tuple(f"{x:.0f}" for x in numbers)
        lines.append((f"`{row['file']}`", row["what"], shown(row["verdict"]), *text))
    body = ["| " + " | ".join(line) + " |" for line in lines]
    return "\n".join([body[0], "|---|---|---|---:|---:|---:|---:|", *body[1:]])


def block(result: Record) -> str:
    """The generated part of the page."""
    rows, machine = result["rows"], result["machine"]
    cores = machine["cores"]
    busy = max(row["others"] / row["seconds"] / cores for row in rows)
    noise = f"Other processes used up to {busy:.0%} of the processors meanwhile"
    noise += "." if busy < BUSY else ": the seconds are rough, and the processor seconds too."
    slow = [row["file"] for row in rows if row["seconds"] > LIMIT_SECONDS]
    large = [row["file"] for row in rows if row["peak"] > LIMIT_MIB]
    wrong = [row["file"] for row in rows if not right(row)]
    lines = [
        f"Over {LIMIT_SECONDS:.0f} seconds: {', '.join(slow) or 'none'}. "
        f"Over {LIMIT_MIB:.0f} MiB: {', '.join(large) or 'none'}. "
        f"Not named: {', '.join(wrong) or 'none'}.",
        f"Made by `{result['command']}`, {result['date']}, {machine['cpu']}, {cores} cores. "
        f"{noise}",
        table(rows),
    ]
    return "\n\n".join(lines)


def rewrite(text: str, new: str) -> str:
    """The page with its generated block replaced."""
    return with_block(PAGE, text, BEGIN, END, new)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="a tiny model: does it run?")
    parser.add_argument("--only", default="", help="files of SUBJECTS, separated by commas")
    parser.add_argument("--keep", type=Path, help="a folder that is kept, and used again")
    given = parser.parse_args()
    wanted = given.only.split(",") if given.only else [one.file for one in SUBJECTS]
    subjects = [one for one in SUBJECTS if one.file in wanted]
    size = SMALL if given.small else FULL
    with tempfile.TemporaryDirectory(prefix="judge-large-") as folder:
        if given.keep:
            given.keep.mkdir(exist_ok=True)
        result = measure(given.keep or Path(folder), size, subjects)
    new = block(result)
    print(new)
    if not given.small and not given.only:
        PAGE.write_text(rewrite(PAGE.read_text(), new))
    return 0 if all(right(row) for row in result["rows"]) else 1


if __name__ == "__main__":
    sys.exit(main())
