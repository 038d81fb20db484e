"""Downloads from the Hugging Face hub. They stay in its cache, where later calls find them offline."""

import os
from pathlib import Path

SCHEME = "hf://"
# The part of a workdir that a network is loaded from.
WORKDIR = ["config.json", "dataset.json", "environment.json", "checkpoints/*"]


def local(path: str | os.PathLike[str]) -> str | os.PathLike[str]:
    """Returns the local path of hf://OWNER/NAME, a workdir, or of hf://OWNER/NAME/FILE.

    Any other path stays as it is. Raises ValueError like `download`.
    """
    if not str(path).startswith(SCHEME):
        return path
    try:
        return download(str(path).removeprefix(SCHEME))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def download(name: str) -> Path:
    """Returns the local path of OWNER/NAME/FILE, or of the workdir that the repository OWNER/NAME is.

    Raises ValueError if there is no such repository or file, or if it cannot be downloaded. The
    message says how to get it.
    """
    owner, name, file = [*name.split("/", 2), "", ""][:3]
    if not owner or not name:
        raise ValueError("it must be hf://OWNER/NAME or hf://OWNER/NAME/FILE")
    import huggingface_hub  # slow to import, and few runs need it

    repository = f"{owner}/{name}"
    try:
        if file:
            return Path(huggingface_hub.hf_hub_download(repository, file))
        return Path(huggingface_hub.snapshot_download(repository, allow_patterns=WORKDIR))
    except huggingface_hub.errors.RepositoryNotFoundError as error:
        raise ValueError(
            f"the hub has no repository {repository}, or you may not read it: log in by "
            "`hf auth login`"
        ) from error
    except (OSError, ValueError) as error:  # the base classes of huggingface_hub's errors
        reason = " ".join(str(error).split()).rstrip(".")
        raise ValueError(
            f"it cannot be downloaded: {reason}. Where there is a network, run `hf download "
            f"{f'{repository} {file}'.rstrip()}`, and copy the folder models--{owner}--{name} of "
            f"its cache to {huggingface_hub.constants.HF_HUB_CACHE}"
        ) from error
