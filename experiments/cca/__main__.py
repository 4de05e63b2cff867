"""python -m experiments.cca --config=experiments/cca/configs/toy.py --workdir=DIR"""

from experiments.cca.experiment import build
from experiments.cca.reports import report
from research import run

if __name__ == "__main__":
  run.main(build, report)
