"""Tokenizers lose nothing, and the cache of learnt ones is never trusted blindly."""

import hashlib
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import tokenizers as hf

from research.data import text, tokenizer
from research.data.packing import PackedDocuments
from research.errors import UserError

WORDS = [
  "def",
  "return",
  "import",
  "tokens",
  "window",
  "the",
  "of",
  "and",
  "a",
  "positions",
  "of",
  "segments:",
  "naïve",
  "grün",
  "数据",
  "😀",
]
TEXTS = [
  "",
  "plain ASCII\n",
  "\r\n\ttabs  and   runs of spaces   ",
  "é e\u0301 ß 日本語 עברית 👩\u200d👩\u200d👧 \U0010ffff",
  "\x00\x01\x7f\x80\u00ad\ufeff\ufffd",
  "<eod> <|endoftext|> Ġ Ċ",
]


def corpus(seed=0):
  rng = np.random.default_rng(seed)
  documents = tuple((f"{i}.txt", " ".join(rng.choice(WORDS, 200)).encode()) for i in range(20))
  return text.Corpus(documents, hashlib.sha256(repr(documents).encode()).hexdigest(), ())


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
  monkeypatch.setenv("REPRISE_CACHE", str(tmp_path / "cache"))
  return tmp_path / "cache"


@pytest.fixture(params=["bytes", "bpe"])
def any_tokenizer(request, cache):
  return tokenizer.byte_level() if request.param == "bytes" else tokenizer.bpe(corpus(), 400)


@pytest.mark.parametrize("string", TEXTS)
def test_decoding_gives_back_every_byte(any_tokenizer, string):
  ids = any_tokenizer.encode(string.encode())
  assert ids.dtype == np.int32
  assert any_tokenizer.decode(ids) == string.encode()


def test_no_text_can_end_a_document(any_tokenizer):
  ids = np.concatenate(any_tokenizer.encode_batch([t.encode() for t in TEXTS]))
  assert (ids < any_tokenizer.eod).all()
  assert any_tokenizer.eod == any_tokenizer.vocab - 1
  assert any_tokenizer.decode([any_tokenizer.eod]) == b""


def test_a_batch_is_encoded_as_its_documents_are(any_tokenizer):
  documents = [data for _, data in corpus(3).documents] * 20  # more than are encoded at once
  for ids, document in zip(any_tokenizer.encode_batch(documents), documents, strict=True):
    np.testing.assert_array_equal(ids, any_tokenizer.encode(document))


def test_a_cut_inside_a_character_decodes_to_its_bytes(any_tokenizer):
  ids = any_tokenizer.encode("\U0010fffe".encode())
  assert len(ids) == 4
  assert any_tokenizer.decode(ids[:2]) == "\U0010fffe".encode()[:2]


def test_bpe_needs_fewer_tokens_than_bytes():
  data = corpus(1).documents[0][1]
  assert len(tokenizer.bpe(corpus(), 400).encode(data)) < len(data) / 2


def test_a_small_corpus_does_not_shrink_the_vocabulary():
  tiny = text.Corpus((("a", b"ab ab ab"),), "0" * 64, ())
  learnt = tokenizer.bpe(tiny, 1000)
  assert (learnt.vocab, learnt.eod) == (1000, 999)
  assert learnt.decode([998]) == b""


def test_another_process_learns_the_same(tmp_path):
  here = tokenizer.bpe(corpus(), 400).sha256
  code = "import test_tokenizer as t; print(t.tokenizer.bpe(t.corpus(), 400).sha256)"
  env = os.environ | {"PYTHONHASHSEED": "7", "RAYON_NUM_THREADS": "1", "REPRISE_CACHE": str(tmp_path / "elsewhere")}
  env["PYTHONPATH"] = os.pathsep.join([os.path.dirname(__file__), os.getcwd()])
  out = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True).stdout
  assert out.split() == [here]


def test_what_was_learnt_is_kept_and_used(cache):
  first = tokenizer.bpe(corpus(), 400)
  (path,) = cache.iterdir()  # nothing but the finished file
  other = tokenizer.bpe(corpus(1), 300)
  (other_path,) = set(cache.iterdir()) - {path}
  path.write_bytes(other_path.read_bytes())  # only somebody who reads the file can notice
  assert tokenizer.bpe(corpus(), 400).sha256 not in (first.sha256, other.sha256)


def test_the_key_is_the_corpus_and_the_size(cache):
  hashes = {tokenizer.bpe(corpus(seed), vocab).sha256 for seed, vocab in [(0, 400), (1, 400), (0, 300)]}
  assert len(hashes) == 3
  assert len(list(cache.iterdir())) == 3


def damages(good: str) -> dict[str, str]:
  entry = json.loads(good)
  return {
    "empty": "",
    "cut": good[: len(good) // 2],
    "list": "[]",
    "no model": json.dumps({"sha256": entry["sha256"]}),
    "model of another type": json.dumps(entry | {"model": 3}),
    "a changed letter": json.dumps(entry | {"model": entry["model"].replace("tokens", "takens", 1)}),
  }


@pytest.mark.parametrize("damage", ["empty", "cut", "list", "no model", "model of another type", "a changed letter"])
def test_a_damaged_cache_is_learnt_again_and_repaired(cache, damage, caplog):
  learnt = tokenizer.bpe(corpus(), 400).sha256
  (path,) = cache.iterdir()
  good = path.read_text()
  bad = damages(good)[damage]
  assert bad != good
  path.write_text(bad)
  assert tokenizer.bpe(corpus(), 400).sha256 == learnt
  assert path.read_text() == good
  assert "is damaged" in caplog.text


def test_a_cache_that_cannot_be_written_is_no_obstacle(tmp_path, monkeypatch, caplog):
  (tmp_path / "file").touch()
  monkeypatch.setenv("REPRISE_CACHE", str(tmp_path / "file"))
  assert tokenizer.bpe(corpus(), 400).decode(tokenizer.bpe(corpus(), 400).encode(b"abc")) == b"abc"
  assert "not kept" in caplog.text


def hf_file(path, learnt, specials=("<s>", "<|endoftext|>")):
  """A tokenizer.json as published models have it: byte-level, special tokens, and settings to be ignored."""
  library = hf.Tokenizer.from_str(learnt.model)
  library.add_special_tokens(list(specials))
  library.enable_truncation(5)
  library.enable_padding(length=5)
  library.save(str(path))
  return library


def test_a_hugging_face_file_is_read_as_it_is(tmp_path):
  library = hf_file(tmp_path / "tokenizer.json", tokenizer.bpe(corpus(), 400))
  read = tokenizer.hugging_face(f"{tmp_path}/tokenizer.json")
  assert read.vocab == library.get_vocab_size()
  assert read.eod == library.token_to_id("<|endoftext|>")
  library.no_truncation()
  library.no_padding()
  plain = "grün tokens window"
  assert read.encode(plain.encode()).tolist() == library.encode(plain).ids
  for string in TEXTS:
    ids = read.encode(string.encode())
    assert read.decode(ids) == string.encode()
    assert read.eod not in ids
  assert read.decode([read.eod]) == b""


def test_the_end_token_of_a_hugging_face_file_can_be_named(tmp_path):
  library = hf_file(tmp_path / "t.json", tokenizer.bpe(corpus(), 400), ("<s>", "<|im_end|>"))
  with pytest.raises(UserError, match=r"^tokenizer=hf:.*has none of .*; name the token .*\?eod=TOKEN$"):
    tokenizer.hugging_face(f"{tmp_path}/t.json")
  with pytest.raises(UserError, match=r"has no token </x>"):
    tokenizer.hugging_face(f"{tmp_path}/t.json?eod=</x>")
  named = tokenizer.hugging_face(f"{tmp_path}/t.json?eod=<|im_end|>")
  assert named.eod == library.token_to_id("<|im_end|>")
  assert named.sha256 != tokenizer.hugging_face(f"{tmp_path}/t.json?eod=<s>").sha256


def test_a_hugging_face_file_that_is_not_byte_level_decodes_to_text(tmp_path):
  library = hf.Tokenizer(hf.models.WordLevel({"the": 0, "window": 1, "</s>": 2, "?": 3}, unk_token="?"))
  library.pre_tokenizer = hf.pre_tokenizers.WhitespaceSplit()
  library.save(str(tmp_path / "t.json"))
  read = tokenizer.hugging_face(f"{tmp_path}/t.json")
  assert read.decode(read.encode(b"the window")) == b"the window"
  with pytest.raises(UserError, match="a document's text encodes to the token that ends documents"):
    read.encode(b"the </s> window")


@pytest.mark.parametrize(("content", "told"), [(None, "cannot be read"), ("{}", "is no tokenizer.json"), ("", "is no")])
def test_a_wrong_hugging_face_file_is_told_in_a_line(tmp_path, content, told):
  if content is not None:
    (tmp_path / "t.json").write_text(content)
  with pytest.raises(UserError, match=told) as e:
    tokenizer.hugging_face(f"{tmp_path}/t.json")
  assert "\n" not in str(e.value)


def test_an_end_token_with_a_small_id_does_not_narrow_the_others():
  packed = PackedDocuments([np.array([70_000, 3])], 3, 2, drop_last=False)
  assert packed[0]["targets"].tolist() == [70_000, 3, 2]
