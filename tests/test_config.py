"""Configs: typed by the dataclass, shrunk by one function, expanded into arms and seeds."""

import dataclasses
from typing import Literal

import pytest

from experiments.kvshift.experiment import Config
from research import config
from research.errors import UserError
from research.models.transformer import TransformerConfig


@dataclasses.dataclass(frozen=True)
class Inner:
  size: int = 3
  kind: Literal["a", "b"] = "a"


@dataclasses.dataclass(frozen=True)
class Outer:
  rate: float = 0.1
  on: bool = False
  sizes: tuple[int, ...] = (1, 2)
  name: str = ""
  inner: Inner = Inner()


@pytest.mark.parametrize(
  ("override", "path", "value"),
  [
    ("rate=3e-4", "rate", 3e-4),
    ("rate=1", "rate", 1.0),
    ("on=true", "on", True),
    ("on=0", "on", False),
    ("sizes=4", "sizes", (4,)),
    ("sizes=4,5,6", "sizes", (4, 5, 6)),
    ("sizes=(4, 5)", "sizes", (4, 5)),
    ("sizes=", "sizes", ()),
    ("name=a=b,c", "name", "a=b,c"),
    ("inner.size=-7", "inner.size", -7),
    ("inner.kind=b", "inner.kind", "b"),
  ],
)
def test_a_value_is_read_by_the_type_of_its_field(override, path, value):
  cfg = config.freeze(Outer, config.override(config.defaults(Outer), Outer, [override]))
  got = config.flat(cfg)[path]
  assert got == value
  assert type(got) is type(value)


@pytest.mark.parametrize(
  "override", ["on=2", "on=yes", "inner.size=1.0", "sizes=1,x", "inner.kind=c", "rate=", "inner=1"]
)
def test_a_value_of_another_type_is_refused(override):
  with pytest.raises(UserError) as raised:
    config.override(config.defaults(Outer), Outer, [override])
  assert raised.value.field == override.split("=")[0]


def test_a_frozen_config_cannot_change_and_a_config_file_cannot_invent_fields():
  cfg = config.freeze(Outer, config.defaults(Outer))
  assert cfg == Outer()
  with pytest.raises(dataclasses.FrozenInstanceError):
    cfg.rate = 1.0
  with pytest.raises(AttributeError, match="rate"):
    config.defaults(Outer).rat = 1.0
  with pytest.raises(UserError, match="inner.sizes=3: no such field; did you mean size"):
    config.freeze(Outer, {"inner": {"sizes": 3}})
  with pytest.raises(UserError, match="must be of type int, not float"):
    config.freeze(Outer, {"inner": {"size": 3.0}})


def test_a_mistake_in_a_group_is_named_from_the_top():
  with pytest.raises(UserError) as raised:
    config.freeze(Config, {"model": {"heads": 3, "kv_heads": 2}})
  assert raised.value.field == "model.heads"


def test_arguments_behind_the_colon():
  assert not config.parse_arg(None).tiny
  assert config.parse_arg("tiny").tiny
  got = config.parse_arg("tiny,size=3", size=1, name="x")
  assert (got.tiny, got.size, got.name) == (True, 3, "x")
  for wrong in ("small", "size", "size=x", "tiny,,huge"):
    with pytest.raises(UserError):
      config.parse_arg(wrong, size=1)


def test_runs_are_arms_times_seeds():
  cfg = config.load("experiments/kvshift/configs/main.py", ["seeds=3,1"])
  runs = config.expand(cfg)
  assert [(arm, c.seed) for arm, c in runs] == [("plain", 3), ("plain", 1), ("kvshift", 3), ("kvshift", 1)]
  assert [c.attention for _, c in runs] == ["plain", "plain", "kvshift", "kvshift"]
  only = config.expand(config.load("experiments/kvshift/configs/main.py", ["only=kvshift"]))
  assert {arm for arm, _ in only} == {"kvshift"}
  assert config.expand(Config(seeds=(5,)))[0] == ("main", Config(seeds=(5,)))


def test_a_mistake_in_an_arm_names_the_arm():
  with pytest.raises(UserError) as raised:
    config.expand(Config(arms=(("wide", "model.heads=7"),)))
  assert raised.value.field == "arms.wide.model.heads"


@pytest.mark.parametrize(("heads", "kv_heads"), [(32, 32), (32, 8), (20, 4), (6, 1), (2, 2)])
def test_shrinking_keeps_the_shape_of_a_model_valid(heads, kv_heads):
  big = config.defaults(Config)
  big.model = config.as_configdict(TransformerConfig(heads=heads, kv_heads=kv_heads, layers=80, width=8192))
  small = config.freeze(Config, config.shrink(big))
  assert small.model.layers == 2
  assert small.model.heads <= 4
  assert (small.model.heads == small.model.kv_heads) == (heads == kv_heads)
  assert small.steps <= 6
