"""What the tests of the models of images share: their goldens, and how these are compared."""

import json
import math
import pathlib

import jax
import numpy as np

from research import mesh as meshes
from research.mesh import MeshConfig
from research.models import convert

GOLDENS = pathlib.Path(__file__).parent / "goldens" / "images"


def load(name, **execution):
  return convert.load(GOLDENS / name, precision="float32", **execution)[1]


def expected(name):
  return np.load(GOLDENS / name / "expected.npz")


def manifest(name):
  """The official models of a repository: number of parameters, and tensors of the first layer by key."""
  return json.loads((GOLDENS / "official_key_manifests" / f"{name}.json").read_text())


def check_gradients(grads, name, wanted, prefix, atol=1e-3):
  """Every golden `prefix/key` is the gradient of that tensor, up to atol of its largest number."""
  tensors = convert.read(GOLDENS / name).tensors
  ours = {convert._name(path): np.asarray(x) for path, x in jax.tree_util.tree_leaves_with_path(grads)}
  keys = [key for key in wanted if key.startswith(f"{prefix}/")]
  assert keys
  for key in keys:
    tensor = tensors[key.removeprefix(f"{prefix}/")]
    largest = np.abs(wanted[key]).max()
    assert largest > 0
    gradient = tensor.as_file(ours[tensor.param])
    np.testing.assert_allclose(gradient, wanted[key], atol=atol * largest, rtol=0, err_msg=key)


def traced(make, **mesh):
  """A full-size model on an abstract pod, and how many parameters it has: nothing is allocated."""
  cfg = MeshConfig(**{"replica": 1, "data": 16, "model": 4} | mesh)
  with jax.sharding.use_abstract_mesh(meshes.abstract_mesh(cfg, cfg.data * cfg.model)):
    model = jax.eval_shape(make, jax.eval_shape(lambda: jax.random.key(0)))
  return model, sum(math.prod(x.shape) for x in jax.tree.leaves(model))


def check_traced_gradients(make, loss, batch):
  """The gradient of a full-size loss traces on a pod of 64, and stands as the parameters do; batch: {name: shape}."""
  with jax.sharding.use_abstract_mesh(meshes.abstract_mesh(MeshConfig(1, 16, 4), 64)):
    mesh = jax.sharding.get_abstract_mesh()
    key = jax.eval_shape(lambda: jax.random.key(0))

    def rows(shape):
      spec = jax.P(meshes.BATCH, *[None] * (len(shape) - 1))
      kind = np.float32 if len(shape) > 2 else np.int32
      return jax.ShapeDtypeStruct(shape, kind, sharding=jax.NamedSharding(mesh, spec))

    model = jax.eval_shape(make, key)
    batch = {name: rows(shape) for name, shape in batch.items()}
    grads = jax.eval_shape(jax.grad(lambda *x: loss(*x)["loss"].total), model, batch, key)
  specs = lambda tree: [x.sharding.spec for x in jax.tree.leaves(tree)]
  assert specs(grads) == specs(model)
  assert any("model" in jax.tree.leaves(tuple(spec)) for spec in specs(model))
