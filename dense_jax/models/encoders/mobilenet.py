"""MobileNetV3-Large (arXiv 1905.02244, table 1), as in timm.

Squeeze-and-excitation averages over all pixels of the input. In a prediction by tiles, features
therefore depend on the whole tile.

At stride s, each feature covers a cell of s x s image pixels. The receptive field is centered on
the top-left pixel of the cell, (s - 1) / 2 pixels above and to the left of the cell's center.
"""

import functools

import jax

from dense_jax.models.encoders.inverted_residual import InvertedResiduals, Stage

STAGES = tuple(
    Stage(channels, kernel_size, stride, expanded, activation, squeezes)
    for channels, kernel_size, stride, expanded, activation, squeezes in (
        (16, 3, 1, (16,), jax.nn.relu, False),
        (24, 3, 2, (64, 72), jax.nn.relu, False),
        (40, 5, 2, (72, 120, 120), jax.nn.relu, True),
        (80, 3, 2, (240, 200, 184, 184), jax.nn.hard_swish, False),
        (112, 3, 1, (480, 672), jax.nn.hard_swish, True),
        (160, 5, 2, (672, 960, 960), jax.nn.hard_swish, True),
    )
)
mobilenet_v3_large = functools.partial(
    InvertedResiduals,
    stem=16,
    stages=STAGES,
    last=960,
    activation=jax.nn.hard_swish,
    conv_options={"epsilon": 1e-5},
)


def torch_name(path: tuple[str, ...], *, norm: str) -> str:
    """Returns the name of the module at `path` in timm's mobilenetv3_large_100."""
    is_norm = "norm" in path
    if path[0] == "stem":
        return "bn1" if is_norm else "conv_stem"
    if path[0] == "last":
        return f"blocks.{len(STAGES)}.0.{'bn1' if is_norm else 'conv'}"
    block = f"blocks.{path[0].removeprefix('stage').replace('_', '.')}"
    if path[1] == "squeeze":
        return f"{block}.se.conv_{path[2]}"
    # The first block has no expansion, so its projection has the name of an expansion.
    names = {"depthwise": "dw", "project": "pw"}
    if path[0] != "stage0_0":
        names = {"expand": "pw", "depthwise": "dw", "project": "pwl"}
    return (
        f"{block}.bn{[*names].index(path[1]) + 1}" if is_norm else f"{block}.conv_{names[path[1]]}"
    )
