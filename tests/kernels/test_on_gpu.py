"""What only a GPU can show.  JAX_PLATFORMS=cuda python -m pytest tests/kernels/test_on_gpu.py"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.kernels.attention.api import attention
from research.kernels.cross_entropy.api import cross_entropy
from research.kernels.lightning_attention.api import lightning_attention
from research.mesh import MeshConfig, make_mesh
from tests.kernels import test_attention, test_cross_entropy, test_lightning_attention

pytestmark = pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a GPU")


def attention_errors(implementation, dtype, segments, shape=(2, 512, 8, 2, 64)):
  """Root-mean-square error of output and gradients over that of the truth rounded to `dtype`."""
  q, k, v, ids, ct = test_attention.operands(*shape, segments=segments)
  q, k, v, ct = (jnp.asarray(x, dtype) for x in (q, k, v, ct))
  call = lambda q, k, v, ids: attention(q, k, v, segment_ids=ids, implementation=implementation)
  with jax.default_matmul_precision("highest"):
    got = jax.jit(functools.partial(test_attention.value_and_grads, call))(q, k, v, ids, ct)
  want = test_attention.truth(q, k, v, ids, ct)
  rms = lambda x: np.sqrt(np.mean(np.square(x)))
  rounded = [np.asarray(jnp.asarray(w, dtype), np.float64) for w in want]
  return [rms(np.asarray(g, np.float64) - w) / rms(r - w) for g, r, w in zip(got, rounded, want, strict=True)]


@pytest.mark.parametrize("segments", [True, False])
@pytest.mark.parametrize("implementation", ["cudnn", "xla", None])
def test_bfloat16_attention_is_as_good_as_bfloat16_gets(implementation, segments):
  assert max(attention_errors(implementation, jnp.bfloat16, segments)) < 3


def test_float32_attention_is_taken_by_xla_and_right():
  assert max(attention_errors(None, jnp.float32, True)) < 30


def test_cudnn_lets_nothing_leak_between_segments():
  q, k, v, _, _ = test_attention.operands(1, 256, 4, 4, 64)
  q, k, v = (jnp.asarray(x, jnp.bfloat16) for x in (q, k, v))
  ids = np.repeat(np.int32([[0, 1]]), 128, axis=1)
  f = lambda k, v: jnp.abs(attention(q, k, v, segment_ids=ids, implementation="cudnn")[:, 200].astype("float32")).sum()
  for grad in jax.jit(jax.grad(f, argnums=(0, 1)))(k, v):
    assert (np.asarray(grad, np.float32)[:, :128] == 0).all()
    assert (np.asarray(grad, np.float32)[:, 201:] == 0).all()


def test_cudnn_stands_inside_the_mesh():
  args = test_attention.operands(2, 128, 4, 2, 64)
  q, k, v = (jnp.asarray(x, jnp.bfloat16) for x in args[:3])
  call = jax.jit(functools.partial(attention, implementation="cudnn"))
  alone = np.asarray(call(q, k, v, segment_ids=args[3]), np.float32)
  with jax.set_mesh(make_mesh(MeshConfig(), jax.devices()[:1])):
    meshed = jax.jit(functools.partial(attention, implementation="cudnn"))(q, k, v, segment_ids=jnp.asarray(args[3]))
  np.testing.assert_array_equal(np.asarray(meshed, np.float32), alone)


def test_cross_entropy_is_that_of_float64():
  x, w, targets, weights = test_cross_entropy.operands(4, 512, 256, 32768)
  args = (x, (w / 16).astype(np.float32), targets, weights)
  with jax.default_matmul_precision("highest"):
    got = jax.jit(jax.value_and_grad(cross_entropy, argnums=(0, 1)))(*args)
  assert max(test_cross_entropy.relative_errors(got, test_cross_entropy.truth(*args))) < 5e-6


def lightning(q, k, v, decay, ids, state):
  return lightning_attention(q, k, v, decay, segment_ids=ids, initial_state=state, implementation="pallas_gpu")


@pytest.mark.parametrize(
  ("shape", "segments"),
  [
    ((2, 512, 6, 64, 64), True),
    ((2, 333, 6, 96, 96), True),
    ((1, 1000, 6, 128, 128), False),
    ((1, 300, 6, 256, 128), True),
    ((1, 300, 6, 64, 256), True),
    ((1, 300, 6, 20, 50), True),
    ((2, 1, 6, 128, 128), True),
  ],
)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_lightning_attention_is_that_of_float64_and_the_same_each_time(shape, segments, dtype):
  (q, k, v, *rest), (dout, dstate) = test_lightning_attention.operands(*shape, segments=segments)
  q, k, v, dout = (np.asarray(jnp.asarray(x, dtype)) for x in (q, k, v, dout))
  args = (q, k, v, *rest), (dout, dstate)
  f = jax.jit(functools.partial(test_lightning_attention.value_and_grads, lightning))
  got = f(*args)
  for first, second in zip(got, f(*args), strict=True):
    np.testing.assert_array_equal(first, second)
  rms = lambda x: np.sqrt(np.mean(np.square(x)))
  for g, w in zip(got, test_lightning_attention.truth(*args), strict=True):
    error = rms(np.asarray(g, np.float64) - w)
    best = rms(np.asarray(jnp.asarray(w, g.dtype), np.float64) - w)
    if g.dtype == jnp.bfloat16:
      assert error < 1.1 * best
    else:  # a state; of bfloat16 operands it is summed up of numbers of 16 bits
      assert error < (1e-5 if dtype == jnp.bfloat16 else 2e-6) * rms(w)


def test_lightning_attention_reads_nothing_beside_its_rows_and_heads():
  (q, k, v, decay, ids, state), _ = test_lightning_attention.operands(2, 333, 2, 96, 80)
  want = lightning(q, k, v, decay, ids, state)[0][0, :, 0]
  for x in (q, k, v):
    x[1], x[0, :, 1] = np.nan, np.nan
  np.testing.assert_array_equal(lightning(q, k, v, decay, ids, state)[0][0, :, 0], want)


def test_lightning_attention_takes_the_kernel_by_itself_and_on_a_mesh():
  (q, k, v, decay, ids, state), _ = test_lightning_attention.operands(2, 128, 4, 64, 64)
  want = lightning(q, k, v, decay, ids, state)[0]
  call = jax.jit(lambda q, k, v, ids, state: lightning_attention(q, k, v, decay, segment_ids=ids, initial_state=state))
  np.testing.assert_array_equal(call(q, k, v, ids, state)[0], want)
  with jax.set_mesh(make_mesh(MeshConfig(), jax.devices()[:1])):
    np.testing.assert_array_equal(call(*map(jnp.asarray, (q, k, v, ids, state)))[0], want)
