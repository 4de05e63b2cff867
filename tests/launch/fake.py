"""Stand-ins for gcloud, xpk, sbatch and the like: on PATH, they record their arguments and act by a scenario.

The scenario of a test is a list of rules [words, n, action]: so does the n-th call (0:
every one) act whose arguments have all the words:
{"say": text, "status": 1, "set": {...}, "hang": seconds}. `set` changes the fake's state,
which the default actions read and write: a TPU VM can be created, described, deleted, and
ssh runs its command in a directory for a home, without the environment of the caller.
{"signal": 9, "once": path} lets gcloud's ssh or srun run, and sends the signal to what it
has started as soon as the path exists; without "status" it then ends as its command does.
sbatch runs its script, with the variables it is told to pass on, as often as it is requeued.
"""

import json
import os
import pathlib
import subprocess
import sys
import time


def act() -> None:
  """What the fake executables do."""
  folder = pathlib.Path(os.environ["FAKE"])
  call = [pathlib.Path(sys.argv[0]).name, *sys.argv[1:]]
  with (folder / "calls.jsonl").open("a") as f:
    f.write(json.dumps(call) + "\n")
  before = [json.loads(line) for line in (folder / "calls.jsonl").read_text().splitlines()]
  state = json.loads((folder / "state.json").read_text())
  for words, n, action in json.loads((folder / "scenario.json").read_text()):
    has = lambda c, words=words: all(any(word in a for a in c) for word in words)
    if has(call) and n in (0, sum(map(has, before))):
      time.sleep(action.get("hang", 0))
      if "signal" in action:
        process = _ssh(folder, call) if call[0] == "gcloud" else _srun(call)
        while not pathlib.Path(action["once"]).exists():
          time.sleep(0.01)
        pids = [int(path.read_text()) for path in _home(folder).glob("reprise-runs/*/pid")]
        os.kill(pids[0] if call[0] == "gcloud" else process.pid, action["signal"])
        status = process.wait()
        _save(folder, state | action.get("set", {}))
        sys.exit(action.get("status", status))
      _save(folder, state | action.get("set", {}))
      print(action.get("say", ""), flush=True)
      sys.exit(action.get("status", 0))
  if call[0] == "gcloud":
    _gcloud(folder, state, call)
  if call[0] == "ssh":
    sys.exit(subprocess.run(["bash", "-c", call[-1]], check=False).returncode)
  if call[0] == "srun":
    sys.exit(_srun(call).wait())
  if call[0] == "squeue":
    print("RUNNING")
  if call[0] == "sbatch":
    _sbatch(folder, call)


def _srun(call: list[str]) -> subprocess.Popen:
  first = next(i for i, word in enumerate(call) if i and not word.startswith("--"))
  return subprocess.Popen(call[first:])


def _sbatch(folder: pathlib.Path, call: list[str]) -> None:
  names = next(word for word in call if word.startswith("--export=")).removeprefix("--export=").split(",")
  env = {name: os.environ[name] for name in names if name in os.environ}
  requeued = lambda: (folder / "calls.jsonl").read_text().count('["scontrol", "requeue", "41"]')
  done, count = -1, 0
  with (folder / "job.log").open("w") as log:
    while done < requeued():
      done = requeued()
      more = {"FAKE": str(folder), "SLURM_JOB_ID": "41", "SLURM_RESTART_COUNT": str(count)}
      subprocess.run(["bash", call[-1]], env={**env, **more}, stdout=log, stderr=subprocess.STDOUT, check=False)
      count += 1
  print("41;cluster")


def _save(folder: pathlib.Path, state: dict) -> None:
  (folder / "state.json").write_text(json.dumps(state))


def _gcloud(folder: pathlib.Path, state: dict, call: list[str]) -> None:
  call = [word for word in call if word != "alpha"]
  if call[1] == "secrets":
    sys.exit(1)
  group, verb = call[3:5]
  kind = "queued" if group == "queued-resources" else "node"
  if verb == "create":
    made = {"node": "READY"} | ({"queued": "ACTIVE"} if kind == "queued" else {})
    _save(folder, state | made)
    _wipe(folder)
  elif verb == "delete":
    _save(folder, {})
  elif verb == "describe":
    if not state.get(kind):
      print("ERROR: (gcloud.compute.tpus) NOT_FOUND: Resource was not found", file=sys.stderr)
      sys.exit(1)
    print(state[kind])
  elif verb == "scp":
    _home(folder).joinpath(pathlib.Path(call[5]).name).write_bytes(pathlib.Path(call[5]).read_bytes())
  elif verb == "ssh":
    sys.exit(_ssh(folder, call).wait())


def _ssh(folder: pathlib.Path, call: list[str]) -> subprocess.Popen:
  remote = next(a.removeprefix("--command=") for a in call if a.startswith("--command="))
  env = {"HOME": str(_home(folder)), "PATH": f"{folder}/bin:/usr/bin:/bin", "FAKE": str(folder)}
  env |= {"JAX_PLATFORMS": "cpu", "REPRISE_PYTHON": sys.executable, "REPRISE_CACHE": os.environ["REPRISE_CACHE"]}
  return subprocess.Popen(["bash", "-c", remote], env=env, cwd=_home(folder))


def _home(folder: pathlib.Path) -> pathlib.Path:
  home = folder / "worker"
  home.mkdir(exist_ok=True)
  return home


def _wipe(folder: pathlib.Path) -> None:
  """A new pod has nothing of the old one."""
  if (folder / "worker").exists():
    (folder / "worker").rename(folder / f"worker-{time.time_ns()}")


if __name__ == "__main__":
  act()
