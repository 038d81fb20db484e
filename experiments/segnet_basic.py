"""SegNet-Basic (Badrinarayanan, Kendall and Cipolla 2017, arXiv 1511.00561, section 3.1).

python -m dense_jax.main --config=experiments/segnet_basic.py --config.data.root=CAMVID \
    --workdir=runs/segnet_basic

The released network: local response normalization of the input; four 7x7 convolutions with 64
channels, batch norm, ReLU and max-pooling; four stages of max-unpooling, 7x7 convolution and batch
norm, without ReLU; a 1x1 classifier. The recipe: He initialization, SGD with a fixed learning rate
of 0.1, momentum 0.9, batches of 12 whole images, weight decay 5e-4, 10,000 steps.

Our departures: the mean loss over pixels instead of the sum; gradient clipping; random flips; no
bias before a norm; the best checkpoint by mean IoU on val instead of pixel accuracy. In the paper's
table 1, this is the row without class balancing.
"""

from dense_jax.experiments import base


def get_config():
    """Returns a config for whole CamVid images of 360 x 480 pixels."""
    config = base.get_config()
    config.num_steps = 10_000
    config.batch_size = 12
    config.model.upsampling = "max_unpool"
    config.model.skips = ()
    config.model.widths = (64, 64, 64, 64)
    config.model.convs_per_level = 1
    config.model.kernel_size = 7
    config.model.bottleneck = False
    config.model.decoder_relu = False
    config.model.normalization = "local_response"
    config.data.name = "folder"
    config.data.crop_size = (360, 480)
    config.data.cache = "host"
    config.optimizer.name = "sgd"
    config.optimizer.learning_rate = 0.1
    config.optimizer.schedule = "constant"
    config.optimizer.warmup_steps = 0
    config.optimizer.weight_decay = 5e-4
    config.update(eval_every=1000, checkpoint_every=1000, log_every=50)
    return config
