"""The tool that writes shards: killed and continued it ends with the same bytes; mistakes are one line."""

import fcntl
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import tokenizers as hf

from research import data
from research.data import tokenizer
from research.errors import UserError
from research.tools import tokenize
from tests.data import every_source


@pytest.fixture
def run(monkeypatch):
  def run(*argv):
    monkeypatch.setattr(sys, "argv", ["tokenize", *argv])
    tokenize.main()

  return run


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
  monkeypatch.setenv("REPRISE_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def texts(tmp_path):
  return every_source.jsonl_gz(tmp_path)


def files(root):
  return {path.name: path.read_bytes() for path in root.iterdir()}


def test_killed_and_continued_the_result_is_the_same(tmp_path, run):
  arguments = ["--source=stdlib", "--tokenizer=bpe", "--bpe_vocab=512", "--shard_tokens=16384"]
  run(*arguments, f"--out={tmp_path / 'whole'}")
  out = tmp_path / "killed"
  command = [sys.executable, "-m", "research.tools.tokenize", *arguments, f"--out={out}"]
  process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
  while not (out / "train-00040.array_record").exists():
    assert process.poll() is None
    time.sleep(0.001)
  os.kill(process.pid, signal.SIGKILL)
  process.wait()
  begun = json.loads((out / "manifest.json").read_text())
  assert not begun["complete"]
  kept = (out / "train-00010.array_record").stat().st_mtime_ns
  with pytest.raises(UserError, match="is not finished; run research.tools.tokenize on it again"):
    data.load(data.TextConfig(source=(f"shards:{out}",)), 16, 0)
  run(*arguments, f"--out={out}")
  assert files(out) == files(tmp_path / "whole")
  assert (out / "train-00010.array_record").stat().st_mtime_ns == kept


def test_a_finished_directory_is_checked_and_left_as_it_is(tmp_path, run, texts, capsys):
  out = tmp_path / "out"
  arguments = [f"--source={texts}", "--tokenizer=bytes", "--shard_tokens=4096", f"--out={out}"]
  run(*arguments)
  before = files(out)
  run(*arguments)
  assert files(out) == before
  assert f"--config.data.source=shards:{out} --config.data.tokenizer=bytes" in capsys.readouterr().out
  shard = out / "train-00000.array_record"
  flipped = bytearray(shard.read_bytes())
  flipped[100] ^= 1
  shard.write_bytes(flipped)
  with pytest.raises(UserError, match="train-00000.array_record is missing or damaged"):
    run(*arguments)


def test_the_manifest_counts_and_names_what_was_read(tmp_path, run, texts):
  out = tmp_path / "out"
  (tmp_path / "more.jsonl").write_text('{"text": "one more"}\n{broken\n')
  run(f"--source={texts}", "--tokenizer=bytes", f"--out={out}")
  about = json.loads((out / "manifest.json").read_text())
  assert about["bad_records"] == ["more.jsonl:2"]
  assert about["settings"]["source"] == texts
  splits = about["splits"].values()
  whole = [*every_source.texts(seed=2), "one more"]
  assert sum(split["documents"] for split in splits) == len(whole)
  assert sum(split["bytes"] for split in splits) == sum(len(t.encode()) for t in whole)
  assert all(split["tokens"] == split["bytes"] + split["documents"] for split in splits)


@pytest.mark.parametrize(
  ("change", "told"),
  [
    ("--tokenizer=bytes", r"tokenizer=bytes \(was bpe\)"),
    ("--bpe_vocab=400", r"bpe_vocab=400 \(was 300\)"),
    ("--shard_tokens=8192", r"shard_tokens=8192 \(was 4096\)"),
    ("--source=stdlib", r"source=stdlib \(was files:"),
  ],
)
def test_other_settings_are_refused(tmp_path, run, texts, change, told):
  out = tmp_path / "out"
  arguments = [f"--source={texts}", "--tokenizer=bpe", "--bpe_vocab=300", "--shard_tokens=4096", f"--out={out}"]
  run(*arguments)
  before = files(out)
  with pytest.raises(UserError, match=rf"^out=.*holds shards made with other settings: .*{told}.*; use another --out$"):
    run(*arguments, change)
  assert files(out) == before


@pytest.mark.parametrize(
  ("arguments", "told"),
  [
    (["--tokenizer=words"], "tokenizer=words: choose bytes, bpe or hf:"),
    (["--tokenizer=hf:/nowhere.json"], "tokenizer=hf:/nowhere.json: cannot be read"),
    (["--shard_tokens=5000"], "shard_tokens=5000: use a multiple of 4096"),
    (["--source=files:/nowhere"], "source=files:/nowhere: there is no such directory"),
    (["--source=shards:x"], "source=shards:x: holds tokens"),
    (["--shards=1"], "command line="),
    (["--out=/proc/nowhere"], "out=/proc/nowhere: cannot be written"),
  ],
)
def test_mistakes_are_told_in_a_line(tmp_path, run, texts, arguments, told):
  with pytest.raises(UserError) as e:
    run(f"--source={texts}", "--tokenizer=bytes", f"--out={tmp_path / 'out'}", *arguments)
  assert str(e.value).startswith(told)
  assert "\n" not in str(e.value)


def test_a_hugging_face_tokenizer_is_kept_beside_the_shards_and_checked(tmp_path, run, texts):
  library = tokenizer.bpe(data.text.read(texts)["train"], 300)
  for name, eod in (("a", "<|endoftext|>"), ("b", "</s>")):
    copy = hf.Tokenizer.from_str(library.model)
    copy.add_special_tokens([eod])
    copy.save(str(tmp_path / f"{name}.json"))
  out = tmp_path / "out"
  run(f"--source={texts}", f"--tokenizer=hf:{tmp_path}/a.json", f"--out={out}")
  cfg = data.TextConfig(source=(f"shards:{out}",), tokenizer=f"hf:{out}/tokenizer.json")
  loaded = data.load(cfg, 16, 0)
  assert loaded.tokenizer.vocab == 300
  assert loaded.info()["bytes_per_token"]["train"] > 2
  with pytest.raises(UserError, match="was written with hf of 300 ids, sha256 .*; use that"):
    data.load(data.TextConfig(source=cfg.source, tokenizer=f"hf:{tmp_path}/b.json"), 16, 0)
  (tmp_path / "a.json").write_bytes((tmp_path / "b.json").read_bytes())
  with pytest.raises(UserError, match="is not the one that the shards in .* were written with"):
    run(f"--source={texts}", f"--tokenizer=hf:{tmp_path}/a.json", f"--out={out}")


def test_two_writers_do_not_share_a_directory(tmp_path, run, texts):
  out = tmp_path / "out"
  out.mkdir()
  with (out / ".lock").open("w") as lock:
    fcntl.flock(lock, fcntl.LOCK_EX)
    with pytest.raises(UserError, match="another process is writing there"):
      run(f"--source={texts}", "--tokenizer=bytes", f"--out={out}")


def test_only_people_see_a_progress_bar_and_a_mistake_ends_with_status_2(tmp_path, texts):
  command = [sys.executable, "-m", "research.tools.tokenize", "--tokenizer=bytes", f"--out={tmp_path / 'out'}"]
  done = subprocess.run([*command, f"--source={texts}"], capture_output=True, text=True, check=True)
  assert done.stderr == ""
  wrong = subprocess.run([*command, "--source=files:/nowhere"], capture_output=True, text=True, check=False)
  assert (wrong.returncode, wrong.stderr.count("\n")) == (2, 1)


def test_a_row_of_a_long_document_reads_two_records_of_it_at_most(tmp_path, run):
  line = b"a long line of text\n"
  (tmp_path / "long.txt").write_bytes(line * 50_000)
  (tmp_path / "short.txt").write_text("short")
  out = tmp_path / "out"
  run(f"--source=files:{tmp_path}", "--tokenizer=bytes", "--shard_tokens=65536", f"--out={out}")
  loaded = data.load(data.TextConfig(source=(f"shards:{out}",)), 4, 0)
  rows = max((loaded.split(split) for split in ("train", "validation")), key=len)
  assert rows.positions == 1_000_001
  np.testing.assert_array_equal(rows[125_000]["targets"], list(line[:4]))
  assert len(rows._records._readers) == 1
