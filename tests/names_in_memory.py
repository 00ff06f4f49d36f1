"""What transformers 5 calls the hub's names once a model is loaded, written down by hand."""

from __future__ import annotations

RENAMED = (
    ("embed_out", "lm_head"),
    ("encoder.layer.", "layers."),
    ("attention.attention.query", "attention.q_proj"),
    ("attention.attention.key", "attention.k_proj"),
    ("attention.attention.value", "attention.v_proj"),
    ("attention.output.dense", "attention.o_proj"),
    ("intermediate.dense", "mlp.fc1"),
    ("output.dense", "mlp.fc2"),
)


def in_memory(name: str) -> str:
    """A name of a checkpoint on disk → the one in memory."""
    for old, new in RENAMED:
        name = name.replace(old, new)
    return name
