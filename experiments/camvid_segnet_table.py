"""The decoders of SegNet's table 1, with and without class balancing, three seeds each: 48 runs.

python -m dense_jax.sweep --config=experiments/camvid_segnet_table.py --workdir=runs/segnet \
    --config.data.root=CAMVID --evaluate=test

Badrinarayanan, Kendall and Cipolla 2017, arXiv 1511.00561, sections 3.2 to 3.4. All have the encoder
and the recipe of `segnet_basic`, and depart from the paper as that does. The paper's parameters, and
ours for 11 classes, in millions:

    Bilinear-Interpolation              0.625  0.613
    SegNet-Basic                        1.425  1.416
    SegNet-Basic-EncoderAddition        1.425  1.416
    SegNet-Basic-SingleChannelDecoder   0.625  0.626
    FCN-Basic                           0.65   0.647
    FCN-Basic-NoAddition                0.65   0.644
    FCN-Basic-NoDimReduction            1.625  1.662
    FCN-Basic-NoAddition-NoDimReduction 1.625  1.662

What the paper leaves open is chosen here: Bilinear-Interpolation is that of the scores at the
deepest stride, without encoder features. FCN-Basic scores every stride's features with a 1x1
convolution, which is its reduction to as many channels as classes, and sums them between transposed
convolutions of 8x8 that start as bilinear interpolation and have a bias; no other convolution and no
norm follows. Without reduction, these have 64 channels, and the only scores are the last.

The full size was not run yet. `--config=experiments/camvid_segnet_table.py:reduced` is what two CPU
cores can do, about 4 minutes a run: half the resolution, 16 channels, and a learning rate that falls.
"""

from dense_jax import sweep
from experiments import segnet_basic

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


def get_config(size: str = "full"):
    """size: "full", or "reduced". What only some variants have is unset."""
    config = segnet_basic.get_config()
    config.model.decoder_relu = None
    if size == "reduced":
        config.num_steps = 1000
        config.batch_size = 4
        config.model.widths = (16, 16, 16, 16)
        config.data.resolution = 0.5
        config.data.crop_size = (180, 240)
        config.optimizer.schedule = "cosine"  # at a constant rate, so short a run ends anywhere
        config.eval_every = 250
        config.checkpoint_every = 250
        config.log_every = 10
    elif size != "full":
        raise ValueError(f"the size {size!r} must be full or reduced")
    return config


def get_sweep():
    """In the order of the paper's table; all with one seed before the next."""
    return [
        {"label": label} | fields | balancing | seed
        for seed in sweep.grid(seed=range(3))
        for label, fields in VARIANTS.items()
        for balancing in BALANCING
    ]
