"""Generation: what the model would have said to the whole text, drawn as asked."""

import pathlib

import jax
from jax import numpy as jnp
import numpy as np
import pytest

from research.errors import UserError
from research.generation import Sampling, filtered, generate, sample
from research.mesh import MeshConfig
from research.models import convert
from research.models.transformer import Transformer
from tests import small

GOLDENS = pathlib.Path(__file__).parent / "models" / "goldens"
GREEDY = Sampling(temperature=0)


def model(**changes):
  return Transformer(jax.random.key(0), small.varied(**changes))


@pytest.mark.parametrize("name", ["llama", "kvshift"])
def test_greedy_ids_are_those_of_the_reference_code(name):
  golden = np.load(GOLDENS / name / "expected.npz")
  with small.use():
    _, m = convert.load(GOLDENS / name, precision="float32")
    made = generate(m, golden["prompt_ids"], tokens=24, sampling=GREEDY)
  np.testing.assert_array_equal(made, golden["generated_ids"][:, golden["prompt_ids"].shape[1] :])


def test_greedy_generation_is_the_argmax_of_the_full_forward():
  prompts = [[3, 1, 4, 1, 5, 9, 2], [6], list(range(1, 40)) * 2]  # the last is longer than one multiple
  with small.use():
    m = model()
    made = generate(m, prompts, tokens=9, sampling=GREEDY)
    for prompt, continuation in zip(prompts, made, strict=True):
      row = np.array([prompt + continuation], np.int32)
      logits = m.logits(row, np.ones_like(row), np.arange(row.shape[1], dtype=np.int32)[None])
      said = np.argmax(logits[0], axis=-1)[len(prompt) - 1 : -1]
      np.testing.assert_array_equal(said, continuation)


def test_a_continuation_ends_with_its_first_stop_token_and_the_others_go_on():
  prompts = [[3, 1, 4], [2, 7, 1, 8]]
  with small.use():
    m = model()
    free = generate(m, prompts, tokens=12, sampling=GREEDY)
    stop = free[0][4]
    made = generate(m, prompts, tokens=12, sampling=GREEDY, stop=(stop,))
  assert made[0] == free[0][: free[0].index(stop) + 1]
  assert made[1] == (free[1][: free[1].index(stop) + 1] if stop in free[1] else free[1])


def test_what_a_prompt_gets_does_not_depend_on_the_others():
  with small.use():
    m = model()
    alone = generate(m, [[5, 6, 7]], tokens=10, seed=3)
    beside = generate(m, [[5, 6, 7], [1, 2, 3, 4, 5, 6], [9]], tokens=10, seed=3)
    other = generate(m, [[5, 6, 7]], tokens=10, seed=4)
  assert alone[0] == beside[0] != other[0]


@pytest.mark.parametrize("mesh", small.MESHES[1::2], ids=str)
def test_four_devices_say_what_one_says(mesh: MeshConfig):
  prompts = [[3, 1, 4, 1], [5], [9, 2, 6]]  # three rows on up to four batch shards
  with small.use():
    expected = generate(model(), prompts, tokens=6, seed=1)
  with small.use(mesh, devices=4):
    m = Transformer(jax.random.key(0), small.MODEL, mesh.partition)
    assert generate(m, prompts, tokens=6, seed=1) == expected


LOGITS = jnp.log(jnp.array([[0.1, 0.4, 0.05, 0.25, 0.2]]))


@pytest.mark.parametrize(
  ("sampling", "kept"),
  [
    (Sampling(), {0, 1, 2, 3, 4}),
    (Sampling(top_k=2), {1, 3}),
    (Sampling(top_k=9), {0, 1, 2, 3, 4}),
    (Sampling(top_p=0.39), {1}),
    (Sampling(top_p=0.64), {1, 3}),
    (Sampling(top_p=0.66), {1, 3, 4}),
    (Sampling(top_p=1e-6), {1}),
    (Sampling(top_k=3, top_p=0.74), {1, 3}),  # of 0.4, 0.25, 0.2 the first two are 0.76
    (Sampling(temperature=0.5, top_p=0.55), {1}),  # squared and normalised, 0.16 is 0.59 of all
    (Sampling(temperature=2.0, top_p=0.55), {1, 3, 4}),  # the roots are 0.30, 0.24, 0.21 of all
  ],
)
def test_filters_keep_what_their_definitions_say(sampling, kept):
  row = np.asarray(filtered(LOGITS, sampling))[0]
  assert set(np.flatnonzero(np.isfinite(row))) == kept
  for i in kept:
    assert row[i] == pytest.approx(float(LOGITS[0, i]) / sampling.temperature)


def test_draws_have_the_filtered_probabilities():
  sampling, n = Sampling(temperature=0.8, top_k=4, top_p=0.9), 20_000
  drawn = np.asarray(sample(jnp.repeat(LOGITS, n, axis=0), jax.random.key(0), sampling))
  probs = np.asarray(jax.nn.softmax(filtered(LOGITS, sampling)))[0]
  np.testing.assert_allclose(np.bincount(drawn, minlength=5) / n, probs, atol=4 * 0.5 / n**0.5)


def test_equal_logits_at_the_edge_of_top_p_are_cut_by_id():
  row = np.asarray(filtered(jnp.zeros((1, 4)), Sampling(top_p=0.5)))[0]
  assert set(np.flatnonzero(np.isfinite(row))) == {0, 1}


@pytest.mark.parametrize("setting", [{"temperature": -1.0}, {"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.1}])
def test_settings_that_mean_nothing_are_refused(setting):
  with pytest.raises(UserError, match=next(iter(setting))):
    Sampling(**setting)


@pytest.mark.parametrize(
  ("prompts", "more", "told"),
  [([], {}, "prompts"), ([[]], {}, "prompt"), ([[64]], {}, "0 .. 63"), ([[1]], {"tokens": 0}, "tokens"),
   ([[1]], {"stop": (64,)}, "stop")],
)  # fmt: skip
def test_prompts_that_cannot_be_continued_are_refused(prompts, more, told):
  with small.use(), pytest.raises(UserError, match=told):
    generate(model(), prompts, **{"tokens": 2, **more})
