"""What ``shardray plan`` prints: the hosts, what a token costs, and the shapes beside one another."""

from __future__ import annotations

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from shardray.runtime.cli.shard_table import format_bytes
from shardray.runtime.engine.forecast import TokenCost
from shardray.runtime.engine.plan_report import Report, num_parameters, weight_bytes
from shardray.runtime.engine.sizing import Candidate, PlannedHost

_NUM_SHAPES = 8
_UNSTEADY = 1.5  # a quiet machine's rounds are up to 1.4 apart


def describe(report: Report) -> Group:
    """The whole report, in the order in which it is read."""
    parts: list[RenderableType] = [
        Text(_model_line(report), style="bold"),
        Text(_shape_line(report)),
        _host_table(report),
    ]
    if report.obstacle is not None:
        parts += [Text(f"Does not fit: {report.obstacle}.", style="bold"), Text("Any one of these would do:")]
        parts += [Text(f"  * {remedy}") for remedy in report.remedies]
    else:
        parts += [Text(_kv_line(report)), Text(), _cost_table(report)]
    if report.hardware is not None and (spread := report.hardware.spread or 1) > _UNSTEADY:
        parts += [Text(_unsteady_line(spread))]
    if len(report.shapes) > 1:
        parts += [Text(), Text(_shapes_line(report)), _shape_table(report)]
    return Group(*parts)


def _model_line(report: Report) -> str:
    served, num = report.served, num_parameters(report)
    dtype, window = f"{'int8 and ' if served.spec.in_int8 else ''}{served.dtype_name}", served.max_model_len
    weights = format_bytes(weight_bytes(report))
    size = f"{num / 1e9:.3g} B" if num >= 1e9 else f"{num / 1e6:.4g} M"
    layers = served.spec.num_layers
    return f"{report.model_id}: {size} parameters in {dtype} ({weights}), {layers} layers, window {window:,}"


def _shape_line(report: Report) -> str:
    mesh, offer = report.chosen.mesh, report.offer
    where = "this machine's" if offer.is_shared else "each with"
    what = "GPU" if offer.device_type == "cuda" else "CPU host"
    num_hosts = len(mesh.hosts) * mesh.replicas
    return (
        f"{_shape(report.chosen)} on {num_hosts} {what}{'s' if num_hosts > 1 else ''}, {where} "
        f"{format_bytes(offer.num_bytes)}, of which {offer.memory_utilization:.0%} may be used"
    )


def _shape(shape: Candidate) -> str:
    plan, replicas = shape.mesh.plan, shape.mesh.replicas
    return f"tensor {plan.tp_size} × pipeline {plan.pp_size} × {replicas}"


def _kv_line(report: Report) -> str:
    mesh, load = report.chosen.mesh, report.load
    if all(host.memory.page_bytes == 0 for host in mesh.hosts):
        return "Keeps no keys and values: nothing is generated."
    return (
        f"KV of a replica: {mesh.num_kv_tokens:,} tokens, {mesh.num_full_sequences:.1f} full-length sequences at the "
        f"same time, {mesh.num_sequences(load.context_len + 1)} of {load.context_len:,} tokens"
    )


def _table(*columns: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def _host_table(report: Report) -> Table:
    table = _table("stage", "tensor", "layers", "heads", "kv heads", "weights", "process", "a step", "kv", "in all")
    for host in report.chosen.mesh.hosts:
        table.add_row(*_host_cells(report, host))
    return table


def _host_cells(report: Report, host: PlannedHost) -> tuple[str, ...]:
    memory, fits = host.memory, report.chosen.mesh.fits
    kv_bytes = report.chosen.mesh.kv_bytes(host) if fits else memory.sequence_bytes
    step_bytes = memory.step_bytes + memory.encoder_bytes
    in_all = memory.weight_bytes + host.runtime_bytes + step_bytes + kv_bytes
    sizes = memory.weight_bytes, host.runtime_bytes, step_bytes, kv_bytes, in_all
    layers = f"{host.layers.start}–{host.layers.stop - 1}"
    counts = str(host.stage), str(host.tp_rank), layers, str(host.num_heads), str(host.num_kv_heads)
    return (*counts, *map(format_bytes, sizes))


def _cost_table(report: Report) -> Table:
    rates, load = report.chosen.rates, report.load
    is_measured = report.hardware is not None and report.hardware.spread is not None
    speed = "tokens/s" if is_measured else "tokens/s at most"
    table = _table("a token of", "FLOPs", "bytes moved", "sent by a host", "messages", speed, "")
    if report.served.spec.layers:
        what = f"{report.num_seqs} decodes at {load.context_len:,}"
        speed = "" if rates is None else f"{rates.decode_tokens_per_s:,.0f}"
        alone = "" if rates is None else f"one stream {rates.stream_tokens_per_s:,.0f}"
        table.add_row(what, *_cost_cells(report.decode), speed, alone)
    speed = "" if rates is None else f"{rates.prefill_tokens_per_s:,.0f}"
    first = "" if rates is None else f"first token after {1000 * rates.first_token_s:.3g} ms"
    table.add_row(f"a prompt of {load.prompt_len:,}", *_cost_cells(report.prompt), speed, first)
    return table


def _cost_cells(cost: TokenCost) -> tuple[str, ...]:
    return (
        f"{cost.flops / 1e9:.3g} G",
        format_bytes(cost.num_bytes),
        format_bytes(cost.sent_bytes),
        f"{cost.num_messages:.3g}",
    )


def _unsteady_line(spread: float) -> str:
    return (
        f"Measured beside other work: the same took up to {spread:.1f} times as long a few seconds later; "
        "measure again when the machine is quiet"
    )


def _shapes_line(report: Report) -> str:
    by = "decode rate of all replicas" if report.shapes[0].rates else "size of a mesh and of its largest share"
    more = f", {_NUM_SHAPES} of {len(report.shapes)}" if len(report.shapes) > _NUM_SHAPES else ""
    return f"Shapes for {report.num_hosts} hosts by {by}{more}:"


def _shape_table(report: Report) -> Table:
    speeds = ("decode/s", "one stream/s", "prompts/s") if any(shape.rates for shape in report.shapes) else ()
    table = _table("tensor", "stages", "replicas", "kv tokens", "full length", *speeds, "")
    for shape in report.shapes[:_NUM_SHAPES]:
        mesh, plan, rates = shape.mesh, shape.mesh.plan, shape.rates
        counts = str(plan.tp_size), str(plan.pp_size), str(mesh.replicas)
        if not mesh.fits:
            blanks = [""] * (2 + len(speeds))
            table.add_row(*counts, *blanks, f"lacks {format_bytes(mesh.tightest.missing_bytes)} a host")
            continue
        cells = [f"{mesh.num_kv_tokens:,}", f"{mesh.num_full_sequences:.1f}"]
        if rates is not None:
            prompts = mesh.replicas * rates.prefill_tokens_per_s
            cells += [f"{speed:,.0f}" for speed in (shape.decode_tokens_per_s, rates.stream_tokens_per_s, prompts)]
        table.add_row(*counts, *cells)
    return table
