"""What every part of the house raises for bad input; importing it costs nothing."""


class FeatInvError(ValueError):
    """Bad input; the message says what was wrong, what was expected and what to do."""
