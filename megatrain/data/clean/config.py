"""The steps of `data.clean`: what each does to a document, with the thresholds and their sources.

A step stands in the list as its name alone (`fix_text`) or as a mapping with its keys
(`{kind: language, keep: [en]}`).
"""

from collections.abc import Iterator
from typing import Annotated, ClassVar, Literal

from megatrain.config.paths import PathText
from megatrain.config.ranges import Fraction, PositiveCount, Range
from megatrain.config.schema import Problem, config

Language = Literal[
    "ace", "af", "am", "an", "ar", "ary", "arz", "as", "az", "ba", "bcl", "be", "bg", "bn", "br", "bs", "ca",
    "crh", "cs", "cy", "da", "de", "dz", "el", "en", "eo", "es", "et", "eu", "ext", "fa", "fi", "fo", "fr",
    "fuv", "fy", "ga", "gcf", "gcr", "gd", "gl", "gom", "grc", "gu", "gug", "guw", "ha", "hbo", "he", "hi",
    "hr", "ht", "hu", "hy", "id", "ig", "is", "it", "ja", "jv", "ka", "kab", "kik", "kk", "km", "kn", "ko",
    "ku", "ky", "la", "lb", "lg", "lij", "ln", "lo", "lt", "ltg", "lv", "mg", "mk", "ml", "mn", "mr", "ms",
    "mt", "my", "ne", "nl", "nn", "no", "nso", "oc", "om", "or", "pa", "pcm", "pl", "ps", "pt", "qu", "ro",
    "ru", "rw", "sa", "sdh", "se", "si", "sk", "sl", "sn", "so", "sq", "sr", "st", "sv", "sw", "ta", "te", "tg",
    "th", "tk", "tl", "tr", "tt", "ug", "uk", "ur", "uz", "uzs", "vec", "vi", "vo", "wa", "wuu", "xh", "yo",
    "yue", "zh", "zu", "zxx",
]  # fmt: skip
"""The languages that py3langid 0.4 tells apart; zxx is no language, such as tables of numbers."""
PersonalData = Literal["email", "ip", "phone", "card", "iban"]


@config
class FixTextStep:
    """Repair of encoding errors with ftfy: "schÃ¶n" becomes "schön"; control characters and entities too."""

    BY_NAME: ClassVar = True
    kind: Literal["fix_text"] = "fix_text"
    plain_typography: bool = False
    """Also replace curly quotes, ligatures and full-width letters by plain ones, and line ends by \\n."""


@config
class NormalizeStep:
    """Unicode normalization (UAX #15)."""

    BY_NAME: ClassVar = True
    kind: Literal["normalize"] = "normalize"
    form: Literal["NFC", "NFKC", "NFD", "NFKD"] = "NFC"
    """Normalization form. NFC only composes accents; NFKC also replaces ligatures, superscripts and the like."""


@config
class HtmlStep:
    """Main text of a web page, found by trafilatura; documents that are not HTML pass unchanged."""

    BY_NAME: ClassVar = True
    kind: Literal["html"] = "html"
    favor: Literal["precision", "recall", "balance"] = "precision"
    """What to prefer in doubt: precision leaves out more boilerplate, recall keeps more text."""
    comments: bool = False
    """Keep the readers' comments below an article."""
    tables: bool = True
    """Keep the text of tables."""


@config
class LanguageStep:
    """Selection of languages, identified by py3langid."""

    BY_NAME: ClassVar = True
    kind: Literal["language"] = "language"
    keep: tuple[Language, ...] = ()
    """Languages to keep, as ISO 639 codes; must be given."""
    at_least: Fraction = 0.65
    """Least probability of the identified language; documents below it are removed. 0.65 is FineWeb's."""

    def problems(self) -> Iterator[Problem]:
        if not self.keep:
            yield Problem("keep", self.keep, "must name at least one language, such as [en]")


@config
class GopherRules:
    """Quality rules of Gopher (Rae et al., arXiv 2112.11446, section A.1.1); words are separated by white space."""

    BY_NAME: ClassVar = True
    kind: Literal["gopher"] = "gopher"
    min_words: PositiveCount = 50
    """Least number of words."""
    max_words: PositiveCount = 100_000
    """Greatest number of words."""
    min_word_length: Annotated[float, Range(at_least=0)] = 3.0
    """Least mean length of a word in characters."""
    max_word_length: Annotated[float, Range(above=0)] = 10.0
    """Greatest mean length of a word in characters."""
    max_symbols_per_word: Annotated[float, Range(at_least=0)] = 0.1
    """Greatest number of # per word, and of ellipses per word."""
    max_bullet_lines: Fraction = 0.9
    """Greatest fraction of lines that begin with a bullet."""
    max_ellipsis_lines: Fraction = 0.3
    """Greatest fraction of lines that end with an ellipsis."""
    min_alphabetic_words: Fraction = 0.8
    """Least fraction of words with at least one letter."""
    min_stop_words: Annotated[int, Range(at_least=0, at_most=8)] = 2
    """Least number of different words out of: the, be, to, of, and, that, have, with. 0 for other languages than
    English."""

    def problems(self) -> Iterator[Problem]:
        if self.min_words > self.max_words:
            yield Problem("min_words", self.min_words, f"must be at most max_words ({self.max_words})")
        if self.min_word_length > self.max_word_length:
            rule = f"must be at most max_word_length ({self.max_word_length})"
            yield Problem("min_word_length", self.min_word_length, rule)


@config
class C4Rules:
    """Rules of C4 (Raffel et al., arXiv 1910.10683, section 2.2), without its list of offensive words."""

    BY_NAME: ClassVar = True
    kind: Literal["c4"] = "c4"
    end_marks: bool = True
    """Remove lines that do not end in a period, an exclamation mark, a question mark or a quotation mark, or that end
    in an ellipsis."""
    min_words_per_line: Annotated[int, Range(at_least=0)] = 5
    """Least number of words of a line; shorter lines are removed."""
    min_sentences: Annotated[int, Range(at_least=0)] = 3
    """Least number of sentences that remain in a document."""
    javascript: bool = True
    """Remove lines that contain the word Javascript."""
    policy: bool = True
    """Remove lines with notices on cookies, privacy and terms of use."""
    citations: bool = True
    """Remove the citation marks of Wikipedia: [1], [edit], [citation needed]."""
    lorem_ipsum: bool = True
    """Remove documents that contain "lorem ipsum"."""
    curly_brackets: bool = True
    """Remove documents that contain a curly bracket, which is nearly all source code."""


@config
class FineWebRules:
    """Rules that FineWeb adds to Gopher's and C4's (Penedo et al., arXiv 2406.17557, section 3.6); empty lines do not
    count."""

    BY_NAME: ClassVar = True
    kind: Literal["fineweb"] = "fineweb"
    min_punctuated_lines: Fraction = 0.12
    """Fraction of lines that end with a sentence's punctuation, at or below which a document is removed."""
    max_duplicate_characters: Fraction = 0.1
    """Fraction of characters in duplicated lines, at or above which a document is removed."""
    max_short_lines: Fraction = 0.67
    """Fraction of short lines, at or above which a document is removed."""
    short_line: PositiveCount = 30
    """Characters below which a line is short."""


@config
class QualityStep:
    """Removal of documents, or of their lines, by published rules."""

    BY_NAME: ClassVar = True
    kind: Literal["quality"] = "quality"
    rules: GopherRules | C4Rules | FineWebRules = GopherRules()
    """Set of rules: a name, or a mapping that also sets thresholds, such as {kind: gopher, min_words: 20}."""


@config
class RepetitionStep:
    """Gopher's limits on repetition (Rae et al., arXiv 2112.11446, table A1). A line, paragraph or n-gram is a
    duplicate if the same one stands earlier in the document."""

    BY_NAME: ClassVar = True
    kind: Literal["repetition"] = "repetition"
    duplicate_lines: Fraction = 0.30
    """Greatest fraction of lines that are duplicates."""
    duplicate_paragraphs: Fraction = 0.30
    """Greatest fraction of paragraphs that are duplicates."""
    duplicate_line_characters: Fraction = 0.20
    """Greatest fraction of characters in duplicate lines."""
    duplicate_paragraph_characters: Fraction = 0.20
    """Greatest fraction of characters in duplicate paragraphs."""
    top_ngrams: tuple[Fraction, ...] = (0.20, 0.18, 0.16)
    """Greatest fraction of characters in the most frequent n-gram of words, for n = 2, 3, 4."""
    duplicate_ngrams: tuple[Fraction, ...] = (0.15, 0.14, 0.13, 0.12, 0.11, 0.10)
    """Greatest fraction of characters in duplicate n-grams of words, for n = 5 to 10."""

    def problems(self) -> Iterator[Problem]:
        if len(self.top_ngrams) != 3:
            yield Problem("top_ngrams", self.top_ngrams, "must be three fractions, for n = 2, 3, 4")
        if len(self.duplicate_ngrams) != 6:
            yield Problem("duplicate_ngrams", self.duplicate_ngrams, "must be six fractions, for n = 5 to 10")


@config
class PiiStep:
    """Masking of personal data by patterns: [EMAIL], [IP], [PHONE], [CARD], [IBAN]."""

    BY_NAME: ClassVar = True
    kind: Literal["pii"] = "pii"
    mask: tuple[PersonalData, ...] = ("email", "ip", "phone", "card", "iban")
    """What to mask. ip: public addresses only; card and iban: numbers whose checksum is right."""

    def problems(self) -> Iterator[Problem]:
        if not self.mask:
            yield Problem("mask", self.mask, "must name at least one of email, ip, phone, card, iban")


@config
class Text8Step:
    """Matt Mahoney's filter of text8 (mattmahoney.net/dc/textdata): a to z and single spaces, digits spelled out."""

    BY_NAME: ClassVar = True
    kind: Literal["text8"] = "text8"


@config
class ExactDuplicatesStep:
    """Removal of documents whose text stands earlier in the corpus."""

    BY_NAME: ClassVar = True
    kind: Literal["exact_duplicates"] = "exact_duplicates"


@config
class NearDuplicatesStep:
    """Removal of documents that are similar to an earlier one: MinHash over n-grams of words (Broder 1997), with
    candidates from locality-sensitive hashing."""

    BY_NAME: ClassVar = True
    kind: Literal["near_duplicates"] = "near_duplicates"
    threshold: Annotated[float, Range(at_least=0.1, at_most=1)] = 0.8
    """Jaccard similarity of the sets of n-grams from which two documents count as duplicates."""
    ngram: PositiveCount = 5
    """Words per n-gram."""
    num_perm: Annotated[int, Range(at_least=16, at_most=4096)] = 128
    """Number of hash functions. Each takes 4 bytes per document; the estimate's standard error is at most
    0.5 / sqrt(num_perm)."""


@config
class DecontaminateStep:
    """Removal of documents that share an n-gram of words with a benchmark's texts."""

    BY_NAME: ClassVar = True
    kind: Literal["decontaminate"] = "decontaminate"
    against: tuple[PathText, ...] = ()
    """Files of the benchmarks: text, or .jsonl, in which every string counts, however deep. Must be given."""
    ngram: PositiveCount = 13
    """Words per n-gram, without case and punctuation. 13 is GPT-3's (arXiv 2005.14165, appendix C)."""

    def problems(self) -> Iterator[Problem]:
        if not self.against:
            yield Problem("against", self.against, "must name at least one file")


CleanStep = (
    FixTextStep
    | NormalizeStep
    | HtmlStep
    | LanguageStep
    | QualityStep
    | RepetitionStep
    | PiiStep
    | Text8Step
    | DecontaminateStep
    | ExactDuplicatesStep
    | NearDuplicatesStep
)
CorpusStep = ExactDuplicatesStep | NearDuplicatesStep
"""The steps that compare documents with each other; all others see one document at a time."""


def order_problems(steps: tuple[CleanStep, ...]) -> Iterator[Problem]:
    """Yield a problem for each step that follows one of the whole corpus, and for corpus steps that stand twice."""
    seen: list[str] = []
    for index, step in enumerate(steps):
        if isinstance(step, CorpusStep):
            if step.kind in seen:
                yield Problem(f"clean[{index}].kind", step.kind, "stands in the list already; remove one")
            seen.append(step.kind)
        elif seen:
            rule = f"must come before {seen[0]}, which compares whole documents as all other steps leave them"
            yield Problem(f"clean[{index}].kind", step.kind, rule)
