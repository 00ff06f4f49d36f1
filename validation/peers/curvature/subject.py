"""What every program is given: one small checkpoint, its tokens, and what they should find.

A Llama of two blocks: grouped heads, rotary positions, a gated MLP, no biases, an untied head. It
is written by transformers with every parameter drawn, converted by refcurv, and written back by
`refcurv export`; that last folder is what the programs load. The labels are the next tokens, so
that the last position of a sequence has none.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from peers_compare import InFloat64, checkpoint_names
from peers_zoo import made

import refcurv as rc

SEQUENCES, LENGTH, VOCABULARY = 6, 10, 19
BATCH = 3
"""Sequences at a time. Two batches, so that sums over batches are seen."""
Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class Subject:
    """The checkpoint, in both programs' forms.

    Fields: folder, for transformers; model and corpus, refcurv's; names, our layer → their module.
    """

    folder: Path
    model: rc.Model
    corpus: rc.Corpus
    names: dict[str, str]

    @property
    def tokens(self) -> torch.Tensor:
        """(N, T)."""
        return torch.tensor(np.asarray(self.corpus.tokens), dtype=torch.int64)

    def repeated(self, times: int) -> Subject:
        """The same with every sequence so many times."""
        tokens = np.tile(np.asarray(self.corpus.tokens), (times, 1))
        return replace(self, corpus=rc.Corpus(tokens))

    @property
    def labels(self) -> torch.Tensor:
        """(N, T − 1), the label of each position but the last."""
        return self.tokens[:, 1:]


def made_in(folder: Path) -> Subject:
    """Written by transformers, through convert and export."""
    transformers.utils.logging.set_verbosity_error()
    model = made(
        "LlamaForCausalLM",
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=LENGTH,
        tie_word_embeddings=False,
        rms_norm_eps=3e-3,
        rope_parameters={"rope_type": "default", "rope_theta": 75.0},
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
    )
    model.save_pretrained(folder / "written")
    rc.convert(folder / "written", folder / "w.h5")
    rc.export(folder / "w.h5", folder / "hf")
    ours = rc.load(folder / "w.h5", dtype="float64")
    tokens = np.random.default_rng(3).integers(0, VOCABULARY, (SEQUENCES, LENGTH))
    theirs = checkpoint_names(ours)
    layers = ours.config.linear_layers()
    names = {name: theirs[f"{name}.weight"].removesuffix(".weight") for name in layers}
    corpus = rc.Corpus(tokens)
    rc.save_corpus(corpus, folder / "c.h5")
    return Subject(folder / "hf", ours, corpus, names)


def in_dtype(dtype: str) -> AbstractContextManager[Any]:
    """Within it, transformers computes in float64 throughout where that is asked for."""
    return InFloat64() if dtype == "float64" else nullcontext()


def loaded(subject: Subject, dtype: str) -> Any:
    """The checkpoint as transformers loads it; build it and run it within `in_dtype`."""
    return transformers.AutoModelForCausalLM.from_pretrained(
        subject.folder, dtype=getattr(torch, dtype), attn_implementation="eager"
    ).eval()


def nats(logits: torch.Tensor, labels: torch.Tensor, reduction: str = "sum") -> torch.Tensor:
    """Cross-entropy of (N, T, V) logits, the last position left out."""
    return torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), labels.flatten(), reduction=reduction
    )


@dataclass(frozen=True)
class Found:
    """What one program found, in the house's units.

    Fields:
        layers: their module → (A, G, n).
        rows: ROWS, which positions it takes. recipe: how its numbers became these.
        Lambda: their module → (U_A, U_G, Λ), Λ a mean over rows; empty where it has none.
        per: whose gradient is squared in Λ, "segment" or "row".
        files: where it wrote its own files, or None. declared: what `validate` must be told of
            these, beside labels and rows.
    """

    layers: dict[str, tuple[np.ndarray, np.ndarray, int]]
    rows: str
    recipe: str
    Lambda: dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]]
    per: str = ""
    files: Path | None = None
    declared: Mapping[str, str] = field(default_factory=dict)


def array(tensor: Any) -> np.ndarray:
    """A tensor, in its own dtype."""
    return tensor.detach().numpy() if isinstance(tensor, torch.Tensor) else np.asarray(tensor)
