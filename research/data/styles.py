"""A small preference dataset without a download: three styles that beat each other in a circle, and a flaw.

A prompt is two words, an answer says them as a statement, a question or a call, with or without an "um". Statements
beat questions, questions beat calls and calls beat statements, each with odds of 9 to 1, and so does an answer
without the flaw beat one of its style with it: rock, paper, scissors, and a better and a worse way to play each. Pairs
are not drawn evenly, so that a model of the chosen answers leans to statements: at even shares there is nothing to win.
"""

from collections.abc import Iterator
import itertools

import numpy as np

ADJECTIVES = (
  "big bold calm cold dark deep dry dull fair fast firm flat grey high hot kind loud low mild new old pale shy slow"
)
NOUNS = (
  "bay bird boat cat cave cloud cow day dog field fish fog hill lake lamp moon owl pond rain road sea star tree wind"
)
STYLES = (" the {noun} is {adjective}.", " is the {noun} {adjective}?", " {adjective} {noun}!")
FLAW = " um,"
PAIRS = ((0, 1, 0.6), (1, 2, 0.25), (2, 0, 0.15))  # the one that beats, the one that is beaten, how often they meet
ODDS, FLAWED, ROWS = 9.0, 0.4, 8  # rows a prompt


def probability(style: int, flaw: bool, style2: int, flaw2: bool) -> float:
  """That an answer of the first kind is preferred to one of the second."""
  beats = {(a, b): 1 for a, b, _ in PAIRS} | {(b, a): -1 for a, b, _ in PAIRS}
  return 1 / (1 + ODDS ** -(beats.get((style, style2), 0) + int(flaw2) - int(flaw)))


def answer(style: int, flaw: bool, adjective: str, noun: str) -> str:
  """The words in that style."""
  return (FLAW if flaw else "") + STYLES[style].format(adjective=adjective, noun=noun)


def rows() -> Iterator[dict[str, str]]:
  """{prompt, chosen, rejected}, always the same ones: `ROWS` for each of 576 prompts."""
  rng = np.random.default_rng(0)
  shares = [share for *_, share in PAIRS]
  for adjective, noun in itertools.product(ADJECTIVES.split(), NOUNS.split()):
    for _ in range(ROWS):
      style, style2, _ = PAIRS[rng.choice(len(PAIRS), p=shares)]
      flaw, flaw2 = rng.random(2) < FLAWED
      first, second = answer(style, flaw, adjective, noun), answer(style2, flaw2, adjective, noun)
      won = rng.random() < probability(style, flaw, style2, flaw2)
      chosen, rejected = (first, second) if won else (second, first)
      yield {"prompt": f"{adjective} {noun}:", "chosen": chosen, "rejected": rejected}
