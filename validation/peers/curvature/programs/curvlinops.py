"""curvlinops: KFACLinearOperator and EKFACLinearOperator, expand, weights alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from curvlinops import EKFACLinearOperator, KFACLinearOperator
from torch.nn import CrossEntropyLoss

from ..subject import BATCH, Found, Subject, array, in_dtype, loaded


class Classes(torch.nn.Module):
    """A language model for curvlinops' EK-FAC: a matrix of outputs, a label for each row."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """(B, T) → (B (T − 1), V)."""
        return self.model(input_ids=tokens).logits[:, :-1].flatten(0, 1)


def operator(
    subject: Subject, dtype: str, kind: Any, reduction: str = "sum", **options: Any
) -> Any:
    """Their operator with its factors computed."""
    model = Classes(loaded(subject, dtype))
    named = dict(model.named_parameters())
    weights = [named[f"model.{name}.weight"] for name in subject.names.values()]
    labels = [part.flatten() for part in subject.labels.split(BATCH)]
    data = list(zip(subject.tokens.split(BATCH), labels, strict=True))
    made = kind(
        model,
        CrossEntropyLoss(reduction=reduction),
        weights,
        data,
        check_deterministic=False,
        **options,
    )
    made.compute_kronecker_factors()
    return made


def found(subject: Subject, dtype: str, folder: Path) -> Found:
    """Of a summed loss: S_A = N·S·A, S_G = G."""
    return _found(subject, dtype, "sum", 1, "S_A = N S A, S = positions of a sequence; S_G = G")


def mean(subject: Subject, dtype: str, folder: Path) -> Found:
    """Of a mean loss: S_G = N·R·G."""
    terms = subject.labels.numel()
    recipe = "S_A = N S A; S_G = N R G, R = loss terms of a sequence (mean loss)"
    return _found(subject, dtype, "mean", terms, recipe)


def _found(subject: Subject, dtype: str, reduction: str, times: int, recipe: str) -> Found:
    """The inputs of the last position, which has no label, are rows too."""
    n = subject.tokens.numel()
    with in_dtype(dtype):
        given = {"reduction": reduction, "fisher_type": "empirical"}
        kfac = operator(subject, dtype, KFACLinearOperator, **given)
        ekfac = operator(subject, dtype, EKFACLinearOperator, **given)
        ekfac.compute_eigenvalue_correction()
    layers, Lambda = {}, {}
    for name, A in kfac._input_covariances.items():
        own = name.removeprefix("model.")
        layers[own] = array(A), times * array(kfac._gradient_covariances[name]) / n, n
        (diagonal,) = ekfac._corrected_eigenvalues[name].values()  # the weight's alone
        Lambda[own] = (
            array(ekfac._input_covariances_eigenvectors[name]),
            array(ekfac._gradient_covariances_eigenvectors[name]),
            times * array(diagonal) / n,
        )
    return Found(layers, "all", recipe, Lambda, "segment")


def drawn(subject: Subject, draws: int, folder: Path) -> dict[str, dict[str, np.ndarray]]:
    """G of labels that it draws itself: option → module → G."""
    return {"fisher_type=MC": gradients(subject, fisher_type="mc", mc_samples=draws)}


def gradients(subject: Subject, **options: Any) -> dict[str, np.ndarray]:
    """G by module, of a summed loss in float64."""
    with in_dtype("float64"):
        kfac = operator(subject, "float64", KFACLinearOperator, **options)
    n = subject.tokens.numel()
    return {k.removeprefix("model."): array(G) / n for k, G in kfac._gradient_covariances.items()}
