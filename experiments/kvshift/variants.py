"""The paper's ablations and the peers of KV shifting, each a mix for `research.nn.attention.Attention`."""

# name for --config.attention -> module of (key, cfg, partition)
VARIANTS = {}
