"""Item files, extraction rules, equality, code answers and puzzles, against values worked out by hand."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from sgworkbench.errors import WorkbenchError
from sgworkbench.evaluation.costs.choice_items import BUILTIN_CHOICES, load_choice_items
from sgworkbench.evaluation.costs.code_answers import find_code
from sgworkbench.evaluation.costs.equality import same_answer, same_number
from sgworkbench.evaluation.costs.extraction import extract
from sgworkbench.evaluation.costs.generated_accuracy import grade
from sgworkbench.evaluation.costs.puzzles import EVALUATING, load_puzzles, puzzle_names
from sgworkbench.evaluation.costs.question_sets import BENCHMARKS, Question, load_questions
from sgworkbench.evaluation.costs.texts import BUILTIN_TEXTS, Text, load_texts

MMLU = {"question_id": 7, "question": "Which?", "options": ["x", "y", "z"], "answer": "C", "answer_index": 2}


def jsonl(folder: Path, *rows: dict[str, Any], name: str = "items.jsonl") -> Path:
    file = folder / name
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def test_the_built_in_sets_are_sound() -> None:
    items = load_choice_items(BUILTIN_CHOICES)
    assert len(items) == 40
    assert [sum(item.answer == index for item in items) for index in range(4)] == [10, 10, 10, 10]
    assert all(len(set(item.options)) == 4 for item in items)
    texts = load_texts(BUILTIN_TEXTS)
    assert len(texts) == 12
    assert len({text.text for text in texts}) == 12


def test_choice_items_are_read_in_every_shape(tmp_path: Path) -> None:
    by_letter = {key: value for key, value in MMLU.items() if key != "answer_index"}
    (one,) = load_choice_items(jsonl(tmp_path, by_letter))
    assert (one.id, one.options, one.answer, one.letter) == ("7", ("x", "y", "z"), 2, "C")
    pd.DataFrame([MMLU]).to_parquet(tmp_path / "items.parquet")
    assert load_choice_items(tmp_path / "items.parquet") == [one]
    columns = tmp_path / "items.csv"
    columns.write_text('question,A,B,answer\n"Why, then?",x,y,b\n', encoding="utf-8")
    assert load_choice_items(columns)[0].answer == 1
    arc = {"q": "Which?", "choices": {"text": ["x", "y"], "label": ["A", "B"]}, "answerKey": "A"}
    assert load_choice_items(jsonl(tmp_path, arc), fields={"question": "q"})[0].options == ("x", "y")
    word = {"question": "Which?", "options": '["left", "right"]', "answer": "right"}
    assert load_choice_items(jsonl(tmp_path, word))[0].answer == 1


def test_gpqa_options_are_shuffled_by_seed_and_keep_the_answer(tmp_path: Path) -> None:
    wrong = {f"Incorrect Answer {k}": f"wrong {k}" for k in (1, 2, 3)}
    rows = [{"Question": f"Q{k}?", "Correct Answer": "right", **wrong} for k in range(24)]
    items = load_choice_items(jsonl(tmp_path, *rows))
    assert all(item.options[item.answer] == "right" for item in items)
    assert {item.answer for item in items} == {0, 1, 2, 3}
    assert items == load_choice_items(jsonl(tmp_path, *rows))
    assert items != load_choice_items(jsonl(tmp_path, *rows), seed=1)
    few = load_choice_items(jsonl(tmp_path, *rows), n=5)
    assert len(few) == 5
    assert [item.id for item in few] == sorted((item.id for item in few), key=int)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"answer_index": None, "answer": "D"}, "outside the options; the options are A to C"),
        ({"answer_index": 3}, "outside the options"),
        ({"answer_index": -1}, "outside the options"),
        ({"answer_index": "both"}, "no letter, index or option"),
        ({"options": ["x"]}, "2 to 26 options, found 1"),
        ({"options": ["x", ""]}, "option B must be text"),
        ({"options": 3}, "expected a list"),
        ({"question": " "}, "question must be text"),
    ],
)
def test_a_bad_item_is_one_sentence_with_its_line(change: dict[str, Any], said: str, tmp_path: Path) -> None:
    row = {key: value for key, value in {**MMLU, **change}.items() if value is not None}
    with pytest.raises(WorkbenchError, match=re.escape(said)) as caught:
        load_choice_items(jsonl(tmp_path, MMLU | {"question_id": 1}, row))
    assert "items.jsonl, line 2" in str(caught.value)


def test_bad_files_are_refused(tmp_path: Path) -> None:
    no_answer = {"question": "Which?", "options": ["x", "y"]}
    with pytest.raises(WorkbenchError, match=r"line 1: no field for the answer .*found question, options"):
        load_choice_items(jsonl(tmp_path, no_answer))
    with pytest.raises(WorkbenchError, match="id occurs twice"):
        load_choice_items(jsonl(tmp_path, MMLU, MMLU))
    with pytest.raises(WorkbenchError, match="line 1: broken JSON"):
        load_choice_items(_written(tmp_path / "broken.jsonl", "{"))
    with pytest.raises(WorkbenchError, match="holds no items"):
        load_choice_items(_written(tmp_path / "empty.jsonl", "\n"))
    with pytest.raises(WorkbenchError, match="does not exist"):
        load_choice_items(tmp_path / "nowhere.csv")
    with pytest.raises(WorkbenchError, match="Unknown item file ending"):
        load_choice_items(_written(tmp_path / "items.xml", "<a/>"))
    with pytest.raises(WorkbenchError, match="Did you mean 'answer'"):
        load_choice_items(jsonl(tmp_path, MMLU), fields={"answr": "a"})
    with pytest.raises(WorkbenchError, match="is empty"):
        Text("a", " \n")
    with pytest.raises(WorkbenchError, match="is empty"):
        load_texts(_written(tmp_path / "nothing.txt", "\n"))
    assert (
        load_texts(_written(tmp_path / "a.jsonl", '{"body": "one two"}'), fields={"text": "body"})[0].text == "one two"
    )


def _written(file: Path, text: str) -> Path:
    file.write_text(text, encoding="utf-8")
    return file


@pytest.mark.parametrize(
    ("text", "rules", "answer", "rule"),
    [
        (
            "It costs 1,250 dollars, so 3 of them.\nAnswer: $3,750.",
            BENCHMARKS["gsm8k"],
            "3750",
            "number on answer line",
        ),
        ("5 + 5 = 10\n#### 10", BENCHMARKS["gsm8k"], "10", "hash"),
        ("We get 7 apples, then 12 apples.", BENCHMARKS["gsm8k"], "12", "last number"),
        ("I'm sorry, but I can't help with that.", BENCHMARKS["gsm8k"], None, None),
        (r"First \boxed{1}, then \boxed{\frac{3}{\sqrt{2}}} is it", BENCHMARKS["math"], r"\frac{3}{\sqrt{2}}", "boxed"),
        (r"cut off at \boxed{\frac{3}{", BENCHMARKS["math"], "3", "last number"),
        ("**Answer:** (B) the sun", BENCHMARKS["mmlu-pro"], "B", "letter on answer line"),
        ("The answer is C.", BENCHMARKS["mmlu-pro"], "C", "letter on answer line"),
        ("I think so.\nB. the sun", BENCHMARKS["gpqa"], "B", "lone letter"),
        ("A cat sat there.", BENCHMARKS["gpqa"], None, None),
        ("Thinking ...\nAnswer:\n1 2\n3 4", ("after answer",), "1 2\n3 4", "after answer"),
    ],
)
def test_extraction_names_the_rule_that_found_the_answer(text: str, rules: Any, answer: Any, rule: Any) -> None:
    found = extract(text, rules)
    assert (found.answer, found.rule) == (answer, rule)


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        (r"\frac{1}{2}", "0.5", True),
        (r"\dfrac12", r"\frac{2}{4}", True),
        ("1,000", "1000", True),
        (r"2\sqrt{3}", r"\sqrt{12}", True),
        (r"x^2 + 2x + 1", "(x+1)^2", True),
        (r"x^2 + 2x + 1", "(x+1)^3", False),
        ("(1, 2)", r"\left( 1, \frac{4}{2} \right)", True),
        ("(1, 2)", "(2, 1)", False),
        ("(1, 2)", "[1, 2]", False),
        (r"\{1, 2\}", r"\{2, 1\}", True),
        (r"90^\circ", "90", True),
        (r"x = 5", "5", True),
        (r"5 \text{ cm}", "5", True),
        (r"\text{Evelyn}", "Evelyn", True),
        (r"\text{Evelyn}", "Evelina", False),
        (r"\pi/4", r"\frac{\pi}{4}", True),
        (r"10\%", "10", True),
        ("-3", "3", False),
        ("9^9^9^9", "1", False),
        ("__import__('os')", "1", False),
        ("2/0", "1", False),
        ("", "1", False),
    ],
)
def test_equality_of_mathematical_answers(one: str, other: str, same: bool) -> None:
    assert same_answer(one, other) is same
    assert same_answer(other, one) is same


def test_numbers_compare_by_value() -> None:
    assert same_number("3.50", "7/2")
    assert same_number("-4", "−4")
    assert not same_number("four", "4")


FUNCTION = "def twice(x):\n    return 2 * x\n"


@pytest.mark.parametrize(
    ("text", "fenced", "parses", "defines"),
    [
        (f"Here it is:\n```python\n{FUNCTION}```\nIt doubles.", True, True, True),
        (f"```\nprint(1)\n```\nand\n```py\n{FUNCTION}```", True, True, True),
        (f"```python\n{FUNCTION}", True, True, True),
        (f"Sure.\n\n{FUNCTION}\nThis function doubles a number.", False, True, True),
        ("```python\ndef twice(x:\n    return\n```", True, False, False),
        ("```python\ndef thrice(x):\n    return 3 * x\n```", True, True, False),
        ("I cannot help with that.", False, False, False),
        ("```python\n" + "(" * 3000 + "\n```", True, False, False),
        ("```python\na = '\x00'\n```", True, False, False),
    ],
)
def test_code_is_found_with_and_without_a_fence(text: str, fenced: bool, parses: bool, defines: bool) -> None:
    found = find_code(text, "twice")
    assert (found.fenced, found.parses, found.defines) == (fenced, parses, defines)


def test_code_is_never_executed(tmp_path: Path) -> None:
    target = tmp_path / "written"
    code = f"open({str(target)!r}, 'w').close()\ndef twice(x):\n    pass\n"
    found = grade(Question("0", "?", "twice", None), f"```python\n{code}```", ())
    assert found["parses"] is True
    assert found["defines"] is True
    assert not target.exists()


def test_reasoning_is_not_searched_and_lost_form_is_told_from_lost_knowledge() -> None:
    question = Question("0", "?", "4", lambda said: same_number(said, "4"))
    rules = BENCHMARKS["gsm8k"]
    thought = grade(question, "<think>Answer: 4</think>\nAnswer: 5", rules)
    assert (thought["extracted"], thought["accuracy"]) == ("5", False)
    assert grade(question, "Answer: 4", rules, reasoning_opened=True)["rule"] is None
    loose = grade(question, "That makes 4 of them.", rules)
    assert (loose["accuracy"], loose["strict_accuracy"], loose["form"]) == (True, False, False)
    strict = grade(question, "Answer: 5", rules)
    assert (strict["accuracy"], strict["form"]) == (False, True)


def test_benchmark_files(tmp_path: Path) -> None:
    gsm = load_questions("gsm8k", jsonl(tmp_path, {"question": "How many?", "answer": "2+2=4\n#### 1,234"}))
    assert gsm.questions[0].answer == "1234"
    assert gsm.questions[0].is_right is not None
    assert gsm.questions[0].is_right("1234.0")
    math = load_questions("math", jsonl(tmp_path, {"problem": "Half?", "solution": r"So \boxed{\frac12}."}))
    assert math.questions[0].is_right is not None
    assert math.questions[0].is_right("0.5")
    code = load_questions("humaneval", jsonl(tmp_path, {"task_id": "H/0", "prompt": FUNCTION, "entry_point": "twice"}))
    assert code.is_code
    assert code.questions[0].is_right is None
    mmlu = load_questions("mmlu-pro", jsonl(tmp_path, MMLU))
    assert "C. z" in mmlu.questions[0].text
    with pytest.raises(WorkbenchError, match="must hold a number"):
        load_questions("aime", jsonl(tmp_path, {"problem": "?", "answer": "none"}))
    with pytest.raises(WorkbenchError, match="no field for the answer"):
        load_questions("humaneval", jsonl(tmp_path, {"prompt": FUNCTION}))
    with pytest.raises(WorkbenchError, match="Did you mean 'gsm8k'"):
        load_questions("gsm-8k", tmp_path / "x.jsonl")


def test_puzzles_are_seeded_and_checked_by_their_own_verifier() -> None:
    pytest.importorskip("reasoning_gym")
    first, again = (load_puzzles("chain_sum", n=4, seed=3) for _ in range(2))
    assert [q.text for q in first.questions] == [q.text for q in again.questions]
    assert [q.text for q in first.questions] != [q.text for q in load_puzzles("chain_sum", n=4, seed=4).questions]
    for question in first.questions:
        expression = re.search(r"[-+\d ]+(?= =|\?|\.)", question.text.split(":", 1)[-1])
        assert expression is not None
        total = sum(int(part.replace(" ", "")) for part in re.findall(r"[-+]?\s*\d+", expression[0]))
        assert question.is_right is not None
        assert question.is_right(str(total))
        assert not question.is_right(str(total + 1))
        assert grade(question, f"So.\nAnswer: {total}", first.rules)["strict_accuracy"] is True


def test_generators_that_would_execute_answers_are_refused() -> None:
    package = pytest.importorskip("reasoning_gym")
    import inspect

    executing = set()
    for name, (kind, _) in package.factory.DATASETS.items():
        score = getattr(kind, "score_answer")  # noqa: B009
        if re.search(
            r"\b(?:eval|exec|(?:sp|sympy)\.parse_expr|sympify)\(|(?<!\.)\bparse_expr\(answer", inspect.getsource(score)
        ):
            executing.add(name)
    # number_sorting evaluates its own answer, not the model's.
    assert executing - {"number_sorting"} <= EVALUATING
    assert "countdown" in executing
    assert not EVALUATING & set(puzzle_names())
    with pytest.raises(WorkbenchError, match="evaluates answers as code"):
        load_puzzles("countdown")
    with pytest.raises(WorkbenchError, match="Did you mean 'chain_sum'"):
        load_puzzles("chain_sums")
    with pytest.raises(WorkbenchError, match="does not take these options"):
        load_puzzles("chain_sum", n=1, options={"min_terms": 9, "max_terms": 2})
    with pytest.raises(WorkbenchError, match="does not take these options"):
        load_puzzles("chain_sum", n=1, options={"colour": 1})


def test_puzzles_without_the_package_say_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(WorkbenchError, match=r"sgworkbench\[utility\]"):
        load_puzzles("chain_sum")
