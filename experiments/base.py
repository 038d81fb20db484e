"""Every option once, with its unit. Other experiments change a few lines of this."""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder


def get_config() -> ConfigDict:
    """A small U-Net on the synthetic dataset, for two CPU cores."""
    config = ConfigDict()

    config.label = placeholder(str)  # what a sweep and a report call the run by
    config.seed = 0  # of initial values, order and augmentation
    # Trained side by side, each on its share of the devices: seed, seed + 1, ... in WORKDIR/seed=S.
    config.num_seeds = 1
    config.num_steps = 300  # optimizer steps
    config.batch_size = 8  # images per step, over all hosts
    # Parts of the batch that a step takes one after the other, to save memory: loss and gradient
    # are the mean of theirs. Batch norm, and losses that do not average pixels, see one at a time.
    config.num_microbatches = 1
    config.ema_decay = 0.0  # per step, of the averaged parameters that are evaluated; 0: off

    config.loss = "cross_entropy"  # losses.LOSSES
    config.loss_options = {  # unset: the loss's own default
        # One number per class, or by name: "median_frequency" | "inverse_frequency" (of the
        # training split) | "segnet_camvid" (published).
        "class_weights": placeholder(object),
        "label_smoothing": placeholder(float),  # probability spread over all classes
        "per": placeholder(str),  # "batch" | "image": what overlaps are summed over
        "absent": placeholder(str),  # "skip" | "zero" | "one": classes without a labeled pixel
        "smooth": placeholder(float),  # pixels added to both sides of the ratio
        "squared": placeholder(bool),  # squares in the denominator (V-Net)
        "include_background": placeholder(bool),  # whether class 0 counts
        "alpha": placeholder(float),  # price of false positives (tversky)
        "beta": placeholder(float),  # price of misses (tversky)
        "gamma": placeholder(float),  # focusing exponent (focal, tversky)
        "ce_weight": placeholder(float),  # of the cross-entropy in dice_ce
        "dice_weight": placeholder(float),  # of the Dice loss in dice_ce
        "top_k_fraction": placeholder(float),  # of the valid pixels, the hardest (cross_entropy)
    }

    config.model = {
        "name": "unet",  # models.DECODERS
        "encoder": "plain",  # models.ENCODERS
        "upsampling": "transposed_conv",  # models.UPSAMPLERS
        "upsampling_options": {  # unset: the method's own default
            "kernel_size": placeholder(int),  # output pixels (transposed_conv)
            "init": placeholder(str),  # "bilinear" (transposed_conv) | "icnr" (pixel_shuffle)
            "learn": placeholder(bool),  # False: the interpolation stays as it is (transposed_conv)
        },
        "skips": placeholder(tuple),  # encoder strides to fuse; unset: all; (): none
        "fusion": "concat",  # "concat" | "add" (unet)
        # Channels at strides 1, 2, 4, ... of plain and of unet, which uses as many as it has
        # strides, and the last one for all deeper ones.
        "widths": (16, 32, 64, 128),
        "norm": "batch",  # "batch" | "group" | "none"
        "dtype": "float32",  # of the computation: "float32" | "bfloat16"
        "normalization": placeholder(str),  # normalize.NORMALIZATIONS; unset: the weights', or unit
        # Weights of the encoder in torchvision's or timm's names: FILE.safetensors, FILE.npz,
        # FILE.pth or hf://REPO/FILE.
        "pretrained": placeholder(str),
        "freeze_encoder": False,  # neither its parameters nor its statistics change
        # What only some encoders and decoders have; unset: their own default.
        "width_multiplier": placeholder(float),  # of all channels of a classification encoder
        "dropout": placeholder(float),  # probability, of the deepest features (after fc6, fc7)
        "remat": placeholder(bool),  # compute activations twice rather than keep them (not fcn's)
        "bottleneck": placeholder(bool),  # False: the deepest features are a max-pool's (plain)
        "convs_per_level": placeholder(int),  # (plain, unet)
        "kernel_size": placeholder(int),  # of these convolutions, pixels (plain, unet)
        "padding": placeholder(str),  # of these: "SAME" | "VALID" (unet over plain)
        # "full" | "depthwise": a filter per channel | "none": upsampling and fusion alone (unet)
        "decoder_conv": placeholder(str),
        "decoder_relu": placeholder(bool),  # False: no ReLU on the way up (unet)
        "gradual": placeholder(bool),  # True: by factors of 2, also where nothing is fused (fcn)
        "zero_init": placeholder(bool),  # scores start at 0 (fcn)
        "score_scales": placeholder(tuple),  # factor of each skip's features (fcn)
    }

    config.data = {
        "name": "synthetic",  # data.DATASETS
        "root": "",  # folder of the dataset
        "train_split": "train",
        "eval_split": "val",
        "crop_size": (64, 64),  # height and width that the network trains on, pixels
        "resolution": 1.0,  # that the network sees, relative to the files'; scores are at the files'
        "canvas_size": placeholder(tuple),  # pixels kept of each image; unset: the largest image
        "workers": 0,  # decoding processes, for each seed on this host; 0: threads
        # Where decoded images stay: "none" | "host": in memory, shared by the workers | "device":
        # the training split in the memory of every device, the evaluation split as with "host".
        "cache": "none",
        "verify": True,  # open every file once before the first training
    }

    # Each example's amounts are uniform in +- the strength unless said otherwise; 0: off.
    config.augment = {
        "flip": 0.5,  # probability of a left-right flip
        "flip_vertical": 0.0,  # probability of a top-bottom flip
        "scale": 0.0,  # zoom log-uniform between 1 / (1 + scale) and 1 + scale
        "rotation": 0.0,  # degrees
        "shear": 0.0,  # degrees by which vertical lines lean
        "elastic": 0.0,  # standard deviation of a 3 x 3 grid's displacements, network input pixels
        # Below 1: of 10 windows, the first where each class has less than this part of the valid
        # pixels.
        "max_class_fraction": 1.0,
        "brightness": 0.0,  # factor 1 +- brightness
        "contrast": 0.0,  # factor 1 +- contrast, of differences from the mean luma
        "saturation": 0.0,  # factor 1 +- saturation, of differences from the pixel's luma (RGB)
        "hue": 0.0,  # degrees (RGB)
        "gamma": 0.0,  # exponent log-uniform between 1 / (1 + gamma) and 1 + gamma
        "blur": 0.0,  # largest standard deviation of a Gaussian, network input pixels
        "noise": 0.0,  # largest standard deviation, gray levels of 255
    }

    # The loss of a pixel between two objects weighs up to so much more, as in the U-Net paper:
    # weight * exp(-(d1 + d2)^2 / (2 sigma^2)), d1 and d2 its distances to the nearest two.
    config.border = {
        "weight": 0.0,  # added to the pixel's class weight; 0: off
        "sigma": 5.0,  # pixels of the files' labels
        # Names of the classes whose connected components are the objects; unset: the dataset's own
        # instance files.
        "classes": placeholder(tuple),
    }

    config.optimizer = {
        "name": "adamw",  # "adamw" | "sgd"
        "learning_rate": 1e-2,  # at its highest
        "encoder_lr_multiplier": 1.0,  # of the learning rate, for the encoder
        "schedule": "cosine",  # "constant" | "cosine" | "poly"
        "warmup_steps": 20,  # optimizer steps
        "momentum": 0.9,  # Adam's first-moment decay
        "weight_decay": 1e-4,  # not of norms and biases
        "grad_clip_norm": 1.0,  # global norm; 0: off
        "sharded": False,  # True: each device keeps a part of the moments, to save memory
    }

    config.eval = {
        "tile_size": (1024, 1024),  # largest input of one evaluation, pixels, with margins
        "margin": 64,  # context around a tile, pixels; images that fit need none
        "batch_size": 8,  # tiles per step, over all hosts
        "num_pictures": 4,  # input | truth | prediction | errors, per evaluation
    }

    config.eval_every = 100  # steps; also at the end
    config.checkpoint_every = 100  # steps; also at each evaluation
    config.log_every = 10  # steps
    return config
