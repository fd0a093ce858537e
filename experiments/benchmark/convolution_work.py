"""The convolutions of a network one by one, here and in PyTorch: what bounds a step on a CPU."""

import collections
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp

from abflax.models import MODELS, layers
from abflax.models.convolution import convolve
from abflax.models.variables import init_variables
from experiments.benchmark.jax_work import SHAPE
from experiments.benchmark.timing import Work, compiled_work
from experiments.common.flops import count_flops


@dataclasses.dataclass(frozen=True)
class Convolution:
    """One convolution of a network.

    Attributes:
      images: (height, width, channels) of its images.
      kernel: (height, width, channels, features).
      stride: in both directions.
    """

    images: tuple[int, ...]
    kernel: tuple[int, ...]
    stride: int

    def __str__(self) -> str:
        height, width, channels, features = self.kernel
        stride = f", stride {self.stride}" * (self.stride > 1)
        return f"{height}×{width}, {channels} → {features}, of {self.images[0]}²{stride}"

    @property
    def padding(self) -> int:
        """Pixels on each side."""
        return self.kernel[0] // 2

    def work(self, batch: int, trained: bool) -> Work:
        """The convolution on a batch; trained: its gradients too.

        Of the first convolution of a network only the kernel's gradient is computed.
        """
        draw = jax.random.normal
        images = draw(jax.random.key(0), (batch, *self.images))
        kernel = draw(jax.random.key(1), self.kernel)

        def forward(images: jax.Array, kernel: jax.Array) -> jax.Array:
            padding = ((self.padding, self.padding),) * 2
            return convolve(images, kernel, (self.stride, self.stride), padding)

        def backward(images: jax.Array, kernel: jax.Array, cotangent: jax.Array) -> Any:
            out, gradients = jax.vjp(forward, images, kernel)
            by_images, by_kernel = gradients(cotangent)
            return out, by_kernel, None if self.is_first else by_images

        arguments: tuple[jax.Array, ...] = (images, kernel)
        if trained:
            arguments = (*arguments, jnp.ones(jax.eval_shape(forward, *arguments).shape))
        function = backward if trained else forward
        flops = count_flops(function, *arguments)
        return compiled_work(jax.jit(function), *arguments, images=batch, flops=flops)

    def in_torch(self, batch: int, trained: bool, bfloat16: bool) -> Callable[[], None]:
        """The same in PyTorch, with the channels last."""
        import torch
        from torch.nn import functional

        height, width, channels = self.images
        last = torch.channels_last
        dtype = torch.bfloat16 if bfloat16 else torch.float32
        images = torch.randn(batch, channels, height, width, dtype=dtype).to(memory_format=last)
        rows, columns, _, features = self.kernel
        kernel = torch.randn(features, channels, rows, columns, dtype=dtype).to(memory_format=last)
        if trained:
            kernel.requires_grad_()
            images.requires_grad_(not self.is_first)

        def forward() -> torch.Tensor:
            return functional.conv2d(images, kernel, None, self.stride, self.padding)

        cotangent = torch.ones_like(forward())

        def once() -> None:
            out = forward()
            if trained:
                kernel.grad = images.grad = None
                out.backward(cotangent)

        return once

    @property
    def is_first(self) -> bool:
        """Whether it reads the images themselves, whose gradient nobody needs."""
        return self.images == SHAPE


def convolutions(network: str) -> Sequence[tuple[Convolution, int]]:
    """The convolutions of a network, and how often it has each."""
    found: collections.Counter[Convolution] = collections.Counter()

    def noted(images: Any, kernel: Any, strides: Any, padding: Any, **others: Any) -> Any:
        found[Convolution(tuple(images.shape[1:]), tuple(kernel.shape), strides[0])] += 1
        return convolve(images, kernel, strides, padding, **others)

    with mock.patch.object(layers, "convolve", noted):
        model = MODELS[network]()
        jax.eval_shape(lambda key: init_variables(model, key, SHAPE), jax.random.key(0))
    return list(found.items())
