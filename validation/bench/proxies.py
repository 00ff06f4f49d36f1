"""The models that are measured: random OLMo-2s of stated sizes, written by the package itself."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from validation.bench.measuring import Record

if TYPE_CHECKING:
    import numpy as np

    import refcurv as rc
    from refcurv.model.config import ModelConfig

PARTS = ("gate", "up", "down")
MOST_LOGITS = 2**25
"""Chosen: so many logits at a time, when labels are drawn."""


@dataclass(frozen=True, slots=True)
class Size:
    """Sizes of a model and of a corpus; batch: sequences that a peer takes at a time."""

    width: int
    layers: int
    heads: int
    mlp_width: int
    vocabulary: int
    sequences: int
    positions: int = 512
    batch: int = 4

    @property
    def parameters(self) -> int:
        """Of an untied OLMo-2, its few norm gains left out."""
        block = 4 * self.width**2 + 3 * self.width * self.mlp_width
        return 2 * self.vocabulary * self.width + self.layers * block

    @property
    def rows(self) -> int:
        """Positions that have a label: all but the last of each sequence."""
        return self.sequences * (self.positions - 1)

    def times(self, cores: int) -> Size:
        """The same model, and so many times the corpus."""
        return replace(self, sequences=cores * self.sequences)


@dataclass(frozen=True, slots=True)
class Proxy:
    """A model, a corpus, and the blocks whose MLP projections are wanted."""

    what: str
    size: Size
    blocks: tuple[int, ...]

    @property
    def layers(self) -> str:
        """The wanted layers as a pattern."""
        return layers_of(self.blocks)


_PROXY = Size(width=512, layers=8, heads=8, mlp_width=2048, vocabulary=8192, sequences=4)
_MID = Size(width=1024, layers=4, heads=16, mlp_width=4096, vocabulary=32_768, sequences=2, batch=2)
LARGE = Size(width=768, layers=12, heads=12, mlp_width=3072, vocabulary=32_000, sequences=8)
TINY = Size(width=64, layers=3, heads=4, mlp_width=160, vocabulary=300, sequences=4, positions=32)

PROXIES = {
    "all": Proxy("all layers of the proxy", _PROXY, tuple(range(8))),
    "upper": Proxy("two upper layers of the proxy", _PROXY, (6, 7)),
    "mid": Proxy("two upper layers of the mid model", _MID, (2, 3)),
    "100m": Proxy("all layers of the 100 M model", LARGE, tuple(range(12))),
}


def small(name: str) -> Proxy:
    """A tiny model in the place of a proxy: does it run?"""
    one = PROXIES[name]
    size = replace(TINY, batch=min(TINY.batch, one.size.batch))
    whole = len(one.blocks) == one.size.layers
    return Proxy(f"{one.what}, TINY", size, (0, 1, 2) if whole else (1, 2))


def layers_of(blocks: Sequence[int]) -> str:
    """The MLP projections of some blocks, as a pattern."""
    return f"blocks.{{{','.join(map(str, blocks))}}}.mlp.*"


# ------------------------------------------------------------------ files


def make(folder: Path, size: Size) -> Record:
    """`w.h5`, the checkpoint that it exports for transformers, tokens, and labels drawn from it."""
    import numpy as np

    import refcurv as rc
    from refcurv.model.sampling import draw_labels, uniforms

    config = olmo2(size)
    rng = np.random.default_rng(0)
    parameters = {
        name: np.float32(0.02) * rng.standard_normal(shape, np.float32)
        if len(shape) == 2
        else np.ones(shape, np.float32)
        for name, shape in config.parameter_shapes().items()
    }
    model = rc.Model(config, parameters, "float32")
    rc.save(model, folder / "w.h5")
    rc.export(folder / "w.h5", folder / "checkpoint")
    shape = (size.sequences, size.positions)
    token_BT = rng.integers(0, size.vocabulary, shape, dtype=np.int32)
    label_BT = np.empty((size.sequences, size.positions - 1), np.int64)
    step = max(1, MOST_LOGITS // (size.positions * size.vocabulary))
    for begin in range(0, size.sequences, step):
        for b, z_TV in enumerate(rc.logits(model, token_BT[begin : begin + step]), start=begin):
            label_BT[b] = draw_labels(z_TV[:-1], uniforms(0, 0, b, size.positions - 1))
    np.save(folder / "tokens.npy", token_BT)
    np.save(folder / "labels.npy", label_BT)
    return {"parameters": sum(W.size for W in parameters.values())}


def olmo2(size: Size) -> ModelConfig:
    """Its configuration, as it is read from a config.json."""
    from refcurv.files.huggingface import read_config

    values = {
        "model_type": "olmo2", "architectures": ["Olmo2ForCausalLM"], "hidden_act": "silu",
        "vocab_size": size.vocabulary, "hidden_size": size.width,
        "num_hidden_layers": size.layers, "num_attention_heads": size.heads,
        "num_key_value_heads": size.heads, "intermediate_size": size.mlp_width,
        "max_position_embeddings": size.positions, "tie_word_embeddings": False,
        "rms_norm_eps": 1e-6, "rope_theta": 10_000.0, "attention_bias": False,
    }  # fmt: skip
    return read_config("the benchmark", json.dumps(values))[1]


def tokens_of(folder: Path, size: Size) -> np.ndarray:
    """(B, T), the first sequences that `make` wrote."""
    import numpy as np

    return np.asarray(np.load(folder / "tokens.npy")[: size.sequences])


def labels_of(folder: Path, size: Size) -> np.ndarray:
    """(B, T − 1), drawn from the model by SAMPLING with seed 0."""
    import numpy as np

    return np.asarray(np.load(folder / "labels.npy")[: size.sequences])


def load_ours(folder: Path) -> rc.Model:
    """The model in float32 with every parameter read, as PyTorch holds its own."""
    import numpy as np

    import refcurv as rc

    model = rc.load(folder / "w.h5", dtype="float32")
    parameters = {name: np.array(model.parameters[name]) for name in model.parameters}
    return rc.Model(model.config, parameters, model.dtype, model.stored)
