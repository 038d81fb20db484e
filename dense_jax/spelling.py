"""Suggestions for misspelled names, and short lists of names."""

import difflib
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
