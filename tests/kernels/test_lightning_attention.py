"""Linear attention with decay: every implementation is the float64 reference's, and the reference is the definition."""

import functools
import pathlib

import jax
from jax import numpy as jnp
from jax.experimental.pallas import tpu as pltpu
import numpy as np
import pytest

from research.errors import UserError
from research.kernels.lightning_attention import pallas_tpu, reference, xla
from research.kernels.lightning_attention.api import lightning_attention
from research.mesh import MeshConfig, make_mesh

GOLDEN = np.load(pathlib.Path(__file__).parent / "goldens" / "lightning_attention.npz")

# Each takes (q, k, v, decay, segment_ids, state).
LOCAL = {
  "recurrent": reference.recurrent,
  "xla": functools.partial(xla.attention, chunk=32),
  # jitted: the interpreter's steps are compiled once for each shape
  "pallas_tpu": jax.jit(functools.partial(pallas_tpu.attention, block=128, interpret=True)),
}
WIDE = [name for name in LOCAL if name != "pallas_tpu"]  # computes in float64 what is float64


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
# for a kernel that fills lanes and blocks: two heads of 64 together, d_k != d_v, a block that is not full
WIDE_SHAPES = [((1, 200, 2, 64, 64), True), ((1, 128, 1, 256, 128), False)]
CASES = [(name, *case) for name in WIDE for case in SHAPES] + [("pallas_tpu", *case) for case in WIDE_SHAPES]


@pytest.mark.parametrize(("name", "shape", "segments"), CASES)
def test_values_and_gradients_are_the_references(name, shape, segments):
  args, cotangents = operands(*shape, segments=segments)
  got = jax.jit(functools.partial(value_and_grads, LOCAL[name]))(args, cotangents)
  assert max(relative_errors(got, truth(args, cotangents))) < 2e-6


@pytest.mark.parametrize("name", WIDE)
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


@pytest.mark.parametrize("name", ["reference", *WIDE])
@pytest.mark.parametrize(
  ("case", "rates"),
  [*((f"n{n}", rates) for n in (1, 7, 64) for rates in ("paper", "alibi")), ("extreme", "")],
)
def test_goldens(name, case, rates):
  args, cotangents, want = golden(case, rates)
  f = {"reference": reference.attention, **LOCAL}[name]
  with jax.enable_x64(True):
    wide = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), (args, cotangents))
    got = value_and_grads(f, *wide)
  for g, w in zip(got, want, strict=True):
    np.testing.assert_allclose(g, w, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", ["reference", *WIDE])
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

  for gradient in jax.grad(seen, argnums=(0, 1))(k, v, state):
    reached = np.flatnonzero(np.abs(np.asarray(gradient)).sum((0, 2, 3)))
    assert set(reached) <= set(range(16, 21))
    assert 20 in reached
  assert not np.asarray(jax.grad(seen, argnums=2)(k, v, state)).any()


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


@pytest.mark.parametrize("name", ["xla", "pallas_tpu"])
@pytest.mark.parametrize("shape", [(1, 200, 2, 64, 64), (1, 128, 1, 128, 128)])
def test_bf16_is_as_exact_as_its_own_rounding(name, shape):
  """Value and gradients: at most 1.1 times the error of the exact result, rounded once."""
  args, cotangents = operands(*shape)
  narrow = lambda x: jnp.asarray(x, jnp.bfloat16)
  args, cotangents = (*map(narrow, args[:3]), *args[3:]), (narrow(cotangents[0]), cotangents[1])
  want = truth(*jax.tree.map(lambda x: np.asarray(x, np.float32) if x.dtype == jnp.bfloat16 else x, (args, cotangents)))
  size = lambda x: np.sqrt(np.mean(np.square(np.asarray(x, np.float64))))
  for got, exact in zip(value_and_grads(LOCAL[name], args, cotangents), want, strict=True):
    error = size(np.asarray(got, np.float64) - exact)
    if got.dtype == jnp.float32:  # states are not rounded
      assert error < 1e-6 * size(exact)
    else:
      assert error <= 1.1 * size(np.asarray(jnp.asarray(exact, jnp.bfloat16), np.float64) - exact)


def test_what_stands_beyond_the_end_of_a_row_is_not_read():
  """Blocks of the TPU kernel reach beyond a row's end, where there may be anything."""
  (q, k, v, decay, ids, state), _ = operands(1, 200, 1, 8, 8)
  call = functools.partial(pallas_tpu.attention, block=128, interpret=pltpu.InterpretParams(uninitialized_memory="nan"))
  got = call(q, k, v, decay, ids, state)
  for g, w in zip(got, reference.attention(q, k, v, decay, ids, state), strict=True):
    np.testing.assert_allclose(g, w, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("name", LOCAL)
def test_the_same_call_gives_the_same_bits(name):
  args, cotangents = operands(1, 100, 2, 64, 64)
  f = jax.jit(functools.partial(value_and_grads, LOCAL[name]))
  for a, b in zip(f(args, cotangents), f(args, cotangents), strict=True):
    assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


ones = functools.partial(np.ones, dtype=np.float32)
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


def test_padding_ids_at_the_end_of_a_row_are_a_segment_like_others():
  ids = np.array([[1, 1, 2, 2, 2, 0, 0, 0]] * 2, np.int32)
  out, state = lightning_attention(Q, Q, Q, DECAY, segment_ids=ids)
  assert np.isfinite(out).all()
  assert np.isfinite(state).all()
