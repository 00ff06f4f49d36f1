"""The texts of this folder's pages, from Debian packages: nothing else, and nothing of it shipped.

    python -m validation.real.texts FOLDER [TOKENIZER]

Packages are downloaded by apt-get, which checks them, and unpacked, never installed. FOLDER gets a
file for each source, a document a line:

    licences, bible, state      to search for what a model recites
    calibration_1 .. _5         prose for factors: disjoint, each from all the sources of prose
    clean_dev, clean_test       prose for perplexity, of documents that are in no calibration

Prose is fortunes, two dictionaries and a manual, whose documents are shuffled by a seed and dealt
out. Each file's SHA-256 must be the one noted in `SHA256`, so that a page and its texts agree. With
a TOKENIZER (a tokenizer.json or a GGUF file), says how many tokens each has.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from random import Random

PACKAGES = ("base-files", "bible-kjv", "bible-kjv-text", "fortunes", "fortunes-min", "dict-devil",
            "dict-foldoc", "debian-policy", "miscfiles")  # fmt: skip
FORTUNES = ("computers", "cookie", "definitions", "education", "food", "law", "literature",
            "medicine", "men-women", "news", "people", "platitudes", "politics", "science",
            "sports", "wisdom", "work")  # fmt: skip
SHORTEST = 200
"""Letters of a document of prose, at least: shorter ones are mostly names. Chosen."""
PARTS = ("clean_dev", "clean_test", *(f"calibration_{k}" for k in range(1, 6)))

SHA256 = {
    "licences": "1a73e26bde662b2ec0be6513aefc55e4519d6ffb72939243cd7da40bad362b7c",
    "bible": "96352aee1e70d2572530fc41a01fd9cdeec53183ad1b266935206f9d0b4eca00",
    "state": "449acebb21c1283a032467a62acb2f5da06bf184333c6650009d166414970dc9",
    "clean_dev": "88552a3a3ae569ecc75d612df8bc5c685ac35f5fb0bf23fe5afc9b5a931e1403",
    "clean_test": "1dcb264af82f3918db42f38ebc33a1ccd22773f2e2d7a7105a0c58bd11c9f5c7",
    "calibration_1": "32bb726dc6da4c8b471efd16ce6c0873cddda09fca7d7caa9c0bc338e4851278",
    "calibration_2": "7c9e7a514044eaab2986201bb6a08e69858177f0989669928265dfdb8de1becf",
    "calibration_3": "d480fe6b31acfefd588f286684b74f0dea1d29ee5be8253cb566c3cf5fa9cc93",
    "calibration_4": "677ba75dc13e0db6f5f33337e1eb9a9f220b32c026387efa1bef0c1f0c41a3d5",
    "calibration_5": "0827d988f1f3bfa0ffaa8636e5ebd32c6a2913280fb21becb4ecadfbcbcfc90e",
}


def texts(root: Path) -> dict[str, list[str]]:
    """The documents of each source, from packages unpacked below `root`."""
    share = root / "usr/share"
    return {
        "licences": [
            read(path)
            for path in sorted((share / "common-licenses").iterdir())
            if path.is_file() and not path.is_symlink()
        ],
        "bible": list(bible(root)),
        "state": [read(path) for path in sorted((share / "state").glob("*.gz"))],
        "fortunes": [
            one.replace("\t", "    ").strip()
            for name in FORTUNES
            for one in read(share / "games/fortunes" / name).split("\n%\n")
        ],
        "devil": list(entries(share / "dictd/devil")),
        "foldoc": list(entries(share / "dictd/foldoc")),
        "policy": chapters(read(share / "doc/debian-policy/policy.txt.gz")),
    }


def read(path: Path) -> str:
    """A file as UTF-8; overstriking (a letter and a backspace) and bad bytes are left out."""
    data = (
        gzip.decompress(path.read_bytes()) if path.suffix in (".gz", ".dz") else path.read_bytes()
    )
    text = data.decode("utf-8", errors="ignore")
    while "\b" in text:
        at = text.index("\b")
        text = text[: max(at - 1, 0)] + text[at + 1 :]
    return text


def bible(root: Path) -> Iterator[str]:
    """The King James Bible by chapters, as the package's own program prints it."""
    command = [root / "usr/bin/bible", "-p", root / "usr/lib", "-f", "Gen1:1-Rev22:21"]
    done = subprocess.run(command, check=True, capture_output=True, stdin=subprocess.DEVNULL)
    chapter, verses = "", list[str]()
    for line in done.stdout.decode().splitlines():
        place, _, verse = line.partition(" ")
        if ":" not in place:
            continue
        if place.partition(":")[0] != chapter and verses:
            yield "\n".join(verses)
            verses = []
        chapter = place.partition(":")[0]
        verses.append(verse)
    yield "\n".join(verses)


def entries(path: Path) -> Iterator[str]:
    """The entries of a dictionary of dictd, by its index of headword, offset and length."""
    digits = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
    data = gzip.decompress(path.with_suffix(".dict.dz").read_bytes())
    places = set()
    for line in path.with_suffix(".index").read_text(encoding="utf-8").splitlines():
        word, *place = line.split("\t")
        if not word.startswith("00"):
            places.add(tuple(sum(digits.index(c) * 64**k for k, c in enumerate(reversed(number)))
                             for number in place[:2]))  # fmt: skip
    for begin, length in sorted(places):
        yield data[begin : begin + length].decode("utf-8", errors="ignore").strip()


def chapters(text: str) -> list[str]:
    """The manual's sections: what lies between lines underlined by * or =."""
    lines = text.splitlines()
    heads = [n - 1 for n, line in enumerate(lines) if n and line and not line.strip("*=")]
    return ["\n".join(lines[a:b]).strip() for a, b in pairwise([*heads, len(lines)])]


def dealt(found: dict[str, list[str]]) -> dict[str, list[str]]:
    """The files: what may be recited as it is, prose dealt out, each source evenly."""
    files = {name: found[name] for name in ("licences", "bible", "state")}
    files |= {name: [] for name in PARTS}
    for name in [one for one in found if one not in files]:
        long = sorted({one for one in found[name] if len(one) >= SHORTEST})
        Random(f"refcurv {name}").shuffle(long)
        for n, part in enumerate(PARTS):
            files[part] += long[n :: len(PARTS)]
    for name in PARTS:
        files[name].sort(key=lambda one: hashlib.sha256(one.encode()).digest())
    return files


def unpacked(folder: Path) -> Path:
    """Download the packages, and unpack them below the folder."""
    # apt's own user may not write here, of which it warns; it then downloads as this user
    subprocess.run(["apt-get", "download", "-qq", *PACKAGES], check=True, cwd=folder)
    for package in sorted(folder.glob("*.deb")):
        subprocess.run(["dpkg-deb", "-x", package, folder / "root"], check=True)
    return folder / "root"


def main(argv: list[str]) -> int:
    """Write the files, and say what they are."""
    if len(argv) not in (1, 2):
        print(__doc__, file=sys.stderr)
        return 2
    folder, wrong = Path(argv[0]), []
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as room:
        files = dealt(texts(unpacked(Path(room))))
    for name, documents in files.items():
        lines = [json.dumps({"text": one}, ensure_ascii=False) + "\n" for one in documents]
        data = "".join(lines).encode()
        (folder / f"{name}.jsonl").write_bytes(data)
        tokens = f", {count(argv[1], documents):,} tokens" if len(argv) > 1 else ""
        print(f"{name}: {len(documents):,} documents, {len(data):,} bytes{tokens}")
        digest = hashlib.sha256(data).hexdigest()
        if SHA256.get(name) != digest:
            wrong.append(f'    "{name}": "{digest}",')
    if wrong:
        print("other texts than those noted, whose SHA-256 are:", *wrong, sep="\n", file=sys.stderr)
    return int(bool(wrong))


def count(tokenizer: str, documents: list[str]) -> int:
    """How many tokens the documents have."""
    from refcurv.files.tokenizer import load_tokenizer

    library = load_tokenizer(tokenizer, None).library
    return sum(len(one.ids) for one in library.encode_batch(documents, add_special_tokens=False))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
