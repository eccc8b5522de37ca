"""Uploads to the Hub, with errors that say what to do."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub import HfApi

CARD = "README.md"


def create_repository(repo_id: str, private: bool | None = None, token: str | None = None) -> str:
    """Create a model repository unless it exists, and return its full name.

    Raises:
        ValueError: Not a repository name.
        OSError: The Hub refuses or cannot be reached; the message says what to do.
    """
    with explained(repo_id, token):
        return HfApi(token=token).create_repo(repo_id, private=private, exist_ok=True).repo_id


def upload(
    folder: str | os.PathLike,
    repo_id: str,
    token: str | None = None,
    commit_message: str | None = None,
    create_pr: bool = False,
    variant: str | None = None,
    replace_card: bool = False,
) -> str:
    """Upload a pipeline's folder in one commit; files that are there already are not uploaded again.

    Args:
        folder: What ``save_pretrained`` wrote, with a card and its pictures.
        repo_id: An existing repository, ``user/name``.
        token: Access token; that of ``hf auth login`` or HF_TOKEN if None.
        commit_message: Title of the commit.
        create_pr: Open a pull request instead of committing.
        variant: Variant of the weights in ``folder``. Shards of an earlier upload of the same variant are deleted.
        replace_card: Whether README.md is uploaded although the repository has one. Otherwise the one on the Hub stays.

    Returns:
        Address of the repository, or of the pull request.

    Raises:
        OSError: The Hub refuses or cannot be reached; the message says what to do.
    """
    api = HfApi(token=token)
    infix = f".{variant}" if variant else ""
    with explained(repo_id, token):
        keeps_card = not replace_card and api.file_exists(repo_id, CARD)
        info = api.upload_folder(
            repo_id=repo_id,
            folder_path=str(folder),
            commit_message=commit_message or "Upload a diffusers_sde pipeline",
            create_pr=create_pr,
            ignore_patterns=[CARD] if keeps_card else None,
            delete_patterns=[
                f"*/diffusion_pytorch_model{infix}.safetensors",
                f"*/diffusion_pytorch_model{infix}-?????-of-?????.safetensors",
                f"*/diffusion_pytorch_model.safetensors.index{infix}.json",
            ],
        )
        return info.pr_url or f"{api.endpoint}/{repo_id}"


def _status(error: BaseException | None) -> int | None:
    """The HTTP status behind an error of the client, which wraps the errors of large files; None without a status."""
    while error is not None:
        status = getattr(getattr(error, "response", None), "status_code", None)
        if isinstance(status, int):
            return status
        error = error.__cause__ or error.__context__
    return None


@contextmanager
def explained(repo_id: str, token: str | None) -> Iterator[None]:
    """Turn errors of the client into an OSError that says what to do and holds no token."""
    try:
        yield
    except ValueError:  # not a repository name, or metadata that the Hub refuses; the client says which
        raise
    except Exception as error:
        advice = {
            None: "the Hub cannot be reached, or no token is known: check the connection, or log in by 'hf auth "
            "login', and repeat the upload; if only an answer was lost, nothing is uploaded twice",
            401: "the token is not valid: log in by 'hf auth login', or set HF_TOKEN to a token with write access",
            403: f"the token may not write to {repo_id!r}: take one with write access, or a repository of your own",
            404: f"there is no repository {repo_id!r} that this token can see: check the name and the token",
            409: "somebody else changed the repository at the same time: repeat the upload",
            413: "a file is too large: save with a smaller max_shard_size",
            429: "too many requests: wait a few minutes and repeat the upload; what arrived is not sent again",
        }.get(
            _status(error), "the Hub answered with an error: try again later; what was uploaded is not uploaded again"
        )
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        if token:
            reason = reason.replace(token, "***")
        raise OSError(f"{repo_id}: {advice}. ({reason})") from error
