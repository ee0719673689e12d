"""English text that is everywhere: the language reference that ships inside CPython, in `pydoc_data.topics`."""

import re
import textwrap
from pydoc_data.topics import topics

from datasets import ClassLabel, Dataset, Features, Value


DOCUMENTATION = "Python's own documentation"
# Passages are compared by the runs of so many words that they hold.
RUN_LENGTH = 5
# What a topic needs to be a class: so many passages, each long enough to tell where it comes from.
MIN_PASSAGES = 40
MIN_WORDS = 12


def documentation_text() -> Dataset:
    """All of the documentation: a passage per row, in the column `text`."""
    return Dataset.from_dict({"text": [passage for passages in documentation().values() for passage in passages]})


def documentation_topics() -> Dataset:
    """The larger topics: a passage per row, in the columns `text` and `label`, its topic."""
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
    """The passages of each topic, none of them twice.

    Topics quote each other, some as a whole, and passages about similar things are often worded alike. So of passages
    that share most of their wording one is kept, that of the largest topic, and topics of which little is left
    are dropped. Split afterwards, nothing held out is to be found in what a model was trained on.

    Returns:
        `dict[str, list[str]]`: topic to its passages, which are what stands between empty lines.
    """
    kept: dict[str, list[str]] = {}
    seen: set[tuple[str, ...]] = set()
    for topic, text in sorted(topics.items(), key=lambda item: (-len(item[1]), item[0])):
        passages = [textwrap.dedent(passage) for passage in re.split(r"\n\s*\n", text.strip("\n"))]
        new = []
        # The longest first, so that a passage within another is the one that goes.
        for passage in sorted(passages, key=len, reverse=True):
            runs = word_runs(passage)
            if len(runs & seen) < len(runs) / 2:
                new.append(passage)
            seen |= runs
        if len(new) > len(passages) / 2:
            kept[topic] = new
    return kept


def word_runs(passage: str) -> set[tuple[str, ...]]:
    """All runs of [`RUN_LENGTH`] words of a passage, without regard to case and punctuation; of a shorter one, it."""
    words = _words(passage)
    return {tuple(words[start : start + RUN_LENGTH]) for start in range(max(1, len(words) - RUN_LENGTH + 1))}


def _words(passage: str) -> list[str]:
    return re.findall(r"\w+", passage.lower())
