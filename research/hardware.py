"""Published peak rates of the accelerators, for model FLOPs utilisation."""

import jax

# Dense bfloat16 FLOP/s of one jax device, by jax's device_kind. A v4 or v5p chip is one
# device (megacore); a tpu7x chip is two. Sources: the vendors' data sheets.
_PEAK = {
  "TPU v4": 275e12,
  "TPU v5 lite": 197e12,
  "TPU v5": 459e12,
  "TPU v5p": 459e12,
  "TPU v6 lite": 918e12,
  "TPU7x": 2307e12 / 2,
  "NVIDIA A100-SXM4-80GB": 312e12,
  "NVIDIA H100 80GB HBM3": 989e12,
  "NVIDIA H200": 989e12,
}


def peak_flops() -> float | None:
  """Peak FLOP/s of all devices of the current backend together; None where no peak is known (CPUs)."""
  devices = jax.devices()
  peak = _PEAK.get(devices[0].device_kind)
  return None if peak is None else peak * len(devices)
