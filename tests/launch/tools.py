"""The launchers against fake tools (fake.py), in real processes."""

import contextlib
import importlib
import io
import json
import os
import pathlib
import subprocess
import sys

import pytest

from launch import command, job

ROOT = pathlib.Path(__file__).parents[2]


class Tools:
  """The fakes in a folder of their own, and a checkout of the tree as it is, whose commit is what is launched."""

  def __init__(self, folder: pathlib.Path):
    self.folder, self.checkout = folder, folder / "checkout"
    (folder / "bin").mkdir(parents=True)
    for name in ("gcloud", "xpk", "kubectl", "ssh", "sbatch", "srun", "squeue", "scancel", "scontrol"):
      script = folder / "bin" / name
      script.write_text(f"#!{sys.executable} -S\n{(ROOT / 'tests/launch/fake.py').read_text()}")
      script.chmod(0o755)
    git = lambda *a: (
      subprocess.run(
        ["git", "-c", "user.name=n", "-c", "user.email=e@e", *a],
        check=True,
        text=True,
        cwd=self.checkout if a[0] != "ls-files" else ROOT,
        capture_output=True,
      ).stdout
    )
    for name in git("ls-files", "-co", "--exclude-standard").splitlines():
      if (ROOT / name).is_file() and not name.endswith((".png", ".ipynb", ".npz")):
        (self.checkout / name).parent.mkdir(parents=True, exist_ok=True)
        (self.checkout / name).write_bytes((ROOT / name).read_bytes())
    git("init", "-q")
    git("add", "-A")
    git("commit", "-qm", "as it is")
    self.commit = git("rev-parse", "HEAD").strip()
    # Copies of the code on their way stay in here; what was compiled is everyone's.
    cache = pathlib.Path(os.environ.get("REPRISE_CACHE") or os.path.expanduser("~/.cache/reprise"))
    (cache / "xla").mkdir(parents=True, exist_ok=True)
    (folder / "cache").mkdir()
    (folder / "cache" / "xla").symlink_to(cache / "xla")
    path = f"{folder / 'bin'}:{os.environ['PATH']}"
    self.env = {"PATH": path, "FAKE": str(folder), "REPRISE_CACHE": str(folder / "cache")}
    self.scenario()

  def scenario(self, *rules, **state) -> None:
    """From here on these rules hold, and nothing has been called."""
    (self.folder / "scenario.json").write_text(json.dumps(rules))
    (self.folder / "state.json").write_text(json.dumps(state))
    (self.folder / "calls.jsonl").write_text("")

  def state(self) -> dict:
    """What the fakes hold to exist."""
    return json.loads((self.folder / "state.json").read_text())

  def run(self, module: str, *arguments: str, stdin: str = "", **env) -> subprocess.CompletedProcess:
    """`python -m module arguments`, in a real process, from the checkout."""
    env = {**os.environ, **self.env, "PYTHONPATH": str(self.checkout), **env}
    command = [sys.executable, "-m", module, *arguments]
    return subprocess.run(
      command, env=env, input=stdin, capture_output=True, text=True, timeout=100, check=False, cwd=self.checkout
    )

  def here(self, module: str, *arguments: str, stdin: str = "", **env) -> subprocess.CompletedProcess:
    """The same in this process, which spares the import of jax; the tools are processes all the same."""
    launcher = importlib.import_module(module)
    out, err, status = io.StringIO(), io.StringIO(), 0
    with pytest.MonkeyPatch.context() as patch:
      for name, value in {**self.env, **env}.items():
        patch.setenv(name, value)
      patch.setattr(job, "ROOT", self.checkout)
      patch.chdir(self.checkout)
      patch.setattr(sys, "stdin", io.StringIO(stdin))
      patch.setattr(sys, "argv", [f"launch/{module}", *arguments])
      with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
          command.main(lambda: launcher.main(list(arguments)))
        except SystemExit as e:
          status = e.code
    return subprocess.CompletedProcess(arguments, status, out.getvalue(), err.getvalue())

  def calls(self, *words: str) -> list[list[str]]:
    """What was called, [tool, arguments...], of the calls that have all the words in them."""
    found = [json.loads(line) for line in (self.folder / "calls.jsonl").read_text().splitlines()]
    return [call for call in found if all(word in " ".join(call) for word in words)]
