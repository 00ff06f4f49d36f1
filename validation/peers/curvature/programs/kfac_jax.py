"""kfac-jax: its block-diagonal estimator, on a Llama in JAX with the same weights."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import kfac_jax
import numpy as np

from ..subject import BATCH, Found, Subject


def norm(x: Any, gain: Any, eps: float) -> Any:
    """RMSNorm."""
    return x / jnp.sqrt((x * x).mean(-1, keepdims=True) + eps) * gain


def turned(x_BTHE: Any, theta: float) -> Any:
    """Rotary positions, halves of a head together."""
    _, T, _, E = x_BTHE.shape
    frequency = theta ** (-jnp.arange(0, E, 2, dtype=x_BTHE.dtype) / E)
    angle = jnp.arange(T, dtype=x_BTHE.dtype)[:, None] * frequency
    cos, sin = jnp.cos(angle)[:, None], jnp.sin(angle)[:, None]
    first, second = jnp.split(x_BTHE, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


class Forward:
    """The logits; each weight is [in, out] and is tagged as a repeated dense layer."""

    def __init__(self, subject: Subject) -> None:
        self.config = subject.model.config
        self.fixed = {
            name: np.asarray(value)
            for name, value in subject.model.parameters.items()
            if name.removesuffix(".weight") not in subject.names
        }

    def linear(self, weights: Any, name: str, x: Any) -> Any:
        """X W, tagged."""
        W = weights[name]
        return kfac_jax.register_dense(x @ W, x, W, variant="repeated_dense")

    def attention(self, weights: Any, at: str, x: Any) -> Any:
        """Causal, heads in groups."""
        c, (B, T, _) = self.config, x.shape
        E = c.head_width
        q, k, v = (self.linear(weights, f"{at}.{part}", x).reshape(B, T, -1, E) for part in "qkv")
        q, k = (turned(y, c.rope_theta) for y in (q, k))
        k, v = (jnp.repeat(y, c.heads // c.kv_heads, axis=2) for y in (k, v))
        score = jnp.einsum("bthe,bshe->bhts", q, k) / E**0.5
        p = jax.nn.softmax(jnp.where(jnp.tril(jnp.ones((T, T), bool)), score, -jnp.inf))
        mixed = jnp.einsum("bhts,bshe->bthe", p, v).reshape(B, T, -1)
        return self.linear(weights, f"{at}.o", mixed)

    def logits(self, weights: Any, tokens: Any) -> Any:
        """(B, T, V)."""
        c = self.config
        fixed = {k: jnp.asarray(v, weights["head"].dtype) for k, v in self.fixed.items()}
        x = fixed["embed.weight"][tokens]
        for i in range(c.layers):
            at = f"blocks.{i}"
            y = norm(x, fixed[f"{at}.attn_norm.weight"], c.norm_eps)
            x = x + self.attention(weights, f"{at}.attn", y)
            y = norm(x, fixed[f"{at}.mlp_norm.weight"], c.norm_eps)
            gate = jax.nn.silu(self.linear(weights, f"{at}.mlp.gate", y))
            y = gate * self.linear(weights, f"{at}.mlp.up", y)
            x = x + self.linear(weights, f"{at}.mlp.down", y)
        return self.linear(weights, "head", norm(x, fixed["final_norm.weight"], c.norm_eps))

    def loss(self, weights: Any, batch: Any) -> Any:
        """Registers the loss of all positions but the last; its value is not used."""
        tokens, labels = batch
        logits = self.logits(weights, tokens)[:, :-1]
        kfac_jax.register_softmax_cross_entropy_loss(logits, targets=labels)
        logp = jax.nn.log_softmax(logits)
        return -jnp.take_along_axis(logp, labels[..., None], axis=-1).sum() / len(tokens)


def updated(
    loss: Any, weights: Any, batches: Sequence[Any], mode: str, seed: int, **options: Any
) -> dict[str, Any]:
    """State of each block after the batches, none forgotten, by the name of its weight."""
    key = jax.random.PRNGKey(seed)
    estimator = kfac_jax.BlockDiagonalCurvature(loss, auto_register_tags=False, **options)
    estimator.finalize((weights, batches[0]))
    state = estimator.init(
        rng=key,
        func_args=(weights, batches[0]),
        exact_powers_to_cache=None,
        approx_powers_to_cache=None,
        cache_eigenvalues=False,
    )
    for batch in batches:
        key, own = jax.random.split(key)
        state = estimator.update_curvature_matrix_estimate(
            state,
            ema_old=1.0,
            ema_new=1.0,
            identity_weight=0.0,
            batch_size=len(batch[0]),
            rng=own,
            func_args=(weights, batch),
            estimation_mode=mode,
        )
    names = sorted(weights)  # JAX flattens a dict by its sorted keys
    at = [names[index[0]] for index in estimator.indices_to_block_map]
    return dict(zip(at, state.blocks_states, strict=True))


def without_masks(*arguments: Any, **options: Any) -> Any:
    """Its block of a repeated layer, which then counts the rows whose g is 0."""
    block = kfac_jax.RepeatedDenseKroneckerFactored
    return block(*arguments, **options, use_masking=False)


UNMASKED = {"repeated_dense": without_masks}


def estimated(
    subject: Subject, dtype: str, mode: str, masked: bool = False, draws: int = 1
) -> dict[str, tuple[np.ndarray, np.ndarray, int]]:
    """Module → (A, G, n), but for what the mode does to the scale of G."""
    jax.config.update("jax_enable_x64", dtype == "float64")
    weights = {
        name: jnp.asarray(np.asarray(subject.model.parameters[f"{name}.weight"]).T, dtype)
        for name in subject.names
    }
    tokens, labels = (jnp.asarray(x.numpy()) for x in (subject.tokens, subject.labels))
    N = len(tokens)
    parts = [slice(i, i + BATCH) for i in range(0, N, BATCH)]
    batches = [(tokens[part], labels[part]) for part in parts]
    options: dict[str, Any] = {} if masked else {"layer_tag_to_block_ctor": UNMASKED}
    states = updated(Forward(subject).loss, weights, batches, mode, 0, num_samples=draws, **options)
    out = {}
    for name, state in states.items():
        A, G = (np.asarray(factor.value) for factor in state.factors)
        n = round(N * float(state.average_repeats.value))
        out[subject.names[name]] = A * N / n, G * N / n, n
    return out


def found(subject: Subject, dtype: str, folder: Path) -> Found:
    """S_A = N·A, S_G = N·B·G: `fisher_empirical` divides G by a batch once more."""
    layers = {
        name: (A, BATCH * G, n)
        for name, (A, G, n) in estimated(subject, dtype, "fisher_empirical").items()
    }
    recipe = (
        "S_A = N A, S_G = N B G, N sequences in batches of B: its empirical mode divides by B "
        "once more; use_masking=False"
    )
    return Found(layers, "all", recipe, {})


def drawn(subject: Subject, draws: int, folder: Path) -> dict[str, dict[str, np.ndarray]]:
    """G of labels, and of signs, that it draws: mode → module → G."""
    modes = ("fisher_gradients", "ggn_curvature_prop")
    return {
        mode: {
            name: G for name, (_, G, _) in estimated(subject, "float64", mode, draws=draws).items()
        }
        for mode in modes
    }
