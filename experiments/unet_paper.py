"""The U-Net of the paper (Ronneberger, Fischer and Brox 2015, arXiv 1505.04597).

python -m dense_jax.main --config=experiments/unet_paper.py --config.data.root=ISBI2012 \
    --workdir=runs/unet_paper

Its network exactly: 23 convolutions, none padded, so that a tile of 572 x 572 pixels gives 388 x
388 labels; tiles and crops carry the 92 pixels of context around them, mirrored at the image's
border. Its recipe: batches of one tile, SGD with momentum 0.99, cross-entropy whose weights balance
the classes and raise the borders between cells, He initialization, dropout at the end of the
contracting path; random shifts, rotations and gray values, and elastic deformations by 10 pixels'
standard deviation on a 3 x 3 grid (sections 3 and 3.1).

Our departures: border weights are for the membrane alone, not inside the cells; the gradient is
clipped, and the learning rate warms up; the loss is the weighted mean over pixels, not the sum. The
paper leaves out how classes are balanced, the learning rate, the dropout probability, the number of
steps, and how far it rotates and changes gray values. We use inverse frequency, 1e-3, 0.5, 20,000,
all directions, and brightness and contrast by up to a fifth. On several devices, raise batch_size to
a multiple of their number. On data with other classes, name its objects in border.classes.
"""

from dense_jax.experiments import base


def get_config():
    """crop_size is the size of the labels: the network sees 572 x 572 pixels."""
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
