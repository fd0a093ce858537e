"""A whole run, from its record: what share of its time was arithmetic, phase by phase."""

from pathlib import Path
from typing import Any

from abflax.config import RunConfig
from abflax.errors import InputError
from abflax.training.record import device_name, read_record
from experiments.benchmark.jax_work import Bench
from experiments.common.networks import architecture

Record = dict[str, Any]


def read(path: Path) -> Record:
    """A finished run's record."""
    record = read_record(path)
    if record is None:
        raise InputError(f"no record of a run at {path}")
    config = record["config"]
    if not config["dataset"].startswith("cifar"):
        raise InputError(f"{path} is of {config['dataset']}: FLOP are counted for CIFAR's images")
    if config["teacher"] is None:
        raise InputError(f"{path} is of a run without a teacher")
    if "abreast" in record["environment"]:
        raise InputError(f"{path} is of a run that was trained in one program with others")
    return record


def bench_of(record: Record) -> Bench:
    """The networks, batch, method and precision of a record."""
    config = record["config"]
    return Bench(
        architecture(config["teacher"]), architecture(config["student"]), config["batch_size"],
        method=config["method"], precision=config["precision"],
    )  # fmt: skip


def whole(record: Record, bench: Bench) -> list[dict[str, Any]]:
    """Each phase's seconds, compilation and evaluation included, and FLOP/s; then all of it."""
    environment, here = record["environment"], device_name(bench.devices[0])
    if environment["device"] != here:
        raise InputError(f"the run was on {environment['device']}, and this is {here}")
    rows: list[dict[str, Any]] = []
    phases = {phase.name: phase for phase in RunConfig.from_json(record["config"]).phases}
    for phase in record["phases"]:
        flops = bench.step_flops(phases[phase["name"]])
        steps, seconds = phase["steps"], phase["seconds"]
        rows.append({
            "name": f"{phase['name']}: {phase['epochs']} epochs, {steps:,} steps",
            "whole_seconds": seconds,
            "images_per_second": steps * bench.batch / seconds,
            "flops": flops,
            "flops_per_second": flops * steps / seconds,
            "devices": environment["devices"],
        })  # fmt: skip
    config, error = record["config"], f"{100 * record['result']['test_error']:.2f}"
    name = f"all of it: run {record['hash']}, {100 * config['fraction']:g} % of {config['dataset']}"
    return [*rows, {"name": name, "whole_seconds": record["seconds"], "test_error": error}]
