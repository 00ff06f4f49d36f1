"""The state of a training and its file, so that what was killed goes on with the same bits."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from refcurv.files.disk import replacing
from refcurv.files.weights import config_to_json
from refcurv.model.config import ModelConfig
from refcurv.model.weights import Model

Parameters = dict[str, np.ndarray]
Recipe = Any
"""A frozen dataclass that decides a training, with a method `config()`."""


@dataclass(frozen=True, slots=True)
class State:
    """A training after `step` steps.

    Fields: step; parameters; slots, the optimiser's arrays: `NAME` (momentum) for the matrices
    that Muon moves, `NAME/first` and `NAME/second` for the others; seconds, how long it took.
    """

    step: int
    parameters: Parameters
    slots: Parameters
    seconds: float = 0.0


def save(path: Path, recipe: Recipe, state: State) -> None:
    """Write the run, whole or not at all."""
    arrays = {f"parameters/{name}": W for name, W in state.parameters.items()}
    arrays |= {f"slots/{name}": slot for name, slot in state.slots.items()}
    head = {"recipe": asdict(recipe), "config": config_to_json(recipe.config())}
    head |= {"step": state.step, "seconds": state.seconds}
    with replacing("paper", path) as file:
        np.savez(file, head=np.array(json.dumps(head)), **arrays)


def load(path: Path) -> tuple[dict[str, Any], State]:
    """The fields of the recipe, as plain values, and the state."""
    try:
        with np.load(path, allow_pickle=False) as run:
            head = json.loads(str(run["head"]))
            parts = {
                part: {n.removeprefix(part): run[n] for n in run.files if n.startswith(part)}
                for part in ("parameters/", "slots/")
            }
        state = State(head["step"], parts["parameters/"], parts["slots/"], head["seconds"])
        return head["recipe"], state
    except (ValueError, KeyError, EOFError, BadZipFile):
        raise SystemExit(f"paper: {path} is no training; delete it to begin anew.") from None


def resume(recipe: Recipe, path: Path) -> State:
    """The state that `path` holds, which must be of this very recipe."""
    found, state = load(path)
    if found != json.loads(json.dumps(asdict(recipe))):
        raise SystemExit(f"paper: {path} holds a run of another recipe: {found}.")
    return state


def trained(config: ModelConfig, state: State) -> Model:
    """A run's model, float32, its parameters in file order."""
    parameters = {name: state.parameters[name] for name in config.parameter_shapes()}
    return Model(config, parameters, "float32")
