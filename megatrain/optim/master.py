"""Full-precision master weights behind a model that computes in a lower precision.

The model's own parameters are what the layers see; under bf16 they are copies. The masters are what the optimizer
updates, what is clipped and what a checkpoint holds (mixed precision training, arXiv 1710.03740, section 3.1).
"""

import torch
from torch import nn


class MasterWeights:
    """Masters of a model's parameters by canonical name; the model's own are converted to `compute_dtype`.

    When the two types are equal the masters are the model's own parameters and nothing is copied.
    """

    def __init__(self, named: dict[str, nn.Parameter], compute_dtype: torch.dtype) -> None:
        self.copied = any(p.dtype != compute_dtype for p in named.values())
        if not self.copied:
            self.parameters = named
            self._pairs: list[tuple[nn.Parameter, nn.Parameter]] = []
            return
        self.parameters = {
            name: nn.Parameter(p.detach().clone(), requires_grad=p.requires_grad) for name, p in named.items()
        }
        # Not model.to(): buffers keep their precision.
        for parameter in named.values():
            parameter.data = parameter.data.to(compute_dtype)
        self._pairs = [(self.parameters[name], p) for name, p in named.items()]

    @property
    def copies(self) -> dict[str, nn.Parameter]:
        """The model's own parameters by canonical name, where they are copies."""
        return {name: p for name, (_, p) in zip(self.parameters, self._pairs, strict=False)}

    @property
    def trained(self) -> dict[str, nn.Parameter]:
        """The masters that are trained: all but frozen ones."""
        return {name: master for name, master in self.parameters.items() if master.requires_grad}

    @torch.no_grad()
    def collect_gradients(self) -> None:
        """Add the gradients of one micro-batch to the masters' in full precision, and drop them from the model."""
        for master, parameter in self._pairs:
            if parameter.grad is None:
                continue
            if master.grad is None:
                master.grad = parameter.grad.to(master.dtype)
            else:
                master.grad.add_(parameter.grad)
            parameter.grad = None

    def zero_gradients(self) -> None:
        """Forget the gradients of the step that is done."""
        for master in self.parameters.values():
            master.grad = None

    @torch.no_grad()
    def sync_model_weights(self) -> None:
        """Copy the masters' present values to the model."""
        for master, parameter in self._pairs:
            parameter.copy_(master)
