"""A trained network, ready for images of any size: predictor = load(PATH); predictor(image).

From the workdir of a run, or a file of `dense_jax.export`. It knows its classes' names and colours,
and cuts images that are larger than a tile into tiles, as evaluation does.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jaxtyping import UInt8

from dense_jax import exported, mesh, scoring
from dense_jax.tiles import Tiles


class Predictor:
    """predictor(image) -> classes; see `load`.

    class_names, palette (uint8 [num_classes, 3], RGB), num_channels: of the training data.
    value_range: what becomes 0 and 255 in images that are not of 8 bits, or None.
    """

    def __init__(
        self,
        logits_step: Callable,
        variables: Any,
        dataset: Mapping[str, Any],
        *,
        tile_size: tuple[int, int],
        margin: int,
        context: int,
        batch_size: int,
    ):
        """logits_step: as of `steps.make_logits_step`; dataset: as in dataset.json; the others: as of
        `Tiles`, and tiles per step.
        """
        self.class_names: tuple[str, ...] = tuple(dataset["class_names"])
        self.palette = np.array(dataset["palette"], np.uint8)
        self.num_channels: int = dataset["num_channels"]
        self.value_range = dataset.get("value_range")  # older runs have none
        self.tile_size, self.margin, self.context = tile_size, margin, context
        self.batch_size = batch_size
        self.mesh = mesh.make_mesh()
        self._variables = variables

        def predict_step(variables, example):
            return jnp.argmax(logits_step(variables, example["image"]), axis=-1).astype(jnp.uint8)

        self._step = jax.jit(mesh.map_examples(predict_step, self.mesh))

    def __call__(self, image: UInt8[np.ndarray, "h w c"]) -> UInt8[np.ndarray, "h w"]:
        """The class of each pixel. Raises ValueError for an image of another type or shape."""
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != self.num_channels:
            raise ValueError(
                f"an image must be uint8 [height, width, {self.num_channels}], not {image.dtype} "
                f"{list(image.shape)}"
            )
        ((_, classes),) = self.segment(_One(image))
        return classes

    def segment(self, source: Any) -> Iterator[tuple[int, UInt8[np.ndarray, "h w"]]]:
        """The number in the source and the classes of each image, as they get ready."""
        tiles = Tiles(source, self.tile_size, self.margin, self.context)
        stitcher = scoring.Stitcher(tiles)
        for numbers, classes in scoring.predict_tiles(
            self._step,
            self._variables,
            tiles,
            mesh=self.mesh,
            batch_size=self.batch_size,
            workers=0,
        ):
            yield from stitcher.add(numbers, scoring.local(classes))


class _One:
    """A source of one image."""

    def __init__(self, image: np.ndarray):
        self._image = image
        self.sizes = np.array([image.shape[:2]], np.int32)

    def __len__(self) -> int:
        return 1

    def __getitem__(self, i: int) -> dict[str, np.ndarray]:
        return {"image": self._image, "label": np.zeros(self._image.shape[:2], np.uint8)}


def load(path: epath.PathLike, checkpoint: str = "best") -> Predictor:
    """The network of a workdir, or of a file that `dense_jax.export` wrote.

    checkpoint: of the workdir's, "best" (by eval/mean_iou), "latest", or a step. Raises ValueError if
    there is none such; a file has a single one.
    """
    if epath.Path(path).is_dir():
        from dense_jax import train  # with Flax and our models, which a file does without

        loaded = train.load(str(path), checkpoint)
        dataset, context, options = loaded.dataset, loaded.run.context, loaded.config.eval
        logits_step, variables = loaded.run.logits_step, loaded.variables
    else:
        about, logits_step, variables = exported.read(path)
        if checkpoint not in ("best", str(about["step"])):
            raise ValueError(
                f"no checkpoint {checkpoint!r} in {path}: it was exported at step {about['step']}"
            )
        dataset, context, options = about["dataset"], about["context"], about
        variables = jax.device_put(variables, mesh.replicated(mesh.make_mesh()))
    return Predictor(
        logits_step,
        variables,
        dataset,
        tile_size=tuple(options["tile_size"]),
        margin=options["margin"],
        context=context,
        batch_size=options["batch_size"],
    )
