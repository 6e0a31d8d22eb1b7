"""The projector `resampler`: trainable queries attend to the patches, so that every image takes `num_queries` tokens.

One cross-attention as in Qwen-VL (arXiv 2308.12966), then the two-layer MLP of LLaVA-1.5. Queries that attend to
patches come from Flamingo (arXiv 2204.14198).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

HEAD_WIDTH = 64  # channels per attention head, if they divide the width


class Resampler(nn.Module):
    """Map patches [images, side · side, width] to tokens [images, num_queries, out_width].

    The patches are those of a square image in row-major order; `width` is the vision encoder's.
    """

    def __init__(self, num_queries: int, width: int, out_width: int):
        super().__init__()
        self.heads = next(heads for heads in range(max(1, width // HEAD_WIDTH), 0, -1) if width % heads == 0)
        self.queries = nn.Parameter(torch.empty(num_queries, width))
        self.norm_queries = nn.LayerNorm(width)
        self.norm_patches = nn.LayerNorm(width)
        # No biases: the norms before have them, and a bias of the keys changes no attention and gets no gradient.
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, width, bias=False)
        self.v_proj = nn.Linear(width, width, bias=False)
        self.out_proj = nn.Linear(width, width, bias=False)
        self.norm_read = nn.LayerNorm(width)
        self.linear_1 = nn.Linear(width, out_width)
        self.linear_2 = nn.Linear(out_width, out_width)

    def forward(self, patches: Tensor) -> Tensor:
        num_images, num_patches, width = patches.shape
        # The queries are repeated for each image, since an adapter may differ between the rows of a batch.
        queries = self.queries.expand(num_images, -1, -1)
        patches = self.norm_patches(patches)
        # Attention ignores the order of its keys, so the keys carry the positions.
        positions = grid_positions(math.isqrt(num_patches), width, patches.device).to(patches.dtype)
        read = F.scaled_dot_product_attention(
            self._heads(self.q_proj(self.norm_queries(queries))),
            self._heads(self.k_proj(patches + positions)),
            self._heads(self.v_proj(patches)),
        )
        tokens = queries + self.out_proj(read.transpose(1, 2).flatten(2))
        return self.linear_2(F.gelu(self.linear_1(self.norm_read(tokens))))

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(2, (self.heads, -1)).transpose(1, 2)

    def init_weights(self, std: float) -> None:
        """Initialise matrices and queries with this standard deviation, biases with 0, norms as the identity."""
        nn.init.normal_(self.queries, std=std)
        for module in self.children():
            if isinstance(module, nn.LayerNorm):
                module.reset_parameters()
            else:
                assert isinstance(module, nn.Linear)
                nn.init.normal_(module.weight, std=std)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)


def grid_positions(side: int, width: int, device: torch.device | None = None) -> Tensor:
    """Return sinusoidal positions [side · side, width] in fp32, in row-major order.

    The first half of the channels encodes the row, the second half the column (frequencies of arXiv 1706.03762). They
    are computed, not trained, so a grid may have any size.
    """
    bands = width // 4
    frequencies = 10000.0 ** (-torch.arange(bands, device=device) / max(bands, 1))
    angles = torch.arange(side, device=device)[:, None] * frequencies
    waves = torch.cat([angles.sin(), angles.cos()], 1)  # [side, width / 2]
    table = torch.cat([waves.repeat_interleave(side, 0), waves.repeat(side, 1)], 1)
    return F.pad(table, (0, width - table.shape[1]))  # for a width that is not a multiple of 4
