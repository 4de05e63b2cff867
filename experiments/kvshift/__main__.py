"""python -m experiments.kvshift --config=experiments/kvshift/configs/main.py --workdir=DIR"""

from experiments.kvshift.experiment import build
from experiments.kvshift.reports import report
from research import run

if __name__ == "__main__":
  run.main(build, report)
