"""python -m experiments.transnormer --config=experiments/transnormer/configs/main.py --workdir=DIR"""

from experiments.transnormer.experiment import build
from experiments.transnormer.reports import report
from research import run

if __name__ == "__main__":
  run.main(build, report)
