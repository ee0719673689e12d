"""The upload: the card of a Trainer's model on its way to the Hub, and errors that say how to try again."""

import inspect
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import transformers
from huggingface_hub import ModelCard, constants, get_session
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import hf_raise_for_status

from .card import CARD_FILE, write_card
from .run import describe_run


# Of the HTTP client of huggingface_hub, httpx or httpx2 by its release: what its own error derives from.
HTTPError = HfHubHTTPError.__bases__[0]
# What huggingface_hub raises: answers that refuse, connections that break, and what it makes of either.
UPLOAD_ERRORS = (HTTPError, OSError, RuntimeError, ValueError)
HINTS = {
    401: "Log in with `hf auth login`, or give a token that is valid as `hub_token`.",
    403: "Give a token that may write there, or another repository as `hub_model_id`.",
}


class UploadError(RuntimeError):
    """The Hub did not take what was to be uploaded. What is on this machine is as it was."""


if TYPE_CHECKING:
    # The class that the mixin is combined with; at runtime it must not be a base, so that any Trainer can follow it.
    from transformers import Trainer as TrainerBase
else:
    TrainerBase = object


class ModelCardMixin(TrainerBase):
    """Gives any [`~transformers.Trainer`] class the card of this package, put before it among the base classes.

    Overrides `create_model_card`, and wraps `push_to_hub` and `init_hf_repo`.
    """

    def create_model_card(self, **kwargs: Any) -> None:
        """Writes README.md into the output folder.

        Args:
            kwargs:
                What the Trainer cannot know, see [`describe_run`]: the arguments of
                [`~transformers.Trainer.create_model_card`], `dataset_split`, `benchmark_task`, `metrics` and `plots`.
        """
        if self.is_world_process_zero():
            write_card(describe_run(self, **kwargs), self.args.output_dir)

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Uploads the output folder: weights, config, tokenizer or processor, a new card, and what else lies there.

        The Hub looks at the card first. See [`~transformers.Trainer.push_to_hub`]; `kwargs` are those of
        `create_model_card`.

        Raises:
            UploadError: if the Hub refuses, or the connection breaks; with `blocking=False` that of the files shows
                only in the result.
            TypeError: for `private` where the installed Transformers does not take it.
        """
        options = {} if private is None else {"private": private}
        if not options.keys() <= inspect.signature(super().push_to_hub).parameters.keys():
            raise TypeError(
                f"Trainer.push_to_hub of Transformers {transformers.__version__} does not take `private`, so it would "
                f"have no effect. Set `hub_private_repo={private}` in the training arguments."
            )
        with explaining_upload(self):
            self.create_model_card(**kwargs)
            if self.is_world_process_zero():
                validate_card(Path(self.args.output_dir, CARD_FILE))
            return super().push_to_hub(commit_message, blocking, token, revision, **options, **kwargs)

    def init_hf_repo(self, *args: Any, **kwargs: Any) -> None:
        """Creates the repository. See [`~transformers.Trainer.init_hf_repo`].

        Raises:
            UploadError: if the Hub refuses, or cannot be reached.
        """
        with explaining_upload(self):
            super().init_hf_repo(*args, **kwargs)


def validate_card(path: Path) -> None:
    """Asks the Hub whether it accepts the metadata of a card.

    Raises:
        ValueError: with the Hub's reasons, if it does not.
    """
    # Older releases of huggingface_hub ask huggingface.co, whatever HF_ENDPOINT says, so that their way is not ours.
    body = {"repoType": "model", "content": str(ModelCard.load(path))}
    url = f"{constants.ENDPOINT}/api/validate-yaml"
    response = get_session().post(url, json=body, headers={"Accept": "text/plain"})
    if response.status_code == 400:
        raise ValueError(f"the Hub does not accept the metadata in {path}: {response.text}")
    hf_raise_for_status(response)


@contextmanager
def explaining_upload(trainer: Any) -> Iterator[None]:
    """Turns what goes wrong on the way to the Hub into an [`UploadError`] with the commands to try again."""
    try:
        yield
    except UploadError:
        raise
    except UPLOAD_ERRORS as error:
        causes = list(_causes(error))
        codes = [cause.response.status_code for cause in causes if isinstance(cause, HfHubHTTPError)]
        hint = next((f" {HINTS[code]}" for code in codes if code in HINTS), "")
        reason = ": ".join(dict.fromkeys(" ".join(str(cause).split()) or type(cause).__name__ for cause in causes))
        folder = Path(trainer.args.output_dir)
        repo_id = trainer.hub_model_id or trainer.args.hub_model_id or folder.resolve().name
        raise UploadError(
            f"The upload to {repo_id!r} failed: {reason.rstrip('.')}.{hint} {_way_to_retry(repo_id, folder)}"
        ) from error


def _way_to_retry(repo_id: str, folder: Path) -> str:
    if not (folder.is_dir() and any(folder.iterdir())):
        return "Nothing was written yet: start the run again when that is mended, or without `push_to_hub`."
    excluded = ["--exclude", "_*", "--exclude", "checkpoint-*"]  # as Transformers does
    command = shlex.join(["hf", "upload", repo_id, str(folder), ".", *excluded])
    return (
        f"What the run wrote is untouched in {folder}. Upload it with `{command}`, or from Python again with "
        "`trainer.push_to_hub(...)` and the same arguments."
    )


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """The error, and what it came of, down to the answer of the Hub."""
    while error is not None:
        yield error
        error = None if isinstance(error, HTTPError) else error.__cause__
