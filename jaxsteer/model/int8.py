"""Block kernels in eight bits: weight-only, one scale per output column.

A decode step reads every weight once for all rows, so half the bytes are less time where memory is
the limit: on a GPU or TPU. What is multiplied is still floating point, so a CPU gains nothing. Only
kernels of the blocks are rounded; the token table, the head, norms, biases and the residual stream
keep their type. Off unless a model is converted with `--dtype bfloat16+int8`, since it is another
model: its weights have a hash of their own, and its replies are its own (docs/scale.md).

    kernel[i, o]  is nearly  int8[i, o] * scale[o],  scale[o] = max over i |kernel[i, o]| / 127.5

qwix rounds; it is an extra that only converting needs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int8

from jaxsteer.errors import UserError
from jaxsteer.model.arrays import AnyArray

MARK = "+int8"
# Beside layers/0/attn/q/kernel on disk.
SCALE = "_scale"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Rounded:
    """A kernel in eight bits.

    Attributes:
      values: whole numbers from -128 to 127.
      scale: what a column's numbers are multiples of.
    """

    values: Int8[AnyArray, "n_in n_out"]
    scale: Float[AnyArray, "1 n_out"]


def is_rounded(path: str) -> bool:
    """Whether a parameter is stored in eight bits.

    >>> is_rounded("layers/0/mlp/up/kernel"), is_rounded("head/kernel")
    (True, False)
    """
    return path.startswith("layers/") and path.endswith("/kernel")


def check() -> None:
    """Look for qwix.

    Raises:
      UserError: it is not installed.
    """
    _qwix()


def rounded(kernel: Float[np.ndarray, "n_in n_out"]) -> Rounded:
    """Round a kernel; the scales are of its type.

    Raises:
      UserError: qwix is not installed.
    """
    # On the CPU, whatever else there is: a division of another device may round otherwise, and
    # the same source would come to other hashes.
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        made = _qwix().quantize(jnp.asarray(kernel), jnp.int8, channelwise_axes=(1,))
    return Rounded(values=np.asarray(made.qvalue), scale=np.asarray(made.scale))


def product(x: Float[Array, "token n_in"], kernel: Rounded) -> Float[Array, "token n_out"]:
    """x @ kernel, in x's type."""
    # Columns of the result are scaled, not the kernel: fewer numbers, at every step anew.
    return (x @ kernel.values.astype(x.dtype)) * kernel.scale


def joined(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters by path as a model takes them: a kernel and its scales are one value."""
    found = dict(flat)
    for path in [path for path in flat if path.endswith(SCALE)]:
        kernel = path.removesuffix(SCALE)
        found[kernel] = Rounded(values=flat[kernel], scale=found.pop(path))
    return found


def parts(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters by path as they are stored: the inverse of `joined`."""
    found: dict[str, Any] = {}
    for path, value in flat.items():
        if isinstance(value, Rounded):
            found |= {path: value.values, path + SCALE: value.scale}
        else:
            found[path] = value
    return found


def shapes(
    of: Mapping[str, tuple[int, ...]], dtype: DTypeLike, eight: bool
) -> dict[str, tuple[tuple[int, ...], Any]]:
    """Shape and type of every stored array, by path.

    Args:
      of: shapes of the parameters, as `weights.param_shapes` gives them.
      dtype: of all that is not rounded.
      eight: whether block kernels are rounded.
    """
    found: dict[str, tuple[tuple[int, ...], Any]] = {}
    for path, shape in of.items():
        found[path] = shape, jnp.dtype(dtype)
        if eight and is_rounded(path):
            found[path] = shape, jnp.dtype(jnp.int8)
            found[path + SCALE] = (1, shape[1]), jnp.dtype(dtype)
    return found


def _qwix() -> Any:
    try:
        import qwix
    except ImportError:
        raise UserError(
            "rounding kernels to eight bits needs qwix: pip install 'jaxsteer[int8]'"
        ) from None
    return qwix
