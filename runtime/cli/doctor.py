"""``shardray doctor``: what would keep a fleet from running here, and what to do about it."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import typer

from shardray.runtime.cli import options

if TYPE_CHECKING:
    from rich.table import Table

    from shardray.runtime.cli.finding import Check, Finding
    from shardray.runtime.config import Config

_STYLES = {"ok": "green", "warn": "yellow", "fail": "bold red"}
_ANY_MODEL = "smollm2-135m"


def command(
    config: options.ConfigFile = None,
    overrides: options.Overrides = None,
    as_json: options.Json = False,
) -> None:
    """Check this machine for what serving needs: a line for each check, and what to fix.

    Exits with 1 if any check failed. Run it on every node of a cluster.
    """
    from shardray.runtime.cli.shard_table import table_console
    from shardray.runtime.config import load_config

    knows_model = config is not None or any(text.startswith("model.source=") for text in overrides or ())
    given = overrides or []
    settings = load_config(config, given if knows_model else [f"model.source={_ANY_MODEL}", *given])
    findings = {name: _run(check, settings) for name, check in checks(knows_model).items()}
    if as_json:
        typer.echo(json.dumps([_to_jsonable(name, finding) for name, finding in findings.items()]))
    else:
        table_console().print(_table(findings))
    if any(finding.status == "fail" for finding in findings.values()):
        raise typer.Exit(1)


def _run(check: Check, settings: Config) -> Finding:
    """What breaks a check is found out as well: a library that cannot be imported, say."""
    from shardray.runtime.cli.finding import fail

    try:
        return check(settings)
    except Exception as error:
        reason = " ".join(str(error).split())
        return fail(
            f"{type(error).__name__}: {reason}", "install shardray anew: pip install --force-reinstall shardray"
        )


def checks(knows_model: bool) -> dict[str, Check]:
    """In the order in which they are told; without a file there is no model to look at."""
    from shardray.runtime.cli import machine_checks, model_checks, software_checks

    found: dict[str, Check] = {
        "python": software_checks.check_python,
        "torch": software_checks.check_torch,
        "cuda": software_checks.check_cuda,
        "nccl": software_checks.check_nccl,
        "triton": software_checks.check_triton,
        "grpc": software_checks.check_grpc,
        "ray": software_checks.check_ray,
        "ray token": software_checks.check_ray_token,
        "certificates": software_checks.check_certificates,
        "ports": machine_checks.check_ports,
        "shared memory": machine_checks.check_shared_memory,
        "huge pages": machine_checks.check_huge_pages,
        "open files": machine_checks.check_files,
        "processor": machine_checks.check_processor,
        "cores": machine_checks.check_cores,
        "clock": machine_checks.check_clock,
    }
    if knows_model:
        found |= {"model": model_checks.check_model, "memory": model_checks.check_memory}
    return found


def _to_jsonable(name: str, finding: Finding) -> dict[str, str]:
    return {"check": name, "status": str(finding.status), "what": finding.what, "fix": finding.fix}


def _table(findings: dict[str, Finding]) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, show_header=False)
    for name, finding in findings.items():
        what = finding.what + (f"\n→ {finding.fix}" if finding.fix else "")
        table.add_row(Text(finding.status, style=_STYLES[finding.status]), name, Text(what, overflow="fold"))
    return table
