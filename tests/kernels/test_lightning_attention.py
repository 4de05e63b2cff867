"""Linear attention with decay: every implementation is the float64 reference's, and the reference is the definition."""

import functools
import math
import pathlib

import jax
from jax import numpy as jnp
from jax.experimental.pallas import tpu as pltpu
from jax.extend.core import jaxprs_in_params
import numpy as np
import pytest

from research.errors import UserError
from research.kernels.lightning_attention import pallas_gpu, pallas_tpu, reference, xla
from research.kernels.lightning_attention.api import lightning_attention
from research.mesh import AXES, MeshConfig, make_mesh

GOLDEN = np.load(pathlib.Path(__file__).parent / "goldens" / "lightning_attention.npz")

# Each takes (q, k, v, decay, segment_ids, state).
LOCAL = {
  "recurrent": reference.recurrent,
  "xla": functools.partial(xla.attention, chunk=32),
  # On a CPU in Pallas's interpreter, which fills with NaN what a block has beyond its array.
  "pallas_gpu": jax.jit(functools.partial(pallas_gpu.attention, interpret=True)),
  "pallas_tpu": jax.jit(functools.partial(pallas_tpu.attention, block=128, interpret=True)),
}
FLOAT64 = ["recurrent", "xla"]  # kernels stop at float32


def operands(batch, length, heads, d_k, d_v, dtype=np.float32, segments=True, seed=0):
  """q, k, v, decay, segment ids and an initial state; the cotangents of output and state."""
  rng = np.random.default_rng(seed)
  normal = lambda *shape: rng.standard_normal(shape).astype(dtype)
  q, k, v = normal(batch, length, heads, d_k), normal(batch, length, heads, d_k), normal(batch, length, heads, d_v)
  decay = np.exp(-np.array([0, 8, 0.01, 0.5, 0.1, 2])[np.arange(heads) % 6]).astype(np.float32)  # 1 and e^-8 among them
  ids = np.sort(rng.integers(0, 4, (batch, length)), axis=1).astype(np.int32) if segments else None
  state = rng.standard_normal((batch, heads, d_k, d_v)).astype(np.promote_types(dtype, np.float32))
  return (q, k, v, decay, ids, state), (
    normal(batch, length, heads, d_v),
    rng.standard_normal(state.shape).astype(state.dtype),
  )


def value_and_grads(f, args, cotangents):
  """(out, final state, dq, dk, dv, dstate)."""
  q, k, v, decay, ids, state = args
  value, vjp = jax.vjp(lambda q, k, v, state: f(q, k, v, decay, ids, state), q, k, v, state)
  return *value, *vjp(cotangents)


def truth(args, cotangents):
  """Value and gradients in float64."""
  with jax.enable_x64(True):
    wide = lambda x: jnp.asarray(x, jnp.float64) if jnp.issubdtype(x.dtype, jnp.floating) else jnp.asarray(x)
    args, cotangents = jax.tree.map(wide, (args, cotangents))
    return jax.tree.map(np.asarray, jax.jit(functools.partial(value_and_grads, reference.attention))(args, cotangents))


def relative_errors(got, want):
  size = lambda x: np.abs(x).max()
  return [size(np.asarray(g, np.float64) - w) / (size(w) or 1) for g, w in zip(got, want, strict=True)]


SHAPES = [
  ((2, 64, 3, 4, 6), True),
  ((2, 37, 6, 8, 4), True),  # a chunk that is not full
  ((1, 1, 2, 4, 4), False),
  ((2, 1, 2, 4, 4), True),
  ((2, 33, 2, 16, 8), False),
  ((1, 200, 6, 4, 4), True),
]
# for the kernel that fills lanes and blocks: two heads of 64 together, d_k != d_v, a block that is not full
WIDE_SHAPES = [((1, 200, 2, 64, 64), True), ((1, 128, 1, 256, 128), False)]
SHAPES_OF = {name: WIDE_SHAPES if name == "pallas_tpu" else SHAPES for name in LOCAL}


@pytest.mark.parametrize(
  ("name", "shape", "segments"), [(name, *case) for name, cases in SHAPES_OF.items() for case in cases]
)
def test_values_and_gradients_are_the_references(name, shape, segments):
  args, cotangents = operands(*shape, segments=segments)
  got = jax.jit(functools.partial(value_and_grads, LOCAL[name]))(args, cotangents)
  assert max(relative_errors(got, truth(args, cotangents))) < 2e-6


@pytest.mark.parametrize("name", FLOAT64)
def test_in_float64_they_are_the_same_to_rounding(name):
  args, cotangents = operands(2, 70, 6, 4, 5, dtype=np.float64)
  with jax.enable_x64(True):
    got = value_and_grads(LOCAL[name], *jax.tree.map(jnp.asarray, (args, cotangents)))
  assert max(relative_errors(got, truth(args, cotangents))) < 1e-13


def test_the_reference_is_the_definition():
  (q, k, v, decay, ids, state), _ = operands(2, 9, 3, 4, 5, dtype=np.float64)
  with jax.enable_x64(True):
    out, final = reference.attention(*map(jnp.asarray, (q, k, v, decay.astype(np.float64), ids, state)))
  for b, h in np.ndindex(2, 3):
    s = state[b, h]
    for t in range(9):
      if t and ids[b, t] != ids[b, t - 1]:
        s = np.zeros_like(s)
      s = decay[h].astype(np.float64) * s + np.outer(k[b, t, h], v[b, t, h])
      np.testing.assert_allclose(out[b, t, h], q[b, t, h] @ s, rtol=1e-11, atol=1e-13)
    np.testing.assert_allclose(final[b, h], s, rtol=1e-12, atol=1e-13)


def golden(name, rates):
  """Arguments and expected results of a golden case, in this project's layout."""
  bthd = lambda key: np.swapaxes(GOLDEN[f"{name}/{key}"], 1, 2)
  rates = f"{name}/{rates}/" if rates else f"{name}/"
  want = lambda key, swap: np.swapaxes(GOLDEN[rates + key], 1, 2) if swap else GOLDEN[rates + key]
  args = (bthd("q"), bthd("k"), bthd("v"), np.exp(-GOLDEN[rates + "s"]), None, GOLDEN[f"{name}/S0"])
  cotangents = (bthd("dout"), GOLDEN[f"{name}/dS_final"])
  return args, cotangents, [want(k, k not in ("S_final", "dS0")) for k in ("out", "S_final", "dq", "dk", "dv", "dS0")]


CASES = [*((f"n{n}", rates) for n in (1, 7, 64) for rates in ("paper", "alibi")), ("extreme", "")]


@pytest.mark.parametrize("name", ["reference", *FLOAT64])
@pytest.mark.parametrize(("case", "rates"), CASES)
def test_goldens(name, case, rates):
  args, cotangents, want = golden(case, rates)
  f = {"reference": reference.attention, **LOCAL}[name]
  with jax.enable_x64(True):
    wide = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), (args, cotangents))
    got = value_and_grads(f, *wide)
  for g, w in zip(got, want, strict=True):
    np.testing.assert_allclose(g, w, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", [name for name in LOCAL if name not in FLOAT64])
def test_goldens_in_float32(name):
  args, cotangents, want = golden("extreme", "")
  narrow = jax.tree.map(lambda x: x.astype(np.float32), (args, cotangents))
  assert max(relative_errors(value_and_grads(LOCAL[name], *narrow), want)) < 5e-6


@pytest.mark.parametrize("name", ["reference", *FLOAT64])
def test_golden_of_packed_documents(name):
  f = {"reference": reference.attention, **LOCAL}[name]
  bthd = lambda key: jnp.asarray(np.swapaxes(GOLDEN[f"packed/{key}"], 1, 2), jnp.float64)
  with jax.enable_x64(True):
    decay = jnp.exp(-jnp.asarray(GOLDEN["packed/s"]))
    ids = jnp.asarray(GOLDEN["packed/segment_ids"][None], jnp.int32)
    out, _ = f(bthd("q"), bthd("k"), bthd("v"), decay, ids, None)
    np.testing.assert_allclose(out, np.swapaxes(GOLDEN["packed/out_zero_initial_state"], 1, 2), rtol=0, atol=1e-10)
    # with states of their own, documents are rows
    cuts = GOLDEN["packed/cu_seqlens"]
    for i, (a, b) in enumerate(zip(cuts[:-1], cuts[1:], strict=True)):
      if a == b:
        continue
      state = jnp.asarray(GOLDEN["packed/S0"][i : i + 1], jnp.float64)
      out, final = f(*(bthd(x)[:, a:b] for x in "qkv"), decay, None, state)
      np.testing.assert_allclose(out, np.swapaxes(GOLDEN["packed/out"], 1, 2)[:, a:b], rtol=0, atol=1e-10)
      np.testing.assert_allclose(final[0], GOLDEN["packed/S_final"][i], rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", LOCAL)
def test_a_token_at_a_time_by_the_state_is_the_whole(name):
  q, k, v, state = (jnp.asarray(GOLDEN[f"decode/{x}"]) for x in ("q", "k", "v", "S0"))
  decay = jnp.exp(-jnp.asarray(GOLDEN["decode/s"], jnp.float32))
  for t in range(q.shape[2]):
    token = (x[:, :, t : t + 1].swapaxes(1, 2) for x in (q, k, v))
    out, state = LOCAL[name](*token, decay, None, state)
    np.testing.assert_allclose(out[:, 0], GOLDEN["decode/out_per_step"][:, :, t], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(state, GOLDEN["decode/state_after_step"][:, :, t], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", LOCAL)
def test_nothing_leaks_between_documents_or_from_the_future(name):
  (q, k, v, decay, _, state), _ = operands(1, 48, 2, 4, 4)
  ids = np.repeat([3, 1, 7], 16)[None].astype(np.int32)

  def seen(k, v, state):
    return jnp.abs(LOCAL[name](q, k, v, decay, ids, state)[0][:, 20]).sum()  # of the second document

  dk, dv, dstate = jax.jit(jax.grad(seen, argnums=(0, 1, 2)))(k, v, state)
  for gradient in (dk, dv):
    reached = np.flatnonzero(np.abs(np.asarray(gradient)).sum((0, 2, 3)))
    assert set(reached) <= set(range(16, 21))
    assert 20 in reached
  assert not np.asarray(dstate).any()


@pytest.mark.parametrize("name", LOCAL)
def test_the_strongest_decay_stays_finite_where_a_naive_split_overflows(name):
  (q, k, v, _, _, state), cotangents = operands(1, 300, 2, 4, 4, segments=False)
  decay = np.exp(-np.array([7, 8], np.float32))  # decay^-t passes float32 at t = 12
  args = (q, k, v, decay, None, state)
  got = value_and_grads(LOCAL[name], args, cotangents)
  assert max(relative_errors(got, truth(args, cotangents))) < 2e-6


def test_a_mesh_changes_nothing():
  (q, k, v, decay, ids, state), _ = operands(4, 40, 4, 8, 8)
  want = lightning_attention(q, k, v, decay, segment_ids=ids, initial_state=state)
  for shape in ((1, 2, 2), (2, 1, 2), (1, 4, 1)):
    mesh = make_mesh(MeshConfig(*shape, "fsdp_tp"), jax.devices()[:4])
    with jax.set_mesh(mesh):
      f = jax.jit(lambda *a: lightning_attention(*a[:4], segment_ids=a[4], initial_state=a[5]))
      got = jax.block_until_ready(f(q, k, v, decay, ids, state))
    for g, w in zip(got, want, strict=True):
      np.testing.assert_allclose(g, w, rtol=1e-5, atol=1e-5)


def test_what_stands_beyond_the_end_of_a_row_is_not_read():
  """Blocks of the TPU kernel reach beyond a row's end, where there may be anything."""
  (q, k, v, decay, ids, state), _ = operands(1, 200, 1, 8, 8)
  call = functools.partial(pallas_tpu.attention, block=128, interpret=pltpu.InterpretParams(uninitialized_memory="nan"))
  got = call(q, k, v, decay, ids, state)
  for g, w in zip(got, reference.attention(q, k, v, decay, ids, state), strict=True):
    np.testing.assert_allclose(g, w, rtol=2e-5, atol=2e-5)


# two heads of 64 are one for the TPU kernel
@pytest.mark.parametrize(("name", "d_v"), [("xla", 32), ("pallas_gpu", 32), ("pallas_tpu", 32), ("pallas_tpu", 64)])
def test_bf16_is_as_good_as_the_truth_rounded(name, d_v):
  (q, k, v, *rest), (dout, dstate) = operands(1, 200, 2, 64, d_v)
  rounded = lambda x: np.asarray(jnp.asarray(x, jnp.bfloat16))
  args, cotangents = (rounded(q), rounded(k), rounded(v), *rest), (rounded(dout), dstate)
  got = jax.jit(functools.partial(value_and_grads, LOCAL[name]))(args, cotangents)
  want = truth(args, cotangents)
  rms = lambda x: np.sqrt(np.mean(np.square(x)))
  for g, w in zip(got, want, strict=True):
    if w.shape == dstate.shape:
      assert g.dtype == jnp.float32
      assert rms(np.asarray(g, np.float64) - w) < 1e-5 * rms(w)
    else:
      assert g.dtype == jnp.bfloat16
      best = rms(np.asarray(rounded(w), np.float64) - w)
      assert rms(np.asarray(g, np.float64) - w) < 1.01 * best


@pytest.mark.parametrize("name", LOCAL)
def test_rows_and_heads_are_apart_and_results_the_same_each_time(name):
  args, cotangents = operands(2, 37, 2, 24, 20)
  f = jax.jit(functools.partial(value_and_grads, LOCAL[name]))
  want = f(args, cotangents)
  poisoned = jax.tree.map(np.copy, (args, cotangents))
  for x in (*poisoned[0][:3], poisoned[1][0]):  # what stands beside [0, :, 0] in memory
    x[1], x[0, :, 1] = np.nan, np.nan
  for x in (poisoned[0][5], poisoned[1][1]):
    x[1], x[0, 1] = np.nan, np.nan
  for i, (got, w) in enumerate(zip(f(*poisoned), want, strict=True)):
    alone = (0, 0) if i in (1, 5) else (0, slice(None), 0)
    np.testing.assert_array_equal(got[alone], w[alone])


@pytest.mark.parametrize(("name", "needs"), [("pallas_gpu", "a GPU"), ("pallas_tpu", "a TPU")])
def test_a_kernel_of_another_platform_is_refused_with_the_reason(name, needs):
  with pytest.raises(UserError, match=f"implementation={name}.*needs {needs}, and this runs on cpu"):
    lightning_attention(Q, Q, Q, DECAY, implementation=name)


def made_of(kind, platform):
  device = jax.sharding.AbstractDevice(kind, 1 if platform == "tpu" else None, platform)
  axis_types = (jax.sharding.AxisType.Explicit,) * 3
  return jax.sharding.AbstractMesh((1, 2, 2), AXES, axis_types=axis_types, abstract_device=device)


OF_H100, OF_V5E = made_of("NVIDIA H100 80GB HBM3", "gpu"), made_of("TPU v5 lite", "tpu")


@pytest.mark.parametrize(
  ("mesh", "name", "d_k", "d_v", "dtype", "why"),
  [
    (OF_H100, "pallas_gpu", 320, 64, "bfloat16", "d_k and d_v up to 256, not 320 and 64"),
    (OF_H100, "pallas_gpu", 64, 320, "bfloat16", "d_k and d_v up to 256, not 64 and 320"),
    (OF_H100, "pallas_gpu", 64, 64, "float16", "bfloat16 or float32, not float16"),
    (OF_H100, "pallas_tpu", 64, 64, "bfloat16", "needs a TPU, and this runs on gpu"),
    (OF_V5E, "pallas_tpu", 64, 640, "bfloat16", "head dimensions up to 512, not 640"),
    (OF_V5E, "pallas_tpu", 64, 64, "float16", "bfloat16 or float32, not float16"),
    (OF_V5E, "pallas_gpu", 64, 64, "bfloat16", "needs a GPU, and this runs on tpu"),
  ],
)
def test_a_kernel_by_name_that_cannot_run_says_why_and_the_automatic_choice_runs_another(
  mesh, name, d_k, d_v, dtype, why
):
  of = lambda d: jax.ShapeDtypeStruct((2, 10, 4, d), dtype)
  decay = np.float32([1, 0.9, 0.5, 0.1])

  def call(implementation):
    f = lambda q, k, v: lightning_attention(q, k, v, decay, implementation=implementation)
    return jax.eval_shape(f, of(d_k), of(d_k), of(d_v))

  with jax.sharding.use_abstract_mesh(mesh):
    with pytest.raises(UserError, match=f"^implementation={name}: .*{why}; use None"):
      call(name)
    assert call(None)[0].shape == (2, 10, 4, d_v)


@pytest.mark.parametrize(("heads", "runs"), [(80, False), (10, True)])  # half on each device; 32 fill lanes
def test_heads_that_fill_no_whole_lanes_run_on_a_tpu_kernel_only_if_they_are_few(heads, runs):
  q = jax.ShapeDtypeStruct((2, 10, heads, 100), "bfloat16")
  with jax.sharding.use_abstract_mesh(OF_V5E):
    obstacle = pallas_tpu.obstacle(q, q)
  assert (obstacle is None) == runs
  assert obstacle is None or "heads of 100 together, and no fewer fill whole lanes" in obstacle


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize(("d_k", "d_v"), [(1, 1), (5, 3), (33, 127)])
def test_the_automatic_choice_takes_what_the_reference_takes(dtype, d_k, d_v):
  with jax.enable_x64(True):
    of = lambda d: jnp.ones((1, 3, 2, d), dtype)
    got = lightning_attention(of(d_k), of(d_k), of(d_v), DECAY)
    want = lightning_attention(of(d_k), of(d_k), of(d_v), DECAY, implementation="reference")
    for g, w in zip(got, want, strict=True):
      assert g.dtype == w.dtype
      np.testing.assert_allclose(
        np.asarray(g, np.float64), np.asarray(w, np.float64), rtol=1e-2 if g.dtype.itemsize == 2 else 1e-5
      )


@pytest.mark.parametrize(
  ("d_k", "d_v", "dtype", "kernels"),
  [
    (64, 64, "bfloat16", 4),
    (96, 128, "bfloat16", 4),
    (256, 128, "float32", 4),
    (64, 64, "float16", 0),
    (64, 320, "bfloat16", 0),
  ],
)
def test_on_gpus_it_is_four_triton_kernels_where_they_can_be(d_k, d_v, dtype, kernels):
  with jax.sharding.use_abstract_mesh(OF_H100):
    heads = lambda d: jax.ShapeDtypeStruct((2, 100, 4, d), dtype)

    @jax.jit
    def step(q, k, v, dout):
      (_, state), vjp = jax.vjp(lambda q, k, v: lightning_attention(q, k, v, np.float32([1, 0.9, 0.5, 0.1])), q, k, v)
      return vjp((dout, state))

    args = heads(d_k), heads(d_k), heads(d_v), heads(d_v)
    text = step.trace(*args).lower(lowering_platforms=("cuda",)).as_text()
  assert text.count("__gpu$xla.gpu.triton") == kernels


def products(jaxpr, times=1):
  """Twice the multiplications of all matrix products in a program with loops of known lengths, and in its kernels."""
  total = 0
  for eqn in jaxpr.eqns:
    if eqn.primitive.name == "dot_general":
      (contract, _), _ = eqn.params["dimension_numbers"]
      shape = eqn.invars[0].aval.shape
      total += 2 * times * math.prod(eqn.outvars[0].aval.shape) * math.prod(shape[i] for i in contract)
    inner = times * eqn.params["length"] if eqn.primitive.name == "scan" else times
    if eqn.primitive.name == "pallas_call":
      inner = times * math.prod(eqn.params["grid_mapping"].grid)
    for sub in jaxprs_in_params(eqn.params):
      total += products(sub, inner)
  return total


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize(("d_k", "d_v"), [(64, 64), (96, 128), (256, 128), (64, 256), (20, 50)])
def test_the_flops_of_the_triton_kernels_are_those_of_their_products(d_k, d_v, dtype):
  of = lambda *shape: jax.ShapeDtypeStruct(shape, dtype)
  q, v, state = of(2, 100, 3, d_k), of(2, 100, 3, d_v), jax.ShapeDtypeStruct((2, 3, d_k, d_v), jnp.float32)

  def step(q, k, v, state, dout):
    value, vjp = jax.vjp(lambda *x: pallas_gpu.attention(*x[:3], DECAY3, None, x[3]), q, k, v, state)
    return value, vjp((dout, state))

  (b, t, h), bits = q.shape[:3], 8 * jnp.dtype(dtype).itemsize
  told = lambda name, d_a, d_c: pallas_gpu.flops(
    f"lightning_{name}", [(b, t, h, d_a), (b, t, h, d_a), (b, t, h, d_c)], bits
  )
  want = told("forward", d_k, d_v) + told("dq", d_v, d_k) + told("dk", d_v, d_k) + told("dv", d_k, d_v)
  assert products(jax.make_jaxpr(step)(q, q, v, state, v).jaxpr) == want
  assert pallas_gpu.flops("softmax", [], bits) is None


ones = functools.partial(np.ones, dtype=np.float32)
DECAY3 = np.float32([1, 0.9, 0.1])
Q = ones((2, 8, 2, 4))
DECAY = np.array([0.9, 1.0], np.float32)
WRONG = [
  ("q", {"q": ones((2, 8, 4))}),
  ("k", {"k": ones((2, 8, 2, 5))}),
  ("v", {"v": ones((2, 9, 2, 4))}),
  ("k", {"k": np.ones((2, 8, 2, 4), np.float16)}),
  (
    "q",
    {"q": np.ones((2, 8, 2, 4), np.int32), "k": np.ones((2, 8, 2, 4), np.int32), "v": np.ones((2, 8, 2, 4), np.int32)},
  ),
  ("decay", {"decay": np.array([0.9], np.float32)}),
  ("decay", {"decay": np.array([0.9, 1.1], np.float32)}),
  ("decay", {"decay": np.array([0.0, 1.0], np.float32)}),
  ("decay", {"decay": np.array([np.nan, 1.0], np.float32)}),
  ("decay", {"decay": np.array([-0.5, 1.0], np.float32)}),
  ("q", {"q": ones((2, 0, 2, 4)), "k": ones((2, 0, 2, 4)), "v": ones((2, 0, 2, 4))}),
  ("segment_ids", {"segment_ids": np.zeros((2, 7), np.int32)}),
  ("segment_ids", {"segment_ids": np.zeros((2, 8), np.float32)}),
  ("segment_ids", {"segment_ids": np.array([[1, 1, 2, 2, 1, 1, 3, 3]] * 2, np.int32)}),
  ("initial_state", {"initial_state": ones((2, 2, 4, 5))}),
  ("initial_state", {"initial_state": np.ones((2, 2, 4, 4), np.float16)}),
  ("implementation", {"implementation": "fast"}),
]


@pytest.mark.parametrize(("field", "change"), WRONG, ids=[f"{f}-{i}" for i, (f, _) in enumerate(WRONG)])
def test_bad_input_names_the_argument(field, change):
  call = {"q": Q, "k": Q, "v": Q, "decay": DECAY} | change
  with pytest.raises(UserError) as told:
    lightning_attention(**call)
  assert told.value.field == field
  assert "\n" not in str(told.value)


def test_padding_ids_at_the_end_of_a_row_are_a_segment_like_others():
  ids = np.array([[1, 1, 2, 2, 2, 0, 0, 0]] * 2, np.int32)
  out, state = lightning_attention(Q, Q, Q, DECAY, segment_ids=ids)
  assert np.isfinite(out).all()
  assert np.isfinite(state).all()
