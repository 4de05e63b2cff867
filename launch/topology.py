"""Pods and nodes that are not here, as jax describes them to a compiler: `v5p:8x8x8`, `h100:8`.

With the libtpu wheel (extra `aot`) a CPU machine has the real TPU compiler, with jax's
CUDA plugin (extra `aot-cuda`) the GPU one. Neither needs the hardware.
"""

import dataclasses
import importlib.util
import math
import os

import jax
from jax.experimental import topologies
import numpy as np

from research.errors import UserError, check
from research.hardware import CHIPS, Chip
from research.mesh import AXES, MeshConfig, axis_sizes

# What can be rented, smallest first. Any other that the compiler knows can be named too.
_FLAT = ["1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16"]
_CUBES = ["2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16", "8x16x16", "16x16x16"]
_NODES = ["1", "2", "4", "8", "2x8", "4x8", "8x8", "16x8", "32x8", "64x8"]
SIZES = {name: {2: _FLAT, 3: _CUBES, 0: _NODES}[chip.torus] for name, chip in CHIPS.items() if name != "a100"}
GPUS = tuple(name for name in SIZES if CHIPS[name].torus == 0)

# What the compiler leaves a program of a chip's HBM, measured: the limit that its message names.
_USABLE = {"v4": 2 * 15.25, "v5e": 15.75, "v5p": 95.74, "v6e": 31.25, "tpu7x": 2 * 94.75}


@dataclasses.dataclass(frozen=True)
class Topology:
  """A pod slice, or nodes of GPUs."""

  generation: str
  size: str  # "8x8x8"; of GPUs "8" in one node, or "4x8": nodes x GPUs

  @property
  def name(self) -> str:
    return f"{self.generation}:{self.size}"

  @property
  def dims(self) -> tuple[int, ...]:
    return tuple(int(n) for n in self.size.split("x"))

  @property
  def chips(self) -> int:
    return math.prod(self.dims)

  @property
  def chip(self) -> Chip:
    return CHIPS[self.generation]

  @property
  def devices_per_chip(self) -> int:
    """As topologies describe them: a v4 chip is two devices there, though one where it runs."""
    return 2 if self.generation in ("v4", "tpu7x") else 1

  @property
  def devices(self) -> int:
    return self.chips * self.devices_per_chip

  @property
  def usable(self) -> float:
    """Bytes of HBM that a program can have on one device."""
    if self.generation in _USABLE:
      return _USABLE[self.generation] * 2**30 / self.devices_per_chip
    return 0.92 * self.chip.hbm  # of a GPU: what is left beside the driver, the libraries and fragments


def parse(name: str) -> Topology:
  """`generation:size`. Raises UserError for what does not exist, without starting a compiler."""
  generation, colon, size = name.partition(":")
  known = ", ".join(SIZES)
  check(generation in SIZES, "topology", name, f"no such generation; choose from {known}, as in v5e:4x4")
  of = CHIPS[generation].torus
  example = SIZES[generation][3]
  dims = size.split("x")
  ok = (
    bool(colon) and all(d.isdigit() and int(d) > 0 for d in dims) and (len(dims) == of or (of == 0 and len(dims) < 3))
  )
  shape = {0: "GPUs, or nodes x GPUs", 2: "two dimensions", 3: "three dimensions"}[of]
  check(ok, "topology", name, f"{generation} has {shape}, as in {generation}:{example}")
  topology = Topology(generation, size)
  if of == 0:
    check(topology.dims[-1] <= 8, "topology", name, f"a node has at most 8 GPUs; write nodes x GPUs, {generation}:2x8")
  if of == 2:
    fix = f"choose from {', '.join(SIZES[generation])}"
    check(size in SIZES[generation], "topology", name, f"{generation} has no such slice; {fix}")
  return topology


def missing(topology: Topology) -> str | None:
  """What to install to compile for `topology`, in a line; None if it is here."""
  if topology.generation in GPUS:
    here = importlib.util.find_spec("jax_cuda12_plugin") and importlib.util.find_spec("nvidia.cuda_nvcc")
    return None if here else "no GPU compiler here; pip install -e '.[aot-cuda]'"
  return None if importlib.util.find_spec("libtpu") else "no TPU compiler here; pip install -e '.[aot]'"


def environment(flags: str = "") -> None:
  """Lets libtpu compile where there is no TPU; before anything starts jax's backend."""
  jax.config.update("jax_platforms", "cpu")
  jax.config.update("jax_enable_compilation_cache", False)  # it does not work for programs of other machines
  values = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_STDERR_LOG_LEVEL": "3",
    "TPU_MIN_LOG_LEVEL": "3",
    "TF_CPP_MIN_LOG_LEVEL": "3",
  }
  os.environ.update(values)
  if flags:
    os.environ["LIBTPU_INIT_ARGS"] = flags


def devices(topology: Topology) -> list:
  """The devices of `topology`, to compile for. Raises UserError if there is no such thing, or no compiler."""
  lacking = missing(topology)
  check(lacking is None, "topology", topology.name, lacking)
  try:
    if topology.generation in GPUS:
      return _gpus(topology)
    # a host has four chips but for the smallest slice, which is one
    bounds = {"chips_per_host_bounds": [1, 1, 1]} if topology.chips == 1 else {}
    return topologies.get_topology_desc(platform="tpu", topology_name=topology.name, **bounds).devices
  except (RuntimeError, ValueError, NotImplementedError) as e:
    near = min(SIZES[topology.generation], key=lambda s: abs(math.prod(map(int, s.split("x"))) - topology.chips))
    reason = " ".join(str(e).split())[:160]
    fix = f"the compiler knows no such slice ({reason}); try {topology.generation}:{near}"
    raise UserError("topology", topology.name, fix) from None


def make_mesh(cfg: MeshConfig, topology: Topology) -> jax.sharding.Mesh:
  """The mesh of a config over the devices of `topology`. Raises UserError where they do not match."""
  found = devices(topology)
  sizes = axis_sizes(cfg, len(found))
  try:
    return jax.make_mesh(tuple(sizes.values()), AXES, devices=found)
  except (NotImplementedError, AssertionError, ValueError):
    # jax places no mesh on a topology with two devices a chip
    shape = np.reshape(found, tuple(sizes.values()))
    return jax.sharding.Mesh(shape, AXES, axis_types=(jax.sharding.AxisType.Explicit,) * len(AXES))


def axis_bandwidth(mesh: jax.sharding.Mesh, topology: Topology, axes: tuple[str, ...]) -> float:
  """Bytes/s that a device can send to the others along `axes` of the mesh, by all links that lead there.

  A dimension of a torus that an axis spans offers a link each way where it closes to a
  ring (on v5e and v6e of 16, else of multiples of 4), and one of the two where it does not.
  """
  chip = topology.chip
  if topology.chip.torus == 0:
    nodes = [d.id // topology.dims[-1] for d in _group(mesh, axes)]
    inside = chip.links * chip.link
    # each GPU has a port of 400 Gbit/s, and the members in one node use all of theirs
    return inside if len(set(nodes)) == 1 else min(inside, nodes.count(nodes[0]) * 50e9)
  coordinates = np.array([d.coords for d in _group(mesh, axes)])
  spans = [len(set(column)) for column in coordinates.T.tolist()]
  directions = 0
  for span, size in zip(spans, topology.dims, strict=False):
    ring = span == size and (size == 16 if chip.torus == 2 else size % 4 == 0)
    directions += 0 if span == 1 else 2 if ring else 1
  # members of one chip only: they meet in its memory
  return directions * chip.link / topology.devices_per_chip if directions else chip.bandwidth


def _group(mesh: jax.sharding.Mesh, axes: tuple[str, ...]) -> list:
  """The devices that the first one shares `axes` with."""
  index = tuple(slice(None) if axis in axes else 0 for axis in mesh.axis_names)
  return list(np.ravel(mesh.devices[index]))


def _gpus(topology: Topology) -> list:
  nodes = topology.dims[0] if len(topology.dims) == 2 else 1
  name = topology.chip.kind
  # Facts of the chip that XLA's GPU compiler asks for, in the text form of its GpuTargetConfigProto.
  memory = {"h100": 84_942_979_072, "h200": 150_754_820_096}[topology.generation]
  config = f"""
    gpu_device_info {{
      threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
      shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448 shared_memory_per_core: 233472
      core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98 l2_cache_size: 52428800
      block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
      thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
      registers_per_core_limit: 65536 registers_per_block_limit: 65536
      memory_bandwidth: {int(topology.chip.bandwidth)} device_memory_size: {memory}
      cuda_compute_capability {{ major: 9 minor: 0 feature_extension: ACCELERATED_FEATURES }}
      driver_version: "13.0.0" runtime_version: "12.9.0" compile_time_toolkit_version: "12.9.0"
      device_vendor: "NVIDIA Corporation" name: "{name}"
    }}
    platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 10 patch: 0 }} device_description_str: "{name}" """
  shape = f"1x{nodes}x{topology.dims[-1]}"  # partitions x hosts x GPUs of each
  return topologies.get_topology_desc(platform="cuda", topology_name="", target_config=config, topology=shape).devices
