"""The decoders of SegNet's table 1, with and without class balancing, three seeds each: 48 runs.

python -m dense_jax.sweep --config=experiments/camvid_segnet_table.py --workdir=runs/segnet \
    --config.data.root=CAMVID --evaluate=test

Badrinarayanan, Kendall and Cipolla 2017, arXiv 1511.00561, sections 3.2 to 3.4. All variants have
the encoder and the recipe of `segnet_basic`, and its departures from the paper. The paper's
parameters, and ours for 11 classes, in millions:

    Bilinear-Interpolation              0.625  0.613
    SegNet-Basic                        1.425  1.416
    SegNet-Basic-EncoderAddition        1.425  1.416
    SegNet-Basic-SingleChannelDecoder   0.625  0.626
    FCN-Basic                           0.65   0.647
    FCN-Basic-NoAddition                0.65   0.644
    FCN-Basic-NoDimReduction            1.625  1.662
    FCN-Basic-NoAddition-NoDimReduction 1.625  1.662

We choose what the paper leaves open. Bilinear-Interpolation upsamples the scores of the deepest
stride, without encoder features. FCN-Basic scores every stride's features with a 1x1 convolution,
which reduces them to as many channels as classes. It sums the scores between 8x8 transposed
convolutions that start as bilinear interpolation and have a bias; no other convolution and no norm
follows. Without reduction, these have 64 channels, and only the last convolution computes scores.

The default size is for two CPU cores, about 4 minutes a run: half the resolution, 16 channels, and
a learning rate that falls. `--config=experiments/camvid_segnet_table.py:full` is the paper's size,
which was not run yet.
"""

from dense_jax import sweep
from dense_jax.experiments import segnet_basic

UNPOOLING = {"model.upsampling": "max_unpool", "model.decoder_relu": False}
DECONVOLUTION = {
    "model.upsampling": "transposed_conv",
    "model.upsampling_options.kernel_size": 8,
    "model.upsampling_options.init": "bilinear",
}
ADDITION = {"model.skips": (8, 4, 2, 1), "model.fusion": "add"}
REDUCTION = {"model.name": "fcn", "model.gradual": True}
NO_REDUCTION = {"model.decoder_conv": "none"}

VARIANTS = {
    "Bilinear-Interpolation": {"model.name": "fcn", "model.upsampling": "bilinear"},
    "SegNet-Basic": UNPOOLING,
    "SegNet-Basic-EncoderAddition": UNPOOLING | ADDITION,
    "SegNet-Basic-SingleChannelDecoder": UNPOOLING | {"model.decoder_conv": "depthwise"},
    "FCN-Basic": DECONVOLUTION | ADDITION | REDUCTION,
    "FCN-Basic-NoAddition": DECONVOLUTION | REDUCTION,
    "FCN-Basic-NoDimReduction": DECONVOLUTION | ADDITION | NO_REDUCTION,
    "FCN-Basic-NoAddition-NoDimReduction": DECONVOLUTION | NO_REDUCTION,
}
BALANCING = (
    {"loss_options.class_weights": "segnet_camvid"},  # the paper's "median frequency balancing"
    {},  # its "natural frequency balancing"
)


def get_config(size: str = "reduced"):
    """Leaves unset what only some variants have. size: "reduced", for two CPU cores, or "full"."""
    if size not in ("reduced", "full"):
        raise ValueError(f"the size {size!r} must be reduced or full")
    config = segnet_basic.get_config()
    config.model.decoder_relu = None
    if size == "reduced":
        config.num_steps = 1000
        config.batch_size = 4
        config.model.widths = (16, 16, 16, 16)
        config.data.resolution = 0.5
        config.data.crop_size = (180, 240)
        config.optimizer.schedule = "cosine"  # a constant rate needs longer runs
        config.update(eval_every=250, checkpoint_every=250, log_every=10)
    return config


def get_sweep():
    """Rows are in the order of the paper's table. All runs of a seed come before the next seed."""
    return [
        {"label": label} | fields | balancing | seed
        for seed in sweep.grid(seed=range(3))
        for label, fields in VARIANTS.items()
        for balancing in BALANCING
    ]
