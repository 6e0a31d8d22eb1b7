"""Adapters on 1D, 2D and 3D convolutions, with any number of groups."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.conv import _ConvNd

from mmdora.adapters.layers.base import AdapterLayer, Shapes


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
        rest, bias = None, self.bias
        if dropped is not x and spec.peft_dropout and spec.use_dora:
            rest = self._conv_forward(x - dropped, self.weight, None)
            x = dropped
        y = self._conv_forward(x, self.weight, None)
        ones = [1] * len(self.kernel_size)
        if spec.rank:
            a, b = (getattr(self, attribute)[name].to(x.dtype) for attribute in self.low_rank)
            # A is shared by all groups, so they are moved into the batch dimension for A and back for B.
            grouped = dropped.unflatten(1, (self.groups, -1)).flatten(0, 1)
            h = self._apply_a(grouped, a).unflatten(0, (-1, self.groups)).flatten(1, 2)
            y = y + spec.scale * type(self).convolve(h, b, groups=self.groups)
        if spec.use_dora:
            y = y * self.gain(name).to(y.dtype).view(-1, *ones)
        y = y if rest is None else y + rest
        return y if bias is None else y + bias.to(y.dtype).view(-1, *ones)

    def _apply_a(self, x: Tensor, a: Tensor) -> Tensor:
        """Convolve x with A, with the layer's own stride, padding and dilation."""
        padding: Any = self.padding
        if self.padding_mode != "zeros":
            x, padding = F.pad(x, self._reversed_padding_repeated_twice, mode=self.padding_mode), 0
        return type(self).convolve(x, a, stride=self.stride, padding=padding, dilation=self.dilation)


class AdaptedConv1d(AdaptedConv, nn.Conv1d):
    convolve = staticmethod(F.conv1d)


class AdaptedConv2d(AdaptedConv, nn.Conv2d):
    convolve = staticmethod(F.conv2d)


class AdaptedConv3d(AdaptedConv, nn.Conv3d):
    convolve = staticmethod(F.conv3d)
