"""What ``shardray doctor`` looks at in the model: is it there, is it whole, does it fit."""

from __future__ import annotations

from shardray.runtime.cli.finding import Finding, fail, ok, warn
from shardray.runtime.cli.shard_table import format_bytes
from shardray.runtime.config import Config


def check_model(config: Config) -> Finding:
    """Headers only; of a hub id that is not here, those are fetched."""
    from shardray.runtime.engine.plan_report import open_model
    from shardray.runtime.model.sources import ModelSourceError

    try:
        checkpoint, served = open_model(config)
    except ModelSourceError as error:
        return fail(str(error), f"shardray pull {config.model.source}")
    except ValueError as error:  # a config.json, a checkpoint or a cut that cannot be served
        return fail(str(error), "fetch the model again, or choose another one or another cut")
    num_bytes = sum(path.stat().st_size for path in checkpoint.folder.glob("*.safetensors"))
    if not num_bytes:
        fix = f"shardray pull {config.model.source}, or wait at the first start"
        return warn(f"{config.model.source}: {served.family.name}, on the hub and not here", fix)
    what = f"{served.family.name}, {len(checkpoint.tensors)} tensors, {format_bytes(num_bytes)}"
    if not (checkpoint.folder / "tokenizer.json").is_file():
        return warn(f"{what}, no tokenizer", "requests have to bring token ids; put tokenizer.json into the folder")
    return ok(f"{what} in {checkpoint.folder}")


def check_memory(config: Config) -> Finding:
    """The forecast of ``shardray plan``, for this machine."""
    from shardray.runtime.engine.plan_report import Wishes, make_report

    if config.ray.address != "local":
        return ok("other nodes' memory is not known here; shardray plan --memory tells for a given size")
    wishes = Wishes(None, None, None, None, None, 0.0, num_seqs=1, context_len=None, prompt_len=None)
    try:
        report = make_report(config, wishes)
    except ValueError as error:
        return warn(f"cannot be told: {error}", "see the model's line")
    if report.obstacle is not None:
        return fail(report.obstacle, "; or ".join(report.remedies))
    mesh = report.chosen.mesh
    return ok(f"enough for {mesh.num_kv_tokens:,} tokens, {mesh.num_full_sequences:.1f} full-length sequences")
