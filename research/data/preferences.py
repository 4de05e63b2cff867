"""Preferences as rows: a prompt, the answer that was chosen, and the one that was not.

A row of data is {prompt, chosen, rejected}, of strings or of chat messages, as the public sets have them:

  strings                   taken as they are; without a prompt, what two dialogues share up to the last "Assistant:"
  lists of messages         {role, content}, the last one the assistant's; those before it, or `prompt`, are the prompt

Messages are written "Human: ...\\n\\nAssistant: ..." (as in Bai et al., 2022, arXiv 2204.05862), in plain text: the
special tokens of a published chat model are not used.

A row that lacks an answer, has an empty one or the same one twice is an error that names the row; `max_bad_records`
lets so many pass, and names them in the manifest. Nothing is trained before all rows have been read.

Truncation: a prompt of more than `prompt_tokens` loses tokens at its front, behind `begin`; an answer that does not
fit into `response_tokens` with its end loses tokens at its end, and the end, so that nobody learns to stop there.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
import dataclasses
import functools
import hashlib
import json
from pathlib import Path
from typing import Any

import jax
from jax import numpy as jnp
import numpy as np

from research.data import sources, styles
from research.data import tokenizer as tokenizers
from research.data.text import SPLITS
from research.data.tokenizer import Tokenizer
from research.errors import UserError, check, one_line

FIELDS = ("prompt", "chosen", "rejected")
ROLES = {"user": "Human", "human": "Human", "assistant": "Assistant", "system": "System"}
VALIDATION_FRACTION = {"styles": 0.25}  # of the prompts
_VALIDATION_FRACTION = 0.05
_TURN = "\n\nAssistant:"

Pair = tuple[str, str, str]  # prompt, chosen, rejected


@dataclasses.dataclass(frozen=True)
class PreferenceConfig:
  """Which preferences, and how they become tokens."""

  source: str = "styles"  # styles, files:PATH or tfds:NAME, with ?prompt=, ?chosen= and ?rejected= for other fields
  tokenizer: str = "bytes"  # bytes, or hf:PATH/tokenizer.json
  stop: int = 255  # the id that ends a response: the tokenizer's end of a document
  begin: tuple[int, ...] = ()  # ids that begin every prompt
  prompt_tokens: int = 12  # `begin` included
  response_tokens: int = 24  # the end included
  max_bad_records: int = 0  # skipped and reported; one more is an error

  def __post_init__(self):
    known = self.tokenizer == "bytes" or self.tokenizer.startswith("hf:")
    check(known, "tokenizer", self.tokenizer, "choose bytes or hf:PATH/tokenizer.json")
    room = len(self.begin) + 1
    check(self.prompt_tokens >= room, "prompt_tokens", self.prompt_tokens, f"use at least {room}")
    check(self.response_tokens >= 1, "response_tokens", self.response_tokens, "use at least 1")
    check(self.max_bad_records >= 0, "max_bad_records", self.max_bad_records, "use 0 or more")

  @property
  def length(self) -> int:
    """Tokens of a prompt and its response."""
    return self.prompt_tokens + self.response_tokens


class Preferences:
  """Random access to the rows of one split.

  prompts: int32 [prompt_tokens], padded on the left; lengths: int32, how many are no padding. responses: int32
  [2, response_tokens], the chosen one first; mask: float32, 1 up to a response's end. weights: 1, and 0 in the rows
  that fill up a batch.
  """

  def __init__(self, pairs: Sequence[Pair], cfg: PreferenceConfig, tokenizer: Tokenizer):
    self.pairs, self.cfg, self._tokenizer = pairs, cfg, tokenizer
    encode = lambda i: tokenizer.encode_batch([pair[i].encode() for pair in pairs])
    self._prompts, self._answers = encode(0), (encode(1), encode(2))

  def __len__(self) -> int:
    return len(self.pairs)

  def __getitem__(self, i: int) -> dict[str, np.ndarray]:
    prompt, length = self._prompt(self._prompts[i])
    responses = [self._response(ids[i]) for ids in self._answers]
    tokens, mask = (np.stack(x) for x in zip(*responses, strict=True))
    row = {"prompts": prompt, "lengths": np.int32(length), "responses": tokens, "mask": mask}
    return row | {"weights": np.float32(1)}

  def distinct(self, most: int) -> "Preferences":
    """The first row of each prompt, of at most so many prompts."""
    rows = dict.fromkeys(prompt for prompt, _, _ in self.pairs)
    first = {row[0]: row for row in reversed(self.pairs)}
    return Preferences([first[prompt] for prompt in list(rows)[:most]], self.cfg, self._tokenizer)

  def cut(self) -> dict[str, int]:
    """How many prompts and responses are longer than there is room for."""
    room = self.cfg.prompt_tokens - len(self.cfg.begin)
    responses = sum(len(ids) >= self.cfg.response_tokens for answers in self._answers for ids in answers)
    return {"prompts": sum(len(ids) > room for ids in self._prompts), "responses": responses}

  def _prompt(self, ids: np.ndarray) -> tuple[np.ndarray, int]:
    cfg = self.cfg
    ids = np.concatenate([np.array(cfg.begin, np.int32), ids[-(cfg.prompt_tokens - len(cfg.begin)) :]])
    out = np.zeros(cfg.prompt_tokens, np.int32)
    out[cfg.prompt_tokens - len(ids) :] = ids
    return out, len(ids)

  def _response(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    ids = np.append(ids, np.int32(self.cfg.stop))[: self.cfg.response_tokens]
    out, mask = np.zeros(self.cfg.response_tokens, np.int32), np.zeros(self.cfg.response_tokens, np.float32)
    out[: len(ids)], mask[: len(ids)] = ids, 1
    return out, mask


@dataclasses.dataclass(frozen=True)
class PreferenceData:
  """Both splits: no prompt is in both."""

  tokenizer: Tokenizer
  splits: Mapping[str, Preferences]
  cfg: PreferenceConfig
  bad: tuple[str, ...]

  def info(self) -> dict:
    """For the manifest: what was read, cut and skipped."""
    of_each = lambda f: {split: f(rows) for split, rows in self.splits.items()}
    about = self.tokenizer
    return {
      "source": self.cfg.source,
      "rows": of_each(len),
      "prompts": of_each(lambda rows: len({prompt for prompt, _, _ in rows.pairs})),
      "cut": of_each(Preferences.cut),
      "sha256": of_each(lambda rows: hashlib.sha256(json.dumps(rows.pairs).encode()).hexdigest()),
      "bad_records": list(self.bad),
      "tokenizer": {"name": about.name, "vocab": about.vocab, "sha256": about.sha256},
    }


@functools.lru_cache(maxsize=2)
def load(cfg: PreferenceConfig) -> PreferenceData:
  """All rows of `cfg`, tokenized: once for all arms and seeds of a command.

  A TFDS dataset's own validation or test split is held out; else the hash of a prompt decides, so that all pairs of a
  prompt are on one side, and if none falls into validation, the prompt with the smallest does. Raises UserError.
  """
  kind, argument, options = sources.parse(cfg.source, KINDS)
  limit = int(VALIDATION_FRACTION.get(kind, _VALIDATION_FRACTION) * 2**64).to_bytes(8, "big")
  found, bad = [], []
  for name, read, split in KINDS[kind][0](cfg.source, argument, **options):
    try:
      prompt, chosen, rejected = pair(read())
    except sources.BAD as e:
      bad.append(name)
      fix = f"{name} {one_line(e)}; repair or remove the row, or raise max_bad_records={cfg.max_bad_records}"
      check(len(bad) <= cfg.max_bad_records, "source", cfg.source, fix)
      continue
    found.append((split, hashlib.sha256(prompt.encode()).digest()[:8], (prompt, chosen, rejected)))
  undecided = [key for split, key, _ in found if split is None]
  limit = max(limit, min(undecided) + b"\x00") if undecided else limit
  splits = {name: [] for name in SPLITS}
  for split, key, row in found:
    splits[split or SPLITS[key < limit]].append(row)
  for name, rows in splits.items():
    check(len(rows) > 0, "source", cfg.source, f"has no row for {name}: at least two different prompts are needed")
  tokenizer = load_tokenizer(cfg)
  return PreferenceData(tokenizer, {k: Preferences(v, cfg, tokenizer) for k, v in splits.items()}, cfg, tuple(bad))


def load_tokenizer(cfg: PreferenceConfig) -> Tokenizer:
  """That of `cfg`. Raises UserError unless `stop` is what ends its documents."""
  named = cfg.tokenizer.removeprefix("hf:")
  found = tokenizers.byte_level() if cfg.tokenizer == "bytes" else tokenizers.hugging_face(named)
  fix = f"the tokenizer {cfg.tokenizer} ends a document with {found.eod}; use that, or name another with ?eod=TOKEN"
  check(found.eod == cfg.stop, "stop", cfg.stop, fix)
  return found


def abstract_rows(cfg: PreferenceConfig, batch: int) -> dict[str, jax.ShapeDtypeStruct]:
  """The shapes of a batch of rows; reads nothing."""
  shapes = {
    "prompts": ((cfg.prompt_tokens,), jnp.int32),
    "lengths": ((), jnp.int32),
    "responses": ((2, cfg.response_tokens), jnp.int32),
    "mask": ((2, cfg.response_tokens), jnp.float32),
    "weights": ((), jnp.float32),
  }
  return {name: jax.ShapeDtypeStruct((batch, *shape), dtype) for name, (shape, dtype) in shapes.items()}


def pair(row: Any) -> Pair:
  """(prompt, chosen, rejected) in plain text of a row as the public sets have it. Raises ValueError."""
  if not isinstance(row, Mapping):
    raise ValueError("is no object with prompt, chosen and rejected")
  prompt, chosen, rejected = (_plain(row.get(name)) for name in FIELDS)
  for name, value in (("chosen", chosen), ("rejected", rejected)):
    if value is None or value == []:
      raise ValueError(f"has no {name} answer")
  if isinstance(chosen, list) != isinstance(rejected, list):
    raise ValueError("has a chosen answer of another kind than the rejected one")
  if isinstance(chosen, list):
    prompt, chosen, rejected = _chat(prompt, chosen, rejected)
  elif prompt is None:
    prompt, chosen, rejected = _dialogue(chosen, rejected)
  elif isinstance(prompt, list):
    prompt, chosen, rejected = _written(prompt), " " + chosen, " " + rejected
  for name, value in (("prompt", prompt), ("chosen answer", chosen), ("rejected answer", rejected)):
    if not value.strip():
      raise ValueError(f"has an empty {name}")
    value.encode()  # JSON can spell what is no text: a UnicodeError is a ValueError
  if chosen == rejected:
    raise ValueError("has the same answer as chosen and rejected")
  return prompt, chosen, rejected


def _chat(prompt, chosen: list, rejected: list) -> Pair:
  (before, first), (before2, second) = _last(chosen, "chosen"), _last(rejected, "rejected")
  if before != before2:
    raise ValueError("has chosen and rejected answers to different prompts")
  if isinstance(prompt, str):
    prompt = [{"role": "user", "content": prompt}]
  if not before:
    before = prompt or []
  elif isinstance(prompt, list) and before[: len(prompt)] != prompt and before[-len(prompt) :] != prompt:
    raise ValueError("has answers whose first messages are not the prompt")
  return _written(before), " " + first, " " + second


def _last(messages: list, name: str) -> tuple[list, str]:
  role, content = _message(messages[-1])
  if role != "Assistant":
    raise ValueError(f"has a {name} answer whose last message is not the assistant's")
  return messages[:-1], content


def _message(message: Any) -> tuple[str, str]:
  if not isinstance(message, Mapping) or not all(isinstance(message.get(k), str) for k in ("role", "content")):
    raise ValueError("has a message without role and content")
  role = ROLES.get(message["role"].lower())
  if role is None:
    raise ValueError(f"has a message of role {message['role']}; known are {', '.join(ROLES)}")
  return role, message["content"]


def _written(messages: list) -> str:
  if not messages:
    return ""
  return "".join(f"\n\n{role}: {content}" for role, content in map(_message, messages)).lstrip("\n") + _TURN


def _dialogue(chosen: str, rejected: str) -> Pair:
  (before, turn, first), (before2, _, second) = chosen.rpartition(_TURN), rejected.rpartition(_TURN)
  if not turn or before != before2:
    raise ValueError(f"has no prompt, and its answers share none up to a last {_TURN.strip()}")
  return before + turn, first, second


def _plain(value: Any) -> Any:
  """Strings for bytes, and a list of messages for the columns of them that TFDS makes."""
  if isinstance(value, bytes):
    return value.decode("utf-8")
  if isinstance(value, np.ndarray):
    value = value.tolist()
  if isinstance(value, Mapping) and {"role", "content"} <= value.keys():
    columns = [_plain(value[k]) for k in ("role", "content")]
    return [{"role": _plain(r), "content": _plain(c)} for r, c in zip(*columns, strict=True)]
  if isinstance(value, list):
    return [dict(m) if isinstance(m, Mapping) else _plain(m) for m in value]
  if value is not None and not isinstance(value, str):
    raise ValueError(f"has {type(value).__name__} where text or a list of messages is expected")
  return value


Records = Iterator[tuple[str, Callable[[], Any], str | None]]  # name, what reads the row, its split or None


def _styles(source: str, argument: str) -> Records:
  check(not argument, "source", source, "styles takes no argument; write source=styles")
  for i, row in enumerate(styles.rows(), 1):
    yield f"row {i}", functools.partial(dict, row), None


def _files(source: str, argument: str, **names: str) -> Records:
  check(argument != "", "source", source, "name a file or a directory, as in source=files:DIR")
  root, kinds = Path(argument).expanduser(), (".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")
  check(root.exists(), "source", source, "there is no such file or directory")
  found = sources.find(root, kinds) if root.is_dir() else [(root.name, root)]
  told = f"{', '.join(kinds[:-1])} or {kinds[-1]}"
  check(bool(found) and found[0][0].endswith(kinds), "source", source, f"is, or holds, no {told} file")
  for name, path in found:
    read = _parquet if name.endswith(".parquet") else _jsonl
    try:
      for number, row in read(path):
        yield f"{name}:{number}", functools.partial(_named, row, names), None
    except sources.BAD as e:  # the file, not a row of it
      raise UserError("source", source, f"{name} cannot be read: {one_line(e)}") from None


def _jsonl(path: Path) -> Iterator[tuple[int, Callable[[], Any]]]:
  with sources.open_file(path) as lines:
    for number, line in enumerate(lines, 1):
      if not line.isspace():
        yield number, functools.partial(_json, line)


def _json(line: bytes) -> Any:
  try:
    return json.loads(line)
  except (ValueError, RecursionError):
    raise ValueError("is no JSON") from None


def _parquet(path: Path) -> Iterator[tuple[int, Callable[[], Any]]]:
  from pyarrow import parquet

  with parquet.ParquetFile(path) as table:
    rows = (row for batch in table.iter_batches(batch_size=256) for row in batch.to_pylist())
    for number, row in enumerate(rows, 1):
      yield number, functools.partial(dict, row)


def _tfds(source: str, argument: str, split: str = "train", dir: str = "", **names: str) -> Records:
  asked = [names.get(name, name) for name in FIELDS if name != "prompt" or name in names]
  name, found = sources.tfds_splits(source, argument, asked, split, dir)

  def read(rows, i):
    try:
      return rows[i]
    except RuntimeError as e:  # a record that fails the checksum of its format
      raise ValueError(f"cannot be read: {one_line(e)}") from e

  for of, part, rows in found:
    for i in range(len(rows)):
      yield f"{name}/{of}:{i}", functools.partial(_named, functools.partial(read, rows, i), names), part


def _named(read: Callable[[], Any], names: Mapping[str, str]) -> Any:
  """The row with its fields under the names that are asked for."""
  row = read()
  return row if not isinstance(row, Mapping) else {name: row.get(names.get(name, name)) for name in FIELDS}


# By kind: the function of (source, argument, **options), and the options it takes.
KINDS = {
  "styles": (_styles, ()),
  "files": (_files, FIELDS),
  "tfds": (_tfds, (*FIELDS, "split", "dir")),
}
