"""Multiple-choice questions from .jsonl, scored by the likelihood of each answer."""

from collections.abc import Callable, Mapping
import dataclasses
import gzip
import json
import pathlib
from typing import Any

import numpy as np

from research.data import Tokenizer
from research.errors import UserError, check
from research.evals.likelihood import log_likelihoods
from research.models.decoder import Decoder


@dataclasses.dataclass(frozen=True)
class Question:
  """The choices are (context, continuation) pairs, of which the continuations are scored; `answer` is one's index."""

  choices: tuple[tuple[str, str], ...]
  answer: int


def read(path: str | pathlib.Path) -> list[Question]:
  """The questions of a .jsonl (or .jsonl.gz) file, one object a line, in one of `FORMATS`. Raises UserError."""
  questions = []
  try:
    with (gzip.open if str(path).endswith(".gz") else open)(path, "rt", encoding="utf-8") as file:
      for number, line in enumerate(file, 1):
        if line.strip():
          questions.append(_question(line, f"{path}:{number}"))
  except OSError as e:
    raise UserError("choices", path, f"cannot be read: {e.strerror or e}") from None
  except UnicodeDecodeError:
    raise UserError("choices", path, "is not UTF-8") from None
  check(bool(questions), "choices", path, "has no question")
  return questions


def score(
  model: Decoder, tokenizer: Tokenizer, questions: list[Question], *, max_length: int, prefix: tuple[int, ...] = ()
) -> dict[str, float]:
  """The share answered right, when the answer given is the one with the largest log-likelihood.

  accuracy: of the sum; accuracy_per_byte and accuracy_per_token: of the sum over the
  answer's UTF-8 bytes or tokens (Brown et al., 2020, section 2.4; by bytes it does not
  depend on the tokenizer). chance: of guessing. prefix: ids that begin every text.
  """
  rows, lengths = [], []
  for question in questions:
    for context, continuation in question.choices:
      before = [*prefix, *_ids(tokenizer, context)] or [tokenizer.eod]
      ids = [*prefix, *_ids(tokenizer, context + continuation)]
      # Encoding both at once may merge across the border: what the context alone would be is cut off.
      ids = before + (ids[len(before) :] if ids[: len(before)] == before else _ids(tokenizer, continuation))
      rows.append((ids, len(before)))
      lengths.append((len(continuation.encode()), len(ids) - len(before)))
  totals = log_likelihoods(model, rows, max_length=max_length)
  by_byte, by_token = (totals / np.array(column) for column in zip(*lengths, strict=True))
  right = {"accuracy": totals, "accuracy_per_byte": by_byte, "accuracy_per_token": by_token}
  ends = np.cumsum([len(q.choices) for q in questions])
  out = {}
  for name, values in right.items():
    best = [int(np.argmax(of_one)) for of_one in np.split(values, ends[:-1])]
    out[name] = float(np.mean([b == q.answer for b, q in zip(best, questions, strict=True)]))
  return out | {"chance": float(np.mean([1 / len(q.choices) for q in questions])), "questions": len(questions)}


def _ids(tokenizer: Tokenizer, text: str) -> list[int]:
  return [int(i) for i in tokenizer.encode(text.encode())] if text else []


def _endings(item: Mapping[str, Any], where: str) -> Question:
  context = item.get("ctx") or f"{item.get('ctx_a', '')} {str(item.get('ctx_b', '')).capitalize()}".strip()
  return _answers(context, item["endings"], item["label"], where)


def _lettered(item: Mapping[str, Any], where: str) -> Question:
  letters, texts = list(item["choices"]["label"]), item["choices"]["text"]
  key = str(item["answerKey"])
  check(key in letters, "choices", f"{where} answerKey={key}", f"must be one of {', '.join(letters)}")
  return _answers(item["question"], texts, letters.index(key), where)


def _goal(item: Mapping[str, Any], where: str) -> Question:
  return _answers(item["goal"], [item["sol1"], item["sol2"]], item["label"], where)


def _blank(item: Mapping[str, Any], where: str) -> Question:
  before, blank, after = item["sentence"].partition("_")
  check(blank == "_", "choices", f"{where} sentence", "needs a _ where the option goes")
  # What follows the blank is scored: the options differ in what it follows.
  choices = tuple((before + item[name], after) for name in ("option1", "option2"))
  check(str(item["answer"]) in ("1", "2"), "choices", f"{where} answer={item['answer']}", "must be 1 or 2")
  return Question(choices, int(item["answer"]) - 1)


def _plain(item: Mapping[str, Any], where: str) -> Question:
  context = next(item[name] for name in ("context", "query", "question", "prompt") if name in item)
  label = next(item[name] for name in ("label", "gold", "answer") if name in item)
  texts = item["choices"] if "choices" in item else item["options"]
  return _answers(context, texts, texts.index(label) if label in texts else label, where)


# name -> (the fields that tell it, how it is read): HellaSwag, ARC and OpenBookQA, PIQA, WinoGrande, anybody's own
FORMATS: dict[str, tuple[str, Callable]] = {
  "endings": ("ctx (or ctx_a, ctx_b), endings, label", _endings),
  "answerKey": ("question, choices {text, label}, answerKey", _lettered),
  "sol1": ("goal, sol1, sol2, label", _goal),
  "option1": ("sentence with a _, option1, option2, answer", _blank),
  "choices": ("context (or query, question, prompt), choices (or options), label (or gold, answer)", _plain),
  "options": ("context, options, label", _plain),
}


def _question(line: str, where: str) -> Question:
  try:
    item = json.loads(line)
  except ValueError as e:
    raise UserError("choices", where, f"is no JSON: {e}") from None
  check(isinstance(item, dict), "choices", where, "must be an object")
  format = next((name for name in FORMATS if name in item), None)
  known = "; or ".join(fields for name, (fields, _) in FORMATS.items() if name != "options")
  check(format is not None, "choices", f"{where} {', '.join(item)}", f"needs the fields {known}")
  fields, parse = FORMATS[format]
  try:
    return parse(item, where)
  except (KeyError, TypeError, ValueError, AttributeError, StopIteration):
    raise UserError("choices", where, f"does not have the fields {fields}") from None


def _answers(context: str, texts: list[str], label: Any, where: str) -> Question:
  """Answers that follow the context after a space. A label is an index, in digits or not."""
  check(isinstance(texts, list) and len(texts) >= 2, "choices", f"{where} {texts!r}", "needs two choices or more")
  check(all(isinstance(t, str) and t for t in texts), "choices", f"{where} {texts!r}", "each choice must be text")
  ok = not isinstance(label, bool) and str(label).isdecimal() and int(label) < len(texts)
  check(ok, "choices", f"{where} label={label!r}", f"must be an index, 0 .. {len(texts) - 1}")
  space = " " if context and not context[-1].isspace() else ""
  return Question(tuple((context, space + t) for t in texts), int(label))
