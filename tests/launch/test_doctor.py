"""The doctor: every finding on the real thing, be it a held lock, a taken port, a directory that cannot be written."""

import contextlib
import json
import os
import pathlib
import re
import socket
import subprocess
import sys
import threading
import time

import pytest

from launch import doctor
from research import run as runs


@contextlib.contextmanager
def another_process(code: str):
  """A process that has run `code`, its result said, and goes on."""
  command = [sys.executable, "-S", "-c", f"{code}\nprint('ready', flush=True)\nimport time; time.sleep(60)"]
  process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
  try:
    assert process.stdout.readline() == "ready\n"
    yield process.pid
  finally:
    process.kill()
    process.communicate()


def test_the_holder_of_the_libtpu_lock_is_named(tmp_path):
  path = tmp_path / "libtpu_lockfile"
  assert [f.fix for f in doctor.lock(path, [])] == [""]
  hold = f"import fcntl; f = open({str(path)!r}, 'w'); fcntl.flock(f, fcntl.LOCK_EX)"
  with another_process(hold) as pid:
    (found,) = doctor.lock(path, [])
    assert f"in use by pid {pid} (python" in found.what
    assert found.fix == f"let it end, or: sudo kill {pid}"
  # libtpu leaves the file behind: that alone stops nobody
  (found,) = doctor.lock(path, [])
  assert "held by nobody" in found.what
  assert found.fix == ""


def test_who_has_a_chip_open_is_named(tmp_path):
  chip = tmp_path / "accel0"
  chip.touch()
  with another_process(f"f = open({str(chip)!r})") as pid:
    (found,) = doctor.lock(tmp_path / "none", [f"{tmp_path}/accel*"])
    assert f"pid {pid}" in found.what


def test_who_listens_on_a_port_is_named():
  with another_process("import socket; s = socket.create_server(('', 0))") as pid:
    number = listening(pid)
    found = doctor.port(number)
    assert f"taken by pid {pid} (python" in found.what
    assert str(number) in found.fix
  assert doctor.port(number).what == "open"
  assert doctor.port(free_port()).fix == ""


def listening(pid: int) -> int:
  links = [os.readlink(entry.path) for entry in os.scandir(f"/proc/{pid}/fd")]
  (inode,) = [link.removeprefix("socket:[").rstrip("]") for link in links if link.startswith("socket:")]
  for table in ("/proc/net/tcp", "/proc/net/tcp6"):
    for row in pathlib.Path(table).read_text().splitlines()[1:]:
      if row.split()[9] == inode:
        return int(row.split()[1].rpartition(":")[2], 16)
  raise AssertionError


def free_port() -> int:
  with socket.create_server(("", 0)) as server:
    return server.getsockname()[1]


def test_peers_reach_each_other_or_are_named():
  number, found = free_port(), {}
  hosts = ["127.0.0.2", "127.0.0.3"]
  call = lambda host: found.update({host: doctor.reach(number, hosts, 1.0, host)})
  threads = [threading.Thread(target=call, args=(host,)) for host in hosts]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert {host: f[0].fix for host, f in found.items()} == dict.fromkeys(hosts, "")
  (found,) = doctor.reach(number, [*hosts[:1], "127.0.0.4"], 0.5, hosts[0])
  assert found.what == f"no answer on port {number} from 127.0.0.4"
  assert f"--allow=tcp:{number}" in found.fix


def test_a_workdir_is_written_to_and_left_as_it_was(tmp_path):
  assert doctor.writable(str(tmp_path / "new")).fix == ""
  assert list((tmp_path / "new").iterdir()) == []
  file = tmp_path / "file"
  file.write_text("")
  for place in (str(file), "/proc/nowhere"):
    found = doctor.writable(place)
    assert f"{place} cannot be written" in found.what
    assert found.fix
  # root may write anywhere but on what is mounted for reading
  if os.getuid() != 0:
    (tmp_path / "new").chmod(0o500)
    assert "PermissionError" in doctor.writable(str(tmp_path / "new")).what


def test_a_full_disk_is_told(tmp_path):
  assert doctor.disk(str(tmp_path), need=1).fix == ""
  assert doctor.disk(str(tmp_path), need=2**60).fix.startswith("make 1.07374e+09 GiB of room")


def test_devices_are_counted_or_why_there_are_none(tmp_path):
  counted = doctor.devices(environ={**os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "3"})
  assert counted[0].what == "3 cpu (cpu), as JAX_PLATFORMS asks" or counted[0].what == "3 cpu (cpu)"
  (found,) = doctor.devices(environ={**os.environ, "JAX_PLATFORMS": "nonsense"})
  assert found.what.startswith("jax cannot start: ")
  assert "nonsense" in found.what
  (found,) = doctor.devices(timeout=0.01)
  assert "found none in 0.01 s" in found.what


def test_a_gpu_that_another_process_uses_is_told(tmp_path, monkeypatch):
  smi = tmp_path / "nvidia-smi"
  smi.write_text("#!/bin/sh\nprintf '0, 4, 81559\\n1, 70000, 81559\\n'\n")
  smi.chmod(0o755)
  monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
  _, memory = doctor.devices(environ={**os.environ, "JAX_PLATFORMS": "cpu"})
  assert memory.what == "GPU 1 (70000 MiB used) not free"
  assert "nvidia-smi" in memory.fix
  smi.write_text("#!/bin/sh\necho 0, 4, 81559\n")
  assert doctor.devices(environ={**os.environ, "JAX_PLATFORMS": "cpu"})[1] == ("device memory", "free on 1", "")


def report(host: str, jax: str = "0.10.2", late: float = 0.0, devices: str = "4 TPU v5 lite (tpu)") -> dict:
  found = [("devices", devices, ""), ("port 8482", "open", "")]
  return {"host": host, "time": time.time() + late, "versions": {"jax": jax, "numpy": "2.3"}, "found": found}


def test_what_differs_among_workers_is_told():
  same = {host: report(host) for host in ("w0", "w1", "w2")}
  assert {f.fix for f in doctor.compare(same, dict.fromkeys(same, 0.2))} == {""}
  odd = {**same, "w1": report("w1", jax="0.9.0", devices="3 TPU v5 lite (tpu)")}
  versions, devices, clock = doctor.compare(odd, {"w0": 0.1, "w1": 0.0, "w2": -90.0})
  assert versions[:2] == ("version of jax", "0.10.2 on w0 w2, 0.9.0 on w1")
  assert "3 TPU v5 lite (tpu) on w1" in devices.what
  assert clock.what == "w2 is 90 s behind"
  assert all((versions.fix, devices.fix, clock.fix))


def test_all_workers_of_a_tpu_are_asked_and_compared(tools):
  lines = "\n".join(f"doctor says reprise-doctor {json.dumps(r)}" for r in (report("w0"), report("w1", "0.9.0", -1000)))
  silent = [["describe"], 0, {"say": "10.0.0.1;10.0.0.2;10.0.0.3"}]
  heard = [["ssh", "worker.sh doctor --port"], 0, {"say": lines}]
  tools.scenario(silent, heard, node="READY")
  asked = ("--tpu=pod", "--zone=us-west4-a", "--workdir=gs://b/x")
  done = tools.here("launch.doctor", *asked)
  assert done.returncode == runs.EXIT_USER
  assert "FIX  all  workers: 2 of 3 answered; fix: " in done.stdout
  silent[2]["say"] = "10.0.0.1;10.0.0.2"
  called = [{"host": host, "time": 0, "found": [["network", "all 2 answer on port 8482", ""]]} for host in ("w0", "w1")]
  peers = [
    ["ssh", "--peers=10.0.0.1,10.0.0.2"],
    0,
    {"say": "\n".join(f"reprise-doctor {json.dumps(r)}" for r in called)},
  ]
  tools.scenario(peers, silent, heard, node="READY")
  done = tools.here("launch.doctor", *asked)
  assert done.returncode == runs.EXIT_USER
  assert "FIX  all  version of jax: 0.10.2 on w0, 0.9.0 on w1; fix: install the same on all" in done.stdout
  assert "ok   w1  network: all 2 answer on port 8482" in done.stdout
  assert re.search(r"FIX  all  clock: w1 is 100\d s behind", done.stdout)
  assert done.stdout.endswith("2 to fix\n")
  assert len(tools.calls("ssh", "--workdir=gs://b/x")) == 1


def test_hosts_examine_themselves_and_call_each_other(tools, tmp_path):
  """For real, but that both hosts are this one."""
  number = free_port()
  options = (f"--port={number}", "--wait=2", f"--workdir={tmp_path}")
  done = tools.here("launch.doctor", "--hosts=127.0.0.1,localhost", *options, PYTHONPATH=str(tools.checkout))
  assert "ok   all  workers: all 2 answered" in done.stdout, done.stderr
  assert "ok   all  versions: equal on all 2" in done.stdout
  assert f"ok   localhost  network: all 2 answer on port {number}" in done.stdout
  assert f"ok   127.0.0.1  workdir: {tmp_path} can be written" in done.stdout
  assert len(tools.calls("ssh")) == 4


def test_this_machine_is_examined_in_one_command(tools, tmp_path):
  with another_process("import socket; s = socket.create_server(('', 0))") as pid:
    number = listening(pid)
    done = tools.run("launch.doctor", f"--port={number}", f"--workdir={tmp_path}")
  assert done.returncode == runs.EXIT_USER
  line = next(line for line in done.stdout.splitlines() if f"port {number}" in line)
  assert line.startswith("FIX  ")
  assert f"taken by pid {pid}" in line
  assert "; fix: end it" in line


@pytest.mark.parametrize(
  ("arguments", "says"),
  [
    (["--tpu=pod"], ["--zone"]),
    (["--tpu=pod", "--zone=us-west4-a", "--hosts=a"], ["not both"]),
    (["--hosts="], ["node1,node2"]),
    (["--port=0"], ["1 .. 65535"]),
    (["--port=many"], ["many"]),
    (["--fix"], ["--fix"]),
    (["--workdir=https://me:me@host/x"], ["--workdir=(not shown)"]),
  ],
  ids=lambda x: " ".join(x),
)
def test_a_mistake_is_one_line(tools, arguments, says):
  done = tools.here("launch.doctor", *arguments)
  assert done.returncode == runs.EXIT_USER
  assert done.stderr.count("\n") == 1, done.stderr
  assert all(part in done.stderr for part in says), done.stderr
  assert tools.calls() == []


def test_dry_run_prints_what_would_be_asked_and_asks_nothing(tools):
  done = tools.here("launch.doctor", "--tpu=pod", "--zone=us-west4-a", "--dry-run")
  assert done.returncode == 0, done.stderr
  assert done.stdout.count("gcloud compute tpus tpu-vm") == 5
  assert tools.here("launch.doctor", "--hosts=a,b", "--dry-run").stdout.count("ssh -oBatchMode=yes") == 4
  assert tools.here("launch.doctor", "--dry-run").returncode == 0
  assert tools.calls() == []
