"""Published rates of the accelerators: for model FLOPs utilisation, and for projections of pods that are not here."""

from typing import NamedTuple

import jax

GIB = 2**30


class Chip(NamedTuple):
  """What a data sheet says of one chip."""

  kind: str  # jax's device_kind
  flops: float  # dense bfloat16 FLOP/s
  hbm: float  # bytes
  bandwidth: float  # of HBM, bytes/s
  links: int  # to neighbours
  link: float  # bytes/s of one link in one direction
  clock: float  # Hz of a TPU's matrix units
  torus: int = 3  # dimensions of a TPU's pod; 0: switched


# Sources: the vendors' data sheets (links: total interchip bandwidth / links). The clock is the peak over what
# the matrix units do in a cycle.
CHIPS = {
  "v4": Chip("TPU v4", 275e12, 32 * GIB, 1228e9, 6, 50e9, 1.05e9),
  "v5e": Chip("TPU v5 lite", 197e12, 16 * GIB, 819e9, 4, 50e9, 1.5e9, torus=2),
  "v5p": Chip("TPU v5", 459e12, 95 * GIB, 2765e9, 6, 100e9, 1.75e9),
  "v6e": Chip("TPU v6 lite", 918e12, 32 * GIB, 1638e9, 4, 112e9, 1.75e9, torus=2),
  "tpu7x": Chip("TPU7x", 2307e12, 192 * GIB, 7380e9, 6, 200e9, 2.2e9),
  "a100": Chip("NVIDIA A100-SXM4-80GB", 312e12, 80 * GIB, 2039e9, 12, 25e9, 1.41e9, torus=0),
  "h100": Chip("NVIDIA H100 80GB HBM3", 989e12, 80 * GIB, 3350e9, 18, 25e9, 1.83e9, torus=0),
  "h200": Chip("NVIDIA H200", 989e12, 141e9, 4800e9, 18, 25e9, 1.83e9, torus=0),
}

# Of one jax device, by its device_kind. A v4 or v5p chip is one device where it runs (megacore); a tpu7x chip is two.
_PEAK = {chip.kind: chip.flops / (2 if name == "tpu7x" else 1) for name, chip in CHIPS.items()}
_PEAK["TPU v5p"] = _PEAK["TPU v5"]


def peak_flops() -> float | None:
  """Peak FLOP/s of all devices of the current backend together; None where no peak is known (CPUs)."""
  devices = jax.devices()
  peak = _PEAK.get(devices[0].device_kind)
  return None if peak is None else peak * len(devices)
