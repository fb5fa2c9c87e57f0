"""The one array type of public signatures: on the device (jax) or on the host (numpy)."""

from __future__ import annotations

import jax
import numpy as np

AnyArray = jax.Array | np.ndarray
