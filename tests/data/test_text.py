"""Corpora: what is read, how it is split, what happens to bad records."""

import dataclasses
import json
import logging
import os
from pathlib import Path
import subprocess
import sys
import sysconfig

import pytest

from research.data import text
from research.errors import UserError


@pytest.fixture(scope="module")
def stdlib():
  return text.read("stdlib")


@pytest.fixture
def folder(tmp_path):
  """A hundred small files, every one different."""
  for i in range(100):
    path = tmp_path / f"part{i % 3}" / f"{i}.txt"
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"Dokument {i}: grün\n")
  return tmp_path


def names(corpus):
  return [name for name, _ in corpus.documents]


def test_no_file_is_in_both_splits(stdlib):
  files = {split: {name.partition(text.PART)[0] for name in names(corpus)} for split, corpus in stdlib.items()}
  assert not files["train"] & files["validation"]
  contents = [data for corpus in stdlib.values() for _, data in corpus.documents]
  assert len(contents) == len(set(contents))
  assert b"" not in contents


def test_about_five_percent_is_for_validation(stdlib):
  size = {split: sum(len(data) for _, data in corpus.documents) for split, corpus in stdlib.items()}
  assert sum(size.values()) > 10e6
  assert 0.03 < size["validation"] / sum(size.values()) < 0.07


def test_the_stdlib_is_its_files_without_tests_packages_and_build_leftovers(stdlib):
  root = Path(sysconfig.get_paths()["stdlib"])
  for corpus in stdlib.values():
    for name, data in corpus.documents:
      assert not {"test", "tests", "idle_test", "site-packages", "__pycache__"} & set(name.split("/"))
      assert "sysconfigdata" not in name
      if text.PART not in name:
        assert data == (root / name).read_bytes()
  everything = names(stdlib["train"]) + names(stdlib["validation"])
  assert {"argparse.py", "asyncio/tasks.py", "json/decoder.py"} <= set(everything)


def test_each_pydoc_topic_is_a_document_of_its_own(stdlib):
  from pydoc_data.topics import topics

  documents = dict(stdlib["train"].documents) | dict(stdlib["validation"].documents)
  assert documents["pydoc_data/topics.py//lambda"].decode() == topics["lambda"]
  assert "pydoc_data/topics.py" not in documents


def test_the_content_is_the_one_pinned_for_this_python(stdlib):
  info = text.info("stdlib", stdlib)
  if info["python"] not in json.loads(text._KNOWN_STDLIB.read_text()):
    pytest.skip(f"no hash is pinned for Python {info['python']}")
  assert info["known"], info["sha256"]


def test_other_content_is_reported_as_not_known(stdlib):
  changed = stdlib | {"train": dataclasses.replace(stdlib["train"], sha256="0" * 64)}
  assert not text.info("stdlib", changed)["known"]


def test_another_process_reads_the_same(stdlib):
  code = "from research.data import text; print(*[c.sha256 for c in text.read('stdlib').values()])"
  env = os.environ | {"PYTHONHASHSEED": "12345"}
  out = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True).stdout
  assert out.split() == [stdlib[split].sha256 for split in text.SPLITS]


def test_the_order_of_creation_does_not_matter(folder, tmp_path_factory):
  other = tmp_path_factory.mktemp("other")
  for path in sorted(folder.rglob("*.txt"), reverse=True):
    copy = other / path.relative_to(folder)
    copy.parent.mkdir(exist_ok=True)
    copy.write_bytes(path.read_bytes())
  assert text.read(f"files:{folder}") == text.read(f"files:{other}")


def test_a_new_file_moves_no_other_to_another_split(folder):
  before = text.read(f"files:{folder}")
  for i in range(20):
    (folder / f"more{i}.md").write_text(f"# More {i}")
  after = text.read(f"files:{folder}")
  assert set(names(before["validation"])) <= set(names(after["validation"]))
  assert set(names(before["train"])) <= set(names(after["train"]))
  assert before != after


def test_the_hash_sees_names_and_contents(folder):
  def hashes():
    return {corpus.sha256 for corpus in text.read(f"files:{folder}").values()}

  before = hashes()
  (folder / "part0/0.txt").write_text("changed")
  changed = hashes()
  (folder / "part0/0.txt").rename(folder / "part0/renamed.txt")
  assert before != changed != hashes()


def test_duplicates_empty_hidden_and_other_files_are_left_out(folder):
  (folder / "zz.txt").write_bytes((folder / "part0/0.txt").read_bytes())
  (folder / "empty.txt").touch()
  (folder / ".hidden.txt").write_text("hidden")
  (folder / "image.png").write_bytes(b"\x89PNG")
  read = text.read(f"files:{folder}")
  assert sum(len(corpus.documents) for corpus in read.values()) == 100


def test_two_documents_are_enough_for_two_splits(tmp_path):
  (tmp_path / "a.txt").write_text("a")
  (tmp_path / "b#1.txt").write_text("b")
  read = text.read(f"files:{tmp_path}")
  assert [len(read[split].documents) for split in text.SPLITS] == [1, 1]


def test_bad_records_are_logged_counted_and_skipped(folder, caplog):
  (folder / "latin1.txt").write_bytes("grün".encode("latin-1"))
  (folder / "gone.txt").symlink_to(folder / "nowhere")
  with caplog.at_level(logging.WARNING):
    read = text.read(f"files:{folder}", max_bad_records=2)
  assert text.info("files", read)["bad_records"] == ["gone.txt", "latin1.txt"]
  assert sum(len(corpus.documents) for corpus in read.values()) == 100
  assert [m.split(":")[0] for m in caplog.messages] == ["skipped gone.txt", "skipped latin1.txt"]
  assert not any("\n" in m for m in caplog.messages)


def test_one_bad_record_too_many_names_the_file(folder):
  for i in range(3):
    (folder / f"bad{i}.txt").write_bytes(b"ok \xff")
  with pytest.raises(UserError, match=r"^max_bad_records=2: bad2\.txt is bad record number 3 .*0xff") as e:
    text.read(f"files:{folder}", max_bad_records=2)
  assert "\n" not in str(e.value)


@pytest.mark.parametrize(
  ("source", "told"),
  [
    ("wikipedia", "choose one of stdlib, files, tfds, shards"),
    ("stdlib:3.8", "takes no argument"),
    ("files:", "name a directory"),
    ("files:{}/missing", "no such directory"),
    ("files:{}", "holds no .txt, .md, .py, .jsonl or .parquet file"),
  ],
)
def test_a_wrong_source_is_told_in_a_line(source, told, tmp_path):
  source = source.format(tmp_path)
  with pytest.raises(UserError) as e:
    text.read(source)
  assert str(e.value).startswith(f"source={source}: ")
  assert told in str(e.value)
  assert "\n" not in str(e.value)


def test_one_document_is_too_few(tmp_path):
  (tmp_path / "a.txt").write_text("a")
  with pytest.raises(UserError, match="needs two documents"):
    text.read(f"files:{tmp_path}")
