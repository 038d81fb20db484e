"""The nearest valid names where an unknown one was given, and short lists of names."""

import difflib
from collections.abc import Iterable, Mapping, Sequence


def suggestion(name: str, valid: Iterable[str], spelled: Mapping[str, str] | None = None) -> str:
    """Returns "; did you mean 'NAME'?" with the valid name nearest to `name`, or "".

    spelled: what to say for each valid name, if not the name itself.
    """
    near = difflib.get_close_matches(name, list(valid), 1)
    said = [spelled[each] if spelled else each for each in near]
    return f"; did you mean {said[0]!r}?" if said else ""


def some(names: Sequence[str], limit: int = 5) -> str:
    """Returns the first names, and how many more there are: "a, b, c and 2 more"."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
