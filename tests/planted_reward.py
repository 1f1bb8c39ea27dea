"""A reward for tests, as a user gives one: FILE.py:FUNCTION."""


def even_tokens(prompt: str, answer: str, reference: str) -> float:
    """The share of the answer's characters whose numbers are even."""
    return sum(ord(each) % 2 == 0 for each in answer) / max(len(answer), 1)
