"""`pcdvq push`: a checkpoint becomes a repository of the Hugging Face Hub."""

from __future__ import annotations

import glob
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HFValidationError, HTTPError
from pcdvq_kernels.errors import PCDVQError

from pcdvq_quantizer.card import write_model_card
from pcdvq_quantizer.checkpoints import open_any_checkpoint
from pcdvq_quantizer.contents import check_inside, checkpoint_files


def push(
    directory: Path, repo_id: str, private: bool = False, evaluations: Sequence[Path] = ()
) -> str:
    """Upload the checkpoint in `directory` to the repository `repo_id`, made if need be.

    What is in `directory` and no part of a checkpoint stays here. Weights that an earlier upload
    left there and that are not in `directory` are deleted.

    Args:
        directory: a whole checkpoint.
        repo_id: USER/REPO.
        private: who may see the repository: whoever the owner lets in, else all.
        evaluations: files of `pcdvq eval --json`; the model card is first written anew with them.

    Returns:
        The address of the repository.

    Raises:
        PCDVQError: not a whole checkpoint, a file of it is a link to elsewhere, nobody is logged
            in, or the Hub refuses.
    """
    open_any_checkpoint(directory)
    if repo_id.count("/") != 1:
        raise PCDVQError(f"{repo_id} is not the name of a repository; give USER/REPO")
    if get_token() is None:
        raise PCDVQError(
            "nobody is logged in to the Hub; run `hf auth login` or set HF_TOKEN to a token that "
            "may write (huggingface.co/settings/tokens)"
        )
    for name in checkpoint_files(directory):
        check_inside(directory, name)
    if evaluations:
        write_model_card(directory, evaluations)
    try:
        return _upload(HfApi(), directory, repo_id, private)
    except (HTTPError, HFValidationError, OSError) as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise PCDVQError(
            f"the Hub did not take {directory} as {repo_id} ({reason}); check the name, the "
            "connection and what the token may do. The same command continues."
        ) from error


def _upload(api: HfApi, directory: Path, repo_id: str, private: bool) -> str:
    url = api.create_repo(repo_id, private=private or None, exist_ok=True)
    if private and not api.model_info(repo_id).private:
        raise PCDVQError(
            f"{repo_id} exists and is public; make it private in its settings, or push without "
            "--private"
        )
    api.upload_folder(
        repo_id=repo_id,
        folder_path=directory,
        commit_message="PCDVQ checkpoint",
        allow_patterns=[glob.escape(name) for name in checkpoint_files(directory)],
        delete_patterns="*.safetensors",
    )
    return str(url)
