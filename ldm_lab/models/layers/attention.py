"""Self-attention over the positions of a feature map."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from ldm_lab.models.layers.recomputed import Recomputed
from ldm_lab.utils.errors import UserError


class AttentionBlock(Recomputed):
    """GroupNorm and multi-head self-attention over all positions, with a residual connection.

    Args:
        channels: channels of the feature map.
        dim_head: channels of one head; None: one head with all channels. If it does not divide `channels`, there are
            as many complete heads as fit, on fewer channels.
        groups: groups of the normalisation; None: no normalisation.
        eps: added to the variance by the normalisation.
        num_heads: number of heads, instead of `dim_head`.

    Raises:
        UserError: `num_heads` does not divide `channels`, or `channels` is less than `dim_head`.
    """

    def __init__(
        self,
        channels: int,
        dim_head: int | None = None,
        groups: int | None = 32,
        eps: float = 1e-6,
        num_heads: int | None = None,
    ) -> None:
        super().__init__()
        if num_heads and channels % num_heads:
            raise UserError(f"num_attention_heads={num_heads} does not divide the {channels} channels of a block")
        self.dim_head = channels // num_heads if num_heads else dim_head or channels
        if self.dim_head > channels:
            raise UserError(f"attention_head_dim={dim_head} is more than the {channels} channels of a block")
        inner = channels // self.dim_head * self.dim_head
        self.group_norm = nn.Identity() if groups is None else nn.GroupNorm(groups, channels, eps)
        self.to_q = nn.Linear(channels, inner)
        self.to_k = nn.Linear(channels, inner)
        self.to_v = nn.Linear(channels, inner)
        self.to_out = nn.Sequential(nn.Linear(inner, channels))

    def forward(self, x: Tensor) -> Tensor:
        """`(B, C, H, W) -> (B, C, H, W)`; with a fused kernel memory grows with H*W, not with its square."""
        return self.recomputed(self._forward, x)

    def _forward(self, x: Tensor) -> Tensor:
        h = self.group_norm(x).flatten(2).transpose(1, 2)  # (B, C, H, W) -> (B, H*W, C)
        heads = (self._split(project(h)) for project in (self.to_q, self.to_k, self.to_v))
        h = F.scaled_dot_product_attention(*heads)  # (B, heads, H*W, dim_head)
        h = self.to_out(h.transpose(1, 2).flatten(2))  # (B, heads, H*W, dim_head) -> (B, H*W, C)
        return x + h.transpose(1, 2).reshape(x.shape)  # (B, H*W, C) -> (B, C, H, W)

    def _split(self, h: Tensor) -> Tensor:
        return h.unflatten(2, (-1, self.dim_head)).transpose(1, 2)  # (B, H*W, C) -> (B, heads, H*W, dim_head)
