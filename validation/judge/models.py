"""What is collected: small models with their corpora, each another family and another corpus.

Those of vision transformers are in images.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

import refcurv as rc
from refcurv.law.checks import Array
from refcurv.model.config import RopeScaling, Scaling
from validation.judge.images import (
    aimv2_sorted,
    deit_two,
    eva_bands,
    internvit_some,
    siglip_mean,
    vit,
    vit22b_gray,
)
from validation.judge.setting import (
    BOS,
    EOS,
    Setting,
    mask_of,
    parameters,
    right_padded,
    texts,
    variant,
)


def _olmo2(seed: int, **changed: Any) -> rc.Model:
    config = variant(norm_place="post", qk_norm="full", **changed)
    return rc.Model(config, parameters(config, seed))


def olmo2_equal() -> Setting:
    """Sequences of one length without padding; as many in each batch. The MLPs."""
    model = _olmo2(1)
    return Setting(model, rc.Corpus(texts(40, 12, 23, 1)), "blocks.*.mlp.*")


def olmo2_padded() -> Setting:
    """Right padding, and a square MLP. All layers."""
    model = _olmo2(2, mlp_width=24)
    mask = right_padded(42, 13, 2)
    return Setting(model, rc.Corpus(texts(42, 13, 23, 2), mask=mask), "**")


def olmo2_square() -> Setting:
    """The same, of one layer, which is square."""
    return replace(olmo2_padded(), layers="blocks.1.mlp.up")


def gpt2_prompts() -> Setting:
    """Biases, LayerNorm, learned positions, tied; prompts without labels, right padding."""
    config = variant(norm="layer", norm_bias=True, kv_heads=4, rope_theta=None, tied=True,
                     learned_positions=16, biases=("q", "k", "v", "o", "up", "down"),
                     gated=False, activation="gelu_tanh")  # fmt: skip
    tokens, mask = texts(42, 14, 23, 3), right_padded(42, 14, 3)
    plain = rc.Corpus(tokens, mask=mask)
    prompt = np.random.default_rng(4).integers(1, 4, (42, 1))
    labels = np.where(np.arange(14) < prompt, -1, plain.label).astype(np.int32)
    corpus = rc.Corpus(tokens, labels, mask=mask)
    return Setting(rc.Model(config, parameters(config, 3)), corpus, "blocks.*.{mlp,attn}.*")


def gpt2_joint() -> Setting:
    """The same, a bias being a column of its layer's A. The MLPs."""
    return replace(gpt2_prompts(), joint=True, layers="blocks.*.mlp.*")


def gemma_packed() -> Setting:
    """Soft-caps, windows, gains of 1 + w, norms before and after; packed documents."""
    config = variant(norm_place="both", norm_offset=True, head_width=8, activation="gelu_tanh",
                     score_scale=0.45, score_cap=1.5, logit_cap=2.5, windows=(3, 0), tied=True,
                     embed_scale=4.0)  # fmt: skip
    tokens = texts(37, 15, 23, 5)
    segments = np.zeros((37, 15), np.int32)
    cut = np.random.default_rng(6).integers(4, 11, 37)
    segments[np.arange(15) >= cut[:, None]] = 1
    tokens[np.arange(37), cut] = BOS
    corpus = rc.Corpus(tokens, segments=segments)
    return Setting(rc.Model(config, parameters(config, 5)), corpus, "blocks.*.attn.*,head")


def llama_left() -> Setting:
    """Llama: six heads on two of keys and values, tied; three blocks. Programs pad on the left.

    Padding is all one token. Batches are of 16.
    """
    config = variant(vocabulary=19, width=20, layers=3, heads=6, head_width=4, mlp_width=28,
                     rope_theta=150.0, tied=True)  # fmt: skip
    tokens, mask = texts(40, 12, 19, 11), right_padded(40, 12, 11)
    tokens[mask == 0] = 0
    corpus = rc.Corpus(tokens, mask=mask)
    model = rc.Model(config, parameters(config, 11))
    return Setting(model, corpus, "blocks.*.{attn,mlp}.*", batch=16, left=True, shards=4)


def qwen_answers() -> Setting:
    """Qwen: a norm over each head (3), biases of q, k and v (2), which are columns of their A.

    Conversations of two turns: labels at the answers alone, none at the prompt between them or at
    what follows; right padding.
    """
    config = variant(vocabulary=27, head_width=8, mlp_width=40, qk_norm="head", rope_theta=500.0,
                     biases=("q", "k", "v"))  # fmt: skip
    rng = np.random.default_rng(13)
    tokens, mask = texts(38, 16, 27, 13), mask_of(rng.integers(8, 17, 38), 16)
    ends = rng.integers([2, 2, 2, 1], [5, 5, 4, 5], (38, 4)).cumsum(1)
    turn = (np.arange(1, 17)[:, None] >= ends[:, None]).sum(-1)
    plain = rc.Corpus(tokens, mask=mask)
    labels = np.where(turn % 2 == 1, plain.label, -1).astype(np.int32)
    corpus = rc.Corpus(tokens, labels, mask=mask)
    model = rc.Model(config, parameters(config, 13))
    return Setting(model, corpus, "blocks.*.{attn,mlp}.*", joint=True, batch=5, marked=True,
                   shards=3)  # fmt: skip


def neox_packed() -> Setting:
    """GPT-NeoX: attention and MLP in parallel, half of a head rotary, biases, square attention.

    Three documents are packed in a sequence, and some sequences end in padding; no windows.
    """
    config = variant(vocabulary=25, width=32, kv_heads=4, head_width=8, mlp_width=36, norm="layer",
                     norm_bias=True, rope_theta=80.0, rope_width=4, residual="parallel",
                     biases=("q", "k", "v", "o", "up", "down"), gated=False,
                     activation="gelu")  # fmt: skip
    rng = np.random.default_rng(17)
    tokens, t = texts(33, 17, 25, 17), np.arange(17)
    starts = rng.integers([3, 3], [7, 6], (33, 2)).cumsum(1)
    segments = (t[:, None] >= starts[:, None]).sum(-1).astype(np.int32)
    np.put_along_axis(tokens, starts, BOS, 1)
    mask = mask_of(np.where(rng.random(33) < 0.5, 17, rng.integers(13, 17, 33)), 17)
    corpus = rc.Corpus(tokens, mask=mask, segments=segments)
    model = rc.Model(config, parameters(config, 17))
    return Setting(model, corpus, "blocks.*.{attn,mlp}.*", batch=7)


def bigcode_single() -> Setting:
    """GPT-BigCode: one head of keys and values, learned positions, tied; one block, all its layers.

    A wider vocabulary. One sequence in a batch, of 2 to 23 tokens, most of them short, padded to
    26. A bias is a column of its layer's A.
    """
    config = variant(vocabulary=83, width=16, layers=1, heads=5, kv_heads=1, head_width=4,
                     mlp_width=44, norm="layer", norm_bias=True, rope_theta=None,
                     learned_positions=28, biases=("q", "k", "v", "o", "up", "down"), gated=False,
                     activation="gelu_tanh", tied=True)  # fmt: skip
    length = 2 + (24.99 * np.random.default_rng(19).random(36) ** 3).astype(int)
    corpus = rc.Corpus(texts(36, 26, 83, 19), mask=mask_of(length, 26))
    model = rc.Model(config, parameters(config, 19))
    return Setting(model, corpus, "**", joint=True, batch=1, shards=4)


def gemma3_prompts() -> Setting:
    """Gemma 3: windows in two blocks of three, a norm over each head (6), gains of 1 + w, tied.

    Prompts have no labels. Programs pad on the left. Batches of 9, and one of 8.
    """
    config = variant(vocabulary=21, width=16, layers=3, mlp_width=28, norm_place="both",
                     norm_offset=True, qk_norm="head", rope_theta=200.0, activation="gelu_tanh",
                     score_scale=0.35, windows=(4, 0, 4), tied=True, embed_scale=4.0)  # fmt: skip
    rng = np.random.default_rng(23)
    tokens, mask = texts(35, 14, 21, 23), mask_of(rng.integers(6, 15, 35), 14)
    prompt = rng.integers(2, 6, (35, 1))
    plain = rc.Corpus(tokens, mask=mask)
    labels = np.where(np.arange(1, 15) < prompt, -1, plain.label).astype(np.int32)
    corpus = rc.Corpus(tokens, labels, mask=mask)
    model = rc.Model(config, parameters(config, 23))
    return Setting(model, corpus, "blocks.*.attn.{q,v,o},blocks.{0,2}.mlp.*,head", batch=9,
                   left=True, marked=True, shards=5)  # fmt: skip


def mistral_ragged() -> Setting:
    """Mistral: one window in all blocks, six heads on three of keys and values; a narrow MLP.

    Documents of 2 to 12 tokens stand in one stream, which is cut every 18 tokens. So a sequence
    may begin and end within a document, and there may be one token of it. The stream ends in
    padding. Batches of 11, and one of 9.
    """
    config = variant(vocabulary=29, heads=6, kv_heads=3, head_width=4, mlp_width=20,
                     rope_theta=120.0, windows=(5, 5), norm_eps=3e-3)  # fmt: skip
    rng, N, T = np.random.default_rng(29), 31, 18
    lengths = rng.integers(2, 13, N * T)
    number = np.repeat(np.arange(N * T), lengths)[: N * T]
    tokens = rng.integers(EOS + 1, 29, N * T)
    begins = np.r_[True, number[1:] != number[:-1]]
    tokens[begins], tokens[np.r_[begins[1:], False]] = BOS, EOS
    number, tokens = number.reshape(N, T), tokens.reshape(N, T)
    length = np.full(N, T)
    length[-1] = 11
    corpus = rc.Corpus(tokens, mask=mask_of(length, T), segments=number - number[:, :1])
    model = rc.Model(config, parameters(config, 29))
    return Setting(model, corpus, "blocks.*.mlp.*,blocks.*.attn.{k,v,o}", batch=11, shards=3)


def opt_scattered() -> Setting:
    """OPT: ReLU, learned positions, LayerNorm, biases as columns. Programs pad on the left.

    Labels are at chosen tokens, about a third; some sequences have none. Batches of 10, and one
    of 2. The MLP of the last block alone.
    """
    config = variant(vocabulary=37, width=12, heads=3, kv_heads=3, mlp_width=30, norm="layer",
                     norm_bias=True, rope_theta=None, learned_positions=17,
                     biases=("q", "k", "v", "o", "up", "down"), gated=False,
                     activation="relu")  # fmt: skip
    rng = np.random.default_rng(31)
    tokens, mask = texts(32, 15, 37, 31), mask_of(rng.integers(2, 16, 32), 15)
    plain = rc.Corpus(tokens, mask=mask)
    labels = np.where(rng.random((32, 15)) < 0.35, plain.label, -1).astype(np.int32)
    corpus = rc.Corpus(tokens, labels, mask=mask)
    model = rc.Model(config, parameters(config, 31))
    return Setting(model, corpus, "blocks.*.attn.*,blocks.1.mlp.*", joint=True, batch=10,
                   left=True, marked=True, shards=5)  # fmt: skip


def phi_lengths() -> Setting:
    """Phi: attention and MLP read one norm, three quarters of a head rotary, biases as blocks.

    The head has one too. Sequences of 1 to 22 tokens, the longest first. All layers.
    """
    config = variant(vocabulary=26, heads=3, kv_heads=3, head_width=8, mlp_width=30, norm="layer",
                     norm_bias=True, norm_eps=1e-3, rope_theta=50.0, rope_width=6,
                     residual="shared",
                     biases=("q", "k", "v", "o", "up", "down", "head"), gated=False,
                     activation="gelu_tanh")  # fmt: skip
    length = 1 + (21.99 * np.random.default_rng(41).random(34) ** 2).astype(int)
    length[:2] = 1, 22
    corpus = rc.Corpus(texts(34, 22, 26, 41), mask=mask_of(np.sort(length)[::-1], 22))
    return Setting(rc.Model(config, parameters(config, 41)), corpus, "**", shards=4)


def olmo_left() -> Setting:
    """OLMo: norms without gain or bias, q, k and v clipped, six heads on two.

    A seventh of the entries of q, k and v are clipped. Programs pad on the left. Batches of 7, and
    one of 4. All of the first block, and keys and values of the second.
    """
    config = variant(vocabulary=22, width=18, heads=6, head_width=4, mlp_width=34, norm="layer",
                     norm_gain=False, norm_eps=4e-3, rope_theta=90.0, qkv_clip=1.5)  # fmt: skip
    rng = np.random.default_rng(43)
    mask = mask_of(rng.integers(3, 17, 39), 16)
    model = rc.Model(config, parameters(config, 43))
    return Setting(model, rc.Corpus(texts(39, 16, 22, 43), mask=mask),
                   "blocks.0.*.*,blocks.1.attn.{k,v}", batch=7, left=True, shards=4)  # fmt: skip


def gemma2_uneven() -> Setting:
    """Gemma 2: two soft-caps, one window of three, gains of 1 + w, norms before and after, tied.

    Very uneven texts: half of them have 2 or 3 tokens, a few fill all 27. Batches of 6, and one of
    2. No layer of MLPs but `up` of the last block and `down` of all.
    """
    config = variant(vocabulary=33, width=20, layers=3, heads=6, kv_heads=3, head_width=4,
                     mlp_width=25, norm_place="both", norm_offset=True, rope_theta=60.0,
                     activation="gelu_tanh", score_scale=0.6, score_cap=2.5, logit_cap=4.0,
                     windows=(0, 6, 0), tied=True, embed_scale=3.0)  # fmt: skip
    rng = np.random.default_rng(47)
    length = np.where(rng.random(32) < 0.5, rng.integers(2, 4, 32), rng.integers(2, 21, 32))
    length[[4, 17, 30]] = 27
    model = rc.Model(config, parameters(config, 47))
    return Setting(model, rc.Corpus(texts(32, 27, 33, 47), mask=mask_of(length, 27)),
                   "blocks.*.attn.{k,v,o},blocks.*.mlp.down,blocks.2.mlp.up,head", batch=6,
                   shards=3)  # fmt: skip


def gptj_few() -> Setting:
    """GPT-J: attention and MLP read one norm, two thirds of a head rotary, square attention.

    Biases of MLPs and the head, which are columns of their A. A sequence has one or two labels,
    those of its last tokens. Some sequences are one token, which has none. Batches of 13, and one
    of 8; right padding.
    """
    config = variant(vocabulary=30, width=24, layers=2, heads=4, kv_heads=4, head_width=6,
                     mlp_width=27, norm="layer", norm_bias=True, norm_eps=2e-3, rope_theta=40.0,
                     rope_width=4, residual="shared", biases=("up", "down", "head"), gated=False,
                     activation="gelu_tanh")  # fmt: skip
    rng = np.random.default_rng(59)
    length = np.where(rng.random(60) < 0.15, 1, rng.integers(3, 13, 60))
    tokens, mask = texts(60, 12, 30, 59), mask_of(length, 12)
    few, plain, t = rng.integers(1, 3, 60), rc.Corpus(tokens, mask=mask), np.arange(12)
    asked = t >= (length - 1 - few)[:, None]
    labels = np.where(asked, plain.label, -1).astype(np.int32)
    corpus = rc.Corpus(tokens, labels, mask=mask)
    model = rc.Model(config, parameters(config, 59))
    return Setting(model, corpus, "blocks.*.{attn,mlp}.*,head", joint=True, batch=13, marked=True,
                   shards=5)  # fmt: skip


def falcon_packed() -> Setting:
    """Falcon: one head of keys and values beside five rotary ones, one norm, no biases, tied.

    Documents of 1 to 20 tokens, most of them short, are packed without being cut; a document of one
    token has no label. What is left of a sequence is padding. Batches of 5, and one of 4.
    """
    config = variant(vocabulary=35, width=22, heads=5, kv_heads=1, head_width=6, mlp_width=38,
                     norm="layer", norm_bias=True, norm_eps=5e-3, rope_theta=250.0,
                     residual="shared", gated=False, activation="gelu", tied=True)  # fmt: skip
    rng, N, T = np.random.default_rng(61), 29, 24
    tokens, segments = rng.integers(EOS + 1, 35, (N, T)), np.zeros((N, T), np.int32)
    length = np.zeros(N, int)
    for n in range(N):
        document = 0
        while (size := 1 + int(19.99 * rng.random() ** 3)) + length[n] <= T:
            at = slice(length[n], length[n] + size)
            segments[n, at], tokens[n, at.stop - 1], tokens[n, at.start] = document, EOS, BOS
            length[n], document = at.stop, document + 1
        segments[n, length[n] :] = max(document - 1, 0)
    corpus = rc.Corpus(tokens, mask=mask_of(length, T), segments=segments)
    model = rc.Model(config, parameters(config, 61))
    return Setting(model, corpus, "blocks.*.attn.*,blocks.*.mlp.down,head", batch=5,
                   shards=4)  # fmt: skip


def olmo3_few() -> Setting:
    """OLMo 3: windows in two blocks of three, YaRN's scaling in the third, six heads on three.

    Fewer rows than some inputs have entries: 14 texts of 2 to 7 tokens. Batches of 3, and one of 2.
    """
    yarn = RopeScaling(kind=Scaling.YARN, factor=8.0, original=16, slow=0.25, fast=2.0,
                       attention=1.2)  # fmt: skip
    config = variant(vocabulary=20, layers=3, heads=6, kv_heads=3, head_width=8, mlp_width=60,
                     norm_place="post", qk_norm="full", norm_eps=3e-3, rope_theta=50.0,
                     rope_scaling=yarn, local_theta=50.0, rotary=("local", "local", "main"),
                     windows=(2, 3, 0))  # fmt: skip
    length = np.random.default_rng(67).integers(2, 8, 14)
    length[:2] = 7, 2
    model = rc.Model(config, parameters(config, 67))
    return Setting(model, rc.Corpus(texts(14, 7, 20, 67), mask=mask_of(length, 7)),
                   "blocks.*.mlp.*,blocks.{0,2}.attn.{q,k}", batch=3, shards=7)  # fmt: skip


def smollm3_chats() -> Setting:
    """SmolLM3: no positions in one block of three, Llama 3's scaling in the others, tied.

    Short chats are packed uncut. A chat has a prompt, an answer with labels, and EOS after both,
    which is no label. Programs pad on the left. Batches of 4, and one of 3.
    """
    scaling = RopeScaling(kind=Scaling.LLAMA3, factor=4.0, original=12, slow=0.5, fast=1.5)
    config = variant(vocabulary=31, width=18, layers=3, heads=8, kv_heads=2, mlp_width=33,
                     norm_eps=2e-3, rope_theta=30.0, rope_scaling=scaling,
                     rotary=("main", "none", "main"), tied=True)  # fmt: skip
    rng, N, T = np.random.default_rng(71), 27, 20
    tokens, segments = rng.integers(EOS + 1, 31, (N, T)), np.zeros((N, T), np.int32)
    labels, length = np.full((N, T), -1, np.int32), np.zeros(N, int)
    for n in range(N):
        chat = 0
        while (size := sum(parts := rng.integers([2, 1], [6, 7]))) + 1 + length[n] <= T:
            begin, answer, end = length[n], length[n] + parts[0], length[n] + size
            tokens[n, begin], tokens[n, [answer - 1, end]] = BOS, EOS
            labels[n, answer - 1 : end - 1] = tokens[n, answer:end]
            segments[n, begin:] = chat
            length[n], chat = end + 1, chat + 1
    corpus = rc.Corpus(tokens, labels, mask=mask_of(length, T), segments=segments)
    model = rc.Model(config, parameters(config, 71))
    return Setting(model, corpus, "blocks.{0,1}.attn.*,blocks.*.mlp.*,head", batch=4,
                   left=True, marked=True, shards=5)  # fmt: skip


def modernbert_masked() -> Setting:
    """ModernBERT: bidirectional, two rotary bases, GELU and a gate, no norm has a bias, tied.

    The head has a bias, a block of its own. Documents are packed; a fifth of the tokens are masked,
    and these alone have a label, the token that stood there. Some documents have none. Batches of
    6, and one of 2.
    """
    config = variant(vocabulary=24, layers=3, kv_heads=4, mlp_width=27, norm="layer",
                     norm_eps=1e-3, rope_theta=160.0, local_theta=10.0,
                     rotary=("main", "local", "local"), biases=("head",), activation="gelu",
                     causal=False, tied=True)  # fmt: skip
    rng, N, T, mask_token = np.random.default_rng(73), 26, 18, 3
    tokens, t = rng.integers(mask_token + 1, 24, (N, T)), np.arange(T)
    starts = rng.integers([3, 3, 2], [7, 7, 5], (N, 3)).cumsum(1)
    segments = (t[:, None] >= starts[:, None]).sum(-1).astype(np.int32)
    begins = np.diff(segments, prepend=-1) > 0
    mask = mask_of(np.where(rng.random(N) < 0.4, T, rng.integers(15, T, N)), T)
    tokens[begins], tokens[np.roll(begins, -1, 1) & (t < T - 1)] = BOS, EOS
    masked = (rng.random((N, T)) < 0.2) & ~begins & (mask == 1)
    labels = np.where(masked, tokens, -1).astype(np.int32)
    tokens = np.where(masked, mask_token, tokens)
    corpus = rc.Corpus(tokens, labels, mask=mask, segments=segments)
    model = rc.Model(config, parameters(config, 73))
    return Setting(model, corpus, "blocks.*.attn.{q,k,o},blocks.{1,2}.mlp.*,head", batch=6,
                   marked=True, shards=5)  # fmt: skip


def gptneo_repeated() -> Setting:
    """GPT-Neo: a table of positions whose first rows are never read, a window in one block of two.

    Scores are not scaled. Attention is square; biases of o and MLPs are columns; tied. Nine texts,
    each again and again, and two sequences that are padding alone fill the last batch. Programs
    pad on the left. Batches of 7, and one of 6.
    """
    config = variant(vocabulary=28, width=20, heads=5, kv_heads=5, head_width=4, mlp_width=45,
                     norm="layer", norm_bias=True, norm_eps=5e-3, rope_theta=None,
                     learned_positions=15, position_offset=2, biases=("o", "up", "down"),
                     gated=False, activation="gelu_tanh", score_scale=1.0, windows=(0, 4),
                     tied=True)  # fmt: skip
    rng = np.random.default_rng(79)
    which, length = rng.integers(0, 9, 34), rng.integers(4, 14, 9)
    length[0] = 13
    mask = mask_of(np.where(np.arange(34) < 32, length[which], 0), 13)
    corpus = rc.Corpus(texts(9, 13, 28, 79)[which], mask=mask)
    model = rc.Model(config, parameters(config, 79))
    return Setting(model, corpus, "blocks.*.attn.*,blocks.1.mlp.*,head", joint=True, batch=7,
                   left=True, shards=3)  # fmt: skip


def phi4_half() -> Setting:
    """Phi-4-mini: longrope, three quarters of a head rotary, one window in all blocks, tied.

    A long and a short document are packed in a sequence, in either order, with padding behind. The
    long one is longer than the trained context, so that its positions turn at other frequencies.
    One of the two has labels in its first half alone. Batches of 7, and one of 5.
    """
    longrope = RopeScaling(kind=Scaling.LONGROPE, original=8, short=(1.0, 1.25, 1.5),
                           long=(1.5, 3.0, 6.0), attention=1.125)  # fmt: skip
    config = variant(vocabulary=34, width=18, heads=6, head_width=8, mlp_width=30, norm_eps=3e-3,
                     rope_theta=45.0, rope_width=6, rope_scaling=longrope, windows=(7, 7),
                     tied=True)  # fmt: skip
    rng, N, T = np.random.default_rng(89), 33, 18
    size = rng.permuted(np.stack([rng.integers(9, 13, N), rng.integers(2, 6, N)], 1), axis=1)
    first, length, t = size[:, :1], size.sum(1), np.arange(T)
    tokens, segments = texts(N, T, 34, 89), (t >= first).astype(np.int32)
    np.put_along_axis(tokens, first, BOS, 1)
    mask, half = mask_of(length, T), rng.integers(0, 2, (N, 1))
    plain = rc.Corpus(tokens, mask=mask, segments=segments)
    late = t - first * half >= np.take_along_axis(size, half, 1) // 2
    labels = np.where((segments == half) & late, -1, plain.label).astype(np.int32)
    corpus = rc.Corpus(tokens, labels, mask=mask, segments=segments)
    model = rc.Model(config, parameters(config, 89))
    return Setting(model, corpus, "blocks.*.attn.{k,v,o},blocks.*.mlp.*", batch=7, shards=4)


def cohere2_system() -> Setting:
    """Cohere 2: attention and a gated MLP read one norm, no biases, tied; eight heads on four.

    Windows and rotary positions in two blocks of three, neither in the third. All sequences begin
    with one system prompt; behind it are a question and an answer, which alone has labels, its EOS
    too. Programs pad on the left. Batches of 3, and one of 1.
    """
    config = variant(vocabulary=32, width=26, layers=3, heads=8, kv_heads=4, mlp_width=31,
                     norm="layer", norm_eps=4e-3, rope_theta=75.0, residual="shared",
                     windows=(4, 4, 0), rotary=("main", "main", "none"), tied=True)  # fmt: skip
    rng, N, T = np.random.default_rng(97), 28, 15
    prompt = 5 + rng.integers(1, 5, N)
    length = prompt + rng.integers(2, 7, N)
    tokens, next_token = texts(N, T, 32, 97), np.arange(1, T + 1)
    tokens[:, :5] = BOS, 19, 7, 28, 11
    tokens[np.arange(N), length - 1] = EOS
    mask = mask_of(length, T)
    plain = rc.Corpus(tokens, mask=mask)
    labels = np.where(next_token < prompt[:, None], -1, plain.label).astype(np.int32)
    corpus = rc.Corpus(tokens, labels, mask=mask)
    model = rc.Model(config, parameters(config, 97))
    return Setting(model, corpus, "blocks.*.attn.{q,k,v},blocks.{1,2}.mlp.*,head", batch=3,
                   left=True, marked=True, shards=3)  # fmt: skip


def esm2_tags() -> Setting:
    """ESM-2: bidirectional and rotary, LayerNorm, GELU without a gate, biases as columns.

    Tags instead of tokens: the first token of each word has one of seven, all others, BOS and EOS
    too, have none. Texts of 2 to 14 tokens; those of 2 have no label. Programs pad on the left.
    Batches of 12, and one of 10.
    """
    config = variant(vocabulary=16, width=20, kv_heads=4, mlp_width=50, norm="layer",
                     norm_bias=True, norm_eps=2e-3, rope_theta=70.0,
                     biases=("q", "k", "v", "o", "up", "down", "head"), gated=False,
                     activation="gelu", causal=False)  # fmt: skip
    rng, N, T = np.random.default_rng(101), 46, 14
    length, t = rng.integers(2, T + 1, N), np.arange(T)
    tokens = rng.integers(EOS + 1, 16, (N, T))
    tokens[:, 0], tokens[np.arange(N), length - 1] = BOS, EOS
    begins = (t == 1) | ((t > 1) & (rng.random((N, T)) < 0.55))
    asked = begins & (t < length[:, None] - 1)
    labels = np.where(asked, rng.integers(0, 7, (N, T)), -1).astype(np.int32)
    corpus = rc.Corpus(tokens, labels, mask=mask_of(length, T))
    model = rc.Model(config, parameters(config, 101))
    return Setting(model, corpus, "blocks.*.attn.{k,v,o},blocks.*.mlp.*,head", joint=True,
                   batch=12, left=True, marked=True, shards=3)  # fmt: skip


def vaultgemma_stream() -> Setting:
    """VaultGemma: norms before alone, gains of 1 + w, two soft-caps, one head of keys and values.

    A window in one block of two; q and o are square; an MLP narrower than the model; tied; few
    tokens. Documents stand in one stream, cut every 28 tokens, and see those before them. No label
    asks for a document's first token. Batches of 2, and one of 1.
    """
    config = variant(vocabulary=14, width=30, heads=3, kv_heads=1, head_width=10, mlp_width=22,
                     norm_offset=True, norm_eps=5e-3, rope_theta=400.0, activation="gelu_tanh",
                     score_scale=0.3, score_cap=2.0, logit_cap=3.0, windows=(0, 5), tied=True,
                     embed_scale=0.75)  # fmt: skip
    rng, N, T = np.random.default_rng(107), 17, 28
    begin = np.cumsum(rng.integers(2, 17, N * T))
    begin = np.r_[0, begin[begin < N * T]]
    stream = rng.integers(EOS + 1, 14, N * T)
    stream[begin], stream[begin[1:] - 1] = BOS, EOS
    tokens = stream.reshape(N, T)
    plain = rc.Corpus(tokens)
    labels = np.where(plain.label == BOS, -1, plain.label).astype(np.int32)
    model = rc.Model(config, parameters(config, 107))
    return Setting(model, rc.Corpus(tokens, labels), "blocks.*.attn.{q,v,o},blocks.1.mlp.*,head",
                   batch=2, marked=True, shards=4)  # fmt: skip


def _asking(tokens: Array, asked: Array) -> Array:
    """Labels of next tokens, where the next token is one of those that are asked for."""
    labels = np.full(tokens.shape, -1, np.int32)
    labels[:, :-1] = np.where(asked[:, 1:], tokens[:, 1:], -1)
    return labels


def starcoder2_fim() -> Setting:
    """StarCoder2: one window in all blocks, six heads on two, LayerNorm, biases as blocks, tied.

    Files of code stand in one sequence and see one another; EOS is behind each. Three of five are
    written for filling in the middle: PRE, prefix, SUF, suffix, MID, middle. Of these only the
    middle and EOS are asked for, of the others all. Batches of 8, and one of a single sequence;
    right padding.
    """
    config = variant(vocabulary=34, width=22, heads=6, mlp_width=41, norm="layer", norm_bias=True,
                     norm_eps=2e-3, rope_theta=130.0, windows=(6, 6),
                     biases=("q", "k", "v", "o", "up", "down"), gated=False,
                     activation="gelu_tanh", tied=True)  # fmt: skip
    rng, N, T = np.random.default_rng(109), 33, 21
    PRE, SUF, MID = 3, 4, 5
    tokens, asked = np.zeros((N, T), np.int64), np.zeros((N, T), bool)
    length = np.ones(N, int)
    tokens[:, 0] = BOS
    for n in range(N):
        while True:
            code, fim = rng.integers(MID + 1, 34, rng.integers(3, 9)), rng.random() < 0.6
            one, two = np.sort(rng.integers(0, len(code), 2))
            file = [*code, EOS]
            if fim:
                file = [PRE, *code[:one], SUF, *code[two:], MID, *code[one:two], EOS]
            end = length[n] + len(file)
            if end > T:
                break
            tokens[n, length[n] : end] = file
            asked[n, (end - (two - one) - 1 if fim else length[n]) : end] = True
            length[n] = end
    corpus = rc.Corpus(tokens, _asking(tokens, asked), mask=mask_of(length, T))
    model = rc.Model(config, parameters(config, 109))
    return Setting(model, corpus, "blocks.*.attn.*,blocks.1.mlp.*,head", marked=True, shards=4)


def stablelm_systems() -> Setting:
    """StableLM: LayerNorm and a gated MLP, half of a head rotary, biases of q, k and v as blocks.

    All layers are square but k and v, which have one head; three blocks. Chats of one to three
    turns under one of two system prompts, the shortest first. Answers alone have labels, their EOS
    too; some chats end in a question. Programs pad on the left. Batches of 6, and one of a single
    chat.
    """
    config = variant(vocabulary=18, layers=3, heads=3, kv_heads=1, head_width=8, mlp_width=24,
                     norm="layer", norm_bias=True, norm_eps=3e-3, rope_theta=110.0, rope_width=4,
                     biases=("q", "k", "v"))  # fmt: skip
    rng, N, T = np.random.default_rng(113), 31, 18
    systems, chats = ([BOS, 9, 14, 6], [BOS, 9, 4, 11, 16, 7]), []
    for _ in range(N):
        chat = [(token, False) for token in systems[rng.integers(2)]]
        for turn in range(rng.integers(1, 4)):
            said = [(token, False) for token in rng.integers(EOS + 1, 18, rng.integers(2, 4))]
            if not turn or rng.random() < 0.75:
                answer = [*rng.integers(EOS + 1, 18, rng.integers(1, 4)), EOS]
                said += [(token, True) for token in answer]
            if len(chat) + len(said) > T or (turn and not chat[-1][1]):
                break
            chat += said
        chats.append(chat)
    chats.sort(key=len)
    both = np.array([chat + [(0, False)] * (T - len(chat)) for chat in chats])
    tokens, mask = both[:, :, 0], mask_of(np.array([len(chat) for chat in chats]), T)
    corpus = rc.Corpus(tokens, _asking(tokens, both[:, :, 1] == 1), mask=mask)
    model = rc.Model(config, parameters(config, 113))
    return Setting(model, corpus, "blocks.{0,2}.attn.*,blocks.*.mlp.*", batch=6, left=True,
                   marked=True, shards=5)  # fmt: skip


def xglm_pairs() -> Setting:
    """XGLM: a table of positions with two rows that none reads, LayerNorm, biases as columns, tied.

    Translations, two in a sequence, which do not see one another: BOS, a source, EOS, its target,
    EOS. The languages have no token in common, and pairs go either way. Targets alone have labels,
    their EOS too. An MLP narrower than the model. Batches of 5, and one of a single sequence;
    padding behind.
    """
    config = variant(vocabulary=36, width=26, heads=5, kv_heads=5, head_width=4, mlp_width=19,
                     norm="layer", norm_bias=True, norm_eps=1e-3, rope_theta=None,
                     learned_positions=24, position_offset=2,
                     biases=("q", "k", "v", "o", "up", "down"), gated=False, activation="gelu",
                     embed_scale=0.6, tied=True)  # fmt: skip
    rng, N, T = np.random.default_rng(127), 31, 20
    tokens, segments = np.zeros((N, T), np.int64), np.zeros((N, T), np.int32)
    asked, length = np.zeros((N, T), bool), np.zeros(N, int)
    for n in range(N):
        for pair in range(2):
            sizes, first = rng.integers([2, 1], [4, 5]), rng.permutation([EOS + 1, 20])
            source, target = map(rng.integers, first, first + 16, sizes)
            begin, end = length[n], length[n] + sum(sizes) + 3
            tokens[n, begin:end] = [BOS, *source, EOS, *target, EOS]
            asked[n, end - len(target) - 1 : end] = True
            segments[n, begin:], length[n] = pair, end
    corpus = rc.Corpus(tokens, _asking(tokens, asked), mask=mask_of(length, T), segments=segments)
    model = rc.Model(config, parameters(config, 127))
    return Setting(model, corpus, "blocks.*.attn.{q,k,v},blocks.*.mlp.*,head", joint=True, batch=5,
                   marked=True, shards=4)  # fmt: skip


def eurobert_sentences() -> Setting:
    """EuroBERT: bidirectional, RMSNorm, SwiGLU, nine heads on three; a bias of the head, a column.

    A text is of sentences, BOS before each and EOS behind it, and each BOS has a label, one of
    five classes, half of them of one class; two texts have no label. One text has 14 sentences, the
    others one to four. Right padding, which is most of the corpus. Batches of 9, and one of a
    single text.
    """
    config = variant(vocabulary=21, width=22, heads=9, kv_heads=3, head_width=4, mlp_width=29,
                     norm_eps=2e-3, rope_theta=90.0, biases=("head",), causal=False)  # fmt: skip
    rng, N = np.random.default_rng(131), 28
    count = rng.integers(1, 5, N)
    count[11] = 14
    written = [
        [t for _ in range(k) for t in (BOS, *rng.integers(EOS + 1, 21, rng.integers(1, 4)), EOS)]
        for k in count
    ]
    length = np.array([len(text) for text in written])
    T = length.max()
    tokens = np.array([text + [0] * (T - len(text)) for text in written])
    classes = rng.choice(5, (N, T), p=(0.6, 0.2, 0.1, 0.07, 0.03))
    labels = np.where(tokens == BOS, classes, -1).astype(np.int32)
    labels[[5, 20]] = -1
    corpus = rc.Corpus(tokens, labels, mask=mask_of(length, T))
    model = rc.Model(config, parameters(config, 131))
    return Setting(model, corpus, "blocks.*.attn.{k,v,o},blocks.1.mlp.*,head", joint=True, batch=9,
                   marked=True, shards=5)  # fmt: skip


def glm_strided() -> Setting:
    """GLM: RMSNorm, half of a head rotary with linear scaling, biases of q, k and v as columns.

    Six heads on two. Long texts are read in windows of 22 tokens, 9 further each time, as is done
    to measure perplexity. A window has labels at what none before it had; the rest is context. So
    most windows begin within a text and have no BOS, and a token is read two or three times. The
    last window of a text ends in padding. Batches of 7, and one of a single window.
    """
    linear = RopeScaling(kind=Scaling.LINEAR, factor=4.0)
    config = variant(vocabulary=29, width=20, heads=6, mlp_width=34, norm_eps=3e-3,
                     rope_theta=25.0, rope_width=4, rope_scaling=linear,
                     biases=("q", "k", "v"))  # fmt: skip
    rng, T, stride = np.random.default_rng(139), 22, 9
    windows = []
    for size in (80, 57, 98, 71, 64):
        text, end = texts(1, size, 29, rng.integers(10**6))[0], 0
        for begin in range(0, size, stride):
            before, end = end, min(begin + T, size)
            asked = np.arange(begin, end) >= max(before, 1)
            windows.append((text[begin:end], asked))
            if end == size:
                break
    tokens = np.stack([np.pad(text, (0, T - len(text))) for text, _ in windows])
    asked = np.stack([np.pad(some, (0, T - len(some))) for _, some in windows])
    mask = mask_of(np.array([len(text) for text, _ in windows]), T)
    corpus = rc.Corpus(tokens, _asking(tokens, asked), mask=mask)
    model = rc.Model(config, parameters(config, 139))
    return Setting(model, corpus, "blocks.*.attn.{v,o},blocks.*.mlp.{gate,down},head", joint=True,
                   batch=7, marked=True, shards=3)  # fmt: skip


def exaone4_choices() -> Setting:
    """EXAONE 4: norms behind, a norm over each head, windows and rotary in three blocks of four.

    The fourth has neither. Heads are wider together than the model. Twelve questions, each there
    four times in a row with another answer of one to seven tokens, which alone has labels, as is
    done to test by multiple choice. Programs pad on the left. Batches of 7, which cut through the
    four, and one of 6.
    """
    config = variant(vocabulary=20, width=22, layers=4, head_width=8, mlp_width=26,
                     norm_place="post", qk_norm="head", norm_eps=1.0, rope_theta=350.0,
                     windows=(4, 4, 4, 0),
                     rotary=("main", "main", "main", "none"))  # fmt: skip
    rng, N, T = np.random.default_rng(149), 48, 16
    question = rng.integers(4, 10, 12).repeat(4)
    length = question + rng.integers(1, 8, N)
    tokens, t = rng.integers(EOS, 20, (N, T)), np.arange(T)
    tokens = np.where(t < question[:, None], texts(12, T, 20, 149).repeat(4, 0), tokens)
    asked = (t >= question[:, None]) & (t < length[:, None])
    corpus = rc.Corpus(tokens, _asking(tokens, asked), mask=mask_of(length, T))
    model = rc.Model(config, parameters(config, 150))
    return Setting(model, corpus, "blocks.{1,3}.attn.{q,o},blocks.*.mlp.*", batch=7, left=True,
                   marked=True, shards=4)  # fmt: skip


def imagegpt_clusters() -> Setting:
    """ImageGPT, but for its activation: RMSNorm, learned positions, biases as blocks, no gate.

    A start token and 24 pixels, each one of ten colours; neighbours are often alike, and four
    images have one colour alone. All sequences are equally long, no token is an end-of-text. Square
    attention. Two batches of 11.
    """
    config = variant(vocabulary=13, width=18, layers=3, heads=3, kv_heads=3, mlp_width=27,
                     norm_eps=4e-3, rope_theta=None, learned_positions=26,
                     biases=("q", "k", "v", "o", "up", "down"), gated=False,
                     activation="gelu_tanh")  # fmt: skip
    rng = np.random.default_rng(157)
    steps = rng.choice([-1, 0, 0, 0, 1], (22, 25)) * (rng.random((22, 1)) > 0.2)
    tokens = EOS + 1 + (rng.integers(0, 10, (22, 1)) + steps.cumsum(1)) % 10
    tokens[:, 0] = BOS
    model = rc.Model(config, parameters(config, 157))
    return Setting(model, rc.Corpus(tokens), "blocks.{0,2}.attn.*,blocks.1.mlp.*,head", batch=11,
                   shards=4)  # fmt: skip


def nomic_replaced() -> Setting:
    """Nomic BERT, but for its norms, which stand before: bidirectional, LayerNorm, SwiGLU.

    Rotary positions whose base grows with the text (dynamic scaling). Documents of 3 to 13 tokens
    are packed uncut. A quarter of their tokens were replaced, and each token has a label, the last
    one too: 1 if it was, else 0; no other class occurs. One document in eight has no label. The
    width is a multiple of 8, so that the last columns are padding alone. Batches of 10, the last
    one of 6.
    """
    dynamic = RopeScaling(kind=Scaling.DYNAMIC, factor=2.0, original=5)
    config = variant(vocabulary=24, width=20, heads=3, kv_heads=3, head_width=6, mlp_width=35,
                     norm="layer", norm_bias=True, norm_eps=2e-3, rope_theta=100.0,
                     rope_scaling=dynamic, causal=False)  # fmt: skip
    rng, N, T, fill = np.random.default_rng(163), 36, 24, 21
    tokens, segments = rng.integers(EOS + 1, 24, (N, T)), np.zeros((N, T), np.int32)
    labels, length = np.full((N, T), -1, np.int32), np.zeros(N, int)
    replaced = (rng.random((N, T)) < 0.25).astype(np.int32)
    for n in range(N):
        document = 0
        while (end := length[n] + rng.integers(3, 14)) <= fill:
            begin = length[n]
            tokens[n, begin], tokens[n, end - 1], segments[n, begin:] = BOS, EOS, document
            if rng.random() > 0.125:
                labels[n, begin:end] = replaced[n, begin:end]
            length[n], document = end, document + 1
    corpus = rc.Corpus(tokens, labels, mask=mask_of(length, T), segments=segments)
    model = rc.Model(config, parameters(config, 163))
    return Setting(model, corpus, "blocks.*.attn.{q,k},blocks.*.mlp.{up,down},head", batch=10,
                   marked=True, shards=4)  # fmt: skip


TUNED_ON = {
    "olmo2-equal": olmo2_equal,
    "olmo2-padded": olmo2_padded,
    "olmo2-square": olmo2_square,
    "gpt2-prompts": gpt2_prompts,
    "gpt2-joint": gpt2_joint,
    "gemma-packed": gemma_packed,
    "vit": vit,
    "llama-left": llama_left,
    "qwen-answers": qwen_answers,
    "neox-packed": neox_packed,
    "bigcode-single": bigcode_single,
    "gemma3-prompts": gemma3_prompts,
    "mistral-ragged": mistral_ragged,
    "opt-scattered": opt_scattered,
    "siglip-mean": siglip_mean,
    "phi-lengths": phi_lengths,
    "olmo-left": olmo_left,
    "gemma2-uneven": gemma2_uneven,
    "deit-two": deit_two,
    "gptj-few": gptj_few,
    "falcon-packed": falcon_packed,
    "olmo3-few": olmo3_few,
    "smollm3-chats": smollm3_chats,
    "modernbert-masked": modernbert_masked,
    "gptneo-repeated": gptneo_repeated,
    "internvit-some": internvit_some,
    "phi4-half": phi4_half,
    "cohere2-system": cohere2_system,
    "esm2-tags": esm2_tags,
    "vit22b-gray": vit22b_gray,
    "vaultgemma-stream": vaultgemma_stream,
    "starcoder2-fim": starcoder2_fim,
    "stablelm-systems": stablelm_systems,
    "xglm-pairs": xglm_pairs,
    "eurobert-sentences": eurobert_sentences,
    "eva-bands": eva_bands,
    "glm-strided": glm_strided,
    "exaone4-choices": exaone4_choices,
    "imagegpt-clusters": imagegpt_clusters,
    "nomic-replaced": nomic_replaced,
    "aimv2-sorted": aimv2_sorted,
}
HELD_OUT: dict[str, Callable[[], Setting]] = {}
GROUPS = {"tuned-on": TUNED_ON, "held-out": HELD_OUT}
"""README.md says when which were held out."""
SETTINGS = TUNED_ON | HELD_OUT
"""Name → maker."""
IMAGES = ("vit", "siglip-mean", "deit-two", "internvit-some", "vit22b-gray", "eva-bands",
          "aimv2-sorted")  # fmt: skip
TEXTS = tuple(name for name in SETTINGS if name not in IMAGES)
BIDIRECTIONAL = ("modernbert-masked", "esm2-tags", "eurobert-sentences", "nomic-replaced")
CAUSAL = tuple(name for name in TEXTS if name not in BIDIRECTIONAL)
"""Texts whose labels are the next tokens."""
