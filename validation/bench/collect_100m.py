"""Factors of a 100 M parameter OLMo-2: refcurv beside the official collector's behaviour.

    python validation/bench/collect_100m.py [--rounds 3] [--small] [--out RESULT.json]

A random checkpoint, written by transformers, goes through convert, load, collect, save_factors,
decompose, edit and save; each phase is timed, and its peak memory taken. The collection alone is
then timed against the official collector's behaviour in PyTorch, turn and turn about. Before that,
both get the same labels and must agree, or no ratio is printed (exit status 1).

The peer below is written from the facts of github.com/goodfire-ai/memorization_kfac,
data/collect_kfac_multilayer.py:
  - a forward pre-hook keeps each wanted nn.Linear's input, a full backward hook takes its output
    gradient; both lose the last position of every sequence and become rows in float32;
  - A += aᵀ a and G += gᵀ g when the gradient comes, per layer: gate and up sum the same A twice;
  - labels: torch.multinomial on softmax(logits[:, :-1]); loss: their *mean* cross-entropy, so that
    G is 1/m² of ours, m the labelled positions of a batch;
  - train mode, no dropout, use_cache off; only the wanted weights require gradients, but
    enable_input_require_grads makes the backward pass go down to the embedding all the same.
Left out, each in the peer's favour: gradient checkpointing, one pass for each group of layers
(the default is one layer a pass), bfloat16, Accelerator, the stream of texts, the attention mask.

Every measurement is a fresh process that collects twice, so that kernels are loaded and memory
is at hand; the second pass counts. Linux only: peaks are ru_maxrss, started anew before each
measurement through /proc/self/clear_refs.
"""

from __future__ import annotations

import argparse
import gc
import importlib.metadata
import json
import os
import platform
import re
import resource
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    import torch

    import refcurv as rc

HERE = Path(__file__).resolve().parent
README = HERE / "README.md"
BEGIN, END = "<!-- collect_100m: begin -->", "<!-- collect_100m: end -->"
LAYERS = "blocks.*.mlp.*"
PARTS = ("gate", "up", "down")
MIB = 2**20
THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")

Record = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Size:
    """The model's and the corpus's sizes."""

    width: int
    layers: int
    heads: int
    mlp_width: int
    vocabulary: int
    sequences: int = 8
    positions: int = 512

    @property
    def parameters(self) -> int:
        """Of an untied OLMo-2, its few norm gains left out."""
        block = 4 * self.width**2 + 3 * self.width * self.mlp_width
        return 2 * self.vocabulary * self.width + self.layers * block

    @property
    def disk(self) -> int:
        """Bytes: checkpoint, two weights files, factors, basis, the check's float32 factors."""
        squares = self.layers * 3 * (self.width**2 + self.mlp_width**2)
        return 3 * 4 * self.parameters + (8 + 8 + 4) * squares


FULL = Size(width=768, layers=12, heads=12, mlp_width=3072, vocabulary=32_000)
SMALL = Size(width=128, layers=2, heads=4, mlp_width=512, vocabulary=500)


@dataclass(frozen=True, slots=True)
class Candidate:
    """One way to collect. threads: None = every core; batch: sequences at a time (the peer's)."""

    name: str
    job: str
    threads: int | None
    batch: int | None = None


ALL = FULL.sequences
CANDIDATES = (
    Candidate("refcurv", "ours", None),
    Candidate("PyTorch", "theirs", None, ALL),
    Candidate("PyTorch, 4 sequences at a time", "theirs", None, 4),
    Candidate("refcurv, 1 core", "ours", 1),
    Candidate("PyTorch, 1 core", "theirs", 1, ALL),
)
"""In turn. refcurv's shard is 4 sequences of 512, so the peer gets to choose that size too."""


BUSY = 0.05
"""A larger share of the cores for others makes a time worthless."""
MEDIANS = ("seconds", "user", "system", "peak", "base")
HEAD = (
    "phase",
    "seconds",
    "PyTorch ÷ this",
    "system seconds",
    "peak MiB",
    "PyTorch ÷ this",
    "above base",
    "every round, seconds",
)

# ------------------------------------------------------------------ time and memory


def resident() -> float:
    """MiB that this process holds now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / MIB


def peak() -> float:
    """MiB that this process held at most since `forget_peak`."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def forget_peak() -> None:
    """Start the peak anew from what is resident now."""
    Path("/proc/self/clear_refs").write_text("5")


def busy_seconds() -> float:
    """Seconds that all processors of the machine have worked since it started."""
    ticks = [int(word) for word in Path("/proc/stat").read_text().split("\n")[0].split()[1:9]]
    user, nice, system, _idle, _iowait, irq, softirq, steal = ticks
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


@contextmanager
def measured(records: Record, name: str, base: float | None = None) -> Iterator[None]:
    """Seconds, peak and base [MiB] of the block, under `name`; base: resident before it.

    Also its processor time, with the kernel's share (`system`: mostly pages handed out) apart, and
    `others`: the processors' seconds that went elsewhere meanwhile, none on a quiet machine.
    """
    gc.collect()
    forget_peak()
    record: Record = {"base": resident() if base is None else base}
    used, busy = resource.getrusage(resource.RUSAGE_SELF), busy_seconds()
    begin = time.perf_counter()
    yield
    record["seconds"] = time.perf_counter() - begin
    now, busy = resource.getrusage(resource.RUSAGE_SELF), busy_seconds() - busy
    record |= {"user": now.ru_utime - used.ru_utime, "system": now.ru_stime - used.ru_stime}
    others = max(busy - record["user"] - record["system"], 0.0)
    records[name] = record | {"others": others, "peak": peak()}


# ------------------------------------------------------------------ jobs: the checkpoint, ours


def make_checkpoint(folder: Path, size: Size) -> Record:
    """A random untied OLMo-2 in float32 as transformers writes it, and random tokens."""
    import numpy as np
    import torch
    from transformers import Olmo2Config, Olmo2ForCausalLM

    torch.manual_seed(0)
    config = Olmo2Config(
        vocab_size=size.vocabulary,
        hidden_size=size.width,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.heads,
        intermediate_size=size.mlp_width,
        max_position_embeddings=size.positions,
        tie_word_embeddings=False,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = Olmo2ForCausalLM(config).float()
    model.save_pretrained(folder / "checkpoint")
    shape = (size.sequences, size.positions)
    token_BT = np.random.default_rng(0).integers(0, size.vocabulary, shape, dtype=np.int32)
    np.save(folder / "tokens.npy", token_BT)
    return {"parameters": sum(p.numel() for p in model.parameters())}


def load_ours(folder: Path) -> tuple[rc.Model, rc.Corpus]:
    """The model as `rc.load` gives it, which reads its parameters on use; the corpus."""
    import numpy as np

    import refcurv as rc

    return rc.load(folder / "w.h5", dtype="float32"), rc.Corpus(np.load(folder / "tokens.npy"))


def in_memory(model: rc.Model) -> rc.Model:
    """The model with every parameter read, as PyTorch holds its own."""
    import numpy as np

    import refcurv as rc

    parameters = {name: np.array(model.parameters[name]) for name in model.parameters}
    return rc.Model(model.config, parameters, model.dtype, model.stored)


def run_convert(folder: Path, _size: Size) -> Record:
    import refcurv as rc

    records: Record = {}
    with measured(records, "convert"):
        rc.convert(folder / "checkpoint", folder / "w.h5")
    return records


def run_load(folder: Path, _size: Size) -> Record:
    import refcurv as rc

    records: Record = {}
    with measured(records, "load, every parameter read"):
        in_memory(rc.load(folder / "w.h5", dtype="float32"))
    return records


def run_collect(folder: Path, _size: Size) -> Record:
    import refcurv as rc

    records: Record = {}
    model, corpus = load_ours(folder)
    with measured(records, "collect, from the weights file"):
        factors = rc.collect(model, corpus, LAYERS, "sampled")
    with measured(records, "save_factors"):
        rc.save_factors(factors, folder / "f.h5")
    return records


def run_decompose(folder: Path, _size: Size) -> Record:
    import refcurv as rc
    from refcurv.curvature.bases_file import decompose_to

    records: Record = {}
    with measured(records, "decompose"):
        decompose_to(rc.load_factors(folder / "f.h5"), folder / "b.h5")
    return records


def run_edit(folder: Path, size: Size) -> Record:
    import refcurv as rc

    records: Record = {}
    pattern = f"blocks.{{{max(size.layers - 3, 0)}-{size.layers - 1}}}.mlp.{{gate,up}}"
    model, basis = rc.load(folder / "w.h5", dtype="float32"), rc.load_bases(folder / "b.h5")
    with measured(records, "edit"):
        edited, _record = rc.edit(model, basis, {pattern: 0.6})
    with measured(records, "save"):
        rc.save(edited, folder / "w2.h5")
    return records


def time_ours(folder: Path, _size: Size, threads: int | None) -> Record:
    """One sampled collection, after one that warms up."""
    import refcurv as rc

    records: Record = {}
    model, corpus = load_ours(folder)
    model = in_memory(model)
    base = resident()
    rc.collect(model, corpus, LAYERS, "sampled", in_flight=threads)
    with measured(records, "collect", base):
        rc.collect(model, corpus, LAYERS, "sampled", in_flight=threads)
    return records["collect"]


# ------------------------------------------------------------------ jobs: the peer


class Moments:
    """A and G of one nn.Linear, summed in float32 while the backward pass goes by."""

    def __init__(self, linear: torch.nn.Linear) -> None:
        import torch

        self.A = torch.zeros(linear.in_features, linear.in_features)
        self.G = torch.zeros(linear.out_features, linear.out_features)
        self.rows = 0
        self._a_NI: torch.Tensor | None = None
        self._hooks = [
            linear.register_forward_pre_hook(self._keep_input),
            linear.register_full_backward_hook(self._add),
        ]

    def _keep_input(self, _linear: object, inputs: tuple[torch.Tensor, ...]) -> None:
        self._a_NI = _rows(inputs[0])

    def _add(self, _linear: object, _d_in: object, d_out: tuple[torch.Tensor, ...]) -> None:
        a_NI, g_NO = self._a_NI, _rows(d_out[0])
        self.A += a_NI.T @ a_NI
        self.G += g_NO.T @ g_NO
        self.rows += len(g_NO)
        self._a_NI = None

    def unhook(self) -> None:
        """Leave the layer as it was."""
        for hook in self._hooks:
            hook.remove()


def _rows(x_BTX: torch.Tensor) -> torch.Tensor:
    """Without the last position of each sequence, (N, X) in float32."""
    return x_BTX[:, :-1].detach().reshape(-1, x_BTX.shape[-1]).float()


def load_theirs(folder: Path) -> tuple[torch.nn.Module, torch.Tensor]:
    """The checkpoint in float32 with sdpa attention, every parameter touched; the tokens."""
    import numpy as np
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        folder / "checkpoint", dtype=torch.float32, attn_implementation="sdpa"
    )
    model.enable_input_require_grads()
    model.config.use_cache = False
    model.train()
    wanted = {id(linear.weight) for linear in wanted_linears(model).values()}
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in wanted)
        parameter.sum()
    return model, torch.from_numpy(np.load(folder / "tokens.npy").astype(np.int64))


def wanted_linears(model: torch.nn.Module) -> dict[str, torch.nn.Linear]:
    """Every MLP projection, under our name for it."""
    return {
        f"blocks.{i}.mlp.{part}": getattr(block.mlp, f"{part}_proj")
        for i, block in enumerate(model.model.layers)
        for part in PARTS
    }


def collect_theirs(
    model: torch.nn.Module, token_BT: torch.Tensor, batch: int, label_BT: torch.Tensor | None = None
) -> tuple[dict[str, Moments], torch.Tensor]:
    """One pass over the tokens; labels (B, T - 1) are drawn from the model unless given."""
    import torch

    moments = {name: Moments(linear) for name, linear in wanted_linears(model).items()}
    used = []
    for begin in range(0, len(token_BT), batch):
        part = slice(begin, begin + batch)
        model.zero_grad(set_to_none=True)
        logits = model(input_ids=token_BT[part]).logits[:, :-1].float()
        logit_NV = logits.reshape(-1, logits.shape[-1])
        if label_BT is None:
            with torch.no_grad():
                label_N = torch.multinomial(logit_NV.softmax(dim=-1), 1).squeeze(1)
        else:
            label_N = label_BT[part].reshape(-1)
        torch.nn.functional.cross_entropy(logit_NV, label_N).backward()
        used.append(label_N.reshape(-1, token_BT.shape[1] - 1))
    model.zero_grad(set_to_none=True)
    for one in moments.values():
        one.unhook()
    return moments, torch.cat(used)


def time_theirs(folder: Path, _size: Size, threads: int | None, batch: int) -> Record:
    """One sampled collection, after one that warms up."""
    import torch

    if threads is not None:
        torch.set_num_threads(threads)
    torch.manual_seed(0)
    records: Record = {}
    model, token_BT = load_theirs(folder)
    base = resident()
    collect_theirs(model, token_BT, batch)
    with measured(records, "collect", base):
        collect_theirs(model, token_BT, batch)
    return records["collect"] | {"torch_threads": torch.get_num_threads()}


# ------------------------------------------------------------------ jobs: do both agree?


def save_theirs(folder: Path, _size: Size, batch: int, draw: bool) -> Record:
    """The peer's sums into a folder; its labels are drawn and written, or read from the draw."""
    import numpy as np
    import torch

    torch.manual_seed(1)
    model, token_BT = load_theirs(folder)
    labels = folder / "labels.npy"
    given = None if draw else torch.from_numpy(np.load(labels))
    moments, used = collect_theirs(model, token_BT, batch, given)
    np.save(labels, used.numpy())
    target = folder / "theirs"
    target.mkdir(exist_ok=True)
    for name, one in moments.items():
        np.save(target / f"{name}.A.npy", one.A.numpy())
        np.save(target / f"{name}.G.npy", one.G.numpy())
    return {"rows": {name: one.rows for name, one in moments.items()}}


def compare(folder: Path, _size: Size, batch: int, rows: Record) -> Record:
    """Per layer |theirs - ours| / |ours| (Frobenius) of both sums, G after the scale m²."""
    import numpy as np

    import refcurv as rc

    model, corpus = load_ours(folder)
    label_BT = np.full(corpus.tokens.shape, -1)
    label_BT[:, :-1] = np.load(folder / "labels.npy")
    factors = rc.collect(model, rc.Corpus(corpus.tokens, label_BT), LAYERS, "empirical")
    scale = (batch * (corpus.tokens.shape[1] - 1)) ** 2
    distances: Record = {"A": {}, "G": {}}
    for name, factor in factors.items():
        theirs = {side: np.load(folder / "theirs" / f"{name}.{side}.npy") for side in "AG"}
        distances["A"][name] = _distance(theirs["A"], factor.sum_A)
        distances["G"][name] = _distance(theirs["G"] * float(scale), factor.sum_G)
    return verdict(distances, {n: (f.n_A, f.n_G) for n, f in factors.items()}, rows)


def _distance(one: np.ndarray, other: np.ndarray) -> float:
    import numpy as np

    return float(np.linalg.norm(one.astype(np.float64) - other) / np.linalg.norm(other))


def verdict(distances: Record, ours: dict[str, tuple[int, int]], theirs: Record) -> Record:
    """Agreement: the same layers and counts, and every distance within the limit.

    The limit is a tenth of the share that one row more or less would have: far above rounding
    (observed at the full size: 1.6e-6 for A, 5.1e-6 for G), far below any other convention (the
    last position kept: 1.6e-3; one label of 4,088 changed: 6e-2). NaN is no agreement.
    """
    limit = 0.1 / max(n for n, _ in ours.values())
    worst = {side: max(by.items(), key=lambda item: item[1]) for side, by in distances.items()}
    same = ours == {name: (n, n) for name, n in theirs.items()}
    near = all(d <= limit for by in distances.values() for d in by.values())
    rows = sorted({n for n, _ in ours.values()})
    return {"agree": same and near, "limit": limit, "worst": worst, "rows": rows}


# ------------------------------------------------------------------ jobs: the machine


def describe_machine(_folder: Path, _size: Size) -> Record:
    """What the numbers depend on."""
    import numpy  # noqa: F401
    import scipy.linalg  # noqa: F401  (loads its BLAS, so that threadpoolctl sees it)
    import threadpoolctl
    import torch

    blas = [
        f"{info['filepath'].split('/')[-2].removesuffix('.libs')}: {info['internal_api']} "
        f"{info['version']} {info.get('architecture', '')}".strip()
        for info in threadpoolctl.threadpool_info()
        if info["user_api"] == "blas"
    ]
    mkl = re.search(r"Math Kernel Library Version ([\w.]+)", torch.__config__.show())
    blas.append(f"torch: MKL {mkl[1]}" if mkl else "torch: no MKL")
    model = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    names = ("refcurv", "numpy", "scipy", "numba", "h5py", "torch", "transformers")
    return {
        "cpu": model[1] if model else platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "platform": platform.platform(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "blas": blas,
        "versions": {"python": platform.python_version()}
        | {name: importlib.metadata.version(name) for name in names},
    }


JOBS = {
    "checkpoint": make_checkpoint,
    "convert": run_convert,
    "load": run_load,
    "collect": run_collect,
    "decompose": run_decompose,
    "edit": run_edit,
    "ours": time_ours,
    "theirs": time_theirs,
    "save_theirs": save_theirs,
    "compare": compare,
    "machine": describe_machine,
}


# ------------------------------------------------------------------ the parent


def spawn(job: str, folder: Path, size: Size, **options: Any) -> Record:
    """One job in a fresh process, with every core and the libraries' own defaults."""
    spec = {"job": job, "folder": str(folder), "size": asdict(size), "options": options}
    env = {key: value for key, value in os.environ.items() if key not in THREAD_VARIABLES}
    env |= {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    env |= {"TRANSFORMERS_VERBOSITY": "error", "TQDM_DISABLE": "1"}
    env["PYTHONPATH"] = os.pathsep.join([str(HERE.parents[1]), env.get("PYTHONPATH", "")])
    command = [sys.executable, str(Path(__file__).resolve()), "--job", json.dumps(spec)]
    done = subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def work(text: str) -> None:
    """The other side of `spawn`: do the job, print its record as one line of JSON."""
    spec = json.loads(text)
    result = JOBS[spec["job"]](Path(spec["folder"]), Size(**spec["size"]), **spec["options"])
    print(json.dumps(result))


def tell(text: str) -> None:
    """One line of progress on stderr."""
    print(f"{datetime.now():%H:%M:%S} {text}", file=sys.stderr, flush=True)


def pipeline(folder: Path, size: Size) -> Record:
    """Checkpoint file to edited weights file, each phase once."""
    phases: Record = {}
    for job in ("convert", "load", "collect", "decompose", "edit"):
        tell(f"pipeline: {job}")
        phases |= spawn(job, folder, size)
    for name in ("f.h5", "b.h5", "w2.h5"):
        (folder / name).unlink()
    return phases


def check(folder: Path, size: Size) -> Record:
    """Both sides on the same labels, for every batch size that the peer is timed with."""
    checks: Record = {}
    for batch in dict.fromkeys(c.batch for c in CANDIDATES if c.batch is not None):
        tell(f"check: do both compute the same, the peer {batch} sequences at a time?")
        saved = spawn("save_theirs", folder, size, batch=batch, draw=not checks)
        checks[str(batch)] = spawn("compare", folder, size, batch=batch, rows=saved["rows"])
    shutil.rmtree(folder / "theirs")
    return checks


def take_turns(folder: Path, size: Size, rounds: int) -> Record:
    """{candidate: its measurements}, every candidate once a round."""
    values: Record = {c.name: [] for c in CANDIDATES}
    for turn in range(1, rounds + 1):
        for c in CANDIDATES:
            options: Record = {"threads": c.threads} | ({"batch": c.batch} if c.batch else {})
            values[c.name].append(one := spawn(c.job, folder, size, **options))
            tell(f"round {turn}/{rounds}: {c.name}: {one['seconds']:.2f} s")
    return values


# ------------------------------------------------------------------ what is printed


def summary(phases: Record, values: Record, cores: int) -> list[Record]:
    """The table's rows: medians, and what the peer takes on as many cores over what this one does.

    The peer is PyTorch as the official program runs it: every sequence in one batch. `others` is
    here a share of all cores, the largest of any round.
    """
    rows = [
        {"phase": name, "cores": None, **one, "others": one["others"] / one["seconds"] / cores}
        for name, one in phases.items()
    ]
    for c in CANDIDATES:
        row = {key: statistics.median(one[key] for one in values[c.name]) for key in MEDIANS}
        each = [one["seconds"] for one in values[c.name]]
        others = max(one["others"] / one["seconds"] / cores for one in values[c.name])
        row |= {"phase": f"collect: {c.name}", "cores": c.threads, "all": each, "others": others}
        rows.append(row)
    peers = {c.threads: f"collect: {c.name}" for c in CANDIDATES if c.batch == ALL}
    medians = {row["phase"]: row for row in rows}
    for row in rows:
        if row["phase"].startswith("collect"):
            peer = medians[peers[row["cores"]]]
            row["ratio"] = {key: peer[key] / row[key] for key in ("seconds", "peak")}
    return rows


def table(rows: list[Record]) -> str:
    """The rows in Markdown, aligned for the eye."""
    cells = [HEAD]
    for row in rows:
        ratio = {key: f"{value:.2f}" for key, value in row.get("ratio", {}).items()}
        each = " ".join(f"{seconds:.2f}" for seconds in row.get("all", []))
        line = (f"{row['seconds']:.2f}", ratio.get("seconds", ""), f"{row['system']:.2f}")
        line += (f"{row['peak']:.0f}", ratio.get("peak", ""), f"{row['peak'] - row['base']:.0f}")
        cells.append((row["phase"], *line, each))
    wide = [max(len(line[i]) for line in cells) for i in range(len(HEAD))]
    lines = [_line(line, wide) for line in cells]
    rule = "|".join("-" * (w + 2 - (i > 0)) + ":" * (i > 0) for i, w in enumerate(wide))
    return "\n".join([lines[0], f"|{rule}|", *lines[1:]])


def _line(cells: tuple[str, ...], wide: list[int]) -> str:
    body = " | ".join(
        cell.rjust(w) if i else cell.ljust(w)
        for i, (cell, w) in enumerate(zip(cells, wide, strict=True))
    )
    return f"| {body} |"


def agreement(checks: Record) -> str:
    """What the check found, one sentence for each batch size."""
    return "\n".join(
        f"Same labels, peer {batch} at a time, {one['rows']} rows: "
        + ", ".join(f"{side} differs by at most {d:.1e} ({n})"
                    for side, (n, d) in one["worst"].items())
        + f"; limit {one['limit']:.1e}: {'agree' if one['agree'] else 'DISAGREE'}."
        for batch, one in checks.items()
    )  # fmt: skip


def quiet(rows: list[Record], cores: int) -> str:
    """How much of the machine others used while the candidates were timed."""
    worst = max(row["others"] for row in rows if "all" in row)
    share = f"other processes used at most {worst:.1%} of the {cores} cores during a timed pass"
    return share if worst < BUSY else f"NOT QUIET: {share}; do not quote these numbers"


def facts(result: Record) -> str:
    """Machine, libraries, date and load in a few lines."""
    machine = result["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    return (
        f"{result['date']}, {machine['cpu']}, {machine['cores']} cores, "
        f"{machine['memory_gib']} GiB; {quiet(result['rows'], machine['cores'])}.  \n"
        f"{versions}.  \nBLAS: {'; '.join(machine['blas'])}; "
        f"torch's kernels: {machine['cpu_capability']}."
    )


def block(result: Record) -> str:
    """The generated part of the README."""
    s = result["size"]
    return "\n\n".join(
        [
            f"Made by `{result['command']}`: {result['parameters']:,} parameters, "
            f"{s['sequences']} x {s['positions']} tokens, {result['rounds']} rounds.",
            facts(result),
            table(result["rows"]),
            agreement(result["checks"]).replace("\n", "  \n"),
        ]
    )


def rewrite(text: str, new: str) -> str:
    """The README with its generated block replaced."""
    before, found, rest = text.partition(BEGIN)
    _old, closed, after = rest.partition(END)
    if not (found and closed):
        raise SystemExit(f"{README}: the markers {BEGIN} and {END} are missing.")
    return f"{before}{BEGIN}\n\n{new}\n\n{END}{after}"


def measure(folder: Path, size: Size, rounds: int) -> Record:
    """Everything, in order; the agreement before any time that could become a ratio."""
    result: Record = {
        "command": shlex.join(["python", "validation/bench/collect_100m.py", *sys.argv[1:]]),
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "rounds": rounds,
        "size": asdict(size),
        "machine": spawn("machine", folder, size),
    }
    tell("write the checkpoint")
    result |= spawn("checkpoint", folder, size)
    result["phases"] = pipeline(folder, size)
    result["checks"] = check(folder, size)
    if all(one["agree"] for one in result["checks"].values()):
        result["candidates"] = take_turns(folder, size, rounds)
        result["rows"] = summary(result["phases"], result["candidates"], result["machine"]["cores"])
    return result


def require_disk(size: Size) -> None:
    """Stop before the work if the temporary folder's disk cannot hold its files."""
    place = tempfile.gettempdir()
    free = shutil.disk_usage(place).free
    if free < 1.2 * size.disk:
        raise SystemExit(
            f"{place} has {free / 2**30:.1f} GiB free; {1.2 * size.disk / 2**30:.1f} are needed. "
            "Set TMPDIR."
        )


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3, help="after one warm-up (default 3)")
    parser.add_argument("--small", action="store_true", help="a tiny model: does it run?")
    parser.add_argument("--out", type=Path, help="JSON; default: beside this script, not if small")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.rounds < 1:
        parser.error("--rounds must be at least 1")
    return given


def main() -> int:
    given = arguments()
    if given.job:
        work(given.job)
        return 0
    size = SMALL if given.small else FULL
    require_disk(size)
    if os.getloadavg()[0] > 0.5:
        tell(f"warning: the load average is {os.getloadavg()[0]:.2f}; wait for a quiet machine")
    with tempfile.TemporaryDirectory(prefix="collect_100m-") as folder:
        result = measure(Path(folder), size, given.rounds)
    out = given.out or (None if given.small else HERE / "collect_100m.json")
    if out is not None:
        out.write_text(json.dumps(result, indent=1) + "\n")
    print(agreement(result["checks"]))
    if "rows" not in result:
        print("The two do not compute the same thing: no times, no ratio.")
        return 1
    print(f"{facts(result)}\n\n{table(result['rows'])}")
    if not given.small:
        README.write_text(rewrite(README.read_text(), block(result)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
