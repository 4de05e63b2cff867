"""LlamaGen and VAR in plain PyTorch, to draw from with a cache of keys and values: what ours is measured against.

Each function takes a `Shape` of `image_sampling` and our weights by name, and returns
draw(labels, guidance, given=None) -> (codes [batch, tokens], logits [batch, tokens, vocab] or None). Codes are drawn;
where some are given, they are those, and the guided logits come too. Guidance is in the convention of each model's
released code.
"""

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from benchmarks import image_sampling as sampling


def linear(weight, inputs: int, bias=None) -> nn.Linear:
  """weight: [inputs..., outputs...], the first axes of `inputs` numbers together."""
  weight = weight.reshape(inputs, -1)
  layer = nn.Linear(*weight.shape, bias=bias is not None)
  layer.weight = nn.Parameter(weight.T.contiguous())
  if bias is not None:
    layer.bias = nn.Parameter(bias.flatten())
  return layer


def choose(logits, given):
  """Codes [rows] of logits [rows, vocab]."""
  return torch.multinomial(logits.softmax(-1), 1)[:, 0] if given is None else given


def llamagen(shape, weights):
  width, heads, side = shape.width, shape.heads, shape.scales[0]
  dim, length, eps = width // heads, shape.tokens, sampling.EPS["llamagen"]
  frequencies = sampling.ROPE_BASE ** (-torch.arange(0, dim // 2, 2, dtype=torch.float64) / (dim // 2))
  cell = torch.arange(length)[:, None]
  angles = torch.cat([(cell // side) * frequencies, (cell % side) * frequencies], dim=1)
  class_row = torch.zeros(1, dim // 2)  # the class token's queries and keys are zero
  cos, sin = (torch.cat([class_row, f(angles).float()]) for f in (torch.cos, torch.sin))

  class Block(nn.Module):
    def __init__(self, i):
      super().__init__()
      part = lambda name: weights[f"decoder.blocks.{name}"][i]
      q, k, v = part("attention.qkv").unbind(2)  # [width, heads, head_dim] each
      self.qkv = linear(torch.cat([q, k, v], dim=1), width)
      self.out = linear(part("attention.out"), width)
      self.up, self.down = linear(part("mlp.up"), width), linear(part("mlp.down"), shape.mlp_width)
      self.norm1, self.norm2 = nn.RMSNorm(width, eps), nn.RMSNorm(width, eps)
      self.norm1.weight.copy_(part("attention_norm.scale"))
      self.norm2.weight.copy_(part("mlp_norm.scale"))

    def rotate(self, x, t):
      a, b = x.chunk(2, dim=-1)
      return torch.cat([a * cos[t] - b * sin[t], b * cos[t] + a * sin[t]], dim=-1)

    def forward(self, x, t):
      """x [rows, width], of the token that is number t."""
      q, k, v = self.qkv(self.norm1(x)).view(-1, 3, heads, dim).unbind(1)
      self.keys[:, :, t], self.values[:, :, t] = self.rotate(k, t), v
      y = F.scaled_dot_product_attention(
        self.rotate(q, t)[:, :, None], self.keys[:, :, : t + 1], self.values[:, :, : t + 1]
      )
      x = x + self.out(y.flatten(1))
      gate, up = self.up(self.norm2(x)).chunk(2, dim=-1)
      return x + self.down(F.silu(gate) * up)

  blocks = [Block(i) for i in range(shape.layers)]
  norm = nn.RMSNorm(width, eps)
  norm.weight.copy_(weights["decoder.norm.scale"])
  head = linear(weights["decoder.head"], width)

  def draw(labels, guidance, given=None):
    guided = guidance > 1
    rows = torch.cat([labels, torch.full_like(labels, sampling.CLASSES)]) if guided else labels
    for block in blocks:
      block.keys, block.values = torch.empty(2, len(rows), heads, length, dim)
    x, codes, all_logits = weights["classes"][rows], [], []
    for t in range(length):
      for block in blocks:
        x = block(x, t)
      logits = head(norm(x))
      if guided:
        cond, null = logits.chunk(2)
        logits = null + guidance * (cond - null)
      codes.append(choose(logits, None if given is None else given[:, t]))
      all_logits.append(logits if given is not None else None)
      x = weights["decoder.embed"][codes[-1].repeat(2) if guided else codes[-1]]
    return torch.stack(codes, 1), None if given is None else torch.stack(all_logits, 1)

  return draw


def var(shape, weights):
  width, heads, scales = shape.width, shape.heads, shape.scales
  dim, eps, side = width // heads, sampling.EPS["var"], shape.scales[-1]
  norm = lambda x: F.layer_norm(x, (width,), eps=eps)

  class Block(nn.Module):
    def __init__(self, i):
      super().__init__()
      part = lambda name: weights[f"blocks.{name}"][i]
      q, k, v = part("attention.qkv").unbind(2)
      bias = torch.cat([part("attention.q_bias"), torch.zeros(heads, dim), part("attention.v_bias")])
      self.qkv = linear(torch.cat([q, k, v], dim=1), width, bias)
      self.out = linear(part("attention.out"), width, part("attention.out_bias"))
      self.up = linear(part("mlp.up"), width, part("mlp.up_bias"))
      self.down = linear(part("mlp.down"), shape.mlp_width, part("mlp.down_bias"))
      self.ada = linear(part("ada.weight"), width, part("ada.bias"))
      self.scale = part("attention.scale").clamp(max=4.605170185988092).exp()[:, None, None]

    def forward(self, x, condition):
      """x [rows, tokens, width], of a whole scale."""
      gamma1, gamma2, scale1, scale2, shift1, shift2 = self.ada(F.silu(condition)).view(-1, 1, 6, width).unbind(2)
      y = self.qkv(norm(x) * (1 + scale1) + shift1).unflatten(2, (3, heads, dim))
      q, k, v = y.permute(2, 0, 3, 1, 4)
      q, k = F.normalize(q, dim=-1) * self.scale, F.normalize(k, dim=-1)
      if self.past is not None:
        k, v = torch.cat([self.past[0], k], dim=2), torch.cat([self.past[1], v], dim=2)
      self.past = k, v
      y = F.scaled_dot_product_attention(q, k, v, scale=1.0)
      x = x + gamma1 * self.out(y.transpose(1, 2).flatten(2))
      return x + gamma2 * self.down(F.gelu(self.up(norm(x) * (1 + scale2) + shift2), approximate="tanh"))

  blocks = [Block(i) for i in range(shape.layers)]
  word = linear(weights["word"], shape.code_width, weights["word_bias"])
  head = linear(weights["head"], width, weights["head_bias"])
  last_ada = linear(weights["ada.weight"], width, weights["ada.bias"])
  phis = [_conv(weights[f"phis.{i}.kernel"], weights[f"phis.{i}.bias"]) for i in range(sampling.PHIS)]
  # numpy's rounding decides ties, as in the released code
  ticks = np.linspace(1 / 3 / sampling.PHIS, 1 - 1 / 3 / sampling.PHIS, sampling.PHIS)

  def spread(codes, i):
    """What the codes [rows, tokens] of a scale add to the features [rows, code_width, side, side]."""
    h = weights["codebook"][codes].transpose(1, 2).unflatten(2, (scales[i], scales[i]))
    h = h if scales[i] == side else F.interpolate(h, (side, side), mode="bicubic")
    phi = phis[int(np.abs(ticks - i / (len(scales) - 1)).argmin())]
    return h * (1 - sampling.PHI_RATIO) + phi(h) * sampling.PHI_RATIO

  def draw(labels, guidance, given=None):
    guided = guidance > 0
    rows = torch.cat([labels, torch.full_like(labels, sampling.CLASSES)]) if guided else labels
    condition = weights["classes"][rows]
    for block in blocks:
      block.past = None
    x, start, features, codes, all_logits = condition[:, None] + weights["start"], 0, 0.0, [], []
    for i, n in enumerate(scales):
      stop = start + n * n
      x = x + weights["positions"][start:stop] + weights["levels"][i]
      for block in blocks:
        x = block(x, condition)
      scale, shift = last_ada(F.silu(condition)).view(-1, 1, 2, width).unbind(2)
      logits = head(norm(x) * (1 + scale) + shift)
      if guided:
        t = guidance * i / (len(scales) - 1)
        cond, null = logits.chunk(2)
        logits = (1 + t) * cond - t * null
      chosen = choose(logits.flatten(0, 1), None if given is None else given[:, start:stop].flatten())
      codes.append(chosen.view(len(labels), -1))
      all_logits.append(logits if given is not None else None)
      if i + 1 < len(scales):
        features = features + spread(codes[-1], i)
        x = word(F.interpolate(features, (scales[i + 1],) * 2, mode="area").flatten(2).transpose(1, 2))
        x = x.repeat(2, 1, 1) if guided else x
      start = stop
    return torch.cat(codes, 1), None if given is None else torch.cat(all_logits, 1)

  return draw


def _conv(weight, bias) -> nn.Conv2d:
  """weight: [height, width, in, out]."""
  layer = nn.Conv2d(*weight.shape[2:], weight.shape[0], padding="same")
  layer.weight, layer.bias = nn.Parameter(weight.permute(3, 2, 0, 1).contiguous()), nn.Parameter(bias)
  return layer
