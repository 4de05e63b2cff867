"""Registers and spills of the Triton kernels in a GPU program, by the assembler that comes with CUDA's compiler."""

import contextlib
import importlib.util
import os
import pathlib
import re
import subprocess
import tempfile

_FOLDER: list[pathlib.Path] = []  # where XLA dumps PTX


@contextlib.contextmanager
def dumped():
  """Has XLA's GPU compiler keep its PTX until the end; before anything starts jax's backend."""
  with tempfile.TemporaryDirectory() as folder:
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_dump_to={folder} --xla_dump_hlo_pass_re=^$"
    _FOLDER.append(pathlib.Path(folder))
    yield
    _FOLDER.clear()


def registers(kernels: list[str]) -> dict[str, tuple[int, int]]:
  """{kernel: (registers a thread, bytes spilled a thread)}, the most, of those of `kernels` whose PTX was dumped."""
  found = {}
  for path in sorted(p for folder in _FOLDER for p in folder.glob("*.ptx")):
    text = path.read_text()
    if not set(re.findall(r"\.entry (\w+)", text)) & set(kernels):
      continue
    target = re.search(r"\.target (\w+)", text)[1]
    command = [assembler(), "-v", f"-arch={target}", str(path), "-o", "/dev/null"]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    for name, about in re.findall(r"entry function '(\w+)'(.*?)(?=Compiling entry|\Z)", told, re.DOTALL):
      spilled = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", about)
      if name in kernels:
        now = int(re.search(r"Used (\d+) registers", about)[1]), int(spilled[1]) + int(spilled[2])
        # layers of other shapes have kernels of the same name
        found[name] = tuple(map(max, now, found.get(name, now)))
  return found


def assembler() -> str:
  """The path of ptxas in the wheel that extra `aot-cuda` installs."""
  [root] = importlib.util.find_spec("nvidia.cuda_nvcc").submodule_search_locations
  return str(pathlib.Path(root, "bin", "ptxas"))
