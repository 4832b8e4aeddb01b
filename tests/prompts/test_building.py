"""Facts about prompts: which keywords, with which weights, and what becomes of them where the rule has no answer."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from wsi_anomaly.errors import KeywordError
from wsi_anomaly.prompts.building import (
    JOINER,
    MAX_TOKENS,
    MAX_WEIGHT,
    PREFIX,
    BuiltPrompts,
    build_prompts,
    readable,
)
from wsi_anomaly.storage.prompts import fragments

WEIGHTINGS = ("numeric", "quantised")
SEEDS = st.integers(0, 2**32 - 1)


def built(rows: Any, *, top_k: int = 5, weighting: Any = "numeric", tokens: Any = 6) -> BuiltPrompts:
    """The prompts of these rows of similarities, where a keyword has six tokens, the prefix eight, the joiner one."""
    similarity = np.atleast_2d(np.array(rows, np.float32))
    keyword_tokens = np.broadcast_to(np.array(tokens, np.int64), similarity.shape[1:]).copy()
    return build_prompts(
        similarity, top_k=top_k, weighting=weighting, keyword_tokens=keyword_tokens, prefix_tokens=8, joiner_tokens=1
    )


def cosines(seed: int, *, tiles: int = 20, keywords: int = 12, low: float = -0.5) -> np.ndarray:
    """Rows of distinct values, as far as float32 allows."""
    return np.random.default_rng(seed).uniform(low, 0.9, (tiles, keywords)).astype(np.float32)


def weight_by_hand(ratio: float, base: float) -> float:
    """The power of `base` for a ratio: divide by it as long as the ratio is nearer to it than to 1."""
    power = 0
    while abs(ratio - base) < abs(ratio - 1) or (base < 1 and abs(ratio - base) == abs(ratio - 1)):
        ratio /= base
        power += 1
    return base**power


def released_by_hand(row: np.ndarray) -> tuple[list[int], list[float]]:
    """The rule of the released code for one tile, word by word; it ends only for scores above zero."""
    order = sorted(range(len(row)), key=lambda i: (-row[i], i))[:5]
    ratios = [float(row[i]) / float(row[order[2]]) for i in order]
    first, second, _, fourth, fifth = ratios
    weights = [weight_by_hand(first, 1.1), weight_by_hand(second, 1.1), 1.0]
    return order, [*weights, weight_by_hand(fourth, 0.9), weight_by_hand(fifth, 0.9)]


def test_weights_of_the_paper_are_scores_divided_by_their_median() -> None:
    """Nearest first, rounded to two decimals; the third of five is the median."""
    prompts = built([0.30, 0.10, 0.45, 0.41, 0.38, 0.40, 0.20])
    assert prompts.keywords.tolist() == [[2, 3, 5, 4, 0]]
    assert prompts.weights[0].tolist() == pytest.approx([1.12, 1.02, 1.0, 0.95, 0.75])
    assert (prompts.over_budget, prompts.without_agreement) == (0, 0)


def test_the_median_of_an_even_number_lies_between_the_middle_two() -> None:
    """As medians do."""
    assert built([0.4, 0.3, 0.2, 0.1], top_k=4).weights[0].tolist() == pytest.approx([1.6, 1.2, 0.8, 0.4])


@pytest.mark.parametrize(
    ("ratio", "weight"),
    [(1.00, 1), (1.04, 1), (1.06, 1.1), (1.15, 1.1), (1.16, 1.21), (1.30, 1.33), (1.60, 1.61), (1.80, 1.77)],
)
def test_before_the_middle_weights_are_quantised_to_powers_of_eleven_tenths(ratio: float, weight: float) -> None:
    """Limits lie halfway between 1 and 1.1, and at its multiples."""
    prompts = built([0.5 * ratio, 0.5, 0.5], top_k=3, weighting="quantised")
    assert prompts.weights[0, 0] == pytest.approx(weight)


@pytest.mark.parametrize(
    ("ratio", "weight"),
    [(1.00, 1), (0.96, 1), (0.94, 0.9), (0.86, 0.9), (0.85, 0.81), (0.77, 0.81), (0.76, 0.73), (0.1, 0.1)],
)
def test_behind_the_middle_weights_are_quantised_to_powers_of_nine_tenths(ratio: float, weight: float) -> None:
    """Limits lie halfway between 0.9 and 1, and at its multiples."""
    prompts = built([0.5 * ratio, 0.5, 0.5], top_k=3, weighting="quantised")
    assert prompts.weights[0, 2] == pytest.approx(weight)


def test_quantised_weights_are_those_of_the_released_code() -> None:
    """For two thousand tiles, near and far from each other, against the rule restated step by step."""
    rows = np.concatenate([cosines(1, tiles=1000, low=0.01), cosines(2, tiles=1000, low=0.7)])
    prompts = built(rows, weighting="quantised")
    expected = [released_by_hand(row) for row in rows]
    weights = np.round([weights for _, weights in expected], 2)
    wanted = weights > 0
    np.testing.assert_array_equal(prompts.keywords, np.where(wanted, [order for order, _ in expected], -1))
    np.testing.assert_allclose(prompts.weights, weights, rtol=0, atol=1e-6)


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_equal_scores_keep_the_order_of_the_list(weighting: str) -> None:
    """Also where they decide who is in and who is out."""
    assert built([0.2, 0.4, 0.2, 0.4, 0.2, 0.2], top_k=4, weighting=weighting).keywords.tolist() == [[1, 3, 0, 2]]
    assert built(np.full((1, 70), 0.3), top_k=3, weighting=weighting).weights.tolist() == [[1, 1, 1]]


@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("score", [0.0, -0.0, -0.2, 1e-4])
def test_a_keyword_at_or_below_zero_is_left_out(score: float, weighting: str) -> None:
    """So is one whose weight rounds to zero."""
    prompts = built([0.4, 0.3, 0.2, 0.1, score], weighting=weighting)
    assert prompts.keywords[0].tolist() == [0, 1, 2, 3, -1]
    assert prompts.weights[0, 4] == 0
    assert prompts.without_agreement == 0


@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("median", [0.0, -0.1])
def test_keywords_weigh_the_same_where_the_median_is_not_positive(median: float, weighting: str) -> None:
    """A ratio to it would say nothing; such tiles are counted."""
    prompts = built([[0.4, 0.3, median, -0.2, -0.3], [0.5, 0.5, 0.5, 0.5, 0.5]], weighting=weighting)
    assert prompts.keywords.tolist() == [[0, 1, 2, 3, 4]] * 2
    assert prompts.weights.tolist() == [[1] * 5] * 2
    assert prompts.without_agreement == 1


@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("median", [1e-3, 1e-20, 1e-45])
def test_a_median_that_is_hardly_positive_gives_no_boundless_weight(median: float, weighting: str) -> None:
    """Not even where float32 ends."""
    weights = built([0.9, 0.9, median, 0, 0], weighting=weighting).weights
    assert 9 < weights[0, 0] <= MAX_WEIGHT


@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("nothing", [np.nan, np.inf, -np.inf])
def test_an_unreadable_tile_has_no_prompt(nothing: float, weighting: str) -> None:
    """Nor is it counted, and its neighbours do not notice."""
    rows = np.full((3, 6), 0.3)
    rows[1] = nothing
    rows[2, 4] = nothing
    prompts = built(rows, weighting=weighting)
    assert prompts.keywords.tolist() == [[0, 1, 2, 3, 4], [-1] * 5, [-1] * 5]
    assert prompts.weights.tolist() == [[1] * 5, [0] * 5, [0] * 5]
    assert (prompts.over_budget, prompts.without_agreement) == (0, 0)


def test_no_tiles_give_no_prompts() -> None:
    """A slide may have none that can be read."""
    prompts = built(np.empty((0, 6)))
    assert prompts.keywords.shape == prompts.weights.shape == (0, 5)


@pytest.mark.parametrize(("last", "kept", "shortened"), [(10, 5, 0), (11, 4, 1)])
def test_a_prompt_takes_as_many_tokens_as_the_encoder_reads_and_no_more(last: int, kept: int, shortened: int) -> None:
    """8 of the prefix, 13 + 13 + 13 + 14, four joiners, and the last: 75 are read, 76 are not."""
    prompts = built([0.5, 0.4, 0.3, 0.2, 0.1], tokens=[13, 13, 13, 14, last])
    assert (prompts.keywords[0] >= 0).sum() == kept
    assert prompts.over_budget == shortened


def test_the_list_is_cut_at_the_first_keyword_that_does_not_fit() -> None:
    """A later, shorter one does not slip in: a prompt is the nearest keywords, without a gap."""
    prompts = built([[0.5, 0.4, 0.3, 0.2, 0.1], [0.1, 0.2, 0.3, 0.4, 0.5]], tokens=[6, 70, 1, 1, 1])
    assert prompts.keywords.tolist() == [[0, -1, -1, -1, -1], [4, 3, 2, -1, -1]]
    assert prompts.over_budget == 2


def test_weights_do_not_depend_on_what_is_cut() -> None:
    """The median is that of all the nearest."""
    prompts = built([0.5, 0.4, 0.2, 0.1, 0.1], tokens=[6, 6, 70, 6, 6])
    assert prompts.weights[0].tolist() == pytest.approx([2.5, 2, 0, 0, 0])


def test_a_keyword_that_counts_for_nothing_takes_no_room() -> None:
    """What is left out for its score is no loss to the token limit."""
    assert built([0.5, 0.4, 0.3, 0.2, -0.1], tokens=[6, 6, 6, 6, 90]).over_budget == 0


@pytest.mark.parametrize("top_k", [0, 5])
def test_more_keywords_than_there_are_cannot_be_asked_for(top_k: int) -> None:
    """Nor none. The message says how many there are and what to do."""
    with pytest.raises(KeywordError, match=f"top_k is {top_k}, but the keyword list has 4 keywords. Give a top_k"):
        built([0.4, 0.3, 0.2, 0.1], top_k=top_k)


@given(seed=SEEDS, weighting=st.sampled_from(WEIGHTINGS), top_k=st.integers(1, 12))
def test_a_tile_has_the_same_prompt_among_any_others(seed: int, weighting: str, top_k: int) -> None:
    """In any order, and alone."""
    rows = cosines(seed)
    order = np.random.default_rng(seed).permutation(len(rows))
    together = built(rows, top_k=top_k, weighting=weighting)
    shuffled = built(rows[order], top_k=top_k, weighting=weighting)
    alone = built(rows[0], top_k=top_k, weighting=weighting)
    np.testing.assert_array_equal(shuffled.keywords, together.keywords[order])
    np.testing.assert_array_equal(shuffled.weights, together.weights[order])
    np.testing.assert_array_equal(alone.weights[0], together.weights[0])


@given(seed=SEEDS, weighting=st.sampled_from(WEIGHTINGS), top_k=st.integers(1, 12))
def test_the_order_of_the_list_changes_no_prompt_without_ties(seed: int, weighting: str, top_k: int) -> None:
    """The same keywords with the same weights, under their new numbers."""
    rows = np.random.default_rng(seed).permuted(np.tile(np.linspace(-0.3, 0.8, 12), (20, 1)), axis=1)
    order = np.random.default_rng(seed).permutation(12)
    tokens = np.random.default_rng(seed).integers(1, 20, 12)
    before = built(rows, top_k=top_k, weighting=weighting, tokens=tokens)
    after = built(rows[:, order], top_k=top_k, weighting=weighting, tokens=tokens[order])
    np.testing.assert_array_equal(np.where(after.keywords >= 0, order[after.keywords], -1), before.keywords)
    np.testing.assert_array_equal(after.weights, before.weights)
    assert (after.over_budget, after.without_agreement) == (before.over_budget, before.without_agreement)


@given(
    seed=SEEDS, weighting=st.sampled_from(WEIGHTINGS), top_k=st.integers(1, 12), low=st.sampled_from([-0.9, 0.0, 0.8])
)
def test_weights_fall_with_rank_and_stay_within_bounds(seed: int, weighting: str, top_k: int, low: float) -> None:
    """From the upper bound down to zero, in hundredths, and zero exactly where a place is empty."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(1, 30, 12)
    prompts = built(cosines(seed, low=low), top_k=top_k, weighting=weighting, tokens=tokens)
    assert ((prompts.weights >= 0) & (prompts.weights <= MAX_WEIGHT)).all()
    assert (np.diff(prompts.weights, axis=1) <= 0).all()
    np.testing.assert_array_equal(prompts.weights > 0, prompts.keywords >= 0)
    np.testing.assert_allclose(prompts.weights * 100, np.rint(prompts.weights * 100), rtol=0, atol=1e-4)
    count = (prompts.keywords >= 0).sum(axis=1)
    spent = 8 + np.where(prompts.keywords >= 0, tokens[prompts.keywords] + 1, 0).sum(axis=1) - (count > 0)
    assert (spent <= MAX_TOKENS).all()


def row_of(prompts: BuiltPrompts, keywords: tuple[str, ...]) -> tuple[tuple[str, float], ...]:
    """The pieces of the first tile's prompt."""
    return fragments(keywords, prompts.keywords[0].tolist(), prompts.weights[0].tolist(), prefix=PREFIX, joiner=JOINER)


def test_a_prompt_is_handed_on_in_pieces_that_nobody_parses() -> None:
    """Plus signs, parentheses, commas and quotes of a keyword come through, and weights are exact hundredths."""
    odd = ("HER2+", 'CD8+ (T) cells, "bright"', "c.", "ER-", "('a','b').blend(1,2)")
    assert row_of(built([0.5, 0.428, 0.4, 0.4, 0.372]), odd) == (
        (PREFIX, 1.0),
        (odd[0], 1.25),
        (JOINER, 1.0),
        (odd[1], 1.07),
        (JOINER, 1.0),
        (odd[2], 1.0),
        (JOINER, 1.0),
        (odd[3], 1.0),
        (JOINER, 1.0),
        (odd[4], 0.93),
    )


def test_an_empty_prompt_has_no_pieces_and_no_text() -> None:
    """It has no prefix either: it is the empty prompt of the text encoder."""
    pieces = row_of(built(np.full((1, 5), np.nan)), ("a", "b", "c", "d", "e"))
    assert pieces == ()
    assert readable(pieces) == ""


def test_people_read_a_prompt_as_one_line() -> None:
    """Keywords in parentheses, as they may hold an `and`; a weight of 1 is not worth a word."""
    pieces = row_of(built([0.428, 0.4, 0.38], top_k=3), ("germinal center", "capsule and sinus", "B cells"))
    assert readable(pieces) == f"{PREFIX} (germinal center)1.07 and (capsule and sinus) and (B cells)0.95"
