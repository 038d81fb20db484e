"""The nearest valid name, where an unknown one was given."""

import difflib
from collections.abc import Iterable, Mapping, Sequence


def suggestion(name: str, valid: Iterable[str], spelled: Mapping[str, str] | None = None) -> str:
    """Returns "; did you mean 'NAME'?" with the valid name nearest to `name`, or "".

    spelled: what to say for each valid name, if not the name itself.
    """
    near = difflib.get_close_matches(name, list(valid), 1)
    said = [spelled[each] if spelled else each for each in near]
    return f"; did you mean {said[0]!r}?" if said else ""


def some(names: Sequence[str]) -> str:
    """Returns the first five names, and ", ..." if there are more."""
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
