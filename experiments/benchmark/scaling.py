"""What grows with what: seconds with images, bytes with views; and what half precision costs."""

import statistics
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from abflax import Network, distill, load
from abflax.data import Dataset
from abflax.models import MODELS
from experiments.benchmark.jax_work import PREPROCESSING, SHAPE, Bench
from experiments.common.stats import mean_and_std

Rows = list[dict[str, Any]]

IMAGES = (5_000, 10_000, 50_000)
VIEWS = (1, 2, 4, 8)
PRECISIONS = ("float32", "bfloat16")
SEEDS = 5


def epochs(bench: Bench, repetitions: int) -> Rows:
    """One initialise epoch of a whole run on 5, 10 and 50 thousand images; once each."""
    teacher = Network(MODELS[bench.teacher](), jax.device_get(bench.teacher_variables))
    draw = np.random.default_rng(0)
    rows: Rows = []
    for count in IMAGES:
        images = draw.integers(0, 256, (count, *SHAPE), dtype=np.uint8)
        data = Dataset(images, np.arange(count) % 10, 10, PREPROCESSING)
        result = distill(
            MODELS[bench.student](), teacher, data, method=bench.method, epochs=(1, 0),
            batch_size=bench.batch, precision=bench.precision,
        )  # fmt: skip
        rows.append({"name": f"{count:,} images", "epoch_seconds": result.record["seconds"]})
    slope, intercept, away = line(IMAGES, [row["epoch_seconds"] for row in rows])
    rows.append({
        "name": f"a line: {1000 * slope:.2f} s per 1,000 images and {intercept:.0f} s besides; "
        f"at most {away:.0%} away from it"
    })  # fmt: skip
    return rows


def cache(bench: Bench, repetitions: int) -> Rows:
    """Bytes of the initialise phase's cached targets, for 1, 2, 4 and 8 views; once each."""
    rows: Rows = []
    for views in VIEWS:
        targets = bench.cached_targets(bench.phases[0], views)
        held = sum(leaf.nbytes for leaf in jax.tree.leaves(targets))
        rows.append({"name": f"{bench.examples:,} images in {views} views", "bytes": held})
    slope, intercept, away = line(VIEWS, [row["bytes"] for row in rows])
    rows.append({
        "name": f"a line: {slope / bench.examples / 1000:.2f} KB an image and view and "
        f"{intercept / 1e6:.2f} MB; at most {away:.0%} away from it"
    })  # fmt: skip
    return rows


def precision(bench: Bench, repetitions: int) -> Rows:
    """Test error on scikit-learn's digits, by the quickstart's recipe, in either precision."""
    from experiments import quickstart

    train = load("digits", "train")
    common: dict[str, Any] = {"test": load("digits", "test"), "protocol": "official"}
    taught = quickstart.teach(train, **common)
    teacher = Network(MODELS[quickstart.TEACHER](), taught.variables)
    rows: Rows = []
    errors = {}
    for name in PRECISIONS:
        results = [
            quickstart.learn(
                "activation-boundary", teacher, train, precision=name, seeds=seed,
                evaluate_every=sum(quickstart.EPOCHS), **common,
            ).record["result"]
            for seed in range(SEEDS)
        ]  # fmt: skip
        errors[name] = [result["test_error"] for result in results]
        agreement = [statistics.mean(result["agreement"].values()) for result in results]
        rows.append({
            "name": name,
            "test_error": mean_and_std(errors[name]),
            "agreement": mean_and_std(agreement, 1),
        })  # fmt: skip
    differences = [half - full for full, half in zip(*errors.values(), strict=True)]
    rows.append({"name": "difference, seed by seed", "test_error": mean_and_std(differences)})
    return rows


def line(at: Sequence[float], values: Sequence[float]) -> tuple[float, float, float]:
    """Least squares: slope, intercept, and the largest departure as a share of the value."""
    slope, intercept = statistics.linear_regression(at, values)
    away = max(abs(slope * x + intercept - y) / y for x, y in zip(at, values, strict=True))
    return slope, intercept, away
