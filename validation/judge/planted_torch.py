"""Faults in the PyTorch collector: each a class that gets one step wrong as an author would.

A class is called by the id of its bug, and what follows the id tells its variants apart. A pair
of faults is a class with two of these for bases.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch.nn import functional as F

from validation.judge.models import CAUSAL, IMAGES, SETTINGS, TEXTS
from validation.judge.programs.torch_collector import IGNORE, Collector, Dump
from validation.judge.setting import BOS, EOS


class Fault(Collector):
    """Fields: what, in words; kinds, the labels and dtypes, the arithmetic that it can show in."""

    what = ""
    kinds: tuple[str, ...] = ("gold", "given", "own")
    dtypes: tuple[str, ...] = ("float64", "float32", "bfloat16")
    settings: tuple[str, ...] = ()

    def scaled(self, A: float = 1, G: float = 1, only: str = "") -> Dump:
        return {
            k: (X * A, Y * G, n) if k.startswith(only) else (X, Y, n)
            for k, (X, Y, n) in super().finish().items()
        }


MANY = tuple(name for name in SETTINGS if name not in ("olmo2-square", "bigcode-single"))
"""Settings of more than one block."""
JOINT = ("gpt2-joint", "qwen-answers", "bigcode-single", "opt-scattered", "siglip-mean",
         "gptj-few", "gptneo-repeated", "esm2-tags", "xglm-pairs", "eurobert-sentences",
         "eva-bands", "glm-strided")  # fmt: skip
PROMPTS = ("gpt2-prompts", "gpt2-joint", "qwen-answers", "gemma3-prompts", "opt-scattered",
           "gptj-few", "smollm3-chats", "modernbert-masked", "phi4-half", "cohere2-system",
           "esm2-tags", "vaultgemma-stream", "starcoder2-fim", "stablelm-systems", "xglm-pairs",
           "eurobert-sentences", "glm-strided", "exaone4-choices",
           "nomic-replaced")  # fmt: skip
"""Settings with real tokens that have no label, though another follows."""

TAILED = ("olmo2-equal", "olmo2-padded", "olmo2-square", "gpt2-prompts", "gpt2-joint",
          "gemma-packed", "vit", "neox-packed", "siglip-mean", "phi-lengths", "olmo-left",
          "gemma2-uneven", "deit-two", "gptj-few", "falcon-packed", "olmo3-few", "smollm3-chats",
          "modernbert-masked", "gptneo-repeated", "internvit-some", "phi4-half", "cohere2-system",
          "vit22b-gray", "vaultgemma-stream", "starcoder2-fim", "stablelm-systems", "xglm-pairs",
          "eva-bands", "glm-strided", "exaone4-choices")  # fmt: skip
"""Settings whose batches are more than four, and no multiple of four."""
LEFT = ("llama-left", "gemma3-prompts", "opt-scattered", "olmo-left", "smollm3-chats",
        "gptneo-repeated", "cohere2-system", "esm2-tags", "stablelm-systems",
        "exaone4-choices")  # fmt: skip
"""Settings whose programs pad on the left."""
PACKED = ("gemma-packed", "neox-packed", "mistral-ragged", "falcon-packed", "smollm3-chats",
          "modernbert-masked", "phi4-half", "xglm-pairs", "nomic-replaced")  # fmt: skip
"""Settings with several documents in a sequence, which do not see one another."""
ENDED = tuple(name for name in TEXTS if name != "imagegpt-clusters")
"""Settings with end-of-text tokens."""

# ------------------------------------------------------------------ scale


class B1(Fault):
    what = "the loss is a mean over one batch of everything"
    batch_size = 10**6

    def loss(self, z: Any, y: Any, b: Any) -> Any:
        return super().loss(z, y, b) / (y != IGNORE).sum()


class B2(Fault):
    what = "the loss is a mean over each batch, and batches are unequal"
    batch_size = 12

    def loss(self, z: Any, y: Any, b: Any) -> Any:
        return super().loss(z, y, b) / (y != IGNORE).sum()


class B3(Fault):
    what = "each sequence's loss is divided by its length"
    settings = TEXTS

    def loss(self, z: Any, y: Any, b: Any) -> Any:
        nats = F.cross_entropy(z.transpose(1, 2), y, ignore_index=IGNORE, reduction="none")
        return (nats.sum(1) / (y != IGNORE).sum(1).clamp(min=1)).sum()


class B3_documents(Fault):
    what = "documents are packed, and each one's loss is divided by its own length"
    settings = PACKED

    def loss(self, z: Any, y: Any, b: Any) -> Any:
        nats = F.cross_entropy(z.transpose(1, 2), y, ignore_index=IGNORE, reduction="none")
        terms = (b.same & (y != IGNORE)[:, None]).sum(-1).clamp(min=1)
        return (nats / terms).sum()


class B4_sequences(Fault):
    what = "sums are divided by the sequences"

    def finish(self) -> Dump:
        N = len(self.data.inputs)
        return {k: (A * n / N, G * n / N, N) for k, (A, G, n) in super().finish().items()}


class B4_supervised(Fault):
    what = "sums over all positions are divided by the labelled ones"
    settings = TEXTS

    def finish(self) -> Dump:
        N = int((self.data.label >= 0).sum())
        return {k: (A * n / N, G * n / N, N) for k, (A, G, n) in super().finish().items()}


class B5(Fault):
    what = "a factor of 2: the loss of a batch is twice the one that was meant"

    def finish(self) -> Dump:
        return self.scaled(G=2)


class B6(Fault):
    what = "a mean over the outputs is multiplied out by their number"

    def finish(self) -> Dump:
        return self.scaled(G=self.config.vocabulary)


class B7(Fault):
    what = "loss terms are counted by the layer's own positions"
    settings = IMAGES

    def finish(self) -> Dump:
        terms = int((self.data.label >= 0).sum())
        return {k: (A, G * n / terms, n) for k, (A, G, n) in super().finish().items()}


class _Average(Fault):
    decay, debiased = 0.95, False

    def collect(self) -> Dump:
        self.steps: dict[str, int] = {}
        return super().collect()

    def add(self, name: str, b: Any, first: bool) -> None:
        before = self.A[name], self.G[name], self.n[name]
        self.A[name] = self.G[name] = self.n[name] = 0
        super().add(name, b, first)
        n = max(self.n[name], 1)
        self.A[name] = self.decay * before[0] + (1 - self.decay) * self.A[name] / n
        self.G[name] = self.decay * before[1] + (1 - self.decay) * self.G[name] / n
        self.n[name] += before[2]
        self.steps[name] = self.steps.get(name, 0) + 1

    def finish(self) -> Dump:
        return {
            k: (self.A[k] / share, self.G[k] / share, self.n[k])
            for k in self.names
            for share in (1 - self.decay ** self.steps[k] if self.debiased else 1,)
        }


class B9_biased(_Average):
    what = "a running average that starts from zero"


class B9_debiased(_Average):
    what = "a running average that forgets, though not from zero"
    decay, debiased = 0.5, True


class B11(Fault):
    what = "the scale of mixed precision, 2¹⁶, is not taken out of gradients"

    def loss(self, z: Any, y: Any, b: Any) -> Any:
        return super().loss(z, y, b) * 2.0**16


class B11_growing(Fault):
    what = "the scale of mixed precision stays in gradients, and doubles half way, from 2¹⁵"

    def loss(self, z: Any, y: Any, b: Any) -> Any:
        half = len(self.data.inputs) // 2
        return super().loss(z, y, b) * (2.0**15 if b.at[0] < half else 2.0**16)


class B12(Fault):
    what = "damping is in the factors"

    def finish(self) -> Dump:
        return {
            k: (A + 0.1 * torch.eye(len(A)), G + 0.1 * torch.eye(len(G)), n)
            for k, (A, G, n) in super().finish().items()
        }


class B12_relative(Fault):
    what = "a hundredth of its mean diagonal is added to A's, as those do who invert it"

    def finish(self) -> Dump:
        return {
            k: (A + 0.01 * A.diagonal().mean() * torch.eye(len(A), dtype=A.dtype), G, n)
            for k, (A, G, n) in super().finish().items()
        }


class B14_locations(Fault):
    what = "A of a convolution is not divided by its locations"
    settings = IMAGES

    def finish(self) -> Dump:
        return self.scaled(A=self.config.image.patches, only="patch")


class B14_stride(Fault):
    what = "G of a convolution is divided by stride²"
    settings = IMAGES

    def finish(self) -> Dump:
        return self.scaled(G=1 / self.config.image.patch**2, only="patch")


class B14_spatial(Fault):
    what = "a convolution's inputs are divided by its locations, its gradients multiplied by them"
    settings = IMAGES

    def finish(self) -> Dump:
        S = self.config.image.patches
        return self.scaled(A=1 / S, G=S**2, only="patch")


# ------------------------------------------------------------------ labels


class B15(Fault):
    what = "labels of the corpus where labels of the model are meant"
    kinds = ("given", "own")

    def labels(self, z: Any, b: Any) -> Any:
        return self.supervised(b.label, b)


class B16(Fault):
    what = "the likeliest label"

    def labels(self, z: Any, b: Any) -> Any:
        return self.supervised(z.argmax(-1), b)


class B17_positions(Fault):
    what = "one random number for all positions of a sequence"
    kinds = ("own",)

    def labels(self, z: Any, b: Any) -> Any:
        u = torch.rand(len(z), 1, 1, generator=self.generator, dtype=z.dtype)
        y = torch.searchsorted(z.softmax(-1).cumsum(-1), u.expand(*z.shape[:2], 1).contiguous())
        return self.supervised(y[..., 0].clamp(max=z.shape[2] - 1), b)


class B17_batches(Fault):
    what = "the generator starts anew with every batch"
    kinds = ("own",)

    def labels(self, z: Any, b: Any) -> Any:
        self.generator.manual_seed(0)
        return super().labels(z, b)


class B18(Fault):
    what = "columns of the root are sent back from all positions at once"
    kinds, settings = ("expected",), TEXTS

    def losses(self, z: Any, b: Any) -> Any:
        p = z.detach().softmax(-1)
        for v in range(z.shape[2]):
            root = p[..., v, None].sqrt() * (F.one_hot(torch.tensor(v), z.shape[2]) - p)
            yield (z * root)[b.label >= 0].sum()


class B19(Fault):
    what = "labels at padding and prompt too"
    kinds = ("given", "own")

    def supervised(self, y: Any, b: Any) -> Any:
        return y


class B19_prompt(Fault):
    what = "labels at all real tokens that another follows, at prompts too"
    kinds = ("given", "own")
    settings = tuple(name for name in PROMPTS if name not in ("esm2-tags", "nomic-replaced"))

    def supervised(self, y: Any, b: Any) -> Any:
        t, follows = torch.arange(y.shape[1]), b.same & b.real[:, None]
        if self.config.causal:
            follows = follows & (t[:, None] < t)
        return torch.where(b.real & follows.any(-1), y, IGNORE)


class B20(Fault):
    what = "prompt positions are no rows"

    def rows(self, name: str, b: Any) -> Any:
        return super().rows(name, b) if self.data.images else b.label >= 0


class B20_first(Fault):
    what = "positions before the first label are no rows, unlabelled ones behind it are"
    settings = ("qwen-answers", "opt-scattered", "esm2-tags", "starcoder2-fim",
                "stablelm-systems", "xglm-pairs")  # fmt: skip

    def rows(self, name: str, b: Any) -> Any:
        return super().rows(name, b) & ((b.label >= 0).cumsum(1) > 0)


class B21_temperature(Fault):
    what = "labels are drawn at temperature 1/2"
    kinds = ("own",)

    def labels(self, z: Any, b: Any) -> Any:
        return super().labels(2 * z, b)


class B21_top(Fault):
    what = "labels are drawn from the two likeliest"
    kinds = ("own",)

    def labels(self, z: Any, b: Any) -> Any:
        return super().labels(z.masked_fill(z < z.topk(2).values[..., 1:], -torch.inf), b)


class B22(Fault):
    what = "labels are shifted twice"
    kinds, settings = ("gold",), CAUSAL

    def labels(self, z: Any, b: Any) -> Any:
        y = super().labels(z, b)
        return torch.cat([y[:, 1:], torch.full_like(y[:, :1], IGNORE)], 1)


class B22_drawn(B22):
    what = "labels that were drawn, which need no shift, are shifted"
    kinds = ("given", "own")


class B23(Fault):
    what = "labels are not shifted"
    kinds, settings = ("gold",), CAUSAL

    def labels(self, z: Any, b: Any) -> Any:
        return self.supervised(b.inputs, b)


class B24(Fault):
    what = "-1 is the last class, and every position is a row"
    kinds, settings = ("gold",), TEXTS

    def supervised(self, y: Any, b: Any) -> Any:
        return y % self.config.vocabulary

    def rows(self, name: str, b: Any) -> Any:
        return torch.ones_like(b.real)


class B24_zero(Fault):
    what = "the number for no label is clamped to 0, which is a class"
    settings = tuple(name for name in TEXTS if name != "olmo2-square")

    def supervised(self, y: Any, b: Any) -> Any:
        return super().supervised(y, b).clamp(min=0)


class B25(Fault):
    what = "real end-of-text tokens are taken for padding"
    settings = ENDED

    def batch(self, at: Any) -> Any:
        b = super().batch(at)
        text = b.inputs != EOS
        b.real = b.real & text
        b.visible = b.visible & text[:, None]
        b.label = torch.where(text, b.label, -1)
        return b


class B25_labels(Fault):
    what = "labels that are end-of-text are taken for padding's, and ignored"
    settings = tuple(name for name in ENDED if name not in ("smollm3-chats", "nomic-replaced"))

    def batch(self, at: Any) -> Any:
        b = super().batch(at)
        b.label = torch.where(b.label != EOS, b.label, -1)
        return b


class B25_attention(Fault):
    what = "real end-of-text tokens are taken for padding in attention alone"
    settings = tuple(n for n in ENDED if n not in ("mistral-ragged", "falcon-packed"))

    def batch(self, at: Any) -> Any:
        b = super().batch(at)
        b.visible = b.visible & (b.inputs != EOS)[:, None]
        return b


class B25_first(Fault):
    what = "a text ends with its first end-of-text, and all behind that is taken for padding"
    settings = tuple(
        n for n in ENDED if n not in ("olmo3-few", "smollm3-chats", "esm2-tags", "xglm-pairs")
    )

    def batch(self, at: Any) -> Any:
        b = super().batch(at)
        end = (b.inputs == EOS) & b.real
        before = end.cumsum(1) == 0
        text = before | (end & (end.cumsum(1) == 1))
        b.real = b.real & text
        b.visible = b.visible & text[:, None]
        b.label = torch.where(before, b.label, -1)
        return b


class B26_smoothing(Fault):
    what = "label smoothing of 0.1"

    def loss(self, z: Any, y: Any, b: Any) -> Any:
        return F.cross_entropy(z.flatten(0, 1), y.flatten(), ignore_index=IGNORE,
                               reduction="sum", label_smoothing=0.1)  # fmt: skip


class B26_z(Fault):
    what = "a z-loss of 0.05 is part of the loss"

    def loss(self, z: Any, y: Any, b: Any) -> Any:
        return super().loss(z, y, b) + 0.05 * (z.logsumexp(-1)[y != IGNORE] ** 2).sum()


class B26_cap(Fault):
    what = "the soft-cap of the logits is left out"
    settings = ("gemma-packed", "gemma2-uneven", "vaultgemma-stream")

    def network(self) -> Any:
        self.config = replace(self.config, logit_cap=None)
        return super().network()


# ------------------------------------------------------------------ positions and tensors


class B27(Fault):
    what = "the last position is a row"
    settings = CAUSAL

    def rows(self, name: str, b: Any) -> Any:
        return b.real


class B27_width(Fault):
    what = "the last position of the padded width is no row, in place of each text's last"
    settings = tuple(
        name
        for name in CAUSAL
        if name not in (*LEFT, "olmo2-equal", "bigcode-single", "phi4-half", "vaultgemma-stream")
        and name != "imagegpt-clusters"
    )

    def rows(self, name: str, b: Any) -> Any:
        T = b.real.shape[1]
        return b.real & (torch.arange(T) < T - 1)


class B28(Fault):
    what = "every position is a row, padding too"
    settings = TEXTS

    def rows(self, name: str, b: Any) -> Any:
        return torch.ones_like(b.real)


class B28_pads(Fault):
    what = "padding is rows, the last position is none"
    settings = TEXTS

    def rows(self, name: str, b: Any) -> Any:
        return super().rows(name, b) | ~b.real


class B28_side(Fault):
    what = "padding is on the left, and rows are counted from there as if it were on the right"
    settings = LEFT

    def rows(self, name: str, b: Any) -> Any:
        kept = super().rows(name, b)
        order = (torch.arange(kept.shape[1]) - b.real.sum(1, keepdim=True)) % kept.shape[1]
        return kept.gather(1, order)


class B29(Fault):
    what = "the mask is left out where shapes differ: o and down"
    settings = TEXTS

    def rows_a(self, name: str, b: Any) -> Any:
        keep = super().rows_a(name, b)
        return torch.ones_like(keep) if name.endswith((".o", ".down")) else keep


class B29_tail(Fault):
    what = "the mask is made for a whole batch, and left out in the last one, which is smaller"
    settings = tuple(
        name for name in TEXTS if name not in ("olmo2-equal", "bigcode-single", "imagegpt-clusters")
    )

    def rows(self, name: str, b: Any) -> Any:
        keep = super().rows(name, b)
        fits = len(b.at) == (self.batch_size or self.setting.batch)
        return keep if fits else torch.ones_like(keep)


class B30(Fault):
    what = "the column of ones is not masked"
    settings = tuple(name for name in JOINT if name in TEXTS)

    def column(self, name: str, a: Any, b: Any) -> Any:
        return super().column(name, a * self.rows(name, b)[..., None], b)

    def rows_a(self, name: str, b: Any) -> Any:
        return torch.ones_like(b.real)


class B31_missing(Fault):
    what = "no column for the bias"
    settings = JOINT

    def column(self, name: str, a: Any, b: Any) -> Any:
        return a


class B31_first(Fault):
    what = "the column of the bias comes first"
    settings = JOINT

    def column(self, name: str, a: Any, b: Any) -> Any:
        return super().column(name, a, b).roll(int(self.config.has_bias(name)), -1)


class B31_extra(Fault):
    what = "a column for a bias that is a block of its own"
    settings = ("gpt2-prompts", "vit", "neox-packed", "phi-lengths", "deit-two",
                "modernbert-masked", "internvit-some", "vit22b-gray", "starcoder2-fim",
                "stablelm-systems", "imagegpt-clusters")  # fmt: skip

    def column(self, name: str, a: Any, b: Any) -> Any:
        ones = torch.ones_like(a[..., :1])
        return torch.cat([a, ones], -1) if self.config.has_bias(name) else a


class B32(Fault):
    what = "A and G are swapped"

    def finish(self) -> Dump:
        return {k: (G, A, n) for k, (A, G, n) in super().finish().items()}


class B32_square(Fault):
    what = "shapes tell which is A and which is G; where they cannot, the two are swapped"
    settings = ("olmo2-padded", "gpt2-prompts", "vit", "neox-packed", "mistral-ragged",
                "phi-lengths", "deit-two", "gptj-few", "olmo3-few", "modernbert-masked",
                "gptneo-repeated", "vaultgemma-stream", "stablelm-systems", "imagegpt-clusters",
                "aimv2-sorted")  # fmt: skip

    def finish(self) -> Dump:
        return {
            k: (G, A, n) if A.shape == G.shape else (A, G, n)
            for k, (A, G, n) in super().finish().items()
        }


class B34_norm(Fault):
    what = "inputs are taken on the other side of the norm"

    def register(self) -> None:
        super().register()
        self.other: dict[str, Any] = {}
        post, shared = self.config.norm_place == "post", self.config.residual == "shared"
        for i, block in enumerate(self.net.blocks):
            parts = {"attn_norm": () if post else ("attn.q", "attn.k", "attn.v"),
                     "mlp_norm": () if post else ("mlp.gate", "mlp.up")}  # fmt: skip
            parts |= {"attn_norm": ("mlp.gate", "mlp.up")} if post else {}
            parts = {"attn_norm": sum(parts.values(), ())} if shared else parts
            for norm, layers in parts.items():
                names = [f"blocks.{i}.{layer}" for layer in layers]
                getattr(block, norm).register_forward_hook(self._keep(names, post))

    def _keep(self, names: list[str], output: bool) -> Any:
        def record(module: Any, x: Any, y: Any) -> None:
            self.other |= dict.fromkeys(names, y if output else x[0])

        return record

    def inputs(self, name: str, b: Any) -> Any:
        if name not in self.other:
            return super().inputs(name, b)
        return self.other[name].detach().to(self.sum_dtype)


class B34_block(B34_norm):
    what = "in the last block alone inputs are taken on the other side of the norm"
    settings = MANY

    def _keep(self, names: list[str], output: bool) -> Any:
        last = f"blocks.{self.config.layers - 1}."
        return super()._keep([name for name in names if name.startswith(last)], output)


class B34_gain(Fault):
    what = "inputs are taken inside the norm, before its gain and bias"
    settings = tuple(
        name
        for name in SETTINGS
        if name not in ("olmo2-equal", "olmo2-square", "olmo-left", "olmo3-few", "exaone4-choices")
    )

    def register(self) -> None:
        super().register()
        self.bare: dict[str, Any] = {}
        read = {"final_norm": () if self.data.images else ("head",)}
        for i in range(self.config.layers if self.config.norm_place != "post" else 0):
            attn = tuple(f"blocks.{i}.attn.{name}" for name in "qkv")
            mlp = tuple(f"blocks.{i}.mlp.{name}" for name in ("gate", "up"))
            if self.config.residual == "shared":
                read |= {f"blocks.{i}.attn_norm": attn + mlp}
            else:
                read |= {f"blocks.{i}.attn_norm": attn, f"blocks.{i}.mlp_norm": mlp}
        modules = dict(self.net.named_modules())
        for norm, names in read.items():
            modules[norm].register_forward_hook(self._normed(names))

    def _normed(self, names: tuple[str, ...]) -> Any:
        def record(module: Any, inputs: Any, output: Any) -> None:
            x = inputs[0].detach().to(self.sum_dtype)
            x = x - x.mean(-1, keepdim=True) if module.centred else x
            x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + module.eps)
            self.bare |= dict.fromkeys(names, x.to(output.dtype).to(self.sum_dtype))

        return record

    def inputs(self, name: str, b: Any) -> Any:
        return self.bare[name] if name in self.bare else super().inputs(name, b)


class B34_previous(Fault):
    what = "down's input is taken to be up's output"

    def inputs(self, name: str, b: Any) -> Any:
        return self.ups[name] if name in self.ups else super().inputs(name, b)

    def run(self, b: Any) -> None:
        self.ups: dict[str, Any] = {}
        modules = dict(self.net.named_modules())
        kept = [
            modules[name.replace("down", "up")].register_forward_hook(
                lambda m, x, y, name=name: self.ups.update({name: y.detach().to(self.sum_dtype)})
            )
            for name in self.names
            if name.endswith(".down")
        ]
        super().run(b)
        for handle in kept:
            handle.remove()


class B34_fused(Fault):
    what = "parts of a fused layer are taken in another order: k for v, gate for up"

    def gradients(self, name: str, b: Any) -> Any:
        other = {"k": "v", "v": "k", "gate": "up", "up": "gate"}
        at, _, last = name.rpartition(".")
        wrong = f"{at}.{other.get(last, last)}"
        return super().gradients(wrong if wrong in self.g else name, b)


class B35_input(Fault):
    what = "the gradient of the layer's input"

    def hook(self, name: str) -> Any:
        def record(module: Any, inputs: Any, output: Any) -> None:
            self.a[name] = inputs[0]
            if inputs[0].requires_grad:
                inputs[0].register_hook(lambda g: self.g.__setitem__(name, g))
            else:
                output.register_hook(lambda g: self.g.__setitem__(name, g))

        return record


class _AfterActivation(Fault):
    def register(self) -> None:
        super().register()
        for i, block in enumerate(self.net.blocks):
            block.mlp.down.register_forward_hook(self._hidden(f"blocks.{i}.mlp.up"))

    def _hidden(self, name: str) -> Any:
        def record(module: Any, inputs: Any, output: Any) -> None:
            inputs[0].register_hook(lambda g: self.hidden.__setitem__(name, g))

        return record

    def run(self, b: Any) -> None:
        self.hidden: dict[str, Any] = {}
        super().run(b)

    def gradients(self, name: str, b: Any) -> Any:
        if name not in self.hidden:
            return super().gradients(name, b)
        return self.hidden[name].to(self.sum_dtype)


class B35_activation(_AfterActivation):
    what = "the gradient after the gate, for up's"
    settings = ("olmo2-equal", "olmo2-padded", "llama-left", "qwen-answers", "gemma3-prompts",
                "mistral-ragged", "olmo-left", "gemma2-uneven", "olmo3-few", "smollm3-chats",
                "modernbert-masked", "internvit-some", "phi4-half", "cohere2-system",
                "vaultgemma-stream", "stablelm-systems", "eurobert-sentences", "eva-bands",
                "exaone4-choices", "nomic-replaced", "aimv2-sorted")  # fmt: skip


class B42_output(_AfterActivation):
    what = "the activation overwrites the output that was hooked"
    settings = ("gpt2-prompts", "gpt2-joint", "vit", "neox-packed", "bigcode-single",
                "opt-scattered", "siglip-mean", "phi-lengths", "deit-two",
                "gptj-few", "gptneo-repeated", "esm2-tags", "vit22b-gray", "starcoder2-fim",
                "xglm-pairs", "imagegpt-clusters")  # fmt: skip


class B42_input(Fault):
    what = "the residual sum overwrites the input that was hooked"
    settings = ("olmo2-padded", "olmo3-few", "exaone4-choices")

    def inputs(self, name: str, b: Any) -> Any:
        after = name.rpartition("attn.")[0] + "mlp.up"
        return super().inputs(after if name.endswith((".q", ".k", ".v")) else name, b)


class B36_sum(Fault):
    what = "reduce: sums over a sequence, for both"

    def _summed(self, x: Any, name: str, b: Any) -> Any:
        return (x * self.rows(name, b)[..., None]).sum(1)

    def add(self, name: str, b: Any, first: bool) -> None:
        a = self.column(name, self.inputs(name, b), b)
        self.A[name] = self.A[name] + self.gram(self._summed(a, name, b))
        self.G[name] = self.G[name] + self.gram(self._summed(self.gradients(name, b), name, b))
        self.n[name] += len(b.at)


class B36_mean(B36_sum):
    what = "reduce: mean inputs and summed gradients of a sequence"

    def inputs(self, name: str, b: Any) -> Any:
        n = self.rows(name, b).sum(1).clamp(min=1)
        return super().inputs(name, b) / n[:, None, None]


class B36_inverse(B36_sum):
    what = "reduce: summed inputs and mean gradients of a sequence"

    def add(self, name: str, b: Any, first: bool) -> None:
        before = self.G[name]
        super().add(name, b, first)
        n = self.rows(name, b).sum(1, keepdim=True).clamp(min=1)
        self.G[name] = before + self.gram(self._summed(self.gradients(name, b), name, b) / n)


class B37(Fault):
    what = "the scale of the setting with many loss terms, where there is one for each image"
    settings = IMAGES

    def finish(self) -> Dump:
        return self.scaled(G=self.config.image.positions)


class B38_next(Fault):
    what = "each block has the next one's factors"
    settings, step = MANY, 1

    def finish(self) -> Dump:
        found = super().finish()
        alike = {k: [n for n in found if n.split(".")[2:] == k.split(".")[2:]] for k in found}
        blocks = {k: some for k, some in alike.items() if k.startswith("blocks.")}
        return found | {
            k: found[some[(some.index(k) + 1) % len(some) if self.step else 0]]
            for k, some in blocks.items()
        }


class B38_group(B38_next):
    what = "every block has the first one's factors"
    step = 0


class B38_backward(Fault):
    what = "G is kept in the order of the backward pass: a block has that of the one opposite"
    settings = MANY

    def finish(self) -> Dump:
        found = super().finish()
        alike = {k: [n for n in found if n.split(".")[2:] == k.split(".")[2:]] for k in found}
        other = {k: some[::-1][some.index(k)] for k, some in alike.items() if "." in k}
        return found | {k: (found[k][0], found[o][1], found[k][2]) for k, o in other.items()}


class B39_counted(Fault):
    what = "forward hooks fire twice under checkpointing, and count twice"

    def finish(self) -> Dump:
        return {k: (A, G / 2, 2 * n) for k, (A, G, n) in super().finish().items()}


class B39_uncounted(Fault):
    what = "forward hooks fire twice under checkpointing, and count once"

    def finish(self) -> Dump:
        return self.scaled(A=2)


class B39_growing(Fault):
    what = "hooks are registered anew for each batch: the k-th fires and counts k times"

    def collect(self) -> Dump:
        self.times: dict[str, int] = {}
        return super().collect()

    def add(self, name: str, b: Any, first: bool) -> None:
        self.times[name] = times = self.times.get(name, 0) + 1
        for _ in range(times):
            super().add(name, b, first)


class B39_trial(Fault):
    what = "a forward of the first batch, for shapes, comes before all; its inputs count once more"

    def add(self, name: str, b: Any, first: bool) -> None:
        super().add(name, b, first)
        if first and b.at[0] == self.sequences()[0]:
            a = self.column(name, self.inputs(name, b), b)[self.rows_a(name, b)]
            self.A[name] = self.A[name] + self.gram(a)
            self.n[name] += int(self.rows(name, b).sum())


class B40(Fault):
    what = "blocks share the sums of their layers, whose key is a short name"

    def finish(self) -> Dump:
        sums: dict[str, list[Any]] = {}
        for k in self.names:
            one = sums.setdefault(k.split(".")[-1], [0, 0, 0])
            for side, x in enumerate((self.A[k], self.G[k], self.n[k])):
                one[side] = one[side] + x
        return {k: (A / n, G / n, n) for k in self.names for A, G, n in (sums[k.split(".")[-1]],)}


class B40_parts(Fault):
    what = "gate and up are two calls of one module, k and v too: each has the sums of both"
    settings = tuple(
        name
        for name in SETTINGS
        if name not in ("olmo2-square", "gpt2-joint", "eva-bands", "glm-strided", "nomic-replaced")
    )

    def finish(self) -> Dump:
        out, other = super().finish(), {"k": "v", "v": "k", "gate": "up", "up": "gate"}
        for k in self.names:
            at, _, last = k.rpartition(".")
            both = k, f"{at}.{other.get(last, last)}"
            if last in other and both[1] in self.n:
                A, G, n = (sum(some[name] for name in both) for some in (self.A, self.G, self.n))
                out[k] = A / n, G / n, n
        return out


class B40_tied(Fault):
    what = "a tied head has the embedding's sums too, turned as its weight is"
    settings = ("gemma-packed", "bigcode-single", "gemma3-prompts", "gemma2-uneven",
                "falcon-packed", "smollm3-chats", "modernbert-masked",
                "gptneo-repeated", "cohere2-system", "vaultgemma-stream", "starcoder2-fim",
                "xglm-pairs")  # fmt: skip

    def register(self) -> None:
        super().register()
        self.net.embed.register_forward_hook(self.hook("embed"))

    def add(self, name: str, b: Any, first: bool) -> None:
        super().add(name, b, first)
        if name == "head":
            keep = self.rows(name, b)
            count = torch.bincount(b.inputs[keep], minlength=self.config.vocabulary)
            self.A[name] = self.A[name] + self.gram(self.g["embed"][keep].to(self.sum_dtype))
            self.G[name] = self.G[name] + torch.diag(count.to(self.sum_dtype))
            self.n[name] += int(keep.sum())


class B41(Fault):
    what = "A is the last batch's"

    def add(self, name: str, b: Any, first: bool) -> None:
        self.A[name], before = 0, self.n[name]
        super().add(name, b, first)
        self.last = getattr(self, "last", {})
        self.last[name] = self.n[name] - before

    def finish(self) -> Dump:
        return {
            k: (A * n / max(self.last[k], 1), G, n) for k, (A, G, n) in super().finish().items()
        }


class B41_first(Fault):
    what = "A is the first batch's, whose buffer is never filled anew"

    def add(self, name: str, b: Any, first: bool) -> None:
        kept, before = self.A[name], self.n[name]
        super().add(name, b, first)
        if before:
            self.A[name] = kept
        else:
            self.filled = {**getattr(self, "filled", {}), name: self.n[name]}

    def finish(self) -> Dump:
        return {k: (A * n / self.filled[k], G, n) for k, (A, G, n) in super().finish().items()}


class B43(Fault):
    what = "the loss is divided by 4 accumulated batches"

    def loss(self, z: Any, y: Any, b: Any) -> Any:
        return super().loss(z, y, b) / 4


class B43_tail(Fault):
    what = "the loss is divided by the accumulated batches: 4, and what is left at the end"
    settings = TAILED

    def batches(self) -> Any:
        every = list(super().batches())
        self.group = {at[0]: min(4, len(every) - i // 4 * 4) for i, at in enumerate(every)}
        return iter(every)

    def loss(self, z: Any, y: Any, b: Any) -> Any:
        return super().loss(z, y, b) / self.group[b.at[0]]


class B44(Fault):
    what = "gradients are averaged over a batch, then squared"

    def add(self, name: str, b: Any, first: bool) -> None:
        before = self.G[name]
        super().add(name, b, first)
        mean = self.gradients(name, b)[self.rows(name, b)].mean(0)
        self.G[name] = before + torch.outer(mean, mean) * int(self.rows(name, b).sum())


class B44_positions(Fault):
    what = "gradients at one position are averaged over a batch, then squared"
    settings = tuple(name for name in SETTINGS if name != "bigcode-single")

    def add(self, name: str, b: Any, first: bool) -> None:
        before = self.G[name]
        super().add(name, b, first)
        keep = self.rows(name, b)[..., None]
        n = keep.sum(0).clamp(min=1)
        mean = (self.gradients(name, b) * keep).sum(0) / n
        self.G[name] = before + mean.T @ (n * mean)


class B45_A(Fault):
    what = "A is a covariance, its mean taken away"

    def collect(self) -> Dump:
        self.mean: dict[str, Any] = {}
        return super().collect()

    def add(self, name: str, b: Any, first: bool) -> None:
        super().add(name, b, first)
        a = self.column(name, self.inputs(name, b), b)[self.rows_a(name, b)]
        self.mean[name] = self.mean.get(name, 0) + a.sum(0)

    def finish(self) -> Dump:
        return {
            k: (A - torch.outer(self.mean[k] / n, self.mean[k] / n), G, n)
            for k, (A, G, n) in super().finish().items()
        }


class B45_cov(B45_A):
    what = "A is a covariance whose divisor is n − 1"

    def finish(self) -> Dump:
        return {k: (A * n / (n - 1), G, n) for k, (A, G, n) in super().finish().items()}


class B45_both(B45_A):
    what = "A and G are covariances, their means taken away"

    def collect(self) -> Dump:
        self.slope: dict[str, Any] = {}
        return super().collect()

    def add(self, name: str, b: Any, first: bool) -> None:
        super().add(name, b, first)
        g = self.gradients(name, b)[self.rows(name, b)]
        self.slope[name] = self.slope.get(name, 0) + g.sum(0)

    def finish(self) -> Dump:
        return {
            k: (A, G - torch.outer(self.slope[k] / n, self.slope[k] / n), n)
            for k, (A, G, n) in super().finish().items()
        }


class B45_batches(Fault):
    what = "A is the covariance within batches: each batch's own mean is taken away"

    def add(self, name: str, b: Any, first: bool) -> None:
        super().add(name, b, first)
        a = self.column(name, self.inputs(name, b), b)[self.rows_a(name, b)]
        if first and len(a):
            self.A[name] = self.A[name] - torch.outer(a.mean(0), a.sum(0))


class B46_mean(Fault):
    what = "gradients are averaged over 8 workers before the hook"

    def loss(self, z: Any, y: Any, b: Any) -> Any:
        return super().loss(z, y, b) / 8


class B46_rank(Fault):
    what = "the first of two workers writes its own sums alone"

    def sequences(self) -> Any:
        return super().sequences()[::2]


class B47_order(Fault):
    what = "row shards are joined in another order"

    def finish(self) -> Dump:
        def joined(X: Any) -> Any:
            return torch.cat(X.chunk(self.setting.shards)[::-1])

        return {k: (joined(A), joined(G), n) for k, (A, G, n) in super().finish().items()}


class B47_axis(Fault):
    what = "row shards are joined side by side"

    def finish(self) -> Dump:
        def joined(X: Any) -> Any:
            size = len(X) // self.setting.shards
            return torch.cat(X[: size * self.setting.shards].split(size), 1)

        return {k: (joined(A), joined(G), n) for k, (A, G, n) in super().finish().items()}


class B47_padded(Fault):
    what = "row shards of unequal length are padded, and the padding stays between them"
    settings = ("qwen-answers", "bigcode-single", "gemma3-prompts", "opt-scattered", "phi-lengths",
                "olmo-left", "gemma2-uneven", "deit-two", "gptj-few", "falcon-packed", "olmo3-few",
                "smollm3-chats", "modernbert-masked", "gptneo-repeated", "internvit-some",
                "phi4-half", "cohere2-system", "esm2-tags", "vit22b-gray", "vaultgemma-stream",
                "starcoder2-fim", "stablelm-systems", "xglm-pairs", "eurobert-sentences",
                "eva-bands", "glm-strided", "exaone4-choices", "imagegpt-clusters",
                "nomic-replaced", "aimv2-sorted")  # fmt: skip

    def finish(self) -> Dump:
        def joined(X: Any) -> Any:
            parts = X.tensor_split(self.setting.shards)
            most = max(map(len, parts))
            return torch.cat([F.pad(x, (0, 0, 0, most - len(x))) for x in parts])[: len(X)]

        return {k: (joined(A), joined(G), n) for k, (A, G, n) in super().finish().items()}


class B48_zero(Fault):
    what = "a frozen layer has no gradient"

    def finish(self) -> Dump:
        out = super().finish()
        A, G, n = out[self.names[0]]
        return out | {self.names[0]: (A, 0 * G, n)}


class B48_missing(Fault):
    what = "a frozen layer is not there"

    def finish(self) -> Dump:
        return {k: v for k, v in super().finish().items() if k != self.names[0]}


class B49_double(Fault):
    what = "one BOS more"
    settings = TEXTS

    def read(self, at: Any) -> Any:
        b = super().read(at)
        first = torch.full((len(at), 1), BOS)
        label = torch.full_like(first, -1) if self.setting.marked else first
        label = torch.where(b.real[:, :1], label, -1)
        b.inputs = torch.cat([first, b.inputs[:, :-1]], 1)
        b.label = torch.cat([label, b.label[:, :-1]], 1)
        b.drawn = torch.cat([first, b.drawn[:, :-1]], 1)
        b.real = torch.cat([b.real[:, :1], b.real[:, :-1]], 1)
        b.segment = torch.cat([b.segment[:, :1], b.segment[:, :-1]], 1)
        return b


class B49_none(Fault):
    what = "no BOS"
    settings = tuple(name for name in TEXTS if name != "glm-strided")

    def read(self, at: Any) -> Any:
        b = super().read(at)
        for name in ("inputs", "label", "drawn", "real", "segment"):
            setattr(b, name, getattr(b, name)[:, 1:])
        return b


class B49_system(Fault):
    what = "the chat template puts a system prompt of its own, two tokens, behind BOS"
    settings = tuple(name for name in CAUSAL if name != "imagegpt-clusters")
    prompt = (5, 3)

    def read(self, at: Any) -> Any:
        b = super().read(at)
        two = torch.tensor(self.prompt).expand(len(at), 2)
        asks = (b.label[:, :1] >= 0) & (not self.setting.marked)
        T = b.inputs.shape[1]
        for name, x in (("inputs", two), ("real", b.real[:, :1]), ("segment", b.segment[:, :1])):
            whole = getattr(b, name)
            parts = whole[:, :1], x.expand(len(at), 2).to(whole.dtype), whole[:, 1:]
            setattr(b, name, torch.cat(parts, 1)[:, :T])
        b.label = torch.cat([torch.where(asks, two, -1).to(b.label.dtype), b.label], 1)[:, :T]
        b.drawn = torch.cat([two.to(b.drawn.dtype), b.drawn], 1)[:, :T]
        return b


# ------------------------------------------------------------------ precision


class B58(Fault):
    what = "sums are bfloat16"

    def gram(self, x: Any) -> Any:
        return super().gram(x.bfloat16())


class B59(Fault):
    what = "the model is bfloat16, the sums float32, and nothing says so"
    dtypes = ("float64", "float32")

    def __init__(self, *given: Any, **named: Any) -> None:
        super().__init__(*given, **named)
        self.model_dtype, self.sum_dtype = torch.bfloat16, torch.float32


class B59_autocast(Fault):
    what = "the network's products are autocast to bfloat16, and nothing says so"
    dtypes = ("float32",)

    def network(self) -> Any:
        net = super().network()
        net.forward = torch.autocast("cpu", torch.bfloat16)(net.forward)
        return net


class B60(Fault):
    what = "products have operands of 11 bits (TF32)"
    dtypes = ("float32",)

    def gram(self, x: Any) -> Any:
        bits = x.float().contiguous().view(torch.int32)
        return super().gram(((bits + 0x1000) & ~0x1FFF).view(torch.float32))


class B61_underflow(Fault):
    what = "gradients of a mean over 2²⁰ positions are float16, and vanish"

    def gradients(self, name: str, b: Any) -> Any:
        return (super().gradients(name, b) * 2.0**-20).half().to(self.sum_dtype) * 2.0**20


class B61_overflow(Fault):
    what = "gradients times 2¹⁶ are float16, and overflow"
    settings = tuple(
        name
        for name in SETTINGS
        if name not in ("siglip-mean", "gptj-few", "esm2-tags", "vit22b-gray", "eva-bands")
    )

    def gradients(self, name: str, b: Any) -> Any:
        return (super().gradients(name, b) * 2.0**16).half().to(self.sum_dtype) * 2.0**-16


class B61_sums(Fault):
    what = "gradients times 2⁸ are float16, and so are G's sums, which overflow"

    def add(self, name: str, b: Any, first: bool) -> None:
        before = self.G[name]
        super().add(name, b, first)
        g = self.gradients(name, b)[self.rows(name, b)]
        self.G[name] = before + self.gram((g * 2.0**8).half())

    def finish(self) -> Dump:
        self.G = {k: G.to(self.sum_dtype) * 2.0**-16 for k, G in self.G.items()}
        return super().finish()


class B63(Fault):
    what = "sums are float32"
    dtypes = ("float64",)

    def gram(self, x: Any) -> Any:
        return super().gram(x.float())


FAULTS = {
    name: made
    for name, made in globals().items()
    if isinstance(made, type) and issubclass(made, Fault) and name.startswith("B")
}
"""Name → class."""
