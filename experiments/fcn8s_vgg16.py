"""FCN-8s on VGG16, which adds the scores of pool3 to FCN-16s (arXiv 1411.4038, section 4.2).

python -m dense_jax.main --config=experiments/fcn8s_vgg16.py --config.data.root=ROOT \
    --config.model.pretrained=imagenet --workdir=runs/fcn8s

The paper starts from a trained FCN-16s. We train all layers at once from ImageNet weights (arXiv
1605.06211), with the same recipe and departures from the paper as fcn32s_vgg16.py. The authors'
at-once model multiplies pool4 by 0.01 and pool3 by 0.0001. We omit these factors because
torchvision's weights expect images of unit variance and Caffe's expect values from 0 to 255, so
that our features are smaller. To use the factors, set --config.model.score_scales='(0.01, 0.0001)'.
"""

from dense_jax.experiments import fcn32s_vgg16


def get_config():
    config = fcn32s_vgg16.get_config()
    config.model.skips = (16, 8)
    return config
