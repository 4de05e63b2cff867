"""The distance is that of the definition, whichever way features are given, and FID only where Inception made them."""

import json
import sys

import numpy as np
import pytest

from research.errors import UserError
from research.tools import frechet


def means_of_rows(images):
  """A feature function: [n, height, width, channels] -> [n, height]."""
  return images.astype(np.float64).mean((2, 3))


ME = f"{__name__}:means_of_rows"


@pytest.fixture
def files(tmp_path):
  rng = np.random.default_rng(0)
  a, b = (rng.integers(0, high, (150, 3, 4, 1), np.uint8) for high in (200, 256))
  np.savez(tmp_path / "a.npz", arr_0=a)
  np.savez(tmp_path / "b.npz", arr_0=b)
  x = means_of_rows(b)
  np.savez(tmp_path / "b_features.npz", features=x)
  np.savez(tmp_path / "b_statistics.npz", mu=x.mean(0), sigma=np.cov(x, rowvar=False))
  return tmp_path


def measured(monkeypatch, files, *argv):
  monkeypatch.setattr(sys, "argv", ["frechet", *argv, f"--out={files / 'out.json'}"])
  frechet.main()
  return json.loads((files / "out.json").read_text())


def test_images_features_and_statistics_give_one_distance(files, monkeypatch):
  how = [f"--samples={files / 'a.npz'}", f"--features={ME}"]
  found = [
    measured(monkeypatch, files, *how, f"--reference={files / name}.npz")
    for name in ("b", "b_features", "b_statistics")
  ]
  np.testing.assert_allclose([x["value"] for x in found], found[0]["value"], rtol=1e-9)
  assert found[0]["value"] > 100
  assert found[0]["samples"] == 150
  same = measured(monkeypatch, files, *how, f"--reference={files / 'a.npz'}")
  assert abs(same["value"]) < 1e-6


def test_it_is_an_fid_only_of_inceptions_features(files, monkeypatch):
  how = [f"--samples={files / 'a.npz'}", f"--reference={files / 'b.npz'}", f"--features={ME}"]
  assert measured(monkeypatch, files, *how)["measure"] == "Fréchet distance of features"
  assert measured(monkeypatch, files, *how, "--inception=ADM pool_3")["measure"] == "FID"


@pytest.mark.parametrize(
  ("argv", "words"),
  [
    ([], "holds images: name the function"),
    (["--features=no.such:thing"], "cannot be imported"),
    (["--features=json:no_such"], "cannot be imported"),
    (["--samples=/nowhere.npz"], "is no sound .npz"),
    ([f"--features={ME}", "--reference={wide}"], "use one feature function"),
  ],
)
def test_a_wrong_argument_is_one_line(files, monkeypatch, argv, words):
  np.savez(files / "wide.npz", features=np.ones((9, 7)))
  argv = [x.format(wide=files / "wide.npz") for x in argv]
  with pytest.raises(UserError, match=words) as error:
    measured(monkeypatch, files, f"--samples={files / 'a.npz'}", f"--reference={files / 'b.npz'}", *argv)
  assert "\n" not in str(error.value)
