"""Are the ids of a GGUF file's tokenizer those of other programs? On ten thousand hard lines.

    python -m validation.real.tokenizers MODEL.gguf [LINES]

Compared are transformers' own conversion of the same file, and llama.cpp's tokenizer where the
package cyllama, which brings llama.cpp built, is installed. Lines: random letters of every script
and plane, runs of spaces, digits and line ends, words cut and joined, special tokens within, and
lines of the Debian documents on this machine. Differences are counted, and the first few shown.
Status 0: no differences but those that `DIGITS_FIRST` explains.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from pathlib import Path

from refcurv.files.gguf.reading import open_gguf
from refcurv.files.tokenizer import load_tokenizer

RANGES = (
    (0x20, 0x7E), (0x20, 0x7E), (0xA0, 0x24F), (0x300, 0x36F), (0x370, 0x52F), (0x590, 0x6FF),
    (0x900, 0xDFF), (0xE00, 0x0EFF), (0x1E00, 0x20CF), (0x2100, 0x2BFF), (0x3000, 0x30FF),
    (0x4E00, 0x9FFF), (0xAC00, 0xD7A3), (0xE000, 0xE0FF), (0xFE00, 0xFFFD), (0x1D400, 0x1D7FF),
    (0x1F300, 0x1FAFF), (0x20000, 0x2A6DF), (0xE0000, 0xE007F), (0x10FFF0, 0x10FFFD),
)  # fmt: skip
SEEDS = (" ", "  ", "\t", "\n", "\r\n", "\n\n", "0", "12", "345", "6789", "'s", "'LL", "’t", "...",
         "\u00a0", "\u200b", "\u200d", "\ufeff", "a\u0301", "_", "▁", "<s>", "<|im_end|>", "<0x41>",
         "  12", " 3.14", "x=1;", "http://a.b/c?d=e", "ﬁ",
         "Ａ", "\x00", "\x7f", "\x1b[0m")  # fmt: skip

DIGITS_FIRST = ("smollm", "starcoder", "refact", "codeshell", "command-r")
"""Here transformers' conversion cuts words as GPT-2 does, so that `  12` begins with other tokens.
llama.cpp, and the tokenizer.json of these models, cut every digit off first. Both are compared: the
conversion as it is, and with the cut of the models' own tokenizer.json in its place."""


def lines(count: int) -> list[str]:
    """Half of them generated, half from documents."""
    draw = random.Random(17)
    made = [_generated(draw) for _ in range(count // 2)]
    return made + _documents(draw, count - len(made))


def _generated(draw: random.Random) -> str:
    parts = []
    for _ in range(draw.randint(1, 12)):
        if draw.random() < 0.5:
            parts.append(draw.choice(SEEDS))
        else:
            low, high = draw.choice(RANGES)
            parts.append("".join(chr(draw.randint(low, high)) for _ in range(draw.randint(1, 6))))
    return "".join(parts)


def _documents(draw: random.Random, count: int) -> list[str]:
    """Lines of Debian's documents, some of them joined, some cut anywhere."""
    found: list[str] = []
    paths = sorted(Path("/usr/share/doc").glob("*/copyright")) + sorted(
        Path("/usr/share/common-licenses").glob("*")
    )
    for path in paths:
        found += path.read_text(encoding="utf-8", errors="ignore").splitlines(keepends=True)
    out = []
    for _ in range(count):
        i = draw.randrange(len(found))
        text = "".join(found[i : i + draw.randint(1, 4)])
        start = draw.randrange(len(text) + 1) if draw.random() < 0.3 else 0
        out.append(text[start:])
    return out


def transformers_ids(path: Path, digits_first: bool) -> Callable[[str], list[int]]:
    """transformers' own reading of the file; `digits_first` puts that cut into it."""
    from tokenizers import pre_tokenizers
    from transformers.integrations.gguf import convert_gguf_tokenizer, get_gguf_tokenizer

    architecture, described, _ = get_gguf_tokenizer(str(path))
    made, _ = convert_gguf_tokenizer(architecture, described)
    if digits_first:
        made.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
        )
    return lambda text: list(made.encode(text, add_special_tokens=False).ids)


def llama_ids(path: Path) -> Callable[[str], list[int]] | None:
    """llama.cpp's; None without its package. The package cannot load a vocabulary alone."""
    try:
        from cyllama.llama import llama_cpp
    except ImportError:
        return None
    llama_cpp.ggml_backend_load_all()
    llama_cpp.llama_backend_init()
    options = llama_cpp.LlamaModelParams()
    options.n_gpu_layers = 0
    model = llama_cpp.LlamaModel(str(path), options)
    words = model.get_vocab()
    return lambda text: list(words.tokenize(text, False, True)) if text and model else []


def main(argv: list[str]) -> int:
    """Compare, print, and say in the status whether all that must be equal is equal."""
    path, count = Path(argv[0]), int(argv[1]) if len(argv) > 1 else 10_000
    ours, texts = load_tokenizer(path, None).library, lines(count)
    digits = open_gguf(path).get("tokenizer.ggml.pre") in DIGITS_FIRST
    others = {"transformers": transformers_ids(path, False), "llama.cpp": llama_ids(path)}
    if digits:
        others["transformers, digits cut first"] = transformers_ids(path, True)
    wrong = 0
    for name, theirs in others.items():
        if theirs is None:
            print(f"{name}: its package is not installed")
            continue
        differ = [t for t in texts if ours.encode(t, add_special_tokens=False).ids != theirs(t)]
        print(f"{name}: {len(texts) - len(differ)} of {len(texts)} lines have the same ids")
        for text in differ[:3]:
            mine = ours.encode(text, add_special_tokens=False).ids
            print(f"  {text[:60]!r}\n    here  {mine[:20]}\n    there {theirs(text)[:20]}")
        wrong += bool(differ) and not (digits and name == "transformers")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
