"""The U-Net of the paper (Ronneberger, Fischer and Brox 2015, arXiv 1505.04597).

python -m dense_jax.main --config=experiments/unet_paper.py --config.data.root=ISBI2012 \
    --workdir=runs/unet_paper

The network is exactly the paper's: 23 unpadded convolutions, which map a tile of 572 x 572 pixels
to 388 x 388 labels. Tiles and crops include the 92 pixels of context around the labels, mirrored at
the image border. The recipe (sections 3 and 3.1): batches of one tile; SGD with momentum 0.99;
cross-entropy whose weights balance the classes and emphasize the borders between cells; He
initialization; dropout at the end of the contracting path; random shifts, rotations and gray
values; elastic deformations with a standard deviation of 10 pixels on a 3 x 3 grid.

Our departures: border weights only on the membrane, not inside the cells; gradient clipping;
learning rate warmup; the weighted mean loss over pixels instead of the sum. The paper does not
state the class balancing, the learning rate, the dropout probability, the number of steps, or the
ranges of rotations and gray values. We use inverse frequency, 1e-3, 0.5, 20,000, all directions,
and brightness and contrast changes of up to a fifth. On several devices, raise batch_size to a
multiple of their number. On data with other classes, name the object classes in border.classes.
"""

from dense_jax.experiments import base


def get_config():
    """Returns the config. crop_size is the size of the labels; the input has 572 x 572 pixels."""
    config = base.get_config()
    config.num_steps = 20_000
    config.batch_size = 1
    config.loss_options.class_weights = "inverse_frequency"
    config.border.weight = 10.0
    config.border.sigma = 5.0
    config.border.classes = ("interior",)
    config.model.widths = (64, 128, 256, 512, 1024)
    config.model.norm = "none"
    config.model.padding = "VALID"
    config.model.dropout = 0.5
    config.data.name = "folder"
    config.data.crop_size = (388, 388)
    config.data.cache = "host"
    config.augment.flip = 0.0
    config.augment.rotation = 180.0
    config.augment.elastic = 10.0
    config.augment.brightness = 0.2
    config.augment.contrast = 0.2
    config.optimizer.name = "sgd"
    config.optimizer.learning_rate = 1e-3
    config.optimizer.momentum = 0.99
    config.optimizer.schedule = "constant"
    config.optimizer.warmup_steps = 100
    config.optimizer.weight_decay = 0.0
    config.eval.tile_size = (572, 572)
    config.eval.batch_size = 1
    config.update(eval_every=1000, checkpoint_every=1000, log_every=50)
    return config
