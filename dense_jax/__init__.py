"""Semantic segmentation research in JAX: encoder x decoder x upsampling x skips x loss."""

__version__ = "0.1.0"
