"""Settings of the process that make jax faster on CPUs."""

import ctypes
import glob
import os
import sys

# NVIDIA, TPU (v2 to v4, later ones), AMD
_ACCELERATORS = ("/dev/nvidia[0-9]*", "/dev/accel[0-9]*", "/dev/vfio/[0-9]*", "/dev/kfd")

# glibc's malloc.h
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8


def tune() -> None:
  """Lets glibc keep the memory that a step frees for the next one, where the step will run on CPUs.

  XLA allocates a step's buffers anew each time. By default glibc gives blocks of that
  size back to the kernel, which zeroes every page again at the next step: 700 MB a step
  of a 5M-parameter model, a quarter of its time. The price is that the process stays at
  its largest size, of up to three steps' buffers.

  Call it before jax starts its backend: a thread stays with the arena that it
  allocated from first. Does nothing where there is an accelerator (unless
  JAX_PLATFORMS=cpu), without glibc, or if the environment has settings for its malloc.
  """
  if not _runs_on_cpu() or "GLIBC_TUNABLES" in os.environ or any(name.startswith("MALLOC_") for name in os.environ):
    return
  mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
  if mallopt is not None:  # not musl
    mallopt(_M_MMAP_MAX, 0)
    mallopt(_M_TRIM_THRESHOLD, -1)  # never
    mallopt(_M_ARENA_MAX, 1)  # the arenas of further threads hold 64 MB at most, and are unmapped when empty


def _runs_on_cpu() -> bool:
  platforms = os.environ.get("JAX_PLATFORMS", "")
  return platforms.split(",")[0] == "cpu" if platforms else not any(map(glob.glob, _ACCELERATORS))
