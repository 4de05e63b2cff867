"""Condition contrastive alignment: guidance without its cost, for models that write images token by token."""

import dataclasses
from typing import Literal

from experiments.cca import stages, toy
from experiments.cca.classifier import ClassifierConfig
from experiments.cca.evaluation import EvaluationConfig
from experiments.cca.toy import ToyConfig
from experiments.cca.tuning import TuningConfig
from research.config import RunConfig
from research.data.codes import CodesConfig
from research.data.images import ImageConfig
from research.fit import Experiment
from research.models.llamagen import LlamaGenConfig
from research.models.var import VARConfig
from research.models.vq import VQConfig
from research.models.vqvae import VQVAEConfig
from research.tokenizer_training import Revival, TokenizerLoss

TASKS = {"toy": lambda cfg: toy.make(cfg, cfg.toy), **stages.TASKS}


@dataclasses.dataclass(frozen=True)
class Config(RunConfig):
  """Of images each command trains a tokenizer, then models of its codes: tasks are stages, each an arm."""

  experiment: str = "cca"
  task: Literal[*TASKS] = "toy"
  report: Literal["toy", "digits", "rewards"] = "toy"
  toy: ToyConfig = ToyConfig()
  # of images; length is the tokens of one
  data: ImageConfig = ImageConfig()
  codes: CodesConfig = CodesConfig()  # in the place of those that the arm "tokenizer" makes of the images
  backbone: Literal["llamagen", "var"] = "llamagen"
  llamagen: LlamaGenConfig = LlamaGenConfig()
  var: VARConfig = VARConfig()
  # the tokenizer of each backbone, and how it is trained
  vq: VQConfig = VQConfig()
  vqvae: VQVAEConfig = VQVAEConfig()
  reconstruction: TokenizerLoss = TokenizerLoss(perceptual=0.0, adversarial=0.0)
  features: str = ""  # module:function of the perceptual term, images -> maps: docs/tokenizers.md
  revival: Revival = Revival()
  classifier: ClassifierConfig = ClassifierConfig()
  tune: TuningConfig = TuningConfig()
  evaluation: EvaluationConfig = EvaluationConfig()

  @property
  def model(self) -> LlamaGenConfig | VARConfig:
    """That of the backbone."""
    return getattr(self, self.backbone)

  @property
  def tokenizer(self) -> VQConfig | VQVAEConfig:
    """That of the backbone."""
    return self.vq if self.backbone == "llamagen" else self.vqvae


def build(cfg: Config) -> Experiment:
  """One run of one task with one seed. Call it under the run's mesh; it reads no data yet."""
  return TASKS[cfg.task](cfg)
