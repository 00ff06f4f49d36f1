"""nngeometry: PMatKFAC and PMatEKFAC of a function that returns one loss for each sequence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from nngeometry.backend import TorchHooksJacobianBackend
from nngeometry.layercollection import LayerCollection
from nngeometry.object.pspace import PMatEKFAC, PMatKFAC
from torch.utils.data import DataLoader, TensorDataset

from ..subject import BATCH, Found, Subject, array, in_dtype, loaded


class Rows(torch.nn.Module):
    """An nn.Linear that sees its positions as rows: nngeometry's takes matrices alone."""

    def __init__(self, linear: torch.nn.Linear) -> None:
        super().__init__()
        self.linear = linear

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x.flatten(0, -2)).unflatten(0, x.shape[:-1])


def found(subject: Subject, dtype: str, folder: Path) -> Found:
    """S_A = N·A and S_G = N·G: it divides by sequences, not by rows."""
    with in_dtype(dtype):
        model = loaded(subject, dtype)
        layers = LayerCollection()
        for name in subject.names.values():
            parent, _, child = name.rpartition(".")
            linear = model.get_submodule(name)
            setattr(model.get_submodule(parent), child, Rows(linear))
            layers.add_layer_from_model(model, linear)

        def losses(vectors: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
            logits = model(inputs_embeds=vectors).logits[:, :-1]
            each = torch.nn.functional.cross_entropy(
                logits.swapaxes(1, 2), labels, reduction="none"
            )
            return each.sum(dim=1, keepdim=True)

        vectors = model.get_input_embeddings()(subject.tokens).detach()
        data = DataLoader(TensorDataset(vectors, subject.labels), batch_size=BATCH)
        backend = TorchHooksJacobianBackend(model, losses, layer_collection=layers)
        kfac = PMatKFAC(backend, examples=data)
        ekfac = PMatEKFAC(backend, examples=data)
        ekfac.update_diag(data)
    N, n = subject.tokens.shape[0], subject.tokens.numel()
    out = {
        k.removesuffix(".linear"): (array(a) * N / n, array(g) * N / n, n)
        for k, (a, g) in kfac.data.items()
    }
    vectors_of, diagonal = ekfac.data
    Lambda = {
        k.removesuffix(".linear"): _shaped(*both, diagonal[k], N / n)
        for k, both in vectors_of.items()
    }
    recipe = "S_A = N A, S_G = N G, N sequences, whose outputs are their summed nats"
    return Found(out, "all", recipe, Lambda, "row")


def _shaped(U_A: Any, U_G: Any, diagonal: Any, scale: float) -> tuple[Any, Any, Any]:
    return array(U_A), array(U_G), array(diagonal).reshape(len(U_G), len(U_A)) * scale
