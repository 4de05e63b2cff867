import jax
import pytest

from research.errors import UserError
from research.kernels import dispatch
from research.mesh import AXES, BATCH, MeshConfig, abstract_mesh, make_mesh


def test_none_takes_the_first_implementation_that_supports_the_call():
  assert dispatch.choose(None, {"fast": "needs a TPU", "portable": None, "slow": None}) == "portable"


def test_a_named_implementation_is_taken_even_if_a_better_one_could_run():
  assert dispatch.choose("slow", {"fast": None, "slow": None}) == "slow"


def test_naming_one_that_cannot_run_the_call_says_why():
  with pytest.raises(UserError, match="implementation=fast: needs a TPU"):
    dispatch.choose("fast", {"fast": "needs a TPU", "slow": None})


def test_an_unknown_name_is_answered_with_the_known_ones():
  with pytest.raises(UserError, match="fast, slow"):
    dispatch.choose("fats", {"fast": None, "slow": None})


def test_the_platform_is_what_the_mesh_is_made_of():
  of_tpus = jax.sharding.AbstractMesh(
    (1, 4, 1),
    AXES,
    axis_types=(jax.sharding.AxisType.Explicit,) * 3,
    abstract_device=jax.sharding.AbstractDevice("TPU v5 lite", 1, "tpu"),
  )
  with jax.sharding.use_abstract_mesh(of_tpus):
    assert dispatch.platform() == "tpu"
  with jax.set_mesh(make_mesh(MeshConfig())):
    assert dispatch.platform() == "cpu"
  with jax.sharding.use_abstract_mesh(abstract_mesh(MeshConfig(), 256)):
    assert dispatch.platform() == jax.default_backend()
  assert dispatch.platform() == jax.default_backend()


def test_an_op_stands_on_the_mesh_only_outside_of_a_shard_map():
  seen = []

  def body(x):
    seen.append(dispatch.on_mesh())
    return x

  with jax.set_mesh(make_mesh(MeshConfig())):
    assert dispatch.on_mesh()
    assert dispatch.axis_size("data") == 4
    x = jax.device_put(jax.numpy.zeros(4), jax.P(BATCH))
    jax.shard_map(body, in_specs=jax.P(BATCH), out_specs=jax.P(BATCH))(x)
  assert not any(seen)
  assert not dispatch.on_mesh()
  assert dispatch.axis_size("data") == 1
