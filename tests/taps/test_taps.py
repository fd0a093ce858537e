"""Taps by path in models that do not use abflax, and suggested taps."""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from abflax.errors import InputError
from abflax.models import MODELS
from abflax.models.variables import abstract_variables
from abflax.taps import Tapped, marked, run_model, suggest

IMAGES = jax.random.normal(jax.random.key(9), (2, 8, 8, 3))
SEQUENTIAL = nn.Sequential(
    [
        nn.Conv(4, (3, 3)),
        nn.relu,
        nn.Conv(5, (3, 3), (2, 2)),
        nn.relu,
        lambda x: x.mean(axis=(1, 2)),
        nn.Dense(3),
    ]
)


class Setup(nn.Module):
    """A model with submodules from `setup`, one in a list; `deterministic` instead of `train`."""

    def setup(self):
        self.stem = nn.Conv(4, (3, 3))
        self.blocks = [nn.Conv(4, (3, 3), (2, 2)), nn.Conv(6, (3, 3))]
        self.norm = nn.BatchNorm()
        self.drop = nn.Dropout(0.5)
        self.head = nn.Dense(3)

    def __call__(self, x, deterministic: bool):
        x = nn.relu(self.stem(x))
        for block in self.blocks:
            x = nn.relu(block(x))
        x = nn.relu(self.norm(x, use_running_average=deterministic)).mean(axis=(1, 2))
        return self.head(self.drop(x, deterministic=deterministic))


class Block(nn.Module):
    """A residual block that ends in a ReLU and sows the value before it."""

    features: int
    stride: int = 1

    @nn.compact
    def __call__(self, x):
        y = nn.Conv(self.features, (3, 3), (self.stride,) * 2)(nn.relu(nn.Conv(3, (1, 1))(x)))
        y += nn.Conv(self.features, (1, 1), (self.stride,) * 2, name="shortcut")(x)
        self.sow("intermediates", "sum", y)
        return nn.relu(y)


class Compact(nn.Module):
    """A model with `nn.compact`; `wrap` transforms the class of each block."""

    wrap: Any = lambda block: block
    training: bool = False

    @nn.compact
    def __call__(self, images):
        block = self.wrap(Block)
        x = block(4, 2, name="one")(images)
        x = block(6, name="two")(x)
        x = nn.BatchNorm(not self.training, name="norm")(x)
        return nn.Dense(3, name="head")(nn.relu(x).mean(axis=(1, 2)))


def _variables(model, images=IMAGES, **arguments):
    return model.init(jax.random.key(0), images, **arguments)


def _part(variables, *path):
    """Returns the variables of a submodule."""
    found = {}
    for collection, tree in variables.items():
        for name in path:
            tree = tree.get(name, {})
        found[collection] = tree
    return found


def test_sequential():
    variables = _variables(SEQUENTIAL)
    paths = {"layer1": "layers_0", "layer2": "layers_2"}
    forward = run_model(SEQUENTIAL, variables, IMAGES, train=True, tap_paths=paths)
    for layer, cut in (("layer1", 1), ("layer2", 3)):
        head = nn.Sequential(SEQUENTIAL.layers[:cut]).apply(variables, IMAGES)
        chex.assert_trees_all_equal(forward.taps[layer], head)
    chex.assert_trees_all_equal(forward.logits, SEQUENTIAL.apply(variables, IMAGES))


def test_setup():
    model = Setup()
    variables = _variables(model, deterministic=True)
    paths = {"a": "stem", "b": "blocks_1", "c": "norm"}
    taps = run_model(model, variables, IMAGES, train=False, tap_paths=paths).taps
    stem = nn.Conv(4, (3, 3)).apply(_part(variables, "stem"), IMAGES)
    first = nn.Conv(4, (3, 3), (2, 2)).apply(_part(variables, "blocks_0"), nn.relu(stem))
    second = nn.Conv(6, (3, 3)).apply(_part(variables, "blocks_1"), nn.relu(first))
    norm = nn.BatchNorm(True).apply(_part(variables, "norm"), nn.relu(second))
    chex.assert_trees_all_close(taps, {"a": stem, "b": second, "c": norm}, rtol=1e-6)


def test_the_mode_goes_by_any_of_its_names():
    model = Setup()
    variables = _variables(model, deterministic=True)
    key = jax.random.key(3)
    trained = run_model(model, variables, IMAGES, train=True, dropout_key=key)
    logits, state = model.apply(
        variables, IMAGES, deterministic=False, rngs={"dropout": key}, mutable=["batch_stats"]
    )
    chex.assert_trees_all_equal(trained.logits, logits)
    chex.assert_trees_all_equal(trained.batch_stats, state["batch_stats"])
    # As a field of the module.
    model = Compact()
    variables = _variables(model)
    moved = run_model(model, variables, IMAGES, train=True).batch_stats
    expected = model.clone(training=True).apply(variables, IMAGES, mutable=["batch_stats"])[1]
    chex.assert_trees_all_equal(moved, expected["batch_stats"])


@pytest.mark.parametrize("wrap", [lambda b: b, nn.remat, nn.jit], ids=["compact", "remat", "jit"])
def test_compact(wrap):
    model = Compact(wrap)
    variables = _variables(model)
    one, inside = Block(4, 2), _part(variables, "one")
    shortcut = nn.Conv(4, (1, 1), (2, 2)).apply(_part(inside, "shortcut"), IMAGES)
    narrow = nn.Conv(3, (1, 1)).apply(_part(inside, "Conv_1"), IMAGES)
    total = nn.Conv(4, (3, 3), (2, 2)).apply(_part(inside, "Conv_0"), nn.relu(narrow)) + shortcut
    out = one.apply(inside, IMAGES)
    expected = {
        "one/shortcut": shortcut,
        "one/sum": total,  # sown
        "two": Block(6).apply(_part(variables, "two"), out),
    }
    # In turn, since a transformation must not reuse an earlier trace.
    for path, tap in expected.items():
        forward = run_model(model, variables, IMAGES, train=False, tap_paths={"layer1": path})
        chex.assert_trees_all_close(forward.taps, {"layer1": tap}, rtol=1e-5, atol=1e-6)


def test_pullback_goes_through_a_tap_under_remat():
    model = Compact(nn.remat)
    variables = _variables(model)
    paths = {"layer1": "one/shortcut"}
    forward = run_model(model, variables, IMAGES, train=False, tap_paths=paths, pullback=True)
    ones = {"layer1": jnp.ones_like(forward.taps["layer1"])}
    kernel = variables["params"]["one"]["shortcut"]["kernel"][0, 0]
    expected = np.zeros(IMAGES.shape, np.float32)
    expected[:, ::2, ::2] = kernel.sum(axis=-1)  # a 1×1 convolution of stride 2
    chex.assert_trees_all_close(forward.pullback(ones), expected, rtol=1e-5)


class Scanned(nn.Module):
    """Three blocks under `nn.scan`, or twice three; `carried`: the stacked collections."""

    carried: tuple[tuple[str, int], ...] = (("intermediates", 0),)
    nested: bool = False

    @nn.compact
    def __call__(self, x):
        axes = {"params": 0, **dict(self.carried)}
        scan = lambda body, length: nn.scan(
            body, variable_axes=axes, split_rngs={"params": True}, length=length
        )
        x = scan(_Step, 3)(name="loop")(x, None)[0]
        if self.nested:
            x = scan(scan(_Step, 3), 2)(name="loops")(x, None)[0]
        return nn.Dense(3, name="head")(x.mean(axis=(1, 2)))


class _Step(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        y = nn.Conv(3, (3, 3), name="conv")(x)
        self.sow("intermediates", "pre", 2 * y)
        return nn.relu(y), None


def test_scan_is_tapped_an_iteration_at_a_time():
    model = Scanned(nested=True)
    variables = _variables(model)
    x, expected = IMAGES, {}
    iterations = [("loop", (i,)) for i in range(3)]
    iterations += [("loops", (i, j)) for i in range(2) for j in range(3)]
    for name, index in iterations:
        one = jax.tree.map(lambda leaf, index=index: leaf[index], _part(variables, name, "conv"))
        x = nn.Conv(3, (3, 3)).apply(one, x)
        expected[f"{name}/conv[{','.join(map(str, index))}]"] = x
        expected[f"{name}/pre[{','.join(map(str, index))}]"] = 2 * x
        x = nn.relu(x)
    forward = run_model(
        model, variables, IMAGES, train=False, tap_paths={path: path for path in expected}
    )
    chex.assert_trees_all_close(forward.taps, expected, rtol=1e-5, atol=1e-6)


REFUSED = [
    (Scanned(), "loop/conv", r"'loop/conv\[2\]' is the last"),
    (Scanned(), "loop/conv[3]", r"'loop/conv\[2\]' is the last"),
    (Scanned(nested=True), "loops/conv[1]", r"'loops/conv\[1,2\]' is the last"),
    (Scanned(), "head[0]", "it runs once"),
    (Scanned(carried=()), "loop/conv[0]", "loop/conv.*variable_axes={'intermediates': 0"),
    (Scanned(carried=(("intermediates", 1),)), "loop/conv[0]", "along another axis than 0"),
    (Compact(), "one/shortcat", r"unknown tap path 'one/shortcat'; did you mean one/shortcut"),
]


@pytest.mark.parametrize(("model", "path", "sentence"), REFUSED, ids=lambda x: str(x)[:20])
def test_what_cannot_be_tapped_is_named(model, path, sentence):
    with pytest.raises(InputError, match=sentence):
        run_model(model, _variables(model), IMAGES, train=False, tap_paths={"layer1": path})


def test_a_module_that_runs_twice_is_refused():
    class Twice(nn.Module):
        @nn.compact
        def __call__(self, x):
            dense = nn.Dense(3)
            return dense(dense(x.mean(axis=(1, 2))))

    with pytest.raises(InputError, match="'Dense_0'.*ran 2 times"):
        run_model(Twice(), _variables(Twice()), IMAGES, train=False, tap_paths={"a": "Dense_0"})


def test_other_arguments_and_other_outputs_are_refused():
    class Masked(nn.Module):
        @nn.compact
        def __call__(self, x, mask, train=False):
            return nn.Dense(3)(x * mask)

    class Pair(nn.Module):
        @nn.compact
        def __call__(self, x):
            return {"prediction": nn.Dense(3)(x)}

    with pytest.raises(InputError, match="Masked needs 'mask' besides the images"):
        run_model(Masked(), {"params": {}}, IMAGES, train=False)
    with pytest.raises(InputError, match="Pair returns a dict"):
        run_model(Pair(), _variables(Pair()), IMAGES, train=False)


def test_tapped_is_the_model_with_its_paths():
    model = Compact()
    variables = _variables(model)
    paths = {"layer10": "two/sum", "layer2": "one/sum"}
    tapped = Tapped(model, paths)
    assert tapped.tap_paths == (("layer10", "two/sum"), ("layer2", "one/sum"))  # as given
    assert tapped == Tapped(model, tapped.tap_paths) and hash(tapped) == hash(Tapped(model, paths))
    chex.assert_trees_all_equal(
        run_model(tapped, variables, IMAGES, train=False).taps,
        run_model(model, variables, IMAGES, train=False, tap_paths=paths).taps,
    )


@pytest.mark.parametrize("name", ["wrn10-1", "wrn16-2", "wrn22-4"])
def test_suggest_marks_the_taps_of_a_wide_resnet(name):
    model, shape = MODELS[name](), (32, 32, 3)
    images = jax.ShapeDtypeStruct((2, *shape), jnp.float32)
    found = suggest(model, abstract_variables(model, shape), images)
    assert marked(found) == {f"layer{index}": f"layer{index}" for index in (1, 2, 3)}
    assert [e.shape[1:3] for e in found if e.marked] == [(32, 32), (16, 16), (8, 8)]
    assert not any(tap.rectified for tap in found if tap.marked)
    assert [e.path for e in found][:3] == ["stem", "group1_block0/norm1", "group1_block0/conv1"]


@pytest.mark.parametrize(
    "name", [*(pytest.param(n, marks=pytest.mark.slow) for n in ("resnet50", "mobilenet-v2")),
             "mobilenet-v1"]
)  # fmt: skip
def test_suggest_marks_all_taps_of_the_others_and_the_stem_besides(name):
    model, shape = MODELS[name](), (224, 224, 3)
    images = jax.ShapeDtypeStruct((2, *shape), jnp.float32)
    found = suggest(model, abstract_variables(model, shape), images)
    stem, *taps = marked(found).values()
    assert taps == ["layer1", "layer2", "layer3", "layer4"] and not stem.startswith("layer")
    assert [e.shape[1] for e in found if e.marked] == [112, 56, 28, 14, 7]


def test_suggest_lists_in_order_and_leaves_out_what_is_rectified():
    model = Compact(nn.remat)
    found = suggest(model, _variables(model), IMAGES)
    assert [(e.path, e.shape, e.kind, e.rectified) for e in found] == [
        ("one/Conv_1", (2, 8, 8, 3), "Conv", False),
        ("one/Conv_0", (2, 4, 4, 4), "Conv", False),
        ("one/shortcut", (2, 4, 4, 4), "Conv", False),
        ("one/sum", (2, 4, 4, 4), "sown", False),
        ("one", (2, 4, 4, 4), "Block", True),
        ("two/Conv_1", (2, 4, 4, 3), "Conv", False),
        ("two/Conv_0", (2, 4, 4, 6), "Conv", False),
        ("two/shortcut", (2, 4, 4, 6), "Conv", False),
        ("two/sum", (2, 4, 4, 6), "sown", False),
        ("two", (2, 4, 4, 6), "Block", True),
        ("norm", (2, 4, 4, 6), "BatchNorm", False),
    ]
    assert marked(found) == {"layer1": "one/Conv_1", "layer2": "norm"}


def test_suggest_of_scans_and_of_features():
    found = suggest(Scanned(), _variables(Scanned()), IMAGES)
    assert [e.path for e in found if e.kind == "Conv"] == [f"loop/conv[{i}]" for i in range(3)]
    assert marked(found) == {"layer1": "loop/conv[2]"}
    dense = nn.Sequential([nn.Dense(5), nn.relu, nn.Dense(4), nn.relu, nn.Dense(3)])
    points = jnp.ones((2, 6))
    found = suggest(dense, _variables(dense, points), points)
    assert marked(found) == {"layer1": "layers_2"}
