"""python -m experiments.prefgames --config=experiments/prefgames/configs/tabular.py --workdir=DIR"""

from experiments.prefgames.experiment import build
from experiments.prefgames.reports import report
from research import run

if __name__ == "__main__":
  run.main(build, report)
