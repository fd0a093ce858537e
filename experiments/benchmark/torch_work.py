"""The same work in PyTorch, written as its users write it: the columns to compare with.

Wide ResNets whose forward pass returns the pre-activations, 1×1 connectors with batch norm, the
hinge, KD, SGD with Nesterov momentum. Images wait normalised in memory: no augmentation is timed.
"""

import dataclasses
from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional


@dataclasses.dataclass(frozen=True)
class Variant:
    """What a user may ask of PyTorch on a CPU, beside the plain program.

    Attributes:
      channels_last: images and weights lie in memory with their channels last.
      compiled: the networks are compiled by `torch.compile`.
      bfloat16: forward passes run under `torch.autocast`.
    """

    channels_last: bool = False
    compiled: bool = False
    bfloat16: bool = False

    def network(self, name: str) -> nn.Module:
        """Makes the network of a name such as "wrn22-4"."""
        depth, width = name.removeprefix("wrn").split("-")
        made: nn.Module = WideResNet(int(depth), int(width))
        if self.channels_last:
            made = made.to(memory_format=torch.channels_last)
        return torch.compile(made) if self.compiled else made

    def images(self, count: int) -> torch.Tensor:
        """Draws images."""
        drawn = torch.randn(count, 3, 32, 32)
        return drawn.to(memory_format=torch.channels_last) if self.channels_last else drawn

    def forward(
        self, network: nn.Module, images: torch.Tensor
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Runs a network: logits and taps, in float32."""
        with torch.autocast("cpu", torch.bfloat16, enabled=self.bfloat16):
            logits, taps = network(images)
        return logits.float(), [tap.float() for tap in taps]


PLAIN = Variant()
VARIANTS = {  # by the ends of their keys in a record
    "seconds": PLAIN,
    "channels_last": Variant(channels_last=True),
    "compiled": Variant(compiled=True),
    "compiled_channels_last": Variant(channels_last=True, compiled=True),
}
HALF = {  # where the processor multiplies matrices of bfloat16
    "compiled_channels_last_bfloat16": Variant(channels_last=True, compiled=True, bfloat16=True),
}


def multiplies_bfloat16() -> bool:
    """Whether the processor has matrix products of bfloat16 (AMX)."""
    return bool(torch.cpu._is_amx_tile_supported())


def variants() -> dict[str, Variant]:
    """What is worth a try on this processor, by name."""
    return VARIANTS | (HALF if multiplies_bfloat16() else {})


class Block(nn.Module):
    """Norm–ReLU–conv twice and a shortcut; also returns what its first norm puts out."""

    def __init__(self, inputs: int, features: int, stride: int) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, features, 3, stride, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(features)
        self.conv2 = nn.Conv2d(features, features, 3, 1, 1, bias=False)
        same = inputs == features and stride == 1
        self.shortcut = None if same else nn.Conv2d(inputs, features, 1, stride, bias=False)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the sum, and the pre-activation before the block's first convolution."""
        before = self.norm1(x)
        active = functional.relu(before)
        y = self.conv2(functional.relu(self.norm2(self.conv1(active))))
        return y + (x if self.shortcut is None else self.shortcut(active)), before


class WideResNet(nn.Module):
    """WRN-depth-width; returns logits and the three taps."""

    def __init__(self, depth: int, width: int, num_classes: int = 10) -> None:
        super().__init__()
        self.widths = [16 * width, 32 * width, 64 * width]
        self.stem = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.blocks = nn.ModuleList()
        inputs = 16
        for group, features in enumerate(self.widths):
            for block in range((depth - 4) // 6):
                self.blocks.append(Block(inputs, features, 2 if group and not block else 1))
                inputs = features
        self.norm = nn.BatchNorm2d(inputs)
        self.classifier = nn.Linear(inputs, num_classes)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Returns logits and taps."""
        x, taps = self.stem(x), []
        for index, block in enumerate(self.blocks):
            x, before = block(x)
            if index and index % (len(self.blocks) // 3) == 0:
                taps.append(before)
        last = self.norm(x)
        taps.append(last)
        return self.classifier(functional.relu(last).mean(dim=(2, 3))), taps


def hinge(student: torch.Tensor, teacher: torch.Tensor, margin: float = 1.0) -> torch.Tensor:
    """The activation transfer hinge, summed."""
    active = (teacher > 0).to(student.dtype)
    return (
        active * functional.relu(margin - student) ** 2
        + (1 - active) * functional.relu(margin + student) ** 2
    ).sum()


def work(
    teacher_name: str, student_name: str, batch: int, held_out: int, variant: Variant = PLAIN
) -> dict[str, Callable[[], None]]:
    """Name of a piece of work -> what does it once: a step, or evaluation on `held_out` images."""
    torch.manual_seed(0)
    teacher, student = variant.network(teacher_name).eval(), variant.network(student_name)
    forward = variant.forward
    connectors = nn.ModuleList(
        nn.Sequential(nn.Conv2d(ours, theirs, 1, bias=False), nn.BatchNorm2d(theirs))
        for ours, theirs in zip(student.widths, teacher.widths, strict=True)
    )
    images = variant.images(batch)
    unseen, classes = variant.images(held_out), torch.randint(10, (held_out,))
    with torch.no_grad():
        cached = [tap > 0 for tap in forward(teacher, images)[1]]

    def sgd(modules: list[nn.Module]) -> torch.optim.Optimizer:
        parameters = [p for module in modules for p in module.parameters()]
        return torch.optim.SGD(parameters, 0.1, momentum=0.9, weight_decay=5e-4, nesterov=True)

    initialiser, classifier = sgd([student, connectors]), sgd([student])

    def teach() -> tuple[torch.Tensor, list[torch.Tensor]]:
        with torch.no_grad():
            return forward(teacher, images)

    def update(optimizer: torch.optim.Optimizer, loss: torch.Tensor) -> None:
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    def initialise(targets: Callable[[], list[torch.Tensor]]) -> None:
        student.train()
        theirs = targets()
        pairs = zip(connectors, forward(student, images)[1], theirs, strict=True)
        loss = sum((hinge(r(s), t) for r, s, t in pairs), start=torch.zeros(()))
        update(initialiser, 3 / 4000 / batch * loss)

    def classify() -> None:
        student.train()
        softened = functional.softmax(teach()[0] / 3, dim=1)
        ours = functional.log_softmax(forward(student, images)[0] / 3, dim=1)
        update(classifier, functional.kl_div(ours, softened, reduction="batchmean"))

    def evaluate() -> None:
        student.eval()
        with torch.no_grad():
            for images, labels in zip(unseen.split(250), classes.split(250), strict=True):
                logits = forward(student, images)[0]
                (logits.argmax(dim=1) != labels).sum().item()
                functional.cross_entropy(logits, labels, reduction="sum").item()

    return {
        "teacher": lambda: teach() and None,
        "initialise": lambda: initialise(lambda: teach()[1]),
        "initialise, cached targets": lambda: initialise(lambda: cached),
        "classify": classify,
        "evaluate": evaluate,
    }
