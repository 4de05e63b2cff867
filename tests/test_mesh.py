"""Meshes fit their devices, and every process loads the rows that its devices hold."""

import types

import numpy as np
import pytest

from research import mesh as meshes
from research.errors import UserError
from research.mesh import MeshConfig, batch_shard


def mesh_of(processes):
  """Just enough of a mesh for `batch_shard`: an array [replica, data, model] of process numbers."""
  owners = np.array(processes)
  devices = np.vectorize(lambda p: types.SimpleNamespace(process_index=p), otypes=[object])(owners)
  return types.SimpleNamespace(devices=devices, shape=dict(zip(meshes.AXES, owners.shape, strict=True)))


@pytest.mark.parametrize(
  ("processes", "expected"),
  [
    ([[[0], [0], [0], [0]]], {0: (0, 1)}),
    ([[[0], [0], [1], [1]]], {0: (0, 2), 1: (1, 2)}),
    ([[[0, 0]], [[1, 1]]], {0: (0, 2), 1: (1, 2)}),
    ([[[0, 1]], [[2, 3]]], {0: (0, 2), 1: (0, 2), 2: (1, 2), 3: (1, 2)}),  # model spans processes: the same rows
    ([[[0, 1, 2, 3]]], {0: (0, 1), 1: (0, 1), 2: (0, 1), 3: (0, 1)}),
  ],
)
def test_a_processes_slice_follows_from_where_its_devices_stand(processes, expected):
  for process, shard in expected.items():
    assert batch_shard(mesh_of(processes), process) == shard


@pytest.mark.parametrize(
  "processes",
  [
    [[[0], [1], [0], [1]]],  # interleaved
    [[[0, 1], [1, 2]]],  # process 1 has a part of two rows, the others of one
    [[[0], [0], [0], [1]]],  # unequal
    [[[1], [1], [1], [1]]],  # process 0 holds nothing
  ],
)
def test_a_mesh_whose_rows_do_not_belong_to_one_slice_is_refused(processes):
  with pytest.raises(UserError, match="equal slice of the batch axes"):
    batch_shard(mesh_of(processes), 0)


def test_axes_take_the_devices_that_are_left():
  assert meshes.axis_sizes(MeshConfig(2, -1, 4), 64) == {"replica": 2, "data": 8, "model": 4}
  assert meshes.axis_sizes(MeshConfig(), 1) == {"replica": 1, "data": 1, "model": 1}
  with pytest.raises(UserError, match="needs 6 devices and there are 8"):
    meshes.axis_sizes(MeshConfig(2, -1, 3), 8)


def test_a_mesh_leaves_out_what_its_partition_does_not_cut():
  for name, partition in meshes.PARTITIONS.items():
    used = {axis for field in vars(partition()).values() for axis in field if axis}
    assert used == {"replicated": set(), "fsdp": {"data"}, "fsdp_tp": {"data", "model"}}[name]
