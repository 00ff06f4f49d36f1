"""No false alarm: what two correct programs may do differently, on random small models.

    python -m validation.judge.legitimate              1,000 variations, and their table
    python -m validation.judge.legitimate --count 50   fewer; --jobs 2, in two processes

It goes on where it was stopped: what is found lands line by line in legitimate.jsonl, with a digest
of the code. A process that dies, of too little memory say, is named with its seed, which is tried
again.

Each variation is a dump of the truth of a random model (tests/strategies.py) that differs in
several ways at once: order and parts of the corpus, gauge, dtype within the declared one, layer
names, format, drawn labels; or bases and edits whose vectors have other signs, other orders among
ties, and rotations within clusters. It must pass. Beside every one the same dump with a fault
planted into one layer must not. The seed of variation n is n.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
RECORDS = HERE / "legitimate.jsonl"
sys.path.insert(0, str(ROOT / "tests"))

from strategies import any_config, config, random_parameters  # noqa: E402

import refcurv as rc  # noqa: E402
from refcurv.curvature.eigenbasis import Eigenbasis  # noqa: E402
from refcurv.editing.projection import keep_pairs  # noqa: E402
from refcurv.files.families import FAMILIES  # noqa: E402
from refcurv.judge.arithmetic import ROUNDOFF  # noqa: E402
from refcurv.judge.dump import Dump, Theirs  # noqa: E402
from refcurv.law.checks import Array, EmptyError  # noqa: E402
from refcurv.model.part import part_of  # noqa: E402
from validation.judge.crew import Done, crew  # noqa: E402
from validation.judge.score import code  # noqa: E402

COUNT = 1000
SIGNIFICANT = {"float16": 11, "bfloat16": 8}
DTYPES = ("float64", "float32", "float16", "bfloat16")
FISHERS = ("empirical", "expected", "sampled")
Layers = dict[str, tuple[Array, Array, int]]


@dataclass
class Variation:
    """One dump: what was varied, the verdict, and that of the same dump with a fault in it."""

    seed: int
    ways: list[str]
    verdict: rc.Verdict
    planted: rc.Verdict
    undone: list[str] = field(default_factory=list)


# ------------------------------------------------------------------ models and corpora


def world(rng: np.random.Generator) -> tuple[rc.Model, rc.Corpus]:
    """Any small model, its labels from free to nearly certain; padding, documents, own labels.

    It is nowhere narrower than 8. The variance of a few numbers is often nearly 0, and a layer norm
    then divides by it: three runs do not always tell how far float32 is off.
    """

    def pick(options: Sequence[Any]) -> Any:
        return options[int(rng.integers(len(options)))]

    made = any_config(pick)
    scaling = made.rope_scaling
    if scaling and scaling.short and made.rope_width is None:  # a divisor for each of four pairs
        scaling = replace(scaling, short=(1.0, 1.1, 1.2, 1.3), long=(2.0, 2.7, 3.4, 4.1))
    made = replace(made, width=pick((8, 12)), head_width=8, rope_scaling=scaling)
    parameters = random_parameters(made, int(rng.integers(9999)))
    if "head.weight" in parameters:
        parameters["head.weight"] = parameters["head.weight"] * pick((0.25, 1, 3))
    model = rc.Model(made, {name: rounded(x, "float32") for name, x in parameters.items()})
    width = min(5, made.learned_positions or 5)
    tokens = rng.integers(0, made.vocabulary, (int(rng.integers(6, 14)), width))
    length = rng.integers(2, width + 1, len(tokens))
    mask = (np.arange(width) < length[:, None]).astype(np.uint8) if rng.random() < 0.5 else None
    segments = None
    if mask is None and rng.random() < 0.3:
        segments = np.repeat([[0] * 2 + [1] * (width - 2)], len(tokens), axis=0)
    labels = None
    if not made.causal or rng.random() < 0.5:
        labels = rng.integers(-1, made.vocabulary, tokens.shape)
        labels[:, 0] = np.abs(labels[:, 0])
        labels = labels if mask is None else np.where(mask, labels, -1)
    return model, rc.Corpus(tokens, labels, mask=mask, segments=segments)


def rounded(x: Array, dtype: str) -> Array:
    """x to the significant bits of `dtype`."""
    if dtype in ("float64", "float32"):
        return np.asarray(x).astype(dtype).astype(np.float64)
    significand, exponent = np.frexp(x)
    return np.ldexp(
        np.rint(np.ldexp(significand, SIGNIFICANT[dtype])), exponent - SIGNIFICANT[dtype]
    )


def collected(
    model: rc.Model, corpus: rc.Corpus, fisher: str, dtype: str, rng: np.random.Generator
) -> tuple[Layers, list[str]]:
    """(sums and count by layer, what was varied): a program's own run over the same corpus."""
    if dtype == "float32":
        short = {name: np.asarray(x, np.float32) for name, x in model.parameters.items()}
        model = rc.Model(model.config, short, "float32")
    order = rng.permutation(len(corpus.label))
    edges = np.sort(rng.choice(np.arange(1, len(order)), int(rng.integers(0, 3)), replace=False))
    total: Layers = {}
    for at in np.split(order, edges):
        # a seed of its own: SAMPLING counts the sequences of each part from 0
        said = {"seed": int(rng.integers(2, 2**60))} if fisher == "sampled" else {}
        with suppress(EmptyError):  # a part without a label adds nothing
            for name, one in rc.collect(model, part_of(corpus, at), "**", fisher, **said).items():
                A, G, n = total.get(name, (0.0, 0.0, 0))
                total[name] = (A + one.sum_A, G + one.sum_G, n + one.n_A)
    if dtype in SIGNIFICANT:
        total = {
            x: (noisy(A, dtype, rng), noisy(G, dtype, rng), n) for x, (A, G, n) in total.items()
        }
    ways = ["batch and row order", f"{len(edges) + 1} shards", f"{dtype} noise"]
    return total, ways + (["drawn labels"] if said else [])


def noisy(M: Array, dtype: str, rng: np.random.Generator) -> Array:
    """M of a and g that are off by one rounding each, stored in a shorter float."""
    off = 1 + ROUNDOFF[dtype] * rng.uniform(-1, 1, len(M))
    return rounded(off[:, None] * M * off, dtype)


# ------------------------------------------------------------------ formats


def names_of(family: Any, layers: Sequence[str]) -> dict[str, str] | None:
    """Ours → a checkpoint's names, if the family has every one as a tensor of its own."""
    out = {}
    for slot in family.slots:
        if len(slot.ours) == 1:
            for n in range(3):
                out[slot.ours[0].replace("*", str(n))] = slot.theirs.replace("*", str(n))
    return {x: out[x] for x in layers} if {*layers} <= {*out} else None


def saved(path: Path, arrays: Mapping[str, Array], kind: str) -> None:
    """Arrays in a file of one of the plain formats."""
    if kind == "npz":
        np.savez(path, **arrays)
    elif kind == "hdf5":
        import h5py

        with h5py.File(path, "w") as file:
            for name, x in arrays.items():
                file.create_dataset(name, data=x)
    else:
        from safetensors.numpy import save_file

        save_file({name: np.ascontiguousarray(x) for name, x in arrays.items()}, path)


def written(
    folder: Path, kind: str, sums: Layers, arithmetic: tuple[str, str], rng: np.random.Generator
) -> Any:
    """The dump in one format; plain ones hold means, in some gauge. arithmetic: fisher, dtype."""
    means = {x: (A / n, G / n, n) for x, (A, G, n) in sums.items()}
    if kind == "kronfluence":
        return _kronfluence(folder / "factors_x", sums, *arithmetic)
    if kind == "official":
        return _official(folder / "kfac_factors_blk_0.pt", means)
    gauged = {}
    for name, (A, G, n) in means.items():
        c = 2.0 ** int(rng.integers(-40, 40))
        gauged[name] = (c * A, G / c, n)
    if kind == "memory":
        return gauged
    ends = {"npz": "npz", "hdf5": "h5", "safetensors": "safetensors"}
    arrays = {}
    for name, (A, G, n) in gauged.items():
        arrays |= {f"{name}/A": A, f"{name}/G": G, f"{name}/n": np.array(n)}
    path = folder / f"theirs.{ends[kind]}"
    saved(path, arrays, kind)
    return path


def _kronfluence(folder: Path, sums: Layers, fisher: str, dtype: str) -> Path:
    """A folder of kronfluence's; its dtypes are declared by the caller."""
    folder.mkdir()
    arguments = {"use_empirical_fisher": fisher == "empirical", "amp_dtype": None,
                 "activation_covariance_dtype": f"torch.{dtype}",
                 "gradient_covariance_dtype": f"torch.{dtype}",
                 "covariance_data_partitions": 1, "covariance_module_partitions": 1}  # fmt: skip
    (folder / "factor_arguments.json").write_text(json.dumps(arguments))
    for k, part in enumerate(("activation", "gradient")):
        matrices = {name: one[k] for name, one in sums.items()}
        counts = {name: np.array([one[2]]) for name, one in sums.items()}
        saved(folder / f"{part}_covariance.safetensors", matrices, "safetensors")
        saved(folder / f"num_{part}_covariance_processed.safetensors", counts, "safetensors")
    return folder


def _official(path: Path, means: Layers) -> Path:
    """A file of torch.save, as somebody writes their own."""
    import torch

    torch.save({x: {"A": torch.tensor(A), "G": torch.tensor(G), "n": n}
                for x, (A, G, n) in means.items()}, path)  # fmt: skip
    return path


FORMATS = ("memory", "npz", "hdf5", "safetensors", "kronfluence", "official")


# ------------------------------------------------------------------ factors


def factors(seed: int, rng: np.random.Generator, folder: Path) -> Variation:
    """A and G of every linear layer, by a program of its own."""
    model, corpus = world(rng)
    fisher, dtype, kind = (str(rng.choice(x)) for x in (FISHERS, DTYPES, FORMATS))
    if kind == "kronfluence" and model.config.biases:
        kind = "npz"  # kronfluence joins a bias to its weight, which is another A
    draws = {"draws": int(rng.integers(1, 5)), "seed": 1} if fisher == "sampled" else {}
    reference = rc.collect(model, corpus, "**", fisher, **draws)
    sums, ways = collected(model, corpus, fisher, dtype, rng)
    found = [(f, x) for f in FAMILIES if (x := names_of(f, list(sums)))]
    ways += [f"as {kind}", *(["gauge"] if kind in ("memory", "npz", "hdf5", "safetensors") else [])]
    named = {x: x for x in sums}
    if found:
        _, named = found[int(rng.integers(len(found)))]
        ways.append("names of a checkpoint")
    theirs = {named[x]: one for x, one in sums.items()}
    given: dict[str, Any] = {"arithmetic": dtype, "declared": {"fisher": fisher}}
    if fisher == "sampled":
        given |= {"model": model, "corpus": corpus}
    verdicts = []
    for n, dump in enumerate((theirs, planted(theirs, rng))):
        place = folder / str(n)
        place.mkdir()
        verdicts.append(
            rc.validate(written(place, kind, dump, (fisher, dtype), rng), reference, **given)
        )
    undone = [] if {*(verdicts[0].matched or {}).values()} == {*theirs} else ["names"]
    return Variation(seed, ways, *verdicts, undone)


def planted(theirs: Layers, rng: np.random.Generator) -> Layers:
    """A of one layer has its rows and columns in another order; of a random one that this changes.

    Where it changes none, A of every layer is 64 times as large: neither a dtype nor drawing
    explains that in all of them, in whatever gauge.
    """
    turned = {layer: np.ascontiguousarray(A[::-1, ::-1]) for layer, (A, _, _) in theirs.items()}
    size = {layer: np.linalg.norm(A) for layer, (A, _, _) in theirs.items()}
    far = [x for x in theirs if np.linalg.norm(turned[x] - theirs[x][0]) > 0.5 * size[x]]
    if not far:
        return {layer: (64 * A, G, n) for layer, (A, G, n) in theirs.items()}
    layer = str(rng.choice(far))
    return {**theirs, layer: (turned[layer], *theirs[layer][1:])}


# ------------------------------------------------------------------ bases and edits


def bases(seed: int, rng: np.random.Generator, folder: Path) -> Variation:
    """Their own eigenvectors, of any sign, order and rotation; their mask and their edit."""
    made = config(width=int(rng.choice([4, 8])), mlp_width=int(rng.choice([1, 5, 9])), layers=1)
    model, layer = rc.Model(made, random_parameters(made, 3)), "blocks.0.mlp.up"
    W = np.asarray(model.parameters[f"{layer}.weight"])
    A, G = (symmetric(rng, n) for n in W.shape[::-1])
    one = rc.Factor(50 * A, 50, 50 * G, 50, 0.0, 0.0)
    reference = rc.Factors({layer: one}, "expected", "reached", 0, 1, "float64", 96)
    dtype, rho = str(rng.choice(["float64", "float32"])), rng.uniform(0.2, 0.95)
    sides: list[Array] = []
    for M in (A, G):
        values, U = np.linalg.eigh(M.astype(dtype))
        U, values = U[:, ::-1].astype(np.float64), np.maximum(values[::-1], 0).astype(np.float64)
        U = U * rng.choice([-1, 1], size=len(values))
        sides += [turned_in_clusters(rng, U, values, 64 * ROUNDOFF[dtype]), values]
    basis = Eigenbasis(*sides)
    mask = rc.algebra.selection.select(basis.lam, basis.mu, rho)
    ways = ["signs", "rotation in clusters", f"{dtype} noise"]
    parts = {"U_A": basis.U_A, "mu": basis.mu, "U_G": basis.U_G, "lam": basis.lam, "mask": mask}
    if rng.random() < 0.4:
        parts, ways = {"W": rounded(keep_pairs(W, basis, mask), dtype)}, [*ways, "edited weight"]
    elif rng.random() < 0.6:
        at_A, at_G = rng.permutation(len(basis.mu)), rng.permutation(len(basis.lam))
        parts = {"U_A": basis.U_A[:, at_A], "mu": 3 * basis.mu[at_A], "U_G": basis.U_G[:, at_G]}
        parts |= {"lam": basis.lam[at_G], "mask": mask[np.ix_(at_G, at_A)]}
        ways.append("order of vectors and ties")
    said = {"arithmetic": dtype, "declared": {"fisher": "expected", "rho": str(rho)}}
    bad = {**parts, "W": 1.3 * parts["W"]} if "W" in parts else {**parts, "U_A": parts["U_A"] * 1.1}

    def judged(of: Mapping[str, Array]) -> rc.Verdict:
        dump = Dump("test", {layer: Theirs(**of)}, {layer: frozenset(of)})
        with mock.patch("refcurv.judge.judgement.read_dump", lambda _: dump):
            return rc.validate(dump, reference, model=model, layers=layer, **said)

    undone = [] if "W" in parts or (basis.U_A != np.linalg.eigh(A)[1]).any() else ["signs"]
    return Variation(seed, ways, judged(parts), judged(bad), undone)


def symmetric(rng: np.random.Generator, n: int) -> Array:
    """A second moment of random spectrum, with clusters of equal eigenvalues, perhaps singular."""
    values = np.sort(rng.choice(2.0 ** -np.arange(12.0), size=n))[::-1] * rng.uniform(0.5, 2)
    if rng.random() < 0.3:
        values[max(1, n // 2) :] = 0
    U, _ = np.linalg.qr(rng.normal(size=(n, n)))
    M = (U * values) @ U.T
    return np.asarray((M + M.T) / 2)


def turned_in_clusters(rng: np.random.Generator, U: Array, values: Array, width: float) -> Array:
    """U with the vectors of nearly equal eigenvalues rotated among themselves."""
    U, start = U.copy(), 0
    for k in range(1, len(values) + 1):
        if k == len(values) or values[k - 1] - values[k] > width * values[0]:
            Q, _ = np.linalg.qr(rng.normal(size=(k - start, k - start)))
            U[:, start:k] = U[:, start:k] @ Q
            start = k
    return U


# ------------------------------------------------------------------ all of them


def variation(seed: int) -> Variation:
    """Variation number `seed`."""
    rng = np.random.default_rng(seed)
    make: Callable[..., Variation] = bases if seed % 4 == 3 else factors
    with tempfile.TemporaryDirectory() as folder:
        return make(seed, rng, Path(folder))


def alarms(one: Variation) -> list[Any]:
    """The findings that are neither a pass nor undecided."""
    return [f for f in one.verdict.failed if f.verdict != "undecided"]


@dataclass(frozen=True)
class Outcome:
    """What became of one variation: what was varied, the first false alarm in words, and more."""

    seed: int
    ways: tuple[str, ...]
    alarm: str
    undecided: bool
    missed: bool


def outcome(seed: int) -> Outcome:
    """Variation number `seed`, judged."""
    one = variation(seed)
    if one.undone:
        raise AssertionError(f"variation {seed} was not applied: {one.undone}")
    alarm = str(next(iter(alarms(one)), ""))
    open_ = not alarm and not one.verdict.passed
    return Outcome(seed, (*one.ways, "all"), alarm, open_, one.planted.passed)


def version() -> str:
    """A digest of the judge, and of what the variations are made of."""
    made_of = code().encode() + (ROOT / "tests" / "strategies.py").read_bytes()
    return hashlib.sha256(made_of).hexdigest()[:16]


def read(path: Path, made_by: str) -> dict[int, Outcome]:
    """{seed: what became of it}, of this code."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    records = [json.loads(line) for line in lines if line.endswith("}")]
    own = [{k: x for k, x in r.items() if k != "code"} for r in records if r["code"] == made_by]
    return {r["seed"]: Outcome(**{**r, "ways": tuple(r["ways"])}) for r in own}


def cut_off(path: Path) -> str:
    """What ends a last line that a kill left half written."""
    return "" if not path.stat().st_size or path.read_bytes().endswith(b"\n") else "\n"


def settled(done: Done) -> Outcome:
    """What became of a seed: a judge that raises, or dies each time, is a false alarm."""
    if done.result is not None:
        found: Outcome = done.result
        return found
    why = f"raised {done.raised}" if done.raised else "; ".join(done.deaths)
    return Outcome(done.piece, ("all",), why, False, False)


def table(found: Iterable[Outcome]) -> Iterator[str]:
    """Each way to vary, how often it occurred, and what became of it."""
    times, alarmed, undecided, missed = (Counter[str]() for _ in range(4))
    for one in found:
        times.update(one.ways)
        for bad, counter in ((one.alarm, alarmed), (one.missed, missed)):
            if bad:
                counter.update(one.ways)
                print(f"{one.seed} {one.ways[:-1]} {bad}", file=sys.stderr)
        undecided.update(one.ways if one.undecided else ())
    yield "| what differs | dumps | false alarms | undecided | planted faults that passed |"
    yield "| --- | ---: | ---: | ---: | ---: |"
    for way in sorted(times, key=lambda way: (way == "all", way)):
        yield f"| {way} | {times[way]} | {alarmed[way]} | {undecided[way]} | {missed[way]} |"


def main() -> int:
    """Run, and write LEGITIMATE.md."""
    from tqdm import tqdm

    parser = argparse.ArgumentParser(prog="python -m validation.judge.legitimate")
    parser.add_argument("--count", type=int, default=COUNT)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=1)
    given = parser.parse_args()
    seeds = range(given.first, given.first + given.count)
    made_by = version()
    found = read(RECORDS, made_by)
    left = [seed for seed in seeds if seed not in found]
    with RECORDS.open("a", encoding="utf-8") as file:
        file.write(cut_off(RECORDS))
        for done in tqdm(crew(outcome, left, given.jobs), total=len(left), unit="dump"):
            for death in done.deaths:
                print(f"seed {done.piece}: {death}", file=sys.stderr)
            found[done.piece] = settled(done)
            file.write(json.dumps({"code": made_by, **asdict(found[done.piece])}) + "\n")
            file.flush()
    rows = list(table(found[seed] for seed in seeds))
    command = f"    python -m validation.judge.legitimate --count {given.count}"
    head = ["# No false alarm", "", *ABOUT, "", command, ""]
    if given.first == 0:
        (HERE / "LEGITIMATE.md").write_text("\n".join([*head, *rows, ""]), encoding="utf-8")
    print("\n".join(rows))
    return 0


ABOUT = (
    "What two correct programs may do differently, on random small models; several ways at once",
    "in each dump. Beside each dump stands the same one with a fault in it. Drawn labels may fail",
    "with odds of 1/1000 a dump. Undecided are cuts among pairs that rounding orders, and an A or",
    "G that is off by more than a tenth where the arithmetic could hide a factor of 2: of these",
    "models, which have few rows, two bfloat16 dumps of three. No model is narrower than 8: of",
    "fewer numbers a layer norm often divides by nearly 0, and three runs do not always tell how",
    "far float32 is off.",
)

if __name__ == "__main__":
    raise SystemExit(main())
