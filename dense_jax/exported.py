"""Exported models: what `dense_jax.export` writes and `load` reads, without Flax or our models.

One zip archive, not compressed, of
  model.json           what the model is; see `export.describe`
  program.bin          jax.export's serialised StableHLO, of (weights, image uint8 [b, h, w, c]) ->
                       logits float32 [b, h, w, num_classes], for any b, h and w
  weights.safetensors  the weights, by their path: "params/encoder/..."
"""

import json
import zipfile
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from etils import epath
from jax import export
from safetensors import numpy as safetensors

FORMAT = "dense_jax model"
VERSION = 1  # of the format: one more with every change that older readers cannot read


class Exported(NamedTuple):
    """What is in the file."""

    about: Mapping[str, Any]  # model.json
    logits_step: Callable  # as of `steps.make_logits_step`
    variables: dict[str, Any]


def read(path: epath.PathLike) -> Exported:
    """Reads an exported model. Raises ValueError if the file is none, of a newer format, or damaged."""
    path = epath.Path(path)
    if not path.exists():
        raise ValueError(
            f"{path} does not exist: it must be a workdir or a file of dense_jax.export"
        )
    try:
        with path.open("rb") as file, zipfile.ZipFile(file) as archive:
            about = json.loads(archive.read("model.json"))
            if about["format"] != FORMAT:
                raise KeyError(about["format"])
            if about["format_version"] > VERSION:
                raise ValueError(
                    f"{path} has version {about['format_version']} of the format, and this dense_jax "
                    f"reads up to {VERSION}: use a newer one"
                )
            program = archive.read("program.bin")
            weights = safetensors.load(archive.read("weights.safetensors"))
    except (zipfile.BadZipFile, KeyError, EOFError) as error:
        raise ValueError(f"{path} is damaged, or no file of dense_jax.export: {error}") from error
    try:
        call = export.deserialize(bytearray(program)).call
    except ValueError as error:
        raise ValueError(
            f"{path} was written by jax {about['exported_with']['versions']['jax']}, and this jax "
            f"cannot read it: {error}"
        ) from error
    return Exported(about, lambda variables, image: call(variables, image[None])[0], weights)
