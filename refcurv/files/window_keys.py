"""Keys of a config.json ↔ the windows of attention, block by block."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from refcurv.files.keys import FULL, SLIDING, Fields, Rule, Values, flag, natural
from refcurv.law.checks import ConventionError, SchemaError
from refcurv.law.words import number_of
from refcurv.model.config import ModelConfig


def one_window(default: int | None) -> Rule:
    """The key sliding_window, one window for every block; null means no window."""
    key = "sliding_window"

    def read(data: Values, found: Fields) -> Fields:
        if data.get(key, default) is None:
            return {}
        return {"windows": (natural({key: default, **data}, key),) * found["layers"]}

    def write(config: ModelConfig) -> Fields:
        return {key: config.windows[0] if config.windows else None}

    return Rule((key,), read, write)


def windows_by_layer(
    pattern: Callable[[int, Values], str], switch: str | None = None, more: tuple[str, ...] = ()
) -> Rule:
    """The key layer_types, which says which blocks have the window of sliding_window.

    Args:
        pattern: (number of a block, config.json) → the block's type, if layer_types is absent.
        switch: A key that turns windows on. If the key is absent from config.json, they are off.
        more: The keys that `pattern` reads.
    """
    keys = ("sliding_window", "layer_types")

    def read(data: Values, found: Fields) -> Fields:
        on = switch is None or flag(data, switch, False)
        types = data.get("layer_types")
        if types is None:
            if not on:
                return {}
            types = [pattern(i, data) for i in range(found["layers"])]
        if not isinstance(types, list) or len(types) != found["layers"]:
            raise SchemaError(
                f"layer_types must name the type of each of "
                f"{number_of(found['layers'], 'block')}; got "
                f"{types!r:.60}"
            )
        for kind in types:
            if kind not in (FULL, SLIDING):
                raise ConventionError(
                    f"layer_types has {kind!r:.40}; refcurv computes only {FULL!r} and {SLIDING!r}"
                )
        if SLIDING not in types:
            return {}
        if not on:
            raise ConventionError(f"layer_types has {SLIDING!r}, but {switch} is not true")
        window = natural({"sliding_window": 4096, **data}, "sliding_window")
        return {"windows": tuple(window if kind == SLIDING else 0 for kind in types)}

    def write(config: ModelConfig) -> Fields:
        windows = config.windows or (0,) * config.layers
        types = [SLIDING if window else FULL for window in windows]
        on = {} if switch is None else {switch: any(windows)}
        return {"layer_types": types, "sliding_window": max(windows) or 4096, **on}

    return Rule((*keys, *more) if switch is None else (*keys, switch, *more), read, write)


def upper_blocks(i: int, data: Values) -> str:
    """A `pattern`, Qwen's: the blocks from max_window_layers on have the window."""
    first = natural({"max_window_layers": 28, **data}, "max_window_layers", least=0)
    return SLIDING if i >= first else FULL


def local_blocks() -> Rule:
    """GPT-Neo's keys: attention_types, [[["global", "local"], times], ...], and window_size."""

    def read(data: Values, found: Fields) -> Fields:
        types = data.get("attention_types")
        plain: list[Any] = []
        groups = types if isinstance(types, list) else []
        good = bool(groups)
        for group in groups:
            good = good and isinstance(group, list) and len(group) == 2
            good = good and isinstance(group[0], list) and type(group[1]) is int
            if good and len(plain) <= found["layers"]:
                plain += group[0] * min(max(group[1], 0), found["layers"] + 1)
        if not good or len(plain) != found["layers"]:
            raise SchemaError(
                f"attention_types must name the type of each of "
                f"{number_of(found['layers'], 'block')}, as in "
                f'[[["global", "local"], 6]]; got {types!r:.60}'
            )
        if data.get("attention_layers") not in (None, plain):
            raise ConventionError("attention_layers and attention_types differ")
        if any(kind not in ("global", "local") for kind in plain):
            raise ConventionError("attention_types has other than 'global' and 'local'")
        if "local" not in plain:
            return {}
        window = natural({"window_size": 256, **data}, "window_size")
        return {"windows": tuple(window if kind == "local" else 0 for kind in plain)}

    def write(config: ModelConfig) -> Fields:
        windows = config.windows or (0,) * config.layers
        types = ["local" if window else "global" for window in windows]
        return {"attention_types": [[types, 1]], "window_size": max(windows) or 256}

    return Rule(("attention_types", "attention_layers", "window_size"), read, write)
