"""A decode step of a delta-rule layer written by hand, each step of it replaceable."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from inductor_moe.ops.delta_rule import delta_rule

HEADS, VALUE_HEADS, KEY, VALUE, HIDDEN = 2, 4, 16, 24, 40
CHANNELS = 2 * HEADS * KEY + VALUE_HEADS * VALUE


class Step(nn.Module):
    """One decode step of a gated delta-rule layer; each step can be replaced by keyword."""

    def __init__(self, length=4, width=4, bias=False, **steps):
        super().__init__()
        generator = torch.Generator().manual_seed(3)

        def parameter(*shape, scale=1.0):
            return nn.Parameter(scale * torch.randn(shape, generator=generator))

        self.steps, self.length = steps, length
        self.qkv = parameter(HIDDEN, CHANNELS, scale=HIDDEN**-0.5)
        self.ab = parameter(HIDDEN, 2 * VALUE_HEADS, scale=HIDDEN**-0.5)
        self.gate = parameter(HIDDEN, VALUE_HEADS * VALUE, scale=HIDDEN**-0.5)
        self.weight = parameter(CHANNELS, 1, width)
        self.bias = parameter(CHANNELS) if bias else None
        self.A_log, self.dt_bias = parameter(VALUE_HEADS), parameter(VALUE_HEADS)
        self.norm = parameter(VALUE)

    def step(self, name, default):
        return self.steps.get(name, default)

    def forward(self, x, conv_state, state):
        batch = x.shape[0]
        token = (x @ self.qkv)[:, :, None]
        joined = torch.cat([conv_state, token], dim=-1)
        mixed = F.conv1d(joined, self.weight, self.bias, groups=CHANNELS)[:, :, -1:]
        kept = self.step("keep", lambda v: v[:, :, -self.length :])(joined)
        conv_state.copy_(kept)
        mixed = self.step("activation", F.silu)(mixed).transpose(1, 2)
        parts = torch.split(mixed, [HEADS * KEY, HEADS * KEY, VALUE_HEADS * VALUE], dim=-1)
        q, k, v = self.step("order", lambda q, k, v: (q, k, v))(*parts)
        q, k = (part.reshape(batch, 1, HEADS, KEY) for part in (q, k))
        v = v.reshape(batch, 1, VALUE_HEADS, VALUE)
        q, k = (part.repeat_interleave(VALUE_HEADS // HEADS, dim=2) for part in (q, k))
        a, b = (x @ self.ab)[:, None].chunk(2, dim=-1)
        beta = self.step("beta", torch.sigmoid)(b)
        g = self.step("decay", self.decay)(a, self.A_log, self.dt_bias)
        rule = self.step("rule", delta_rule)
        out, new_state = rule(q, k, v, g, beta, state, KEY**-0.5, 1e-6)
        self.step("write", lambda s, n: s.copy_(n))(state, new_state)
        z = (x @ self.gate).reshape(-1, VALUE)
        out = self.step("normalise", self.normalise)(out.reshape(-1, VALUE), self.norm, z)
        extra = self.step("extra", None)
        result = self.step("place", lambda v: v)(out).reshape(batch, -1)
        return (result, extra(conv_state, state, mixed)) if extra else result

    @staticmethod
    def decay(a, A_log, dt_bias):
        return -A_log.float().exp() * F.softplus(a.float() + dt_bias)

    @staticmethod
    def normalise(x, weight, z):
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)
        return (weight * wide * F.silu(z.float())).to(x.dtype)

    def states(self, batch):
        """A convolution state and a recurrent one, random."""
        return [
            torch.randn(batch, CHANNELS, self.length),
            torch.randn(batch, VALUE_HEADS, KEY, VALUE),
        ]
