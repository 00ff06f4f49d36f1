"""The tables of the language model."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

from validation.paper.results import (
    MASS_PERCENT,
    METHODS,
    ORDER,
    PAPER_KEPT,
    SAME_SIZE,
    VARIANTS,
    Json,
    Runs,
    at_forgetting,
    cut_layers,
    forgetting,
    named,
    over,
    percent,
    retained,
    rise,
    rows,
    strict,
    table,
    unedited,
    unedited_value,
)
from validation.paper.statistics import Interval, interval, paired

PAPER_STRESSED = {"bsn": "4.6, 9.8", "kfac": "6.6, 13.3", "svd": "6.3, 12.8"}
"""Mean longest match from the own prompt and from shifted ones (METHOD, Reported results)."""


# ------------------------------------------------------------------ tables


def skills(runs: Runs) -> str:
    """What the unedited models can do."""

    def cells(name: str) -> list[str]:
        found = [
            over(runs, lambda run, s=split: unedited_value(run, name, s))
            for split in ("dev", "test")
        ]
        text = [x.text(2) for x in found] if name == "language" else [percent(x) for x in found]
        count = unedited(runs[0], name)["items"]
        return [name.replace("_", " "), str(count), *text]

    head = ["population", "items a split", "dev", "test"]
    return table(head, [cells(name) for name in (*ORDER, "language")])


def table1(runs: Runs) -> str:
    """Tables 1 and 5 of the paper."""

    def cells(method: str) -> list[str]:
        def edit(run: Json) -> Json:
            return run["compared"][method]

        quotes = {
            key: over(runs, lambda run, key=key: rows(edit(run))["quotes"]["after"][key])
            for key in ("strict", "loose", "distance")
        }
        ndcg = over(runs, lambda run: rows(edit(run))["language"]["agreement"]["ndcg_paper"])
        return [
            named(method),
            percent(over(runs, lambda run: strict(edit(run), "dev"))),
            percent(quotes["strict"]),
            percent(quotes["loose"]),
            quotes["distance"].text(3),
            "+" + percent(over(runs, lambda run: rise(edit(run)))),
            ndcg.text(3),
            matched(runs, method),
        ]

    head = ["method", "strict, half told [%]", "strict, other half [%]", "loose [%]", "distance",
            "perplexity [%]", "nDCG@10", "matched"]  # fmt: skip
    return table(head, [no_edit(runs), *map(cells, (*METHODS, *SAME_SIZE))])


def no_edit(runs: Runs) -> list[str]:
    """The row of no edit at all."""

    def quotes(split: str, key: str) -> Interval:
        return over(runs, lambda run: unedited(run, "quotes", split)["after"][key])

    return ["none", percent(quotes("dev", "strict")), percent(quotes("test", "strict")),
            percent(quotes("test", "loose")), quotes("test", "distance").text(3), "0", "1",
            ""]  # fmt: skip


def matched(runs: Runs, method: str) -> str:
    """In how many runs the dev perplexity is within 0.5 % of K-FAC's."""
    if method in SAME_SIZE:
        return "not meant to be"
    count = sum(run["compared"][method]["verdict"] == "matched" for run in runs)
    return f"{count} of {len(runs)}"


def against(runs: Runs) -> str:
    """Paired differences of strict recitation, K-FAC less another method."""

    def cells(method: str) -> list[str]:
        ours = [strict(run["compared"]["kfac"]) for run in runs]
        theirs = [strict(run["compared"][method]) for run in runs]
        found = paired(ours, theirs)
        wins = sum(a < b for a, b in zip(ours, theirs, strict=True))
        verdict = "yes" if found.below_zero else "no"
        return [named(method), percent(found), f"{wins} of {len(runs)}", verdict]

    head = ["K-FAC less", "strict, other half [points]", "seeds with less", "interval below 0"]
    return table(head, [cells(m) for m in (*METHODS[1:], *VARIANTS)])


def kept_by_task(runs: Runs, chance: bool = False) -> str:
    """Figure 3: retention by kind of task, of every method at the same perplexity."""
    methods = (*METHODS, *VARIANTS)

    def cells(name: str) -> list[str]:
        return [
            name.replace("_", " "),
            *(
                percent(
                    over(runs, lambda run, m=m: retained(rows(run["compared"][m])[name], chance))
                )
                for m in methods
            ),
            " to ".join(f"{100 * share:.0f}" for share in PAPER_KEPT.get(name, ())) or "-",
        ]

    head = ["kept [%]", *map(named, methods), "paper, K-FAC"]
    return table(head, [cells(name) for name in ORDER])


def forgotten(runs: Runs) -> str:
    """Each curve where it leaves a tenth of the quotes, whatever it costs.

    The curves are read on the test split: a view of them, no choice.
    """

    def cells(method: str) -> list[str]:
        there = [found for run in runs if (found := at_forgetting(run, method))]
        count = f"{len(there)} of {len(runs)}"
        if not there:
            return [named(method), *["-"] * 8, count]

        def shown(name: str) -> str:
            return percent(interval([found[name] for found in there]))

        prices = [shown("kept"), "+" + shown("perplexity"), "+" + shown("refit")]
        return [named(method), *prices, *map(shown, ORDER[1:]), count]

    head = ["method", "pairs (directions, weights) kept [%]", "perplexity [%]",
            "at the best temperature [%]", *(n.replace("_", " ") for n in ORDER[1:]),
            "seeds that get there"]  # fmt: skip
    return table(head, map(cells, (*METHODS, *VARIANTS)))


def left_out(runs: Runs) -> str:
    """The K-FAC edit from factors with quotes in their corpus, and from factors without."""

    def cells(name: str, edit: Callable[[Json], Json]) -> list[str]:
        return [
            name,
            percent(over(runs, lambda run: strict(edit(run)))),
            "+" + percent(over(runs, lambda run: rise(edit(run)))),
            *(
                percent(over(runs, lambda run, t=t: retained(rows(edit(run))[t])))
                for t in ORDER[1:]
            ),
        ]

    head = [
        "quotes in the corpus",
        "strict [%]",
        "perplexity [%]",
        *(t.replace("_", " ") for t in ORDER[1:]),
    ]
    body = [
        cells("at their natural rate", lambda run: run["compared"]["kfac"]),
        cells("none", lambda run: run["left_out"]),
    ]
    return table(head, body)


def special(runs: Runs, controls: Runs) -> str:
    """Nats per word lost by quotes and by fresh sentences, at the same rise of perplexity."""

    def cells(name: str, found: Runs) -> list[str]:
        def lost(what: str) -> Callable[[Json], float]:
            return lambda run: run["special"][what]["after"] - run["special"][what]["before"]

        extra = [lost("quotes")(run) - lost("fresh")(run) for run in found]
        return [
            name,
            percent(over(found, lambda run: run["special"]["quotes"]["strict_before"])),
            percent(over(found, lambda run: run["special"]["quotes"]["strict_after"])),
            over(found, lost("quotes")).text(3),
            over(found, lost("fresh")).text(3),
            interval(extra).text(3),
        ]

    head = [
        "trained",
        "strict before [%]",
        "after [%]",
        "nats lost, quotes",
        "fresh sentences",
        "difference",
    ]
    return table(head, [cells("with quotes", runs), cells("without", controls)])


def facts(runs: Runs) -> str:
    """Figure 5: facts by tenths of their frequency, before and after the K-FAC edit."""
    tenths = range(10)
    head = ["facts [%]", "most frequent", *(str(t + 1) for t in tenths[1:-1]), "rarest"]
    body = [
        [when, *(percent(over(runs, lambda run, t=t, w=when: run["facts"][w][t])) for t in tenths)]
        for when in ("before", "after")
    ]
    return table(head, body)


def removal(runs: Runs) -> str:
    """What is left without one band of curvature mass, and without it and all flatter ones."""
    edges = MASS_PERCENT
    spans = [f"{a} to {b} %" for a, b in pairwise(edges)]

    def cells(kind: str, k: int, label: str) -> list[str]:
        def value(name: str) -> Callable[[Json], float]:
            return lambda run: run["removal"][kind][k][name]

        shown = [percent(over(runs, value(name))) for name in ORDER]
        return [label, *shown, over(runs, value("language")).text(1)]

    head = ["gone", *(name.replace("_", " ") for name in ORDER), "perplexity"]
    body = [cells("alone", k, span) for k, span in enumerate(spans)]
    body += [cells("with_flatter", k, f"all from {edges[k + 1]} %") for k in range(len(spans) - 1)]
    body += [cells("with_sharper", k, f"all up to {edges[k + 1]} %") for k in range(len(spans) - 1)]
    return table(head, body)


def detector(runs: Runs) -> str:
    """AUC of per-item scores for quotes against fresh sentences."""
    names = list(runs[0]["detector"])
    return table(
        ["score of an item", "AUC"],
        [[name, over(runs, lambda run, n=name: run["detector"][n]).text(3)] for name in names],
    )


def swept(runs: Runs) -> str:
    """Appendix D: for each set of layers, the least cut that leaves a tenth, by dev split."""
    sets = list(dict.fromkeys(row["layers"] for row in runs[0]["sweep"]["rows"]))

    def first(run: Json, layers: str) -> Json:
        mine = [row for row in run["sweep"]["rows"] if row["layers"] == layers]
        enough = forgetting(run["sweep"]["before"], mine)
        return min(enough or mine, key=lambda row: row["dev"]["language"])

    def cells(layers: str) -> list[str]:
        def value(name: str) -> Callable[[Json], float]:
            return lambda run: first(run, layers)["dev"][name]

        chosen = sum(run["sweep"]["chosen"]["layers"] == layers for run in runs)
        increase = over(
            runs, lambda run: value("language")(run) / run["sweep"]["before"]["language"] - 1
        )
        return [
            f"`{layers.removeprefix('blocks.')}`",
            over(runs, lambda run: first(run, layers)["rho"]).text(2),
            "+" + percent(increase),
            *(percent(over(runs, value(name))) for name in ORDER),
            str(chosen),
        ]

    head = [
        "layers",
        "rho",
        "perplexity [%]",
        *(n.replace("_", " ") for n in ORDER),
        "chosen by seeds",
    ]
    return table(head, [cells(layers) for layers in sets])


def stressed(runs: Runs) -> str:
    """Table 6: mean longest match, of 16 tokens, from quotes' own prompts and from shifted ones."""
    names = ("none", *METHODS)

    def cells(name: str) -> list[str]:
        found = [
            over(runs, lambda run, p=p: run["stressed"][name][p]) for p in ("original", "stressed")
        ]
        return [named(name), *(one.text(2) for one in found), PAPER_STRESSED.get(name, "-")]

    head = ["method", "own prompt", "best of shifted prompts", "paper, 7B"]
    return table(head, map(cells, names))


def coherent(runs: Runs) -> str:
    """Table 7: what the models say by themselves, judged by the true language."""

    def cells(name: str, of: str, voice: str) -> list[str]:
        found = [
            over(runs, lambda run, k=k: run["coherent"][of][voice][k])
            for k in ("nats", "outside", "repeated", "length")
        ]
        shares = [percent(one) for one in found[1:3]]
        return [name, found[0].text(2), *shares, found[3].text(1)]

    said = [
        cells(f"{named(m)}, {voice}", m, voice)
        for m in ("none", *METHODS)
        for voice in ("sampled", "greedy")
    ]
    truth = [
        cells("the language itself", "none", "own"),
        cells("its words shuffled", "none", "shuffled"),
    ]
    head = ["who speaks", "nats a word", "no words [%]", "repeated 4-grams [%]", "words"]
    return table(head, [*truth, *said])


def ratios(runs: Runs) -> str:
    """Figure 2 in numbers: the bands of the layers that are cut, mean over them, by seeds."""

    def cells(kind: str) -> list[str]:
        def value(run: Json, b: int) -> float:
            layers = [run["activation"][kind][name]["ratio"] for name in cut_layers(run)]
            return sum(ratio[b] for ratio in layers) / len(layers)

        first = next(iter(runs[0]["activation"][kind].values()))["ratio"]
        shown = [over(runs, lambda run, b=b: value(run, b)).text(2) for b in range(len(first))]
        rising = sum(
            all(x < y for x, y in pairwise(value(run, b) for b in range(len(first))))
            for run in runs
        )
        blank = [""] * (7 - len(first))
        return [kind.replace("_", " "), *shown, *blank, f"{rising} of {len(runs)}"]

    head = ["quotes / language", "sharpest band", *map(str, range(2, 8)), "sorted"]
    return table(head, map(cells, ("pair_mass", "input_rank", "svd")))


def grid(development: Json) -> str:
    """BSN's settings on the development seed: what is left on the dev split."""
    head = ["ratio", "weight", "steps", *(n.replace("_", " ") for n in ORDER), "perplexity"]
    body = [
        [f"{row['ratio']:g}", f"{row['weight']:g}", str(row["steps"]),
         *(f"{100 * row['dev'][name]:.1f}" for name in ORDER), f"{row['dev']['language']:.2f}"]
        for row in development["grid"]
    ]  # fmt: skip
    return table(head, body)


def architectures(*each: Runs) -> str:
    """The compared edits of several architectures: retention of the test split."""

    def cells(runs: Runs, method: str) -> list[str]:
        def kept(name: str) -> Interval:
            return over(runs, lambda run: retained(rows(run["compared"][method])[name]))

        risen = over(runs, lambda run: rise(run["compared"][method]))
        name = f"{runs[0]['recipe']['arch']}, {named(method)}"
        return [name, "+" + percent(risen), *(percent(kept(n)) for n in ORDER), str(len(runs))]

    head = ["kept [%]", "perplexity [%]", *(n.replace("_", " ") for n in ORDER), "seeds"]
    return table(head, [cells(runs, m) for runs in each for m in (*METHODS, *SAME_SIZE)])


def seconds(runs: Runs) -> str:
    """How long the stages of a run took."""
    names = list(runs[0]["seconds"])
    body = [[name, over(runs, lambda run, n=name: run["seconds"][n]).text(0)] for name in names]
    total = over(runs, lambda run: sum(run["seconds"].values()) / 60)
    return table(["stage", "seconds"], [*body, ["all, in minutes", total.text(1)]])
