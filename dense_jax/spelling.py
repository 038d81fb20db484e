"""The nearest valid names, where an unknown one was given."""

import difflib
from collections.abc import Iterable, Mapping


def suggestion(
    name: str, valid: Iterable[str], spelled: Mapping[str, str] | None = None, *, most: int = 1
) -> str:
    """Returns "; did you mean 'NAME'?" with the valid name nearest to `name`, or "".

    spelled: how to spell each valid name, if not as it is.
    most: the largest number of names to suggest.
    """
    near = difflib.get_close_matches(name, list(valid), most)
    names = [repr(spelled[word] if spelled else word) for word in near]
    return f"; did you mean {' or '.join(names)}?" if names else ""
