"""Peers on trial: whose digits are off? transformers and torch beside the certified numbers.

    python -m validation.certified.peers        three tiny models (extras `certified`, `peers`)

transformers computes norms, softmax and rotary tables in float32 in a float64 model;
"casts undone" gives it float64 there, as validation/peers does.
"""

from __future__ import annotations

import argparse
import tempfile
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np

import refcurv as rc
from validation.certified import page
from validation.certified.errors import Arrays, ulps
from validation.certified.routes import fast

MODELS = ("olmo2", "gpt2", "llama")
OF = ("logits", "nats", "gradient", "A", "G")
THEIRS = {
    "transformers, float64, casts undone": ("float64", True),
    "transformers, float64 as it is": ("float64", False),
    "transformers, float32": ("float32", False),
}
"""Row → the dtype of the model, and whether its casts to float32 are undone."""


def run(folder: Path, model: rc.Model, corpus: rc.Corpus, dtype: str, undone: bool) -> Arrays:
    """What transformers and torch make of one sequence, by the certificate's names."""
    import peers_compare as peers
    import torch
    import transformers

    config, label = model.config, corpus.label
    with peers.InFloat64() if undone else nullcontext():
        kind = transformers.AutoModelForCausalLM
        made: Any = kind.from_pretrained(
            folder, dtype=getattr(torch, dtype), attn_implementation="eager"
        ).eval()
        with peers.tapped(made) as (a, g):
            logits = made(input_ids=torch.tensor(corpus.tokens).long()).logits
            nats = torch.nn.functional.cross_entropy(
                logits[0], torch.tensor(label[0].astype(np.int64)), ignore_index=-1,
                reduction="none",
            )  # fmt: skip
            nats.sum().backward()
    family = peers.family_of(model)
    gradient, a_ours, g_ours = peers.in_our_names(family, config, made, a, g)
    keep = label >= 0
    out = {"logits.0": logits[0].detach().numpy(), "nats.0": nats.detach().numpy()}
    out |= {f"gradient.0.{name}": x for name, x in gradient.items()}
    for name in g_ours:
        out[f"A.{name}"] = peers.second_moment(a_ours[name], keep) / keep.sum()
        out[f"G.{name}"] = peers.second_moment(g_ours[name], keep) / keep.sum()
    return out


def measured(name: str) -> dict[str, dict[str, float]]:
    """route → quantity → ulps, theirs and ours, on one model of the zoo and one sequence."""
    import peers_compare as peers

    with tempfile.TemporaryDirectory() as folder:
        hf = peers.saved(name, Path(folder) / "hf")
        model = peers.converted(hf)
        tokens = peers.batch(model.config).inputs[:1]
        corpus = rc.Corpus(tokens)
        truth = rc.certify(model, corpus, OF)
        out = {
            row: ulps(truth, run(hf, model, corpus, *how), how[0]) for row, how in THEIRS.items()
        }
    for dtype in ("float64", "float32"):
        out[f"refcurv, {dtype}"] = ulps(truth, fast(dtype)((model, corpus)), dtype)
    for route in truth.routes:
        row = out.setdefault(f"refcurv's definitions, {route.dtype}", {})
        quantity = route.name.partition(".")[0]
        row[quantity] = max(row.get(quantity, 0.0), route.ulps)
    return out


def table(found: dict[str, dict[str, dict[str, float]]]) -> str:
    """One row for each model and program."""
    lines = [f"| model | program | {' | '.join(OF)} |", f"| --- | --- |{' --- |' * len(OF)}"]
    for name, rows in found.items():
        for row, one in rows.items():
            lines.append(f"| {name} | {row} | {' | '.join(f'{one[q]:.2g}' for q in OF)} |")
    return "\n".join(lines)


def main() -> int:
    """Measure, then write the table."""
    argparse.ArgumentParser(prog="python -m validation.certified.peers").parse_args()
    with page.from_tests():
        found = {name: measured(name) for name in MODELS}
    stamp = page.stamp("validation.certified.peers", page.of("peers"), "torch", "transformers")
    page.write("peers", f"{stamp}\n\n{table(found)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
