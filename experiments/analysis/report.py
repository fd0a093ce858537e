"""Examines networks, and gives what it measures as arrays, as JSON and as tables."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from rich.table import Table

from abflax import Dataset, Network
from abflax.analysis import (
    Activity,
    Examination,
    boundary_distances,
    dead_neurons,
    error_by_agreement,
    examine,
)
from abflax.errors import InputError
from experiments.common import cli
from experiments.common.stats import mean_and_std, percent

_MOST_CLASSES = 20  # in a table; the files have all of them


@dataclasses.dataclass(frozen=True, eq=False)
class Findings:
    """Measurements of each network (a seed each) and of their teacher.

    Attributes:
      examinations: one a network.
      distances: one a network, layer -> `[images, neurons]`; {} where not measured.
      teacher_distances: the same of the teacher.
      data: the held-out images.
    """

    examinations: Sequence[Examination]
    distances: Sequence[dict[str, np.ndarray]]
    teacher_distances: dict[str, np.ndarray]
    data: Dataset


def examine_all(
    networks: Sequence[Network],
    teacher: Network | None,
    test: Dataset,
    distance_images: int = 0,
    distance_neurons: int = 32,
    connectors: Sequence[Mapping[str, Any] | None] | None = None,
) -> Findings:
    """Examines networks that are seeds of one, each with its connectors where they were kept."""
    examinations = [
        examine(network, test, teacher, own)
        for network, own in zip(networks, connectors or [None] * len(networks), strict=True)
    ]
    shapes = [
        {layer: rate.shape for layer, rate in each.student.firing_rate.items()}
        for each in examinations
    ]
    if any(each != shapes[0] for each in shapes):
        raise InputError("the networks have different layers, so they are not seeds of one")
    few = test.take(np.arange(min(distance_images, len(test)))) if distance_images > 0 else None

    def distances(network: Network | None, layers: Sequence[str]) -> dict[str, np.ndarray]:
        if few is None or network is None:
            return {}
        return {
            layer: boundary_distances(network, few, layer, neurons=distance_neurons)
            for layer in layers
        }

    activity = examinations[0].teacher
    return Findings(
        examinations,
        [distances(network, list(shapes[0])) for network in networks],
        distances(teacher, list(activity.firing_rate) if activity else []),
        test,
    )


def summarise(findings: Findings, groups: int) -> dict[str, Any]:
    """Makes the JSON summary; lists are over the networks."""
    first = findings.examinations[0]
    summary: dict[str, Any] = {
        "examples": len(findings.data),
        "error": [float(each.student.wrong.mean()) for each in findings.examinations],
        "teacher_error": float(first.teacher.wrong.mean()) if first.teacher else None,
        "joint_patterns": [each.student.joint_patterns for each in findings.examinations],
        "unmatched": list(first.unmatched),
        "layers": {},
    }
    for layer, rate in first.student.firing_rate.items():
        entry: dict[str, Any] = {"shape": list(rate.shape)}
        entry |= _activity([each.student for each in findings.examinations], layer)
        if first.teacher and layer in first.teacher.firing_rate:
            entry["teacher"] = _activity([first.teacher], layer)
        if layer in first.match:
            matches = [each.match[layer] for each in findings.examinations]
            entry["agreement"] = [match.agreement for match in matches]
            entry["agreement_by_class"] = [
                [None if np.isnan(share) else float(share) for share in match.by_class]
                for match in matches
            ]
        if findings.distances[0]:
            entry["distance"] = [_nearest(each[layer]) for each in findings.distances]
        if layer in findings.teacher_distances:
            entry["teacher"]["distance"] = [_nearest(findings.teacher_distances[layer])]
        summary["layers"][layer] = entry
    if first.match:
        summary["groups"] = [_split(each, groups) for each in findings.examinations]
    return summary


def _activity(activities: Sequence[Activity], layer: str) -> dict[str, list[Any]]:
    masks = [dead_neurons(each.firing_rate[layer]) for each in activities]
    return {
        "never": [float(never.mean()) for never, _ in masks],
        "always": [float(always.mean()) for _, always in masks],
        "firing_rate": [float(each.firing_rate[layer].mean()) for each in activities],
        "patterns": [each.patterns[layer] for each in activities],
    }


def _nearest(distances: np.ndarray) -> dict[str, float]:
    """Medians over the images: of all measured neurons, and of the nearest of them."""
    return {
        "median": float(np.median(distances)),
        "nearest": float(np.median(distances.min(axis=1))),
        "neurons": distances.shape[1],
    }


def _split(examination: Examination, groups: int) -> dict[str, list[float]]:
    agreement = examination.agreement_by_example()
    student = error_by_agreement(agreement, examination.student.wrong, groups)
    assert examination.teacher is not None
    teacher = error_by_agreement(agreement, examination.teacher.wrong, groups)
    differ = examination.student.predictions != examination.teacher.predictions
    return {
        "examples": student.examples.tolist(),
        "agreement": student.agreement.tolist(),
        "error": student.error.tolist(),
        "standard_error": student.standard_error.tolist(),
        "teacher_error": teacher.error.tolist(),
        "differs_from_teacher": error_by_agreement(agreement, differ, groups).error.tolist(),
    }


def arrays(findings: Findings) -> dict[str, np.ndarray]:
    """Name -> array of `analysis.npz`; names of a network's arrays start with its number."""
    flat: dict[str, np.ndarray] = {"labels": findings.data.labels}
    teacher = findings.examinations[0].teacher
    activities = {str(index): each.student for index, each in enumerate(findings.examinations)}
    for name, activity in (activities | ({"teacher": teacher} if teacher else {})).items():
        flat[f"{name}/predictions"] = activity.predictions
        for layer, rate in activity.firing_rate.items():
            flat[f"{name}/{layer}/firing_rate"] = rate
    for index, examination in enumerate(findings.examinations):
        for layer, match in examination.match.items():
            for field in ("by_neuron", "by_channel", "by_class", "by_example"):
                flat[f"{index}/{layer}/agreement_{field}"] = getattr(match, field)
        for layer, distance in findings.distances[index].items():
            flat[f"{index}/{layer}/distance"] = distance
    for layer, distance in findings.teacher_distances.items():
        flat[f"teacher/{layer}/distance"] = distance
    return flat


def tables(summary: dict[str, Any]) -> list[Table]:
    """Makes the tables that are printed."""
    shown = [_layer_table(summary)]
    if "groups" in summary:
        shown.append(_group_table(summary))
        matched = {k: v for k, v in summary["layers"].items() if "agreement" in v}
        classes = len(next(iter(matched.values()))["agreement_by_class"][0])
        if classes <= _MOST_CLASSES:
            shown.append(_class_table(matched, classes))
    return shown


def _layer_table(summary: dict[str, Any]) -> Table:
    count = len(summary["networks"])
    title = (
        f"{summary['networks'][0]}{f' and {count - 1} more' if count > 1 else ''} on "
        f"{summary['examples']:,} held-out images of {summary['dataset']}: error "
        f"{mean_and_std(summary['error'])} %"
    )
    if summary["teacher"]:
        title += f"; teacher {summary['teacher']}: {percent(summary['teacher_error'])} %"
    if summary["unmatched"]:
        title += f"\nno agreement (other neurons): {', '.join(summary['unmatched'])}"
    columns = ("layer", "neurons", "agreement %", "never fire %", "always fire %", "patterns")
    table = cli.make_table((*columns, "nearest boundary"), title)
    for layer, entry in summary["layers"].items():
        agreement = mean_and_std(entry["agreement"], 1) if "agreement" in entry else "–"
        rows = [(layer, entry, "×".join(map(str, entry["shape"])), agreement)]
        if "teacher" in entry:
            rows.append(("  teacher", entry["teacher"], "", ""))
        for name, activity, shape, agreement in rows:
            nearest = [each["nearest"] for each in activity.get("distance", [])]
            table.add_row(
                name, shape, agreement,
                mean_and_std(activity["never"]), mean_and_std(activity["always"]),
                f"{np.mean(activity['patterns']):,.0f}",
                f"{np.mean(nearest):.3g}" if nearest else "–",
            )  # fmt: skip
    return table


def _group_table(summary: dict[str, Any]) -> Table:
    title = "images by how well the activation pattern matches the teacher's (mean over the layers)"
    columns = ("group", "images", "agreement %", "error %", "teacher's error %", "other answer %")
    table = cli.make_table(columns, title)
    groups = summary["groups"]
    for index, count in enumerate(groups[0]["examples"]):
        shares = [
            [each[key][index] for each in groups]
            for key in ("agreement", "error", "teacher_error", "differs_from_teacher")
        ]
        last = len(groups[0]["examples"]) - 1
        name = {0: "worst", last: "best"}.get(index, str(index + 1))
        table.add_row(name, f"{count:,}", *map(mean_and_std, shares))
    return table


def _class_table(layers: dict[str, Any], classes: int) -> Table:
    table = cli.make_table(("class", *layers), "agreement by class, %")
    for label in range(classes):
        cells = []
        for entry in layers.values():
            shares = [each[label] for each in entry["agreement_by_class"]]
            cells.append("–" if None in shares else mean_and_std(shares, 1))
        table.add_row(str(label), *cells)
    return table
