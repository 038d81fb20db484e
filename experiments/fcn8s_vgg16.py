"""FCN-8s on VGG16: FCN-16s with the scores of pool3 added (arXiv 1411.4038, section 4.2).

python -m dense_jax.main --config=experiments/fcn8s_vgg16.py --config.data.root=ROOT \
    --config.model.pretrained=hf://timm/vgg16.tv_in1k/model.safetensors --workdir=runs/fcn8s

The paper starts from a trained FCN-16s. We train all of it at once from the ImageNet weights (arXiv
1605.06211), with the recipe and the departures of fcn32s_vgg16.py. The authors' at-once model
multiplies pool4 by 0.01 and pool3 by 0.0001. We do not, because torchvision's weights take images
of unit variance where Caffe's take 0 to 255, so that their features are smaller. To have these
factors: --config.model.score_scales='(0.01, 0.0001)'.
"""

from dense_jax.experiments import fcn32s_vgg16


def get_config():
    config = fcn32s_vgg16.get_config()
    config.model.skips = (16, 8)
    return config
