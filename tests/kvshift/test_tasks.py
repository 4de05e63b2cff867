"""Each task's rows are what its definition says, by a solver of our own; their loss is a mean by hand."""

import jax
from jax import numpy as jnp
import numpy as np
import pytest

from experiments.kvshift.tasks import TASKS
from experiments.kvshift.tasks.hops import HopsConfig, HopsRows
from experiments.kvshift.tasks.induction import InductionConfig, InductionRows
from experiments.kvshift.tasks.math import NAMES, MathConfig, MathRows, longest_problem
from experiments.kvshift.tasks.ngram import NgramConfig, NgramRows
from experiments.kvshift.tasks.rows import answer_loss, row
from research.errors import UserError

MATH = MathConfig(train_least=1, train_most=5, test=6)


def make(name, seed=3, split="train"):
  rows, cfg, vocab, length = {
    "induction": (InductionRows, InductionConfig(keys=6), 40, 32),
    "ngram": (NgramRows, NgramConfig(triples=50, symbols=12), 12, 30),
    "hops": (HopsRows, HopsConfig(most=5), 12, 60),
    "math": (MathRows, MATH, 64, longest_problem(6, 2)),
  }[name]
  return rows(cfg, vocab, length, seed, split)


@pytest.mark.parametrize("name", TASKS)
def test_rows_depend_on_seed_split_and_index_only_and_fit_the_model(name):
  rows = make(name)
  assert TASKS[name] is type(rows)
  for i in (0, 5, 99999):
    first, again = rows[i], make(name)[i]
    assert all((first[key] == again[key]).all() for key in first)
    assert {x.shape for x in first.values()} == {(rows.length,)}
    assert first["tokens"].min() >= 0
    assert first["tokens"].max() < rows.vocab
    assert first["scored"].sum() > 0
  for other in (rows[1], make(name, seed=4)[0], make(name, split="validation")[0]):
    assert (rows[0]["tokens"] != other["tokens"]).any()


def test_ngrams_are_of_one_table_and_no_token_alone_says_the_third():
  rows, table = make("ngram"), {}
  for i in range(60):
    r = make("ngram", split=("train", "validation")[i % 2])[i]
    for t in np.flatnonzero(r["weights"]):
      pair, third = tuple(r["tokens"][t - 1 : t + 1]), r["targets"][t]
      assert table.setdefault(pair, third) == third == r["tokens"][t + 1]
    assert np.flatnonzero(r["weights"]).tolist() == list(range(1, 30, 3))
  assert len(table) == 50
  for place in (0, 1):
    thirds = {}
    for pair, third in table.items():
      thirds.setdefault(pair[place], set()).add(third)
    assert max(map(len, thirds.values())) > 1
  assert (make("ngram", seed=4).table != rows.table).any()


def test_hops_are_hops():
  for i in range(40):
    r = make("hops")[i]
    k = r["tokens"][0] - 4 + 1
    assert (r["group"] == k).all()
    assert k == 1 + i % 5
    x = r["tokens"][1:].tolist()
    assert all(a != b for a, b in zip(x, x[1:], strict=False))
    for t in range(len(x)):
      at = t
      for _ in range(k):
        before = [j for j in range(1, at + 1) if x[j - 1] == x[at]]
        at = before[-1] if before else None
        if at is None:
          break
      assert r["scored"][t + 1] == (at is not None)
      if at is not None:
        assert r["targets"][t + 1] == x[at]


def words(rows, i):
  names = {n: word for word, n in rows.ids.items()}
  return [names[t] for t in rows[i]["tokens"]]


@pytest.mark.parametrize("split", ["train", "validation"])
def test_a_solution_solves_its_problem_and_says_nothing_that_is_not_needed(split):
  rows = make("math", split=split)
  steps = set()
  for i in range(200):
    text = words(rows, i)
    question, answer = text.index("?"), text.index("!")
    asked = text[question + 1]
    definitions = {}
    for item in " ".join(map(str, text[:question])).split(";")[:-1]:
      name, _, *expression = item.split()
      assert name not in definitions
      definitions[name] = expression

    def value(word):
      if word not in definitions:
        return int(word)
      left, *rest = definitions[word]
      return value(left) if not rest else eval(f"{value(left)} {rest[0]} {value(rest[1])}") % 23

    said = {}
    for item in " ".join(map(str, text[question + 2 : answer])).split(";")[:-1]:
      name, _, *rest = item.split()
      for operand in definitions[name][::2]:
        assert operand in said or operand not in definitions  # operands come first
      said[name] = int(rest[-1])
      assert said[name] == value(name)
    assert text[answer + 1] == value(asked) == said[asked]
    needed, todo = set(), [asked]
    while todo:
      needed.add(name := todo.pop())
      todo += [w for w in definitions[name] if w in definitions and w not in needed]
    assert set(said) == needed
    assert len(definitions) == len(needed) + 2
    steps.add(len(needed))
    assert np.flatnonzero(rows[i]["weights"]).tolist() == list(range(question + 1, answer + 1))
  assert steps == ({1, 2, 3, 4, 5} if split == "train" else {6})


def test_the_longest_problem_fits_and_no_more():
  lengths = []
  rows = make("math", split="validation")
  for i in range(300):
    text = words(rows, i)
    lengths.append(text.index("!") + 2)
  assert max(lengths) <= rows.length <= max(lengths) + 12


class Says:
  """A model whose logits are given."""

  def __init__(self, logits):
    self._logits = jnp.asarray(logits, jnp.float32)

  def logits(self, tokens, segment_ids, positions):
    return self._logits


def test_loss_and_accuracies_are_means_by_hand():
  a = row(np.array([1, 2, 0]), np.array([1, 0.5, 0])) | {"group": np.full(3, 1)}
  b = row(np.array([2, 2, 1]), np.array([1, 1, 0]), scored=np.array([0, 1, 0])) | {"group": np.full(3, 2)}
  c = row(np.array([0, 0, 0]), np.array([0, 1, 1]), targets=np.array([0, 1, 2])) | {"group": np.full(3, 2)}
  filler = {name: np.zeros_like(x) for name, x in a.items()}  # as the loader fills up a last batch
  batch = {name: np.stack([a[name], b[name], c[name], filler[name]]) for name in a}
  logits = np.zeros((4, 3, 3))
  logits[0, 0, 2] = logits[0, 1, 0] = logits[1, 0, 1] = logits[1, 1, 1] = logits[2, 1, 1] = logits[2, 2, 0] = 3.0
  got = {
    name: (float(m.total), float(m.weight))
    for name, m in answer_loss(Says(logits), batch, None, groups=2, rows=True).items()
  }
  right, wrong = np.log(np.exp(3) + 2) - 3, np.log(np.exp(3) + 2)
  assert got["loss"][0] == pytest.approx(right + 0.5 * right + wrong + right + right + wrong, rel=1e-5)
  assert got["loss"][1] == 5.5
  assert got["accuracy"] == (4, 5)
  assert got["accuracy_1"] == (2, 2)
  assert got["accuracy_2"] == (2, 3)
  assert got["rows_right"] == (2, 3)


@pytest.mark.parametrize(
  ("f", "told"),
  [
    (lambda: InductionConfig(keys=0), "keys"),
    (lambda: InductionRows(InductionConfig(keys=30), 40, 32, 0, "train"), "induction.keys"),
    (lambda: InductionRows(InductionConfig(), 64, 31, 0, "train"), "length"),
    (lambda: InductionRows(InductionConfig(generator="paper", keys=2), 64, 32, 0, "train"), "at least 3"),
    (lambda: InductionRows(InductionConfig(generator="paper", keys=65), 64, 32, 0, "train"), "model.vocab"),
    (lambda: InductionRows(InductionConfig(generator="paper", keys=900), 1000, 16, 0, "train"), "hardly"),
    (lambda: NgramConfig(triples=600, symbols=24), "triples"),
    (lambda: NgramRows(NgramConfig(), 10, 30, 0, "train"), "ngram.symbols"),
    (lambda: NgramRows(NgramConfig(), 24, 2, 0, "train"), "length"),
    (lambda: HopsConfig(symbols=2), "symbols"),
    (lambda: HopsRows(HopsConfig(most=9), 12, 64, 0, "train"), "hops.most"),
    (lambda: MathConfig(train_least=3, train_most=2), "train_most"),
    (lambda: MathConfig(test=NAMES), "names"),
    (lambda: MathRows(MATH, 50, 200, 0, "train"), "math.modulus"),
    (lambda: MathRows(MATH, 64, 60, 0, "train"), "longest problem"),
  ],
)  # fmt: skip
def test_settings_without_a_meaning_are_refused(f, told):
  with pytest.raises(UserError, match=told):
    f()


def test_every_task_can_be_batched_and_judged():
  """What a solver that knows the answers gets: everything right."""
  for name in TASKS:
    rows = make(name)
    batch = {key: np.stack([rows[i][key] for i in range(8)]) for key in rows[0]}
    sure = 50.0 * jax.nn.one_hot(batch["targets"], rows.vocab)
    means = rows.cfg.loss(Says(sure), batch, None)
    assert all(float(mean.value) == 1 for key, mean in means.items() if key != "loss" and float(mean.weight))
    assert float(means["loss"].value) < 1e-6
    assert 0 <= rows.cfg.chance < 1
