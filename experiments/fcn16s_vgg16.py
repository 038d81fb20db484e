"""FCN-16s on VGG16: FCN-32s with the scores of pool4 added (arXiv 1411.4038, section 4.2).

python -m dense_jax.main --config=experiments/fcn16s_vgg16.py --config.data.root=ROOT \
    --config.model.pretrained=hf://timm/vgg16.tv_in1k/model.safetensors --workdir=runs/fcn16s

The paper starts from a trained FCN-32s and learns 100 times slower. We start from the ImageNet
weights, with the recipe and the departures of fcn32s_vgg16.py.
"""

from dense_jax.experiments import fcn32s_vgg16


def get_config():
    config = fcn32s_vgg16.get_config()
    config.model.skips = (16,)
    return config
