"""Which processes there are is decided from flags or the environment, before anything starts."""

import os
import re

from jax._src.clusters import cloud_tpu_cluster
import pytest

from research import distributed, run
from research.errors import UserError

GKE = {"TPU_WORKER_HOSTNAMES": "a,b,c,d", "TPU_WORKER_ID": "2"}
SLURM = {"SLURM_JOB_ID": "77", "SLURM_STEP_NODELIST": "n[1-2]", "SLURM_NTASKS": "2", "SLURM_PROCID": "1"}
SLURM |= {"SLURM_LOCALID": "0"}
POD = {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "0"}
FLAGS = ["--coordinator=10.0.0.2:8476", "--processes=4", "--process=3"]
OF_FLAGS = {"coordinator_address": "10.0.0.2:8476", "num_processes": 4, "process_id": 3}
OF_FLAGS |= {"cluster_detection_method": "deactivate"}
OF_SLURM = {"cluster_detection_method": "slurm", "num_processes": 2, "process_id": 1}
OF_GKE = {"cluster_detection_method": "gketpu"}

# (what, variables, flags, whether the machine has TPU chips, the plan or what the one line says)
PLACES = [
  ("laptop", {}, [], False, None),
  ("TPU VM of one host", {}, [], True, None),
  ("GKE pod of one host", {"TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0"}, [], True, None),
  ("TPU pod of four hosts", GKE, [], True, OF_GKE),
  ("two slices of one host", GKE | {"TPU_WORKER_HOSTNAMES": "a", "MEGASCALE_NUM_SLICES": "2"}, [], True, OF_GKE),
  ("JobSet on a TPU pod", GKE | POD | {"MEGASCALE_NUM_SLICES": "2", "MEGASCALE_SLICE_ID": "1"}, [], True, OF_GKE),
  ("TPU pod, on its CPUs", GKE | {"JAX_PLATFORMS": "cpu"}, [], True, None),
  ("TPU variables without a TPU", GKE, [], False, None),
  ("slices that are no number", GKE | {"MEGASCALE_NUM_SLICES": "two"}, [], True, "MEGASCALE_NUM_SLICES=two"),
  ("Slurm, one task", SLURM | {"SLURM_NTASKS": "1", "SLURM_PROCID": "0"}, [], False, None),
  ("Slurm, two tasks", SLURM, [], False, OF_SLURM),
  ("Slurm, one a node", SLURM | {"SLURM_STEP_TASKS_PER_NODE": "1(x2)"}, [], False, OF_SLURM | {"local_device_ids": []}),
  ("Slurm, two a node", SLURM | {"SLURM_STEP_TASKS_PER_NODE": "2"}, [], False, OF_SLURM),
  ("Slurm, a shell in an allocation", SLURM | {"SLURM_STEP_NUM_TASKS": "1"}, [], False, None),
  ("Slurm, a script without srun", {k: v for k, v in SLURM.items() if "STEP" not in k}, [], False, None),
  ("Slurm, broken", SLURM | {"SLURM_NTASKS": "2x"}, [], False, "SLURM_NTASKS=2x: must be a whole number"),
  ("Slurm and a TPU pod", SLURM | GKE, [], True, "environment=Slurm and TPU: both tell of several"),
  ("any pod", {"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, [], False, None),
  ("the first of an indexed job", POD, [], False, None),
  ("the second", POD | {"JOB_COMPLETION_INDEX": "1"}, [], False, "JOB_COMPLETION_INDEX=1: this pod is one of several"),
  ("flags", {}, FLAGS, False, OF_FLAGS),
  ("flags in Slurm", SLURM, FLAGS, False, OF_FLAGS),
  ("flags on a pod", POD | GKE, FLAGS, True, OF_FLAGS),
  ("flags that say alone", SLURM, ["--coordinator=x:1", "--processes=1", "--process=0"], False, None),
  ("two of the flags", {}, FLAGS[:2], False, "--coordinator --processes: goes with --process"),
  ("one of the flags", SLURM, FLAGS[1:2], False, "--processes: goes with --coordinator and --process"),
  ("no port", {}, ["--coordinator=x", *FLAGS[1:]], False, "coordinator=x: must be HOST:PORT"),
  ("a bad port", {}, ["--coordinator=x:80a", *FLAGS[1:]], False, "coordinator=x:80a: must be HOST:PORT"),
  ("too high a port", {}, ["--coordinator=x:65536", *FLAGS[1:]], False, "coordinator=x:65536: must be HOST:PORT"),
  ("an empty coordinator", {}, ["--coordinator=", *FLAGS[1:]], False, "coordinator='': must be HOST:PORT"),
  ("process of too few", {}, [*FLAGS[:2], "--process=4"], False, "process=4: must be from 0 to 3"),
  ("process below 0", {}, [*FLAGS[:2], "--process=-1"], False, "process=-1: must be from 0 to 3"),
  ("no processes", {}, [FLAGS[0], "--processes=0", "--process=0"], False, "processes=0: use a positive number"),
  ("processes in words", {}, [FLAGS[0], "--processes=two", "--process=0"], False, "invalid int value: 'two'"),
]


@pytest.mark.parametrize(
  ("variables", "flags", "chips", "expected"), [p[1:] for p in PLACES], ids=[p[0] for p in PLACES]
)
def test_who_the_processes_are_is_decided_from_flags_or_the_environment(variables, flags, chips, expected, monkeypatch):
  for name in list(os.environ):
    if name.startswith(("SLURM_", "TPU_", "MEGASCALE_", "KUBERNETES_", "JOB_", "JAX_", "OMPI_")):
      monkeypatch.delenv(name)
  for name, value in ({"TPU_SKIP_MDS_QUERY": "1"} | variables).items():  # no metadata server is asked
    monkeypatch.setenv(name, value)
  monkeypatch.setattr(cloud_tpu_cluster, "running_in_cloud_tpu_vm", chips)
  parse = lambda: distributed.planned(run.parse_args(["--config=x.py", *flags])[0])
  if isinstance(expected, str):
    with pytest.raises(UserError, match=re.escape(expected)) as error:
      parse()
    assert "\n" not in str(error.value)
  else:
    assert parse() == expected
