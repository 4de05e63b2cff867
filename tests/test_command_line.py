"""A mistake on the command line ends in one line that names the field, the value and the fix, before any compile."""

import subprocess
import sys

import jax
import pytest

from experiments.kvshift.experiment import build
from research import run

MAIN = "experiments/kvshift/configs/main.py"
INDUCTION = "experiments/kvshift/configs/induction.py"
TINY = f"--config={MAIN}:tiny"

# (arguments, what the one line must say)
MISTAKES = [
  ([], ["command line", "--config"]),
  ([TINY, "again"], ["again", "unknown argument"]),
  ([TINY, "--workdri=x"], ["--workdri=x", "unknown argument"]),
  ([TINY, "--config.tx.lrr=1"], ["tx.lrr=1", "did you mean tx.lr?"]),
  ([TINY, "--config.modell.width=64"], ["modell.width=64", "did you mean model.width?"]),
  ([TINY, "--config.width=64"], ["width=64", "did you mean model.width?"]),
  ([TINY, "--config.nonsense=1"], ["nonsense=1", "no such field"]),
  ([TINY, "--config.model=3"], ["model=3", "is a group", "model.width"]),
  ([TINY, "--config.steps.more=3"], ["steps.more=3", "no such field"]),
  ([TINY, "--config.tx.lr"], ["tx.lr", "needs a value"]),
  ([TINY, "--config.tx.lr=fast"], ["tx.lr=fast", "must be a number, e.g. 3e-4"]),
  ([TINY, "--config.tx.lr="], ["tx.lr=", "must be a number"]),
  ([TINY, "--config.tx.lr=nan"], ["tx.lr=nan", "must be finite"]),
  ([TINY, "--config.tx.lr=inf"], ["tx.lr=inf", "must be finite"]),
  ([TINY, "--config.tx.lr=-1"], ["tx.lr=-1", "must be positive"]),
  ([TINY, "--config.tx.b1=1"], ["tx.b1=1", "[0, 1)"]),
  ([TINY, "--config.tx.name=sgd"], ["tx.name=sgd", "choose from adamw, muon"]),
  ([TINY, "--config.tx.schedule=linear"], ["tx.schedule=linear", "constant, cosine, wsd"]),
  ([TINY, "--config.tx.warmup=6"], ["tx.warmup=6", "less than steps=6"]),
  ([TINY, "--config.tx.clip=-1"], ["tx.clip=-1", "must not be negative"]),
  ([TINY, "--config.steps=1.5"], ["steps=1.5", "must be an integer"]),
  ([TINY, "--config.steps=99999999999"], ["steps=99999999999", "below 2^31"]),
  ([TINY, "--config.tx.eps=1e-60"], ["tx.eps=1e-60", "float32"]),
  ([TINY, "--workdir="], ["workdir=''", "name a directory"]),
  ([TINY, "--config.resume=setup.cfg"], ["resume=setup.cfg", "no checkpoint"]),
  ([TINY, "--config.steps=0"], ["steps=0", "at least 1"]),
  ([TINY, "--config.length=1"], ["length=1", "at least 2 tokens"]),
  ([TINY, "--config.seeds=0,zero"], ["seeds=zero", "must be an integer"]),
  ([TINY, "--config.seeds="], ["seeds=()", "at least one seed"]),
  ([TINY, "--config.seeds=1,1"], ["seeds=(1, 1)", "each seed once"]),
  ([TINY, "--config.seeds=-1"], ["seeds=(-1,)", "0 .. 2^31-1"]),
  ([TINY, "--config.only=plane"], ["only=plane", "plain, kvshift"]),
  ([TINY, "--config.arms=plain"], ["arms=plain", "config file"]),
  ([TINY, "--config.task=chess"], ["task=chess", "choose from text, induction"]),
  ([TINY, "--config.experiment=kvshfit"], ["experiment='kvshfit'", "choose from", "kvshift"]),
  ([TINY, "--config.model.qk_norm=maybe"], ["model.qk_norm=maybe", "true or false"]),
  ([TINY, "--config.model.heads=3"], ["model.heads=3", "multiple of kv_heads=4"]),
  ([TINY, "--config.model.heads=0"], ["model.heads=0", "at least 1"]),
  ([TINY, "--config.model.head_dim=15"], ["model.head_dim=15", "even"]),
  ([TINY, "--config.model.rope_base=0"], ["model.rope_base=0", "larger than 1"]),
  ([TINY, "--config.model.precision=float16"], ["model.precision=float16", "float32, bfloat16"]),
  ([TINY, "--config.model.remat=some"], ["model.remat=some", "none, full, dots"]),
  ([TINY, "--config.model.attention_kernel=flash"], ["model.attention_kernel=flash", "splash"]),
  ([TINY, "--config.model.attention_kernel=splash"], ["model.attention_kernel=splash", "needs a tpu", "cpu"]),
  ([TINY, "--config.model.vocab=100"], ["model.vocab=100", "at least 256"]),
  ([TINY, "--config.model.width=62"], ["model.width=62", "mesh.data=4"]),
  ([TINY, "--config.batch=6"], ["batch=6", "multiple of", "4"]),
  ([TINY, "--config.accumulate=3"], ["batch=8", "multiple of accumulate=3"]),
  ([TINY, "--config.accumulate=4"], ["batch=8", "accumulate = 16"]),
  ([TINY, "--config.mesh.data=3"], ["mesh", "1x3x1", "needs 3 devices and there are 4"]),
  ([TINY, "--config.mesh.data=0"], ["mesh.data=0", "positive"]),
  ([TINY, "--config.mesh.replica=-1"], ["replica+data=-1", "only one axis"]),
  ([TINY, "--config.mesh.model=2", "--config.mesh.partition=fsdp"], ["mesh.model=2", "partition=fsdp_tp"]),
  ([TINY, "--config.mesh.model=4", "--config.model.kv_heads=2"], ["model.kv_heads=2", "mesh.model=4"]),
  ([TINY, "--config.checkpoint.keep_last=0"], ["checkpoint.keep_last=0", "at least one"]),
  ([TINY, "--config.data.source=wikipedia"], ["data.source=wikipedia", "stdlib"]),
  ([TINY, "--config.data.source=files:/nowhere"], ["data.source=files:/nowhere", "no such directory"]),
  ([TINY, "--config.data.tokenizer=words"], ["data.tokenizer=words", "bytes, bpe"]),
  ([TINY, "--config.length=100000000"], ["data.source=stdlib", "too few"]),
  (["--config=missing.py"], ["config=missing.py", "no such config file"]),
  ([f"--config={MAIN}:small"], ["config=:small", "unknown", ":tiny"]),
  (["--config=setup.cfg"], ["config=setup.cfg", "no such config file"]),
  (["--config=research/errors.py"], ["config=research/errors.py", "no get_config"]),
  ([f"--config={INDUCTION}:tiny", "--config.length=31"], ["length=31", "must be even"]),
  ([f"--config={INDUCTION}:tiny", "--config.induction.keys=1000"], ["induction.keys=1000", "model.vocab"]),
  ([TINY, "--config.resume=/nowhere"], ["resume=/nowhere", "no checkpoint"]),
  ([TINY, "--config.init_from=/nowhere"], ["init_from=/nowhere", "no checkpoint"]),
  ([TINY, "--workdir=/proc/nowhere"], ["workdir=/proc/nowhere", "cannot be written"]),
  ([TINY, "--workdir=setup.cfg"], ["workdir=setup.cfg", "cannot be written"]),
]


@pytest.mark.parametrize(("arguments", "says"), MISTAKES, ids=lambda x: " ".join(x)[-60:] if x else "nothing")
def test_a_mistake_is_told_in_one_line(arguments, says, monkeypatch, capsys, tmp_path, compiles):
  if not any(a.startswith("--workdir=") for a in arguments):
    arguments = [*arguments, f"--workdir={tmp_path}"]
  monkeypatch.setattr(sys, "argv", ["experiments.kvshift", *arguments])
  with pytest.raises(SystemExit) as exit_info:
    run.main(build)
  told = capsys.readouterr().err
  assert exit_info.value.code == run.EXIT_USER
  assert told.startswith("error: ")
  assert told.count("\n") == 1, told
  for part in says:
    assert part in told
  assert compiles == []


def test_there_are_enough_mistakes_to_trust_the_answers():
  assert len(MISTAKES) >= 30


def test_a_mistake_in_a_config_file_names_the_file_and_the_line(monkeypatch, capsys, tmp_path):
  file = tmp_path / "mine.py"
  file.write_text(
    "from experiments.kvshift.experiment import Config\nfrom research import config\n\n"
    "def get_config(arg=None):\n  c = config.defaults(Config)\n  c.model.widht = 64\n  return c\n"
  )
  monkeypatch.setattr(sys, "argv", ["x", f"--config={file}"])
  with pytest.raises(SystemExit):
    run.main(build)
  told = capsys.readouterr().err
  assert told.count("\n") == 1
  assert "mine.py" in told
  assert "line 6" in told
  assert "widht" in told


def test_a_mistake_in_a_real_process_has_no_traceback_and_a_status():
  command = [sys.executable, "-m", "experiments.kvshift", TINY, "--config.model.heads=5"]
  done = subprocess.run(command, capture_output=True, text=True, check=False)
  assert done.returncode == 2
  assert done.stderr == "error: model.heads=5: must be a multiple of kv_heads=4\n"
  assert done.stdout == ""


@pytest.fixture
def compiles():
  """The names of programs compiled while the test runs."""
  seen = []

  def listen(event, seconds, **kwargs):
    if event == "/jax/core/compile/backend_compile_duration":
      seen.append(kwargs.get("fun_name", event))

  jax.monitoring.register_event_duration_secs_listener(listen)
  yield seen
  jax.monitoring.unregister_event_duration_listener(listen)
