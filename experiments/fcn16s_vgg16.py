"""FCN-16s on VGG16, which adds the scores of pool4 to FCN-32s (arXiv 1411.4038, section 4.2).

python -m dense_jax.main --config=experiments/fcn16s_vgg16.py --config.data.root=ROOT \
    --config.model.pretrained=imagenet --workdir=runs/fcn16s

The paper starts from a trained FCN-32s and divides the learning rate by 100. We start from ImageNet
weights, with the same recipe and departures from the paper as fcn32s_vgg16.py.
"""

from dense_jax.experiments import fcn32s_vgg16


def get_config():
    config = fcn32s_vgg16.get_config()
    config.model.skips = (16,)
    return config
