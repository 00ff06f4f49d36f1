"""The official collector's hooks, written from what goodfire-ai/memorization_kfac documents.

A pre-hook keeps the input of each wanted nn.Linear, a backward hook takes its output gradient. Both
lose the last position of each sequence and become rows in float32. The loss is the *mean* over the
labelled positions of a batch. `torch.save` writes {"blk0.gate": {"A", "G", "n_tokens"}}, means.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from ..subject import BATCH, Found, Subject, array, in_dtype, loaded, nats

PARTS = ("gate", "up", "down")


def collected(
    subject: Subject, dtype: str, batches: Sequence[int] = (BATCH, BATCH), patched: bool = True
) -> dict[str, dict[str, Any]]:
    """Their file's contents; `batches` are the sequences of each.

    A run in float64 keeps float64 rows. `patched` undoes what transformers computes in float32.
    """
    sums: dict[str, dict[str, Any]] = {}
    with in_dtype(dtype) if patched else nullcontext():
        model = loaded(subject, dtype)
        for block, layer in enumerate(model.model.layers):
            for part in PARTS:
                sums[f"blk{block}.{part}"] = _hooked(getattr(layer.mlp, f"{part}_proj"), dtype)
        at = 0
        for size in batches:
            part = slice(at, at + size)
            logits = model(input_ids=subject.tokens[part]).logits
            nats(logits, subject.labels[part], "mean").backward()
            at += size
    return {
        name: {"A": s["A"] / s["n"], "G": s["G"] / s["n"], "n_tokens": s["n"]}
        for name, s in sums.items()
    }


def _hooked(linear: torch.nn.Linear, dtype: str) -> dict[str, Any]:
    kind = getattr(torch, dtype)
    sums: dict[str, Any] = {
        "A": torch.zeros((linear.in_features,) * 2, dtype=kind),
        "G": torch.zeros((linear.out_features,) * 2, dtype=kind),
        "n": 0,
    }
    kept: list[torch.Tensor] = []

    def rows(x: torch.Tensor) -> torch.Tensor:
        return x[:, :-1].detach().flatten(0, 1).to(kind)

    def before(_module: Any, inputs: Any) -> None:
        kept.append(rows(inputs[0]))

    def after(_module: Any, _inputs: Any, outputs: Any) -> None:
        a, g = kept.pop(), rows(outputs[0])
        sums["A"] += a.T @ a
        sums["G"] += g.T @ g
        sums["n"] += len(g)

    linear.register_forward_pre_hook(before)
    linear.register_full_backward_hook(after)
    return sums


def found(subject: Subject, dtype: str, folder: Path, patched: bool = True) -> Found:
    """S_A = n A, S_G = n m² G, m = the labelled positions of a batch."""
    theirs = collected(subject, dtype, patched=patched)
    file = folder / "kfac_factors_blk_0_1.pt"
    torch.save(theirs, file)
    m = BATCH * subject.labels.shape[1]
    layers = {}
    for name, one in theirs.items():
        block, part = name.removeprefix("blk").split(".")
        module = f"model.layers.{block}.mlp.{part}_proj"
        layers[module] = (array(one["A"]), m**2 * array(one["G"]), one["n_tokens"])
    recipe = f"S_A = n A; S_G = n m² G, m = {m} labelled positions of a batch (mean loss)"
    return Found(layers, "reached", recipe, {}, files=file, declared={"loss_terms": str(m)})
