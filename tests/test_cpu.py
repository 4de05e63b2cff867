"""What tuning does to malloc, seen in the page faults of a process that frees and allocates large blocks."""

import os
import subprocess
import sys

import pytest

BLOCKS, SIZE = 10, 64 * 2**20
PROGRAM = f"""
import ctypes, resource, threading
from research import cpu
cpu.tune()
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
libc.memset.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]
def block():
  p = libc.malloc({SIZE})
  libc.memset(p, 1, {SIZE})
  libc.free(p)
def blocks():  # in a thread, as jax's
  block()
  before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
  for _ in range({BLOCKS}): block()
  print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
thread = threading.Thread(target=blocks)
thread.start()
thread.join()
"""


def touched_anew(**env) -> float:
  """The fraction of the pages that the kernel had to provide again."""
  clean = {k: v for k, v in os.environ.items() if k != "GLIBC_TUNABLES" and not k.startswith("MALLOC_")}
  out = subprocess.run([sys.executable, "-c", PROGRAM], env=clean | env, check=True, capture_output=True, text=True)
  return int(out.stdout) * os.sysconf("SC_PAGESIZE") / (BLOCKS * SIZE)


@pytest.mark.skipif(not (os.confstr("CS_GNU_LIBC_VERSION") or "").startswith("glibc"), reason="glibc's malloc")
def test_freed_memory_stays_for_the_next_step():
  assert touched_anew(JAX_PLATFORMS="cpu") < 0.01


@pytest.mark.parametrize("env", [{"JAX_PLATFORMS": "tpu,cpu"}, {"JAX_PLATFORMS": "cpu", "MALLOC_TRIM_THRESHOLD_": "0"}])
def test_malloc_is_left_alone_for_accelerators_and_where_the_user_set_it(env):
  assert touched_anew(**env) > 0.5
