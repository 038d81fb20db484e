"""The nearest valid name, where an unknown one was given."""

import difflib
from collections.abc import Iterable, Mapping


def suggestion(name: str, valid: Iterable[str]) -> str:
    """Returns "; did you mean 'NAME'?" with the valid name nearest to `name`, or "".

    Of a mapping, the value under the nearest key is shown.
    """
    near = difflib.get_close_matches(name, list(valid), 1)
    shown = valid[near[0]] if near and isinstance(valid, Mapping) else "".join(near)
    return f"; did you mean {shown!r}?" if near else ""
