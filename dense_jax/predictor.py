"""A trained network, ready for images of any size: predictor = load(PATH); predictor(image).

From the workdir of a run. It knows its classes' names and colours, and cuts images that are larger
than a tile into tiles, as evaluation does.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from etils import epath
from jaxtyping import Float32, UInt8

from dense_jax import mesh, scoring, steps, train
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
        predict_step = steps.make_predict_step(logits_step)
        self._predict_step = self._over_batch(predict_step)
        self._probabilities_step = self._over_batch(
            lambda variables, image: jax.nn.softmax(logits_step(variables, image))
        )

    def _over_batch(self, step: Callable) -> Callable:
        """step(variables, image) -> the same of a batch of tiles, over all devices."""

        def of_example(variables, example):
            return step(variables, example["image"])

        return jax.jit(mesh.map_examples(of_example, self.mesh))

    def __call__(self, image: UInt8[np.ndarray, "h w c"]) -> UInt8[np.ndarray, "h w"]:
        """The class of each pixel. Raises ValueError for an image of another type or shape."""
        return self._of_one(image, self._predict_step)

    def probabilities(
        self, image: UInt8[np.ndarray, "h w c"]
    ) -> Float32[np.ndarray, "h w num_classes"]:
        """The softmax of each pixel. Raises ValueError for an image of another type or shape."""
        return self._of_one(image, self._probabilities_step)

    def _of_one(self, image: np.ndarray, step: Callable) -> np.ndarray:
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != self.num_channels:
            raise ValueError(
                f"an image must be uint8 [height, width, {self.num_channels}], not {image.dtype} "
                f"{list(image.shape)}"
            )
        ((_, whole),) = self._stitched(_One(image), step)
        return whole

    def segment(self, source: Any) -> Iterator[tuple[int, UInt8[np.ndarray, "h w"]]]:
        """The number in the source and the classes of each image, as they get ready."""
        return self._stitched(source, self._predict_step)

    def _stitched(self, source: Any, step: Callable) -> Iterator[tuple[int, np.ndarray]]:
        tiles = Tiles(source, self.tile_size, self.margin, self.context)
        stitcher = scoring.Stitcher(tiles)
        for numbers, maps in scoring.predict_tiles(
            step,
            self._variables,
            tiles,
            mesh=self.mesh,
            batch_size=self.batch_size,
            workers=0,
        ):
            yield from stitcher.add(numbers, scoring.local(maps))


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
    """The network of a workdir: its checkpoint "best" (by eval/mean_iou), "latest", or a step."""
    loaded = train.load(str(path), checkpoint)
    config = loaded.config.eval
    return Predictor(
        loaded.run.logits_step,
        loaded.variables,
        loaded.dataset,
        tile_size=tuple(config.tile_size),
        margin=config.margin,
        context=loaded.run.context,
        batch_size=config.batch_size,
    )
