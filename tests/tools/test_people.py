"""The tools for people, as people call them: a run is trained, asked, measured and published."""

import importlib
import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from research.errors import UserError

ROOT = pathlib.Path(__file__).parents[2]
QUESTIONS = '{"ctx": "import", "endings": ["os", "zzzz"], "label": 0}\n'


@pytest.fixture
def call(monkeypatch, capsys):
  """What `python -m tool arguments` prints."""

  def run(tool, *arguments):
    monkeypatch.setattr(sys, "argv", [tool, *map(str, arguments)])
    capsys.readouterr()
    importlib.import_module(tool).main()
    return capsys.readouterr().out

  return run


@pytest.fixture(scope="module")
def text(tmp_path_factory):
  """A directory of text and the workdir of a run on it, with a tokenizer of its own and a model for each arm."""
  root = tmp_path_factory.mktemp("people")
  (root / "text").mkdir()
  for i in range(40):
    (root / "text" / f"{i}.txt").write_text(f"The number {i} and its square {i * i}. It is raining again.\n" * 5)
  settings = {
    "data.source": f"files:{root}/text",
    "data.tokenizer": "bpe",
    "data.bpe_vocab": 300,
    "model.vocab": 300,
    "seeds": "0",
  }
  overrides = [f"--config.{name}={value}" for name, value in settings.items()]
  command = [sys.executable, "-m", "experiments.kvshift", "--config=experiments/kvshift/configs/main.py:tiny"]
  subprocess.run([*command, *overrides, f"--workdir={root}/run"], check=True, cwd=ROOT, capture_output=True)
  return root


def test_generate_prints_the_prompt_and_what_follows_and_the_seed_decides(text, call):
  arguments = ["research.tools.generate", f"--workdir={text}/run", "--run=kvshift-0", "--prompt=The num", "--tokens=12"]
  first = call(*arguments)
  assert first.startswith("The num")
  assert call(*arguments) == first != call(*arguments, "--seed=1")


def test_evaluate_tells_what_the_run_itself_measured(text, call):
  out = text / "numbers.json"
  (text / "q.jsonl").write_text(QUESTIONS)
  told = call("research.tools.evaluate", f"--workdir={text}/run", "--run=plain-0", f"--out={out}")
  numbers = json.loads(out.read_text())
  logged = [json.loads(line) for line in (text / "run/metrics.jsonl").read_text().splitlines()]
  loss = [r["loss"] for r in logged if r["kind"] == "eval" and r["arm"] == "plain"][-1]
  whole = numbers["perplexity"]
  assert whole["nats_per_token"] == pytest.approx(loss, rel=0.02)  # the run looked at one batch of them
  assert f"{whole['nats_per_token']:.4f}" in told
  assert np.shape(numbers["induction"]["induction"]) == (2, 4)
  told = call("research.tools.evaluate", f"--workdir={text}/run", "--run=plain-0", f"--choices={text}/q.jsonl")
  assert "accuracy_per_byte" in told


def test_an_exported_run_says_what_the_run_says(text, call):
  out = text / "published"
  call("research.tools.export", f"--workdir={text}/run", "--run=kvshift-0", f"--out={out}")
  greedy = ["--prompt=The", "--tokens=8", "--temperature=0"]
  mine = call(
    "research.tools.generate", f"--workdir={text}/run", "--run=kvshift-0", *greedy, "--config.model.precision=float32"
  )
  assert (out / "tokenizer.json").exists()
  assert call("research.tools.generate", f"--weights={out}", *greedy) == mine
  told = call("research.tools.evaluate", f"--weights={out}", f"--source=files:{text}/text")
  assert "bits_per_byte" in told


@pytest.mark.slow
def test_a_model_of_linear_attention_is_asked_measured_and_published_too(tmp_path, call):
  run, out, greedy = tmp_path / "run", tmp_path / "published", ["--prompt=import", "--tokens=8", "--temperature=0"]
  command = [sys.executable, "-m", "experiments.transnormer", "--config=experiments/transnormer/configs/main.py:tiny"]
  overrides = ["--config.only=transnormer", "--config.seeds=0", "--config.eval_every=0", "--config.steps=3"]
  subprocess.run([*command, *overrides, f"--workdir={run}"], check=True, cwd=ROOT, capture_output=True)
  mine = call("research.tools.generate", f"--workdir={run}", *greedy)
  told = call("research.tools.evaluate", f"--workdir={run}", f"--out={tmp_path}/numbers.json")
  assert "bits_per_byte" in told
  assert "said twice" in told
  assert set(json.loads((tmp_path / "numbers.json").read_text())["induction"]) == {"nats_first", "nats_second"}
  call("research.tools.export", f"--workdir={run}", f"--out={out}")
  assert call("research.tools.generate", f"--weights={out}", "--tokenizer=bytes", *greedy) == mine


def test_a_run_without_text_has_its_heads_measured_and_nothing_else(tmp_path, call):
  induction = "experiments/kvshift/configs/induction.py:tiny"
  command = [sys.executable, "-m", "experiments.kvshift", f"--config={induction}", f"--workdir={tmp_path}/run"]
  subprocess.run([*command, "--config.only=plain-1", "--config.seeds=0"], check=True, cwd=ROOT, capture_output=True)
  told = call("research.tools.evaluate", f"--workdir={tmp_path}/run")
  assert "said twice" in told
  assert "bits_per_byte" not in told
  with pytest.raises(UserError, match="not trained on text"):
    call("research.tools.generate", f"--workdir={tmp_path}/run", "--prompt=a")


def test_a_wrong_call_is_one_line(text, tmp_path, call):
  run = f"--workdir={text}/run"
  for arguments, told in [
    ([run], "choose from plain-0, kvshift-0"),
    ([f"--workdir={tmp_path}"], "has no manifest.json"),
    ([run, "--run=plain-7"], "plain-7"),
    ([run, "--run=plain-0", "--temperature=-1"], "temperature"),
    ([run, "--run=plain-0", "--top_p=2"], "top_p"),
    ([run, "--run=plain-0", "--config.mesh.model=3"], "mesh"),
    ([run, "--run=plain-0", "--weights=x"], "not allowed with"),
    ([run, "--run=plain-0", "--config.model.mlp_width=3"], "config has changed"),
    ([run, "--run=plain-0", "--confg.model.mlp_width=3"], "unknown argument"),
    ([f"--weights={ROOT}/tests/models/goldens/llama", "--tokenizer=bpe"], "tokenizer=bpe"),
  ]:
    with pytest.raises(UserError) as e:
      call("research.tools.generate", "--prompt=a", *arguments)
    assert told in str(e.value)
    assert "\n" not in str(e.value)


def test_a_wrong_call_ends_with_status_2(tmp_path):
  command = [sys.executable, "-m", "research.tools.evaluate", f"--workdir={tmp_path}"]
  done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
  assert (done.returncode, done.stderr.count("\n")) == (2, 1)
  assert done.stderr.startswith("error: workdir=")
