"""Download plug-ins from the hub and upload them. The server is the hub's, or ``HF_ENDPOINT``."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from lit_reduce.errors import UserError
from lit_reduce.files import PathLike


def download(repo_id: str, files: Sequence[str], revision: str | None, local_files_only: bool) -> Path:
    """Download files, all of one commit, into the cache of the hub client and return their folder.

    Raises:
        UserError: No such repository or revision, or no connection.
    """
    from huggingface_hub import snapshot_download

    with _explained(f"cannot fetch the plug-in {repo_id}" + (f" at revision {revision}" if revision else "")):
        return Path(
            snapshot_download(
                repo_id,
                revision=revision,
                allow_patterns=list(files),
                local_files_only=local_files_only,
                endpoint=_endpoint(),
            )
        )


def upload(
    folder: PathLike, repo_id: str, files: Sequence[str], private: bool, revision: str | None, message: str
) -> str:
    """Commit files of a folder to a repository, which is created if needed, and return the URL of the commit.

    Raises:
        UserError: The hub refuses or cannot be reached.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    api = HfApi(endpoint=_endpoint(), library_name="lit_reduce")
    with _explained(f"cannot push to {repo_id}"):
        api.create_repo(repo_id, private=private, exist_ok=True)
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        operations = [CommitOperationAdd(name, Path(folder) / name) for name in files]
        commit = api.create_commit(repo_id, operations, commit_message=message, revision=revision)
    return str(commit.commit_url)


def _endpoint() -> str | None:
    """The server, read at call time: the hub client reads it once, at import."""
    return os.environ.get("HF_ENDPOINT") or None


@contextmanager
def _explained(what: str) -> Iterator[None]:
    """Turn any exception of the client into a `UserError` of one sentence.

    Everything is caught, because the exceptions come from several libraries that differ between versions of the client.
    """
    try:
        yield
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = lines[0][:300] if lines else type(error).__name__
        raise UserError(f"{what}: {reason}; check the name, the revision, the connection and your login") from error
