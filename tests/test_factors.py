"""Factors against naive sums over single positions, and the laws of accumulation."""

from __future__ import annotations

import numpy as np
import oracles
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import Case, assert_within, case, cases, config, random_parameters

import refcurv as rc
from refcurv.curvature.factors import _Moment
from refcurv.law import tolerance
from refcurv.law.checks import (
    ConventionError,
    EmptyError,
    NameUnknownError,
    NonFiniteError,
    RangeError,
    SchemaError,
)
from refcurv.model import transformer
from refcurv.model.transformer import Tap
from refcurv.passes import memory


def model_of(one: Case, dtype: str = "float64") -> rc.Model:
    return rc.Model(one.config, {k: v.astype(dtype) for k, v in one.parameters.items()}, dtype)


def corpus_of(one: Case) -> rc.Corpus:
    return rc.Corpus(one.token, one.label, one.real.astype(np.uint8), one.segment)


def naive_rows(one: Case, label: np.ndarray) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """(a, g) of every kept position by the definitions, one sequence at a time."""
    keep = oracles.reached(one.label, one.real, one.segment)
    rows: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {}
    for b in range(len(one.token)):
        sub = Case(one.config, one.parameters, *(x[b : b + 1] for x in
                   (one.token, one.real, one.segment, label)))  # fmt: skip
        final, trace = transformer.forward(one.config, one.parameters, sub.token, sub.layout)
        taps: list[Tap] = []
        every = np.ones_like(sub.real)
        head = transformer.head_backward(one.config, one.parameters, final, sub.label, every)
        loss = transformer.drain(head, taps.append)
        steps = transformer.backward(one.config, one.parameters, loss.d_final_BTD, trace)
        taps += [s for s in steps if isinstance(s, Tap)]
        for tap in taps:
            a, g = tap.a.reshape(-1, tap.a.shape[-1]), tap.g.reshape(-1, tap.g.shape[-1])
            rows.setdefault(tap.name, []).extend(
                (a[t], g[t]) for t in range(len(keep[b])) if keep[b, t]
            )
    return {n: tuple(np.array(x) for x in zip(*r, strict=True)) for n, r in rows.items() if r}


def drawn_labels(one: Case, seed: int, draw: int) -> np.ndarray:
    final, _ = transformer.forward(one.config, one.parameters, one.token, one.layout)
    logit = transformer.head_logits(one.config, one.parameters, final)
    label = one.label.copy()
    for b, t in np.argwhere(one.label >= 0):
        label[b, t] = oracles.draw_label(logit[b, t], oracles.uniform(seed, draw, int(b), int(t)))
    return label


@given(cases(), st.sampled_from(["empirical", "sampled"]), st.integers(0, 2**64 - 1))
def test_factors_equal_the_naive_sums(one: Case, fisher: str, seed: int) -> None:
    if not (one.label >= 0).any():
        return
    got = rc.collect(model_of(one), corpus_of(one), layers="**", fisher=fisher, seed=seed)
    label = drawn_labels(one, seed, 0) if fisher == "sampled" else one.label
    rows = naive_rows(one, label)
    assert list(got) == list(one.config.linear_layers())
    for name, (a, g) in rows.items():
        n = len(a)
        assert (
            got[name].n_A
            == got[name].n_G
            == n
            == oracles.reached(one.label, one.real, one.segment).sum()
        )
        budget = 40 * tolerance.path(one.config.layers, 64, np.float64)
        assert_within(
            got[name].sum_A, oracles.second_moment(a), budget, np.abs(a).T @ np.abs(a), name
        )
        largest = np.abs(g).max(initial=1e-3)
        assert_within(got[name].sum_G, oracles.second_moment(g), budget, n * largest**2, name)
        assert (got[name].sum_A == got[name].sum_A.T).all()
        assert np.allclose(got[name].A, got[name].sum_A / n, rtol=1e-15)


def test_several_draws_average_over_their_labels() -> None:
    one = case()
    got = rc.collect(model_of(one), corpus_of(one), layers="**", seed=9, draws=3)
    singles = [naive_rows(one, drawn_labels(one, 9, d)) for d in range(3)]
    for name in got:
        want = sum(oracles.second_moment(rows[name][1]) for rows in singles)
        assert got[name].n_G == 3 * got[name].n_A == 30
        assert_within(got[name].sum_G, want, 1e-11, want, name)
        A = oracles.second_moment(singles[0][name][0])
        assert_within(got[name].sum_A, A, 1e-12, A, name)


def big_corpus(sequences: int = 70, length: int = 96) -> tuple[rc.Model, rc.Corpus]:
    one = case(batch=sequences, length=length)
    return model_of(one, "float32"), rc.Corpus(one.token)


@pytest.mark.parametrize("draws", [1, 2])
def test_shards_in_flight_change_no_bit(draws: int) -> None:
    model, corpus = big_corpus()
    runs = [rc.collect(model, corpus, layers="**", draws=draws, in_flight=n) for n in (1, 2, 3, 1)]
    for name in runs[0]:
        for other in runs[1:]:
            assert runs[0][name].sum_A.tobytes() == other[name].sum_A.tobytes()
            assert runs[0][name].sum_G.tobytes() == other[name].sum_G.tobytes()


def test_collecting_a_layer_alone_gives_its_bits() -> None:
    model, corpus = big_corpus(30)
    together = rc.collect(model, corpus, layers="**")
    for name in ("head", "blocks.1.mlp.gate", "blocks.0.attn.k", "blocks.0.mlp.down"):
        alone = rc.collect(model, corpus, layers=name)
        assert list(alone) == [name]
        assert alone[name].sum_A.tobytes() == together[name].sum_A.tobytes()
        assert alone[name].sum_G.tobytes() == together[name].sum_G.tobytes()


def test_O37_shared_inputs_share_A_bit_for_bit() -> None:
    model, corpus = big_corpus(30)
    got = rc.collect(model, corpus, layers="**")
    assert got["blocks.0.mlp.gate"].sum_A is got["blocks.0.mlp.up"].sum_A
    assert got["blocks.1.attn.q"].sum_A is got["blocks.1.attn.v"].sum_A
    assert not np.array_equal(got["blocks.0.attn.q"].sum_A, got["blocks.0.attn.o"].sum_A[:8, :8])


def test_O42_sums_add_over_disjoint_data() -> None:
    one = case(batch=6)
    model = model_of(one)
    whole = rc.collect(model, corpus_of(one), layers="**", fisher="empirical")
    parts = [
        rc.collect(model, rc.Corpus(one.token[s]), layers="**", fisher="empirical")
        for s in (slice(0, 2), slice(2, 6))
    ]
    for name in whole:
        for side in ("A", "G"):
            total = sum(getattr(p[name], f"sum_{side}") for p in parts)
            want = getattr(whole[name], f"sum_{side}")
            assert_within(total, want, 1e-13, want, name)
            assert getattr(whole[name], f"n_{side}") == sum(
                getattr(p[name], f"n_{side}") for p in parts
            )


def test_O53_sampled_labels_do_not_depend_on_the_batch() -> None:
    """The first sequences alone, and among others: the same draws, by corpus index."""
    one = case(batch=6)
    model = model_of(one)
    few = rc.collect(model, rc.Corpus(one.token[:2]), layers="head", seed=4)
    label = drawn_labels(one, 4, 0)
    rest = rc.collect(model, rc.Corpus(one.token[2:], label[2:]), layers="head", fisher="empirical")
    whole = rc.collect(model, rc.Corpus(one.token), layers="head", seed=4)
    total = few["head"].sum_G + rest["head"].sum_G
    assert_within(total, whole["head"].sum_G, 1e-13, total, "head")


def test_O51_padding_adds_nothing() -> None:
    one = case(length=5)
    model = model_of(one)
    padded = np.concatenate([one.token, np.full((2, 4), 3)], axis=1)
    mask = np.tile(np.arange(9) < 5, (2, 1)).astype(np.uint8)
    plain = rc.collect(model, rc.Corpus(one.token), layers="**", seed=1)
    wide = rc.collect(model, rc.Corpus(padded, mask=mask), layers="**", seed=1)
    for name in plain:
        assert plain[name].n_A == wide[name].n_A == 8
        assert_within(wide[name].sum_A, plain[name].sum_A, 1e-13, plain[name].sum_A, name)
        assert_within(wide[name].sum_G, plain[name].sum_G, 1e-12, plain[name].sum_G, name)


def test_rows_labelled_leaves_out_what_is_only_reached() -> None:
    one = case(length=6)
    label = np.full(one.token.shape, -1)
    label[:, 3] = 2
    corpus = rc.Corpus(one.token, label)
    model = model_of(one)
    reached = rc.collect(model, corpus, layers="**", fisher="empirical")
    labelled = rc.collect(model, corpus, layers="**", fisher="empirical", rows="labelled")
    assert reached["head"].n_A == 8
    assert labelled["head"].n_A == 2
    head = [f["head"].sum_G for f in (reached, labelled)]
    assert_within(head[0], head[1], 1e-14, head[1], "g is 0 where there is no label")
    assert np.trace(reached["head"].sum_A) > np.trace(labelled["head"].sum_A)
    up = [np.trace(f["blocks.0.mlp.up"].sum_G) for f in (reached, labelled)]
    assert up[0] > up[1] * (1 + 1e-9)


def test_O6_a_factorial_design_makes_kfac_exact(rng: np.random.Generator) -> None:
    """Every a with every g: n (G ⊗ A) = Σ (g gᵀ) ⊗ (a aᵀ), whatever they are."""
    a, g = rng.normal(size=(4, 3)), rng.normal(size=(5, 2))
    pairs = [(x, y) for x in a for y in g]
    sides = {}
    for side, index, size in (("A", 0, 3), ("G", 1, 2)):
        moment = _Moment(size)
        for shard in range(0, len(pairs), 4):
            rows = np.array([p[index] for p in pairs[shard : shard + 4]])
            moment.add(rows.T @ rows, len(rows))
        moment.close()
        assert moment.rows == len(pairs)
        sides[side] = moment.finish() / moment.rows
    F_tok = sum(np.kron(np.outer(y, y), np.outer(x, x)) for x, y in pairs)
    K = len(pairs) * np.kron(sides["G"], sides["A"])
    assert_within(K, F_tok, 1e-14, F_tok, "K")
    shuffled = [(a[i % 4], g[i % 4]) for i in range(20)]  # not factorial: K ≠ F_tok
    A, G = (sum(np.outer(p[i], p[i]) for p in shuffled) / 20 for i in (0, 1))
    F_tok = sum(np.kron(np.outer(y, y), np.outer(x, x)) for x, y in shuffled)
    assert np.linalg.norm(20 * np.kron(G, A) - F_tok) > 1e-3 * np.linalg.norm(F_tok)


def test_blocks_of_shards_sum_as_the_law_says() -> None:
    """64 shards to a block that starts from zero, blocks in order: the bits of a plain loop."""
    made = config()
    model = rc.Model(made, random_parameters(made, 1))
    tokens = np.random.default_rng(1).integers(0, 7, (150, 1100))  # one sequence to a shard
    got = rc.collect(model, rc.Corpus(tokens), layers="blocks.1.mlp.up")["blocks.1.mlp.up"]
    total, block = np.zeros((8, 8)), np.zeros((8, 8))
    for n, row in enumerate(tokens):
        if n and n % 64 == 0:
            total, block = total + block, np.zeros((8, 8))
        alone = rc.collect(model, rc.Corpus(row[None]), layers="blocks.1.mlp.up")
        block = block + alone["blocks.1.mlp.up"].sum_A
    assert got.sum_A.tobytes() == (total + block).tobytes()


def test_a_killed_run_goes_on_with_the_same_bits(tmp_path, monkeypatch) -> None:
    """Interrupted in the third block: two blocks are not computed again, and no bit differs."""
    made = config()
    rc.save(rc.Model(made, random_parameters(made, 1)), tmp_path / "w.h5")
    rng = np.random.default_rng(0)
    rc.save_corpus(rc.Corpus(rng.integers(0, 7, (200, 1100))), tmp_path / "c.h5")
    model, corpus = rc.load(tmp_path / "w.h5"), rc.load_corpus(tmp_path / "c.h5")
    state, layers = tmp_path / "f.h5.unfinished", "blocks.{0,1}.mlp.*"
    whole = rc.collect(model, corpus, layers)
    swept: list[int] = []
    right = memory.sweep

    def dying(config, parameters, shard, job, take) -> None:
        if shard.number == 140 and not state.with_suffix(".again").exists():
            raise KeyboardInterrupt
        swept.append(shard.number)
        right(config, parameters, shard, job, take)

    monkeypatch.setattr(memory, "sweep", dying)
    with pytest.raises(KeyboardInterrupt):
        rc.collect(model, corpus, layers, checkpoint=state)
    assert state.exists()
    with pytest.raises(SchemaError, match="unfinished collection"):
        rc.load_factors(state)
    with pytest.raises(ConventionError, match="another run"):
        rc.collect(model, corpus, layers, seed=1, checkpoint=state)
    state.with_suffix(".again").touch()
    swept.clear()
    again = rc.collect(model, corpus, layers, checkpoint=state)
    assert sorted(swept) == list(range(128, 200))
    assert not state.exists()
    for name in whole:
        assert again[name].sum_A.tobytes() == whole[name].sum_A.tobytes()
        assert again[name].sum_G.tobytes() == whole[name].sum_G.tobytes()
        assert (again[name].n_A, again[name].n_G) == (whole[name].n_A, whole[name].n_G)
    with pytest.raises(ConventionError, match="read from files"):
        rc.collect(model, rc.Corpus(corpus.tokens), layers, checkpoint=state)


def test_file_round_trip(tmp_path) -> None:
    one = case()
    made = rc.collect(model_of(one), corpus_of(one), seed=2**63 + 1, draws=2)
    rc.save_factors(made, tmp_path / "f.h5")
    back = rc.load_factors(tmp_path / "f.h5")
    assert list(back) == list(made)
    facts = ("fisher", "rows", "seed", "draws", "dtype", "shard_rows")
    assert [getattr(back, f) for f in facts] == [getattr(made, f) for f in facts]
    for name in made:
        assert back[name].sum_A.tobytes() == made[name].sum_A.tobytes()
        assert back[name].sum_G.tobytes() == made[name].sum_G.tobytes()
        assert (back[name].n_A, back[name].n_G) == (made[name].n_A, made[name].n_G)


def test_refusals(tmp_path) -> None:
    one = case()
    model, corpus = model_of(one), corpus_of(one)
    with pytest.raises(NameUnknownError, match=r"'blocks\.7' matches none"):
        rc.collect(model, corpus, layers="blocks.7")
    with pytest.raises(ConventionError, match=r"Did you mean 'sampled'\?"):
        rc.collect(model, corpus, fisher="samples")
    with pytest.raises(ConventionError, match="expected"):
        rc.collect(model, corpus, fisher="expected")
    with pytest.raises(RangeError, match="draws"):
        rc.collect(model, corpus, draws=0)
    with pytest.raises(ConventionError, match="draws must be 1"):
        rc.collect(model, corpus, fisher="empirical", draws=2)
    with pytest.raises(RangeError, match=r"is 7, outside the model's vocabulary \[0, 7\)"):
        rc.collect(model, rc.Corpus(one.token + 1 + (6 - one.token.max())))
    with pytest.raises(EmptyError, match="none of the corpus's 2 positions has a label"):
        rc.collect(model, rc.Corpus(one.token[:, :1]))
    broken = dict(one.parameters)
    broken["blocks.1.mlp.up.weight"] = broken["blocks.1.mlp.up.weight"] * np.nan
    with pytest.raises(NonFiniteError, match=r"sum_. of 'blocks"):
        rc.collect(rc.Model(one.config, broken), corpus)
    with pytest.raises(SchemaError):
        rc.load_bases(_factors_file(tmp_path))


def _factors_file(folder) -> str:
    one = case()
    path = folder / "f.h5"
    rc.save_factors(rc.collect(model_of(one), corpus_of(one)), path)
    return str(path)


def test_a_failure_in_one_shard_stops_all_and_is_the_one_reported() -> None:
    """The embedding of one token is NaN: exactly the shard that holds it produces NaN sums."""
    made = config(vocabulary=9)
    parameters = random_parameters(made, 0)
    parameters["embed.weight"][8] = np.nan
    tokens = np.zeros((60, 100), dtype=int)
    tokens[59, 5] = 8
    with pytest.raises(NonFiniteError, match="first at"):
        rc.collect(rc.Model(made, parameters), rc.Corpus(tokens), in_flight=2)
