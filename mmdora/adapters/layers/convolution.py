"""Adapters on 1D, 2D and 3D convolutions, with any number of groups."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.conv import _ConvNd
from torch.utils.checkpoint import checkpoint

from mmdora.adapters.layers.autocast import no_autocast
from mmdora.adapters.layers.base import AdapterLayer, Shapes
from mmdora.adapters.ops.functional import working_dtype
from mmdora.adapters.ops.output_functions import AdaptedChannelsFunction


class AdaptedConv(AdapterLayer, _ConvNd):
    """A convolution with adapters; the matrix of its weight is [out, in / groups · kernel].

    A is a convolution with the layer's kernel, shared by all groups. B is a grouped 1x1 convolution from r channels for
    each group to the output channels. So any rank fits any number of groups.
    """

    convolve: ClassVar[Any]  # torch.nn.functional's function

    @property
    def in_peft(self) -> bool:  # type: ignore[override]
        # PEFT's A ignores dilation and the padding mode, and reads the channels of all groups.
        return self.groups == 1 and set(self.dilation) == {1} and self.padding_mode == "zeros"

    @staticmethod
    def shapes(module: nn.Module, rank: int) -> Shapes:
        assert isinstance(module, _ConvNd)
        ones = (1,) * len(module.kernel_size)
        a = (rank, module.in_channels // module.groups, *module.kernel_size)
        return Shapes(a, (module.out_channels, rank, *ones), (1, module.out_channels, *ones))

    def matrix(self) -> Tensor:
        return self.weight.flatten(1)

    def from_matrix(self, matrix: Tensor) -> Tensor:
        return matrix.view(self.out_channels, self.in_channels // self.groups, *self.kernel_size)

    def adapted(self, x: Tensor, name: str) -> Tensor:
        if x.dim() == len(self.kernel_size) + 1:  # an input without a batch dimension
            return self.adapted(x[None], name)[0]
        spec = self.specs[name]
        dropped = F.dropout(x, spec.dropout) if spec.dropout and self.training else x
        rest = None
        if dropped is not x and spec.peft_dropout and spec.use_dora:
            rest = self._conv_forward(x - dropped, self.weight, None)
            x = dropped
        bias = None if self.bias is None else self.bias.to(x.dtype)
        u = self._conv_forward(x, self.weight, bias)
        magnitude, norm = (self.magnitude(name), self.norm(name)) if spec.use_dora else (None, None)
        with no_autocast(u.device.type):
            h, b = self._h(dropped, name) if spec.rank else (None, None)
            y = AdaptedChannelsFunction.apply(u, h, b, magnitude, norm, bias, spec.scale)
        return y if rest is None else y + rest

    def _h(self, x: Tensor, name: str) -> tuple[Tensor, Tensor]:
        """Return the output of A [batch, groups · r, ...] in the working dtype of x, and B [out, r]."""
        a, b = (getattr(self, attribute)[name] for attribute in self.low_rank)
        a = a.to(working_dtype(x.dtype))
        if a.dtype == x.dtype or not torch.is_grad_enabled():
            return self._apply_a(x, a), b.flatten(1)
        # The backward pass makes the copy of x in fp32 again, so that it is not kept.
        return checkpoint(self._apply_a, x, a, use_reentrant=False, preserve_rng_state=False), b.flatten(1)

    def _apply_a(self, x: Tensor, a: Tensor) -> Tensor:
        """Convolve x with A, with the layer's own stride, padding and dilation, in the dtype of A."""
        # A is shared by all groups, so they are moved into the batch dimension for A and back for its output.
        x = x.to(a.dtype).unflatten(1, (self.groups, -1)).flatten(0, 1)
        padding: Any = self.padding
        if self.padding_mode != "zeros":
            x, padding = F.pad(x, self._reversed_padding_repeated_twice, mode=self.padding_mode), 0
        h = type(self).convolve(x, a, stride=self.stride, padding=padding, dilation=self.dilation)
        return h.unflatten(0, (-1, self.groups)).flatten(1, 2)


class AdaptedConv1d(AdaptedConv, nn.Conv1d):
    convolve = staticmethod(F.conv1d)


class AdaptedConv2d(AdaptedConv, nn.Conv2d):
    convolve = staticmethod(F.conv2d)


class AdaptedConv3d(AdaptedConv, nn.Conv3d):
    convolve = staticmethod(F.conv3d)
