"""What is counted of a compiled program, against counts by hand. CPU programs here; TPU ones in test_plan.py."""

import jax
from jax import numpy as jnp
import numpy as np
import pytest

from launch import hlo
from launch.counts import Collective, count
from research.mesh import AXES
from tests import small


def compiled(f, *args, **kwargs):
  return jax.jit(f, **kwargs).lower(*args).compile().as_text()


def shapes(*dims, dtype=jnp.float32):
  return jax.ShapeDtypeStruct(dims, dtype)


ONE = dict.fromkeys(AXES, 1)


def test_a_matrix_product():
  counts = count(compiled(lambda a, b: a @ b, shapes(64, 256), shapes(256, 32)), ONE)
  assert counts.flops == 2 * 64 * 256 * 32
  assert counts.bytes == 4 * (64 * 256 + 256 * 32 + 64 * 32)
  assert not counts.uncounted


def test_a_batch_of_products_counts_each_pair_once():
  text = compiled(lambda a, b: jnp.einsum("bhtd,bhsd->bhts", a, b), shapes(2, 3, 16, 8), shapes(2, 3, 24, 8))
  assert count(text, ONE).flops == 2 * 2 * 3 * 16 * 24 * 8


@pytest.mark.parametrize("trips", [1, 7])
def test_a_loop_counts_as_often_as_it_runs(trips):
  def f(x, w):
    return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0]

  counts = count(compiled(f, shapes(16, 32), shapes(trips, 32, 32)), ONE)
  assert counts.flops == trips * 2 * 16 * 32 * 32
  assert not counts.uncounted


def test_loops_within_loops():
  def inner(x, w):
    return jax.lax.fori_loop(0, 5, lambda i, x: x @ w, x), None

  f = lambda x, w: jax.lax.scan(inner, x, w)[0]
  assert count(compiled(f, shapes(16, 32), shapes(3, 32, 32)), ONE).flops == 15 * 2 * 16 * 32 * 32


def test_a_loop_that_the_data_ends_is_told_and_counted_once():
  f = lambda x, w: jax.lax.while_loop(lambda x: x[0, 0] < 1, lambda x: x @ w, x)
  counts = count(compiled(f, shapes(8, 8), shapes(8, 8)), ONE)
  assert counts.flops == 2 * 8 * 8 * 8
  assert "counted once" in counts.uncounted[0]


def test_a_pass_over_an_array_reads_and_writes_it():
  assert count(compiled(lambda x: 2 * x + 1, shapes(1000, 128)), ONE).bytes == 2 * 4 * 128_000


def test_a_layer_of_a_stack_is_charged_for_the_layer():
  f = lambda w, i: jax.lax.dynamic_index_in_dim(w, i, keepdims=False) * 2
  counts = count(compiled(f, shapes(50, 64, 64), shapes(dtype=jnp.int32)), ONE)
  assert counts.bytes == pytest.approx(2 * 4 * 64 * 64, rel=0.01)


def test_an_update_in_place_is_charged_for_the_update():
  f = lambda w, x, i: jax.lax.dynamic_update_index_in_dim(w, x, i, 0)
  text = compiled(f, shapes(50, 64, 64), shapes(64, 64), shapes(dtype=jnp.int32), donate_argnums=0)
  assert count(text, ONE).bytes == pytest.approx(2 * 4 * 64 * 64, rel=0.01)


def test_each_instruction_takes_the_longer_of_its_work():
  text = compiled(lambda a, b: jnp.tanh(a @ b), shapes(64, 256), shapes(256, 32))
  slow_memory = count(text, ONE, peak_flops=1e30, bandwidth=1.0)
  slow_math = count(text, ONE, peak_flops=1.0, bandwidth=1e30)
  assert slow_memory.compute_seconds == pytest.approx(slow_memory.bytes)
  assert slow_math.compute_seconds == pytest.approx(slow_math.flops)


@pytest.mark.parametrize(("axis", "other"), [("data", "model"), ("model", "data")])
def test_collectives_along_an_axis_of_the_mesh(axis, other):
  mesh = small.meshes.make_mesh(small.MeshConfig(1, 2, 2, "fsdp_tp"), jax.devices()[:4])
  n, size = 2, 4 * 64 * 32
  put = lambda *spec: jax.ShapeDtypeStruct((64, 32), jnp.float32, sharding=jax.NamedSharding(mesh, jax.P(*spec)))
  with jax.set_mesh(mesh):
    gather = count(compiled(lambda x: jax.reshard(x, jax.P(None, None)), put(axis)), dict(mesh.shape))
    contract = lambda a, b: jnp.einsum("ab,ac->bc", a, b, out_sharding=jax.P(None, other))
    reduced = count(compiled(contract, put(axis, None), put(axis, other)), dict(mesh.shape))
  assert gather.collectives == [Collective("all-gather", (axis,), 1, (n - 1) / n * size)]
  [found] = reduced.collectives
  assert (found.kind, found.axes) == ("all-reduce", (axis,))
  assert found.sent == 2 * (n - 1) / n * (4 * 32 * 16)  # what each of the two holds of the result


def test_a_collective_in_a_loop_is_sent_as_often():
  mesh = small.meshes.make_mesh(small.MeshConfig(1, 4, 1, "fsdp"), jax.devices()[:4])
  w = jax.ShapeDtypeStruct((6, 32, 32), jnp.float32, sharding=jax.NamedSharding(mesh, jax.P(None, "data", None)))
  x = jax.ShapeDtypeStruct((8, 32), jnp.float32, sharding=jax.NamedSharding(mesh, jax.P("data", None)))

  def f(x, w):
    body = lambda x, w: (jnp.tanh(x @ jax.reshard(w, jax.P(None, None))), None)
    return jax.lax.scan(body, x, w)[0]

  with jax.set_mesh(mesh):
    counts = count(compiled(f, x, w), dict(mesh.shape))
  [gather] = [c for c in counts.collectives if c.kind == "all-gather"]
  # each device sends its quarter of a layer to three others, six times
  assert (gather.axes, gather.times, gather.sent) == (("data",), 6, 6 * 3 * 4 * 8 * 32)
  assert counts.flops == 6 * 2 * 2 * 32 * 32


@pytest.mark.parametrize(
  ("text", "groups"),
  [
    ("replica_groups={{0,1},{2,3}}", [(0, 1), (2, 3)]),
    ("replica_groups=[2,2]<=[4]", [(0, 1), (2, 3)]),
    ("replica_groups=[2,2]<=[2,2]T(1,0)", [(0, 2), (1, 3)]),
    ("replica_groups=mesh['a'=2,'b'=2] {'a'}", [(0, 2), (1, 3)]),
    ("replica_groups=mesh['a'=2,'b'=2] {'b'}", [(0, 1), (2, 3)]),
    ("replica_groups=mesh['a'=2,'b'=2] {'a','b'}", [(0, 2, 1, 3)]),
    ("replica_groups=mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'a'}", [(0, 1), (2, 3)]),
    ("replica_groups=mesh['a'=4] {'a':(1)2}", [(0, 2), (1, 3)]),
    ("replica_groups=mesh['a'=4] {'a':(2)2}", [(0, 1), (2, 3)]),
    ("replica_groups={}", [(0, 1, 2, 3)]),
  ],
)
def test_groups_in_every_notation(text, groups):
  found = hlo.replica_groups(text + ", use_global_device_ids=true", 4)
  assert sorted(map(sorted, found)) == sorted(map(sorted, groups))


def test_padding_of_tiles():
  array = hlo.Array(16, (4, 3, 100), (2, 1, 0), (8, 128), 0)
  assert array.bytes == 2 * 4 * 3 * 100
  assert array.padded == 2 * 4 * 8 * 128


ASYNC = """HloModule jit_f, is_scheduled=true

%fused_start (p: bf16[4,8]) -> (bf16[4,8], bf16[16,8]) {
  %p = bf16[4,8]{1,0} parameter(0)
  %all-gather.1 = bf16[16,8]{1,0} all-gather(%p), channel_id=7, replica_groups=[1,4]<=[4], dimensions={0}
  ROOT %start = (bf16[4,8]{1,0}, bf16[16,8]{1,0}) custom-call(%all-gather.1), custom_call_target="AsyncCollectiveStart"
}

%fused_done (p.1: bf16[4,8], p.2: bf16[16,8]) -> bf16[16,8] {
  %p.1 = bf16[4,8]{1,0} parameter(0)
  %p.2 = bf16[16,8]{1,0} parameter(1)
  %all-gather.2 = bf16[16,8]{1,0} all-gather(%p.1), channel_id=7, replica_groups=[1,4]<=[4], dimensions={0}
  ROOT %done = bf16[16,8]{1,0} custom-call(%p.1, %p.2, %all-gather.2), custom_call_target="AsyncCollectiveDone"
}

ENTRY %main (x: bf16[4,8]) -> bf16[16,8] {
  %x = bf16[4,8]{1,0} parameter(0)
  %s = (bf16[4,8]{1,0}, /*index=1*/bf16[16,8]{1,0}) fusion(%x), kind=kCustom, calls=%fused_start
  %a = bf16[4,8]{1,0} get-tuple-element(%s), index=0
  %b = bf16[16,8]{1,0} get-tuple-element(%s), index=1
  ROOT %d = bf16[16,8]{1,0} fusion(%a, %b), kind=kCustom, calls=%fused_done
}
"""


def test_the_steps_of_an_asynchronous_collective_are_one():
  counts = count(ASYNC, {"data": 4})
  assert counts.collectives == [Collective("all-gather", ("data",), 1, 3 * 2 * 4 * 8)]


def test_counts_of_one_iteration_agree_with_xla():
  """Where nothing loops, XLA's own count of FLOPs holds but for element-wise work."""

  def f(x, w, v):
    return jnp.sum(jax.nn.silu(x @ w) @ v)

  program = jax.jit(jax.grad(f, argnums=(1, 2))).lower(shapes(128, 256), shapes(256, 512), shapes(512, 256)).compile()
  ours, xla = count(program.as_text(), ONE).flops, program.cost_analysis()["flops"]
  assert ours <= xla <= 1.05 * ours
  assert np.isfinite(ours)
