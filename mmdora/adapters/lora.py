"""LoRA (arXiv 2106.09685) on linear layers: y = xWᵀ + b + s·dropout(x)AᵀBᵀ."""

from __future__ import annotations

import math
import zlib

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmdora.adapters import norms
from mmdora.adapters.base import ADAPTERS, AdapterLayer, AdapterMethod, LowRankSpec
from mmdora.adapters.functional import AdaptedLinearFunction, dora_norm, merged_weight
from mmdora.config import PartConfig
from mmdora.errors import UserError
from mmdora.zero import gathered


class AdaptedLinear(AdapterLayer, nn.Linear):
    """An `nn.Linear` with LoRA or DoRA adapters; shares the weight and bias of the layer it replaces."""

    def __init__(self, linear: nn.Linear):
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.specs = {}
        self.keys: dict[str, int] = {}  # under which this layer's norms are kept
        self.active = None
        self.lora_A = nn.ParameterDict()
        self.lora_B = nn.ParameterDict()
        self.lora_magnitude_vector = nn.ParameterDict()
        self.train(linear.training)

    def add_adapter(self, name: str, spec: LowRankSpec, seed: int = 0) -> None:
        """A Kaiming-uniform, B zero, m = ‖W‖; all fp32, since a bf16 magnitude rounds its updates to zero."""
        device = self.weight.device
        a = torch.empty(spec.rank, self.in_features, device="meta" if device.type == "meta" else "cpu")
        # Drawn on the CPU from a generator of its own: the same numbers on every device and in every process.
        nn.init.kaiming_uniform_(a, a=math.sqrt(5), generator=torch.Generator().manual_seed(seed))
        self.lora_A[name] = nn.Parameter(a.to(device))
        self.lora_B[name] = nn.Parameter(torch.zeros(self.out_features, spec.rank, device=device))
        if spec.use_dora:
            with gathered([self.weight]), torch.no_grad():
                norm = torch.linalg.vector_norm(self.weight, dim=1, dtype=torch.float32)
            self.lora_magnitude_vector[name] = nn.Parameter(norm)
        self.specs[name], self.keys[name] = spec, norms.new_key()
        self.active = name

    def adapter_tensors(self, name: str) -> dict[str, nn.Parameter]:
        tensors = {"lora_A.weight": self.lora_A[name], "lora_B.weight": self.lora_B[name]}
        if self.specs[name].use_dora:
            tensors["lora_magnitude_vector"] = self.lora_magnitude_vector[name]
        return tensors

    def forward(self, x: Tensor) -> Tensor:
        if self.active is None:
            return F.linear(x, self.weight, self.bias)
        name, spec = self.active, self.specs[self.active]
        a, b = self.lora_A[name], self.lora_B[name]
        device = x.device.type
        if torch.is_autocast_enabled(device):
            x = x.to(torch.get_autocast_dtype(device))
        dropped = F.dropout(x, spec.dropout) if spec.dropout and self.training else None
        magnitude = norm = None
        if spec.use_dora:
            magnitude = self.lora_magnitude_vector[name]
            norm = norms.norm(self.weight.detach(), a.detach(), b.detach(), spec.scale, self.keys[name])
        with torch.autocast(device, enabled=False):
            return AdaptedLinearFunction.apply(x, dropped, self.weight, self.bias, a, b, magnitude, norm, spec.scale)

    def merge(self, name: str) -> nn.Linear:
        spec = self.specs[name]
        magnitude = self.lora_magnitude_vector[name] if spec.use_dora else None
        with torch.no_grad():
            merged = merged_weight(self.weight, self.lora_A[name], self.lora_B[name], spec.scale, magnitude)
        return self._plain(nn.Parameter(merged, requires_grad=False))

    def unwrap(self) -> nn.Linear:
        assert isinstance(self.weight, nn.Parameter)
        return self._plain(self.weight)

    def _plain(self, weight: nn.Parameter) -> nn.Linear:
        plain = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None, device="meta")
        plain.weight, plain.bias = weight, self.bias
        return plain.train(self.training)

    def magnitude_for(self, name: str) -> Tensor:
        with gathered([self.weight]):
            return dora_norm(self.weight, self.lora_A[name], self.lora_B[name], self.specs[name].scale)

    def extra_repr(self) -> str:
        adapters = ", ".join(f"{n}: r={s.rank}{' dora' if s.use_dora else ''}" for n, s in self.specs.items())
        return f"{super().extra_repr()}, adapters=({adapters}), active={self.active}"


def wrap(model: nn.Module, path: str) -> AdapterLayer:
    """The adapter layer at `path`, put there if a plain layer still is. Raises UserError for layers that cannot have
    one."""
    module = model.get_submodule(path)
    if isinstance(module, AdapterLayer):
        return module
    if type(module) is not nn.Linear:
        raise UserError(f"{path}: a {type(module).__name__} cannot have a low-rank adapter; only nn.Linear can")
    parent, _, leaf = path.rpartition(".")
    layer = AdaptedLinear(module)
    setattr(model.get_submodule(parent), leaf, layer)
    return layer


@ADAPTERS.register("lora")
class LoRA(AdapterMethod):
    use_dora = False
    takes_targets = True

    def adapt(self, model: nn.Module, part: str, targets: list[str], config: PartConfig, name: str) -> list[str]:
        spec = LowRankSpec(config.rank, config.alpha, config.dropout, config.use_rslora, self.use_dora)
        for path in targets:
            # A's start depends on torch's seed and on the layer, not on the order in which layers are built.
            seed = (torch.initial_seed() ^ zlib.crc32(path.encode())) % 2**63
            wrap(model, path).add_adapter(name, spec, seed)
        return targets
