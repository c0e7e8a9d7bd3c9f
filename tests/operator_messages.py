"""Every message that an operator can meet, read off the source: errors that commands end with, and lines of the log.

A message is a template: the text of its literal, with ``…`` for what varies. ``python -m tests.operator_messages``
prints those that docs/troubleshooting.md does not explain yet.
"""

from __future__ import annotations

import ast
import functools
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
GUIDE = ROOT / "docs" / "troubleshooting.md"
ANYTHING = "…"
# Of a text that is raised or logged, and of one that is found somewhere in a function: shorter ones are parts.
_LEAST_CHARS, _LEAST_CHARS_MADE = 5, 10

# Errors for operators. Those for clients (FieldError, RequestError) name their field and are in docs/security.md.
ERRORS = {
    "AccessError",
    "CheckpointError",
    "ClusterError",
    "CollectiveTimeout",
    "ConfigError",
    "DeviceLost",
    "DeviceTimeout",
    "DiscoveryFileError",
    "FormError",
    "HostDied",
    "HostSilent",
    "JournalError",
    "LinkError",
    "ListenError",
    "MemoryError",
    "MetricsListenError",
    "MissingExtraError",
    "ModelConfigError",
    "ModelSourceError",
    "NoPictureError",
    "OperationConflictError",
    "OperationFailedError",
    "OperationRefusedError",
    "PeerLost",
    "PlacementError",
    "PlanError",
    "QueueFullError",
    "RenderError",
    "RoleMissingError",
    "SecretsError",
    "TlsError",
    "TokenizerError",
    "UnauthenticatedError",
    "UnavailableError",
}

# Where the text of an error is made in another function than the one that raises it, by file.
MAKERS = {
    "parallel/checkpoint.py": ("_why_no_weights",),
    "parallel/greeting.py": (),
    "parallel/mesh.py": (),
    "parallel/rendezvous.py": (),
    "parallel/strangers.py": (),
    "parallel/tls.py": ("reason_of",),
    "parallel/waiting.py": (),
    "runtime/client/errors.py": ("_TLS_FAILURES", "to_server_error", "not_ready", "_unreachable"),
    "runtime/cluster/form.py": (),
    "runtime/cluster/placement.py": ("shortage", "_busy", "_bundle_note"),
    "runtime/cluster/ray_call.py": (),
    "runtime/cluster/ray_check.py": (),
    "runtime/cluster/ray_session.py": ("_explain", "_check_reachable"),
    "runtime/cluster/remote_host.py": ("_plain_cause",),
    "runtime/cluster/replica.py": ("_form_until_it_runs", "_on_keeper_end"),
    "runtime/cluster/supervise.py": ("_end_of", "_order"),
    "runtime/config/errors.py": ("explain",),
    "runtime/config/load.py": ("_construct_mapping",),
    "runtime/config/settings.py": ("__post_init__", "_check_length"),
    "runtime/driver/admission.py": ("_check_caller",),
    "runtime/driver/controller.py": (),
    "runtime/driver/fit.py": ("lack_of_memory",),
    "runtime/driver/journal_file.py": (),
    "runtime/driver/link.py": ("_TURNED_AWAY",),
    "runtime/model/sources.py": ("_unknown_source",),
    "runtime/server/gateway/discovery.py": ("_change", "_read"),
    "runtime/server/listen.py": ("_REASONS", "__init__"),
    "runtime/server/tokens.py": (),
}
# Errors of Python's own that reach an operator.
OTHERS = {("runtime/server/tokens.py", "ValueError"), ("runtime/cluster/leader.py", "RuntimeError")}


def template_of(node: ast.AST) -> str | None:
    """A text with ``…`` for what varies; None if no part of it is a literal."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return re.sub(r"%[sdrg]|%\.\df|\{\w+\}", ANYTHING, node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(part.value if isinstance(part, ast.Constant) else ANYTHING for part in node.values)  # type: ignore[misc]
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return (template_of(node.left) or ANYTHING) + (template_of(node.right) or ANYTHING)
    return None


def literal_chars(template: str) -> int:
    return len(re.sub(rf"[{ANYTHING}\s]", "", template))


def _texts(node: ast.AST, least_chars: int = _LEAST_CHARS) -> Iterator[str]:
    """Every text within ``node`` that is long enough to be a message; parts of a joined one are not texts."""
    text = template_of(node)
    if text is not None:
        if literal_chars(text) >= least_chars and " " in text:
            yield text
        return
    if isinstance(node, ast.Compare) or (isinstance(node, ast.Call) and ast.unparse(node.func).startswith("re.")):
        return  # what others say, looked for
    children = node.values if isinstance(node, ast.Dict) else ast.iter_child_nodes(node)
    for child in children:
        yield from _texts(child, least_chars)


def _raised(path: str, node: ast.Raise) -> Iterator[str]:
    if isinstance(node.exc, ast.Call):
        name = ast.unparse(node.exc.func)
        if name in ERRORS or (path, name) in OTHERS:
            for argument in node.exc.args:
                yield from _texts(argument)


def is_empty(message: str) -> bool:
    """Whether hardly anything of it is literal: it would be about every error."""
    return literal_chars(message) < _LEAST_CHARS


def is_indirect(node: ast.AST) -> bool:
    """Whether it raises one of ERRORS with a text that is made elsewhere."""
    if not (isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call)):
        return False
    return ast.unparse(node.exc.func) in ERRORS and not any(True for one in node.exc.args for _ in _texts(one))


def _constructed(node: ast.ClassDef) -> Iterator[str]:
    """What an error of ours makes of its arguments."""
    if node.name in ERRORS:
        calls = (one for one in ast.walk(node) if isinstance(one, ast.Call))
        yield from (text for call in calls if ast.unparse(call.func) == "super().__init__" for text in _texts(call))


def _logged(node: ast.Call) -> Iterator[str]:
    if ast.unparse(node.func) in ("_log.warning", "_log.error", "_log.exception", "_log.critical"):
        yield from _texts(node.args[0])


def _made(node: ast.AST, names: tuple[str, ...]) -> Iterator[str]:
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name in names:
        body = node.body[1:] if ast.get_docstring(node) else node.body
        yield from (text for statement in body for text in _texts(statement, _LEAST_CHARS_MADE))
    elif isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) in names:
        yield from _texts(node.value, _LEAST_CHARS_MADE)


@functools.cache
def sources() -> tuple[tuple[str, ast.Module], ...]:
    return tuple(_parsed())


def _parsed() -> Iterator[tuple[str, ast.Module]]:
    for folder in ("parallel", "runtime"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            yield str(path.relative_to(ROOT)), ast.parse(path.read_text(encoding="utf-8"))


@functools.cache
def messages() -> dict[str, list[str]]:
    """The places of each template."""
    found: dict[str, list[str]] = defaultdict(list)
    for path, tree in sources():
        for node in ast.walk(tree):
            texts = list(_made(node, MAKERS.get(path, ())))
            texts += _raised(path, node) if isinstance(node, ast.Raise) else ()
            texts += _logged(node) if isinstance(node, ast.Call) else ()
            texts += _constructed(node) if isinstance(node, ast.ClassDef) else ()
            for text in texts:
                found[text].append(f"{path}:{getattr(node, 'lineno', 0)}")
    return dict(found)


def explained() -> list[str]:
    """The messages in the first column of the guide's tables."""
    rows = [line for line in GUIDE.read_text(encoding="utf-8").splitlines() if line.startswith("| `")]
    return [message for row in rows for message in re.findall(r"`([^`]+)`", row.split(" | ")[0])]


def matches(message: str, template: str) -> bool:
    """Whether the guide's ``message``, in which ``…`` stands for anything, is about ``template``."""
    pattern = ".*".join(re.escape(part) for part in message.split(ANYTHING))
    return re.fullmatch(pattern, template, re.DOTALL) is not None


def unexplained() -> dict[str, list[str]]:
    known = explained()
    return {text: places for text, places in messages().items() if not any(matches(one, text) for one in known)}


if __name__ == "__main__":
    for text, places in unexplained().items():
        print(f"{places[0]}: {text}")
