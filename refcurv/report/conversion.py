"""What `refcurv convert` and `export` say: by kind of tensor, and what was left out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from refcurv.files.huggingface import Conversion, Exported, Mapped
from refcurv.law.words import number_of
from refcurv.report.blocks import by_block
from refcurv.report.text import filled, format_rows

IGNORED = "(ignored)"


def rows(mapped: Sequence[Mapped]) -> list[list[str]]:
    """Every tensor and what it became: checkpoint, refcurv, shape, stored as."""
    return [
        [m.checkpoint_name, m.name or IGNORED, " x ".join(map(str, m.shape)), m.dtype]
        for m in mapped
    ]


def kinds(mapped: Sequence[Mapped]) -> list[list[str]]:
    """The same with tensors that differ in the number of their block alone on one line.

    Their names become the pattern that matches them: `blocks.{0-29}.attn.q.weight`.
    """
    every = [(m.checkpoint_name, m.name or IGNORED, str(m.shape), m.dtype) for m in mapped]
    return [
        [ours, f"{len(members)} x {shape}" if len(members) > 1 else shape, dtype, theirs]
        for (theirs, ours, shape, dtype), members in by_block(every, (0, 1))
    ]


def format_conversion(done: Conversion, path: str, verbose: bool = False) -> str:
    """The text of `refcurv convert`: a line for each kind of tensor, or for each tensor.

    Proof:  tests/test_conversion.py::test_a_model_of_thirty_blocks_is_a_short_table
    """
    if verbose:
        table = format_rows(
            ["checkpoint", "refcurv", "shape", "stored as"], rows(done.mapped), "llll"
        )
    else:
        table = format_rows(
            ["refcurv", "shape", "stored as", "checkpoint"], kinds(done.mapped), "llll"
        )
    return f"{table}\n\n" + filled("\n".join(_notes(done, path)))


def _notes(done: Conversion, path: str) -> Iterator[str]:
    tensors = {m.checkpoint_name for m in done.mapped}
    parameters = sum(m.name is not None for m in done.mapped)
    yield f"{number_of(len(tensors), 'tensor')} → {number_of(parameters, 'parameter')} in {path}"
    if ignored := len(done.mapped) - parameters:
        yield f"{number_of(ignored, 'tensor')} that are no parameters were ignored"
    if done.renamed:
        yield done.renamed
    if done.ignored_keys:
        yield f"ignored as asked: the keys {', '.join(done.ignored_keys)} of config.json"
    if done.assumed:
        yield "dequantised to float32; gguf says the type of each tensor above"
        yield f"assumed, for a GGUF file does not say it: {', '.join(done.assumed)}"
    if done.not_read:
        yield f"not read: {', '.join(done.not_read)}"
    if done.beside:
        yield f"not part of a weights file: {', '.join(done.beside)}"


def format_export(done: Exported, path: str, directory: str) -> str:
    """The text of `refcurv export`: the files, and those of a tokenizer that are not there.

    Proof:  tests/test_conversion.py::test_export_says_what_it_does_not_copy
    """
    lines = [f"{path} → {directory}/{', '.join(done.files)}"]
    if done.again:
        lines.append("all of it was there already; nothing was written")
    if done.left:
        lines.append(
            f"not copied: {', '.join(done.left)}, which lay beside the checkpoint. "
            "--tokenizer-from FOLDER copies them"
        )
    elif len(done.files) == 2:
        lines.append("no tokenizer: --tokenizer-from FOLDER copies one")
    return filled("\n".join(lines))
