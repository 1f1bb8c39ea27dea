"""Duplicates against brute force: exact Jaccard similarities, and the probabilities that MinHash has by theory."""

import math
import random
from collections.abc import Sequence

import numpy as np
import pytest

from megatrain.data.clean.config import CleanStep, ExactDuplicatesStep, NearDuplicatesStep
from megatrain.data.clean.duplicates import (
    Fingerprinter,
    Removed,
    bands_and_rows,
    find_duplicates,
    minhasher,
    width,
)
from megatrain.data.clean.words import WordHashes

BOTH: tuple[CleanStep, ...] = (ExactDuplicatesStep(), NearDuplicatesStep())
NEAR = (NearDuplicatesStep(),)


def duplicates(texts: Sequence[str], steps: tuple[CleanStep, ...] = BOTH) -> Removed:
    fingerprint = Fingerprinter(steps, WordHashes())
    joined = b"".join(map(fingerprint, texts))
    return find_duplicates(np.frombuffer(joined, np.uint8).reshape(len(texts), width(steps)), steps)


def shingles(text: str, n: int = 5) -> set[tuple[str, ...]]:
    words = text.split()
    return {tuple(words[i : i + n]) for i in range(len(words) - n + 1)}


def jaccard(a: str, b: str) -> float:
    one, other = shingles(a), shingles(b)
    return len(one & other) / len(one | other)


def pair(rng: random.Random, similarity: float, size: int = 1000) -> tuple[str, str]:
    """Two texts that have the similarity in their first words in common, and nothing else."""
    common = round(2 * size * similarity / (1 + similarity)) + 4  # c / (2 size - c) = similarity, in 5-grams
    draw = [str(rng.getrandbits(60)) for _ in range(2 * (size + 4) - common)]
    return " ".join(draw[: size + 4]), " ".join(draw[:common] + draw[size + 4 :])


def binomial_tail(n: int, p: float, at_least: int) -> float:
    return sum(math.comb(n, k) * p**k * (1 - p) ** (n - k) for k in range(at_least, n + 1))


@pytest.mark.parametrize("similarity", [0.5, 0.7, 0.75, 0.8, 0.85, 0.9])
def test_removal_follows_the_curve(similarity: float) -> None:
    """A pair is removed if 80 % of 128 hash functions agree, each with the probability of the similarity."""
    rng, pairs = random.Random(3), 150
    texts = [text for _ in range(pairs) for text in pair(rng, similarity)]
    assert math.isclose(jaccard(*texts[:2]), similarity, abs_tol=0.005)
    removed = duplicates(texts, NEAR)
    expected = binomial_tail(128, similarity, math.ceil(0.8 * 128))
    deviation = math.sqrt(max(expected * (1 - expected), 1e-4) / pairs)
    assert abs(len(removed.documents) / pairs - expected) < 4 * deviation + 0.02, (similarity, expected)
    assert (removed.documents % 2 == 1).all()
    np.testing.assert_array_equal(removed.kept, removed.documents - 1)


def test_estimates_are_those_of_theory() -> None:
    """The fraction of hash functions that agree has the similarity as its mean, and the binomial's spread."""
    rng, minhash = random.Random(5), minhasher()
    estimates = []
    for _ in range(300):
        drawn = np.array([rng.getrandbits(64) for _ in range(1500)], np.uint64)
        a, b = minhash(drawn[:1000], 128), minhash(drawn[500:], 128)
        estimates.append((a == b).mean())
    assert abs(np.mean(estimates) - 1 / 3) < 4 * np.std(estimates) / math.sqrt(300)
    assert np.std(estimates) == pytest.approx(math.sqrt(1 / 3 * 2 / 3 / 128), rel=0.2)


def test_recall_and_precision_against_exact_similarities() -> None:
    """A corpus with planted copies: everything clearly similar is found, nothing clearly different is."""
    rng = random.Random(11)
    vocabulary = [f"word{n}" for n in range(3000)]
    texts: list[str] = []
    for _ in range(30):
        words = rng.choices(vocabulary, k=rng.randrange(200, 800))
        texts.append(" ".join(words))
        for changes in (1, 2, 4, 8, 16, 32):
            copy = list(words)
            for _ in range(changes):
                copy[rng.randrange(len(copy))] = rng.choice(vocabulary)
            texts.append(" ".join(copy))
    order = list(range(len(texts)))
    rng.shuffle(order)
    texts = [texts[i] for i in order]
    removed = duplicates(texts, NEAR)
    of_kept = dict(zip(removed.documents.tolist(), removed.kept.tolist(), strict=True))
    sets = [shingles(text) for text in texts]
    for document in range(len(texts)):
        best = max(
            (len(sets[document] & sets[k]) / len(sets[document] | sets[k]) for k in range(document)),
            default=0,
        )
        if best > 0.9:
            assert document in of_kept
        if best < 0.7:
            assert document not in of_kept
    assert 60 < len(of_kept) < len(texts) - 30


def test_the_first_of_a_group_is_kept() -> None:
    rng = random.Random(2)
    words = [str(rng.getrandbits(40)) for _ in range(400)]
    chain = []
    for _ in range(6):  # each is similar to the next; the first and the last are not
        chain.append(" ".join(words))
        words = words[30:] + [str(rng.getrandbits(40)) for n in range(30)]
    assert jaccard(chain[0], chain[1]) > 0.84
    assert jaccard(chain[0], chain[5]) < 0.5
    texts = ["other text"] + [chain[i] for i in (3, 0, 5, 2, 4, 1)]
    removed = duplicates(texts, NEAR)
    assert removed.documents.tolist() == [2, 3, 4, 5, 6]
    assert removed.kept.tolist() == [1] * 5


def test_exact_copies_lead_to_the_document_that_stays() -> None:
    rng = random.Random(4)
    words = [str(rng.getrandbits(40)) for _ in range(300)]
    similar = " ".join([*words[:-1], "other"])
    texts = [" ".join(words), similar, "x", similar, "x"]
    removed = duplicates(texts)
    assert removed.documents.tolist() == [1, 3, 4]
    assert removed.steps.tolist() == [1, 0, 0]
    assert removed.kept.tolist() == [0, 0, 2]  # 3 is a copy of 1, which is similar to 0
    assert removed.seen == {0: 5, 1: 3}


def test_exact_copies_as_with_a_dictionary() -> None:
    rng = random.Random(6)
    texts = [str(rng.randrange(200)) for _ in range(1000)]
    first = {text: texts.index(text) for text in texts}
    removed = duplicates(texts, (ExactDuplicatesStep(),))
    expected = {n: first[text] for n, text in enumerate(texts) if first[text] != n}
    assert dict(zip(removed.documents.tolist(), removed.kept.tolist(), strict=True)) == expected


def test_short_texts() -> None:
    """Texts of fewer words than an n-gram are compared as a whole, and texts without words as they stand."""
    texts = ["one two", "One, two!", "one two three", "!!!", "???", "!!!", "日本", "日本語の文章です"]
    removed = duplicates(texts, NEAR)
    assert dict(zip(removed.documents.tolist(), removed.kept.tolist(), strict=True)) == {1: 0, 5: 3}


def test_a_bucket_with_many_different_documents() -> None:
    """Many documents agree in a band, but are no duplicates; only pairs of them are."""
    permutations = 128
    rng = np.random.default_rng(8)
    signatures = rng.integers(0, 2**32, (60, permutations), dtype=np.uint32)
    _, rows = bands_and_rows(permutations, 0.8)
    signatures[:, :rows] = 7
    signatures[30:] = signatures[:30]
    removed = find_duplicates(signatures.view(np.uint8), NEAR)
    assert removed.documents.tolist() == list(range(30, 60))
    assert removed.kept.tolist() == list(range(30))


def test_nothing_to_compare() -> None:
    for steps in (BOTH, NEAR, (ExactDuplicatesStep(),)):
        removed = find_duplicates(np.zeros((0, width(steps)), np.uint8), steps)
        assert len(removed.documents) == 0
    assert find_duplicates(np.zeros((5, 0), np.uint8), ()).documents.tolist() == []
    assert duplicates(["a"]).documents.tolist() == []


@pytest.mark.parametrize("num_perm", [16, 100, 128, 256])
@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.8, 0.9, 1.0])
def test_bands_reach_the_recall(num_perm: int, threshold: float) -> None:
    bands, rows = bands_and_rows(num_perm, threshold)
    assert bands * rows <= num_perm
    assert rows == 1 or 1 - (1 - threshold**rows) ** bands >= 0.99
    more = rows + 1
    assert more > num_perm or 1 - (1 - threshold**more) ** (num_perm // more) < 0.99


def test_fingerprints_never_change() -> None:
    """They would lead to other documents in an existing corpus."""
    found = Fingerprinter(BOTH, WordHashes())("The quick brown fox jumps over the lazy dog, again and again.")
    assert len(found) == width(BOTH) == 16 + 4 * 128
    assert found[:24].hex() == "de4ec53be078f08cecac011e197e32235e2b3ec29d6251cb"
