"""The commands that the pages show, and a checkout in which tests execute them, small.

A page is followed as a reader would follow it: its commands in order, in one directory. They are executed as they
stand, but for the substitutions of `Checkout.small` and what stands for big downloads (`tests/downloads.py`).
"""

from collections.abc import Iterator
import dataclasses
import functools
import os
import pathlib
import re
import runpy
import shlex
import shutil
import socket
import subprocess
import sys
import textwrap
import warnings

import pytest

from research import run
from tests.downloads import DOWNLOADS, END

ROOT = pathlib.Path(__file__).parents[1]
_PAGES = ("*.md", "docs/*.md", "experiments/*/*.md", "launch/*.md", "benchmarks/*.md", "research/**/*.md")
PAGES = sorted(p.relative_to(ROOT).as_posix() for pattern in _PAGES for p in ROOT.glob(pattern))

_FILES = ("python", "yaml", "markdown", "json", "toml")  # blocks of these hold no commands
_BLOCK = re.compile(r"^( *)```(\w*)\n(.*?)^\1```", re.MULTILINE | re.DOTALL)
_SPAN = re.compile(r"`((?:[^`\n]|\n(?!\n))+)`")

# What starts, stops or watches machines: tests/launch/test_readme.py has the stand-ins for their tools.
LAUNCHES = re.compile(r"(\.venv/bin/)?python -m launch\.(?!plan|kernels)\w+ |gcloud ")


@dataclasses.dataclass(frozen=True)
class Command:
  """A command of a page: of a fenced block, or `inline` in a sentence or a table, where NAME may stand for any."""

  page: str
  line: int
  text: str
  inline: bool

  def __str__(self):
    return f"{self.page}:{self.line}: {self.text}"


@functools.cache
def collect() -> list[Command]:
  """Every command of every page: of fenced blocks that are no files, and each `python -m` in the text."""
  return [command for page in PAGES for command in commands_of((ROOT / page).read_text(), page)]


def commands_of(text: str, page: str) -> Iterator[Command]:
  """Those of one page with this text."""
  line = lambda at: text.count("\n", 0, at) + 1
  before = ""
  for block in _BLOCK.finditer(text):
    if block[2] not in _FILES:
      for n, command in _commands(textwrap.dedent(block[3])):
        if command.startswith("--"):  # flags alone: of the command before them, in another workdir
          command = re.sub(r"--workdir=\S+", r"\g<0>-more", f"{before} {command}")
        before = command
        yield Command(page, line(block.start(3)) + n, command, inline=False)
  prose = _BLOCK.sub(lambda block: "\n" * block[0].count("\n"), text)
  for span in _SPAN.finditer(prose):
    if "python -m" in span[1]:
      at = prose.count("\n", 0, span.start()) + 1
      yield Command(page, at, " ".join(span[1].split()), inline=True)


def _commands(block: str) -> Iterator[tuple[int, str]]:
  """(line, text) of each: lines that end in a backslash are one, and so is a heredoc with its lines."""
  lines = iter(enumerate(block.splitlines()))
  for n, line in lines:
    while line.endswith("\\"):
      line = line[:-1] + next(lines)[1].lstrip()
    if heredoc := re.search(r"<<'?(\w+)", line):
      while not line.endswith(f"\n{heredoc[1]}"):
        line += f"\n{next(lines)[1]}"
    if line.strip() and not line.startswith("#"):
      yield n, line


# Commands that need no process of their own, which spares the import of jax.
_HERE = re.compile(r"(\.venv/bin/)?python -m (experiments|research)\.")
_RUN = re.compile(r"python -m experiments\.(\w+) --config=(\S+\.py)(?::(\S+))?")

# what the small weights and tokenizers need beside, by config
_MORE = {"imagenet.py": ["--config.only=cca"], "text.py": [f"--config.data.stop={END}"]}


class Checkout:
  """A copy of the tree as it is, in which commands of pages are executed, with `.venv/bin/python` and `python`."""

  def __init__(self, folder: pathlib.Path, trained: "Checkout | None" = None):
    self.folder, self.trained = folder, trained
    self.made: set = set()  # of the downloads
    for name in _git("ls-files", "-co", "--exclude-standard").splitlines():
      if (ROOT / name).is_file() and not name.endswith(".png"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    programs = folder / ".venv" / "bin"
    programs.mkdir(parents=True)
    (programs / "python").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    (programs / "python").chmod(0o755)
    (folder / "tmp").mkdir()
    # one device, as a CPU has where nobody asks for more; datasets are those of the downloads
    self.env = {"PATH": f"{programs}:{os.environ['PATH']}", "PYTHONPATH": str(folder), "JAX_NUM_CPU_DEVICES": "1"}
    self.env["TFDS_DATA_DIR"] = str(folder / "tfds")
    with socket.socket() as free:
      free.bind(("127.0.0.1", 0))
      self.port = free.getsockname()[1]

  def small(self, text: str) -> str:
    """The command as it is executed: all that differs from what the page says.

    - A run is `:tiny` and of the first seed, in the workdir that it has without `:tiny`. ImageNet's `:tiny` has another
      arm, for use without weights: the one that tunes them is run. `data.stop` is that of the small tokenizer.
    - /tmp is a directory of the test, and a port that is named a free one.
    - Pictures are of 8 pixels, the size of the small tokenizer, and eight samples are drawn.
    - `RUN` is the run of the command before, `...` a config. Test suites are collected, of GPUs too: this is in one.
    """
    names = {"/tmp/": f"{self.folder}/tmp/", "127.0.0.1:8476": f"127.0.0.1:{self.port}"}
    names |= {"JAX_PLATFORMS=cuda": "JAX_PLATFORMS=cpu", "--size=384": "--size=8", "--samples=50000": "--samples=8"}
    names |= {"=RUN": "=runs/cca/imagenet-llamagen_l", "=...": "=experiments/kvshift/configs/main.py"}
    for name, value in names.items():
      text = text.replace(name, value)
    if "-m pytest" in text:
      return f"{text} --collect-only -q"
    if not (found := _RUN.search(text)):
      return text
    experiment, path, arg = found.groups()
    more = ["--config.seeds=0", *_MORE.get(pathlib.Path(path).name, ())]
    if "--workdir=" not in text:
      more.append(f"--workdir={run.default_workdir(experiment, f'{path}:{arg}' if arg else path)}")
    tiny = arg if arg and "tiny" in arg.split(",") else f"{arg},tiny" if arg else "tiny"
    return f"{text[: found.end(2)]}:{tiny}{text[found.end() :]} {' '.join(more)}"

  def execute(self, *texts: str) -> None:
    """The command; several are the processes of one run, started together. Raises where one fails."""
    for name, make in DOWNLOADS.items():
      if name in texts[0] and make not in self.made:
        self.made.add(make)
        make(self.folder)
    texts = [self.small(text) for text in texts]
    for experiment, name in re.findall(r"--workdir=runs/(\w+)/(\w+)(?!\S)", " ".join(texts)):
      self._train(experiment, name, texts[0])
    if len(texts) == 1 and _HERE.match(texts[0]):
      self._here(*shlex.split(texts[0])[2:])
    else:
      self._processes(texts)

  def _processes(self, texts: list[str]) -> None:
    logs = [self.folder / "tmp" / f"{i}.log" for i in range(len(texts))]
    how = {"env": os.environ | self.env, "cwd": self.folder, "stderr": subprocess.STDOUT}
    processes = []
    try:
      for text, log in zip(texts, logs, strict=True):
        with log.open("w") as out:
          processes.append(subprocess.Popen(["bash", "-euc", text], stdout=out, **how))
      for process, text, log in zip(processes, texts, logs, strict=True):
        assert process.wait(1200) == 0, f"{text}\n{log.read_text()[-4000:]}"
    finally:
      for process in processes:
        process.kill()

  def _train(self, experiment: str, name: str, text: str) -> None:
    """A tool wants the run that a config leaves in its default workdir: it is made once for all pages."""
    workdir = pathlib.Path("runs", experiment, name)
    spec = f"experiments/{experiment}/configs/{name}.py"
    if _RUN.search(text) or (self.folder / workdir).exists() or not (ROOT / spec).exists():
      return
    if self.trained is not None:
      self.trained._train(experiment, name, text)
      (self.folder / workdir).parent.mkdir(parents=True, exist_ok=True)
      (self.folder / workdir).symlink_to(self.trained.folder / workdir)
    else:
      self.execute(f"python -m experiments.{experiment} --config={spec}")

  def _here(self, module: str, *arguments: str) -> None:
    """`python -m module arguments` in this process."""
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
      warnings.filterwarnings("ignore", "'.*' found in sys.modules", RuntimeWarning)  # imported by other tests before
      patch.chdir(self.folder)
      patch.setattr(sys, "argv", [module, *arguments])
      patch.setattr(sys, "path", [*sys.path, str(self.folder)])
      patch.setenv("TFDS_DATA_DIR", self.env["TFDS_DATA_DIR"])
      try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
      except SystemExit as e:
        if e.code:
          pytest.fail(f"{module} {shlex.join(arguments)} ended with {e.code}")


def _git(*arguments: str) -> str:
  return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout
