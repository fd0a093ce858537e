"""Every program lowers for GPUs and TPUs, and what is done for CPUs alone stays on CPUs.

Lowering needs no accelerator. A program is decided by the platform that it is lowered for, not by
the one that lowers it.
"""

import functools
import re

import jax
import numpy as np
import pytest

from abflax import Network, Resources, load
from abflax.config import RunConfig
from abflax.data import DataSets
from abflax.models import MODELS
from abflax.models.variables import init_variables
from abflax.runtime.reporter import NullReporter
from abflax.training.group import TrainingGroup
from abflax.training.parallel import compile_evaluation, compile_steps
from abflax.training.run import Run
from abflax.training.run_directory import RunDirectory

SHAPE = (8, 8, 1)
PRECISIONS = pytest.mark.parametrize(
    "precision", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)]
)
# The least float32, with which batch norm hides a sum of products from XLA's CPU backend.
LEAST = "0xFF7FFFFF|-3\\.40282"


@functools.cache
def lowered(program, platform, precision="float32", networks=("wrn10-1", "wrn10-2")):
    """The StableHLO text of a program of a run: "initialise", "classify", "evaluate", "targets"."""
    student, teacher = (MODELS[name]() for name in networks)
    teacher = Network(teacher, init_variables(teacher, jax.random.key(0), SHAPE), "teacher")
    data = load("digits", "test").take(np.arange(40))
    config = RunConfig("digits", networks[0], "teacher", epochs=(1, 1), batch_size=16,
                       precision=precision)  # fmt: skip
    group = TrainingGroup(
        config, [teacher], DataSets(data, data), Resources(1, steps_per_dispatch=2)
    )
    run = Run(config, student, group, RunDirectory(None, config), NullReporter())
    phase = run._programs[program == "classify"]
    key = jax.random.key(0)
    state = jax.eval_shape(lambda: phase.begin(phase.init(key), group.teachers[0].stats, key))
    params = group.teachers[0].params
    if program == "evaluate":
        function = compile_evaluation((phase,), group.spec)
        (inputs,) = group.evaluation._inputs
        arguments = (((state.params, state.batch_stats),), params, inputs)
    elif program == "targets":
        index = np.zeros((1, 16), np.int32)
        images = group.inputs.resident["images"]
        function, arguments = phase.targets, (params, group.teachers[0].stats, images, index, index)
    else:
        function = compile_steps((phase,), group.spec)
        arguments = ((state,), params, group.inputs(0, 2), key, 2, None)
    traced = jax.jit(function).trace(*arguments)
    return traced.lower(lowering_platforms=(platform,)).as_text()


def convolutions(text):
    """How many there are, besides those whose result is a batch of images."""
    return len(re.findall(r"stablehlo\.convolution\([^\n]*-> tensor<(?!16x8x8x1x)", text))


def strided_slices(text):
    return len(re.findall(r"stablehlo\.slice [^\n]*:\d+:[2-9]", text))


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
@PRECISIONS
@pytest.mark.parametrize("program", ["initialise", "classify"])
def test_train_steps_on_accelerators(program, precision, platform):
    text = lowered(program, platform, precision)
    # 7 of 3×3 and 2 strided shortcuts (an unstrided one is a product): forward in both networks,
    # and in the student the gradients for kernels and for images. The stem's for images is not
    # counted: nothing reads it, so XLA drops it, or JAX itself from 0.12 on.
    assert convolutions(text) == 4 * 9 - 1
    assert not strided_slices(text)
    assert not re.search(LEAST, text)
    assert ("bf16" in text) == (precision == "bfloat16")


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
@PRECISIONS
@pytest.mark.parametrize(("program", "networks"), [("evaluate", 2), ("targets", 1)])
def test_evaluation_and_targets_on_accelerators(program, networks, precision, platform):
    text = lowered(program, platform, precision)
    assert convolutions(text) == 9 * networks
    assert not strided_slices(text) and not re.search(LEAST, text)
    assert ("bf16" in text) == (precision == "bfloat16")


def test_what_is_done_for_cpus():
    """Kernel gradients in chunks, shortcuts as products, sums of products that XLA does not see."""
    text = lowered("initialise", "cpu")
    assert strided_slices(text) and re.search(LEAST, text)


def test_a_gpu_never_multiplies_a_strided_slice():
    """XLA 0.10.1 aborts on it (openxla/xla#47381): relu, x[:, ::2, ::2], reshape, dot."""
    from abflax.models.convolution import convolve

    def loss(images, kernel, shortcut):
        x = jax.nn.relu(images)
        wide = convolve(x, kernel, (2, 2), ((1, 1), (1, 1)))
        return ((wide + convolve(x, shortcut, (2, 2), ((0, 0), (0, 0)))) ** 2).sum()

    arguments = [jax.ShapeDtypeStruct(shape, np.float32)
                 for shape in ((4, 8, 8, 16), (3, 3, 16, 32), (1, 1, 16, 32))]  # fmt: skip
    traced = jax.jit(jax.value_and_grad(loss, (0, 1, 2))).trace(*arguments)
    texts = {
        platform: traced.lower(lowering_platforms=(platform,)).as_text()
        for platform in ("cpu", "cuda", "tpu")
    }
    for platform, text in texts.items():
        products = text.count("stablehlo.dot_general")
        assert bool(products) == bool(strided_slices(text)) == (platform == "cpu")
    assert convolutions(texts["cuda"]) == convolutions(texts["tpu"]) == 6
