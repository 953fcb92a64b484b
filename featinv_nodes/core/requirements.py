"""The oldest timm that works; importing this costs nothing."""

from __future__ import annotations

import re

TIMM = (1, 0, 12)  # as in requirements.txt


def old_timm(version: str) -> str:
    """What to say of a version of timm that is too old, "" of any other. version: such as 1.0.12 or 1.0.13.dev0."""
    if tuple(int(digits) for digits in re.findall(r"\d+", version)[:3]) >= TIMM:
        return ""
    needed = ".".join(map(str, TIMM))
    return (
        f"timm {version} is installed, but FeatInv needs timm {needed} or newer; run `pip install -U"
        f' "timm>={needed}"` with the Python that runs this, and start again'
    )
