"""Torch's own second derivatives of transformers' models, and `refcurv.curvature.exact`.

Every parameter of a 2-block decoder with grouped queries and SwiGLU, d = 8, as transformers
computes it in float64 (`InFloat64`) and torch differentiates it: H by forward over reverse
(torch.func), GGN from the Jacobian of the logits, Fishers and G from one backward per position and
entry. Nothing is shared with refcurv but the checkpoint on disk.

A matrix is compared pair of parameters by pair, H v by parameter, A and G by layer, each relative
to its own norm, be that 1e-5 of the whole; so that the whole is as near. Observed, worst over
blocks and peers (torch 2.13, transformers 5.23, OpenBLAS SkylakeX): hessian 8.7e-15,
ggn 5.3e-15, expected 5.8e-15, empirical 6.9e-15, hvp 5.6e-15, A 8.6e-16, G 3.3e-15. Without the
patch the Hessian is 1.1e-6 to 3.3e-6 off. The smallest fault planted, one weight moved by a
millionth of itself: 1.3e-7 and more in each kind; eps by a tenth: 5.5e-4.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="extra `peers`")
pytest.importorskip("transformers", reason="extra `peers`")

from peers_compare import (  # noqa: E402
    InFloat64,
    Tensors,
    checkpoint_names,
    converted,
    distance,
    second_moment,
    tapped,
    theirs,
    with_config,
    with_parameter,
)
from peers_zoo import llama, olmo2  # noqa: E402

from refcurv.curvature import exact  # noqa: E402
from refcurv.model.patterns import expand  # noqa: E402
from refcurv.model.weights import Model  # noqa: E402

pytestmark = pytest.mark.peers

BUDGET = 1e-10
VOCABULARY = 7
SMALL = dict(vocab_size=VOCABULARY, hidden_size=8, intermediate_size=5, num_hidden_layers=2)
PEERS: dict[str, Callable[[], Any]] = {
    "olmo2": lambda: olmo2(**SMALL),  # post-norm, QK-norm over the full width
    "llama": lambda: llama(**SMALL, head_dim=4, tie_word_embeddings=False),
    "llama-tied": lambda: llama(**SMALL, head_dim=4),
}
TOKENS = np.array([[3, 0, 5, 3], [6, 1, 1, 2]])
LABELS = np.array([[0, -1, 2, 6], [4, 4, 1, -1]])
"""None at [0, 1], from which later ones are reached, and none at [1, 3], from which none is."""
REACHED = np.array([[1, 1, 1, 1], [1, 1, 1, 0]], bool)

KINDS = ("hessian", "ggn", "expected", "empirical", "hvp", "A", "G")
Curvature = dict[str, Tensors]
"""By kind, and within a matrix by pair of parameters: {"hessian": {"embed × embed": ...}, ...}."""


@dataclass(frozen=True)
class Peer:
    """One checkpoint: on disk for transformers, and converted for us."""

    folder: Path
    ours: Model

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return self.ours.config.parameter_shapes()

    @property
    def layers(self) -> list[str]:
        """Those with a weight of their own: a tied head has none."""
        config = self.ours.config
        return [layer for layer in config.linear_layers() if f"{layer}.weight" in self.shapes]

    @property
    def direction(self) -> Tensors:
        rng = np.random.default_rng(5)
        return {name: rng.normal(size=shape) for name, shape in self.shapes.items()}

    def cut(self, vector: Any, wrt: str = "**") -> dict[str, Any]:
        """A vector over the parameters of a block, in our order, by name."""
        out, begin = {}, 0
        for name in expand(wrt, list(self.shapes)):
            end = begin + int(np.prod(self.shapes[name]))
            out[name] = vector[begin:end].reshape(self.shapes[name])
            begin = end
        assert begin == len(vector)
        return out

    def pairs(self, matrix: np.ndarray, wrt: str = "**") -> Tensors:
        """A matrix over the parameters of a block, by pair of names."""
        place = self.cut(np.arange(len(matrix)), wrt)
        return {
            f"{one} × {two}": matrix[np.ix_(i.ravel(), j.ravel())]
            for one, i in place.items()
            for two, j in place.items()
        }


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module", params=PEERS)
def peer(request: Any, tmp_path_factory: Any) -> Peer:
    torch.manual_seed(3)
    folder = tmp_path_factory.mktemp(request.param) / "hf"
    PEERS[request.param]().save_pretrained(folder)
    return Peer(folder, converted(folder))


@pytest.fixture(scope="module")
def wanted(peer: Peer) -> Curvature:
    with InFloat64():
        return run_theirs(peer)


@pytest.fixture(scope="module")
def found(peer: Peer) -> Curvature:
    return run_ours(peer, peer.ours)


# ------------------------------------------------------------------ theirs


@dataclass(frozen=True)
class Function:
    """Their model as a function of one vector: its parameters end to end, in our order."""

    peer: Peer
    model: Any

    @property
    def parameters(self) -> list[Any]:
        own = dict(self.model.named_parameters())
        names = checkpoint_names(self.peer.ours)
        assert sorted(names.values()) == sorted(own)
        return [own[names[name]] for name in self.peer.shapes]

    @property
    def theta(self) -> Any:
        return torch.cat([parameter.detach().reshape(-1) for parameter in self.parameters])

    def logits(self, theta: Any) -> Any:
        """At the labelled positions, (N, V)."""
        names = checkpoint_names(self.peer.ours)
        named = {names[name]: value for name, value in self.peer.cut(theta).items()}
        given = dict(input_ids=torch.tensor(TOKENS), use_cache=False)
        out = torch.func.functional_call(self.model, named, kwargs=given).logits
        return out[torch.tensor(LABELS >= 0)]

    def loss(self, theta: Any) -> Any:
        label = torch.tensor(LABELS[LABELS >= 0])
        return torch.nn.functional.cross_entropy(self.logits(theta), label, reduction="sum")


def run_theirs(peer: Peer) -> Curvature:
    f = Function(peer, theirs(peer.folder))
    v = torch.tensor(np.concatenate([x.ravel() for x in peer.direction.values()]))
    hvp = torch.func.jvp(torch.func.grad(f.loss), (f.theta,), (v,))[1]
    return {
        "hessian": peer.pairs(torch.func.hessian(f.loss)(f.theta).numpy()),
        "ggn": peer.pairs(their_ggn(f)),
        "hvp": peer.cut(hvp.numpy()),
        **enumerated(f),
    }


def their_ggn(f: Function) -> np.ndarray:
    """Σ_n J_nᵀ (diag p − p pᵀ) J_n, J_n (V, P) the Jacobian of the logits."""
    J_NVP = torch.func.jacrev(f.logits)(f.theta).numpy()
    p_NV = torch.softmax(f.logits(f.theta), dim=-1).numpy()
    parts = zip(J_NVP, p_NV, strict=True)
    return sum(J.T @ (np.diag(p) - np.outer(p, p)) @ J for J, p in parts)


def enumerated(f: Function) -> Curvature:
    """Both Fishers, A and G by autograd and hooks: one backward per position and entry."""
    names, P = checkpoint_names(f.peer.ours), len(f.theta)
    own = {layer: names[f"{layer}.weight"].removesuffix(".weight") for layer in f.peer.layers}
    expected, empirical = np.zeros((P, P)), np.zeros((P, P))
    G = {layer: np.zeros((O, O)) for layer in own for O in f.peer.shapes[f"{layer}.weight"][:1]}
    every = np.ones(TOKENS.shape, bool)

    def gradient(nats: Any) -> np.ndarray:
        parts = torch.autograd.grad(nats, f.parameters, retain_graph=True)
        return np.concatenate([d.numpy().ravel() for d in parts])

    with tapped(f.model) as (a, g):
        z_BTV = f.model(input_ids=torch.tensor(TOKENS), use_cache=False).logits
        nats_BTV = -torch.log_softmax(z_BTV, dim=-1)
        p_BTV = torch.exp(-nats_BTV).detach().numpy()
        for b, t in np.argwhere(LABELS >= 0):
            for v, p in enumerate(p_BTV[b, t]):
                D = gradient(nats_BTV[b, t, v])
                expected += p * np.outer(D, D)
                for layer in own:
                    G[layer] += p * second_moment(g[own[layer]], every) / REACHED.sum()
        for b, label in enumerate(LABELS):
            D = gradient(sum(nats_BTV[b, t, label[t]] for t in np.flatnonzero(label >= 0)))
            empirical += np.outer(D, D)
    A = {layer: second_moment(a[own[layer]], REACHED) / REACHED.sum() for layer in own}
    return {
        "expected": f.peer.pairs(expected),
        "empirical": f.peer.pairs(empirical),
        "A": A,
        "G": G,
    }


# ------------------------------------------------------------------ ours


def run_ours(
    peer: Peer, model: Model, labels: np.ndarray = LABELS, wrt: str = "**", per: str = "segment"
) -> Curvature:
    """All kinds in the block `wrt`; H v of all parameters."""
    given = (model, TOKENS, labels)
    layers = [layer for layer in peer.layers if f"{layer}.weight" in expand(wrt, [*peer.shapes])]
    moments = {layer: exact.moments(*given, wrt=f"{layer}.weight") for layer in layers}
    matrices = {
        "hessian": exact.hessian(*given, wrt=wrt),
        "ggn": exact.ggn(*given, wrt=wrt),
        "expected": exact.fisher(*given, wrt=wrt),
        "empirical": exact.fisher(*given, wrt=wrt, fisher="empirical", per=per),
    }
    return {
        **{kind: peer.pairs(matrix, wrt) for kind, matrix in matrices.items()},
        "hvp": exact.hvp(*given, wrt="**", vector=peer.direction),
        "A": {layer: found.A for layer, found in moments.items()},
        "G": {layer: found.G for layer, found in moments.items()},
    }


def gaps(found: Curvature, wanted: Curvature) -> dict[str, float]:
    """By kind, the worst over blocks, relative to the block's norm."""
    assert set(found) == set(wanted) == set(KINDS)
    return {
        kind: max(distance(block, wanted[kind][name]) for name, block in found[kind].items())
        for kind in KINDS
    }


# ------------------------------------------------------------------ the comparison


@pytest.mark.parametrize("kind", KINDS)
def test_exact_curvature_is_torchs(
    peer: Peer, found: Curvature, wanted: Curvature, kind: str
) -> None:
    names, layers = len(peer.shapes), len(peer.layers)
    assert sum(int(np.prod(shape)) for shape in peer.shapes.values()) >= 800
    count = {"hvp": names, "A": layers, "G": layers}.get(kind, names**2)
    assert set(found[kind]) == set(wanted[kind]) and len(found[kind]) == count
    worst = {name: distance(found[kind][name], wanted[kind][name]) for name in wanted[kind]}
    name = max(worst, key=lambda name: worst[name])
    assert worst[name] < BUDGET, (name, worst[name])


def test_without_the_patch_it_is_float32(peer: Peer, wanted: Curvature) -> None:
    """Why the patch: the Hessian of transformers' own float64 model has float32's digits."""
    f = Function(peer, theirs(peer.folder))
    H = torch.func.hessian(f.loss)(f.theta)
    assert H.dtype == torch.float64
    blocks = peer.pairs(H.numpy())
    worst = max(distance(blocks[name], wanted["hessian"][name]) for name in blocks)
    assert 1e-8 < worst < 1e-4


# ------------------------------------------------------------------ what it would catch

PART = "blocks.1.{attn.v,mlp.up}.weight"


def one_weight(model: Model) -> Model:
    """One that every kind of every layer depends on, by a millionth of itself."""
    nudge = np.ones(model.parameters["embed.weight"].shape)
    nudge[TOKENS[0, 0], 2] += 1e-6
    return with_parameter(model, "embed.weight", lambda W: W * nudge)


def one_label(labels: np.ndarray) -> np.ndarray:
    return np.where(np.arange(labels.size).reshape(labels.shape) == 2, 5, labels)


def test_a_part_without_a_fault(peer: Peer, wanted: Curvature) -> None:
    assert max(gaps(run_ours(peer, peer.ours, wrt=PART), wanted).values()) < BUDGET


@pytest.mark.parametrize("fault", ["eps", "one weight"])
def test_the_comparison_can_fail(peer: Peer, wanted: Curvature, fault: str) -> None:
    eps = peer.ours.config.norm_eps * 1.1
    wrong = {"eps": with_config(peer.ours, norm_eps=eps), "one weight": one_weight(peer.ours)}
    seen = gaps(run_ours(peer, wrong[fault], wrt=PART), wanted)
    assert min(seen.values()) > 1e2 * BUDGET, seen


def test_another_label_changes_what_reads_labels(peer: Peer, wanted: Curvature) -> None:
    """H and the empirical Fisher; GGN, expected Fisher, A and G ask only where labels are."""
    seen = gaps(run_ours(peer, peer.ours, one_label(LABELS), PART), wanted)
    for kind in KINDS:
        if kind in ("hessian", "empirical", "hvp"):
            assert seen[kind] > 1e-3, (kind, seen[kind])
        else:
            assert seen[kind] < BUDGET, (kind, seen[kind])


def test_a_term_is_not_a_sequence(peer: Peer, wanted: Curvature) -> None:
    seen = gaps(run_ours(peer, peer.ours, wrt=PART, per="term"), wanted)
    assert seen.pop("empirical") > 0.1
    assert max(seen.values()) < BUDGET
