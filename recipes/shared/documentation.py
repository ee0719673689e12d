"""English text that needs no download: the language reference inside CPython, in `pydoc_data.topics`."""

import re
import textwrap
from pydoc_data.topics import topics

from datasets import ClassLabel, Dataset, Features, Value


DOCUMENTATION = "Python's own documentation"
# Passages are compared by their word n-grams.
NGRAM_LENGTH = 5
# A topic is a class if it has enough passages that are long enough to be recognized.
MIN_PASSAGES = 40
MIN_WORDS = 12


def documentation_text() -> Dataset:
    """The whole documentation: one passage per row, in the column `text`."""
    return Dataset.from_dict({"text": [passage for passages in documentation().values() for passage in passages]})


def documentation_topics() -> Dataset:
    """The larger topics: one passage per row, with its topic, in the columns `text` and `label`."""
    long = {
        topic: [passage for passage in passages if len(_words(passage)) >= MIN_WORDS]
        for topic, passages in documentation().items()
    }
    large = {topic: passages for topic, passages in sorted(long.items()) if len(passages) >= MIN_PASSAGES}
    rows = [(passage, topic) for topic, passages in large.items() for passage in passages]
    texts, labels = zip(*rows, strict=True)
    features = Features({"text": Value("string"), "label": ClassLabel(names=list(large))})
    return Dataset.from_dict({"text": list(texts), "label": list(labels)}, features=features)


def documentation() -> dict[str, list[str]]:
    """The passages of each topic, without near-duplicates.

    Topics quote each other, some entirely, and passages about similar subjects often share their wording. Of passages
    that share most n-grams only the one in the largest topic is kept, and topics that lose most passages are dropped.
    So a split of the result has no held-out text in the training data.

    Returns:
        `dict[str, list[str]]`: topic to its passages, which empty lines separate.
    """
    kept: dict[str, list[str]] = {}
    seen: set[tuple[str, ...]] = set()
    for topic, text in sorted(topics.items(), key=lambda item: (-len(item[1]), item[0])):
        passages = [textwrap.dedent(passage) for passage in re.split(r"\n\s*\n", text.strip("\n"))]
        new = []
        # Longest first, so that a passage inside another one is the one that is dropped.
        for passage in sorted(passages, key=len, reverse=True):
            ngrams = word_ngrams(passage)
            if len(ngrams & seen) < len(ngrams) / 2:
                new.append(passage)
            seen |= ngrams
        if len(new) > len(passages) / 2:
            kept[topic] = new
    return kept


def word_ngrams(passage: str) -> set[tuple[str, ...]]:
    """The n-grams of [`NGRAM_LENGTH`] words of a passage, without case and punctuation; a shorter one is an n-gram."""
    words = _words(passage)
    return {tuple(words[start : start + NGRAM_LENGTH]) for start in range(max(1, len(words) - NGRAM_LENGTH + 1))}


def _words(passage: str) -> list[str]:
    return re.findall(r"\w+", passage.lower())
