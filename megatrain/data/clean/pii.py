"""Masking of personal data that has a form: e-mail and IP addresses, telephone, card and account numbers.

Every pattern is bounded and begins at a boundary, so that the time is linear in the text's length. Names and postal
addresses have no form, and are not found.
"""

import ipaddress
import re
from collections.abc import Callable

from megatrain.data.clean.config import PersonalData

EMAIL = re.compile(
    r"(?<![\w.%+-])[\w.%+-]{1,64}@(?:[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?\.){1,8}[A-Za-z]{2,24}(?![A-Za-z0-9])"
)
IBAN = re.compile(r"(?<!\w)[A-Z]{2}[0-9]{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,3})?(?!\w)")
CARD = re.compile(r"(?<![\w.])[0-9](?:[ -]?[0-9]){12,18}(?![\w]|\.[0-9])")
IP = re.compile(
    r"(?<![\w.:])(?:[0-9]{1,3}(?:\.[0-9]{1,3}){3}(?!\.?[0-9])|(?:[0-9A-Fa-f]{0,4}:){2,7}[0-9A-Fa-f]{0,4})(?![\w:])"
)
PHONE = re.compile(
    r"(?<![\w+.-])(?:\+[0-9]{1,3}[ .-]?(?:\([0-9]{1,4}\)[ .-]?)?[0-9]{1,4}(?:[ .-]?[0-9]{2,4}){1,5}"  # +49 30 1234567
    r"|(?:\([0-9]{3}\) ?|[0-9]{3}[.-])[0-9]{3}[.-][0-9]{4})(?![\w-])"  # (212) 555-0123, as in North America
)


def mask(text: str, kinds: tuple[PersonalData, ...]) -> str:
    """Return `text` with all data of `kinds` replaced by their names in brackets."""
    for kind, (mark, pattern, is_one) in RULES.items():
        if kind in kinds and mark(text):
            text = pattern.sub(_masker(f"[{kind.upper()}]", is_one), text)
    return text


def _masker(name: str, is_one: Callable[[str], bool]) -> Callable[[re.Match[str]], str]:
    return lambda found: name if is_one(found[0]) else found[0]


def is_card(text: str) -> bool:
    """Return whether the digits of `text` have a right check digit (Luhn, ISO/IEC 7812-1) and are not all equal."""
    digits = [int(char) for char in text if char in "0123456789"]
    doubled = [sum(divmod(2 * digit, 10)) for digit in digits[-2::-2]]
    return len(set(digits)) > 1 and (sum(doubled) + sum(digits[::-2])) % 10 == 0


def is_iban(text: str) -> bool:
    """Return whether `text` has the right check digits of an account number (ISO 13616, ISO 7064 mod 97-10)."""
    bare = text.replace(" ", "")
    digits = "".join(str(int(char, 36)) for char in bare[4:] + bare[:4])
    return 15 <= len(bare) <= 34 and int(digits) % 97 == 1


def is_public_address(text: str) -> bool:
    """Return whether `text` is an IP address that is reachable from the internet."""
    try:
        return ipaddress.ip_address(text).is_global
    except ValueError:
        return False


def is_phone(text: str) -> bool:
    """Return whether `text` has as many digits as telephone numbers (ITU-T E.164)."""
    return 8 <= sum(char.isdigit() for char in text) <= 15


def _always(text: str) -> bool:
    return True


def _has_digits(text: str) -> bool:
    return re.search(r"[0-9]", text) is not None


def _has_address(text: str) -> bool:
    return "." in text or "::" in text or ":" in text


RULES: dict[PersonalData, tuple[Callable[[str], bool], re.Pattern[str], Callable[[str], bool]]] = {
    "email": (lambda text: "@" in text, EMAIL, _always),
    "iban": (_has_digits, IBAN, is_iban),
    "card": (_has_digits, CARD, is_card),
    "ip": (_has_address, IP, is_public_address),
    "phone": (_has_digits, PHONE, is_phone),
}
"""Kind -> a quick test whether the text can have any, the pattern, and the test of what it finds; applied in order."""
