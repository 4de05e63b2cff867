"""What the paper says of its rows, and that every difference of a run is told."""

import json
import sys

import numpy as np
import pytest

from experiments.cca import protocol
from research import config
from research.errors import UserError

ROWS = protocol.names()
CONFIG = "experiments/cca/configs/imagenet.py"


def test_every_model_has_a_row_for_each_way_to_sample_it():
  models = {config for config, _, _ in (row.partition("-") for row in ROWS)}
  assert len(models) == 9
  for model in models:
    assert {f"{model}-{how}" for how in ("none", "cfg", "cca")} <= set(ROWS)


@pytest.mark.parametrize("name", ROWS)
def test_a_row_says_of_every_setting_what_it_is_or_that_it_is_unknown(name):
  row = protocol.read(name)
  assert row["row"] == name
  assert "arXiv 2410.09347" in row["source"]
  assert {"FID", "IS"} <= row["published"].keys()
  said = protocol.settings(row)
  assert {
    f"sampling.{key}" for key in ("scale", "temperature", "top_k", "top_p", "labels", "samples", "seed")
  } <= said.keys()
  assert {f"evaluation.{key}" for key in ("evaluator", "resize", "statistics", "statistics_sha256")} <= said.keys()
  assert said["sampling.samples"] == 50_000
  assert said["evaluation.statistics_sha256"] == "unknown"
  assert all(value is not None and value != "" for value in said.values())


@pytest.mark.parametrize("name", [name for name in ROWS if name.endswith("-cca")])
def test_our_configs_differ_from_no_row_of_the_paper(name):
  row = protocol.read(name)
  cfg = config.load(f"{CONFIG}:{row['config']}")
  differ, _, absent = protocol.compare(row, protocol.of_run(config.expand(cfg)[0][1]))
  assert differ == []
  assert not [name for name in absent if name.startswith("tuning.")]


def samples(path, **changes):
  sizes = {"layers": 24, "heads": 16, "width": 1024, "mlp_width": 2816, "vocab": 16384, "classes": 1000}
  told = {
    "backbone": "llamagen",
    "sizes": sizes,
    "model": "c2i_L_384.pt",
    "run": None,
    "scale": 0.0,
    "temperature": 1.0,
  }
  told |= {"top_k": 0, "top_p": 1.0, "labels": "random", "generated_size": 384, "size": 256, "seed": 0} | changes
  np.savez(path, labels=np.zeros(50_000, np.int32), settings=np.array(json.dumps(told)))
  return str(path)


def told(monkeypatch, capsys, *argv):
  monkeypatch.setattr(sys, "argv", ["protocol", *argv])
  protocol.main()
  return capsys.readouterr().out


def test_the_command_names_what_differs_what_is_unknown_and_what_was_not_told(tmp_path, monkeypatch, capsys):
  file = samples(tmp_path / "s.npz", scale=0.75, size=384)
  out = told(monkeypatch, capsys, "--row=llamagen_l-none", f"--samples={file}")
  table = [[x.strip() for x in line.strip("|").split("|")] for line in out.splitlines() if line.startswith("| ")]
  assert table[1:] == [["sampling.scale", "0.0", "0.75"], ["sampling.size", "256", "384"]]
  assert "FID 19.07" in out
  assert "not known of the published row: sampling.seed, evaluation.statistics_sha256" in out
  assert "not told of what is compared: tuning.method, evaluation.evaluator" in out


def test_samples_as_published_differ_in_nothing_known(tmp_path, monkeypatch, capsys):
  file = samples(tmp_path / "s.npz")
  assert "nothing that is known differs" in told(monkeypatch, capsys, "--row=llamagen_l-none", f"--samples={file}")
  assert protocol.of_samples(file)["size"] == "L"


def test_features_of_something_else_are_a_difference(tmp_path, monkeypatch, capsys):
  measured = tmp_path / "m.json"
  measured.write_text(json.dumps({"features": "my.module:net", "reference": "/data/mine.npz"}))
  out = told(monkeypatch, capsys, "--row=var_d24-cca", f"--measured={measured}")
  assert "my.module:net" in out
  assert "mine.npz" in out


@pytest.mark.parametrize(
  ("argv", "words"),
  [
    (["--row=llamagen_m-cca"], "llamagen_m-cca"),
    (["--row=var_d16-cca", "--samples=/nowhere.npz"], r"samples=/nowhere\.npz"),
    (["--row=var_d16-cca", "--workdir=/nowhere"], "workdir=/nowhere"),
  ],
)
def test_a_wrong_argument_is_one_line(monkeypatch, argv, words):
  monkeypatch.setattr(sys, "argv", ["protocol", *argv])
  with pytest.raises(UserError, match=words) as error:
    protocol.main()
  assert "\n" not in str(error.value)
