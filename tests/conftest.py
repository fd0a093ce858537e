"""Eight virtual CPU devices, quick compilation, and the reference data."""

import atexit
import gc
import os
import shutil
import tempfile

from tests import QUICK

# JAX reads them when it starts; of two that differ the last counts, so the user's.
os.environ["XLA_FLAGS"] = f"{QUICK} --xla_force_host_platform_device_count=8 " + os.environ.get(
    "XLA_FLAGS", ""
)

# What one process has compiled, the other and their children need not: the first to come here,
# which starts the others, makes the place.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="abflax-tests-")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.05"
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from hypothesis import settings

# Tracing makes millions of objects that stay. With Python's own thresholds a sixth of the tests'
# time goes to the garbage collector.
gc.set_threshold(50_000, 20, 20)

# The same few examples each time; `--hypothesis-profile=slow` tries many, and others each time.
settings.register_profile("quick", max_examples=10, derandomize=True, deadline=None, database=None)
settings.register_profile("slow", max_examples=300, deadline=None, database=None)
settings.load_profile("quick")

ROOT = Path(__file__).parent.parent
FIXTURES = ROOT / "tests" / "fixtures"


@pytest.fixture(autouse=True, scope="module")
def few_memory_maps():
    """Keeps one process that runs all tests from a crash.

    Linux grants it 65,530 memory maps. What JAX has compiled takes hundreds a program.
    """
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > 50_000:
        jax.clear_caches()
        gc.collect()


@pytest.fixture(scope="session")
def reference():
    """name -> {entry: array} of a file of reference data."""

    def read(name: str) -> dict[str, np.ndarray]:
        with np.load(FIXTURES / f"{name}.npz") as file:
            return dict(file)

    return read


class Small(nn.Module):
    """A network that compiles in a moment: one convolution, one tap."""

    num_classes: int = 10
    param_dtype: Any = jnp.float32
    axis_name: str | None = None

    @nn.compact
    def __call__(self, images, *, train):
        from abflax.taps import sow_tap

        before = nn.Conv(64, (3, 3), (2, 2), param_dtype=self.param_dtype, name="stem")(images)
        sow_tap(self, "layer1", before)
        pooled = nn.relu(before).mean(axis=(1, 2))
        return nn.Dense(self.num_classes, param_dtype=self.param_dtype, name="classifier")(pooled)


class Tiny(nn.Module):
    """Two convolutions, each with a batch norm and a tap, which compile quickly."""

    width: int
    num_classes: int = 10
    param_dtype: Any = jnp.float32
    axis_name: str | None = None

    @nn.compact
    def __call__(self, images, *, train):
        from abflax.taps import sow_features, sow_tap

        x = images
        for layer in (1, 2):
            x = nn.Conv(self.width * layer, (3, 3), layer, param_dtype=self.param_dtype)(nn.relu(x))
            x = nn.BatchNorm(not train, momentum=0.9, axis_name=self.axis_name)(x)
            sow_tap(self, f"layer{layer}", x)
        pooled = nn.relu(x).mean(axis=(1, 2))
        sow_features(self, pooled)
        return nn.Dense(self.num_classes, param_dtype=self.param_dtype)(pooled)


@pytest.fixture
def x64():
    """float64 while the test runs."""
    with jax.enable_x64(True):
        yield


def under(prefix: str, entries: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The entries below a prefix, without it."""
    return {k.removeprefix(prefix): v for k, v in entries.items() if k.startswith(prefix)}


def draw_variables(model: nn.Module, image_shape: tuple[int, ...]) -> Any:
    """Variables of a network, scales and variances about 1, without compiling what draws them."""
    from abflax.models.variables import abstract_variables

    draw = np.random.default_rng(0)

    def leaf(path, abstract):
        noise = 0.3 * draw.standard_normal(abstract.shape)
        near_one = path[-1].key in ("scale", "var")
        return np.asarray(np.exp(noise) if near_one else noise, abstract.dtype)

    return jax.tree_util.tree_map_with_path(leaf, abstract_variables(model, image_shape))


def save_random_network(name: str, path: Path, replaced: dict[str, np.ndarray] | None = None):
    """Writes a fresh network for the digits, as a published state dict."""
    from abflax.models import MODELS
    from abflax.models.variables import init_variables
    from abflax.weights import to_torch

    model = MODELS[name]()
    weights = to_torch(model, init_variables(model, jax.random.key(0), (8, 8, 1)))
    np.savez(path, **weights | (replaced or {}))
