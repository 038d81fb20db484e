"""A trained network, ready for images of any size: predictor = load(PATH); predictor(image).

From the workdir of a run, or from a file of `dense_jax.export`. It knows its classes' names and
colors, and cuts images that are larger than a tile into tiles, as evaluation does.
"""

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jaxtyping import Float32, UInt8
from tqdm import tqdm

from dense_jax.data.tiles import Tiles, tilings
from dense_jax.devices import mesh
from dense_jax.inference import exported, tta
from dense_jax.inference import threads as background
from dense_jax.inference.stitching import Failure, Mosaic, Piece, cut


class Strip(NamedTuple):
    """Rows `start` to `stop` of image `index`, and their maps [n, w, ...] by name.

    maps["classes"]: uint8 [n, w].
    """

    index: int
    start: int
    stop: int
    image: UInt8[np.ndarray, "n w c"]
    maps: dict[str, np.ndarray]


class Predictor:
    """predictor(image) -> classes; see `load`.

    class_names, palette (uint8 [num_classes, 3], RGB), num_channels: of the training data.
    value_range: what becomes 0 and 255 in images that are not of 8 bits, or None.
    image_size: the largest height and width of the run's images, in pixels; see `tilings`.
    """

    def __init__(
        self,
        logits_step: Callable,
        variables: Any,
        dataset: Mapping[str, Any],
        *,
        tile_size: Sequence[int],
        margin: int,
        context: int,
        batch_size: int,
    ):
        """logits_step: as of `steps.make_logits_step`; dataset: as in dataset.json; the others: as of
        `tilings`, and tiles per step.
        """
        self.class_names: tuple[str, ...] = tuple(dataset["class_names"])
        self.palette = np.array(dataset["palette"], np.uint8)
        self.num_channels: int = dataset["num_channels"]
        self.value_range = dataset.get("value_range")  # older runs have none
        self.image_size = tuple(dataset["image_size"])
        self.tile_size, self.margin, self.context = tuple(tile_size), margin, context
        self.batch_size = batch_size
        self.blend = False
        self.augment: tuple[str, ...] = ()
        self.mesh = mesh.make_mesh()
        self._logits_step = logits_step
        self._variables = variables
        self._steps = self._make_steps()

    def using(
        self,
        *,
        tile_size: Sequence[int] | None = None,
        margin: int | None = None,
        batch_size: int | None = None,
        blend: bool | None = None,
        augment: Sequence[str] | None = None,
    ) -> "Predictor":
        """The same network, used in another way. What is None stays as it is.

        tile_size, margin: in pixels; see `tilings`. batch_size: tiles per step.
        blend: whether tiles overlap by their margins and are blended there; see `Mosaic`.
        augment: names of `tta.AUGMENTATIONS`.

        Raises ValueError naming an argument that cannot be.
        """
        other = copy.copy(self)
        if batch_size is not None and batch_size < 1:
            raise ValueError(f"batch_size={batch_size} must be at least 1")
        if margin is not None and margin < 0:
            raise ValueError(f"margin={margin} must be at least 0")
        if tile_size is not None and not (len(tile_size) == 2 and min(tile_size) > 0):
            raise ValueError(f"tile_size={tuple(tile_size)} must be a height and a width in pixels")
        for name, value in (
            ("tile_size", tile_size and tuple(tile_size)),
            ("margin", margin),
            ("batch_size", batch_size),
            ("blend", blend),
            ("augment", None if augment is None else tuple(augment)),
        ):
            if value is not None:
                setattr(other, name, value)
        if other.context and "scales" in other.augment:
            raise ValueError(
                "a network without padding cannot be augmented by scales: its border would show"
            )
        other._steps = other._make_steps()
        return other

    def __call__(self, image: np.ndarray) -> UInt8[np.ndarray, "h w"]:
        """The class of each pixel of an image, uint8 [h, w, num_channels]; ValueError for others."""
        return self._of_one(image, "classes")

    def probabilities(self, image: np.ndarray) -> Float32[np.ndarray, "h w num_classes"]:
        """The softmax of each pixel of an image, uint8 [h, w, num_channels]; ValueError for others."""
        return self._of_one(image, "probabilities", probabilities=lambda block: block)

    def _of_one(self, image: np.ndarray, wanted: str, **maps: Callable) -> np.ndarray:
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != self.num_channels:
            raise ValueError(
                f"an image must be uint8 [height, width, {self.num_channels}], not {image.dtype} "
                f"{list(image.shape)}"
            )
        parts = []
        for strip in self.segment(_One(image), maps):
            assert isinstance(strip, Strip)  # an array is not broken
            parts.append(strip.maps[wanted])
        return np.concatenate(parts)

    def segment(
        self, images: Any, maps: Mapping[str, Callable[[np.ndarray], np.ndarray]] | None = None
    ) -> Iterator[Strip | Failure]:
        """The images' rows in order, with their maps, as they get ready.

        One image comes after the other: first those that are cut as the run's own are, then those
        that are too large for it; see `tilings`.

        An image that turns out to be broken ends with a `Failure`, and the others go on. Images are
        read ahead, and computed in equal batches of tiles, by one program for each size of tiles.
        What is in memory does not depend on their heights.

        images: as of `mosaic.cut`.
        maps: what to make, beside the classes, of the probabilities, float32 [n, m, num_classes],
          of a part of an image: arrays [n, m, ...].
        """
        for tiles in tilings(images, self.image_size, self.tile_size, self.margin, self.context):
            yield from self._segment(tiles, maps or {})

    def _segment(
        self, tiles: Tiles, maps: Mapping[str, Callable[[np.ndarray], np.ndarray]]
    ) -> Iterator[Strip | Failure]:
        images = tiles.source
        mosaic = Mosaic(tiles, tiles.margin - self.context if self.blend else np.zeros(2, int))
        step = self._steps[1 if self.blend or maps else 0]
        row: dict[str, np.ndarray] = {}  # of blocks, from the left on
        bar = tqdm(total=len(tiles), unit="tile", leave=False, disable=None)
        with bar:
            for piece, outputs in self._outputs(step, cut(images, tiles, mosaic)):
                if isinstance(piece, Failure):
                    bar.update(tiles.of_image(piece.index).stop - bar.n)
                    row = {}
                    yield piece
                    continue
                bar.update()
                i, rows, columns = mosaic.block(piece.number)
                block = mosaic.add(piece.number, outputs[-1])
                if self.blend:
                    classes = block.argmax(axis=-1).astype(np.uint8)
                else:
                    classes = outputs[0][tiles.place(piece.number)[2]]
                parts = {"classes": classes} | {name: make(block) for name, make in maps.items()}
                for name, part in parts.items():
                    if name not in row:
                        shape = len(part), images.sizes[i][1], *part.shape[2:]
                        row[name] = np.empty(shape, part.dtype)
                    row[name][:, columns] = part
                if piece.rows is not None:
                    if rows.start < rows.stop:
                        yield Strip(i, rows.start, rows.stop, piece.rows, row)
                    row = {}

    def _make_steps(self) -> tuple[Callable, Callable]:
        """(variables, batch) -> [classes], and -> [classes, probabilities], over all devices."""
        scores_step = self._logits_step
        if self.augment:
            scores_step = tta.make_probabilities_step(scores_step, self.augment)

        def most_likely(scores):
            return jnp.argmax(scores, axis=-1).astype(jnp.uint8)

        def classes(variables, example):
            return [most_likely(scores_step(variables, example["image"]))]

        def both(variables, example):
            scores = scores_step(variables, example["image"])
            return [most_likely(scores), scores if self.augment else jax.nn.softmax(scores)]

        first, second = (jax.jit(mesh.map_examples(f, self.mesh)) for f in (classes, both))
        return first, second

    def _outputs(
        self, step: Callable, pieces: Iterable[Piece | Failure]
    ) -> Iterator[tuple[Piece | Failure, list[np.ndarray]]]:
        """Each piece and the outputs of its tile, a batch late: the device never waits for them."""
        batch_size = -(-self.batch_size // self.mesh.size) * self.mesh.size

        def computed(batch):
            tiles = [piece.image for piece in batch if isinstance(piece, Piece)]
            if not tiles:
                return batch, []
            tiles += tiles[-1:] * (batch_size - len(tiles))
            example = mesh.to_global({"image": np.stack(tiles)}, self.mesh)
            return batch, step(self._variables, example)

        def done(batch, outputs):
            of_tiles = zip(*map(np.asarray, outputs), strict=True)
            for piece in batch:
                yield piece, [] if isinstance(piece, Failure) else list(next(of_tiles))

        batch, pending = [], ([], [])
        for piece in background.ahead(iter(pieces), 2 * batch_size):
            batch.append(piece)
            if sum(isinstance(each, Piece) for each in batch) == batch_size:
                batch, (before, pending) = [], (pending, computed(batch))
                yield from done(*before)
        yield from done(*pending)
        yield from done(*computed(batch))


def entropy(probabilities: Float32[np.ndarray, "*shape k"]) -> UInt8[np.ndarray, "*shape"]:
    """-sum_c p_c log p_c / log k, from 0: one class is certain, to 255: all are equal."""
    logs = np.log(np.maximum(probabilities, np.finfo(np.float32).tiny))
    parts = np.sum(probabilities * logs, axis=-1) / -np.log(probabilities.shape[-1])
    return (255 * parts).round().clip(0, 255).astype(np.uint8)


class _One:
    """One image, of one strip."""

    def __init__(self, image: np.ndarray):
        self._image = image
        self.sizes = np.array([image.shape[:2]], np.int32)

    def strips(self, i: int) -> Iterator[np.ndarray]:
        return iter([self._image])


def load(path: epath.PathLike, checkpoint: str = "best") -> Predictor:
    """The network of a workdir, or of a file that `dense_jax.export` wrote.

    checkpoint: of the workdir's, "best" (by eval/mean_iou), "latest", or a step. Raises ValueError if
    there is none such; a file has a single one.
    """
    if epath.Path(path).is_dir():
        from dense_jax import trained

        loaded = trained.load(str(path), checkpoint)
        dataset, context, options = loaded.dataset, loaded.program.context, loaded.config.eval
        logits_step, variables = loaded.program.logits_step, loaded.variables
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
        tile_size=options["tile_size"],
        margin=options["margin"],
        context=context,
        batch_size=options["batch_size"],
    )
