"""Plans for pods that are not here, as a user asks for them; compiled by the real compiler where it is installed."""

import importlib.util
import json
import os
import subprocess
import sys

import pytest

from launch import plan, planner, topology
from research.errors import UserError
from research.hardware import CHIPS
from research.mesh import MeshConfig

MAIN = "experiments/kvshift/configs/main.py"
NO_LIBTPU = importlib.util.find_spec("libtpu") is None
with_libtpu = pytest.mark.skipif(NO_LIBTPU, reason="needs libtpu, the compiler for TPUs: pip install -e .[aot]")
# small enough to compile in seconds
SMALL = ["--config.only=kvshift", "--config.seeds=0", "--config.batch=16", "--config.model.precision=bfloat16"]


def run(*arguments, status=0, env=None):
  command = [sys.executable, "-m", "launch.plan", *arguments]
  done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=500)
  assert done.returncode == status, done.stderr[-2000:]
  return done


def planned(*arguments):
  return json.loads(run(f"--config={MAIN}", *SMALL, "--json", *arguments).stdout)


WRONG = [
  ("topology=v9:2x2", "no such generation", [f"--config={MAIN}", "--topology=v9:2x2"]),
  ("topology=v5e:3x3", "choose from 1x1, 2x2", [f"--config={MAIN}", "--topology=v5e:3x3"]),
  ("topology=v5p:8x8", "three dimensions", [f"--config={MAIN}", "--topology=v5p:8x8"]),
  ("topology=v5e", "two dimensions", [f"--config={MAIN}", "--topology=v5e"]),
  ("topology=v5e:0x2", "two dimensions", [f"--config={MAIN}", "--topology=v5e:0x2"]),
  ("topology=h100:9", "at most 8", [f"--config={MAIN}", "--topology=h100:9"]),
  ("find=v5", "choose from v4, v5e", [f"--config={MAIN}", "--find=v5"]),
  ("command line=(empty)", "one of --topology", [f"--config={MAIN}"]),
  ("command line=topology find", "one of", [f"--config={MAIN}", "--topology=v5e:2x2", "--find=v5e"]),
  ("config=''", "name a config", ["--topology=v5e:2x2"]),
  ("batsch", "did you mean batch?", [f"--config={MAIN}", "--topology=v5e:2x2", "--config.batsch=3"]),
  ("config", "takes every config as it is", [f"--config={MAIN}", "--all"]),
  ("what=decode", "--all plans training steps", ["--all", "--what=decode"]),
  ("again", "goes with --all", [f"--config={MAIN}", "--topology=v5e:2x2", "--again"]),
]


@pytest.mark.parametrize(("field", "fix", "arguments"), WRONG, ids=[w[0] for w in WRONG])
def test_a_mistake_is_one_line(field, fix, arguments, monkeypatch):
  monkeypatch.setattr(sys, "argv", ["plan", *arguments])
  monkeypatch.setattr(topology, "environment", lambda: None)  # this process has its backend already
  with pytest.raises(UserError) as told:
    plan.main()
  assert str(told.value).startswith(field)
  assert fix in str(told.value)
  assert "\n" not in str(told.value)


@pytest.mark.skipif(not NO_LIBTPU, reason="libtpu is installed")
def test_without_a_compiler_it_says_what_to_install():
  done = run(f"--config={MAIN}", "--topology=v5e:2x2", status=2)
  assert done.stderr.strip() == "error: topology=v5e:2x2: no TPU compiler here; pip install -e '.[aot]'"


@pytest.mark.skipif(importlib.util.find_spec("jax_cuda12_plugin") is not None, reason="the GPU compiler is installed")
def test_without_a_gpu_compiler_it_says_what_to_install():
  done = run(f"--config={MAIN}", "--topology=h100:8", status=2)
  assert done.stderr.strip() == "error: topology=h100:8: no GPU compiler here; pip install -e '.[aot-cuda]'"


@pytest.mark.parametrize("name", ["v4:4x4x4", "v5e:16x16", "v5p:8x8x8", "v6e:8x8", "tpu7x:4x4x4", "h100:4x8", "h200:8"])
def test_a_topology_is_its_chips(name):
  found = topology.parse(name)
  assert found.name == name
  assert (
    found.chips == {"v4": 64, "v5e": 256, "v5p": 512, "v6e": 64, "tpu7x": 64, "h100": 32, "h200": 8}[found.generation]
  )
  assert 0.9 * found.chip.hbm / found.devices_per_chip < found.usable < 1.01 * found.chip.hbm / found.devices_per_chip


def test_every_standard_slice_is_well_formed_and_larger_than_the_last():
  for generation, sizes in topology.SIZES.items():
    chips = [topology.parse(f"{generation}:{size}").chips for size in sizes]
    assert chips == sorted(set(chips)), generation
    assert CHIPS[generation].flops > 0


def test_a_plan_that_does_not_fit_tells_the_largest_buffers_and_the_change_that_helps():
  memory = planner.Memory(
    limit=16e9, needed=30e9, parameters=1e9, optimizer=2e9, batch=0, activations=25e9, temporaries=2e9, compiled=False
  )
  found = planner.Plan(
    "c.py",
    "a",
    "train",
    "v5e:2x2",
    4,
    4,
    {"replica": 1, "data": 4, "model": 1},
    1024,
    1e15,
    memory,
    [("activations scan/input bf16[28,8,128]", 20e9)],
    [("--config.accumulate=2", False, 17e9), ("--config.accumulate=4", True, 12e9)],
    2.0,
  )
  told = plan.describe(found)
  assert "DOES NOT FIT: 27.94 of 14.90 GiB" in told
  assert "activations scan/input" in told
  assert told.index("accumulate=2") < told.index("accumulate=4")


def test_the_page_of_pods_is_its_record_and_has_every_config():
  entries = json.loads((plan.ROOT / "docs/pods.json").read_text())
  written = (plan.ROOT / "docs/pods.md").read_text()
  rows = plan.page(entries).split("\n\n")[-1]
  assert written.endswith(rows)
  wanted = [(spec, name) for spec, _ in plan.specs() for name in plan.pods_of(spec)]
  assert [(e["config"], e["topology"]) for e in entries] == wanted
  for entry in entries:
    assert "refused" in entry or entry["fits"] == (entry["memory"]["needed"] <= entry["memory"]["limit"])


def test_only_what_the_record_lacks_is_planned():
  found = [(spec, cfg) for spec, cfg in plan.specs() if spec.endswith(("kvshift/configs/main.py", "paper.py:19b"))]
  empty = plan.lacking(found, {})
  assert len(empty) == 1 + len(plan.pods_of(found[1][0])) > 2
  known = {(begins["config"], name): begins for _, name, begins in empty}
  assert plan.lacking(found, known) == []
  known[found[0][0], "v5e:2x2"] |= {"settings": "other"}
  del known[found[1][0], "v5p:8x8x8"]
  lacks = [(begins["config"], name) for _, name, begins in plan.lacking(found, known)]
  assert lacks == [(found[0][0], "v5e:2x2"), (found[1][0], "v5p:8x8x8")]


@with_libtpu
def test_a_training_step_on_four_chips_is_what_it_must_be():
  [found] = planned("--topology=v5e:2x2")
  assert found["fits"]
  assert found["projection"]
  memory, counts = found["memory"], found["counts"]
  parts = ("parameters", "optimizer", "batch", "activations", "temporaries")
  assert sum(memory[p] for p in parts) == pytest.approx(memory["needed"])
  # 492,192 parameters in float32, cut in four (norms and mixing coefficients are whole); Adam has two more of each
  assert memory["parameters"] == pytest.approx(4 * 492_192 / 4, rel=0.02)
  assert memory["optimizer"] == pytest.approx(2 * memory["parameters"], rel=0.01)
  # no recomputation: the model's own products, and what attention's blocks do above the diagonal
  assert 1.0 < 4 * counts["flops"] / found["model_flops"] < 1.5
  kinds = {(c["kind"], tuple(c["axes"])): c for c in counts["collectives"]}
  gathered = kinds["all-gather", ("data",)]["sent"]
  # each weight is gathered in bfloat16 for the forward and the backward pass: three quarters of it come from others,
  # so a device sends its own quarter three times
  matrices = 2 * 492_192 * 3 / 4
  assert matrices * 0.9 < gathered < 2.2 * matrices
  assert found["step_seconds"] >= counts["flops"] / CHIPS["v5e"].flops
  assert found["tokens_per_second"] == pytest.approx(16 * 256 / found["step_seconds"])
  assert not counts["uncounted"]


@pytest.mark.slow
@with_libtpu
def test_what_does_not_fit_is_made_to_fit():
  arguments = ["--topology=v5e:2x2", "--config.batch=8192", "--config.model.layers=8", "--config.model.remat=none"]
  [found] = planned(*arguments)
  assert not found["fits"]
  assert found["memory"]["needed"] > found["memory"]["limit"]
  assert found["largest"][0][0].startswith("activations")
  overrides, fits, needed = found["fixes"][-1]
  assert fits
  assert needed < found["memory"]["limit"]
  [fixed] = planned(*arguments, *overrides.split())
  assert fixed["fits"]


@pytest.mark.slow
@with_libtpu
def test_the_smallest_slice_that_fits_is_found():
  [found] = planned("--find=v5e", "--config.batch=4096", "--config.model.layers=8")
  assert found["fits"]
  sizes = topology.SIZES["v5e"]
  before = sizes[sizes.index(found["topology"].split(":")[1]) - 1]
  [smaller] = planned(f"--topology=v5e:{before}", "--config.batch=4096", "--config.model.layers=8")
  assert not smaller["fits"]


@pytest.mark.slow
@with_libtpu
@pytest.mark.parametrize("name", ["v4:2x2x1", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1"])
def test_every_generation_counts_the_same_products(name):
  [here] = planned("--topology=v5e:2x2")
  [there] = planned(f"--topology={name}")
  whole = lambda found: found["counts"]["flops"] * found["devices"]
  assert whole(there) == pytest.approx(whole(here), rel=0.02)


@pytest.mark.slow
@with_libtpu
def test_one_token_reads_the_weights_and_the_caches():
  [found] = planned("--topology=v5e:2x2", "--what=decode")
  memory = found["memory"]
  assert found["counts"]["bytes"] > memory["parameters"]
  # keys and values of 2 layers, 16 rows of 256 tokens, 4 heads of 32, in bfloat16, cut in four
  assert memory["batch"] == pytest.approx(2 * 2 * 16 * 256 * 4 * 32 * 2 / 4, rel=0.1)


HAND = """
import json, sys
from launch import counts, topology
topology.environment()
import jax
from jax import numpy as jnp
pod = topology.parse("v5e:2x2")
from research.mesh import MeshConfig
mesh = topology.make_mesh(MeshConfig(1, 2, 2), pod)
put = lambda shape, *spec, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(
  shape, dtype, sharding=jax.NamedSharding(mesh, jax.P(*spec)))
def count(f, *args, **kw):
  with jax.set_mesh(mesh):
    c = counts.count(jax.jit(f, **kw).lower(*args).compile().as_text(), dict(mesh.shape))
  return {"flops": c.flops, "bytes": c.bytes, "uncounted": c.uncounted,
          "collectives": [[x.kind, list(x.axes), x.times, x.sent] for x in c.collectives]}
n = 2048
out = {}
out["product"] = count(lambda a, b: a @ b, put((n, n), None, None), put((n, n), None, None))
out["batch"] = count(lambda a, b: jnp.einsum("bij,bjk->bik", a, b), put((8, 512, 512)), put((8, 512, 512)))
out["pass"] = count(lambda x: 2 * x + 1, put((64, n, n)))
def scan(x, w):
  return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0]
out["scan"] = count(scan, put((n, n)), put((12, n, n)))
def gathers(x, w):
  return jax.lax.scan(lambda x, w: (jnp.tanh(x @ jax.reshard(w, jax.P(None, None))), None), x, w)[0]
out["gathers"] = count(gathers, put((n, n), "data", None), put((12, n, n), None, "data", None))
out["reduce"] = count(lambda a, b: jnp.einsum("ab,bc->ac", a, b, out_sharding=jax.P(None, None)),
                      put((n, n), None, "model"), put((n, n), "model", None))
out["grad"] = count(jax.grad(lambda w, x: jnp.sum((x @ w).astype(jnp.float32) ** 2)), put((n, n)), put((n, n)))
print(json.dumps(out))
"""


@with_libtpu
def test_counts_of_small_tpu_programs_are_those_by_hand():
  env = os.environ | {"JAX_PLATFORMS": "cpu"}
  done = subprocess.run([sys.executable, "-c", HAND], env=env, capture_output=True, text=True, timeout=300)
  assert done.returncode == 0, done.stderr[-3000:]
  found = json.loads(done.stdout)
  n = 2048
  assert not [c["uncounted"] for c in found.values() if c["uncounted"]]
  assert found["product"]["flops"] == 2 * n**3
  assert found["product"]["bytes"] == pytest.approx(2 * 3 * n**2, rel=0.01)
  assert found["batch"]["flops"] == 2 * 8 * 512**3
  assert found["pass"]["bytes"] == pytest.approx(2 * 2 * 64 * n**2, rel=0.01)
  assert found["scan"]["flops"] == 12 * 2 * n**3
  # each layer is read once; activations of this size may stay in the chip
  assert 2 * 12 * n**2 <= found["scan"]["bytes"] <= 1.1 * 2 * (12 + 3 * 12 + 2) * n**2
  [gather] = [c for c in found["gathers"]["collectives"] if c[0] in ("all-gather", "collective-permute")]
  assert gather[1:3] == [["data"], 12]
  assert gather[3] == 12 * 2 * n**2 / 2  # half of a layer to the one other, twelve times
  assert found["gathers"]["flops"] == 12 * 2 * n**3 / 2
  [[kind, axes, times, sent]] = found["reduce"]["collectives"]
  assert (kind, axes, times) == ("all-reduce", ["model"], 1)
  assert sent in (2 * n**2, 4 * n**2)  # 2 (n - 1) / n of bfloat16, or of float32
  assert found["grad"]["flops"] == 2 * 2 * n**3


def test_the_bandwidth_of_an_axis_is_that_of_the_links_along_it():
  class Device:
    def __init__(self, i, coords):
      self.id, self.coords = i, coords

  pod = topology.parse("v5p:4x4x4")
  grid = [(x, y, z) for x in range(4) for y in range(4) for z in range(4)]
  import numpy as np

  devices = np.array([Device(i, c) for i, c in enumerate(grid)], dtype=object).reshape(1, 16, 4)
  mesh = type("Mesh", (), {"devices": devices, "axis_names": ("replica", "data", "model")})
  link = CHIPS["v5p"].link
  assert topology.axis_bandwidth(mesh, pod, ("model",)) == 2 * link  # a ring of four
  assert topology.axis_bandwidth(mesh, pod, ("data",)) == 4 * link  # two dimensions, both rings
  assert topology.axis_bandwidth(mesh, pod, ("data", "model")) == 6 * link
  assert MeshConfig().model == 1
