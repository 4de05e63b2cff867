"""Model FLOPs of any function, from its trace: for models whose count has no short formula."""

from collections.abc import Callable
import math
from typing import Any

import jax


def products(f: Callable, *args: Any) -> float:
  """FLOPs of the matrix products and convolutions of `f(*args)`; args may be abstract, and nothing is compiled.

  The body of a scan counts as often as it runs, one of a while loop once, the dearest branch of a cond.
  """
  return _of(jax.make_jaxpr(f)(*args).jaxpr)


def _of(jaxpr) -> float:
  return sum(map(_equation, jaxpr.eqns), 0.0)


def _equation(eqn) -> float:
  name, params = eqn.primitive.name, eqn.params
  if name == "dot_general":
    (contracted, _), _ = params["dimension_numbers"]
    shape = eqn.invars[0].aval.shape
    return 2.0 * eqn.outvars[0].aval.size * math.prod(shape[i] for i in contracted)
  if name == "conv_general_dilated":
    kernel, out = eqn.invars[1].aval, params["dimension_numbers"].rhs_spec[0]
    return 2.0 * eqn.outvars[0].aval.size * kernel.size / kernel.shape[out]
  if name == "cond":
    return max(_of(branch.jaxpr) for branch in params["branches"])
  inner = [getattr(x, "jaxpr", x) for x in params.values() if hasattr(getattr(x, "jaxpr", x), "eqns")]
  return params.get("length", 1) * sum(map(_of, inner), 0.0)
