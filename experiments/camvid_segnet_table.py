"""Compares the decoders in SegNet's table 1, with and without class balancing (48 runs).

python -m dense_jax.sweep --config=experiments/camvid_segnet_table.py --workdir=runs/segnet \
    --config.data.root=CAMVID --evaluate=test

Badrinarayanan, Kendall and Cipolla 2017, arXiv 1511.00561, sections 3.2 to 3.4. Each variant has
three seeds. All variants use the encoder and recipe of `segnet_basic`, with the same departures
from the paper. The number of parameters in the paper, and here for 11 classes, in millions:

    Bilinear-Interpolation              0.625  0.613
    SegNet-Basic                        1.425  1.416
    SegNet-Basic-EncoderAddition        1.425  1.416
    SegNet-Basic-SingleChannelDecoder   0.625  0.626
    FCN-Basic                           0.65   0.647
    FCN-Basic-NoAddition                0.65   0.644
    FCN-Basic-NoDimReduction            1.625  1.662
    FCN-Basic-NoAddition-NoDimReduction 1.625  1.662

The paper leaves the following choices open. Bilinear-Interpolation upsamples the scores of the
deepest stride, without encoder features. FCN-Basic scores the features of each stride with a 1x1
convolution, which reduces them to one channel per class. Between the strides, 8x8 transposed
convolutions with a bias upsample the scores and start as bilinear interpolation. The scores are
then summed, and no other convolution or norm follows. Without reduction, the transposed
convolutions have 64 channels, and only the last convolution computes scores.

The default size has half the resolution, 16 channels and a decaying learning rate. A run takes 5 to
13 minutes on one CPU core; the results are in docs/results.md.
`--config=experiments/camvid_segnet_table.py:full` has the paper's size and has not been run yet.
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
    {},  # the paper's "natural frequency balancing"
)


def get_config(size: str = "reduced"):
    """Returns the config, in which options that only some variants have are unset.

    size: "reduced" (for two CPU cores) or "full".
    """
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
        config.optimizer.schedule = "cosine"  # a constant learning rate needs longer runs
        config.update(eval_every=250, checkpoint_every=250, log_every=10)
    return config


def get_sweep():
    """Returns the runs, ordered by seed and then as in the paper's table."""
    return [
        {"label": label} | fields | balancing | seed
        for seed in sweep.grid(seed=range(3))
        for label, fields in VARIANTS.items()
        for balancing in BALANCING
    ]
