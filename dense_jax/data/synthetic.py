"""Generates scenes of textured shapes on a textured background, in memory.

The scenes reveal differences between methods. Crisp boundaries and threads 2 to 3 pixels wide
require skip connections. Specks cover less than 1 % of the pixels, so the choice of loss
matters. Brightness varies over the image and between objects, so the value of a pixel does not
reveal its class.
"""

import math
from typing import Any

import numpy as np
from jaxtyping import Int32

from dense_jax.data.source import Source

CLASSES = ("background", "disk", "square", "ring", "thread", "speck")
NUM_EXAMPLES = {"train": 256, "val": 64, "test": 64}

_UNIT_AREA = 96 * 96  # in pixels; object counts are for this area and scale with the image area
_TINTS = np.array(
    [[0, 0, 0], [10, -5, -5], [-5, 10, -5], [-5, -5, 10], [8, 8, -12], [12, -12, 12]], np.float32
)


class Synthetic(Source):
    """One split of synthetic scenes. Example i depends only on (split, i, size, num_channels).

    `root` is unused. `size` is the height and width in pixels.
    """

    def __init__(
        self,
        root: object,
        split: str,
        *,
        size: tuple[int, int] = (96, 96),
        num_examples: int | None = None,
        num_channels: int = 3,
    ):
        if split not in NUM_EXAMPLES:
            raise ValueError(f"no split {split!r}; there are: {', '.join(NUM_EXAMPLES)}")
        self._split = split
        self._size = size
        self._num_examples = NUM_EXAMPLES[split] if num_examples is None else num_examples
        self.class_names = CLASSES
        self.num_channels = num_channels

    @staticmethod
    def splits(root: object) -> tuple[str, ...]:
        return tuple(NUM_EXAMPLES)

    def __len__(self) -> int:
        return self._num_examples

    @property
    def sizes(self) -> Int32[np.ndarray, "n 2"]:
        return np.tile(np.array(self._size, np.int32), (len(self), 1))

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(f"{self._split}_{i:05d}" for i in range(len(self)))

    def __getitem__(self, i: int) -> dict[str, Any]:
        if not 0 <= i < len(self):
            raise IndexError(f"example {i} of {len(self)}")
        stream = list(NUM_EXAMPLES).index(self._split)
        rng = np.random.Generator(np.random.Philox(key=[stream, i]))
        image, label = _scene(rng, *self._size)
        if self.num_channels == 1:
            image = image.mean(axis=0, keepdims=True)
        image = np.clip(image.round(), 0, 255).astype(np.uint8).transpose(1, 2, 0)
        return {
            "image": np.ascontiguousarray(image),
            "label": label,
            "name": f"{self._split}_{i:05d}",
        }


class SyntheticGray(Synthetic):
    """Synthetic scenes with a single gray channel."""

    def __init__(self, root: object, split: str):
        super().__init__(root, split, num_channels=1)


def _scene(rng: np.random.Generator, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns an image, float32 [3, h, w] roughly in 0..255, and its label, int32 [h, w]."""
    y, x = np.mgrid[:height, :width].astype(np.float32)
    label = np.zeros((height, width), np.int32)
    value = np.zeros((3, height, width), np.float32)  # relative to the scene's brightness
    value += _wave(rng, x, y, wavelength=rng.uniform(20, 50), amplitude=15.0)

    def paint(name: str, mask: np.ndarray, texture: np.ndarray) -> None:
        class_id = CLASSES.index(name)
        label[mask] = class_id
        tint = _TINTS[class_id] + rng.normal(rng.uniform(-20, 20), 5, 3)
        value[:, mask] = texture[mask] + tint[:, None]

    def count(low: int, high: int) -> int:
        return max(1, round(rng.integers(low, high + 1) * height * width / _UNIT_AREA))

    def place() -> tuple[np.ndarray, np.ndarray]:
        """Returns the coordinates of all pixels in a frame with a random origin and rotation."""
        dx, dy = x - rng.uniform(0, width), y - rng.uniform(0, height)
        angle = rng.uniform(0, math.pi)
        cos, sin = math.cos(angle), math.sin(angle)
        return dx * cos + dy * sin, dy * cos - dx * sin

    across = np.where((x + rng.uniform(0, 6)) % 6 < 3, 40, -40)
    down = np.where((y + rng.uniform(0, 6)) % 6 < 3, 40, -40)
    checker = np.where((x // 3 + y // 3) % 2, 50, -50)
    dark = np.full_like(x, -60)
    grains = 80 + 30 * rng.standard_normal(x.shape, np.float32)
    for _ in range(count(1, 2)):
        u, v = place()
        paint("disk", np.hypot(u, v) < rng.uniform(9, 18), across)
    for _ in range(count(1, 2)):
        u, v = place()
        paint("square", np.maximum(abs(u), abs(v)) < rng.uniform(8, 15), down)
    for _ in range(count(1, 2)):
        u, v = place()
        paint("ring", abs(np.hypot(u, v) - rng.uniform(11, 18)) < rng.uniform(2.5, 4), checker)
    for _ in range(count(1, 2)):
        u, v = place()
        bend = 6 * np.sin(u * rng.uniform(0.02, 0.08))
        paint("thread", abs(v - bend) < rng.uniform(1.2, 1.8), dark)
    for _ in range(count(1, 3)):
        u, v = place()
        paint("speck", np.hypot(u, v) < rng.uniform(2, 4), grains)

    value += _wave(rng, x, y, wavelength=2.0 * (height + width), amplitude=25.0)
    value += 6 * rng.standard_normal(value.shape, np.float32)  # sensor noise
    return value + rng.uniform(110, 145), label


def _wave(
    rng: np.random.Generator, x: np.ndarray, y: np.ndarray, *, wavelength: float, amplitude: float
) -> np.ndarray:
    """Returns a plane wave [h, w] with random direction and phase. `wavelength` is in pixels."""
    direction, phase = rng.uniform(0, 2 * math.pi, 2).tolist()
    distance = x * math.cos(direction) + y * math.sin(direction)
    return amplitude * np.sin(distance * (2 * math.pi / wavelength) + phase)
