"""Response files: formats, encodings, and what is said about broken ones."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from sgworkbench.errors import WorkbenchError
from sgworkbench.evaluation import text_stream
from sgworkbench.evaluation.responses import (
    iter_responses,
    read_header,
    read_responses,
    write_published,
    write_responses,
)
from sgworkbench.evaluation.text_stream import decode_mixed, decoded_chunks

SAMPLE = Path(__file__).parents[2].parent / "shared" / "paper" / "responses_sample"


def records():
    return pd.DataFrame(
        {
            "prompt": ["How do bees fly?", "Say ü", "Nothing?"],
            "text": ["With wings.\nAnd effort.", 'ü, "quoted", 日本', ""],
            "arm": ["vanilla", "both", "both"],
            "alpha": [0.0, 0.5, float("nan")],
        }
    )


@pytest.mark.parametrize("ending", [".jsonl", ".csv", ".tsv", ".parquet"])
def test_round_trip(tmp_path, ending):
    path = tmp_path / f"records{ending}"
    write_responses(records(), path)
    back = read_responses(path)
    assert back["row"].tolist() == [0, 1, 2]
    assert back["sample"].tolist() == [0, 0, 0]
    for column in ("prompt", "text", "arm"):
        assert back[column].tolist() == records()[column].tolist()
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_jsonl_holds_null_for_nan_and_plain_numbers(tmp_path):
    path = tmp_path / "a.jsonl"
    write_responses(records().assign(count=np.arange(3, dtype=np.int64)), path)
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert lines[2]["alpha"] is None
    assert lines[1]["count"] == 1


def test_published_format(tmp_path):
    path = tmp_path / "run.json"
    header = {"model_name": "some/model", "temperature": 0.6}
    table = pd.DataFrame(
        {
            "row": [0, 0, 1],
            "sample": [0, 1, 0],
            "prompt": ["a?", "a?", "b?"],
            "rendered_prompt": ["<user>a?", "<user>a?", "<user>b?"],
            "text": ["A1", "A2", "B"],
            "label": ["compliance", "compliance", "refusal"],
        }
    )
    write_published(table, path, header)
    stored = json.loads(path.read_text(encoding="utf-8"))
    assert stored["data"][0] == {
        "instruction": "a?",
        "prompt": "<user>a?",
        "response": ["A1", "A2"],
        "label": "compliance",
    }
    assert read_header(path) == header
    pd.testing.assert_frame_equal(read_responses(path)[list(table.columns)], table)


@pytest.mark.skipif(not SAMPLE.is_dir(), reason="the shared sample of published responses is not beside the checkout")
def test_a_real_published_file():
    path = next(SAMPLE.glob("*.json"))
    table = read_responses(path)
    whole = json.loads(path.read_text(encoding="utf-8"))
    assert table["text"].tolist() == [item["response"][0] for item in whole["data"]]
    assert table["prompt"].tolist() == [item["instruction"] for item in whole["data"]]
    assert table["rendered_prompt"].tolist() == [item["prompt"] for item in whole["data"]]
    assert read_header(path) == {key: value for key, value in whole.items() if key != "data"}


def test_a_list_of_records_with_samples_null_and_none(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(
        '[{"prompt": "p", "response": ["x", null]}, {"prompt": "q", "response": []}, {"prompt": "r", "response": null}]'
    )
    table = read_responses(path)
    assert table[["row", "sample", "text"]].to_numpy().tolist() == [[0, 0, "x"], [0, 1, ""], [1, 0, ""], [2, 0, ""]]


def test_field_mapping(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("frage,antwort,prompt,urteil\nwarum?,darum.,<s>warum?,refusal\n")
    with pytest.raises(WorkbenchError, match=r"a.csv, line 2: no field for the text .*found frage, antwort"):
        read_responses(path)
    row = read_responses(path, {"prompt": "frage", "text": "antwort", "label": "urteil"}).iloc[0]
    assert row[["prompt", "text", "label", "rendered_prompt"]].tolist() == ["warum?", "darum.", "refusal", "<s>warum?"]
    with pytest.raises(WorkbenchError, match="no field for the label"):
        read_responses(path, {"prompt": "frage", "text": "antwort", "label": "missing"})


def test_mixed_encodings(tmp_path):
    path = tmp_path / "mixed.jsonl"
    lines = [
        b"\xef\xbb\xbf" + '{"prompt": "café", "text": "naïve"}'.encode(),
        '{"prompt": "café", "text": "“quoted” €"}'.encode("cp1252"),
        '{"prompt": "日本", "text": "ok"}'.encode(),
        b'{"prompt": "x", "text": "undefined \x81"}',
    ]
    path.write_bytes(b"\r\n".join(lines) + b"\r\n\r\n")
    table = read_responses(path)
    assert table["prompt"].tolist() == ["café", "café", "日本", "x"]
    assert table["text"].tolist() == ["naïve", "“quoted” €", "ok", "undefined \x81"]


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32"])
def test_utf16_is_refused(tmp_path, encoding):
    path = tmp_path / "a.jsonl"
    path.write_bytes('{"prompt": "a", "text": "b"}'.encode(encoding))
    with pytest.raises(WorkbenchError, match="save it as UTF-8"):
        read_responses(path)


def test_broken_escapes_become_replacement_characters(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(r'{"prompt": "p", "text": "half \ud83d smile \ud83d\ude00"}')
    text = read_responses(path)["text"][0]
    assert text == "half � smile 😀"
    write_responses(read_responses(path), tmp_path / "b.parquet")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"prompt": "p", "text": "t"}\n{"prompt": "p", "te', "a.jsonl, line 2: not valid JSON"),
        ("a.jsonl", '{"prompt": "p", "text": "t"}\n\n{"prompt": "p"}', "a.jsonl, line 3: no field for the text"),
        ("a.jsonl", "[1, 2]", "line 1: expected a JSON object"),
        ("a.jsonl", '{"prompt": null, "text": "t"}', "the prompt must be text, but 'prompt' is null"),
        ("a.jsonl", '{"prompt": "p", "text": {"a": 1}}', "text or a list of texts, but 'text' holds of type dict"),
        ("a.jsonl", "[" * 100_000, "line 1: not valid JSON"),
        ("a.jsonl", "", "holds no responses"),
        ("a.csv", "prompt,text\np,t\np,t,extra\n", "a.csv, line 3: expected 2 columns as in the header, found 3"),
        ("a.csv", 'prompt,text\np,"open\n', "line 2: not valid CSV"),
        ("a.csv", "text,text\np,t\n", "two columns have the same name"),
        ("a.json", '{"data": [{"prompt": "p", "text": "t"},\n{"prompt": "p" "text": "t"}]}', "line 2: not valid JSON"),
        ("a.json", '{"rows": []}', 'neither a list of records nor a list under "data"'),
        ("a.json", '[{"prompt": "p", "text": "t"}', r"expected ',', found ''"),
        ("a.parquet", "not parquet", "not a readable parquet file"),
        ("a.txt", "x", "Unknown response file ending"),
    ],
)
def test_bad_files_are_named_with_their_line(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(WorkbenchError, match=message.replace("[", r"\[")) as caught:
        read_responses(path)
    assert "\n" not in str(caught.value)


def test_a_missing_file():
    with pytest.raises(WorkbenchError, match="no response file"):
        read_responses("nowhere.jsonl")


def test_reading_is_lazy(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": "p", "text": "t"}\nbroken')
    stream = iter_responses(path)
    assert next(stream)["text"] == "t"
    with pytest.raises(WorkbenchError, match="line 2"):
        next(stream)


def test_long_csv_fields_and_json_in_small_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(text_stream, "_CHUNK_BYTES", 7)
    text = "日本 é 😀 " * 40_000
    table = pd.DataFrame({"prompt": ["a", "b"], "text": [text, "short"]})
    write_responses(table, tmp_path / "a.csv")
    assert read_responses(tmp_path / "a.csv")["text"].tolist() == [text, "short"]
    small = pd.DataFrame({"prompt": ["a", "b"], "text": [text[:60], "short"]})
    write_published(small, tmp_path / "a.json", {"n": 123456789, "nested": {"k": [1, 2]}})
    assert read_responses(tmp_path / "a.json")["text"].tolist() == [text[:60], "short"]
    assert read_header(tmp_path / "a.json") == {"n": 123456789, "nested": {"k": [1, 2]}}
    assert "".join(decoded_chunks(tmp_path / "a.json")) == (tmp_path / "a.json").read_text(encoding="utf-8")


def test_decode_mixed_keeps_utf8_around_foreign_bytes():
    assert decode_mixed("é".encode() + b"\xe9" + "日".encode() + b"\x93x\x94") == "éé日“x”"
