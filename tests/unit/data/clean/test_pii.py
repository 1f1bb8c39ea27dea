"""Personal data: what is masked, what is not, and the check digits against known numbers."""

import pytest

from megatrain.data.clean.pii import RULES, is_card, is_iban, mask

ALL = tuple(RULES)

MASKED = [
    ("write to jane.doe+news@mail.example.co.uk.", "write to [EMAIL]."),
    ("<a@b.de>", "<[EMAIL]>"),
    ("müller@example.de", "[EMAIL]"),
    ("from 8.8.8.8, port 53", "from [IP], port 53"),
    ("at 2001:4860:4860::8888 today", "at [IP] today"),
    ("IBAN DE89 3704 0044 0532 0130 00.", "IBAN [IBAN]."),
    ("GB29NWBK60161331926819", "[IBAN]"),
    ("card 4111 1111 1111 1111,", "card [CARD],"),
    ("378282246310005", "[CARD]"),
    ("5555-5555-5555-4444", "[CARD]"),
    ("call +49 30 1234567 now", "call [PHONE] now"),
    ("call +1 (212) 555-0123", "call [PHONE]"),
    ("(212) 555-0123", "[PHONE]"),
    ("212-555-0123", "[PHONE]"),
    ("+442079460958", "[PHONE]"),
]
KEPT = [
    "a@b", "@decorator", "user@host", "3.14159", "version 1.2.3", "1.2.3.4.5", "v1.2.3.4", "999.1.1.1",
    "127.0.0.1", "192.168.0.1", "10.1.2.3", "::1", "std::vector", "12:30:45", "4111 1111 1111 1112", "0000000000000000",
    "DE00 3704 0044 0532 0130 00", "2026-11-28", "1234567890", "100,000,000", "+1", "+12", "1-2-3", "12345678901234",
]  # fmt: skip


@pytest.mark.parametrize(("text", "expected"), MASKED)
def test_masked(text: str, expected: str) -> None:
    assert mask(text, ALL) == expected


@pytest.mark.parametrize("text", KEPT)
def test_kept(text: str) -> None:
    assert mask(text, ALL) == text


def test_only_what_is_asked_for() -> None:
    text = "a@b.de 8.8.8.8"
    assert mask(text, ("ip",)) == "a@b.de [IP]"


@pytest.mark.parametrize("number", ["79927398713", "4012888888881881", "6011111111111117", "30569309025904"])
def test_luhn(number: str) -> None:
    """Published test numbers; every change of one digit is noticed."""
    assert is_card(number)
    for at, digit in enumerate(number):
        for other in "0123456789":
            assert is_card(number[:at] + other + number[at + 1 :]) == (other == digit)


def test_iban() -> None:
    for number in (
        "DE89370400440532013000",
        "FR1420041010050500013M02606",
        "NO9386011117947",
        "MT84MALT011000012345MTLCAST001S",
    ):
        assert is_iban(number)
        assert not is_iban(number[:-1] + ("1" if number[-1] != "1" else "2"))
