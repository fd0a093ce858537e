"""Installs the library. The commands in `experiments` run from a checkout."""

from pathlib import Path

from setuptools import find_packages, setup

TFDS = [
    "tensorflow-datasets>=4.9.10",
    # tensorflow-datasets 4.9.10 imports it on Python 3.11, but does not install it.
    "importlib_resources",
    "array-record>=0.8",
]
DIGITS = ["scikit-learn>=1.5"]
TENSORBOARD = ["tensorboardX>=2.6"]
EXPORT = ["flatbuffers>=24"]  # jax.export writes files with it, but JAX does not install it
# With jax2onnx, which no extra can name: 0.17.1 asks for an Orbax older than abflax's. It runs with
# this one after `pip install --no-deps jax2onnx`.
ONNX = ["onnx>=1.20", "onnx-ir>=0.2.1", "onnxruntime>=1.24"]
EXPERIMENTS = [
    *TFDS, *DIGITS, *TENSORBOARD, *EXPORT,
    "matplotlib>=3.9", "rich>=13.9", "tyro>=1.0", "docstring-parser>=0.16", "scipy>=1.13",
]  # fmt: skip

setup(
    name="abflax",
    version="0.2.0",
    description="Knowledge distillation for JAX and Flax, centred on activation boundaries",
    long_description=Path("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    # Tried: 3.11 with jax 0.10.1, 3.13 with jax 0.12.0.1; docs/accelerators.md has the details.
    python_requires=">=3.11",
    packages=find_packages(include=["abflax*"]),
    # Said outright, so that an editable installation is a path that type checkers follow.
    package_dir={"": "."},
    package_data={"abflax": ["py.typed"]},
    install_requires=[
        # jaxlib 0.10.2 miscompiles on CPUs (jax-ml/jax#39103), and jax 0.10.2 asks for it. jaxlib
        # is named too, so that no resolver pairs it with another jax.
        "jax>=0.10.1,!=0.10.2",
        "jaxlib>=0.10.1,!=0.10.2",
        "flax>=0.12.6",
        "optax>=0.2.8",
        "orbax-checkpoint>=0.12",
        "pillow>=11",
        "psutil>=6",
        "pydantic>=2.10",
        "safetensors>=0.5",
    ],
    extras_require={
        "tfds": TFDS,
        "digits": DIGITS,
        "tensorboard": TENSORBOARD,
        "export": EXPORT,
        "onnx": ONNX,
        "experiments": EXPERIMENTS,
        "test": [
            *EXPERIMENTS,
            "chex>=0.1.91",
            "pytest>=8",
            "pytest-xdist>=3.6",
            "hypothesis>=6.100",
            "grain>=0.2.18",
            "ruff>=0.9",
            "mypy>=2",
            "nbclient>=0.10",
            "ipykernel>=6",
        ],
        "docs": ["sphinx>=8.1", "furo>=2024.8", "myst-parser>=4"],
        "prepare": [*TFDS, "tensorflow>=2.16"],  # only to download and prepare a TFDS data set
        "torch": ["torch>=2.4"],  # only to read .pt and .pth files
        "cuda": ["jax[cuda12]>=0.10.1,!=0.10.2"],
        # Compilers alone, for `experiments.bench --compile-for`: no accelerator is needed.
        "aot-cuda": ["jax-cuda12-plugin>=0.10.1,!=0.10.2", "nvidia-cuda-nvcc-cu12"],
        "aot-tpu": ["jax[tpu]>=0.10.1,!=0.10.2"],
        "tpu": ["jax[tpu]>=0.10.1,!=0.10.2"],
    },
)
