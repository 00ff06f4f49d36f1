"""Three parts by themselves: drawing labels, choosing pairs, eigenbases."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from validation.bench.measuring import Record, measured, tell
from validation.bench.proxies import Size, layers_of, load_ours, tokens_of
from validation.peers.curvature.official_edit import cut as by_heap

if TYPE_CHECKING:
    import torch

    import refcurv as rc

# ------------------------------------------------------------------ labels and their gradient


def drawing(folder: Path, size: Size, rounds: int) -> Record:
    """From logits to the gradient of the loss against drawn labels, one thread.

    Ours by the chunks of a collection. The peer slices off the last position, draws by softmax and
    multinomial, and differentiates the mean cross-entropy.
    """
    import torch

    torch.set_num_threads(1)
    model, tokens = load_ours(folder), tokens_of(folder, size)[: size.batch]
    shape = (*tokens.shape, size.vocabulary)
    logits = 2 * np.random.default_rng(0).standard_normal(shape, np.float32)
    label_BT = np.random.default_rng(1).integers(0, size.vocabulary, tokens.shape)
    label_BT[:, -1] = -1
    ours = _our_slope(model, tokens, label_BT, "empirical", logits)
    theirs = _their_slope(torch.from_numpy(logits), torch.from_numpy(label_BT))
    theirs = theirs[:, :-1].reshape(ours.shape) * len(ours)
    distance = float(np.linalg.norm(ours - theirs) / np.linalg.norm(ours))
    times: Record = {"refcurv": [], "PyTorch": []}
    for turn in range(rounds + 1):  # the first warms up
        for name in times:
            own, one = logits.copy(), {}
            with measured(one, "pass"):
                if name == "refcurv":
                    _our_slope(model, tokens, None, "sampled", own)
                else:
                    _their_slope(torch.from_numpy(own), None)
            if turn:
                times[name].append(one["pass"])
    return {"times": times, "distance": distance, "agree": distance <= 1e-5}


def _our_slope(
    model: rc.Model, tokens: np.ndarray, labels: np.ndarray | None, fisher: str, logits: np.ndarray
) -> np.ndarray:
    """What `collect` sends back at the logits of every labelled position, (N, V)."""
    import refcurv as rc
    from refcurv.law.conventions import HEAD_ROWS
    from refcurv.passes.shards import shards
    from refcurv.passes.sweep import sweep_of

    job, logit_NV = sweep_of("bench", (), fisher, 0, 1), logits.reshape(-1, logits.shape[-1])
    at = np.flatnonzero(np.arange(len(logit_NV)) % tokens.shape[1] < tokens.shape[1] - 1)
    known = (tokens[:, 1:] if labels is None else labels[:, :-1]).reshape(-1)
    found, done = [], 0
    for unit in shards(rc.Corpus(tokens, labels), model.config):
        slope = next(job.cotangents(unit, model.config.vocabulary))
        row_N = np.flatnonzero(unit.head_BT)
        for begin in range(0, len(row_N), HEAD_ROWS):
            chunk = row_N[begin : begin + HEAD_ROWS]
            found.append(slope(chunk, logit_NV[at[done : done + len(chunk)]]))
            done += len(chunk)
    assert done == len(known)
    return np.concatenate(found) if labels is not None else found[0]


def _their_slope(logits: torch.Tensor, labels: torch.Tensor | None) -> np.ndarray:
    """The gradient of the mean loss by all logits, (B, T, V)."""
    import torch

    logits.requires_grad_()
    logit_NV = logits[:, :-1].float().reshape(-1, logits.shape[-1])
    if labels is None:
        with torch.no_grad():
            label_N = torch.multinomial(logit_NV.softmax(dim=-1), 1).squeeze(1)
    else:
        label_N = labels[:, :-1].reshape(-1)
    torch.nn.functional.cross_entropy(logit_NV, label_N).backward()
    assert logits.grad is not None
    return logits.grad.numpy()


# ------------------------------------------------------------------ the cut

RHO = 0.9
WIDE, TINY = (4096, 11_008), (64, 172)


def selection(_folder: Path, size: Size, rounds: int, small: bool) -> Record:
    """The staircase, and the official heap once: spectra i⁻¹ times lognormal(0.1), sorted."""
    from refcurv.algebra.staircase import cut

    rng = np.random.default_rng(0)
    lam, mu = (
        np.sort(np.arange(1.0, n + 1) ** -1 * rng.lognormal(0, 0.1, n))[::-1]
        for n in (TINY if small else WIDE)
    )
    times: Record = {"refcurv": [], "heap": []}
    found = cut(lam, mu, RHO)
    for _ in range(rounds):
        one: Record = {}
        with measured(one, "pass"):
            found = cut(lam, mu, RHO)
        times["refcurv"].append(one["pass"])
    tell("the official heap")
    with measured(one, "pass"):
        kept, _mass = by_heap(lam, mu, RHO)
    times["heap"].append(one["pass"])
    # the heap's running sum is rounded at each of its additions
    return {"times": times, "kept": [found.kept, kept], "agree": abs(found.kept - kept) <= 2}


# ------------------------------------------------------------------ eigenbases


def decomposing(folder: Path, size: Size, threads: int, rounds: int) -> Record:
    """`decompose` of all MLP factors, beside torch.linalg.eigh of each distinct matrix, float64."""
    import torch

    import refcurv as rc

    torch.set_num_threads(threads)
    layers = layers_of(range(size.layers))
    factors = rc.collect(load_ours(folder), rc.Corpus(tokens_of(folder, size)), layers)
    rc.decompose(_first(factors))
    torch.linalg.eigh(torch.eye(64, dtype=torch.float64))
    times: Record = {"refcurv": [], "torch.linalg.eigh": []}
    worst = 0.0
    for turn in range(rounds):
        one: Record = {}
        tell(f"round {turn + 1}/{rounds}: decompose, refcurv")
        with measured(one, "ours"):
            bases = rc.decompose(factors)
        tell(f"round {turn + 1}/{rounds}: decompose, torch")
        largest: dict[str, float] = {}
        with measured(one, "theirs"):
            for name, M in _distinct(factors):
                largest[name] = float(torch.linalg.eigh(torch.from_numpy(M))[0][-1])
        for name, value in largest.items():
            layer, _, side = name.rpartition(" ")
            own = bases[layer].mu if side == "A" else bases[layer].lam
            worst = max(worst, abs(float(value / own[0] - 1)))
        times["refcurv"].append(one["ours"])
        times["torch.linalg.eigh"].append(one["theirs"])
        del bases
    return {"times": times, "distance": worst, "agree": worst <= 1e-10}


def _first(factors: rc.Factors) -> rc.Factors:
    """One layer, to load what is needed."""
    from dataclasses import replace

    name = next(iter(factors))
    return replace(factors, layers={name: factors[name]})


def _distinct(factors: rc.Factors) -> Any:
    """("layer side", matrix), an A that several layers share once."""
    seen: set[int] = set()
    for name, one in factors.items():
        if id(one.sum_A) not in seen:
            seen.add(id(one.sum_A))
            yield f"{name} A", one.A
        yield f"{name} G", one.G
