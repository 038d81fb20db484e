"""FCN-32s on VGG16 (Long, Shelhamer and Darrell 2015, arXiv 1411.4038).

python -m dense_jax.main --config=experiments/fcn32s_vgg16.py --config.data.root=ROOT \
    --config.model.pretrained=imagenet --workdir=runs/fcn32s

The paper's recipe (section 4.3): ImageNet weights; batches of 20 images; SGD with a fixed learning
rate of 1e-4, momentum 0.9, weight decay 5e-4 (except for biases, which learn twice as fast);
dropout 0.5; zero-initialized scores; bilinear upsampling; whole images without augmentation.

Our departures: batches of 16 and crops of 480 x 480, to fill any number of devices; random flips;
equal learning rates for biases and weights; torchvision's weights and preprocessing instead of
Caffe's; other padding. Caffe pads the image by 100 pixels and crops the scores. We pad fc6 by 3
pixels and mirror the image up to a multiple of 32, so that scores and pixels are aligned by
construction.
"""

from dense_jax.experiments import base


def get_config():
    """Returns a config with fixed bilinear upsampling, as in the authors' later models.

    In the authors' first models, bilinear interpolation is only the initialization, and all
    upsampling layers except the last are learned; see upsampling_options.learn.
    """
    config = base.get_config()
    config.num_steps = 10_000
    config.batch_size = 16
    config.model.name = "fcn"
    config.model.encoder = "vgg16"
    config.model.norm = "none"
    config.model.skips = ()
    config.model.upsampling = "transposed_conv"
    config.model.upsampling_options.init = "bilinear"
    config.model.upsampling_options.learn = False
    config.model.dropout = 0.5
    config.model.zero_init = True
    config.data.name = "folder"
    config.data.crop_size = (480, 480)
    config.optimizer.name = "sgd"
    config.optimizer.learning_rate = 1e-4
    config.optimizer.schedule = "constant"
    config.optimizer.warmup_steps = 0
    config.optimizer.weight_decay = 5e-4
    config.optimizer.grad_clip_norm = 0.0
    config.update(eval_every=1000, checkpoint_every=1000, log_every=50)
    return config
