"""What a family is: how its ``config.json`` is read, and where its checkpoints keep each parameter."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from shardray.runtime.model.config_json import Config, nearest_of
from shardray.runtime.model.parameters import SCALE
from shardray.runtime.model.spec import Activation, DecoderSpec, Layer, ModelConfigError

T = TypeVar("T")

FULL, SLIDING = "full_attention", "sliding_attention"
_ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "quick_gelu": "quick_gelu",
    "relu": "relu",
    "relu2": "relu2",
}


@dataclass(frozen=True)
class Groups:
    """How rows of one parameter lie between those of others in a fused tensor: ``size`` rows, every ``stride`` rows."""

    size: int
    stride: int


@dataclass(frozen=True)
class Source:
    """Where a checkpoint keeps a parameter. ``{layer}`` in the name stands for the layer's index, ``{row}`` for that of
    a row, if each is a tensor of its own.

    ``transposed``: stored as (in, out). ``is_row``: stored with one dimension more, of size 1. ``start``: the first row
    (of the untransposed matrix) inside a fused tensor; ``groups``: how the rows go on from there, if not one after the
    other.
    """

    name: str
    transposed: bool = False
    start: int = 0
    groups: Groups | None = None
    is_row: bool = False

    def rows(self, owned: slice) -> list[slice]:
        """Where rows ``owned`` of the parameter are, in as few pieces as they lie in."""
        if self.groups is None or owned.start == owned.stop:
            return [slice(owned.start + self.start, owned.stop + self.start)]
        size, stride = self.groups.size, self.groups.stride
        pieces, row = [], owned.start
        while row < owned.stop:
            group, first = divmod(row, size)
            count = min(size - first, owned.stop - row)
            at = self.start + group * stride + first
            pieces.append(slice(at, at + count))
            row += count
        return pieces

    def stored_shapes(self, shape: tuple[int, ...], layer: int | None) -> dict[str, tuple[int, ...]]:
        """The names of what holds a parameter of that shape, and the shapes that they need for it."""
        if self.has_row_tensors:
            return {self.name.format(layer=layer, row=row): shape[1:] for row in range(shape[0])}
        if self.is_row:
            return {self.name: (1, *shape)}
        stored = (self.rows(slice(shape[0] - 1, shape[0]))[0].stop, *shape[1:])
        return {self.name.format(layer=layer): swap_last(stored) if self.transposed else stored}

    @property
    def has_row_tensors(self) -> bool:
        return "{row}" in self.name


def scale_source(source: Source) -> Source:
    """Where the scales of a weight of 8 bits are kept: one for each row of what lies there, whichever way it lies."""
    return replace(source, name=source.name + SCALE, transposed=False)


def swap_last(items: tuple[T, ...]) -> tuple[T, ...]:
    """The last two of a shape or an index exchanged"""
    return (*items[:-2], items[-1], items[-2])


@dataclass(frozen=True)
class Family:
    """``sources`` maps the names of runtime/model/parameters.py; tensors matching ``ignored`` are not parameters.

    ``{num_layers}`` in a pattern stands for their number. ``irrelevant``: fields of the config that make no difference,
    and why; those of all families are in irrelevant.py.
    """

    name: str
    model_types: tuple[str, ...]
    read_config: Callable[[Config], DecoderSpec]
    sources: Callable[[DecoderSpec], dict[str, Source]]
    ignored: tuple[str, ...] = ()
    prefixes: tuple[str, ...] = ("",)  # what checkpoints of this family put before every name
    quantizations: tuple[str, ...] = ()  # quant_method of checkpoints that are dequantized as they are read
    irrelevant: Mapping[str, str] = field(default_factory=dict, hash=False)


def sources(modules: Mapping[str, str], parts: Iterable[str] = ("weight", "bias")) -> dict[str, Source]:
    """Parameters under names of their own, untransposed. Parts that a model lacks do no harm."""
    return {f"{module}.{part}": Source(f"{name}.{part}") for module, name in modules.items() for part in parts}


def fused_by_head(spec: DecoderSpec, name: str) -> dict[str, Source]:
    """Queries, keys and values in one tensor: for each KV head its queries, its key and its value."""
    dim, num_kv_heads = spec.attention.head_dim, spec.attention.num_kv_heads
    queries = spec.attention.num_heads // num_kv_heads * dim
    places = {"q": (0, queries), "k": (queries, dim), "v": (queries + dim, dim)}
    return {
        f"{module}.{part}": Source(f"{name}.{part}", start=start, groups=Groups(size, queries + 2 * dim))
        for module, (start, size) in places.items()
        for part in ("weight", "bias")
    }


def fused_in_turn(spec: DecoderSpec, name: str, transposed: bool = False) -> dict[str, Source]:
    """Queries, keys and values in one tensor: all queries, then all keys, then all values."""
    attention = spec.attention
    keys = attention.num_heads * attention.head_dim
    starts = {"q": 0, "k": keys, "v": keys + attention.num_kv_heads * attention.head_dim}
    weights = {f"{module}.weight": Source(f"{name}.weight", transposed, start) for module, start in starts.items()}
    return weights | {f"{module}.bias": Source(f"{name}.bias", start=start) for module, start in starts.items()}


def change_layers(spec: DecoderSpec, change: Callable[[int, Layer], Layer]) -> DecoderSpec:
    """``spec`` with each layer, of an index, changed."""
    return replace(spec, layers=tuple(change(index, layer) for index, layer in enumerate(spec.layers)))


def change_every_layer(spec: DecoderSpec, **changes: Any) -> DecoderSpec:
    """``spec`` with fields of every layer changed."""
    return change_layers(spec, lambda _, layer: replace(layer, **changes))


def change_attention(spec: DecoderSpec, **changes: Any) -> DecoderSpec:
    """``spec`` with fields of every layer's attention changed."""
    return change_layers(spec, lambda _, layer: replace(layer, attention=replace(layer.attention, **changes)))


def change_mlp(spec: DecoderSpec, **changes: Any) -> DecoderSpec:
    """``spec`` with fields of every layer's MLP changed."""
    return change_layers(spec, lambda _, layer: replace(layer, mlp=replace(layer.dense, **changes)))


def windowed_layers(spec: DecoderSpec, config: Config, is_windowed: Callable[[int], bool]) -> DecoderSpec:
    """``spec`` with ``sliding_window`` on the layers that ``layer_types`` names, or else those that ``is_windowed``."""
    window = required(config, "sliding_window", int)
    kinds = layer_types(config, spec.num_layers, is_windowed)
    return change_layers(
        spec,
        lambda index, layer: replace(
            layer, attention=replace(layer.attention, window=window if kinds[index] == SLIDING else None)
        ),
    )


def layer_types(config: Config, num_layers: int, is_windowed: Callable[[int], bool]) -> list[str]:
    """FULL or SLIDING for each layer: as the config lists them, or else as ``is_windowed``. Raises ModelConfigError."""
    default = [SLIDING if is_windowed(index) else FULL for index in range(num_layers)]
    return of_each_layer(config, "layer_types", num_layers, (FULL, SLIDING), default)


def of_each_layer(config: Config, field: str, num_layers: int, known: Sequence[T], default: list[T]) -> list[T]:
    """One of the ``known`` for each layer; ``default`` stands for an absent or null list. Raises ModelConfigError."""
    listed: list[T] = default if config.get(field) is None else config[field]
    if not isinstance(listed, list) or len(listed) < num_layers:
        raise ModelConfigError(f"config.json: {field} is {listed!r}, expected a list of one for each layer")
    for value in listed:
        if value not in known:
            expected = ", ".join(map(repr, known))
            raise ModelConfigError(f"config.json: {field}: {value!r} is not supported (one of {expected} is)")
    return listed


def without_positions(spec: DecoderSpec, of: Callable[[int, Layer], bool]) -> DecoderSpec:
    """``spec`` without rotary positions in some layers."""

    def change(index: int, layer: Layer) -> Layer:
        return replace(layer, attention=replace(layer.attention, rotary=None)) if of(index, layer) else layer

    return change_layers(spec, change)


def read_activation(config: Mapping[str, Any], field: str, default: str) -> Activation:
    """An activation by the name that ``transformers`` has for it."""
    return choice(config, field, default, _ACTIVATIONS)


def required(config: Mapping[str, Any], field: str, kind: type[T]) -> T:
    """A field that the config must have; a number has to be positive. Raises ModelConfigError naming it.

    Files have whole numbers written in both ways: 50 for 50.0, and the other way round.
    """
    value = config.get(field)
    if kind is float and type(value) is int:
        value = float(value)
    if kind is int and isinstance(value, float) and value.is_integer():
        value = int(value)
    if not isinstance(value, kind) or isinstance(value, bool) != (kind is bool):
        raise ModelConfigError(f"config.json: {field} is {value!r}, expected {kind.__name__}")
    if isinstance(value, (int, float)) and kind is not bool and value <= 0:
        raise ModelConfigError(f"config.json: {field} is {value!r}, expected a positive {kind.__name__}")
    return value


def optional(config: Mapping[str, Any], field: str, default: T) -> T:
    """A field of the type of its default, which stands for an absent or null one. Raises ModelConfigError naming it."""
    return default if config.get(field) is None else required(config, field, type(default))


def choice(config: Mapping[str, Any], field: str, default: str, accepted: Mapping[str, T]) -> T:
    """One of the accepted values of a field. Raises ModelConfigError listing them."""
    value = config.get(field) or default
    if not isinstance(value, str) or value not in accepted:
        raise ModelConfigError(f"config.json: {field} {value!r} is not supported; {nearest_of(value, accepted)}")
    return accepted[value]


def refuse_unless(config: Mapping[str, Any], field: str, expected: Any) -> None:
    """Refuse a field whose other values would change the output."""
    value = config.get(field)
    if value is not None and value != expected:
        raise ModelConfigError(f"config.json: {field} {value!r} is not supported (only {expected!r} is)")


def whole_parts(config: Mapping[str, Any], field: str, parts_field: str) -> int:
    """``config[field] / config[parts_field]``, which has to come out even. Raises ModelConfigError."""
    whole, parts = required(config, field, int), required(config, parts_field, int)
    if whole % parts:
        raise ModelConfigError(f"config.json: {field} {whole} is not a multiple of {parts_field} {parts}")
    return whole // parts
