"""FCN-32s on AlexNet (arXiv 1411.4038, table 1).

python -m dense_jax.main --config=experiments/fcn_alexnet.py --config.data.root=ROOT \
    --config.model.pretrained=imagenet --workdir=runs/fcn_alexnet

The recipe and the departures from the paper are the same as in fcn32s_vgg16.py, but the learning
rate is 1e-3, as in the paper. The encoder is torchvision's AlexNet: one tower, 64 to 384 channels,
no local response normalization.
"""

from dense_jax.experiments import fcn32s_vgg16


def get_config():
    config = fcn32s_vgg16.get_config()
    config.model.encoder = "alexnet"
    config.optimizer.learning_rate = 1e-3
    return config
