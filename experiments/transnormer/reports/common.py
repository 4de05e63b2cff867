"""The arms' names in words."""

_NAMES = {
  "transformer": "transformer",
  "transnormer": "TransNormerLLM",
  "lightning": "lightning attention (chunks)",
  "quadratic": "Lightning Attention-1 (tiles)",
  "softmax": "softmax attention (transformer)",
  "base": "base: position Mix",
  "ape": "position: APE, no decay",
  "decay_only": "position: decay only",
  "lrpe_only": "position: LRPE in all layers, no decay",
  "lrpe_d": "position: LRPE and decay in all layers",
  "no_temperature": "decay: the same in every layer",
  "decay_paper": "decay: equation 10",
  "no_gate": "no gate",
  "no_activation": "q, k: no activation",
  "1_plus_elu": "q, k: 1 + elu",
  "glu_swish": "GLU: Swish",
  "rms": "norm: RMSNorm",
  "layer": "norm: LayerNorm",
}


def label(arm: str) -> str:
  """An arm's name in words."""
  return _NAMES.get(arm, arm)
