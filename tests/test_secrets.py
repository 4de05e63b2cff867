"""A credential on a command line is refused, unseen, before anything is written."""

import sys

import pytest

from experiments.kvshift.experiment import build
from research import run, secrets
from research.errors import UserError

CANARY = "canary-4f1c9e2a7b"
CONFIG = "--config=experiments/kvshift/configs/main.py:tiny"


@pytest.mark.parametrize(
  "argument",
  [
    f"--workdir=https://me:{CANARY}@host/x",
    f"--workdir=https://{CANARY}@host/x",
    f"--config.resume=gs://bucket/x?access_token={CANARY}",
    f"--config.init_from=https://host/x?a=1&X-Goog-Signature={CANARY}",
    f"--config.data.source=files:/data/{CANARY}",
    CANARY,
  ],
)
def test_a_run_refuses_it_and_does_not_show_it(argument, monkeypatch, capsys, tmp_path):
  monkeypatch.setenv("HF_TOKEN", CANARY)
  monkeypatch.setattr(sys, "argv", ["x", CONFIG, f"--workdir={tmp_path}", argument])
  with pytest.raises(SystemExit) as exit_info:
    run.main(build)
  told = capsys.readouterr().err
  assert exit_info.value.code == run.EXIT_USER
  assert told.count("\n") == 1
  assert CANARY not in told
  assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
  "argument",
  [
    "--workdir=gs://bucket/a@b",
    "--workdir=runs/me@host",
    "--config.data.source=files:/x?y",
    "--topology=v5e:4x4",
    "--",
  ],
)
def test_what_holds_none_is_let_through(argument):
  # a short value may be a word of its own; a path to credentials is none
  environ = {"HF_TOKEN": "runs", "GOOGLE_APPLICATION_CREDENTIALS": "/home/me/key.json", "PWD": argument}
  secrets.refuse([argument, "--key=/home/me/key.json"], environ)


def test_the_variables_are_those_whose_names_say_so():
  for name in ("WANDB_API_KEY", "HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "DB_PASSWORD"):
    with pytest.raises(UserError):
      secrets.refuse([f"--x={CANARY}"], {name: CANARY})
  secrets.refuse([f"--x={CANARY}"], {"USER": CANARY})


def test_a_key_that_begins_like_a_path_is_a_key():
  with pytest.raises(UserError):
    secrets.refuse([f"--x=/{CANARY}/q"], {"AWS_SECRET_ACCESS_KEY": f"/{CANARY}/q"})
