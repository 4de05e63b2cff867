"""Names of arms and losses in words."""

_NAMES = {
  "cca": "CCA",
  "cca_cfg": "CCA, guidance kept",
  "collisions": "CCA, colliding labels as positives",
  "dpo": "DPO",
  "nca": "NCA",
  "unlearning": "unlearning",
  "gft": "guidance-free training",
  "ddo": "DDO",
}


def label(arm: str) -> str:
  """An arm's name in words: what stands behind a "-" is the lambda it was given."""
  name, _, lam = arm.partition("-")
  words = _NAMES.get(name, name)
  return f"{words}, λ = {lam.replace('_', '.')}" if lam else words
