"""Which class a model gives each image: the likeliest one."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from refcurv.evaluation.decode import likeliest
from refcurv.law.checks import Array, ConventionError, require_token_ids
from refcurv.law.conventions import shard_sequences
from refcurv.model.config import ModelConfig
from refcurv.model.corpus import ImagePopulation
from refcurv.model.images import patches, require_image_size
from refcurv.model.layers import Layout
from refcurv.model.transformer import Parameters, image_layout
from refcurv.passes.forward import Reading, batchwise, each, final_states_each


def image_batches(config: ModelConfig, population: ImagePopulation) -> list[slice]:
    """Batches of consecutive images, as many as a shard has (SHARD).

    Proof:  tests/test_images.py::test_evaluation_is_argmax_one_image_at_a_time
    """
    assert config.image is not None
    size, N = shard_sequences(config.image.positions), len(population.images)
    return [slice(begin, begin + size) for begin in range(0, N, size)]


def image_inputs(
    config: ModelConfig, population: ImagePopulation, row: slice
) -> tuple[Array, Layout]:
    """Some images as the model reads them: (patches, layout)."""
    images = population.images[row]
    return patches(config, images), image_layout(config, len(images))


def require_image_population(
    who: str, name: str, population: ImagePopulation, config: ModelConfig
) -> None:
    """Refuse images that the model cannot read or be judged on.

    Raises:
        ConventionError: the model reads tokens. ShapeError: images of another size.
        RangeError: a label that is not one of the model's classes.
    """
    if config.image is None:
        raise ConventionError(f"{who}: population {name!r} has images, but the model reads tokens.")
    require_image_size(f"{who}: population {name!r}", population.images, config)
    what = f"labels of population {name!r}"
    require_token_ids(who, what, population.labels, config.vocabulary)


def classify(
    config: ModelConfig,
    parameters: Parameters,
    population: ImagePopulation,
    done: Callable[[], object] = lambda: None,
) -> Array:
    """The likeliest class of each image: argmax_v z[v], the lowest id on ties.

    Batches are read several at a time; the number of threads changes no bit.

    Args:
        config: the model's shape.
        parameters: its parameters by name, all in memory or of one block (`passes.held`).
        population: the images; its labels are not read.
        done: called once per finished batch (a progress bar's update).

    Returns:
        (N,) int64.

    Raises:
        NonFiniteError: a logit is NaN or infinite.

    Cost: one forward pass.
    Source: METHOD, Task accuracy.
    Proof:  tests/test_images.py::test_evaluation_is_argmax_one_image_at_a_time
    """

    def say(_: int, final_B1D: Array) -> Array:
        return likeliest("evaluate", config, parameters, final_B1D[:, 0])

    def work(rows: list[slice]) -> list[Array]:
        readings = [Reading(*image_inputs(config, population, row)) for row in rows]
        return each(parameters, final_states_each(config, parameters, readings), say)

    return np.concatenate(batchwise(parameters, image_batches(config, population), work, done))
