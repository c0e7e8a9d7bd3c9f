"""Snapshots from a model hub, through huggingface_hub: its cache, its environment variables, its tokens.

HF_HOME, HF_TOKEN, HF_ENDPOINT and HF_HUB_OFFLINE mean what they mean everywhere else.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from shardray.parallel.checkpoint import Checkpoint, TensorInfo
from shardray.runtime.model.model_cache import ModelSourceError, Progress

# Formats that are read; pickled weights never reach the disk.
_ALLOWED = ["*.safetensors", "*.safetensors.index.json", "*.json", "*.jinja", "tokenizer*", "*.model"]
_SMALL = ["config.json", "generation_config.json", "modules.json", "sentence_bert_config.json", "*/config.json"]
# Copies in other formats that repositories keep beside the model; 1_Pooling/config.json and the like are wanted
_IGNORED = ["[!0-9]*/*", "*/[!c]*", "consolidated*"]


def fetch_from_hub(repo_id: str, revision: str | None, progress: Progress) -> Path:
    """The snapshot folder of ``repo_id``; an interrupted download goes on where it stopped. Raises ModelSourceError."""
    from huggingface_hub import snapshot_download  # 0.5 s to import, for those who use a hub

    with _explained(repo_id, revision):
        folder = snapshot_download(
            repo_id,
            revision=revision,
            allow_patterns=_ALLOWED,
            ignore_patterns=_IGNORED,
            tqdm_class=_progress_bar_class(f"Downloading {repo_id}", progress),
        )
    if not any(Path(folder).glob("*.safetensors")):
        raise ModelSourceError(
            f"{repo_id}: holds no *.safetensors, and nothing else is fetched from a hub; "
            "choose a repository or a revision (often refs/pr/N) that has them"
        )
    return Path(folder)


def find_in_hub_cache(repo_id: str, revision: str | None) -> Path | None:
    """The snapshot folder of ``repo_id`` if there is one on this machine; it may lack files. Asks no hub."""
    from huggingface_hub import errors, snapshot_download

    try:
        folder = snapshot_download(
            repo_id, revision=revision, local_files_only=True, allow_patterns=_ALLOWED, ignore_patterns=_IGNORED
        )
    except (errors.LocalEntryNotFoundError, errors.HFValidationError):
        return None
    return Path(folder)


def fetch_headers(repo_id: str, revision: str | None) -> Checkpoint:
    """The configuration of a model and the headers of its weights, some hundred KiB. Raises ModelSourceError."""
    from huggingface_hub import HfApi, snapshot_download

    with _explained(repo_id, revision):
        folder = Path(snapshot_download(repo_id, revision=revision, allow_patterns=_SMALL))
        # The commit that the folder is named after: the branch may have moved on meanwhile.
        found = HfApi().get_safetensors_metadata(repo_id, revision=folder.name)
    return Checkpoint(
        folder,
        {
            name: TensorInfo(name, info.dtype, tuple(info.shape), folder / file_name, info.data_offsets[0])
            for file_name, header in found.files_metadata.items()
            for name, info in header.tensors.items()
        },
    )


@contextlib.contextmanager
def _explained(repo_id: str, revision: str | None) -> Iterator[None]:
    """Errors of the hub as ModelSourceError."""
    from huggingface_hub import errors

    try:
        yield
    except errors.GatedRepoError as error:
        raise ModelSourceError(f"{repo_id}: access is gated; accept its terms on its page and set HF_TOKEN") from error
    except errors.RepositoryNotFoundError as error:
        raise ModelSourceError(
            f"{repo_id}: neither a folder here nor a repository on the hub; a private one needs HF_TOKEN"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise ModelSourceError(f"{repo_id}: has no revision {revision!r}") from error
    except errors.NotASafetensorsRepoError as error:
        raise ModelSourceError(f"{repo_id}: holds no model.safetensors and no index of several") from error
    except errors.LocalEntryNotFoundError as error:
        reason = "HF_HUB_OFFLINE is set" if _is_offline() else "the hub cannot be reached"
        raise ModelSourceError(f"{repo_id}: not in the local hub cache and {reason}") from error
    except (errors.HFValidationError, errors.HTTPError, OSError) as error:  # type: ignore[attr-defined]
        first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ModelSourceError(f"{repo_id}: could not be fetched: {first_line}") from error


def _is_offline() -> bool:
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def _progress_bar_class(description: str, progress: Progress) -> type[tqdm[Any]]:
    """A progress bar that draws nothing and reports the bytes fetched to ``progress``."""
    most_bytes = 0  # one bar counts bytes received, another bytes written; what is further on is reported

    class CallbackBar(tqdm):  # type: ignore[type-arg]  # not subscriptable at run time
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **{**options, "file": io.StringIO()})

        def update(self, n: float | None = 1) -> None:
            nonlocal most_bytes
            self.n += n or 0
            if self.unit == "B" and self.n > most_bytes:
                most_bytes = int(self.n)
                progress(description, most_bytes, int(self.total) if self.total else None)

        def display(self, *args: Any, **options: Any) -> None:
            """Whoever gave the callback draws."""

    progress(description, 0, None)
    return CallbackBar
