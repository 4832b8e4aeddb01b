"""Facts about the data that comes with the package: every file of it is valid, and what it must hold is there."""

import tomllib
from pathlib import Path

import pytest

import wsi_anomaly
from wsi_anomaly.prompts.keywords import KeywordList, keyword_list_names, load_keywords, load_templates

PACKAGE = Path(wsi_anomaly.__file__).parent
OWN_LISTS = tuple(sorted(set(keyword_list_names()) - {"lymph_node"}))
DISEASE = (
    "carcinoma",
    "tumor",
    "dysplas",
    "metasta",
    "necro",
    "adenoma",
    "malignan",
    "atypical",
    "granuloma",
    "inflam",
)
"""Parts of words that have no place among what normal tissue shows."""


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.toml")), ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_every_toml_file_is_valid_and_of_a_known_kind(path: Path) -> None:
    """Pipelines, keywords, the same two of models that ship, and what may be said of made-up structures."""
    of_model = path.parent.parent == PACKAGE / "models" and path.name in {"pipeline.toml", "keywords.toml"}
    known = path.parent in {PACKAGE / "pipelines", PACKAGE / "keywords"}
    assert known or of_model or path.name == "structures.toml"
    assert tomllib.loads(path.read_text(encoding="utf-8"))


def test_four_organs_come_with_the_package() -> None:
    """At least."""
    assert {"breast", "colon", "kidney", "lymph_node"} <= set(keyword_list_names())


@pytest.mark.parametrize("name", keyword_list_names())
def test_every_keyword_list_says_whence_it_comes(name: str) -> None:
    """Organ, source and note, more keywords than a prompt has, and some for the other side."""
    keywords = load_keywords(name)
    assert keywords.organ == name.replace("_", " ")
    assert len(keywords.source) > 40
    assert len(keywords.note) > 40
    assert len(keywords.normal) >= 40
    assert len(keywords.abnormal) >= 15


@pytest.mark.parametrize("name", OWN_LISTS)
def test_our_own_lists_are_brief(name: str) -> None:
    """At most eight words a phrase, and no longer than a pathologist can read through."""
    keywords = load_keywords(name)
    assert max(len(text.split()) for text in keywords.texts(include_abnormal=True)) <= 8
    assert len(keywords.normal) <= 70
    assert len(keywords.abnormal) <= 40


@pytest.mark.parametrize("name", keyword_list_names())
def test_no_keyword_of_normal_tissue_names_a_disease(name: str) -> None:
    """Nor are there blanks within a phrase that nobody sees."""
    for text in load_keywords(name).texts(include_abnormal=False):
        assert not [part for part in DISEASE if part in text.lower()]
        assert text == " ".join(text.split())


@pytest.mark.parametrize("name", OWN_LISTS)
def test_sinuses_are_of_lymph_nodes_only(name: str) -> None:
    """And every other category is there."""
    keywords = load_keywords(name)
    assert {keyword.category for keyword in keywords.normal} == {"cell", "architecture", "vessel", "stroma", "cytology"}


@pytest.fixture(scope="module")
def lymph_node() -> KeywordList:
    """The list of AnoPILaD."""
    return load_keywords("lymph_node")


def test_the_lymph_node_has_the_keywords_of_the_paper_in_its_order(lymph_node: KeywordList) -> None:
    """74 of them, as spelled there, with commas."""
    texts = lymph_node.texts(include_abnormal=False)
    assert len(texts) == 74
    assert [texts[i - 1] for i in (1, 5, 20, 21, 46, 50, 61, 74)] == [
        "secondary lymphoid follicles",
        "large and small cleaved follicular center cells scant cytoplasm and inconspicuous nucleoli",
        "plasma cells",
        "germinal center",
        "lymphocytes",
        "faintly granular cytoplasm, large pale nuclei",
        "medullary cords, sinuses and vessel",
        "memory B cells",
    ]


def test_the_lymph_node_has_the_metastasis_keywords_of_the_released_code_once_each(lymph_node: KeywordList) -> None:
    """49 stand there, of which one three times but for letter case."""
    texts = [keyword.text for keyword in lymph_node.abnormal]
    assert len(texts) == 47
    assert (texts[0], texts[-1]) == ("sinus involvement", "irregularly folded, distorted, and small tubules")
    assert [text for text in texts if text.lower() == "microacinar structures"] == ["Microacinar structures"]


def test_the_lymph_node_uses_every_category(lymph_node: KeywordList) -> None:
    """Sinuses included."""
    categories = {keyword.category for keyword in lymph_node.normal}
    assert categories == {"cell", "architecture", "vessel", "stroma", "sinus", "cytology"}


def test_the_licence_of_what_others_wrote_stands_in_the_file() -> None:
    """Its notice must go with every copy."""
    for name in ("lymph_node", "templates"):
        text = (PACKAGE / "keywords" / f"{name}.toml").read_text(encoding="utf-8")
        assert "Copyright (c) 2025 Taurusmumu" in text
        assert "shall be included in all" in text


def test_every_template_has_one_place_for_a_keyword() -> None:
    """22 different ones."""
    templates = load_templates()
    assert len(set(templates)) == len(templates) == 22
    assert {template.count("{}") for template in templates} == {1}
    assert "a histopathological photograph of {}." in templates
