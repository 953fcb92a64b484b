"""The error for bad input, and lists in its messages; importing it costs nothing."""

from collections.abc import Collection


class FeatInvError(ValueError):
    """Bad input; the message says what was wrong, what was expected and what to do."""


class UnknownBackbone(FeatInvError):
    """A name that is not timm's. Callers add where they take names from."""


def some_of(names: Collection[str], most: int) -> str:
    """The first names of a list, at most so many, and how many more there are: "a, b and 3 more"."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(list(names)[:most]) + more
