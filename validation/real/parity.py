"""Is a real model here the one that transformers makes of the same GGUF file? In float64.

    python -m validation.real.parity MODEL.gguf [TOKENS]

transformers dequantises and joins the file by code of its own (it needs the package accelerate),
and computes in float64 where it would take float32 (`InFloat64`). A GGUF file has the norms' eps in
float32; both take the shortest decimal number that it stands for. The text is this machine's GPL-3,
cut after TOKENS tokens (default 64). Compared are the ids; the logits; the greedy next tokens; and
of the gate of the middle block A and G with the text's own labels, which torch's autograd finds.
Distances are of norms. Status 0: the ids and greedy tokens are the same, and no distance is above
1e-12.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import refcurv as rc
from refcurv.files.tokenizer import load_tokenizer

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))
from peers_compare import InFloat64

TEXT = Path("/usr/share/common-licenses/GPL-3")
MOST = 1e-12


def ids_of(gguf: Path, count: int) -> tuple[list[int], bool]:
    """The first tokens of the text, and whether transformers' tokenizer says the same."""
    text = TEXT.read_text(encoding="utf-8")[: 8 * count]
    known = load_tokenizer(gguf, None)
    ours = [*known.before, *known.library.encode(text, add_special_tokens=False).ids]
    theirs = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)(text).input_ids
    return ours[:count], ours == [*theirs, *known.behind]


def here(gguf: Path, tokens: np.ndarray) -> tuple[np.ndarray, str, rc.Factor]:
    """Logits (T, V), which layer, and its factor."""
    with tempfile.TemporaryDirectory(prefix="parity-") as folder:
        rc.convert(gguf, Path(folder) / "w.h5")
        model = rc.load(Path(folder) / "w.h5", dtype="float64")
        layer = f"blocks.{model.config.layers // 2}.mlp.gate"
        factors = rc.collect(model, rc.Corpus(tokens), layer, "empirical")
        return rc.logits(model, tokens)[0], layer, factors[layer]


def there(gguf: Path, tokens: np.ndarray, block: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The same by transformers: logits, Σ a aᵀ and Σ g gᵀ over the positions that have a label."""
    id_BT, rows = torch.tensor(tokens), {}
    config = AutoConfig.from_pretrained(gguf.parent, gguf_file=gguf.name)
    config.rms_norm_eps = float(str(np.float32(config.rms_norm_eps)))
    with InFloat64():
        model = AutoModelForCausalLM.from_pretrained(
            gguf.parent, gguf_file=gguf.name, config=config, dtype=torch.float64,
            attn_implementation="eager",
        )  # fmt: skip
        gate = model.model.layers[block].mlp.gate_proj

        def keep(_: object, read: tuple[torch.Tensor], made: torch.Tensor) -> None:
            rows["a"], rows["g"] = read[0], made
            made.retain_grad()

        gate.register_forward_hook(keep)
        logit_TV = model(id_BT).logits[0]
        torch.nn.functional.cross_entropy(logit_TV[:-1], id_BT[0, 1:], reduction="sum").backward()
    a_NI, g_NO = (x.detach().numpy()[0, :-1] for x in (rows["a"], rows["g"].grad))
    return logit_TV.detach().numpy(), a_NI.T @ a_NI, g_NO.T @ g_NO


def main(argv: list[str]) -> int:
    """Compare, print, and say in the status whether all is the same."""
    gguf, count = Path(argv[0]).absolute(), int(argv[1]) if len(argv) > 1 else 64
    torch.set_num_threads(1)
    ids, same = ids_of(gguf, count)
    tokens = np.array([ids])
    logit_TV, layer, factor = here(gguf, tokens)
    theirs = there(gguf, tokens, int(layer.split(".")[1]))
    greedy = bool((logit_TV.argmax(-1) == theirs[0].argmax(-1)).all())
    print(f"{gguf.name}, {count} tokens: ids {'the same' if same else 'DIFFER'}; greedy tokens "
          f"{'the same' if greedy else 'DIFFER'}")  # fmt: skip
    worst = 0.0
    ours = logit_TV, factor.sum_A, factor.sum_G
    for what, one, other in zip(("logits", f"A of {layer}", f"G of {layer}"), ours, theirs,
                                strict=True):  # fmt: skip
        distance = float(np.linalg.norm(other - one) / np.linalg.norm(one))
        print(f"  {what}: {distance:.1e}")
        worst = max(worst, distance)
    return int(not (same and greedy and worst <= MOST))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
