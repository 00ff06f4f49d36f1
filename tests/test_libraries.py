"""Libraries that only some work needs (law/libraries.py)."""

from __future__ import annotations

import builtins
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from refcurv.files.gguf.reading import open_gguf
from refcurv.files.tokenizer import load_tokenizer
from refcurv.law.checks import RefcurvError
from refcurv.law.libraries import needed
from refcurv.report.plots.drawing import require_matplotlib

USES: dict[str, Callable[[Path], object]] = {
    "matplotlib": lambda _: require_matplotlib(),
    "tokenizers": lambda at: load_tokenizer(at / "tokenizer.json", None),
    "gguf": lambda at: open_gguf(at / "model.gguf"),
}


def test_a_missing_library_is_told_from_a_broken_one() -> None:
    with pytest.raises(RefcurvError, match="get it"), needed("a", RefcurvError("get it")):
        raise ModuleNotFoundError(name="a")
    with pytest.raises(ModuleNotFoundError, match="of it"), needed("a", RefcurvError("get it")):
        raise ModuleNotFoundError("a part of it", name="a.part")
    with pytest.raises(ImportError, match="libc"), needed("a", RefcurvError("get it")):
        raise ImportError("libc is too old", name="a")


@pytest.mark.parametrize("library", USES)
@pytest.mark.parametrize("broken", [False, True])
def test_each_use_of_a_library(
    library: str, broken: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = builtins.__import__

    def import_it(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == library:
            what = f"{library}.native" if broken else library
            raise ModuleNotFoundError(f"No module named {what!r}", name=what)
        return real(name, *args, **kwargs)

    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    monkeypatch.delitem(sys.modules, library, raising=False)
    monkeypatch.setattr(builtins, "__import__", import_it)
    kind, text = (ModuleNotFoundError, "native") if broken else (RefcurvError, "pip install")
    with pytest.raises(kind, match=text):
        USES[library](tmp_path)
