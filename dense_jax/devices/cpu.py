"""Fast implementations of layers, most for XLA:CPU. Models do not depend on this module.

While a function wrapped by `fast` is traced, its `nn.Conv` and `nn.BatchNorm` layers use the
implementations in this file. The results differ from Flax's only by rounding errors. Layers with
unsupported options (such as a precision, or strides without depthwise kernels) still use Flax.

Convolutions are JAX primitives, but for depthwise ones. On CPUs, a primitive is lowered to an
implementation in this file, and on other platforms to XLA's convolution. An exported program can
contain both. The primitives have forward and reverse derivatives of all orders. Under `jax.vmap`,
they use XLA's convolutions. Batch norm is the same on all platforms.

In the docstrings, "221 -> 203 ms" means that a training step takes 221 ms without the optimization
and 203 ms with it. Times are from benchmarks/speed.md.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.linen import dtypes
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jaxtyping import Array, Float

NHWC = ("NHWC", "HWIO", "NHWC")
# The values at which options of jax.lax.conv_general_dilated have no effect. For an option that is
# not listed, this value is None.
NEUTRAL = {
    "lhs_dilation": (1, 1),
    "rhs_dilation": (1, 1),
    "feature_group_count": 1,
    "batch_group_count": 1,
    "dimension_numbers": jax.lax.conv_dimension_numbers((1,) * 4, (1,) * 4, NHWC),
}
# XLA:CPU uses Eigen if there are at most this many input and output channels, else YNNPACK.
FEW = 16
# YNNPACK in jaxlib 0.10 runs most convolutions on a single thread, so Eigen is faster (unet32
# predicts 4 images of 128 x 128 pixels in 108 instead of 152 ms).
IS_THREADED = jax.__version_info__ >= (0, 11)
# If a tap has at least this many weights per pixel, reversing the kernel dominates the run time.
MANY = 128
# Kernels with at least this size and this many weights per tap come from fully connected layers.
DENSE_SIZE, DENSE_WEIGHTS = 6, 2**20

Pads = tuple[tuple[int, int], tuple[int, int]]


def fast(function: Callable) -> Callable:
    """Returns a version of `function` whose Flax layers use the implementations in this file."""

    @functools.wraps(function)
    def with_fast_layers(*args, **kwargs):
        with nn.intercept_methods(_replace):
            return function(*args, **kwargs)

    return with_fast_layers


def _replace(call: Callable, args: tuple, kwargs: dict, context: nn.module.InterceptorContext):
    """Calls the fast implementation of a layer, or the layer itself if no fast one exists."""
    module: Any = context.module
    if context.method_name != "__call__":
        return call(*args, **kwargs)
    if _takes_convolution(module):
        fast_module = module.clone(parent=module.scope, conv_general_dilated=convolution)
        return fast_module(*args, **kwargs)
    if type(module) is nn.BatchNorm and not kwargs and _is_plain_batch_norm(module, *args):
        return _batch_norm(module, *args)
    return call(*args, **kwargs)


def _takes_convolution(module: nn.Module) -> bool:
    """Returns whether a module, such as nn.Conv, has an unset `conv_general_dilated` field."""
    other = getattr(module, "conv_general_dilated_cls", None)
    return getattr(module, "conv_general_dilated", convolution) is None and other is None


def convolution(
    x: Float[Array, "b *space c"],
    kernel: Float[Array, "*window d f"],
    strides: Sequence[int],
    padding: str | Sequence[tuple[int, int]],
    **options: Any,
) -> Float[Array, "b *Space f"]:
    """Computes jax.lax.conv_general_dilated, by default for NHWC images and HWIO kernels.

    The fast implementations require default options, stride 1, and on each side less padding than
    the size of the (dilated) kernel. Depthwise convolutions may have strides and dilation. XLA
    computes all other convolutions.
    """
    strides, dilation = tuple(strides), tuple(options.get("rhs_dilation") or (1, 1))
    is_depthwise = kernel.shape[2:] == (1, x.shape[-1]) == (1, options.get("feature_group_count"))
    own = ("rhs_dilation", "feature_group_count") if is_depthwise else ()
    is_neutral = all(NEUTRAL.get(name) == options[name] for name in options if name not in own)
    is_plain = is_neutral and jax.config.values["jax_default_matmul_precision"] is None
    if is_plain and x.dtype == kernel.dtype and (is_depthwise or strides == (1, 1)):
        size, weights = kernel.shape[:2], math.prod(kernel.shape[2:])
        reach = tuple((n - 1) * d + 1 for n, d in zip(size, dilation, strict=True))
        if isinstance(padding, str):
            padding = jax.lax.padtype_to_pads(x.shape[1:3], reach, strides, padding)
        pads: Any = tuple((low, high) for low, high in padding)
        if all(0 <= n < r for r, ends in zip(reach, pads, strict=True) for n in ends):
            if is_depthwise:
                how = {"strides": strides, "pads": pads, "dilation": dilation}
                # Gradients shift x again, because its shifted copies would take much memory.
                on_cpu = jax.checkpoint(functools.partial(_depthwise_on_cpu, **how))
                elsewhere = functools.partial(_depthwise, **how)
                return jax.lax.platform_dependent(x, kernel, cpu=on_cpu, default=elsewhere)
            if size == (1, 1):
                return x @ kernel[0, 0]
            if min(size) >= DENSE_SIZE and weights >= DENSE_WEIGHTS:
                return _by_patches(x, kernel, pads)
            return CONV.bind(x, kernel, pads=pads)
    others: Any = {"dimension_numbers": NHWC} | options
    return jax.lax.conv_general_dilated(x, kernel, strides, padding, **others)


def _by_patches(x: Array, kernel: Array, pads: Pads) -> Array:
    """Convolves by im2col, a single matrix product of all patches of x with the kernel.

    For few pixels and thousands of channels, as in AlexNet's and VGG's fc6, im2col is many times
    faster than XLA:CPU's convolution. The patches take the memory of one copy of x per kernel tap.
    """
    rows, columns, _, features = kernel.shape
    x = jnp.pad(x, ((0, 0), *pads, (0, 0)))
    h, w = x.shape[1] - rows + 1, x.shape[2] - columns + 1
    shifted = [x[:, i : i + h, j : j + w] for i, j in np.ndindex(rows, columns)]
    return jnp.concatenate(shifted, axis=-1) @ kernel.reshape(-1, features)


def _conv(x: Array, kernel: Array, *, pads: Pads) -> Array:
    """Computes XLA's convolution with stride 1."""
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), pads, dimension_numbers=NHWC)


def _input_gradient(g: Array, kernel: Array, *, pads: Pads) -> Array:
    """Computes a convolution's input gradient with XLA, from the gradient g of the output."""
    sizes = zip(g.shape[1:3], kernel.shape[:2], pads, strict=True)
    h, w = (n + taps - 1 - sum(ends) for n, taps, ends in sizes)
    x = jax.ShapeDtypeStruct((len(g), h, w, kernel.shape[2]), g.dtype)
    return jax.linear_transpose(lambda x: _conv(x, kernel, pads=pads), x)(g)[0]


def _kernel_gradient(x: Array, g: Array, *, pads: Pads) -> Array:
    """Computes a convolution's kernel gradient with XLA, from the gradient g of the output."""
    kernel = jax.ShapeDtypeStruct(_kernel_shape(x, g, pads), g.dtype)
    return jax.linear_transpose(lambda kernel: _conv(x, kernel, pads=pads), kernel)(g)[0]


def _kernel_shape(x: Array, g: Array, pads: Pads) -> tuple[int, ...]:
    sizes = zip(x.shape[1:3], g.shape[1:3], pads, strict=True)
    return *(n + sum(ends) - m + 1 for n, m, ends in sizes), x.shape[3], g.shape[3]


def _back(pads: Pads, size: Sequence[int]) -> Pads:
    """Returns the padding of the backward convolution, which computes the input gradient.

    pads, size: The padding and the kernel size of the forward convolution.
    """
    (top, bottom), (left, right) = pads
    rows, columns = size[:2]
    return (rows - 1 - top, rows - 1 - bottom), (columns - 1 - left, columns - 1 - right)


def _conv_on_cpu(x: Array, kernel: Array, *, pads: Pads) -> Array:
    """Convolves with YNNPACK if YNNPACK is multithreaded, otherwise with Eigen."""
    if max(kernel.shape[2:]) <= FEW:
        return (_two_at_once if IS_THREADED else _conv)(x, kernel, pads=pads)
    return (_conv if IS_THREADED else _by_eigen)(x, kernel, pads=pads)


def _by_eigen(x: Array, kernel: Array, *, pads: Pads) -> Array:
    """Convolves, forcing XLA to use Eigen instead of YNNPACK.

    XLA uses YNNPACK only if there are fewer rows of padding (top + bottom) than kernel rows. This
    function therefore adds rows of padding at the bottom and drops the extra output rows.
    """
    (top, bottom), columns = pads
    extra = max(0, len(kernel) - top - bottom)
    y = _conv(x, kernel, pads=((top, bottom + extra), columns))
    return y[:, : y.shape[1] - extra]


def _two_at_once(x: Array, kernel: Array, *, pads: Pads) -> Array:
    """Convolves, computing two adjacent pixels at once so that XLA uses YNNPACK.

    The convolution has a horizontal stride of 2 and twice the output channels. Its kernel consists
    of two copies of `kernel`, shifted by one column. A 3x3 kernel needs a third more products, but
    training is faster (unet16 on one core: 221 -> 203 ms).
    """
    _, columns, _, features = kernel.shape
    (left, right), width = pads[1], x.shape[2] + sum(pads[1]) - columns + 1
    shifted = [jnp.pad(kernel, ((0, 0), (i, 1 - i), (0, 0), (0, 0))) for i in (0, 1)]
    y = jax.lax.conv_general_dilated(
        x,
        jnp.concatenate(shifted, axis=-1),
        (1, 2),
        (pads[0], (left, right + 1)),  # gives the last pixel of an odd width a neighbor
        dimension_numbers=NHWC,
    )
    return y.reshape(*y.shape[:2], 2 * y.shape[2], features)[:, :, :width]


def _has_few_pixels(shape: Sequence[int], kernel_shape: Sequence[int]) -> bool:
    return math.prod(kernel_shape[2:]) >= MANY * math.prod(shape[:3])


def _input_gradient_on_cpu(g: Array, kernel: Array, *, pads: Pads) -> Array:
    """Computes a convolution's input gradient from the gradient g of the output.

    For few pixels, uses one matrix product per kernel tap, because a convolution would need a
    reversed and transposed copy of the kernel. Training is faster (unet_resnet34 on one core,
    measured twice: 634 -> 568 and 630 -> 625 ms).
    """
    (top, bottom), (left, right) = back = _back(pads, kernel.shape)
    rows, columns, channels, _ = kernel.shape
    h, w = g.shape[1] + top + bottom - rows + 1, g.shape[2] + left + right - columns + 1
    if not _has_few_pixels((len(g), h, w), kernel.shape):
        return _conv_on_cpu(g, kernel[::-1, ::-1].swapaxes(2, 3), pads=back)
    g = jnp.pad(g, ((0, 0), *back, (0, 0)))
    exact = jnp.promote_types(g.dtype, jnp.float32)
    total = jnp.zeros((len(g), h, w, channels), exact)
    for i, j in np.ndindex(rows, columns):
        pixels, tap = g[:, i : i + h, j : j + w], kernel[rows - 1 - i, columns - 1 - j]
        total += jnp.einsum("bhwf,cf->bhwc", pixels, tap, preferred_element_type=exact)
    return total.astype(g.dtype)


def _kernel_gradient_on_cpu(x: Array, g: Array, *, pads: Pads) -> Array:
    """Computes a convolution's kernel gradient by a one-dimensional convolution along the height.

    XLA's two-dimensional convolution takes up to four times as long. Training steps get faster
    (unet16: 202 -> 175 ms, unet64: 1087 -> 720 ms).
    """
    # The gradient [i, j, c, f] is the sum of x[b, r + i, s + j, c] g[b, r, s, f] over (b, r, s).
    # The convolution slides g along r. Its kernel is x, with one tap per row of x. Its batch is f,
    # its input channels are (b, s), and its output channels are (j, c).
    shape = rows, columns, channels, features = _kernel_shape(x, g, pads)
    if _has_few_pixels(x.shape, shape):
        return _kernel_gradient(x, g, pads=pads)
    if channels > features:  # swaps x and g, which makes `shifted` smaller
        gradient = _kernel_gradient_on_cpu(g, x, pads=_back(pads, shape))
        return gradient[::-1, ::-1].swapaxes(2, 3)
    h, w = g.shape[1:3]
    x = jnp.pad(x, ((0, 0), (0, 0), pads[1], (0, 0))).transpose(1, 0, 2, 3)
    shifted = _side_by_side([x[:, :, j : j + w] for j in range(columns)])
    y = jax.lax.conv_general_dilated(
        g.transpose(3, 1, 0, 2).reshape(features, h, -1),
        shifted.reshape(len(x), -1, columns * channels),
        (1,),
        _back(pads, shape)[:1],
        dimension_numbers=("NWC", "WIO", "NWC"),
    )
    # g slides over x, so the taps are in reverse order.
    return y.reshape(features, rows, columns, channels)[:, ::-1].transpose(1, 2, 3, 0)


def _side_by_side(parts: Sequence[Array]) -> Array:
    """Concatenates channels by adding zero-padded arrays. XLA:CPU compiles the sum to one loop."""
    before, after = 0, sum(part.shape[-1] for part in parts)
    padded = []
    for part in parts:
        after -= part.shape[-1]
        padded.append(jnp.pad(part, ((0, 0),) * (part.ndim - 1) + ((before, after),)))
        before += part.shape[-1]
    return functools.reduce(jnp.add, padded)


def _depthwise(
    x: Array, kernel: Array, *, strides: Sequence[int], pads: Pads, dilation: Sequence[int]
) -> Array:
    """Computes XLA's depthwise convolution. kernel[:, :, 0, i] is the kernel of channel i of x."""
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        strides,
        pads,
        rhs_dilation=dilation,
        dimension_numbers=NHWC,
        feature_group_count=x.shape[-1],
    )


def _depthwise_on_cpu(
    x: Array, kernel: Array, *, strides: Sequence[int], pads: Pads, dilation: Sequence[int]
) -> Array:
    """Convolves by one multiplication and one addition per tap and pixel, which XLA fuses.

    XLA's grouped convolution takes about 20 times as long on a CPU, and its gradients up to ten
    times as long.
    """
    exact = jnp.promote_types(x.dtype, jnp.float32)
    padded = jnp.pad(x.astype(exact), ((0, 0), *pads, (0, 0)))
    axes = zip(padded.shape[1:3], kernel.shape[:2], dilation, strict=True)
    h, w = (n - (taps - 1) * step for n, taps, step in axes)
    products = []
    for i, j in np.ndindex(*kernel.shape[:2]):
        top, left = i * dilation[0], j * dilation[1]
        pixels = padded[:, top : top + h : strides[0], left : left + w : strides[1]]
        products.append(pixels * kernel[i, j].astype(exact)[None, None])
    return functools.reduce(jnp.add, products).astype(x.dtype)


def _primitive(by_xla: Callable, on_cpu: Callable) -> Primitive:
    """Makes a primitive that lowers to `on_cpu` on a CPU and to `by_xla` on other platforms."""
    primitive = Primitive(by_xla.__name__.lstrip("_"))

    def shape(*arrays, **options):
        return jax.make_jaxpr(functools.partial(by_xla, **options))(*arrays).out_avals[0]

    def mapped(arrays, axes, **options):
        return jax.vmap(functools.partial(by_xla, **options), axes)(*arrays), 0

    primitive.def_abstract_eval(shape)
    primitive.def_impl(jax.jit(primitive.bind, static_argnames="pads"))
    batching.primitive_batchers[primitive] = mapped
    mlir.register_lowering(primitive, mlir.lower_fun(by_xla, multiple_results=False))
    mlir.register_lowering(primitive, mlir.lower_fun(on_cpu, multiple_results=False), "cpu")
    return primitive


CONV = _primitive(_conv, _conv_on_cpu)
INPUT_GRADIENT = _primitive(_input_gradient, _input_gradient_on_cpu)
KERNEL_GRADIENT = _primitive(_kernel_gradient, _kernel_gradient_on_cpu)
# The sum of g * conv(x, kernel) is linear in each of x, kernel and g. Each primitive is the
# derivative of this sum with respect to one array, so they are transposes of each other.
ad.defbilinear(
    CONV,
    lambda g, x, kernel, pads: INPUT_GRADIENT.bind(g, kernel, pads=pads),
    lambda g, x, kernel, pads: KERNEL_GRADIENT.bind(x, g, pads=pads),
)
ad.defbilinear(
    INPUT_GRADIENT,
    lambda x, g, kernel, pads: CONV.bind(x, kernel, pads=pads),
    lambda x, g, kernel, pads: KERNEL_GRADIENT.bind(x, g, pads=pads),
)
ad.defbilinear(
    KERNEL_GRADIENT,
    lambda kernel, x, g, pads: INPUT_GRADIENT.bind(g, kernel, pads=pads),
    lambda kernel, x, g, pads: CONV.bind(x, kernel, pads=pads),
)


def _is_plain_batch_norm(module: nn.BatchNorm, x: Array, *others: Any) -> bool:
    """Returns whether `_batch_norm` can replace a module.

    The module must be in training mode. Options that `_batch_norm` does not support must have their
    default values. In evaluation mode, Flax's batch norm is already fast.
    """
    free = ("momentum", "epsilon", "dtype", "use_running_average", "use_fast_variance")
    fields = [f for f in dataclasses.fields(module) if f.name not in (*free, "parent", "name")]
    is_default = all(getattr(module, f.name) == f.default for f in fields) and not others
    is_image = x.ndim == 4 and jnp.issubdtype(x.dtype, jnp.floating)
    return is_default and is_image and module.use_running_average is False


def _batch_norm(module: nn.BatchNorm, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
    """Normalizes a training batch by one multiplication and one addition per value.

    Stores only x for the backward pass, whereas Flax stores two arrays of the size of x. Training
    is faster (unet16 on one core, measured twice: 220 -> 216 and 230 -> 205 ms). On a TPU, too, a
    step has fewer cycles and all-reduces; see benchmarks/tpu.md.
    """
    channels, scope = x.shape[-1:], module.scope
    assert scope is not None
    mean = scope.variable("batch_stats", "mean", jnp.zeros, channels)
    var = scope.variable("batch_stats", "var", jnp.ones, channels)
    scale = scope.param("scale", nn.initializers.ones, channels)
    bias = scope.param("bias", nn.initializers.zeros, channels)
    exact = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    # mean(x^2) - mean(x)^2 loses all precision if the mean is many standard deviations from 0.
    # Subtracting the mean of the top left pixels from x leaves a mean of at most sqrt(h w) standard
    # deviations, because these pixels contribute to the deviation.
    # The rounding of bfloat16 has lost the deviations before the mean is that far from 0.
    corners, moved = jnp.zeros(channels, exact.dtype), exact
    if x.dtype != jnp.bfloat16:
        corners = jax.lax.stop_gradient(jnp.mean(exact[:, :1, :1], axis=(0, 1, 2)))
        moved = exact - corners[None, None, None]
    first, second = (jnp.mean(moment, axis=(0, 1, 2)) for moment in (moved, moved**2))
    statistics = corners + first, jnp.maximum(second - first**2, 0)
    if not module.is_initializing():
        for average, value in zip((mean, var), statistics, strict=True):
            average.value = module.momentum * average.value + (1 - module.momentum) * value
    factor = scale * jax.lax.rsqrt(statistics[1] + module.epsilon)
    shift = bias - statistics[0] * factor
    y = exact * factor[None, None, None] + shift[None, None, None]
    return y.astype(dtypes.canonicalize_dtype(x, scale, bias, dtype=module.dtype))
