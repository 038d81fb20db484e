"""Segments images of any size with a trained network: predictor = load(PATH); predictor(image).

An image is the name of a file, a Pillow image, or an array [h, w] or [h, w, c]. It is read as
`dense_jax.predict` reads image files, so the classes are the same. The network comes from the
workdir of a run or from a file that `dense_jax.export` wrote, also if these are on the Hugging Face
hub. Several workdirs are an ensemble. Images are cut into tiles in the same way as in evaluation.
"""

import itertools
import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jaxtyping import Float32, UInt8
from tqdm import tqdm

from dense_jax import hub, outputs, regions, storage
from dense_jax.data import decode, levels
from dense_jax.data.tiles import Tiles, tilings
from dense_jax.devices import mesh
from dense_jax.devices.one_step_late import OneStepLate
from dense_jax.inference import ensemble, exported, image_files, tta
from dense_jax.inference.stitching import Failure, Images, Stitcher, Strip, Tile, cut
from dense_jax.inference.threads import ahead
from dense_jax.labels import IGNORE_LABEL
from dense_jax.spelling import some

# Converts the probabilities of an image region, float32 [n, m, num_classes], to a map [n, m, ...].
# The second argument is the mean entropy of an ensemble's networks in nats, [n, m], or None.
MakeMap = Callable[[np.ndarray, np.ndarray | None], np.ndarray]
AnyImage = str | os.PathLike[str] | decode.InMemory


class Predictor:
    """A trained network that segments images: predictor(image) returns the classes. See `load`.

    class_names, num_channels: As in the training data.
    regions: The regions that the network learned instead of the classes, or None.
    palette: The RGB color of each class, uint8 [num_classes, 3].
    dtype: The type of images: "uint8", "uint16" or "float32".
    value_range: The values that stand for black and white in images that are not 8-bit, or None.
    ladder: The heights and widths to which images are padded, in pixels; see `tilings`.
    about: The model, its step and the path that it was loaded from, as a line of text.
    num_networks: The number of networks whose probabilities are averaged.
    """

    def __init__(
        self,
        logits_step: tta.LogitsStep,
        variables: Any,
        dataset: Mapping[str, Any],
        normalization: str,
        *,
        tile_size: Sequence[int],
        margin: int,
        context: int,
        batch_size: int,
        blend: bool = False,
        augment: Sequence[str] = (),
        about: str = "a network",
        num_networks: int = 1,
        thresholds: Mapping[str, float] | None = None,
    ):
        """Creates a predictor from a network and the options described in `using`.

        variables: Those of `logits_step`; for several networks, see `ensemble.network_logits`.
        dataset: The content of the run's dataset.json.
        normalization: The name of the input normalization, which decides the levels of images.
        context: The number of pixels that unpadded convolutions trim on each side; see `tilings`.
        thresholds: Those of the regions; see `regions.read`.
        """
        self.class_names: tuple[str, ...] = tuple(dataset["class_names"])
        self.regions = regions.read(self.class_names, dataset.get("regions"), thresholds)
        self.palette = np.array(dataset["palette"], np.uint8)
        self.num_channels: int = dataset["num_channels"]
        self.dtype: str = dataset["dtype"]
        self.value_range = dataset["value_range"]
        self.ladder = [list(rung) for rung in dataset["ladder"]]
        self.tile_size, self.margin, self.context = tuple(tile_size), margin, context
        self.batch_size, self.blend, self.augment = batch_size, blend, tuple(augment)
        self.about, self.num_networks, self.thresholds = about, num_networks, thresholds
        self._network = logits_step, variables, dataset, normalization
        self._levels_of = levels.rule(normalization, dataset)
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size} must be at least 1")
        if margin < 0:
            raise ValueError(f"margin={margin} must be at least 0")
        if len(self.tile_size) != 2 or min(self.tile_size) < 1:
            raise ValueError(f"tile_size={self.tile_size} must be a height and a width in pixels")
        if context and "scales" in augment:
            raise ValueError(
                "a network without padding cannot be augmented by scales: its border would show"
            )
        self._mesh = mesh.make_mesh()
        self._step = self._make_step(["classes"])
        self._step_with_probabilities = self._make_step(["classes", "probabilities"])

    @property
    def output_names(self) -> tuple[str, ...]:
        """Returns the names of the regions, or of the classes without regions."""
        return self.regions.names if self.regions else self.class_names

    def using(self, **options: Any) -> "Predictor":
        """Returns a predictor with the same network but different options.

        tile_size, margin: Sizes in pixels; see `tilings`.
        batch_size: The largest number of tiles per step; see `even_batch_size`.
        blend: Whether neighboring tiles overlap and their predictions are blended; see `Stitcher`.
        augment: The names of test-time augmentations from `tta.AUGMENTATIONS`.

        An option that is None keeps its current value. Raises ValueError if an option is invalid.
        """
        names = ("tile_size", "margin", "context", "batch_size", "blend", "augment", "about")
        names += ("num_networks", "thresholds")
        present = {name: getattr(self, name) for name in names}
        wanted = {name: value for name, value in options.items() if value is not None}
        return Predictor(*self._network, **present | wanted)

    def _make_step(self, names: Sequence[str]) -> Callable:
        """Returns a compiled step(variables, batch) -> {name: maps}, which runs on all devices.

        The last channel of an ensemble's probabilities is the mean entropy of the networks.
        """
        scores_step, own = self._network[0], self.regions
        if self.augment:
            scores_step = tta.make_probabilities_step(scores_step, self.augment, own)

        def step(variables: Any, example: Mapping[str, Any]) -> dict[str, Any]:
            image = (example[name] for name in ("image", "levels") if name in example)
            scores = ensemble.network_logits(
                variables, *image, logits_step=scores_step, num_networks=self.num_networks
            )
            is_ensemble = self.num_networks > 1
            if is_ensemble and self.augment:
                scores = jax.scipy.special.logit(scores) if own else jnp.log(scores)
            pooled = ensemble.pool(scores, own)
            is_logits = is_ensemble or not self.augment
            probabilities = outputs.probabilities(pooled, own) if is_logits else pooled
            classes = outputs.inside(probabilities, own) if own else outputs.decide(pooled, None)
            maps = {"classes": classes}
            if "probabilities" in names:
                parts = [probabilities]
                if is_ensemble:
                    parts.append(ensemble.mean_entropy(scores, own)[..., None])
                maps["probabilities"] = jnp.concatenate(parts, axis=-1)
            return maps

        return jax.jit(mesh.map_examples(step, self._mesh))

    def __repr__(self) -> str:
        size = " x ".join(map(str, np.max(self.ladder, axis=0)))
        kind, names = "regions" if self.regions else "classes", self.output_names
        return (
            f"<Predictor: {self.about}; {len(names)} {kind}: {some(names, 12)}; trained on images "
            f"of up to {size} pixels (height x width), channels: {self.num_channels}>"
        )

    def __call__(self, image: AnyImage) -> UInt8[np.ndarray, "h w *r"]:
        """Returns the class of each pixel of an image: a file, a Pillow image or an array.

        With regions, returns their masks [h, w, r], which are 1 in the region and 0 elsewhere.

        In a GeoTIFF file, pixels that are nodata in all bands get IGNORE_LABEL (255).

        Raises ValueError if the image cannot be read, or does not fit the network's channels.
        """
        return self._map(image, "classes", {})

    def probabilities(self, image: AnyImage) -> Float32[np.ndarray, "h w num_classes"]:
        """Returns the probabilities of classes or regions at each pixel, like `__call__`."""
        return self._map(image, "probabilities", {"probabilities": lambda block, _: block})

    def _map(self, image: AnyImage, name: str, maps: Mapping[str, MakeMap]) -> np.ndarray:
        """Returns the map called `name`."""
        parts = []
        for strip in self.segment(self._images(image), maps):
            if isinstance(strip, Failure):
                raise strip.problem
            parts.append(strip.maps[name])
        return np.concatenate(parts)

    def _images(self, image: AnyImage) -> Images:
        """Returns a single image as an `Images`."""
        how = {"value_range": self.value_range, "dtype": self.dtype}
        if isinstance(image, str | os.PathLike):
            file = image_files.single(Path(image))
            return image_files.ImageFiles([file], self.num_channels, **how)
        pixels = decode.read_image(image, "the image", self.num_channels, **how)
        return _Array(pixels)

    def segment(
        self, images: Images, maps: Mapping[str, MakeMap] | None = None
    ) -> Iterator[Strip | Failure]:
        """Yields strips of each image, with the maps "image", "classes" and any maps in `maps`.

        The map "image" is uint8; see `levels.picture`.

        All strips of an image are consecutive. Images with equal tile sizes are grouped, which may
        change the order of the images; see `tilings`. If an image cannot be read completely, a
        `Failure` replaces its remaining strips.

        Memory use does not depend on the heights of the images.
        """
        maps = dict(maps or {})
        if self.blend:
            maps["classes"] = lambda block, _: self._decide(block)
        for tiles in tilings(images, self.ladder, self.tile_size, self.margin, self.context):
            yield from self._segment(images, tiles, maps)

    def _decide(self, probabilities: np.ndarray) -> np.ndarray:
        if self.regions:
            return self.regions.inside(probabilities).astype(np.uint8)
        return probabilities.argmax(axis=-1).astype(np.uint8)

    def _segment(
        self, images: Images, tiles: Tiles, maps: Mapping[str, MakeMap]
    ) -> Iterator[Strip | Failure]:
        """Segments the images that have tiles in `tiles`. Yields their strips."""
        stitcher = Stitcher(tiles, tiles.margin - self.context if self.blend else (0, 0))
        step = self._step_with_probabilities if maps else self._step
        with tqdm(total=len(tiles), unit="tile", leave=False, disable=None) as bar:
            for tile, outputs in self._outputs(
                step, cut(images, tiles, self._levels_of), len(tiles)
            ):
                if isinstance(tile, Failure):
                    bar.update(tiles.of_image(tile.index).stop - bar.n)
                    stitcher.forget(tile.index)
                    yield tile
                    continue
                bar.update()
                number = tile.number
                blocks = {
                    "image": levels.picture(stitcher.crop(number, tile.image), levels=tile.levels),
                    "classes": stitcher.crop(number, outputs["classes"]),
                }
                if maps:
                    probabilities = stitcher.blend(number, outputs["probabilities"])
                    entropies = None
                    if self.num_networks > 1:
                        probabilities, entropies = probabilities[..., :-1], probabilities[..., -1]
                    blocks |= {name: make(probabilities, entropies) for name, make in maps.items()}
                if tile.nodata is not None:
                    nodata = stitcher.crop(number, tile.nodata)
                    nodata = nodata[..., None] if self.regions else nodata
                    blocks["classes"] = np.where(nodata, IGNORE_LABEL, blocks["classes"])
                if strip := stitcher.add(number, blocks):
                    yield strip

    def _outputs(
        self, step: Callable, tiles: Iterator[Tile | Failure], num_tiles: int
    ) -> Iterator[tuple[Tile | Failure, dict[str, np.ndarray]]]:
        """Yields (tile, {name: map}) in the order of `tiles`, and (failure, {}) for a `Failure`.

        The devices compute the next batch while the caller handles the current batch.
        """
        batch_size = mesh.even_batch_size(num_tiles, self.batch_size, self._mesh)
        ready: deque[tuple[Tile | Failure, dict[str, np.ndarray]]] = deque()

        def handle(batch: list[Tile], outputs: Mapping[str, jax.Array]) -> None:
            arrays = {name: np.asarray(array) for name, array in outputs.items()}
            for k, tile in enumerate(batch):
                ready.append((tile, {name: array[k] for name, array in arrays.items()}))

        def dispatch(batch: list[Tile]) -> None:
            padded = batch + batch[-1:] * (batch_size - len(batch))
            arrays = {"image": np.stack([tile.image for tile in padded])}
            if self._levels_of is not None:
                arrays["levels"] = np.array([tile.levels for tile in padded])
            late.put(batch, step(self._network[1], mesh.to_global(arrays, self._mesh)))

        late = OneStepLate(handle)
        batch: list[Tile] = []
        for tile in ahead(itertools.chain(tiles, [None]), 2 * batch_size):
            if isinstance(tile, Tile):
                batch.append(tile)
            if batch and (len(batch) == batch_size or not isinstance(tile, Tile)):
                dispatch(batch)
                batch = []
            if not isinstance(tile, Tile):  # a Failure or the end; earlier tiles come first
                late.flush()
                ready.extend([(tile, {})] if tile else ())
            while ready:
                yield ready.popleft()


def entropy(
    probabilities: Float32[np.ndarray, "*shape k"],
    nats: Float32[np.ndarray, "*shape"] | None = None,
    *,
    of_regions: bool = False,
) -> UInt8[np.ndarray, "*shape"]:
    """Returns the entropy from 0 (certain) to 255 (uniform): -255 * sum_c(p_c log p_c) / log(k).

    nats: An entropy to return on this scale instead, such as the mean of an ensemble's networks.
    of_regions: Whether to return the mean over k regions, each with the classes outside and inside.
    """
    if nats is None:
        nats = _nats(probabilities, of_regions)
    parts = nats / np.log(2 if of_regions else probabilities.shape[-1])
    return (255 * parts).round().clip(0, 255).astype(np.uint8)


def mutual_information(
    probabilities: Float32[np.ndarray, "*shape k"],
    nats: Float32[np.ndarray, "*shape"] | None,
    *,
    of_regions: bool = False,
) -> UInt8[np.ndarray, "*shape"]:
    """Returns the entropy of an ensemble minus the mean of its networks, on the scale of `entropy`.

    nats: The mean entropy of the networks; see `ensemble.mean_entropy`. If None, there is one.
    """
    whole = _nats(probabilities, of_regions)
    rest = whole - (whole if nats is None else nats)
    return entropy(probabilities, rest, of_regions=of_regions)


def _nats(probabilities: np.ndarray, of_regions: bool) -> np.ndarray:
    if of_regions:
        return _nats(np.stack([probabilities, 1 - probabilities], axis=-1), False).mean(axis=-1)
    logs = np.log(np.maximum(probabilities, np.finfo(np.float32).tiny))
    return -np.sum(probabilities * logs, axis=-1)


class _Array:
    """A single image in memory that implements the protocol `Images`."""

    def __init__(self, image: np.ndarray):
        self._image = image
        self.sizes = np.array([image.shape[:2]], np.int32)

    def strips(self, i: int) -> Iterator[np.ndarray]:
        return iter([self._image])


def load(
    path: epath.PathLike | Sequence[epath.PathLike],
    checkpoint: str = "best",
    calibration: epath.PathLike | None = None,
) -> Predictor:
    """Returns a predictor from a workdir, or from a file that `dense_jax.export` wrote.

    path: The workdir or the file, or several workdirs: an ensemble. Also hf://OWNER/NAME, a workdir
      on the Hugging Face hub, or hf://OWNER/NAME/FILE.
    checkpoint: "best" (by eval/mean_iou), "latest" or a step. An exported file holds a single
      checkpoint, so only "best" or the step of this checkpoint is valid.
    calibration: The calibration.json of the checkpoint; see `trained.load`.

    Raises ValueError if the checkpoint does not exist, or if the download fails.
    """
    is_single = isinstance(path, str) or not isinstance(path, Sequence)
    paths = [path] if is_single else list(path)
    num_networks, path = len(paths), paths[0]
    places = [hub.local(path) for path in paths]
    if num_networks > 1 or storage.absolute(places[0]).is_dir():
        from dense_jax import program, trained  # import Flax, which exported files do not need

        loaded = trained.load(places, checkpoint, calibration)
        dataset, context, options = loaded.dataset, loaded.program.context, loaded.config.eval
        logits_step, variables = loaded.program.logits_step, loaded.variables
        normalization = program.normalization(loaded.config.model)
        model, step = loaded.config.model, ", ".join(map(str, loaded.steps))
        thresholds = loaded.thresholds
    else:
        if calibration:
            raise ValueError(
                f"{path} has its temperature in it: pass --calibration to dense_jax.export instead"
            )
        about, logits_step, variables = exported.read(places[0])
        if checkpoint not in ("best", str(about["step"])):
            raise ValueError(
                f"no checkpoint {checkpoint!r} in {path}: it was exported at step {about['step']}"
            )
        dataset, context, options = about["dataset"], about["context"], about
        normalization = about["normalization"]
        variables = jax.device_put(variables, mesh.replicated(mesh.make_mesh()))
        model, step = about["config"]["model"], about["step"]
        thresholds = about.get("thresholds")
    return Predictor(
        logits_step,
        variables,
        dataset,
        normalization,
        context=context,
        about=f"{model['name']} with encoder {model['encoder']}, step {step} of "
        + ", ".join(map(str, paths)),
        num_networks=num_networks,
        thresholds=thresholds,
        **{name: options[name] for name in ("tile_size", "margin", "batch_size")},
    )
