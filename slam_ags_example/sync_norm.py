"""Batch norm over the rows of all processes, on CUDA and on the CPU."""

import torch
from torch import Tensor, nn

from slam_ags_example.ranks import add_up, count

__all__ = ["SyncNorm", "synchronise_norms"]


class SyncNorm(nn.SyncBatchNorm):
    """Batch norm whose statistics in training are those of one process on the joined batch.

    On CUDA it is torch's own, which refuses tensors on the CPU. There, with N the values of a
    channel on all processes together::

        y = (x - μ) / √(σ² + ε) · γ + β,    μ = 1/N · Σ x,    σ² = 1/N · Σ (x - μ)²

    where both sums go over the processes, and so do their gradients.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Normalised [n, C, ...]; n may differ from process to process."""
        if not self.training or input.device.type != "cpu":
            return super().forward(input)
        x = input.to(torch.promote_types(input.dtype, torch.float32))
        dims = [dim for dim in range(x.ndim) if dim != 1]
        shape = [1, -1, *[1] * (x.ndim - 2)]
        own_n = x.new_tensor([x.numel() / x.shape[1]])
        sums = add_up(torch.cat([x.sum(dims), own_n]))
        n = sums[-1].detach()
        mean = sums[:-1] / n
        centred = x - mean.view(shape)
        variance = add_up(centred.square().sum(dims)) / n
        self._keep(mean.detach(), variance.detach() * n / (n - 1))
        scale = (variance + self.eps).rsqrt()
        if self.affine:
            scale = scale * self.weight
        y = centred * scale.view(shape)
        if self.affine:
            y = y + self.bias.view(shape)
        return y.to(input.dtype)

    @torch.no_grad()
    def _keep(self, mean: Tensor, variance: Tensor) -> None:
        """Move the running statistics, as torch's batch norm does."""
        if self.running_mean is None or self.running_var is None:
            return
        assert self.num_batches_tracked is not None  # it is there with the other two
        assert self.momentum is not None  # a running mean over all batches is not in use here
        self.num_batches_tracked += 1
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
        self.running_var.lerp_(variance.to(self.running_var.dtype), self.momentum)


def synchronise_norms(module: nn.Module) -> None:
    """Put :class:`SyncNorm` in place of the batch norms inside, if there are several processes.

    Parameters and buffers stay the same tensors under the same names.
    """
    if count() == 1:
        return
    for parent in list(module.modules()):
        for name, norm in parent.named_children():
            if isinstance(norm, nn.BatchNorm1d | nn.BatchNorm2d):
                parent.register_module(name, _synchronised(norm))


def _synchronised(norm: nn.BatchNorm1d | nn.BatchNorm2d) -> SyncNorm:
    tracks, affine = norm.track_running_stats, norm.affine
    new = SyncNorm(norm.num_features, norm.eps, norm.momentum, affine, tracks)
    for name, parameter in norm.named_parameters(recurse=False):
        new.register_parameter(name, parameter)
    for name, buffer in norm.named_buffers(recurse=False):
        new.register_buffer(name, buffer)
    return new.train(norm.training)
