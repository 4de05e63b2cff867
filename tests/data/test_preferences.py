"""Rows of preferences: what is read, refused and cut, and the same order on any number of processes."""

import gzip
import json

import numpy as np
import pyarrow as pa
from pyarrow import parquet
import pytest

from research import data
from research.data import preferences, styles
from research.data.preferences import PreferenceConfig, pair
from research.errors import UserError

GOOD = [{"prompt": f"question {i}?", "chosen": f" yes {i}", "rejected": f" no {i}"} for i in range(40)]
TURNS = [{"role": "user", "content": "Why?"}]
say = lambda text: {"role": "assistant", "content": text}


def write(path, rows):
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  return path


def config(path, **changes):
  return PreferenceConfig(**({"source": f"files:{path}", "prompt_tokens": 16, "response_tokens": 8} | changes))


def text(ids, mask=None):
  ids = ids if mask is None else ids[mask > 0]
  return bytes(int(i) for i in ids if i != 255).decode()


@pytest.mark.parametrize(
  ("row", "found"),
  [
    ({"prompt": "Why? ", "chosen": "So.", "rejected": "No."}, ("Why? ", "So.", "No.")),
    (
      {"prompt": "Why?", "chosen": [*TURNS, say("So.")], "rejected": [*TURNS, say("No.")]},
      ("Human: Why?\n\nAssistant:", " So.", " No."),
    ),
    (
      {"prompt": TURNS, "chosen": [say("So.")], "rejected": [say("No.")]},
      ("Human: Why?\n\nAssistant:", " So.", " No."),
    ),
    ({"prompt": TURNS, "chosen": "So.", "rejected": "No."}, ("Human: Why?\n\nAssistant:", " So.", " No.")),
    (
      {"prompt": "Why?", "chosen": [say("So.")], "rejected": [say("No.")]},
      ("Human: Why?\n\nAssistant:", " So.", " No."),
    ),
    (
      {"chosen": [*TURNS, say("a"), *TURNS, say("So.")], "rejected": [*TURNS, say("a"), *TURNS, say("No.")]},
      ("Human: Why?\n\nAssistant: a\n\nHuman: Why?\n\nAssistant:", " So.", " No."),
    ),
    (
      {"chosen": "\n\nHuman: Why?\n\nAssistant: So.", "rejected": "\n\nHuman: Why?\n\nAssistant: No."},
      ("\n\nHuman: Why?\n\nAssistant:", " So.", " No."),
    ),
    ({"prompt": b"Why?", "chosen": b"So.", "rejected": b"No."}, ("Why?", "So.", "No.")),
    (
      {  # as TFDS has a sequence of features
        "chosen": {"role": np.array([b"user", b"assistant"], object), "content": np.array([b"Why?", b"So."], object)},
        "rejected": {"role": np.array([b"user", b"assistant"], object), "content": np.array([b"Why?", b"No."], object)},
      },
      ("Human: Why?\n\nAssistant:", " So.", " No."),
    ),
  ],
)
def test_strings_and_messages_are_read_as_the_public_sets_have_them(row, found):
  assert pair(row) == found


@pytest.mark.parametrize(
  ("change", "said"),
  [
    ({"chosen": None}, "has no chosen answer"),
    ({"rejected": None}, "has no rejected answer"),
    ({"chosen": []}, "has no chosen answer"),
    ({"chosen": " \n"}, "has an empty chosen answer"),
    ({"prompt": ""}, "has an empty prompt"),
    ({"prompt": None}, "has no prompt"),
    ({"chosen": " no 6"}, "has the same answer as chosen and rejected"),
    ({"chosen": 3}, "has int where text"),
    ({"chosen": [say("a")]}, "of another kind than the rejected"),
    ({"chosen": TURNS, "rejected": [say("a")]}, "whose last message is not the assistant's"),
    ({"chosen": [*TURNS, say("a")], "rejected": [say("b")]}, "answers to different prompts"),
    ({"chosen": [{"role": "robot", "content": "x"}], "rejected": [say("b")]}, "role robot"),
    ({"chosen": "\ud800"}, "surrogates not allowed"),
  ],
)
def test_a_row_that_is_no_preference_is_refused_by_its_number(tmp_path, change, said):
  rows = [dict(row) for row in GOOD]
  rows[6] |= change
  path = write(tmp_path / "pairs.jsonl", rows)
  with pytest.raises(UserError, match=f"pairs.jsonl:7 .*{said}"):
    preferences.load(config(path))
  passed = preferences.load(config(path, max_bad_records=1)).info()
  assert passed["bad_records"] == ["pairs.jsonl:7"]
  assert sum(passed["rows"].values()) == 39


def test_a_line_that_is_no_json_is_refused_by_its_number(tmp_path):
  path = write(tmp_path / "pairs.jsonl", GOOD)
  path.write_text(path.read_text() + "{\n")
  with pytest.raises(UserError, match="pairs.jsonl:41 is no JSON"):
    preferences.load(config(path))


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "parquet", "directory"])
def test_every_kind_of_file_has_the_same_rows(tmp_path, kind):
  plain = preferences.load(config(write(tmp_path / "pairs.jsonl", GOOD))).splits
  path = tmp_path / f"other.{kind}"
  if kind == "parquet":
    parquet.write_table(pa.Table.from_pylist(GOOD), path)
  elif kind == "directory":
    path.mkdir()
    write(path / "a.jsonl", GOOD[:20])
    write(path / "b.jsonl", GOOD[20:])
  else:
    path.write_bytes((gzip.compress if kind.endswith("gz") else bytes)((tmp_path / "pairs.jsonl").read_bytes()))
  found = preferences.load(config(path)).splits
  assert {split: rows.pairs for split, rows in found.items()} == {split: rows.pairs for split, rows in plain.items()}


def test_messages_of_parquet_and_other_names_of_fields_are_read(tmp_path):
  rows = [{"p": f"{i}?", "good": [say(f"a{i}")], "bad": [say(f"b{i}")]} for i in range(3)]
  parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "x.parquet")
  source = f"files:{tmp_path}/x.parquet?prompt=p&chosen=good&rejected=bad"
  found = preferences.load(PreferenceConfig(source=source)).splits
  assert ("Human: 1?\n\nAssistant:", " a1", " b1") in found["train"].pairs + found["validation"].pairs


def test_a_broken_file_and_a_wrong_source_are_told_in_a_line(tmp_path):
  (tmp_path / "x.parquet").write_bytes(b"no parquet at all")
  with pytest.raises(UserError, match="x.parquet cannot be read"):
    preferences.load(config(tmp_path / "x.parquet"))
  with pytest.raises(UserError, match="no such file or directory"):
    preferences.load(config(tmp_path / "absent"))
  with pytest.raises(UserError, match="holds, no .jsonl"):
    preferences.load(config(write(tmp_path / "pairs.txt", GOOD)))
  with pytest.raises(UserError, match="stop=7: the tokenizer bytes ends a document with 255"):
    preferences.load(PreferenceConfig(stop=7))


def test_a_prompt_keeps_its_end_and_an_answer_its_beginning(tmp_path):
  rows = [{"prompt": "0123456789" * 2 + c, "chosen": "abcdefgh", "rejected": "abc"} for c in "xy"]
  cfg = config(write(tmp_path / "pairs.jsonl", rows), prompt_tokens=6, response_tokens=8, begin=(1, 2))
  found = preferences.load(cfg)
  row = found.splits["train"][0]
  assert row["prompts"][:2].tolist() == [1, 2]
  assert text(row["prompts"][2:]) in ("789x", "789y")
  assert row["lengths"] == 6
  # eight tokens leave no room for the end: nobody learns to stop there
  assert row["responses"][0].tolist() == list(b"abcdefgh")
  assert row["mask"][0].all()
  assert row["responses"][1].tolist() == [*b"abc", 255, 0, 0, 0, 0]
  assert row["mask"][1].tolist() == [1, 1, 1, 1, 0, 0, 0, 0]
  assert found.info()["cut"] == {"train": {"prompts": 1, "responses": 1}, "validation": {"prompts": 1, "responses": 1}}


def test_short_prompts_are_padded_on_their_left(tmp_path):
  row = preferences.load(config(write(tmp_path / "pairs.jsonl", GOOD[:2]))).splits["train"][0]
  n = int(row["lengths"])
  assert text(row["prompts"][-n:]).startswith("question")
  assert not row["prompts"][:-n].any()


def test_all_pairs_of_a_prompt_are_in_one_split_and_more_rows_move_none(tmp_path):
  rows = [{**row, "chosen": f"{row['chosen']}{k}"} for row in GOOD for k in range(3)]
  few = preferences.load(config(write(tmp_path / "few.jsonl", rows))).splits
  more = [{**row, "prompt": row["prompt"] + "!"} for row in GOOD]
  many = preferences.load(config(write(tmp_path / "many.jsonl", rows + more))).splits
  prompts = {split: {p for p, _, _ in found.pairs} for split, found in few.items()}
  assert not prompts["train"] & prompts["validation"]
  assert set(few["train"].pairs) <= set(many["train"].pairs) | set(many["validation"].pairs)
  one = few["validation"].distinct(100)
  assert len(one) == len(prompts["validation"])


def test_batches_are_the_same_on_one_process_and_on_two_and_resume_where_they_were():
  rows = preferences.load(PreferenceConfig()).splits["train"]
  make = lambda shard: iter(data.batches(rows, 8, seed=3, shard=shard, train=True))
  whole, halves = make((0, 1)), [make((0, 2)), make((1, 2))]
  for _ in range(3):
    batch = next(whole)
    both = [next(half) for half in halves]
    for name, x in batch.items():
      np.testing.assert_array_equal(np.concatenate([b[name] for b in both]), x)
  state, after = whole.get_state(), next(whole)
  again = make((0, 1))
  again.set_state(state)
  np.testing.assert_array_equal(next(again)["responses"], after["responses"])
  shapes = preferences.abstract_rows(PreferenceConfig(), 8)
  assert {k: (x.shape, x.dtype) for k, x in after.items()} == {k: (x.shape, x.dtype) for k, x in shapes.items()}


def test_tools_find_the_tokenizer_of_preferences():
  assert data.load_tokenizer(PreferenceConfig()).name == "bytes"


def test_the_embedded_preferences_go_in_circles_and_every_row_fits():
  cycle = [styles.probability(a, False, b, False) for a, b, _ in styles.PAIRS]
  assert cycle == pytest.approx([0.9] * 3)
  for a in range(3):
    assert styles.probability(a, False, a, True) == pytest.approx(0.9)
    for b in range(3):
      assert styles.probability(a, True, b, False) + styles.probability(b, False, a, True) == pytest.approx(1)
  found = preferences.load(PreferenceConfig())
  assert found.info()["cut"] == {split: {"prompts": 0, "responses": 0} for split in ("train", "validation")}
  assert sum(found.info()["prompts"].values()) == 576
  # what was drawn is what the probabilities say
  ends = ".?!"
  wins = np.zeros((3, 3))
  for _, chosen, rejected in found.splits["train"].pairs:
    wins[ends.index(chosen[-1]), ends.index(rejected[-1])] += 1
  for a, b, _ in styles.PAIRS:
    assert 0.75 < wins[a, b] / (wins[a, b] + wins[b, a]) < 0.95
