"""Prompt files: every format, every way in which one can be broken."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml

from sgworkbench.errors import WorkbenchError
from sgworkbench.prompting import PromptSet, contrast_set, load_prompts

ROWS: list[dict[str, Any]] = [
    {"id": "a1", "text": 'He said "no", twice', "label": "harmful", "category": "x", "pair": "p", "split": "train"},
    {
        "id": "a2",
        "text": "Zwei\nZeilen, 🙂 und e\u0301",
        "label": "harmless",
        "category": "x",
        "pair": "p",
        "split": "test",
    },
    {"id": "a3", "text": " spaces kept ", "label": "unlabelled", "category": "", "pair": "", "split": "unsplit"},
]


def write(folder: Path, name: str, content: str | bytes) -> Path:
    file = folder / name
    file.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)
    return file


def written(folder: Path, suffix: str) -> Path:
    """The rows in one format, written by other libraries' writers."""
    frame, file = pd.DataFrame(ROWS), folder / f"prompts{suffix}"
    if suffix in (".csv", ".tsv"):
        frame.to_csv(file, index=False, sep="," if suffix == ".csv" else "\t")
    elif suffix == ".parquet":
        frame.to_parquet(file)
    elif suffix in (".jsonl", ".ndjson"):
        frame.to_json(file, orient="records", lines=True, force_ascii=suffix == ".ndjson")
    elif suffix == ".json":
        file.write_text(json.dumps({"source": "mine", "prompts": ROWS}))
    else:
        file.write_text(yaml.safe_dump(ROWS, allow_unicode=True), encoding="utf-8")
    return file


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".json", ".jsonl", ".ndjson", ".parquet", ".yaml", ".yml"])
def test_every_format_gives_the_same_prompts(suffix: str, tmp_path: Path) -> None:
    prompts = load_prompts(written(tmp_path, suffix))
    expected = PromptSet.from_texts(["x"]).prompts[0]
    assert [vars(p) for p in prompts] == [{**vars(expected), **row} for row in ROWS]
    assert prompts.name == "prompts"
    assert load_prompts(str(written(tmp_path, suffix))).content_hash == prompts.content_hash


def test_a_text_file_has_one_prompt_a_line(tmp_path: Path) -> None:
    file = write(tmp_path, "p.txt", "\ufeffBake bread\r\n\r\n  \r\nline\u2028separator\u0085here\r\nlast")
    prompts = load_prompts(file)
    assert prompts.texts == ["Bake bread", "line\u2028separator\u0085here", "last"]
    assert [p.id for p in prompts] == ["0", "1", "2"]


def test_capital_suffixes_and_home_folders_are_understood(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, "P.TXT", "Bake bread")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert load_prompts("~/P.TXT").texts == ["Bake bread"]


@pytest.mark.parametrize("suffix", [".jsonl", ".ndjson"])
def test_line_separators_inside_json_strings_do_not_end_the_line(suffix: str, tmp_path: Path) -> None:
    texts = ["one\u2028two\u2029three", "four\u0085five\x0bsix"]
    lines = "\n".join(json.dumps({"text": text}, ensure_ascii=False) for text in texts)
    assert load_prompts(write(tmp_path, f"p{suffix}", lines)).texts == texts


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("p.csv", "text,label\r\nBake bread,harmless\r\n"),
        ("p.tsv", "text\tlabel\r\nBake bread\tharmless\r\n"),
        ("p.json", '[\r\n{"text": "Bake bread",\r\n "label": "harmless"}]\r\n'),
        ("p.jsonl", '{"text": "Bake bread", "label": "harmless"}\r\n\r\n'),
        ("p.yaml", "- text: Bake bread\r\n  label: harmless\r\n"),
    ],
)
def test_byte_order_mark_and_windows_line_ends_do_not_matter(name: str, content: str, tmp_path: Path) -> None:
    hashes = set()
    for version in (content, "\ufeff" + content, content.replace("\r\n", "\n")):
        prompts = load_prompts(write(tmp_path, name, version))
        assert [(p.text, p.label) for p in prompts] == [("Bake bread", "harmless")]
        hashes.add(prompts.content_hash)
    assert len(hashes) == 1


@pytest.mark.parametrize(
    "field", ["text", "prompt", "instruction", "goal", "question", "forbidden_prompt", "behavior", "Behavior", "query"]
)
def test_the_usual_names_of_the_text_are_known(field: str, tmp_path: Path) -> None:
    file = write(tmp_path, "p.csv", f"number,{field}\n1,Bake bread\n")
    assert load_prompts(file).texts == ["Bake bread"]


def test_fields_are_mapped_to_ours(tmp_path: Path) -> None:
    file = write(tmp_path, "p.csv", "nr,Anfrage,Thema,text\n7,Bake bread,food,other\n8,Bake cake,food,other\n")
    prompts = load_prompts(
        file, fields={"text": "Anfrage", "category": "Thema", "id": "nr"}, label="harmless", name="n"
    )
    assert [(p.id, p.text, p.category, p.label) for p in prompts] == [
        ("7", "Bake bread", "food", "harmless"),
        ("8", "Bake cake", "food", "harmless"),
    ]
    assert prompts.name == "n"


def test_missing_values_are_empty_in_every_disguise(tmp_path: Path) -> None:
    frame = pd.DataFrame({"text": ["a", "b", "c"], "category": ["x", None, float("nan")], "pair": [None, "p", pd.NA]})
    frame.to_parquet(tmp_path / "p.parquet")
    assert [(p.category, p.pair) for p in load_prompts(tmp_path / "p.parquet")] == [("x", ""), ("", "p"), ("", "")]
    file = write(tmp_path, "p.jsonl", '{"text": "a", "label": null}\n{"text": "b", "label": " "}\n')
    assert [p.label for p in load_prompts(file)] == ["unlabelled", "unlabelled"]


def test_json_may_be_a_list_of_strings_or_of_objects_or_hold_one_list(tmp_path: Path) -> None:
    for content in ('["a", "b"]', '{"n": 2, "data": ["a", "b"]}', '[{"prompt": "a"}, {"prompt": "b"}]'):
        assert load_prompts(write(tmp_path, "p.json", content)).texts == ["a", "b"]
    assert load_prompts(write(tmp_path, "p.yaml", "- a\n- b\n")).texts == ["a", "b"]
    assert load_prompts(write(tmp_path, "p.jsonl", '"a"\n"b"\n')).texts == ["a", "b"]


def test_a_label_column_in_other_words_is_left_alone(tmp_path: Path) -> None:
    file = write(tmp_path, "p.csv", "text,label,split\na,1,dev\nb,0,dev\n")
    assert [(p.label, p.split) for p in load_prompts(file)] == [("unlabelled", "unsplit")] * 2


def test_a_misspelt_label_among_ours_is_an_error(tmp_path: Path) -> None:
    file = write(tmp_path, "p.csv", "text,label\na,harmful\nb,harmfull\nc,harmless\n")
    with pytest.raises(WorkbenchError, match=r"line 3: label must be one of harmful, .*; found 'harmfull'"):
        load_prompts(file)


def test_a_label_column_that_was_asked_for_must_be_in_our_words(tmp_path: Path) -> None:
    file = write(tmp_path, "p.csv", "text,class\na,1\n")
    with pytest.raises(WorkbenchError, match=r"line 2: label must be one of .*; found '1'"):
        load_prompts(file, fields={"label": "class"})


BROKEN: list[tuple[str, str | bytes, str]] = [
    ("p.jsonl", '{"text": "a"}\n{"text": "b"\n{"text": "c"}\n', r"p\.jsonl', line 2: broken JSON \(.+\)\."),
    ("p.jsonl", '{"text": "a"}\n[1]\n', r"line 2: expected an object or a string, found list"),
    ("p.jsonl", "[" * 100_000 + "\n", r"line 1: broken JSON \(.+\)\."),
    ("p.jsonl", '{"text": 1' + "0" * 5000 + "}\n", r"line 1: broken JSON \(.*4300.*\)\."),
    ("p.jsonl", '{"text": "\\ud83d"}\n', r"half a surrogate pair"),
    ("p.json", '[\n{"text": "a"},\n{"text": }\n]', r"p\.json', line 3: broken JSON \(.+\)\."),
    ("p.json", '{"text": "a"}', r"expected a list of prompts .*found dict"),
    ("p.json", "3", r"expected a list of prompts .*found int"),
    ("p.json", "[[1]]", r"item 1: expected an object or a string, found list"),
    ("p.json", '[{"text": ["a"]}]', r"item 1: field 'text' must be text, found list"),
    ("p.yaml", "- text: 'open\n- b", r"p\.yaml', line \d: broken YAML \(.+\)\."),
    ("p.yaml", "- a\n- \x01\n", r"broken YAML \(.+\)\."),
    ("p.yaml", "- text: 2024-13-45\n", r"broken YAML \(month must be in 1\.\.12\)\."),
    ("p.yaml", "- !!python/object/apply:os.getcwd []\n", r"line 1: broken YAML"),
    ("p.yaml", "- text: yes\n", r"item 1: field 'text' must be text, found bool"),
    ("p.yaml", "", r"expected a list of prompts .*found nothing"),
    ("p.csv", 'text,label\n"a,harmful\n', r"broken CSV \(.+\)\."),
    ("p.csv", "text,label\na,harmful,more\n", r"line 2: more cells than the header has columns; quote the text"),
    ("p.csv", "id;text\n1;a\n", r"line 2: expected a text field \(text, prompt, .*\), found id;text; name it with"),
    ("p.csv", "label,text\nharmful\n", r"line 2: field 'text' must be text, found NoneType"),
    ("p.csv", "text\n \n", r"line 2: field 'text' is empty"),
    ("p.csv", "text,id\na,1\nb,1\n", r"line 3: the id '1' occurs twice; ids must differ"),
    ("p.csv", "text\n", r"p\.csv' holds no prompts; at least one is needed"),
    ("p.csv", "", r"holds no prompts"),
    ("p.txt", "\n \n", r"holds no prompts"),
    ("p.jsonl", "", r"holds no prompts"),
    ("p.json", "[]", r"holds no prompts"),
    ("p.txt", b"good\nb\xe4d\n", r"p\.txt', line 2: not valid UTF-8; save the file as UTF-8"),
    ("p.csv", "text\na\n".encode("utf-16"), r"line 1: not valid UTF-8"),
    ("p.parquet", b"PAR1 not really", r"p\.parquet' is not a readable parquet file"),
    ("p.docx", "x", r"Unknown prompt file type '\.docx'\..* Known: \.csv, "),
    ("prompts", "x", r"Unknown prompt file type 'prompts'"),
]


@pytest.mark.parametrize(("name", "content", "message"), BROKEN)
def test_a_broken_file_is_one_sentence(name: str, content: str | bytes, message: str, tmp_path: Path) -> None:
    with pytest.raises(WorkbenchError, match=message) as caught:
        load_prompts(write(tmp_path, name, content))
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500 + len(str(tmp_path))


def test_folders_and_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(WorkbenchError, match="Expected a prompt file, found the folder"):
        load_prompts(tmp_path)
    with pytest.raises(WorkbenchError, match=r"nothere\.csv' does not exist; give a path, builtin:contrast or hub:"):
        load_prompts(tmp_path / "nothere.csv")


def test_bad_field_maps_are_named(tmp_path: Path) -> None:
    file = write(tmp_path, "p.csv", "text,topic\na,food\n")
    with pytest.raises(WorkbenchError, match=r"Unknown prompt field 'topc'"):
        load_prompts(file, fields={"topc": "topic"})
    with pytest.raises(WorkbenchError, match="line 2: no field 'theme' for 'category'; it has text, topic"):
        load_prompts(file, fields={"category": "theme"})
    with pytest.raises(WorkbenchError, match=r"line 2: expected a text field \(ask\), found text, topic"):
        load_prompts(file, fields={"text": "ask"})


@pytest.mark.parametrize(
    ("path", "n", "label"),
    [
        ("builtin:contrast", 400, None),
        ("builtin:contrast/harmful", 200, "harmful"),
        ("builtin:contrast/harmless/test", 60, "harmless"),
        ("builtin:contrast/train/harmful", 100, "harmful"),
    ],
)
def test_builtin_paths(path: str, n: int, label: str | None) -> None:
    prompts = load_prompts(path)
    assert len(prompts) == n
    assert label is None or {p.label for p in prompts} == {label}
    assert load_prompts("builtin:contrast").content_hash == contrast_set().content_hash


def test_builtin_paths_take_a_label_and_a_name() -> None:
    prompts = load_prompts("builtin:contrast/test", label="unlabelled", name="mine")
    assert prompts.name == "mine"
    assert {p.label for p in prompts} == {"unlabelled"}


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("builtin:contrst", r"Unknown built-in prompt set 'contrst'\. Did you mean 'contrast'\?"),
        ("builtin:contrast/harmles", r"Unknown part of the contrast set 'harmles'\. Did you mean 'harmless'\?"),
        ("builtin:contrast/harmful/harmless", "is marked harmless"),
    ],
)
def test_bad_builtin_paths(path: str, message: str) -> None:
    with pytest.raises(WorkbenchError, match=message):
        load_prompts(path)


def test_the_hub_needs_the_datasets_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(WorkbenchError, match=r"needs the datasets package: pip install 'sgworkbench\[hub\]'\."):
        load_prompts("hub:someone/something")


def test_the_hub_is_read_by_name_and_split(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load_dataset(name: str, *, split: str) -> list[dict[str, str]]:
        asked.append((name, split))
        if name == "gone/gone":
            raise ConnectionError("no\n  network")
        return [{"goal": "Bake bread"}, {"goal": "Bake cake"}]

    module = types.ModuleType("datasets")
    module.load_dataset = load_dataset  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", module)
    assert load_prompts("hub:org/name").texts == ["Bake bread", "Bake cake"]
    assert load_prompts("hub:org/name:test", label="harmless").harmless.texts == ["Bake bread", "Bake cake"]
    assert asked == [("org/name", "train"), ("org/name", "test")]
    with pytest.raises(WorkbenchError, match="The hub data set 'gone/gone' cannot be loaded: no network"):
        load_prompts("hub:gone/gone")
