"""`edgestill doctor`: which engines work on this machine, and what to install for the others."""

from __future__ import annotations

import argparse
import json
import os
import platform
from collections.abc import Mapping
from dataclasses import asdict
from importlib import metadata
from typing import Any

from edgestill.runtime.console import add_json_option
from edgestill.runtime.engines.registry import available_engines
from edgestill.runtime.limits import cpu_limits, memory_limits
from edgestill.runtime.machine import cores, memory_bytes, physical_memory_bytes, processor

OPTIONAL_PACKAGES = {
    "numpy": ("needed by everything", None),
    "httpx2": ("talks to a coordinator: `edgestill join`", "device"),
    "backports.zstd": ("compresses uploads: `edgestill join`, `edgestill serve`", "device"),
    "zeroconf": ("finds a coordinator and announces it: --discover, --mdns", "discovery"),
    "pillow": ("reads folders of images", "images"),
    "pillow-heif": ("reads HEIC images in them", "heic"),
    "matplotlib": ("draws confusion matrices and benchmarks", "plots"),
    "torch": ("exports and verifies bundles", "export"),
    "onnx": ("exports bundles", "export"),
    "fastapi": ("serves the coordinator: `edgestill serve`", "coordinator"),
    "sqlalchemy": ("the coordinator's database: `edgestill serve`, `task`, `enrol`", "coordinator"),
    "obstore": ("the coordinator's blobs in S3", "s3"),
    "psycopg": ("the coordinator's database in PostgreSQL", "postgresql"),
    "dp-accounting": ("says epsilon with --noise-multiplier", None),
}
"""By name in the package index: what it is for, and the extra that brings it."""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "doctor", help="which engines work here, and what to install", description=__doc__
    )
    add_json_option(parser, "one JSON object")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Exit code 0 when at least one engine works, else 1."""
    report = examine()
    print(json.dumps(report) if arguments.json else describe(report))
    return 0 if any(engine["usable"] for engine in report["engines"]) else 1


def examine() -> dict[str, Any]:
    """The report as JSON values."""
    return {
        "engines": [asdict(status) for status in available_engines()],
        "packages": {name: _package_version(name) for name in OPTIONAL_PACKAGES},
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()}",
        "architecture": platform.machine(),
        "processor": processor(),
        "cores": cores(),
        "memory_bytes": memory_bytes(),
        "machine_cores": os.cpu_count(),
        "machine_memory_bytes": physical_memory_bytes(),
        "limits": [
            *({"of": "cores", "amount": limit.amount, "by": limit.by} for limit in cpu_limits()),
            *({"of": "bytes", "amount": limit.amount, "by": limit.by} for limit in memory_limits()),
        ],
    }


def describe(report: dict[str, Any]) -> str:
    """The report as lines for a person."""
    memory, whole = report["memory_bytes"], report["machine_memory_bytes"]
    of_cores = "" if report["cores"] == report["machine_cores"] else f" of {report['machine_cores']}"
    of_memory = f" of {whole / 2**30:.1f} GiB" if memory and whole and memory < whole else " GiB"
    lines = [
        f"machine   {report['processor']}, {report['cores']}{of_cores} cores, "
        + (f"{memory / 2**30:.1f}{of_memory}" if memory else "memory unknown"),
        *(f"limit     {_amount(limit)} by {limit['by']}" for limit in report["limits"]),
        f"system    {report['system']}, {report['architecture']}, Python {report['python']}",
        "",
        "engines",
    ]
    for engine in report["engines"]:
        if engine["usable"]:
            lines.append(f"  {engine['name']:<22} works  {engine['version'] or ''}".rstrip())
        else:
            lines.append(f"  {engine['name']:<22} does not work: {engine['reason']}")
            if engine["hint"]:
                lines.append(f"  {'':<22} to install: {engine['hint']}")
    lines += ["", "packages"]
    for name, version in report["packages"].items():
        purpose, extra = OPTIONAL_PACKAGES[name]
        lines.append(f"  {name:<22} {version or 'not installed'}  ({purpose})")
        if version is None:
            lines.append(f"  {'':<22} to install: pip install '{f'edgestill[{extra}]' if extra else name}'")
    return "\n".join(lines)


def _amount(limit: Mapping[str, Any]) -> str:
    amount = limit["amount"]
    return f"{amount:g} cores" if limit["of"] == "cores" else f"{amount / 1e6:.0f} MB of memory"


def _package_version(name: str) -> str | None:
    # from its metadata: importing torch would take seconds
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
