"""Adapters on embeddings."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmdora.adapters.layers.autocast import no_autocast
from mmdora.adapters.layers.base import AdapterLayer, Shapes
from mmdora.adapters.ops.output_functions import AdaptedRowsFunction
from mmdora.models.new_tokens import scaled


class AdaptedEmbedding(AdapterLayer, nn.Embedding):
    """`nn.Embedding` with adapters, as in PEFT.

    The matrix is [width, vocabulary], so a magnitude scales one dimension of all tokens. Dropout does not apply, since
    the input is token ids; PEFT ignores `lora_dropout` here too.
    """

    low_rank = ("lora_embedding_A", "lora_embedding_B")
    file_suffix = ""
    takes_dropout = False
    bias = None

    @staticmethod
    def shapes(module: nn.Module, rank: int) -> Shapes:
        assert isinstance(module, nn.Embedding)
        width = module.embedding_dim
        return Shapes((rank, module.num_embeddings), (width, rank), (width,))

    def initialize(self, a: Tensor, b: Tensor, generator: torch.Generator) -> None:
        """Initialize A as zero and B normal, so that tokens which never occur keep their direction."""
        nn.init.zeros_(a)
        b.copy_(torch.empty(b.shape, device=a.device).normal_(generator=None if a.is_meta else generator))

    def matrix(self) -> Tensor:
        return self.weight.T

    def from_matrix(self, matrix: Tensor) -> Tensor:
        return matrix.T

    def adapted(self, x: Tensor, name: str) -> Tensor:
        spec = self.specs[name]
        u = self._look_up(x, self.weight)
        a, b = self.factors(name)
        magnitude, norm = (self.magnitude(name), self.norm(name)) if spec.use_dora else (None, None)
        with no_autocast(u.device.type):
            h = None if a is None else self._look_up(x, a.T)
            return scaled(self, AdaptedRowsFunction.apply(u, h, b, magnitude, norm, spec.scale))

    def plain(self, x: Tensor) -> Tensor:
        return scaled(self, self._look_up(x, self.weight))

    def _look_up(self, x: Tensor, table: Tensor) -> Tensor:
        return F.embedding(
            x, table, self.padding_idx, self.max_norm, self.norm_type, self.scale_grad_by_freq, self.sparse
        )
