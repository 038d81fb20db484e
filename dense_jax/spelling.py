"""Texts for people: suggestions for misspelled names, short lists, durations, speeds and scores."""

import difflib
import math
from collections.abc import Iterable, Mapping, Sequence


def suggestion(
    name: str, valid: Iterable[str], spelled: Mapping[str, str] | None = None, *, most: int = 1
) -> str:
    """Returns "; did you mean 'NAME'?" with the closest valid names, or "" if none is close.

    spelled: The text to show for each valid name. If None, the name itself is shown.
    most: The maximum number of names to suggest.
    """
    near = difflib.get_close_matches(name, list(valid), most)
    names = [repr(spelled[word] if spelled else word) for word in near]
    return f"; did you mean {' or '.join(names)}?" if names else ""


def some(names: Sequence[str], limit: int = 5) -> str:
    """Joins the first `limit` names and counts the rest, as in "a, b, c and 2 more"."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def duration(seconds: float) -> str:
    """Writes a duration in its two largest units, as in "4.2 s", "3 min 5 s" or "2 h 10 min"."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def speed(images_per_second: float) -> str:
    """Writes a speed, as in "35.2 images/s"."""
    return f"{images_per_second:,.1f} images/s"


def decimal(value: float) -> str:
    """Writes a score between 0 and 1, as in "0.412" or "0.0003", or "no score" if it is NaN."""
    if math.isnan(value):
        return "no score"
    return f"{value:.1g}" if 0 < value < 0.001 else f"{value:.3f}"
