from dense_jax.models.encoders import ENCODERS

# One encoder for each kind. The others differ from it in depth or width only.
FAMILIES = [
    name
    for name in ENCODERS
    if name not in ("resnet34", "resnet101", "convnext_small", "mit_b1", "mit_b2")
]
