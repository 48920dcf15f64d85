"""The operations of an ML program in numpy, by their MIL names and parameters.

Floats arrive as float32, whatever their declared type: rounding to float16 is the interpreter's business. Source of
every meaning: coremltools 9.0, coremltools.converters.mil.mil.ops.defs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import erf, pi
from typing import Any

import numpy as np

Array = np.ndarray
CASTS = {
    "fp16": np.float32,
    "fp32": np.float32,
    "int32": np.int32,
    "int16": np.int32,
    "uint16": np.int32,
    "bool": np.bool_,
}
_erf = np.frompyfunc(erf, 1, 1)


def dequantize(data: Array, scale: Array, offset: Array | None = None) -> Array:
    """scale * (data - offset) in float32, with a scale for every block of each axis."""
    values = data.astype(np.float32)
    if offset is not None:
        values -= spread(offset.astype(np.float32), data.shape)
    blocks = [part for size, count in zip(data.shape, scale.shape, strict=True) for part in (count, size // count)]
    shaped = [part for count in scale.shape for part in (count, 1)]
    return (values.reshape(blocks) * scale.astype(np.float32).reshape(shaped)).reshape(data.shape)


def spread(blocks: Array, shape: Sequence[int]) -> Array:
    """Every block's value repeated over the elements of its block."""
    for axis, size in enumerate(shape):
        blocks = np.repeat(blocks, size // blocks.shape[axis], axis)
    return blocks


def cast(x: Array, dtype: str) -> Array:
    """To another type; toward zero where a float becomes an integer."""
    return x.astype(CASTS[dtype])


def linear(x: Array, weight: Array, bias: Array | None = None) -> Array:
    """x W^T + bias."""
    y = x @ weight.T
    return y if bias is None else y + bias


def matmul(x: Array, y: Array, transpose_x: bool = False, transpose_y: bool = False) -> Array:
    """x y, batched, either one transposed in its last two axes."""
    return (np.swapaxes(x, -1, -2) if transpose_x else x) @ (np.swapaxes(y, -1, -2) if transpose_y else y)


def gather(x: Array, indices: Array, axis: int = 0, batch_dims: int = 0, validate_indices: bool = False) -> Array:
    """Slices of x along an axis; negative indices count from the end."""
    if batch_dims:
        raise ValueError("gather: batch_dims")
    return np.take(x, indices, axis=int(axis))


def gather_along_axis(x: Array, indices: Array, axis: int = 0, validate_indices: bool = False) -> Array:
    """Elements of x along an axis, an index for each."""
    return np.take_along_axis(x, indices.astype(np.int64), int(axis))


def scatter_along_axis(
    data: Array, indices: Array, updates: Array, axis: int = 0, mode: str = "add", validate_indices: bool = False
) -> Array:
    """data with updates put at their indices along an axis."""
    if mode != "update":
        raise ValueError(f"scatter_along_axis: mode {mode}")
    found = data.copy()
    np.put_along_axis(found, indices.astype(np.int64), updates, int(axis))
    return found


def slice_by_index(
    x: Array,
    begin: Array,
    end: Array,
    stride: Array | None = None,
    begin_mask: Array | None = None,
    end_mask: Array | None = None,
    squeeze_mask: Array | None = None,
) -> Array:
    """x[begin:end:stride] on every axis; a mask leaves an end open, or takes one element and drops the axis."""

    def masked(mask: Array | None, axis: int) -> bool:
        return mask is not None and bool(mask[axis])

    cuts: list[Any] = []
    for axis in range(x.ndim):
        if masked(squeeze_mask, axis):
            cuts.append(int(begin[axis]))
            continue
        first = None if masked(begin_mask, axis) else int(begin[axis])
        last = None if masked(end_mask, axis) else int(end[axis])
        cuts.append(slice(first, last, None if stride is None else int(stride[axis])))
    return x[tuple(cuts)]


def slice_by_size(x: Array, begin: Array, size: Array) -> Array:
    """size elements from begin on every axis; -1 takes all that are left."""
    cuts = [slice(int(b), None if n == -1 else int(b + n)) for b, n in zip(begin, size, strict=True)]
    return x[tuple(cuts)]


def split(x: Array, axis: int, num_splits: int | None = None, split_sizes: Array | None = None) -> list[Array]:
    """Cut along an axis, in equal parts or in given sizes."""
    if split_sizes is None:
        assert num_splits is not None
        return np.split(x, int(num_splits), int(axis))
    return np.split(x, np.cumsum(split_sizes)[:-1], int(axis))


def concat(values: Sequence[Array], axis: int, interleave: bool = False) -> Array:
    """One after another along an axis."""
    if interleave:
        raise ValueError("concat: interleave")
    return np.concatenate([np.atleast_1d(value) for value in values], int(axis))  # lengths come as scalars


def stack(values: Sequence[Array], axis: int) -> Array:
    """One after another along a new axis."""
    return np.stack(values, int(axis))


def reshape(x: Array, shape: Array) -> Array:
    """In another shape; 0 keeps an axis, -1 takes what is left."""
    return x.reshape([x.shape[i] if n == 0 else int(n) for i, n in enumerate(shape)])


def expand_dims(x: Array, axes: Array) -> Array:
    """With new axes of length 1."""
    return np.expand_dims(x, tuple(int(axis) for axis in axes))


def squeeze(x: Array, axes: Array | None = None) -> Array:
    """Without axes of length 1."""
    return np.squeeze(x, None if axes is None else tuple(int(axis) for axis in axes))


def softmax(x: Array, axis: int = -1) -> Array:
    """exp(x) over its sum."""
    shifted = np.exp(x - x.max(int(axis), keepdims=True))
    return shifted / shifted.sum(int(axis), keepdims=True)


def sigmoid(x: Array) -> Array:
    """1 / (1 + exp(-x)), without overflow."""
    half = np.float32(0.5)
    return half * (np.tanh(half * x) + 1)


def error_function(x: Array) -> Array:
    """erf, value by value."""
    return np.asarray(_erf(x), np.float32)


def gelu(x: Array, mode: str = "EXACT") -> Array:
    """x Phi(x), or its approximation through tanh."""
    if mode == "EXACT":
        return x * np.float32(0.5) * (1 + error_function(x / np.float32(2**0.5)))
    if mode == "TANH_APPROXIMATION":
        inner = np.float32((2 / pi) ** 0.5) * (x + np.float32(0.044715) * x**3)
        return x * np.float32(0.5) * (1 + np.tanh(inner))
    raise ValueError(f"gelu: mode {mode}")


def layer_norm(
    x: Array, axes: Array, gamma: Array | None = None, beta: Array | None = None, epsilon: Array | float = 1e-5
) -> Array:
    """(x - mean) / sqrt(variance + epsilon) * gamma + beta over some axes."""
    over = tuple(int(axis) for axis in axes)
    centred = x - x.mean(over, keepdims=True)
    y = centred / np.sqrt(np.square(centred).mean(over, keepdims=True) + np.float32(epsilon))
    shape = [x.shape[i] if i in {axis % x.ndim for axis in over} else 1 for i in range(x.ndim)]
    y = y if gamma is None else y * gamma.reshape(shape)
    return y if beta is None else y + beta.reshape(shape)


def conv(
    x: Array,
    weight: Array,
    strides: Array,
    pad_type: str = "valid",
    pad: Array | None = None,
    dilations: Array | None = None,
    groups: int = 1,
    bias: Array | None = None,
) -> Array:
    """2-D convolution of patches that do not overlap, as vision transformers embed them: (B, C, H, W)."""
    height, width = weight.shape[2:]
    padded = pad is not None and pad.any() and pad_type == "custom"
    if padded or groups != 1 or tuple(strides) != (height, width) or x.shape[2] % height or x.shape[3] % width:
        raise ValueError("conv: only patches that do not overlap, without padding")
    batch, channels, rows, columns = *x.shape[:2], x.shape[2] // height, x.shape[3] // width
    patches = x.reshape(batch, channels, rows, height, columns, width).transpose(0, 2, 4, 1, 3, 5)
    y = patches.reshape(batch, rows, columns, -1) @ weight.reshape(len(weight), -1).T
    y = y if bias is None else y + bias
    return y.transpose(0, 3, 1, 2)


def topk(
    x: Array,
    k: int,
    axis: int = -1,
    ascending: bool = False,
    sort: bool = True,
    return_indices: bool = True,
    output_indices_dtype: str = "int32",
) -> list[Array]:
    """The k largest (or smallest) along an axis, in order, and where they are."""
    order = np.argsort(x if ascending else -x, int(axis), kind="stable")
    places = np.take(order, range(int(k)), int(axis))
    return [np.take_along_axis(x, places, int(axis)), places.astype(np.int32)]


def cumsum(x: Array, axis: int = 0, exclusive: bool = False, reverse: bool = False) -> Array:
    """Running sums along an axis."""
    if exclusive or reverse:
        raise ValueError("cumsum: exclusive or reverse")
    return np.cumsum(x, int(axis), dtype=x.dtype)


def fill(shape: Array, value: Array) -> Array:
    """One value everywhere."""
    return np.full([int(n) for n in shape], value)


def tile(x: Array, reps: Array) -> Array:
    """Repeated along every axis."""
    return np.tile(x, [int(n) for n in reps])


def range_1d(start: Array, end: Array, step: Array) -> Array:
    """start, start + step, ... below end."""
    ends = [np.asarray(value).item() for value in (start, end, step)]
    return np.arange(*ends).astype(np.asarray(start).dtype)


def select(cond: Array, a: Array, b: Array) -> Array:
    """a where cond, else b."""
    return np.where(cond, a, b)


def clip(x: Array, alpha: Array, beta: Array) -> Array:
    """Not below alpha, not above beta."""
    return np.clip(x, alpha, beta)


def divide(x: Array, y: Array) -> Array:
    """x / y; integers toward minus infinity."""
    return x // y if x.dtype.kind == "i" else x / y


def _reduce(function: Callable[..., Array]) -> Callable[..., Array]:
    def reduce(x: Array, axes: Array | None = None, keep_dims: bool = False) -> Array:
        over = None if axes is None else tuple(int(axis) for axis in axes)
        return np.asarray(function(x, axis=over, keepdims=bool(keep_dims)))

    return reduce


def _alone(function: Callable[..., Array]) -> Callable[..., Array]:
    return lambda x: function(x)


def _pairwise(function: Callable[..., Array]) -> Callable[..., Array]:
    return lambda x, y: function(x, y)


def _epsilon(function: Callable[[Array, np.float32], Array], default: float) -> Callable[..., Array]:
    return lambda x, epsilon=default: function(x, np.float32(epsilon))


OPERATIONS: dict[str, Callable[..., Any]] = {
    "constexpr_blockwise_shift_scale": dequantize,
    "cast": cast,
    "linear": linear,
    "matmul": matmul,
    "gather": gather,
    "gather_along_axis": gather_along_axis,
    "scatter_along_axis": scatter_along_axis,
    "slice_by_index": slice_by_index,
    "slice_by_size": slice_by_size,
    "split": split,
    "concat": concat,
    "stack": stack,
    "reshape": reshape,
    "expand_dims": expand_dims,
    "squeeze": squeeze,
    "softmax": softmax,
    "sigmoid": sigmoid,
    "gelu": gelu,
    "layer_norm": layer_norm,
    "conv": conv,
    "topk": topk,
    "cumsum": cumsum,
    "fill": fill,
    "tile": tile,
    "range_1d": range_1d,
    "select": select,
    "clip": clip,
    "real_div": divide,
    "silu": lambda x: x * sigmoid(x),
    "relu": lambda x: np.maximum(x, 0),
    "erf": error_function,
    "tanh": _alone(np.tanh),
    "exp": _alone(np.exp),
    "abs": _alone(np.abs),
    "sqrt": _alone(np.sqrt),
    "square": _alone(np.square),
    "sin": _alone(np.sin),
    "cos": _alone(np.cos),
    "identity": lambda x: x,
    "logical_not": _alone(np.logical_not),
    "shape": lambda x: np.array(x.shape, np.int32),
    "transpose": lambda x, perm: np.transpose(x, [int(axis) for axis in perm]),
    "rsqrt": _epsilon(lambda x, epsilon: 1 / np.sqrt(x + epsilon), 1e-12),
    "inverse": _epsilon(lambda x, epsilon: 1 / (x + epsilon), 1e-4),
    "add": _pairwise(np.add),
    "sub": _pairwise(np.subtract),
    "mul": _pairwise(np.multiply),
    "maximum": _pairwise(np.maximum),
    "minimum": _pairwise(np.minimum),
    "floor_div": _pairwise(np.floor_divide),
    "pow": _pairwise(np.power),
    "mod": _pairwise(np.mod),
    "equal": _pairwise(np.equal),
    "not_equal": _pairwise(np.not_equal),
    "less": _pairwise(np.less),
    "less_equal": _pairwise(np.less_equal),
    "greater": _pairwise(np.greater),
    "greater_equal": _pairwise(np.greater_equal),
    "logical_and": _pairwise(np.logical_and),
    "logical_or": _pairwise(np.logical_or),
    "reduce_sum": _reduce(np.sum),
    "reduce_mean": _reduce(np.mean),
    "reduce_max": _reduce(np.max),
    "reduce_min": _reduce(np.min),
    "reduce_l2_norm": _reduce(lambda x, **how: np.sqrt(np.square(x).sum(**how))),
    "reduce_sum_square": _reduce(lambda x, **how: np.square(x).sum(**how)),
}
