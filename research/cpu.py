"""CPU."""
import ctypes, os

def tune() -> None:
  libc = ctypes.CDLL(None)
  for kv in os.environ.get("MO", "").split(","):
    if kv:
      k, v = kv.split("="); print(k, v, libc.mallopt(ctypes.c_int(int(k)), ctypes.c_int(int(v))))
