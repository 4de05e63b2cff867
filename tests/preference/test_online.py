"""The online update as the step of an experiment: what it keeps, what it reads, and what changes nothing."""

import functools

import jax
from jax import numpy as jnp
import numpy as np
import optax
import pytest

from research.config import RunConfig
from research.errors import UserError
from research.fit import Experiment, abstract_reference, abstract_state, fresh_state, jit_step
from research.generation import Sampling
from research.mesh import MeshConfig, row_spec
from research.models.transformer import Transformer
from research.preference import online, oracles
from research.preference.methods import METHODS
from research.preference.online import OnlineConfig
from research.preference.samplers import GeometricMixture, Policy, Uniform
from tests import small

STOP, TOKENS, ROWS = 3, 3, 8
TINY = small.varied(vocab=4, width=16, layers=1, heads=2, kv_heads=2, mlp_width=16)
LIKES_ONES = oracles.BradleyTerry(lambda batch, y: 2 * jnp.sum((y.tokens == 1) * y.mask, axis=1))


def init(key, partition="replicated"):
  return Transformer(key, TINY, partition)


def prompts(pad: int = 0, filler: int = 0, rows: int = ROWS):
  """Prompts of one to three ids, with so much padding more than they need."""
  rng = np.random.default_rng(0)
  lengths = 1 + np.arange(rows, dtype=np.int32) % 3
  ids = np.full((rows, 3 + pad), filler, np.int32)
  for row, length in zip(ids, lengths, strict=True):
    row[-length:] = rng.integers(0, 3, length)
  return {"prompts": ids, "lengths": lengths}


def experiment(
  settings: OnlineConfig, oracle=lambda companion: LIKES_ONES, partition="replicated", companion=None
) -> Experiment:
  shapes = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in prompts().items()}
  data = lambda split: iter([prompts()])
  parts = online.parts(settings, optax.sgd(0.05), oracle, lambda: shapes, data, stop=(STOP,))
  make = functools.partial(init, partition=partition)
  return Experiment(init=make, data=data, batch=lambda: shapes, companion=companion, **parts)


def trained(settings, steps=1, mesh=None, devices=1, batch=None, accumulate=1, companion=None, **fields):
  """(the model's arrays, the state, the metrics) after some steps, under a mesh."""
  exp = experiment(settings, companion=companion, partition=mesh.partition if mesh else "replicated", **fields)
  cfg = RunConfig("prefgames", batch=ROWS, accumulate=accumulate)
  with small.use(mesh, devices):
    abstract = abstract_state(exp)
    state = fresh_state(exp, abstract, 0)
    reference = jax.tree.map(jnp.copy, state.model)
    reference = reference if companion is None else (reference, companion())
    step, rows = jit_step(exp, cfg, abstract), jax.tree.map(jnp.asarray, batch or prompts())
    rows = {name: jax.reshard(x, row_spec(x.ndim)) for name, x in rows.items()}
    for _ in range(steps):
      state, metrics = jax.block_until_ready(step(state, rows, reference))
  return small.leaves(state.model), state, {name: float(x) for name, x in metrics.items()}


def same(a, b, atol=1e-6):
  for x, y in zip(a, b, strict=True):
    np.testing.assert_allclose(x, y, atol=atol)


def test_a_step_asks_as_much_as_it_says_and_moves_the_policy():
  settings = OnlineConfig("online_dpo", b=0.5, tokens=TOKENS, updates=2)
  model, state, metrics = trained(settings, steps=2)
  with small.use():
    before = small.leaves(jax.jit(experiment(settings).init)(jax.random.split(jax.random.key(0))[0]))
  assert max(np.abs(x - y).max() for x, y in zip(model, before, strict=True)) > 1e-4
  assert int(state.opt.updates) == 4
  assert metrics["queries"] == 4 * ROWS
  assert 1 <= metrics["length"] <= TOKENS


@pytest.mark.slow
def test_padding_and_what_stands_in_it_change_nothing():
  settings = OnlineConfig("online_dpo", b=0.5, tokens=TOKENS)
  plain, _, _ = trained(settings)
  same(trained(settings, batch=prompts(filler=2))[0], plain)
  same(trained(settings, batch=prompts(pad=2, filler=1))[0], plain, atol=1e-5)


@pytest.mark.slow
def test_micro_batches_change_nothing():
  settings = OnlineConfig("online_ipo_policy", b=0.5, tokens=TOKENS)
  same(trained(settings, accumulate=4)[0], trained(settings)[0])


@pytest.mark.slow
def test_rows_of_weight_0_teach_nothing():
  settings = OnlineConfig("online_ipo_policy", b=0.5, tokens=TOKENS)
  whole, other = prompts(), prompts()
  weights = {"weights": np.array([1] * 4 + [0] * 4, np.float32)}
  other["prompts"][4:], other["lengths"][4:] = 1, 2
  same(trained(settings, batch=whole | weights)[0], trained(settings, batch=other | weights)[0])


@pytest.mark.slow
def test_memory_holds_every_pair_so_far_and_a_ring_forgets_the_oldest():
  settings = OnlineConfig("xpo", b=0.5, tokens=TOKENS, memory=2, alpha=0.1)
  pairs = [jax.device_get(trained(settings, steps=n)[1].opt.pairs) for n in (1, 2, 3)]
  first, second, third = (p["responses"] for p in pairs)
  assert first.shape == (2 * ROWS, 2, TOKENS)
  assert not pairs[0]["mask"][ROWS:].any()
  np.testing.assert_array_equal(second[:ROWS], first[:ROWS])
  np.testing.assert_array_equal(third[ROWS:], second[ROWS:])
  assert (third[:ROWS] != second[:ROWS]).any()
  np.testing.assert_array_equal(pairs[0]["prompts"][:ROWS], prompts()["prompts"])


@pytest.mark.slow
def test_a_refreshed_reference_is_the_policy_of_the_last_refresh():
  settings = OnlineConfig("sppo", b=2.0, tokens=TOKENS, refresh=2)
  after = [trained(settings, steps=n)[1] for n in (1, 2, 3)]
  anchors = [small.leaves(state.opt.anchor) for state in after]
  with small.use():
    start = small.leaves(jax.jit(experiment(settings).init)(jax.random.split(jax.random.key(0))[0]))
  same(anchors[0], start)
  same(anchors[1], start)
  same(anchors[2], small.leaves(after[1].model))
  assert max(np.abs(x - y).max() for x, y in zip(anchors[2], start, strict=True)) > 1e-5


@pytest.mark.slow
def test_a_companion_is_what_the_oracle_is_made_of_and_an_argument_of_the_program():
  def oracle(strength):
    return oracles.BradleyTerry(lambda batch, y: strength * jnp.sum((y.tokens == 1) * y.mask, axis=1))

  settings = OnlineConfig("online_dpo", b=0.5, tokens=TOKENS)
  fixed, _, _ = trained(settings)
  same(trained(settings, oracle=oracle, companion=lambda: jnp.asarray(2.0))[0], fixed)
  exp = experiment(settings, oracle=oracle, companion=lambda: jnp.ones(7))
  with small.use():
    _, abstract = abstract_reference(exp, abstract_state(exp))
  assert abstract.shape == (7,)


@pytest.mark.parametrize(
  ("name", "mesh"),
  [
    ("online_ipo_policy", MeshConfig(1, 2, 2, "fsdp_tp")),
    pytest.param("online_ipo_policy", MeshConfig(1, 4, 1, "fsdp"), marks=pytest.mark.slow),
    pytest.param("egpo", MeshConfig(1, 2, 2, "fsdp_tp"), marks=pytest.mark.slow),
    pytest.param("egpo", MeshConfig(1, 4, 1, "fsdp"), marks=pytest.mark.slow),
    pytest.param("nash_md", MeshConfig(2, 1, 2, "fsdp_tp"), marks=pytest.mark.slow),
    pytest.param("nash_md", MeshConfig(1, 4, 1, "fsdp"), marks=pytest.mark.slow),
    pytest.param("xpo", MeshConfig(1, 2, 2, "fsdp_tp"), marks=pytest.mark.slow),
    pytest.param("sppo", MeshConfig(1, 2, 2, "fsdp_tp"), marks=pytest.mark.slow),
  ],
)
def test_an_update_of_cut_parameters_is_that_of_whole_ones(name, mesh):
  kept = {"xpo": {"memory": 2}, "sppo": {"refresh": 1}}.get(name, {})
  settings = OnlineConfig(name, b=0.5, tokens=TOKENS, **kept)
  whole, _, metrics = trained(settings, steps=2)
  cut, _, cut_metrics = trained(settings, steps=2, mesh=mesh, devices=4)
  same(cut, whole, atol=2e-5)
  assert cut_metrics["loss"] == pytest.approx(metrics["loss"], rel=1e-4)


class Biased:
  """Likes what it sees first."""

  def prob(self, prompt, y, y2):
    return LIKES_ONES.prob(prompt, y, y2) * 0.8 + 0.2


@pytest.mark.parametrize("mesh", [None, MeshConfig(data=2, model=2, partition="fsdp_tp")], ids=["one", "four"])
def test_a_run_whose_oracle_breaks_its_contract_does_not_start(mesh):
  def start(oracle):
    exp = experiment(OnlineConfig(tokens=3), lambda companion: oracle, mesh.partition if mesh else "replicated")
    with small.use(mesh, 4 if mesh else 1):
      model = fresh_state(exp, abstract_state(exp), 0).model
      exp.check_start(model, model)

  start(LIKES_ONES)
  with pytest.raises(UserError, match=r"oracle\[0\]=.* the other order must sum to 1"):
    start(Biased())


def test_rows_of_the_table_take_the_configs_samplers():
  nash = OnlineConfig("nash_md", pairs="uniform", mixture=0.3).row()
  assert (nash.y, nash.y2, nash.opponent) == (Uniform(), Uniform(), GeometricMixture(0.3))
  flat = OnlineConfig("egpo", temperature=3.0, top_k=2).row()
  assert (flat.y, flat.opponent) == (Policy(Sampling(3.0, 2)), Policy())
  assert OnlineConfig("online_dpo", pairs="uniform").row() == METHODS["online_dpo"]


@pytest.mark.parametrize(
  ("change", "said"),
  [
    ({"b": 0.0}, "b=0.0: must be positive"),
    ({"memory": 3}, "memory=3: egpo needs pairs against its opponent of the moment"),
    ({"mixture": 1.5, "method": "nash_md"}, "coefficient=1.5: of a mixture lies in"),
    ({"method": "nash_md_pg", "reduce": "mean"}, "reduce=mean: nash_md_pg is of whole responses"),
    ({"tokens": 0}, "tokens=0: use a whole number"),
  ],
)
def test_settings_that_make_no_sense_are_refused(change, said):
  with pytest.raises(UserError, match=said):
    OnlineConfig(**({"method": "egpo"} | change))
