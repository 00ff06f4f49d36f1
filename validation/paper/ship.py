"""Make the files that ship with the package from a finished training run.

    python -m validation.paper.ship runs/lm-1/run.npz refcurv/demo

Writes model.h5 (float32, as trained) and corpus.h5: the sample of the training mixture that the
experiments take the factors from, and every population of the world, dev and test.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path

import refcurv as rc
from validation.paper.lm import SEQUENCES
from validation.paper.train import Recipe
from validation.paper.trainings import load, trained
from validation.paper.world import Mixture, calibration, populations


def ship(run: Path, folder: Path) -> tuple[Path, Path]:
    """Write model.h5 and corpus.h5 into `folder`."""
    found, state = load(run)
    recipe = Recipe(**found | {"mixture": Mixture(**found["mixture"])})
    model = trained(recipe.config(), state)
    made_from = {"recipe": asdict(recipe), "steps": state.step, "by": "validation/paper/train.py"}
    rc.save(model, folder / "model.h5", made_from)
    world = recipe.world()
    corpus = rc.Corpus(calibration(world, SEQUENCES, recipe.seed), populations=populations(world))
    made_from = {"by": "validation/paper/ship.py", "sequences": SEQUENCES, "seed": recipe.seed}
    rc.save_corpus(corpus, folder / "corpus.h5", made_from)
    return folder / "model.h5", folder / "corpus.h5"


def main() -> None:
    """Parse, ship, say how large."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("folder", type=Path)
    args = parser.parse_args()
    for path in ship(args.run, args.folder):
        print(f"{path}: {path.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
