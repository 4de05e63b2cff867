"""Every command of every page is executed by a test: by one of these, or by one that is named here."""

import functools
import json
import pathlib
import re
import runpy
import shlex
import sys

import pytest

from tests.commands import LAUNCHES, PAGES, Checkout, Command, collect, commands_of
from tests.launch.test_plan import with_libtpu
from tests.test_contracts import CONFIGS

ROOT = pathlib.Path(__file__).parents[1]
COMMANDS = collect()
BENCHMARKS = sorted(p.stem for p in ROOT.glob("benchmarks/*.py") if '"--out"' in p.read_text())
text_of = functools.cache(lambda path: (ROOT / path).read_text())


# How a command is covered. Elsewhere, by what is asserted to be there:


@functools.cache
def of_ci() -> set[str]:
  """The commands of .ci/run: the two that it finds in README.md, and its own."""
  pattern = re.search(r"\$\(grep -E '(.*)' README.md\)", text_of(".ci/run"))[1]
  found = [line for line in text_of("README.md").splitlines() if re.match(pattern, line)]
  lines = re.findall(r"^run (?!\").*", text_of(".ci/run").replace("\\\n", ""), re.MULTILINE)
  own = [" ".join(shlex.split(line)[1:]) for line in lines]
  return {part for line in (*found, *own) for part in line.split(" && ")}


def by_ci(command: Command) -> bool:
  """Each part of `a && b` is one of .ci/run's, the README's main command with :tiny."""
  return set(command.text.split(" && ")) <= of_ci()


def by_the_launchers_tests(command: Command) -> bool:
  """With --dry-run, or by stand-ins for gcloud."""
  return not command.inline and bool(LAUNCHES.match(command.text))


def by_the_worked_example(command: Command) -> bool:
  told = r"python -m (experiments\.cautious \S+:tiny .*|pytest tests/test_contracts\.py)"
  return command.page == "docs/adding_an_experiment.md" and bool(re.fullmatch(told, command.text))


def by_the_contract(command: Command) -> bool:
  """A config alone: every file of configs is trained at :tiny; so is what stands for any of them."""
  found = re.fullmatch(r"(?:\.venv/bin/)?python -m experiments\.\w+ --config=(\S+)", command.text)
  any_of_them = r"(srun )?python -m experiments(\.NAME --config=FILE\.py:ARG|\.\.\.)"
  return bool(found and pathlib.Path(found[1]) in CONFIGS) or bool(re.fullmatch(any_of_them, command.text))


def by_the_tools_tests(command: Command) -> bool:
  """Named in a sentence, with arguments that stand for any or a file for the result: the tool's test has its flags."""
  text = re.sub(r" --out[= ]\S+", "", command.text)
  found = re.fullmatch(r"python -m ((?:launch|research|tests)\.[\w.]+)((?: --\w+(?:=[A-Z]+)?)*)", text)
  if not command.inline or not found:
    return False
  name, flags = found[1].rpartition(".")[2], re.findall(r"--\w+", found[2])
  files = [p.read_text() for p in ROOT.glob(f"tests/**/test_{name}.py")]
  return any(name in tests and all(flag in tests for flag in flags) for tests in files)


# Here:


def asks_a_compiler(command: Command) -> bool:
  return bool(re.match(r"(\.venv/bin/)?python -m launch\.(plan|kernels) --(?!op=NAME)", command.text))


def measures(command: Command) -> bool:
  found = re.match(r"python -m benchmarks\.(\w+)", command.text)
  return bool(found) and found[1] in (*BENCHMARKS, "NAME", "lightning_tables")


def works_here(command: Command) -> bool:
  program = r"(\.venv/bin/)?python (-m (experiments|research)\.|-m pytest|- <<)|mkdir |cat > |for "
  return bool(re.match(rf"((JAX_\w+|PYTHONPATH)=\S+ )*({program})", command.text))


ELSEWHERE = (by_ci, by_the_launchers_tests, by_the_worked_example, by_the_contract, by_the_tools_tests)
RULES = (asks_a_compiler, *ELSEWHERE, measures, works_here)


def rule(command: Command):
  return next((rule for rule in RULES if rule(command)), None)


def test_every_command_is_executed_by_a_test():
  assert [str(command) for command in COMMANDS if rule(command) is None] == []
  assert {rule(command) for command in COMMANDS} == set(RULES)


def test_what_is_executed_elsewhere_is():
  assert {".venv/bin/python -m pytest -n 2", ".venv/bin/ruff check ."} <= of_ci()
  assert 'run "${main/%main.py/main.py:tiny}"' in text_of(".ci/run")
  assert "LAUNCHES" in text_of("tests/launch/test_readme.py")
  assert 'PAGE = ROOT / "docs/adding_an_experiment.md"' in text_of("tests/test_docs.py")
  assert "tests/test_contracts.py" in text_of("tests/test_docs.py")
  assert "def test_tiny_takes_two_steps_and_writes_its_report(path" in text_of("tests/test_contracts.py")
  assert len(CONFIGS) >= 25


# What takes long, or needs processes of its own.
SLOW = re.compile(
  r"--process=|--selfcheck|JAX_NUM_CPU_DEVICES|PYTHONPATH|pytest|--tokenizer=bpe|data\.tokenizer=bpe|runs/kvshift-weights"
  r"|\"def main\"|transnormer|prefgames|\.cca|tools\.codes|tools\.sample|tools\.frechet"
)
FLOWS = {page: [c for c in COMMANDS if c.page == page and not c.inline and rule(c) is works_here] for page in PAGES}
QUICK = {page: [c for c in commands if not SLOW.search(c.text)] for page, commands in FLOWS.items()}
ASKED = sorted({c.text for c in COMMANDS if rule(c) is asks_a_compiler})
NEEDS = {"train_step": "torch", "lightning_crossover": "libtpu"}
ALONE = sorted({c.text for c in COMMANDS if c.inline and rule(c) is works_here})


def test_every_page_has_a_command_that_is_executed_each_time():
  for page in {command.page for command in COMMANDS}:
    assert QUICK[page] or any(
      c.page == page and rule(c) in (*ELSEWHERE, asks_a_compiler, measures) for c in COMMANDS
    ), page


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
  return Checkout(tmp_path_factory.mktemp("trained"))


@pytest.fixture
def checkout(tmp_path, trained):
  return Checkout(tmp_path, trained)


def follow(commands, checkout):
  """One after the other; neighbours that differ in --process alone at once."""
  together = {}
  for i, command in enumerate(commands):
    which = re.sub(r"--process=\d+", "", command.text)
    together.setdefault(which if which != command.text else i, []).append(command.text)
  for texts in together.values():
    checkout.execute(*texts)


@pytest.mark.parametrize("page", [page for page, commands in QUICK.items() if commands])
def test_the_commands_of_a_page_work(page, checkout):
  follow(QUICK[page], checkout)


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in FLOWS if FLOWS[page] != QUICK[page]])
def test_the_commands_of_a_page_work_with_those_that_take_long(page, checkout):
  follow(FLOWS[page], checkout)


@pytest.mark.parametrize(
  "text", [pytest.param(text, marks=[pytest.mark.slow] * ("tools.params" not in text)) for text in ALONE]
)
def test_a_command_of_a_sentence_or_a_table_works(text, trained):
  trained.execute(text)


@pytest.mark.slow
@with_libtpu
@pytest.mark.parametrize("text", ASKED)
def test_a_compiler_is_asked(text, checkout):
  checkout.execute(text)


def test_the_tables_of_a_page_are_written_anew_from_its_records(checkout):
  page = checkout.folder / "research/kernels/lightning_attention/README.md"
  before = page.read_text()
  page.write_text(re.sub(r"(<!-- (?!end)\w+ -->\n).*?(?=<!-- end -->)", r"\1", before, flags=re.DOTALL))
  assert len(page.read_text()) < 0.7 * len(before)
  checkout.execute("python -m benchmarks.lightning_tables")
  assert page.read_text() == before


@pytest.mark.parametrize("name", BENCHMARKS)
def test_a_benchmark_starts(name, monkeypatch, capsys):
  monkeypatch.setattr(sys, "argv", [name, "--help"])
  with pytest.raises(SystemExit, match="0"):
    runpy.run_module(f"benchmarks.{name}", run_name="__main__")
  assert "--out" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("name", BENCHMARKS)
def test_a_benchmark_measures(name, checkout):
  pytest.importorskip(NEEDS.get(name, "jax"))
  checkout.execute(f"python -m benchmarks.{name} --out rows.json")
  assert json.loads((checkout.folder / "rows.json").read_text())["rows"]


PAGE = """
`python -m research.tools.claims` in a sentence, and `python -m
research.tools.params --config=...` over two lines; `pip` is none.

```bash
# a comment
python -m experiments.a --config=b.py \\
  --workdir=c

cat > d.py <<'END'
python -m none
END
```
```python
python -m none
```
  ```
  --more=1
  ```
"""


def test_commands_are_read_as_a_shell_reads_them():
  assert [(c.line, c.text, c.inline) for c in commands_of(PAGE, "page.md")] == [
    (7, "python -m experiments.a --config=b.py --workdir=c", False),
    (10, "cat > d.py <<'END'\npython -m none\nEND", False),
    (18, "cat > d.py <<'END'\npython -m none\nEND --more=1", False),
    (2, "python -m research.tools.claims", True),
    (2, "python -m research.tools.params --config=...", True),
  ]


@pytest.mark.parametrize("text", ["curl https://a.b", "rm -r runs", "python mine.py", "a && b", "pip install x"])
def test_a_command_of_a_kind_that_nothing_executes_is_told(text):
  assert rule(Command("page.md", 1, text, inline=False)) is None
