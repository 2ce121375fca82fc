"""BatchNorm that is silent where the masked layer before it is."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["MaskedBatchNorm2d", "saving_hooks", "share_hooks", "stamp"]


def stamp(tensor: Tensor) -> tuple[int, int] | None:
    """Changes when the tensor is written or replaced. None: it cannot tell."""
    return None if tensor.is_inference() else (tensor.data_ptr(), tensor._version)


def share_hooks(made: nn.Module, layer: nn.Module) -> None:
    """Give `made` the very hook tables of `layer`, so that its handles still remove them."""
    for name, table in vars(layer).items():
        if "_hook" in name:
            setattr(made, name, table)


saving_hooks = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", lambda _: ())


class MaskedBatchNorm2d(nn.BatchNorm2d):
    """nn.BatchNorm2d whose output is exactly zero on the channels that the masked conv pruned.

    `live` (bool, one per channel) multiplies the output; it is folded into scale and shift, which
    costs nothing and leaves the shared parameters alone. `source` names the convolution it follows.
    """

    def __init__(
        self,
        num_features,
        eps=1e-5,
        momentum=0.1,
        affine=True,
        track_running_stats=True,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype)
        self.masked = False
        self.source: str | None = None
        live = torch.ones(num_features, dtype=torch.bool, device=device)
        self.register_buffer("live", live, persistent=False)

    def set_live(self, live: Tensor | None) -> None:
        """Silence the channels where `live` (bool, (num_features,)) is False; None = all live."""
        self.masked = live is not None
        if live is not None:
            self.live.copy_(live)
            self.set_whole(bool(live.all()))

    _whole: tuple[int, int] | None = None  # stamp of `live` while no channel of it is silent

    def set_whole(self, whole: bool) -> None:
        """Say whether the present `live` keeps every channel: then there is nothing to silence.

        `set_live` and `Cocktail.activate` do it.
        """
        vars(self)["_whole"] = stamp(self.live) if whole else None  # quicker than nn.Module's way

    def _nothing_silent(self, x: Tensor) -> bool:
        """Not in graphs, which outlive a mask, nor under gradient checkpointing, where a switch of
        masks before the backward must not change how many tensors are saved."""
        if torch.compiler.is_compiling() or saving_hooks(True) is not None:
            return False
        if x.is_cuda and torch.cuda.is_current_stream_capturing():
            return False
        return self._whole is not None and self._whole == stamp(self.live)

    # Copies and moved modules know nothing yet: their stamp may come to equal an old one.

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_whole": None}

    def _apply(self, *args, **kwargs):
        self._whole = None
        return super()._apply(*args, **kwargs)

    def _save_to_state_dict(self, destination, prefix, keep_vars) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.masked:
            destination[prefix + "live"] = self.live.clone()

    def _load_from_state_dict(self, state_dict, prefix, metadata, strict, missing, *rest) -> None:
        live = state_dict.pop(prefix + "live", None)
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, *rest)
        if live is not None:
            if self.live.is_meta:
                self.live = torch.empty_like(live)
            self.set_live(live)
        elif self.masked and strict:
            missing.append(prefix + "live")

    def forward(self, x: Tensor) -> Tensor:
        if not self.masked or self._nothing_silent(x):
            return super().forward(x)
        self._check_input_dim(x)
        batch_statistics = self.training or self.running_mean is None
        update = self.training and self.track_running_stats
        momentum = self.momentum
        if update and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if momentum is None:  # cumulative average
                momentum = 1.0 / float(self.num_batches_tracked)
        use_running = update or not batch_statistics
        live = self.live.to(x.dtype if self.weight is None else self.weight.dtype)
        y = F.batch_norm(
            x,
            self.running_mean if use_running else None,
            self.running_var if use_running else None,
            live if self.weight is None else self.weight * live,
            None if self.bias is None else self.bias * live,
            batch_statistics,
            0.0 if momentum is None else momentum,
            self.eps,
        )
        return y

    @classmethod
    def from_dense(cls, layer: nn.BatchNorm2d) -> MaskedBatchNorm2d:
        """A masked BatchNorm that shares the parameters and buffers of `layer`."""
        made = cls(
            layer.num_features, layer.eps, layer.momentum, layer.affine, layer.track_running_stats
        )
        made.weight, made.bias = layer.weight, layer.bias
        for name, buffer in layer.named_buffers(recurse=False):
            setattr(made, name, buffer)
        device = next((t.device for t in (*layer.parameters(), *layer.buffers())), None)
        share_hooks(made, layer)
        return made.to(device).train(layer.training)

    def to_dense(self) -> nn.BatchNorm2d:
        """A plain nn.BatchNorm2d with its own parameters, silent channels baked in as zeros."""
        plain = nn.BatchNorm2d(
            self.num_features,
            self.eps,
            self.momentum,
            self.affine or self.masked,
            self.track_running_stats,
        )
        with torch.no_grad():
            if plain.affine:
                like = (self.weight, self.running_mean, plain.weight)
                live = self.live if self.masked else torch.ones_like(self.live)
                live = live.to(next(t for t in like if t is not None))
                weight = live if self.weight is None else self.weight * live
                bias = live * 0 if self.bias is None else self.bias * live
                plain.weight, plain.bias = nn.Parameter(weight), nn.Parameter(bias)
            for name, buffer in self.named_buffers(recurse=False):
                if name != "live" and buffer is not None:
                    setattr(plain, name, buffer.clone())
        return plain.train(self.training)
