"""Messages to users: one sentence of at most 400 characters, without arrays and module trees."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

from abflax import (
    Dataset,
    InputError,
    Network,
    Resources,
    RunConfig,
    Seeds,
    Tapped,
    distill,
    distill_group,
    evaluate,
    load,
)
from abflax.analysis import examine
from abflax.errors import brief
from abflax.taps import suggest
from abflax.training.run_directory import Result
from abflax.weights import from_torch, read_variables

ARRAY = np.zeros((64, 64))
TREE = nn.Sequential([nn.Dense(10) for _ in range(50)])
DATA = Dataset(np.zeros((4, 8, 8, 1), np.float32), np.arange(4), 10)
LONG = "x" * 1000
HOSTILE = {
    "array": ARRAY, "jax": jnp.ones((64, 64)), "tree": TREE, "text": LONG,
    "list": [ARRAY] * 50, "dict": {LONG: ARRAY},
}  # fmt: skip


def _ours(**settings):
    return distill(TREE, None, DATA, **{"method": "cross-entropy"} | settings)


CALLS = {
    "student": lambda x: distill(x, None, DATA),
    "teacher": lambda x: distill(TREE, x, DATA),
    "data": lambda x: distill(TREE, None, x),
    "test": lambda x: _ours(test=x),
    "config": lambda x: _ours(config=x),
    "workdir": lambda x: _ours(workdir=[x]),
    "force": lambda x: _ours(force=x),
    "resources": lambda x: _ours(resources=x),
    "reporter": lambda x: _ours(reporter=x),
    "method": lambda x: _ours(method=x),
    "protocol": lambda x: _ours(protocol=x),
    "epochs": lambda x: _ours(epochs=x),
    "batch size": lambda x: _ours(batch_size=x),
    "seeds": lambda x: _ours(seeds=x),
    "margin": lambda x: _ours(method="activation-boundary", margin=x),
    "layers": lambda x: _ours(method="attention", layers=x),
    "precision": lambda x: _ours(precision=x),
    "a name": lambda x: _ours(**{LONG: x}),
    "runs": lambda x: distill_group(x, TREE, None, DATA),
    "a run": lambda x: distill_group([x], TREE, None, DATA),
    "images": lambda x: Dataset(x, np.arange(4)),
    "labels": lambda x: Dataset(DATA.images, x),
    "variables": lambda x: Network(TREE, x),
    "network": lambda x: evaluate(x, DATA),
    "examined": lambda x: examine(x, DATA),
    "name of data": lambda x: load(x, "train"),
    "RunConfig": lambda x: RunConfig(x, "s", "t"),
    "Resources": lambda x: Resources(devices=x),
    "Seeds": lambda x: Seeds(weights=x),
    "weights": lambda x: from_torch("wrn16-2", {"conv1.weight": x}),
    "path of weights": lambda x: read_variables(x),
    "candidates": lambda x: suggest(x, {"params": {}}, DATA.images),
    "paths": lambda x: distill(Tapped(TREE, {"layer1": x}), TREE, DATA),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("value", HOSTILE)
def test_hostile_arguments(call, value):
    if (value, call) in (("text", "RunConfig"), ("tree", "candidates")):
        return  # nothing is wrong with these
    with pytest.raises(InputError) as error:
        CALLS[call](HOSTILE[value])
    message = str(error.value)
    assert len(message) <= 400
    for part in ("[[0", "[[ ", "array(", "Array(", "# attributes", "0., 0.", "\n"):
        assert part not in message, message


def test_values_are_told_in_brief():
    assert brief(ARRAY) == "an array [64, 64] of float64"
    assert brief([ARRAY]) == "[an array [64, 64] of float64]"
    assert brief(TREE) == "a Sequential"
    assert brief(nnx.Linear(2, 2, rngs=nnx.Rngs(0))) == "a Linear"
    assert (brief(None), brief(2.5), brief("a"), brief(int)) == ("None", "2.5", "'a'", repr(int))


LINEAR = nnx.Linear(2, 2, rngs=nnx.Rngs(0))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: Tapped(TREE, "Dense_0"),
            r"such as {'layer1': 'Conv_0'} or marked.* not 'Dense_0'",
        ),
        (lambda: Tapped(TREE, ["BN"]), r"such as {'layer1': 'Conv_0'}.* not \['BN'\]"),
        (lambda: Tapped(TREE, None), "not None"),
        (
            lambda: Tapped(None, {}),
            "model must be a Linen or NNX module, or a Tapped one, not None",
        ),
        (lambda: Tapped(Network(LINEAR), {}), "not a Network"),
        (lambda: Tapped(Tapped(LINEAR), {}), "Tapped already"),
        (
            lambda: Tapped(LINEAR, {}, output="logits"),
            "what a model returns -> logits, not 'logits'",
        ),
        (lambda: evaluate(LINEAR, DATA.images), "test must be Dataset or ImageFiles, not an array"),
        (lambda: examine(LINEAR, DATA.images), "data must be Dataset, not an array"),
        (lambda: suggest(TREE), r"suggest\(model, variables, images\)"),
        (lambda: suggest(LINEAR), r"a batch of them, \[batch, …\], not None"),
        (lambda: suggest(LINEAR, images=np.zeros(2)), r"not an array \[2\] of float64"),
        (lambda: Network(LINEAR, {"params": {}}).module, "for Linear: 'params/bias' is missing"),
        (lambda: Result({}, {}, None).save(None), "path must be str or Path, not None"),
    ],
)
def test_what_is_missing_is_said_in_a_sentence(call, message):
    with pytest.raises(InputError, match=message):
        call()
