"""The Hugging Face Hub, to which a run's export is pushed."""

import glob
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from httpx import HTTPError
from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import validate_repo_id

from slora_flwr import __version__
from slora_flwr.common.text import printable, redact_hub_logs
from slora_flwr.config import ConfigError, refuse
from slora_flwr.server.export import export_run

# What an earlier export may have left in the repository, beside its folders.
_OF_EXPORTS = (".safetensors", ".json")


class HubError(RuntimeError):
    """The Hub refused a request, or was not reached."""


@dataclass(frozen=True)
class Pushed:
    """What a push has made.

    Attributes
    ----------
    url : str
        The repository's page.
    commit : str
        The commit that holds the export.
    is_private : bool
        Whether others do not see it.
    """

    url: str
    commit: str
    is_private: bool


def check_repo(repo: str) -> None:
    """Raise ConfigError unless a text can be the name of a repository of a user."""
    allowed = "USER/NAME, of letters, digits, and single -, _ and . between them"
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise refuse("REPO", repo, allowed) from error
    if "/" not in repo:
        raise refuse("REPO", repo, allowed)


def push_run(
    run: Path, repo: str, which: str, merge: bool, *, is_public: bool
) -> Pushed:
    """Export a state of a finished run, and push it to a repository of the Hub.

    A repository that does not exist is made. In one that does, the files of an earlier
    export are replaced, in one commit.

    Parameters
    ----------
    run, which, merge
        As for `export_run`.
    repo : str
        The repository, `USER/NAME`.
    is_public : bool
        Whether a new repository is public, and an existing one may be.

    Raises
    ------
    RunError, ConfigError
        As `export_run`; or there is no token, or the repository is public against
        `is_public`.
    HubError
        If the Hub refuses, or is not reached.
    """
    check_repo(repo)
    if get_token() is None:
        raise ConfigError(
            "the Hub's token is missing; allowed: one that may write, set by `hf auth "
            "login` or as HF_TOKEN"
        )
    redact_hub_logs()
    api = HfApi(library_name="slora-flwr", library_version=__version__)
    with tempfile.TemporaryDirectory() as folder:
        export_run(run, which, merge, Path(folder), repo)
        with _pushing(repo):
            url = api.create_repo(repo, private=not is_public, exist_ok=True)
            is_private = bool(api.model_info(repo).private)
        if not (is_public or is_private):
            raise ConfigError(
                f"REPO is {repo}, which is public; allowed: a private or a new one, "
                "unless --public is given"
            )
        with _pushing(repo):
            done = api.upload_folder(
                repo_id=repo,
                folder_path=folder,
                commit_message="Upload by slora push",
                delete_patterns=[
                    glob.escape(name)
                    for name in api.list_repo_files(repo)
                    if "/" not in name and name.endswith(_OF_EXPORTS)
                ],
            )
    return Pushed(str(url), done.oid, is_private)


@contextmanager
def _pushing(repo: str) -> Iterator[None]:
    """Raise HubError in place of what the Hub's library raises."""
    try:
        yield
    except (HTTPError, OSError, RuntimeError, ValueError) as error:
        raise HubError(f"{repo} cannot be pushed: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    """Return in a line why the Hub's library failed."""
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else 0
    if status == 401:
        return "the Hub does not know the token (status 401)"
    if status == 403:
        return "the token may not write there (status 403)"
    return printable(" ".join(str(error).split()))
