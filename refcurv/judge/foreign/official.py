"""Files of the official program: `kfac_factors_blk_{ids}.pt`, and `meta_blk_{ids}.json` beside.

The first is {`blk{b}.{gate,up,down}`: {A, G, n_tokens}}, and `blk{b}.up` is `blocks.{b}.mlp.up`. A
and G are means over n_tokens rows: every position but the last of each sequence, padding included.
Its g is of the mean loss of a batch, over m = B·(T−1) positions, so that G is 1/m² of ours. Its
files say neither m nor whether labels were drawn. A JSON that has `batch_size` and `seq_len`, or
`sample_labels`, says so.
"""

from __future__ import annotations

import re
import stat
from pathlib import Path
from typing import Any, Final

from refcurv.files.disk import parse_json, reading
from refcurv.files.paths import mode_of
from refcurv.judge.dump import Dump
from refcurv.judge.foreign.archive import is_saved
from refcurv.judge.foreign.torch_files import Found, dump_of, gather
from refcurv.law.words import number_of

_LAYER: Final = re.compile(r"blk\d{1,4}\.(gate|up|down)")
_FILES: Final = "kfac_factors_blk_*.pt"
_MAX_META: Final = 1_000_000


def is_torch(path: Path) -> bool:
    """Is this a file of torch.save, or a folder of the official program's?"""
    mode = mode_of("validate", path)
    return bool(_within(path)) if stat.S_ISDIR(mode) else stat.S_ISREG(mode) and is_saved(path)


def _within(folder: Path) -> list[Path]:
    """The official files of a folder, or of the folders in it, by the numbers of their blocks."""
    found = list(folder.glob(_FILES)) or list(folder.glob(f"*/{_FILES}"))

    def blocks(path: Path) -> tuple[list[int], str]:
        return [int(n) for n in re.findall(r"\d{1,9}", path.stem)], str(path)

    return sorted(found, key=blocks)


def of_torch(path: Path) -> Dump:
    """The dump of a file of torch.save, or of a folder of official files.

    Raises:
        SchemaError: as `open_saved`; no layer in a file, or one layer in two files.

    Proof: tests/test_foreign_pickles.py::test_the_official_files_are_read,
        tests/test_foreign_pickles.py::test_a_users_own_file_is_read
    """
    files = _within(path) if path.is_dir() else [path]
    found = gather(files)
    if not _is_official(found):
        return dump_of(found)
    meta = {file: _meta(file) for file in files}
    declared, scale, labels = _said([one for one in meta.values() if one])
    recipe = (
        "A and G are means over n_tokens rows, as they stand.",
        "g is of the mean loss of each batch: a shorter last batch counts for more (B2).",
        *(scale, labels, *_padding(found, meta)),
    )
    free = frozenset({"G"})
    return dump_of(found, "official", recipe, scale_free=free, declared=declared)


def _is_official(found: Found) -> bool:
    return all(
        _LAYER.fullmatch(name) and {"A", "G", "n"} <= layer.entry.keys()
        for name, layer in found.layers.items()
    )


def _meta(file: Path) -> dict[str, Any]:
    """What stands in the JSON beside a file; nothing where there is none."""
    path = file.with_name(file.name.replace("kfac_factors_", "meta_")).with_suffix(".json")
    if not stat.S_ISREG(mode_of("validate", path)):
        return {}
    with reading("validate", path) as handle:
        return parse_json(f"validate: {str(path)!r}", handle.read(_MAX_META))


def _said(meta: list[dict[str, Any]]) -> tuple[dict[str, str], str, str]:
    """What the JSON files say of how the factors were made, and of m and labels in words."""
    declared = {"rows": "reached", "bias": "separate", "reduction": "mean", "fisher": "empirical"}
    labels = "Labels are taken to be the corpus's, the program's default: no file says (fisher)."
    drawn = _agreed(meta, "sample_labels")
    if isinstance(drawn, bool):
        declared["fisher"] = "sampled" if drawn else "empirical"
        labels = f"Labels are {'drawn' if drawn else 'of the corpus'}, as the JSON says."
    scale = "G has no known scale: no file says m, the positions of a batch (loss_terms)."
    batch, length = _agreed(meta, "batch_size"), _agreed(meta, "seq_len")
    if type(batch) is int and type(length) is int and batch > 0 and length > 1:
        declared["loss_terms"] = str(batch * (length - 1))
        scale = f"m = {batch}·({length} − 1), by batch_size and seq_len of the JSON."
    return declared, scale, labels


def _agreed(meta: list[dict[str, Any]], key: str) -> object:
    """The value that all JSON files have for a key; None where they lack it or differ."""
    values = [one.get(key) for one in meta]
    return values[0] if values and all(v == values[0] for v in values) else None


def _padding(found: Found, meta: dict[Path, dict[str, Any]]) -> list[str]:
    """Where the JSON counts other tokens than the factors have rows: it leaves padding out."""
    counts = {(layer.saved.path, layer.entry["n"]) for layer in found.layers.values()}
    said = []
    for file, one in meta.items():
        rows = {n for path, n in counts if path == file.absolute()}
        tokens = one.get("n_tokens")
        if type(tokens) is int and rows and rows != {tokens}:
            said.append(
                f"{file.name!r:.100} has {number_of(max(rows), 'row')}, and its JSON "
                f"{number_of(tokens, 'token')} that "
                "are no padding (B82)."
            )
    return said
