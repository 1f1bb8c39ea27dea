"""Text from tokens: stop texts, characters of several bytes, and the pieces in which a text appears."""

from collections.abc import Iterable

import pytest
import torch
from torch import Tensor, nn

from megatrain.data.tokenizer import ByteTokenizer, train_bpe
from megatrain.models.generate import Produced
from megatrain.models.sampling import Sampling
from megatrain.train.generation import Continuation, TextRequest, continue_texts


class Reciter(nn.Module):
    """Says a fixed text, byte after byte, and then ends the document."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.said = [*text.encode(), ByteTokenizer.eos_id]
        self.anything = nn.Parameter(torch.zeros(()))

    def forward(self, tokens: Tensor, *, positions: Tensor, keep: Tensor) -> Tensor:
        places = positions[0, keep]  # of the last token of each prompt, which has one
        logits = torch.zeros(1, len(keep), ByteTokenizer.vocab_size)
        for row, place in enumerate(places.tolist()):
            logits[0, row, self.said[min(place, len(self.said) - 1)]] = 50.0
        return logits


def texts(said: str, *stops: tuple[str, ...], tokens: int = 99) -> list[tuple[list[str], Continuation]]:
    """Pieces and result of one request for each tuple of stop texts."""
    requests = [
        TextRequest(prompt="x", tokens=tokens, sampling=Sampling(temperature=0), stop=stop) for stop in stops
    ]
    found: list[list[str]] = [[] for _ in stops]
    last: dict[int, Continuation] = {}
    for n, piece, text in continue_texts(Reciter(said), ByteTokenizer(), requests, context=200):
        found[n].append(piece)
        last[n] = text
    return [(pieces, last[n]) for n, pieces in enumerate(found)]


def test_stop_texts() -> None:
    said = "one, two. Three: fin"
    cases = {
        (): (said, "stop"),
        (". ",): ("one, two", "stop"),
        ("Three", ","): ("one", "stop"),
        ("two. Four", "fine"): (said, "stop"),  # they begin, but do not come
        ("o",): ("", "stop"),
    }
    for (pieces, text), (expected, finish) in zip(texts(said, *cases), cases.values(), strict=True):
        assert (text.text, text.finish) == (expected, finish)
        assert "".join(pieces) == expected
        assert all(piece not in (".", ". ") for piece in pieces) or ". " not in text.request.stop
    assert texts(said, (), tokens=5)[0][1].finish == "length"
    assert texts(said, (), tokens=5)[0][1].text == said[:5]


def test_no_piece_is_taken_back() -> None:
    """What was shown is the beginning of what comes, though a stop text or a character may be under way."""
    said = "aab aabb \N{EURO SIGN}\N{GRINNING FACE} aabbb"
    for pieces, text in texts(said, (), ("aabbb",), ("\N{GRINNING FACE}",), ("aab ",)):
        shown = ""
        for piece in pieces:
            shown += piece
            assert text.text.startswith(shown)
            assert not shown.endswith("\N{REPLACEMENT CHARACTER}")
        assert shown == text.text


@pytest.mark.parametrize("tokens", [1, 2])
def test_an_incomplete_character_at_the_end_is_left_out(tokens: int) -> None:
    assert texts("\N{EURO SIGN}", (), tokens=tokens)[0][1].text == ""


def test_a_long_text_is_decoded_from_near_its_end() -> None:
    """As it is from its beginning, whatever the tokens are; and no text of many tokens is decoded as a whole."""
    longest = 0

    class Counting(ByteTokenizer):
        def decode(self, ids: Iterable[int]) -> str:
            nonlocal longest
            found = list(ids)
            longest = max(longest, len(found))
            return super().decode(found)

    bpe = train_bpe(iter(["the square of Größe " * 9]), vocab_size=300)
    generator = torch.Generator().manual_seed(0)
    valid = [*("Größe \N{GRINNING FACE}, \N{EURO SIGN}5. " * 20).encode()]
    for tokens in (valid, torch.randint(257, (400,), generator=generator).tolist()):
        for tokenizer, plain in ((Counting(), ByteTokenizer()), (bpe, bpe)):
            text = Continuation(TextRequest(prompt="", tokens=400, stop=("never",)), tokenizer)
            pieces = [
                text.take(Produced(0, token, "length" if n == len(tokens) - 1 else ""))
                for n, token in enumerate(tokens)
            ]
            assert "".join(pieces) == text.text == plain.decode(tokens).rstrip("\N{REPLACEMENT CHARACTER}")
        if tokens is valid:
            assert longest < 60
