"""Questions in the formats people have, scored by the likelihood of each answer and nothing else."""

import gzip
import json

import jax
import numpy as np
import pytest

from research.data import TextConfig, load_tokenizer
from research.errors import UserError
from research.evals.choices import Question, read, score
from research.evals.likelihood import log_likelihoods
from research.models.transformer import Transformer
from tests import small

TOKENIZER = load_tokenizer(TextConfig())
FORMATS = [
  ({"ctx": "A man", "endings": ["runs.", "is."], "label": "1"}, [("A man", " runs."), ("A man", " is.")], 1),
  ({"ctx_a": "A man", "ctx_b": "he", "endings": ["a", "b"], "label": 0}, [("A man He", " a"), ("A man He", " b")], 0),
  (
    {"question": "Q?", "choices": {"text": ["x", "y"], "label": ["A", "B"]}, "answerKey": "B"},
    [("Q?", " x"), ("Q?", " y")],
    1,
  ),
  ({"goal": "To", "sol1": "go", "sol2": "stay", "label": 1}, [("To", " go"), ("To", " stay")], 1),
  (
    {"sentence": "The _ fell.", "option1": "cup", "option2": "sky", "answer": "1"},
    [("The cup", " fell."), ("The sky", " fell.")],
    0,
  ),
  ({"context": "1+1=\n", "choices": ["2", "3", "4"], "label": 0}, [("1+1=\n", c) for c in "234"], 0),
  ({"query": "Q", "options": ["yes", "no"], "answer": "no"}, [("Q", " yes"), ("Q", " no")], 1),
]  # fmt: skip


@pytest.mark.parametrize(("item", "pairs", "answer"), FORMATS, ids=lambda x: "")
def test_a_line_is_read_as_its_fields_say(tmp_path, item, pairs, answer):
  (tmp_path / "q.jsonl").write_text(json.dumps(item) + "\n\n")
  with gzip.open(tmp_path / "q.jsonl.gz", "wt") as file:
    file.write(json.dumps(item))
  for name in ("q.jsonl", "q.jsonl.gz"):
    assert read(tmp_path / name) == [Question(tuple(pairs), answer)]


@pytest.mark.parametrize(
  ("line", "told"),
  [
    ("{", "is no JSON"),
    ("[]", "must be an object"),
    ('{"text": "x"}', "needs the fields"),
    ('{"endings": ["a", "b"]}', "does not have the fields ctx"),
    ('{"ctx": "a", "endings": ["a", "b"], "label": 2}', "0 .. 1"),
    ('{"ctx": "a", "endings": ["a", "b"], "label": -1}', "0 .. 1"),
    ('{"ctx": "a", "endings": ["a", "b"], "label": true}', "0 .. 1"),
    ('{"ctx": "a", "endings": ["a"], "label": 0}', "two choices"),
    ('{"ctx": "a", "endings": ["a", ""], "label": 0}', "must be text"),
    (
      '{"question": "a", "choices": {"text": ["x", "y"], "label": ["A", "B"]}, "answerKey": "C"}',
      "must be one of A, B",
    ),
    ('{"sentence": "no blank", "option1": "a", "option2": "b", "answer": "1"}', "needs a _"),
    ("", "has no question"),
  ],
)
def test_a_line_that_cannot_be_scored_is_named(tmp_path, line, told):
  (tmp_path / "q.jsonl").write_text('{"ctx": "a", "endings": ["a", "b"], "label": 0}\n' * bool(line) + line + "\n")
  with pytest.raises(UserError) as e:
    read(tmp_path / "q.jsonl")
  assert told in str(e.value)
  assert not line or f"{tmp_path}/q.jsonl:2" in str(e.value)
  assert "\n" not in str(e.value)


def test_a_file_that_is_not_there_or_no_text_is_one_line(tmp_path):
  (tmp_path / "q.jsonl").write_bytes(b"\xff\xfe")
  for name, told in (("none.jsonl", "cannot be read"), ("q.jsonl", "not UTF-8")):
    with pytest.raises(UserError, match=told):
      read(tmp_path / name)


def test_the_answer_is_the_likeliest_by_sum_by_byte_or_by_token():
  questions = [
    Question((("ab", " c"), ("ab", " a long answer indeed"), ("ab", " mid")), 0),
    Question((("x", " yy"), ("q", " yy")), 1),
    Question((("", "one"), ("", "three")), 1),
  ]
  with small.use():
    model = Transformer(jax.random.key(3), small.varied(vocab=256))
    got = score(model, TOKENIZER, questions, max_length=64, prefix=(255,))
    right = {"accuracy": [], "accuracy_per_byte": []}
    for q in questions:
      rows = [([255, *(a + b).encode()], 1 + len(a)) for a, b in q.choices]
      totals = log_likelihoods(model, rows, max_length=64)
      right["accuracy"].append(np.argmax(totals) == q.answer)
      right["accuracy_per_byte"].append(np.argmax(totals / [len(b) for _, b in q.choices]) == q.answer)
  for name, values in right.items():
    assert got[name] == pytest.approx(np.mean(values)), name
  assert got["accuracy_per_token"] == got["accuracy_per_byte"]  # a token is a byte
  assert got["chance"] == pytest.approx((1 / 3 + 1 / 2 + 1 / 2) / 3)
  assert got["questions"] == 3


def test_without_normalisation_short_answers_win_and_by_byte_they_need_not():
  """An untrained model finds every byte about as likely: the sum prefers the short, the mean does not."""
  rng = np.random.default_rng(0)
  letters = lambda n: " " + "".join(rng.choice(list("abcdefgh"), n))
  questions = [Question((("q", letters(2)), ("q", letters(30))), 0) for _ in range(40)]
  with small.use():
    got = score(Transformer(jax.random.key(0), small.varied(vocab=256)), TOKENIZER, questions, max_length=64)
  assert got["accuracy"] == 1
  assert got["accuracy_per_byte"] < 0.9
