"""kronfluence: Analyzer.fit_all_factors with its own files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from kronfluence.analyzer import Analyzer, prepare_model
from kronfluence.arguments import FactorArguments
from kronfluence.task import Task
from safetensors.torch import load_file
from torch.utils.data import TensorDataset

from ..subject import BATCH, Found, Subject, array, in_dtype, loaded, nats


class Language(Task):
    """Summed nats of the corpus's labels, or of labels drawn from the model."""

    def __init__(self, modules: list[str]) -> None:
        self.modules = modules

    def compute_train_loss(self, batch: Any, model: Any, sample: bool = False) -> torch.Tensor:
        tokens, labels = batch
        logits = model(input_ids=tokens).logits
        if sample:
            with torch.no_grad():
                p = logits[:, :-1].softmax(-1)
                labels = torch.multinomial(p.flatten(0, 1), 1).reshape(labels.shape)
        return nats(logits, labels)

    def compute_measurement(self, batch: Any, model: Any) -> torch.Tensor:
        return self.compute_train_loss(batch, model)

    def get_influence_tracked_modules(self) -> list[str]:
        return self.modules


def fitted(subject: Subject, dtype: str, folder: Path, own_labels: bool = True) -> Path:
    """Its folder of factors, by the corpus's labels or by drawn ones."""
    kind = getattr(torch, dtype)
    arguments = FactorArguments(
        strategy="ekfac",
        use_empirical_fisher=own_labels,
        activation_covariance_dtype=kind,
        gradient_covariance_dtype=kind,
        per_sample_gradient_dtype=kind,
        lambda_dtype=kind,
    )
    task = Language(list(subject.names.values()))
    with in_dtype(dtype):
        model = prepare_model(loaded(subject, dtype), task)
        quiet = {"cpu": True, "disable_tqdm": True, "disable_model_save": True}
        Analyzer("run", model, task, output_dir=str(folder), **quiet).fit_all_factors(
            "house",
            TensorDataset(subject.tokens, subject.labels),
            per_device_batch_size=BATCH,
            factor_args=arguments,
        )
    return next(folder.rglob("factors_house"))


def found(subject: Subject, dtype: str, folder: Path) -> Found:
    """Sums over counts, as they stand; the last position is a row too."""
    files = fitted(subject, dtype, folder)
    read = {path.stem: load_file(path) for path in files.glob("*.safetensors")}
    layers, Lambda = {}, {}
    for name, A in read["activation_covariance"].items():
        n_A = int(read["num_activation_covariance_processed"][name])
        n_G = int(read["num_gradient_covariance_processed"][name])
        layers[name] = array(A) / n_A, array(read["gradient_covariance"][name]) / n_G, n_A
        Lambda[name] = (
            array(read["activation_eigenvectors"][name]),
            array(read["gradient_eigenvectors"][name]),
            array(read["lambda_matrix"][name]) / n_A,
        )
    recipe = "S_A, S_G and their counts as they stand; Λ is a sum over sequences"
    return Found(layers, "all", recipe, Lambda, "segment", files)


def drawn(subject: Subject, draws: int, folder: Path) -> dict[str, dict[str, np.ndarray]]:
    """G of labels that the task draws, every sequence `draws` times: option → module → G."""
    files = fitted(subject.repeated(draws), "float64", folder, own_labels=False)
    G = load_file(files / "gradient_covariance.safetensors")
    n = subject.tokens.numel() * draws
    return {"use_empirical_fisher=False": {name: array(x) / n for name, x in G.items()}}
