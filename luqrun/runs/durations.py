"""How long runs take, in words."""

from __future__ import annotations

MINUTE, HOUR, DAY = 60, 3600, 86400  # seconds


def in_words(seconds: float) -> str:
    """Such as 48 s, 12 min, 3 h 5 min or 2 d 4 h: as much as one wants to know of what is only estimated."""
    if round(seconds) < MINUTE:
        return f"{seconds:.0f} s"
    minutes = round(seconds / MINUTE)
    if minutes < HOUR // MINUTE:
        return f"{minutes} min"
    if minutes * MINUTE < DAY:
        return f"{minutes // 60} h {minutes % 60} min"
    hours = round(seconds / HOUR)
    return f"{hours // 24} d {hours % 24} h"
