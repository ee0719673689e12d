"""The table of methods: every row is complete, and an incomplete one fails a test."""

import ast
import json
from dataclasses import dataclass
from pathlib import Path

import pytest
from torch import Tensor

import hf_attentiondrop
from hf_attentiondrop import AttentionDropConfig, methods
from hf_attentiondrop.attention.call import Attend, AttentionCall, AttentionOutput
from hf_attentiondrop.hub import CardContent, build_card
from hf_attentiondrop.methods import LEARNED_METHODS, METHODS, PERTURBATIONS
from hf_attentiondrop.methods.card import MethodCard
from hf_attentiondrop.methods.learned import LearnedMethod
from hf_attentiondrop.methods.method import Method, Perturbation

from . import module_of


FOLDER = Path(methods.__file__).parent
DOCS = Path(__file__).parents[2] / "docs"
REFERENCES = (DOCS / "references.bib").read_text(encoding="utf-8")


def check_row(method: type[Method]) -> None:
    """Checks that a method has its row, export, card and docs.

    Raises:
        AssertionError: if something is missing.
    """
    is_learned = issubclass(method, LearnedMethod)
    name = method.method if is_learned else method.variant
    table = LEARNED_METHODS if is_learned else PERTURBATIONS
    assert table.get(name) is method, f"{method.__name__} has no row in methods/__init__.py."
    assert method.__name__ in hf_attentiondrop.__all__, f"{method.__name__} is not exported by the package."
    overview = DOCS / ("reweighting.md" if is_learned else "methods.md")
    assert f'`"{name}"`' in overview.read_text(), f"{overview.name} has no section on {name!r}."
    page = DOCS / "methods" / f"{name}.md"
    assert page.is_file() and f"(methods/{name}.md)" in overview.read_text(), f"docs/methods/{name}.md is missing."
    for example in module_of(method).EXAMPLES.values():
        for card in example.cards():
            missing = [field for field in ("name", "text", "formula", "citation") if not getattr(card, field)]
            assert not missing, f"The card of {method.__name__} has no {', '.join(missing)}."
            assert card.citation.startswith("@"), f"The citation of {method.__name__} is not BibTeX."
            assert card.citation in REFERENCES, (
                f"docs/references.bib has another citation of {method.__name__}, or none."
            )
            json.dumps(card.settings)
    if issubclass(method, Perturbation):
        assert method.scheduled in method.settings(), f"{method.__name__} has no setting {method.scheduled!r}."


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.__name__)
def test_every_row_is_complete(method: type[Method]) -> None:
    check_row(method)


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.__name__)
def test_the_card_shows_the_method(method: type[Method]) -> None:
    for example in module_of(method).EXAMPLES.values():
        cards = example.cards()
        text = build_card(CardContent("model", "BertModel", "trained from scratch", methods=cards)).content
        for card in cards:
            assert all(part in text for part in (card.name, card.text, card.formula, card.citation))


def test_every_class_in_the_folder_has_a_row() -> None:
    rows = {method.__name__ for method in METHODS}
    for path in FOLDER.glob("*.py"):
        for node in ast.parse(path.read_text()).body:
            bases = [base.id for base in getattr(node, "bases", ()) if isinstance(base, ast.Name)]
            if isinstance(node, ast.ClassDef) and {"Perturbation", "LearnedMethod"} & set(bases):
                assert node.name in rows, f"{node.name} in methods/{path.name} has no row in methods/__init__.py."


class TestAToyMethod:
    """Each test adds a method with one part missing."""

    @dataclass(frozen=True, repr=False)
    class Halving(Perturbation):
        variant = "halving"
        scheduled = "p"

        p: float = 0.5

        def attend(self, call: AttentionCall, attend: Attend, p: Tensor, /) -> AttentionOutput:
            output, weights = attend(call)
            return output * p.to(output), weights

        def cards(self) -> tuple[MethodCard, ...]:
            return (MethodCard("Halving", "Halves the output.", "O' = p · O", None, "@misc{halving}"),)

    def test_without_a_card_it_cannot_be_built(self) -> None:
        @dataclass(frozen=True, repr=False)
        class Cardless(Perturbation):
            variant = "cardless"
            scheduled = "p"
            attend = self.Halving.attend

        with pytest.raises(TypeError, match="abstract method '?cards"):
            Cardless()

    def test_without_a_row_its_name_is_unknown(self) -> None:
        with pytest.raises(ValueError, match="`variant` must be one of .*'hard'.*got 'halving'"):
            AttentionDropConfig(variant="halving")
        with pytest.raises(AssertionError, match="Halving has no row"):
            check_row(self.Halving)

    def test_without_a_reference_the_tests_stop(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(PERTURBATIONS, "halving", self.Halving)
        with pytest.raises(AssertionError, match="Halving has no tests/methods/test_halving.py with .*reference"):
            module_of(self.Halving)
        with pytest.raises(AssertionError, match="Halving is not exported"):
            check_row(self.Halving)

    def test_without_docs_the_tests_stop(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(PERTURBATIONS, "halving", self.Halving)
        monkeypatch.setattr(hf_attentiondrop, "__all__", [*hf_attentiondrop.__all__, "Halving"])
        with pytest.raises(AssertionError, match="methods.md has no section on 'halving'"):
            check_row(self.Halving)
