"""Facts about keyword files: where they are found, what is in them, and how faults are told."""

from pathlib import Path

import pytest
import tomli_w

from wsi_anomaly.errors import KeywordError
from wsi_anomaly.prompts.keywords import Keyword, is_path, keyword_list_names, load_keywords

HEAD = 'organ = "liver"\nsource = "a book"\nnote = "a note"\n'


def written(tmp_path: Path, text: str, *, head: str = HEAD) -> Path:
    """A keyword file; with the usual head, `text` starts in its fourth line."""
    path = tmp_path / "liver.toml"
    path.write_text(head + text, encoding="utf-8")
    return path


def fault(tmp_path: Path, text: str, *, head: str = HEAD) -> str:
    """What is said of a faulty file."""
    with pytest.raises(KeywordError) as caught:
        load_keywords(written(tmp_path, text, head=head))
    return str(caught.value)


def entries(*texts: str) -> str:
    """Keywords one a line."""
    return "".join(f'  {{text = "{text}", category = "cell"}},\n' for text in texts)


def test_a_file_is_read_as_it_stands(tmp_path: Path) -> None:
    """Order, case and odd characters are kept; the second list may be missing."""
    keywords = load_keywords(written(tmp_path, f"normal = [\n{entries('Kupffer cells', 'HER2+ (a), b', 'ß')}]\n"))
    assert keywords.texts(include_abnormal=True) == ("Kupffer cells", "HER2+ (a), b", "ß")
    assert keywords.normal[0] == Keyword(text="Kupffer cells", category="cell")
    assert (keywords.organ, keywords.source, keywords.note) == ("liver", "a book", "a note")


def test_abnormal_keywords_come_only_when_asked_for(tmp_path: Path) -> None:
    """And behind the normal ones, whose numbers so stay the same."""
    keywords = load_keywords(written(tmp_path, f"abnormal = [{entries('b')}]\nnormal = [{entries('c', 'a')}]"))
    assert keywords.texts(include_abnormal=False) == ("c", "a")
    assert keywords.texts(include_abnormal=True) == ("c", "a", "b")
    assert [keyword.text for keyword in keywords.chosen(include_abnormal=True)] == ["c", "a", "b"]


@pytest.mark.parametrize("name", keyword_list_names())
def test_a_list_that_another_program_wrote_is_the_same_list(name: str, tmp_path: Path) -> None:
    """A model folder holds a copy without our layout."""
    keywords = load_keywords(name)
    path = tmp_path / "keywords.toml"
    path.write_text(tomli_w.dumps(keywords.model_dump(mode="json")), encoding="utf-8")
    assert load_keywords(path) == keywords


def test_a_byte_order_mark_and_line_ends_of_windows_do_no_harm(tmp_path: Path) -> None:
    """Editors add them unasked; lines are counted all the same."""
    path = tmp_path / "liver.toml"
    text = HEAD + f"normal = [\n{entries('a', 'b')}]\n"
    path.write_bytes(b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode())
    assert load_keywords(path).texts(include_abnormal=False) == ("a", "b")
    path.write_bytes(b"\xef\xbb\xbf" + text.replace('"b"', '"A"').replace("\n", "\r\n").encode())
    with pytest.raises(KeywordError, match=r"line 6: 'A' stands there twice \(first in line 5\)"):
        load_keywords(path)


@pytest.mark.parametrize(("second", "head"), [("CAPSULE", "CAPSULE"), ("capsule", "capsule")])
def test_a_keyword_that_stands_there_twice_is_refused_with_both_lines(second: str, head: str, tmp_path: Path) -> None:
    """Letter case makes no difference."""
    message = fault(tmp_path, f"normal = [\n{entries('capsule', 'cell', second)}]\n")
    assert message == f"liver.toml, line 7: '{head}' stands there twice (first in line 5). Remove one."


def test_the_width_of_blanks_makes_no_difference(tmp_path: Path) -> None:
    """Two blanks are hard to see."""
    assert "line 6: 'germinal  center' stands there twice" in fault(
        tmp_path, f"normal = [\n{entries('germinal center', 'germinal  center')}]"
    )


def test_a_keyword_on_both_sides_is_refused_with_both_lines(tmp_path: Path) -> None:
    """What normal tissue shows says nothing of the abnormal."""
    message = fault(tmp_path, f"normal = [\n{entries('Capsule')}]\nabnormal = [\n{entries('a', 'capsule')}]\n")
    assert message == (
        "liver.toml, line 9: 'capsule' is in both lists, abnormal and normal (line 5). Keep it on one side."
    )


@pytest.mark.parametrize("text", ["", " ", "\\t"])
def test_an_empty_keyword_is_refused_with_its_line(text: str, tmp_path: Path) -> None:
    """One of blanks is empty too."""
    message = fault(tmp_path, f"normal = [\n{entries('a', text)}]\n")
    assert message == "liver.toml, line 6: a keyword is empty. Write its text or remove the entry."


@pytest.mark.parametrize("text", [" a", "a ", "a\\n", "\\u00a0a", "a\\nb"])
def test_a_padded_or_broken_keyword_is_refused_with_its_line(text: str, tmp_path: Path) -> None:
    """Nobody sees a blank at the end."""
    (message,) = fault(tmp_path, f"normal = [\n{entries(text)}]\n").splitlines()
    assert message.startswith("liver.toml, line 5: '")
    assert message.endswith("' begins or ends with a blank, or holds a line break. Remove it.")


def test_all_faults_are_told_at_once_in_the_order_of_their_lines(tmp_path: Path) -> None:
    """Each with its line, also where strings, comments and several lines could mislead."""
    text = '''
normal = [  # "not a keyword
  {text = "a \\"b\\" # c", category = "cel"},
  {text = """capsule""", category = 'cell'}, {text = 'no "category"'},
  "plain",
  {txt = "x", category = "cell"},
  {text = 3, category = "cell"},
  {text = "CAPSULE", category = "stroma", extra = 1},
]
notes = "x"
[[abnormal]]
"text" = "capsule"
category = "stroma"
'''
    assert fault(tmp_path, text, head='organ = ""\nnote = """\n"a\n"""\n').splitlines() == [
        "liver.toml: 'source' is missing. Add it.",
        "liver.toml, line 1: 'organ' is empty. Fill it.",
        "liver.toml, line 7: category 'cel' is not known (did you mean 'cell'?).",
        "liver.toml, line 8: 'category' is missing. Add it.",
        """liver.toml, line 9: 'plain' is no entry. Write it as {text = "...", category = "..."}.""",
        "liver.toml, line 10: 'text' is missing. Add it.",
        "liver.toml, line 10: unknown key 'txt' (did you mean 'text'?). Correct or remove it.",
        "liver.toml, line 11: 'text' = 3: input should be a valid string.",
        "liver.toml, line 12: 'CAPSULE' stands there twice (first in line 8). Remove one.",
        "liver.toml, line 12: unknown key 'extra' (did you mean 'text'?). Correct or remove it.",
        "liver.toml, line 14: unknown key 'notes' (did you mean 'note'?). Correct or remove it.",
        "liver.toml, line 16: 'capsule' is in both lists, abnormal and normal (line 8). Keep it on one side.",
    ]


def test_an_entry_without_a_string_is_told_by_its_number(tmp_path: Path) -> None:
    """There is no line to give."""
    assert "liver.toml, entry 2 of 'normal': 'text' is missing." in fault(tmp_path, f"normal = [{entries('a')} {{}}]")


@pytest.mark.parametrize("text", ["normal = []", f"normal = []\nabnormal = [{entries('a')}]"])
def test_an_empty_list_is_refused(text: str, tmp_path: Path) -> None:
    """Abnormal keywords do not make up for it."""
    assert fault(tmp_path, text) == "liver.toml: 'normal' is empty. Fill it."


@pytest.mark.parametrize("text", ["", "abnormal = []"])
def test_a_missing_list_is_refused(text: str, tmp_path: Path) -> None:
    """The message names it."""
    assert fault(tmp_path, text) == "liver.toml: 'normal' is missing. Add it."


@pytest.mark.parametrize("text", ["normal = 3", 'normal = "capsule"', "[normal]\na = 1"])
def test_a_list_of_another_kind_is_refused(text: str, tmp_path: Path) -> None:
    """Whatever stands there instead."""
    assert "'normal' = " in fault(tmp_path, text)


@pytest.mark.parametrize("text", ["normal = [", "capsule\nsinus\n", f"normal = [{entries('a')}"])
def test_a_file_that_is_not_toml_is_refused(text: str, tmp_path: Path) -> None:
    """With the place where it ceases to be, and what to do."""
    message = fault(tmp_path, text)
    assert message.startswith("liver.toml: is not valid TOML: ")
    assert "(at " in message
    assert "Mend it there" in message


def test_a_key_given_twice_is_refused(tmp_path: Path) -> None:
    """TOML does not allow it."""
    assert "line 4" in fault(tmp_path, 'organ = "b"\n')


def test_text_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    """As old spreadsheets save it."""
    path = tmp_path / "liver.toml"
    path.write_bytes(HEAD.encode() + 'x = "Lieberkühn"'.encode("latin-1"))
    with pytest.raises(KeywordError, match=r"liver\.toml: is not UTF-8 text\. Save it as UTF-8"):
        load_keywords(path)


def test_a_missing_file_is_refused_with_the_lists_there_are(tmp_path: Path) -> None:
    """The message has the whole path."""
    with pytest.raises(
        KeywordError, match=r"/none\.toml: there is no such keyword file.* breast, colon, kidney, lymph"
    ):
        load_keywords(tmp_path / "none.toml")


def test_a_folder_is_refused(tmp_path: Path) -> None:
    """The message says what to give."""
    with pytest.raises(KeywordError, match=r"cannot be read .* Give the path of a \.toml file"):
        load_keywords(tmp_path)


@pytest.mark.parametrize("name", ["lymphnode", "lymph-node", "Lymph_node"])
def test_a_misspelt_list_names_the_nearest(name: str) -> None:
    """And says that a path will do."""
    with pytest.raises(KeywordError, match=rf"no keyword list '{name}' \(did you mean 'lymph_node'\?\).* path of a"):
        load_keywords(name)


def test_the_templates_are_no_keyword_list() -> None:
    """Though they lie in the same folder."""
    assert "templates" not in keyword_list_names()
    with pytest.raises(KeywordError, match="no keyword list 'templates'"):
        load_keywords("templates")


@pytest.mark.parametrize("text", ["liver.toml", "lists/liver", "./liver", "/liver.toml"])
def test_what_ends_in_toml_or_has_a_separator_is_a_path(text: str) -> None:
    """A bare name is that of a list."""
    assert is_path(text)
    assert not is_path("liver")
