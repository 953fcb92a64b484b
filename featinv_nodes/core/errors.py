"""The error for bad input; importing it costs nothing."""


class FeatInvError(ValueError):
    """Bad input; the message says what was wrong, what was expected and what to do."""


class UnknownBackbone(FeatInvError):
    """A name that is not timm's. Callers add where they take names from."""
