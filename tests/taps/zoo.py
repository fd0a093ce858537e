"""Small models in the styles that people write them in, each with its taps and how to cut it."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import nnx, struct

# What the layers compute, once more by hand.


def conv(p, x, stride=1):
    """A convolution padded by "SAME"."""
    y = jax.lax.conv_general_dilated(
        x, p["kernel"], (stride, stride), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    return y + p.get("bias", 0)


def dense(p, x):
    """A dense layer."""
    return x @ p["kernel"] + p["bias"]


def norm(p, x, mean, var, epsilon=1e-5):
    """What all norms do with their statistics."""
    return (x - mean) / jnp.sqrt(var + epsilon) * p["scale"] + p["bias"]


def group_norm(p, x, groups):
    """A group norm of a map."""
    grouped = x.reshape(*x.shape[:-1], groups, -1)
    statistics = (f(grouped, axis=(1, 2, 4), keepdims=True) for f in (jnp.mean, jnp.var))
    spread = [jnp.broadcast_to(each, grouped.shape).reshape(x.shape) for each in statistics]
    return norm(p, x, *spread, epsilon=1e-6)


def layer_norm(p, x):
    """A layer norm."""
    return norm(p, x, x.mean(-1, keepdims=True), x.var(-1, keepdims=True), epsilon=1e-6)


# Linen


class PostBlock(nn.Module):
    """A residual block with its ReLU after the sum; the last scale starts at zero."""

    width: int
    stride: int
    norm: Any
    sows: bool

    @nn.compact
    def __call__(self, x):
        y = nn.Conv(self.width, (3, 3), self.stride, use_bias=False)(x)
        y = nn.relu(self.norm()(y))
        y = nn.Conv(self.width, (3, 3), use_bias=False)(y)
        y = self.norm(scale_init=nn.initializers.zeros)(y)
        x = nn.Conv(self.width, (1, 1), self.stride, use_bias=False, name="short")(x) + y
        if self.sows:
            self.sow("intermediates", "pre", x)
        return nn.relu(x)


class PostActivation(nn.Module):
    """A ResNet whose batch norms name an axis of their own."""

    width: int
    sows: bool = True

    @nn.compact
    def __call__(self, x, train: bool = True):
        norm = functools.partial(
            nn.BatchNorm, use_running_average=not train, momentum=0.9, axis_name="batch"
        )
        for index in range(2):
            block = PostBlock(self.width * 2**index, 2, norm, self.sows, name=f"block{index}")
            x = block(x)
        return nn.Dense(10)(x.mean(axis=(1, 2)))


def _cut_post_activation(variables, x):
    taps = {}
    for index in range(2):
        p, s = (variables[c][f"block{index}"] for c in ("params", "batch_stats"))
        normed = lambda i, y, p=p, s=s: norm(p[f"BatchNorm_{i}"], y, **s[f"BatchNorm_{i}"])
        y = nn.relu(normed(0, conv(p["Conv_0"], x, 2)))
        x = conv(p["short"], x, 2) + normed(1, conv(p["Conv_1"], y))
        taps[f"layer{index + 1}"] = x
        x = nn.relu(x)
    return taps


@struct.dataclass
class Output:
    """What models of large collections return."""

    logits: jax.Array
    hidden_states: tuple[jax.Array, ...]


class ObjectOutput(nn.Module):
    """Returns an object, and says `deterministic` where others say `train`."""

    width: int

    @nn.compact
    def __call__(self, pixel_values, deterministic: bool = True):
        x = nn.Conv(self.width, (3, 3), 2, name="embedder")(pixel_values)
        x = nn.BatchNorm(deterministic, momentum=0.9, name="normalization")(x)
        hidden = nn.relu(x)
        x = nn.Dropout(0.1)(hidden.mean(axis=(1, 2)), deterministic=deterministic)
        return Output(nn.Dense(10, name="classifier")(x), (hidden,))


def _cut_object_output(variables, x):
    p, s = variables["params"], variables["batch_stats"]["normalization"]
    return {"layer1": norm(p["normalization"], conv(p["embedder"], x, 2), **s)}


class ConfigDict:
    """Entries that are attributes too, without a hash."""

    def __init__(self, **entries):
        self._entries = entries

    def __getattr__(self, name):
        if name.startswith("_"):
            raise AttributeError(name)
        return self._entries[name]

    def __getitem__(self, name):
        return self._entries[name]

    def __eq__(self, other):
        return isinstance(other, ConfigDict) and self._entries == other._entries

    __hash__ = None

    def __repr__(self):
        return f"ConfigDict({self._entries})"


class Configured(nn.Module):
    """Has a configuration for a field, and returns logits with what else there is."""

    config: Any

    @nn.compact
    def __call__(self, x, *, train):
        del train
        x = nn.Conv(self.config.width, (3, 3), 2, name="conv")(x)
        x = getattr(nn, self.config.activation)(x)
        x = nn.Dense(self.config["hidden"], name="pre_logits")(x.mean(axis=(1, 2)))
        return nn.Dense(10, name="head")(nn.relu(x)), {"pre_logits": x}


def _cut_configured(variables, x):
    p = variables["params"]
    x = conv(p["conv"], x, 2)
    return {"layer1": x, "layer2": dense(p["pre_logits"], nn.leaky_relu(x).mean(axis=(1, 2)))}


class EncoderBlock(nn.Module):
    """Attention and a perceptron, each on what a layer norm gives, added to their input."""

    heads: int
    hidden: int

    @nn.compact
    def __call__(self, x):
        y = nn.LayerNorm(name="norm1")(x)
        x = x + nn.MultiHeadDotProductAttention(self.heads, name="attention")(y, y)
        y = nn.Dense(self.hidden, name="fc1")(nn.LayerNorm(name="norm2")(x))
        return x + nn.Dense(x.shape[-1], name="fc2")(nn.gelu(y))


class VisionTransformer(nn.Module):
    """Patches, a class token, positions, two blocks."""

    width: int

    @nn.compact
    def __call__(self, x, *, train: bool = False):
        del train
        x = nn.Conv(8, (4, 4), strides=(4, 4), padding="VALID", name="patches")(x)
        x = x.reshape(len(x), -1, 8)
        token = self.param("token", nn.initializers.normal(), (1, 1, 8))
        x = jnp.concatenate([jnp.tile(token, (len(x), 1, 1)), x], axis=1)
        x = x + self.param("positions", nn.initializers.normal(), (1, x.shape[1], 8))
        for index in range(2):
            x = EncoderBlock(2, 2 * self.width, name=f"block{index}")(x)
        return nn.Dense(10, name="head")(nn.LayerNorm(name="norm")(x)[:, 0])


def _cut_vision_transformer(variables, x):
    p, taps = variables["params"], {}
    patches = x.reshape(len(x), 2, 4, 2, 4, 1).transpose(0, 1, 3, 2, 4, 5).reshape(len(x), 4, 16)
    patches = patches @ p["patches"]["kernel"].reshape(16, 8) + p["patches"]["bias"]
    token = jnp.broadcast_to(p["token"], (len(x), 1, 8))
    x = jnp.concatenate([token, patches], axis=1) + p["positions"]
    for index in range(2):
        q = p[f"block{index}"]
        y = layer_norm(q["norm1"], x)
        query, key, value = (
            jnp.einsum("btc,chd->bthd", y, q["attention"][n]["kernel"]) + q["attention"][n]["bias"]
            for n in ("query", "key", "value")
        )
        weights = jax.nn.softmax(jnp.einsum("bthd,bshd->bhts", query, key) / 2, axis=-1)
        mixed = jnp.einsum("bhts,bshd->bthd", weights, value)
        out = q["attention"]["out"]
        x = x + jnp.einsum("bthd,hdc->btc", mixed, out["kernel"]) + out["bias"]
        taps[f"layer{index + 1}"] = tap = dense(q["fc1"], layer_norm(q["norm2"], x))
        x = x + dense(q["fc2"], nn.gelu(tap))
    return taps


class Mixer(nn.Module):
    """A perceptron over the tokens, and one over the channels."""

    width: int

    @nn.compact
    def __call__(self, x, *, train=False):
        del train
        x = nn.Conv(8, (4, 4), strides=(4, 4), padding="VALID", name="stem")(x)
        x = x.reshape(len(x), -1, 8)
        y = nn.LayerNorm(name="norm1")(x).swapaxes(1, 2)
        y = nn.Dense(x.shape[1], name="tokens2")(nn.gelu(nn.Dense(self.width, name="tokens1")(y)))
        x = x + y.swapaxes(1, 2)
        y = nn.Dense(self.width, name="channels1")(nn.LayerNorm(name="norm2")(x))
        x = x + nn.Dense(8, name="channels2")(nn.gelu(y))
        return nn.Dense(10, name="head")(nn.LayerNorm(name="norm")(x).mean(axis=1))


def _cut_mixer(variables, x):
    p = variables["params"]
    x = x.reshape(len(x), 2, 4, 2, 4, 1).transpose(0, 1, 3, 2, 4, 5).reshape(len(x), 4, 16)
    x = x @ p["stem"]["kernel"].reshape(16, 8) + p["stem"]["bias"]
    tokens = dense(p["tokens1"], layer_norm(p["norm1"], x).swapaxes(1, 2))
    x = x + dense(p["tokens2"], nn.gelu(tokens)).swapaxes(1, 2)
    return {"layer1": tokens, "layer2": dense(p["channels1"], layer_norm(p["norm2"], x))}


class GroupSilu(nn.Module):
    """Group norms and SiLU, and a switch that is a field."""

    width: int
    training: bool = False

    @nn.compact
    def __call__(self, x):
        for index in range(2):
            x = nn.Conv(self.width * 2**index, (3, 3), 2)(x)
            x = nn.silu(nn.GroupNorm(2)(x))
        return {"logits": nn.Dense(10)(x.mean(axis=(1, 2)))}


def _cut_group_silu(variables, x):
    p, taps = variables["params"], {}
    for index in range(2):
        x = group_norm(p[f"GroupNorm_{index}"], conv(p[f"Conv_{index}"], x, 2), 2)
        taps[f"layer{index + 1}"] = x
        x = nn.silu(x)
    return taps


class Shared(nn.Module):
    """One convolution three times, each time with a norm of its own."""

    width: int

    def setup(self):
        self.stem = nn.Conv(self.width, (3, 3), 2)
        self.shared = nn.Conv(self.width, (3, 3))
        self.norms = [nn.GroupNorm(1) for _ in range(3)]
        self.head = nn.Dense(10)

    def __call__(self, x):
        x = self.stem(x)
        for each in self.norms:
            x = nn.relu(each(self.shared(x)))
        return self.head(x.mean(axis=(1, 2)))


def _cut_shared(variables, x):
    p = variables["params"]
    x = conv(p["stem"], x, 2)
    for index in range(3):
        x = group_norm(p[f"norms_{index}"], conv(p["shared"], nn.relu(x) if index else x), 1)
    return {"layer1": x}


class Stage(nn.Module):
    """A convolution and a batch norm."""

    width: int
    train: bool

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(self.width, (3, 3), 2, name="conv")(x)
        return nn.relu(nn.BatchNorm(not self.train, momentum=0.9, name="norm")(x))


class Rematerialized(nn.Module):
    """Computes its stages a second time in the backward pass."""

    width: int

    @nn.compact
    def __call__(self, x, is_train: bool = False):
        for index in range(2):
            x = nn.remat(Stage)(self.width * 2**index, is_train, name=f"stage{index}")(x)
        return nn.Dense(10)(nn.Dropout(0.1, deterministic=not is_train)(x.mean(axis=(1, 2))))


def _cut_rematerialized(variables, x):
    taps = {}
    for index in range(2):
        p, s = (variables[c][f"stage{index}"] for c in ("params", "batch_stats"))
        taps[f"layer{index + 1}"] = norm(p["norm"], conv(p["conv"], nn.relu(x) if index else x, 2),
                                         **s["norm"])  # fmt: skip
        x = taps[f"layer{index + 1}"]
    return taps


class Layer(nn.Module):
    """One layer of a scan."""

    width: int

    @nn.compact
    def __call__(self, x, _):
        y = nn.relu(nn.Dense(self.width, name="up")(x))
        return x + nn.Dense(x.shape[-1], name="down")(y), None


class Scanned(nn.Module):
    """Three layers of tokens in a scan."""

    width: int

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(8, name="stem")(x.reshape(len(x), 8, 8))
        layers = nn.scan(
            Layer,
            variable_axes={"params": 0, "intermediates": 0},
            split_rngs={"params": True},
            length=3,
        )
        x, _ = layers(self.width, name="layers")(x, None)
        return nn.Dense(10)(x.mean(axis=1))


def _cut_scanned(variables, x):
    p, taps = variables["params"], {}
    x = dense(p["stem"], x.reshape(len(x), 8, 8))
    for index in range(3):
        q = jax.tree.map(lambda leaf, index=index: leaf[index], p["layers"])
        taps[index] = dense(q["up"], x)
        x = x + dense(q["down"], nn.relu(taps[index]))
    return {"layer1": taps[0], "layer2": taps[2]}


# NNX


class NnxBlock(nnx.Module):
    """A residual block that keeps the sum before its ReLU."""

    def __init__(self, before, after, *, rngs):
        self.conv = nnx.Conv(before, after, (3, 3), strides=2, rngs=rngs)
        self.norm = nnx.BatchNorm(after, momentum=0.9, rngs=rngs)
        self.short = nnx.Conv(before, after, (1, 1), strides=2, rngs=rngs)

    def __call__(self, x):
        self.pre = nnx.Intermediate(self.norm(self.conv(x)) + self.short(x))
        return nnx.relu(self.pre[...])


class NnxResNet(nnx.Module):
    """Blocks in `nnx.List`, and `train()` and `eval()` for a switch."""

    def __init__(self, width, *, rngs):
        self.blocks = nnx.List([
            NnxBlock(1, width, rngs=rngs), NnxBlock(width, 2 * width, rngs=rngs)
        ])  # fmt: skip
        self.drop = nnx.Dropout(0.2, rngs=rngs)
        self.head = nnx.Linear(2 * width, 10, rngs=rngs)

    def __call__(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(self.drop(x.mean((1, 2))))


def _cut_nnx_resnet(model, x):
    taps = {}
    for index, block in enumerate(model.blocks):
        taps[f"layer{index + 1}"] = x = block.norm(block.conv(x)) + block.short(x)
        x = nnx.relu(x)
    return taps


class NnxCnn(nnx.Module):
    """The network of a tutorial: dropout before and after a dense layer."""

    def __init__(self, width, *, rngs):
        self.conv1 = nnx.Conv(1, width, (3, 3), rngs=rngs)
        self.norm1 = nnx.BatchNorm(width, rngs=rngs)
        self.drop1 = nnx.Dropout(0.1, rngs=rngs)
        self.conv2 = nnx.Conv(width, 2 * width, (3, 3), rngs=rngs)
        self.pool = functools.partial(nnx.avg_pool, window_shape=(2, 2), strides=(2, 2))
        self.linear1 = nnx.Linear(8 * width, 16, rngs=rngs)
        self.drop2 = nnx.Dropout(0.1, rngs=rngs)
        self.linear2 = nnx.Linear(16, 10, rngs=rngs)

    def __call__(self, x):
        x = self.pool(nnx.relu(self.norm1(self.drop1(self.conv1(x)))))
        x = self.pool(nnx.relu(self.conv2(x))).reshape(len(x), -1)
        return self.linear2(nnx.relu(self.drop2(self.linear1(x))))


def _cut_nnx_cnn(model, x):
    taps = {"layer1": model.norm1(model.conv1(x))}
    taps["layer2"] = model.conv2(model.pool(nnx.relu(taps["layer1"])))
    return taps


@dataclasses.dataclass(frozen=True)
class Style:
    """A style of writing a model.

    Attributes:
      make: width -> the model.
      taps: name -> path.
      suggested: what `suggest` marks.
      cut: (variables, or the module; images) -> the taps, by hand.
    """

    make: Callable[[int], Any]
    taps: dict[str, str]
    suggested: dict[str, str]
    cut: Callable[[Any, jax.Array], dict[str, jax.Array]]


def _layers(*paths):
    return {f"layer{index}": path for index, path in enumerate(paths, start=1)}


def _style(make, cut, *paths, suggested=None):
    return Style(make, _layers(*paths), _layers(*(suggested or paths)), cut)


def _config(width):
    return Configured(ConfigDict(width=width, activation="leaky_relu", hidden=width))


STYLES = {
    "post-activation ResNet": _style(
        PostActivation, _cut_post_activation, "block0/pre", "block1/pre"
    ),
    "object as output": _style(ObjectOutput, _cut_object_output, "normalization"),
    "configuration as field": _style(
        _config, _cut_configured, "conv", "pre_logits", suggested=("conv",)
    ),
    "vision transformer": _style(
        VisionTransformer, _cut_vision_transformer, "block0/fc1", "block1/fc1",
        suggested=("block1/fc1",),
    ),
    "mixer": _style(Mixer, _cut_mixer, "tokens1", "channels1"),
    "group norm and SiLU": _style(GroupSilu, _cut_group_silu, "GroupNorm_0", "GroupNorm_1"),
    "shared weights": _style(Shared, _cut_shared, "norms_2"),
    "remat": _style(Rematerialized, _cut_rematerialized, "stage0/norm", "stage1/norm"),
    "scan": _style(
        Scanned, _cut_scanned, "layers/up[0]", "layers/up[2]", suggested=("layers/up[2]",)
    ),
    "NNX ResNet": _style(
        lambda width: NnxResNet(width, rngs=nnx.Rngs(width)), _cut_nnx_resnet,
        "blocks/0/pre", "blocks/1/pre",
    ),
    "NNX CNN with dropout": _style(
        lambda width: NnxCnn(width, rngs=nnx.Rngs(width)), _cut_nnx_cnn, "norm1", "conv2"
    ),
}  # fmt: skip
