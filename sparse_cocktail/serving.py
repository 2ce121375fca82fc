"""Subnets for use: exported for inference, timed, picked within limits."""

from __future__ import annotations

from contextlib import suppress

from torch import Tensor, nn

from .compression import to_compressed
from .costs import Costs, best, latency_ms
from .ops.checks import check_tensor, wrong_type
from .patterns import NM, Block, Channel, Unstructured
from .pruning import to_dense
from .slimming import to_slim
from .subnet import Subnet

__all__ = ["Serving"]


class Serving(Costs):
    """The part of `Cocktail` that makes networks of their own out of subnets."""

    model: nn.Module
    subnets: dict[str, Subnet]
    _latencies: dict[tuple, float]

    def export(
        self, name: str, plain: bool = False, example_input: Tensor | tuple | None = None
    ) -> nn.Module:
        """A copy of the model for inference, in eval mode, without what was pruned.

        Args:
            name: of a subnet.
            plain: torch.nn layers alone, the mask baked in as zeros, as in dense and channel
                subnets. Otherwise layers hold what is kept: `NMLinear` and `NMConv2d` in an N:M
                subnet, `SparseLinear` and `SparseConv2d` in an unstructured or block one.
            example_input: a batch of inputs on the model's device. Given, channels that are wholly
                pruned are cut out, so that a channel subnet is smaller and faster: see `to_slim`.

        Raises:
            ValueError: as `to_slim`; and for compressed layers, which are not cut.
        """
        if not isinstance(plain, bool):
            raise wrong_type("Cocktail.export", "plain", plain, "a bool; write example_input=x")
        subnet = self.subnet(name)
        compressed = isinstance(subnet.pattern, (NM, Unstructured, Block)) and not plain
        if compressed and example_input is not None:
            raise ValueError(
                f"Cocktail.export: {subnet.name} with example_input, but compressed layers are not "
                "cut; leave example_input out, or add plain=True"
            )
        with self.preserved_statistics():
            self.activate(name)
            if compressed:
                return to_compressed(self.model, subnet.pattern).eval()
            if example_input is not None:
                return to_slim(self.model, example_input)
            return to_dense(self.model).eval()

    def latency(self, name: str, example_input: Tensor) -> float:
        """Median milliseconds of the exported subnet's forward on `example_input`, as it comes.

        Measured here and now, in eval mode with torch's present threads, the first time it is asked
        for; then remembered for inputs of this shape, dtype and device. Of a channel subnet the
        pruned channels are cut out, where they can be.
        """
        x, subnet = example_input, self.subnet(name)
        check_tensor("Cocktail.latency", "example_input", x)
        key = subnet.name, x.shape, x.dtype, x.device
        if key not in self._latencies:
            network = self.export(subnet.name)
            if isinstance(subnet.pattern, Channel):
                with suppress(ValueError):  # of a model that cannot do without them
                    network = to_slim(network, x)
            self._latencies[key] = latency_ms(network, x)
        return self._latencies[key]

    def pick(
        self,
        max_flops: float | None = None,
        max_bytes: float | None = None,
        max_ms: float | None = None,
        example_input: Tensor | None = None,
    ) -> Subnet:
        """The most accurate subnet that satisfies every limit given.

        Of equal accuracies the one with fewer flops, then bytes. Subnets without a recorded
        accuracy come after those with one; among them, the one that keeps most weights.

        Args:
            max_flops, max_bytes: as in `summary`.
            max_ms: milliseconds, as `latency` measures them.
            example_input: a batch of inputs on the model's device; flops and ms need it.

        Raises:
            ValueError: without any limit, without a needed `example_input`, or when no subnet fits
                (with the smallest values there are). TypeError: for a limit that is no number.
        """
        limits = {"flops": max_flops, "bytes": max_bytes, "ms": max_ms}
        for what in ("flops", "ms"):
            if limits[what] is not None and example_input is None:
                raise ValueError(
                    f"Cocktail.pick: max_{what}={limits[what]!r} needs example_input, a batch of "
                    "inputs; give one, or limit max_bytes alone"
                )
        rows = self.summary(example_input)
        return self.subnets[best(rows, limits, lambda name: self.latency(name, example_input))]
