"""bergson: its collectors, eigendecomposition and eigenvalue corrections, with its own files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from bergson.config.config import HessianConfig, IndexConfig
from bergson.hessians.hessian_approximations import fit_factored_hessians
from datasets import Dataset
from safetensors.torch import load_file

from ..subject import BATCH, Found, Subject, array, in_dtype, loaded


def fitted(subject: Subject, dtype: str, folder: Path, own_labels: bool = True) -> Path:
    """Its folder of factors: EK-FAC, sum loss, the dataset's labels or drawn ones."""
    index = IndexConfig(run_path=str(folder / "run"), loss_reduction="sum")
    index.partial_run_path.mkdir(parents=True)
    tokens = subject.tokens.tolist()
    data = Dataset.from_dict({"input_ids": tokens, "length": [len(row) for row in tokens]})
    n = len(tokens)
    hessian = HessianConfig(
        method="kfac",
        ev_correction=True,
        hessian_dtype={"float32": "fp32", "float64": "fp64"}[dtype],
        use_dataset_labels=own_labels,
    )
    with in_dtype(dtype):
        fit_factored_hessians(
            loaded(subject, dtype),
            data,
            index,
            hessian,
            target_modules=None,
            attention_cfgs={},
            batches=[list(range(i, min(i + BATCH, n))) for i in range(0, n, BATCH)],
            path=str(index.partial_run_path),
            do_eigendecomposition=True,
        )
    return Path(index.partial_run_path)


def found(subject: Subject, dtype: str, folder: Path) -> Found:
    """Sums over total_processed; names lack the model's prefix, and the head is not covered."""
    files = fitted(subject, dtype, folder)

    def read(name: str) -> dict[str, np.ndarray]:
        return {k: array(v) for k, v in load_file(files / name / "shard_0.safetensors").items()}

    n = int(torch.load(files / "total_processed.pt", weights_only=True))
    A, G = read("activation_sharded"), read("gradient_sharded")
    U_A, U_G = read("eigen_activation_sharded"), read("eigen_gradient_sharded")
    correction = read("eigenvalue_correction_sharded")
    layers = {f"model.{k}": (A[k] / n, G[k] / n, n) for k in A}
    documents = len(subject.tokens)
    Lambda = {f"model.{k}": (U_A[k], U_G[k], correction[k] * documents / n) for k in A}
    recipe = "S_A, S_G and total_processed as they stand; Λ is a mean over documents"
    return Found(layers, "reached", recipe, Lambda, "segment", files)


def drawn(subject: Subject, draws: int, folder: Path) -> dict[str, dict[str, np.ndarray]]:
    """G of labels that it draws, every sequence `draws` times: option → module → G."""
    files = fitted(subject.repeated(draws), "float64", folder, own_labels=False)
    G = load_file(files / "gradient_sharded" / "shard_0.safetensors")
    n = subject.labels.numel() * draws
    return {"use_dataset_labels=False": {f"model.{k}": array(x) / n for k, x in G.items()}}
