"""Compares terms' modules, and the gradients in their weights, with the published PyTorch code."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from abflax.losses import hierarchical_context, overhaul_difference
from abflax.methods.connectors import Connectors
from abflax.methods.modules import (
    Embeddings,
    Fusion,
    Paraphrasers,
    Regressors,
    TeachersClassifier,
    Translators,
)
from abflax.methods.terms import (
    CorrelationCongruence,
    FactorTransfer,
    Paraphrasing,
    SoftmaxRegression,
    VariationalInformation,
)
from abflax.taps import Forward

pytestmark = pytest.mark.usefixtures("x64")
FIELDS = {"param_dtype": jnp.float64}


@pytest.fixture
def relatives(reference):
    return reference("relatives")


def _forward(taps=None, features=None):
    return Forward(jnp.zeros((8, 10)), taps or {}, features, {})


def _kernel(weight):
    return jnp.asarray(weight.transpose(2, 3, 1, 0))


def _norm(entries, prefix):
    return {
        "scale": jnp.asarray(entries[f"{prefix}.weight"]),
        "bias": jnp.asarray(entries[f"{prefix}.bias"]),
    }


def _assert_equals_reference(loss, student, parameters, value, gradient, trained):
    """Compares value, gradient in the student, and gradients in the parameters."""
    found, gradients = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(student, parameters)
    for ours, theirs in zip(
        jax.tree.leaves((found, *gradients)),
        jax.tree.leaves((value, gradient, trained)),
        strict=True,
    ):
        scale = np.abs(theirs).max()
        chex.assert_trees_all_close(ours, jnp.asarray(theirs), rtol=1e-9, atol=1e-11 * scale)


def test_regressors(relatives):
    module = Regressors((("layer1", 9),), **FIELDS)
    targets = {"layer1": relatives["maps/teacher"]}

    def tree(prefix):
        weights = (relatives[f"{prefix}/regressor.{2 * index}.weight"] for index in range(3))
        convolutions = {
            f"layer1_conv{index}": {"kernel": _kernel(weight)}
            for index, weight in enumerate(weights)
        }
        return convolutions | {"layer1_log_scale": jnp.asarray(relatives[f"{prefix}/log_scale"])}

    def loss(tap, params):
        forward, described = module.apply(
            {"params": params}, _forward({"layer1": tap}), targets, train=True
        )
        return VariationalInformation().loss(forward, described, jnp.zeros(8, int)).mean()

    _assert_equals_reference(
        loss, relatives["maps/student"], tree("vid"),
        relatives["vid/value"], relatives["vid/grad_student"], tree("vid/grad"),
    )  # fmt: skip


def test_the_first_variance_is_five(relatives):
    module = Regressors((("layer1", 9),), **FIELDS)
    forward = _forward({"layer1": relatives["maps/student"]})
    params = module.init(jax.random.key(0), forward, None, train=False)["params"]
    variance = jax.nn.softplus(params["layer1_log_scale"]) + 1e-5
    chex.assert_trees_all_close(variance, jnp.full(9, 5.0), rtol=1e-12)


def test_embeddings(relatives):
    module = Embeddings(20, 6, **FIELDS)

    def tree(prefix):
        return {
            side: {
                "kernel": jnp.asarray(relatives[f"{prefix}embed_{side}/linear.weight"].T),
                "bias": jnp.asarray(relatives[f"{prefix}embed_{side}/linear.bias"]),
            }
            for side in ("student", "teacher")
        }

    def loss(features, params):
        embedded = module.apply(
            {"params": params}, _forward(features=features), relatives["features/teacher"],
            train=True,
        )  # fmt: skip
        return CorrelationCongruence().loss(*embedded, jnp.zeros(8, int)).mean()

    _assert_equals_reference(
        loss, relatives["features/student"], tree("cc/"),
        relatives["cc/value"], relatives["cc/grad_student"], tree("cc/grad_"),
    )  # fmt: skip


def test_connectors_of_the_overhaul(relatives):
    module = Connectors((("layer1", 9),), equal=True, **FIELDS)

    def tree(name):
        prefix = f"ofd_connected/{name}"
        weight = relatives[f"{prefix}/0.weight"]
        return {
            "layer1_conv": {"kernel": jnp.asarray(weight[:, :, 0, 0].T)},
            "layer1_norm": _norm(relatives, f"{prefix}/1"),
        }

    def loss(tap, params):
        (forward, _), _ = module.apply(
            {"params": params}, _forward({"layer1": tap}), None, train=True, mutable=["batch_stats"]
        )
        margin = relatives["ofd/margin"]
        return overhaul_difference(forward.taps["layer1"], relatives["ofd/teacher"], margin).sum()

    _assert_equals_reference(
        loss, relatives["maps/student"], tree("connector"), relatives["ofd_connected/value"],
        relatives["ofd_connected/grad_student"], tree("grad_connector"),
    )  # fmt: skip


def test_fusion(relatives):
    module = Fusion((("layer1", 9), ("layer2", 7)), 4, **FIELDS)
    depths = {"layer1": "shallow", "layer2": "deep"}

    def tree(grad):
        params = {}
        for layer, depth in depths.items():
            prefix = f"review_abf/{grad}{depth}"
            for index in (1, 2):
                weight = relatives[f"{prefix}/conv{index}.0.weight"]
                params[f"{layer}_conv{index}"] = {"kernel": _kernel(weight)}
                params[f"{layer}_norm{index}"] = _norm(relatives, f"{prefix}/conv{index}.1")
        prefix = f"review_abf/{grad}shallow/att_conv.0"
        params["layer1_attention"] = {
            "kernel": _kernel(relatives[f"{prefix}.weight"]),
            "bias": jnp.asarray(relatives[f"{prefix}.bias"]),
        }
        return params

    def loss(taps, params):
        (forward, _), _ = module.apply(
            {"params": params}, _forward(taps), None, train=True, mutable=["batch_stats"]
        )
        return sum(
            hierarchical_context(
                forward.taps[layer], relatives[f"review_abf/teacher_{depth}"]
            ).mean()
            for layer, depth in depths.items()
        )

    taps, gradients = (
        {layer: relatives[f"review_abf/{what}student_{depth}"] for layer, depth in depths.items()}
        for what in ("", "grad_")
    )
    _assert_equals_reference(
        loss, taps, tree(""), relatives["review_abf/value"], gradients, tree("grad_")
    )


def _convolutions(entries, prefix, transposed=False, normalized=False):
    """A stack of convolutions of factor transfer; a transposed one is a convolution."""
    params = {}
    for index in range(3):
        name = f"{prefix}.{3 * index}"
        weight = entries[f"{name}.weight"]
        weight = weight.swapaxes(0, 1)[:, :, ::-1, ::-1] if transposed else weight
        params[f"conv{index}"] = {
            "kernel": _kernel(weight),
            "bias": jnp.asarray(entries[f"{name}.bias"]),
        }
        if normalized:
            params[f"norm{index}"] = _norm(entries, f"{prefix}.{3 * index + 1}")
    return params


def test_paraphrasers(relatives):
    module = Paraphrasers((("layer1", 9, 4),), **FIELDS)
    targets = {"layer1": relatives["maps/teacher"]}

    def tree(prefix):
        return {
            "layer1_paraphraser": _convolutions(relatives, f"{prefix}paraphraser/encoder"),
            "layer1_back": _convolutions(relatives, f"{prefix}paraphraser/decoder", True),
        }

    def loss(tap, params):
        forward, made = module.apply(
            {"params": params}, _forward({"layer1": tap}), targets, train=True
        )
        return Paraphrasing(layers=("layer1",)).loss(forward, made, jnp.zeros(8, int)).mean()

    tap = relatives["maps/student"]
    _assert_equals_reference(
        loss, tap, tree("ft/"), relatives["ft/reconstruction_mse"], np.zeros_like(tap),
        tree("ft/grad_"),
    )  # fmt: skip


@pytest.mark.parametrize("averaged", [False, True])
def test_translators(averaged, relatives):
    """The gradients in the translator are of RepDistiller's form."""
    module = Translators((("layer1", 9, 4),), **FIELDS)
    term = FactorTransfer(layers=("layer1",), channels_averaged=averaged)
    source = "ft" if averaged else "ft_official"
    taught = {"layer1_paraphraser": _convolutions(relatives, "ft/paraphraser/encoder")}

    def tree(name):
        return _convolutions(relatives, f"ft/{name}/encoder", normalized=True)

    def loss(tap, params):
        (forward, factors), _ = module.apply(
            {"params": params}, _forward({"layer1": tap}), {"layer1": relatives["maps/teacher"]},
            train=True, mutable=["batch_stats"],
        )  # fmt: skip
        return term.loss(forward, factors, jnp.zeros(8, int)).mean()

    params = taught | {"layer1_translator": tree("translator")}
    value, gradient = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(
        relatives["maps/student"], params
    )
    _assert_near(value, relatives[f"{source}/value"])
    _assert_near(gradient[0], relatives[f"{source}/grad_student"])
    chex.assert_trees_all_equal(
        gradient[1]["layer1_paraphraser"],
        jax.tree.map(jnp.zeros_like, taught["layer1_paraphraser"]),
    )
    if averaged:
        jax.tree.map(_assert_near, gradient[1]["layer1_translator"], tree("grad_translator"))


def _assert_near(ours, theirs):
    scale = max(np.abs(theirs).max(), 1e-4)  # a bias before a batch norm has gradient 0
    chex.assert_trees_all_close(ours, jnp.asarray(theirs), rtol=1e-9, atol=1e-11 * scale)


def test_softmax_regression(relatives):
    """Behind the ReLU of the tap: the reference's map has negative entries."""
    module, term = TeachersClassifier("layer1", 10, 10, **FIELDS), SoftmaxRegression()
    classifier = {
        "kernel": jnp.asarray(relatives["srrl/classifier/weight"].T),
        "bias": jnp.asarray(relatives["srrl/classifier/bias"]),
    }
    taught = {f"classifier_{name}": weight for name, weight in classifier.items()}
    targets = {
        "features": relatives["srrl/teacher"].mean(axis=(1, 2)),
        "logits": relatives["srrl/teacher_logits"],
    }

    def tree(name):
        prefix = f"srrl/{name}"
        conv = {"kernel": _kernel(relatives[f"{prefix}/0.weight"])}
        return {"conv": conv, "norm": _norm(relatives, f"{prefix}/1")}

    def loss(tap, params):
        params = term.first_weights(
            params | jax.tree.map(jnp.zeros_like, taught), {"head": {"fc": classifier}}, {}
        )
        (features, logits), _ = module.apply(
            {"params": params}, tap, True, method="classify", mutable=["batch_stats"]
        )
        forward = Forward(logits, {}, features, {})
        return term.loss(forward, targets, jnp.zeros(8, int)).mean()

    _assert_equals_reference(
        loss, relatives["srrl/student"], tree("connector"), relatives["srrl/value"],
        relatives["srrl/grad_student"], tree("grad_connector"),
    )  # fmt: skip
