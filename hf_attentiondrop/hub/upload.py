"""Uploading a Trainer's model with its card, and errors that say how to retry."""

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
from .run import count_samples, describe_run


# The error of the HTTP client, httpx or httpx2 depending on the release of huggingface_hub: the base of its own error.
HTTPError = HfHubHTTPError.__bases__[0]
# Errors of huggingface_hub: rejected requests and broken connections.
UPLOAD_ERRORS = (HTTPError, OSError, RuntimeError, ValueError)
HINTS = {
    401: "Log in with `hf auth login`, or pass a valid token as `hub_token`.",
    403: "Pass a token with write access, or another repository as `hub_model_id`.",
}


class UploadError(RuntimeError):
    """The upload failed. The local files are unchanged."""


if TYPE_CHECKING:
    # The class that the mixin is combined with; at runtime it must not be a base, so that any Trainer can follow it.
    from transformers import Trainer as TrainerBase
else:
    TrainerBase = object


class ModelCardMixin(TrainerBase):
    """Replaces the model card of a [`~transformers.Trainer`] class; list it before that class among the bases.

    Overrides `create_model_card`, and wraps `evaluate`, `push_to_hub` and `init_hf_repo`.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # The training arguments do not describe what was passed instead.
        self.has_own_optimizer = self.optimizer is not None or self.optimizer_cls_and_kwargs is not None
        self.has_own_scheduler = self.lr_scheduler is not None

    def evaluate(self, eval_dataset: Any = None, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Evaluates the model, and remembers for the card on how many samples. See
        [`~transformers.Trainer.evaluate`]."""
        metrics = super().evaluate(eval_dataset, *args, **kwargs)
        # Another prefix is that of other data, or of a part of a mapping.
        if kwargs.get("metric_key_prefix", args[1] if len(args) > 1 else "eval") == "eval":
            self.evaluated_samples = count_samples(self.eval_dataset if eval_dataset is None else eval_dataset)
        return metrics

    def create_model_card(self, **kwargs: Any) -> None:
        """Writes README.md to the output folder.

        Args:
            kwargs:
                See [`describe_run`]: the arguments of [`~transformers.Trainer.create_model_card`], `dataset_split`,
                `dataset_test_split`, `dataset_subset`, `benchmark_task`, `metrics` and `plots`.
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
        """Uploads the output folder: weights, config, tokenizer or processor, a new card, and all other files in it.

        The Hub validates the card first. See [`~transformers.Trainer.push_to_hub`]; `kwargs` are those of
        `create_model_card`.

        Raises:
            UploadError: if the Hub rejects the upload, or the connection breaks; with `blocking=False`, errors of the
                file upload are only in the returned future.
            TypeError: for `private` if the installed Transformers does not take it.
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
            UploadError: if the Hub rejects it, or is unreachable.
        """
        with explaining_upload(self):
            super().init_hf_repo(*args, **kwargs)


def validate_card(path: Path) -> None:
    """Validates the metadata of a card on the Hub.

    Raises:
        ValueError: with the Hub's reasons, if they are not valid.
    """
    # Not ModelCard.validate: in older releases of huggingface_hub it ignores HF_ENDPOINT.
    body = {"repoType": "model", "content": str(ModelCard.load(path))}
    url = f"{constants.ENDPOINT}/api/validate-yaml"
    response = get_session().post(url, json=body, headers={"Accept": "text/plain"})
    if response.status_code == 400:
        raise ValueError(f"the Hub does not accept the metadata in {path}: {response.text}")
    hf_raise_for_status(response)


@contextmanager
def explaining_upload(trainer: Any) -> Iterator[None]:
    """Converts errors of the upload into an [`UploadError`] with the command to retry."""
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
        return "Nothing was written yet: fix this and start the run again, or run it without `push_to_hub`."
    excluded = ["--exclude", "_*", "--exclude", "checkpoint-*"]  # as Transformers does
    command = shlex.join(["hf", "upload", repo_id, str(folder), ".", *excluded])
    return (
        f"The files of the run are unchanged in {folder}. Upload them with `{command}`, or from Python with "
        "`trainer.push_to_hub(...)` and the same arguments."
    )


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """The error and its causes, down to the response of the Hub."""
    while error is not None:
        yield error
        error = None if isinstance(error, HTTPError) else error.__cause__
