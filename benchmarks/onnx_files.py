"""Compares ONNX files in onnxruntime with the networks that they come from.

    python -m benchmarks.onnx_files [--output=benchmarks/onnx.md]

converts networks in which every encoder, decoder and upsampling method occurs, narrow ones with random
weights, and three of a usual width. Ends with status 1 if logits differ by more than 1e-4 standard
deviations. Networks with max_unpool may differ at 5 % of the pixels: where two pixels of a window are
equal but for rounding, another one gets the value, in two compilations of the same network, too.
Needs `onnx` and `onnxruntime`.
"""

import argparse
import datetime
import functools
import pathlib
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
import onnxruntime

from benchmarks.conformance import table
from benchmarks.pipeline import hardware
from dense_jax import export, trained
from dense_jax.devices import cpu
from dense_jax.inference import onnx_graph
from dense_jax.models.encoders import ENCODERS
from dense_jax.program import assemble
from experiments import base, segnet_basic, unet_resnet34
from tests.models import COVERING, has

LARGEST, NUM_CLASSES, BATCH = 1e-4, 11, 2


def networks() -> Iterator[tuple[str, Any, int]]:
    """Yields the name, the config and the image size of each network."""
    for encoder, name, method in COVERING:
        config = base.get_config()
        config.model.update(encoder=encoder, name=name, upsampling=method, widths=(2, 3, 4, 5))
        if has(ENCODERS[encoder].make, "width_multiplier"):
            config.model.width_multiplier = 0.125
        yield f"{encoder}, {name}, {method}", config, 64
    config = base.get_config()
    config.model.widths = (32, 64, 128, 256)
    yield "U-Net of 32 to 256 channels", config, 128
    yield "SegNet-Basic", segnet_basic.get_config(), 128
    yield "U-Net over ResNet34", unet_resnet34.get_config(), 128


def network(config: Any) -> trained.Trained:
    """Returns a config's network with random weights that keep features at about the same size."""
    rng = np.random.default_rng(0)
    program = assemble(config, NUM_CLASSES)

    def value(path: Any, x: jax.ShapeDtypeStruct) -> np.ndarray:
        if path[-1].key in ("scale", "var"):  # as in training, residual branches add little
            low, high = (0.2, 0.5) if path[-1].key == "scale" else (0.5, 1.5)
            return rng.uniform(low, high, x.shape).astype(x.dtype)
        fan_in = np.prod(x.shape[:-1]) if len(x.shape) > 1 else 100
        return rng.normal(0, (2 / fan_in) ** 0.5, x.shape).astype(x.dtype)

    variables = jax.tree_util.tree_map_with_path(value, program.variables(3))
    names = [f"class {i}" for i in range(NUM_CLASSES)]
    dataset = {"class_names": names, "num_channels": 3, "dtype": "uint8", "value_range": None}
    return trained.Trained(config, dataset, program, 0, variables, None)  # pyrefly: ignore


def milliseconds(compute: Callable[[], Any], rounds: int = 5) -> float:
    """Returns the processor time of a call, of all threads, per image: the median over rounds."""
    compute()
    times = []
    for _ in range(rounds):
        start = time.process_time()
        compute()
        times.append(1e3 * (time.process_time() - start) / BATCH)
    return statistics.median(times)


def compare(loaded: trained.Trained, size: int) -> tuple[float, float, float, float, float]:
    """Returns the largest difference of a logit, the share of pixels, MB, and ms of both.

    The difference is in standard deviations of the logits of a class over the pixels. The share is
    that of pixels with differences beyond LARGEST. Times are in onnxruntime and in ours.
    """
    shape = jax.ShapeDtypeStruct((size, size, 3), "uint8")
    images = np.random.default_rng(1).integers(0, 256, (BATCH, size, size, 3), np.uint8)
    function = functools.partial(export.segment, loaded, result="logits")
    content = onnx_graph.convert(function, shape, "logits", {})
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1  # waiting threads would count as processor time
    session = onnxruntime.InferenceSession(content, options)
    theirs = lambda: session.run(["logits"], {"images": images})[0]

    @jax.jit
    @cpu.fast
    def compiled(variables, images):
        return export.segment(loaded._replace(variables=variables), images, "logits")

    variables = jax.device_put(loaded.variables)  # as arguments, which XLA does not fold
    ours = lambda: np.asarray(compiled(variables, images))
    spread = ours().std(axis=(0, 1, 2)).mean()
    differences = np.abs(theirs() - ours()).max(axis=-1) / spread
    share = float((~(differences <= LARGEST)).mean())  # NaN counts
    megabytes = len(content) / 1e6
    return float(differences.max()), share, megabytes, milliseconds(theirs), milliseconds(ours)


def page(rows: Sequence[Sequence[str]]) -> str:
    """Returns the Markdown page with the table."""
    columns = ["network", "image", "largest difference", "pixels beyond 1e-4", "MB"]
    columns += ["ms, onnxruntime", "ms, ours"]
    return (
        "# ONNX files in onnxruntime\n\n"
        f"By `python -m benchmarks.onnx_files`, {datetime.date.today()}, {hardware()}, "
        f"onnxruntime {onnxruntime.__version__}, jax {jax.__version__}.\n\n"
        f"{table(columns, rows)}\n"
        "The differences are of logits, in standard deviations of a class's logits over the pixels. With "
        "max_unpool, rounding decides between equal pixels of a window. MB are those of the file. Times are the processor time of all threads per image, in batches of two: the "
        "median of five calls.\n"
    )


def main() -> None:
    """Prints a row for each network and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=pathlib.Path, help="the Markdown file to write")
    args = parser.parse_args()
    rows, wrong = [], []
    for name, config, size in networks():
        difference, share, *others = compare(network(config), size)
        numbers = [f"{difference:.1e}", f"{share:.1%}", *(f"{x:.1f}" for x in others)]
        rows.append([name, f"{size} x {size}", *numbers])
        print(" | ".join(rows[-1]), flush=True)
        if not share <= (0.05 if config.model.upsampling == "max_unpool" else 0):
            wrong.append(name)
    if args.output:
        args.output.write_text(page(rows))
    if wrong:
        sys.exit(f"logits differ by more than {LARGEST} standard deviations: {', '.join(wrong)}")


if __name__ == "__main__":
    main()
