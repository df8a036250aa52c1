"""Sums, rows of files, answers."""

import json

import pytest

from pykern.train import data
from pykern.train.config import InputError
from pykern.train.data import BEGIN, END, Example, arithmetic, decode, encode, final_answer, same_answer

from .support import groups, questions, write_rows


def load(path, shots=0, held_out=0, seed=0):
    return data.file(str(path), data.read_rows(str(path)), shots, held_out, seed)


def test_tokens_are_bytes():
    assert decode(encode("naïve ½\n")) == "naïve ½\n"
    assert decode([65, END, BEGIN, 66]) == "AB"


def test_sums_are_right_and_begin_with_the_shots():
    sums = arithmetic(3, 20, seed=0, largest=30)
    for example in sums.training + sums.held_out:
        a, b = decode(example.prompt).rstrip("=").split("+")
        assert int(a) + int(b) == int(example.solution[::-1])
    assert sums.shared[0] == BEGIN
    assert decode(sums.shared).count("\n") == 3


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_held_out_sums_are_in_neither_order_among_training_or_shots(seed):
    sums = arithmetic(4, 50, seed, largest=30)

    def pair(text: str) -> tuple[int, ...]:
        return tuple(sorted(map(int, text.split("=")[0].split("+"))))

    trained = {pair(decode(e.prompt)) for e in sums.training}
    tested = {pair(decode(e.prompt)) for e in sums.held_out}
    shown = {pair(line) for line in decode(sums.shared).splitlines()}
    assert len(tested) == 50 and len(shown) == 4
    assert not tested & trained and not tested & shown and not shown & trained
    assert len(tested | trained | shown) == 31 * 32 // 2


def test_too_many_held_out_sums_are_refused():
    with pytest.raises(InputError, match="--shots and --held-out: expected fewer than 10 sums"):
        arithmetic(2, 8, seed=0, largest=3)


@pytest.mark.parametrize(
    ("response", "reward"),
    [("07", 1.0), ("08", 0.0), ("7", 0.0), ("007", 0.0), ("07 ", 0.0), ("", 0.0)],
)
def test_sums_are_checked_exactly(response, reward):
    sums = arithmetic(0, 0, seed=0, largest=9)
    assert sums.reward(Example(encode("3+4="), "07"), [*encode(response), END]) == reward


def test_a_response_that_never_ends_is_wrong():
    sums = arithmetic(0, 0, seed=0, largest=9)
    assert sums.reward(Example(encode("3+4="), "07"), encode("07")) == 0.0
    assert sums.reward(Example(encode("3+4="), "07"), []) == 0.0


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("so\n#### 12", "12"),
        ("so\nA: 12\n", "12"),
        ("only 12", "only 12"),
        ("#### 3\nA: 4", "4"),
        ("GAMMA: 5", "GAMMA: 5"),
        ("#### $1,200.", "$1,200."),
        ("", ""),
    ],
)
def test_the_answer_is_what_follows_the_mark_in_the_last_line(text, answer):
    assert final_answer(text) == answer


@pytest.mark.parametrize(
    ("response", "answer", "same"),
    [
        ("1,200", "1200", True),
        ("$18", "18.0", True),
        ("18.", "18", True),
        ("18", "81", False),
        ("blue", "blue", True),
        ("blue", "Blue", False),
        ("nan", "nan", True),
        ("inf", "1e999", False),
        ("", "0", False),
    ],
)
def test_answers_compare_as_numbers_or_as_text(response, answer, same):
    assert same_answer(response, answer) is same


def test_questions_are_read_and_checked(tmp_path):
    loaded = load(write_rows(tmp_path / "q.jsonl", questions(6)), shots=2, held_out=1)
    assert loaded.form == "questions"
    assert (len(loaded.training), len(loaded.held_out)) == (3, 1)
    assert decode(loaded.shared).count("Question: ") == decode(loaded.shared).count("#### ") == 2
    example = loaded.training[0]
    assert decode(example.prompt).startswith("Question: What is") and decode(example.prompt).endswith("Answer: ")
    right = final_answer(example.solution)
    assert loaded.reward(example, [*encode(f"well\n#### {right}.0"), END]) == 1.0
    assert loaded.reward(example, [*encode(f"A: {right}"), END]) == 1.0
    assert loaded.reward(example, [*encode("A: 99"), END]) == 0.0


def test_groups_are_read(tmp_path):
    loaded = load(write_rows(tmp_path / "g.jsonl", groups(5)), shots=2)
    assert loaded.form == "groups"
    example = loaded.training[0]
    assert len(example.responses) == len(example.rewards) == 3
    assert all(response[-1] == END for response in example.responses)


def test_shots_are_no_training_rows(tmp_path):
    loaded = load(write_rows(tmp_path / "g.jsonl", groups(9)), shots=4)
    shown = decode(loaded.shared)
    assert len(loaded.training) == 5
    assert not [e for e in loaded.training if decode(e.prompt) in shown]


def test_every_pass_over_the_data_has_its_own_order(tmp_path):
    loaded = load(write_rows(tmp_path / "q.jsonl", questions(20)))
    first, second = loaded.take(0, 20), loaded.take(20, 20)
    assert (
        sorted(e.prompt for e in first) == sorted(e.prompt for e in second) == sorted(e.prompt for e in loaded.training)
    )
    assert first != second
    assert loaded.take(15, 10) == first[15:] + second[:5]


BROKEN = [
    ("{", "2: not JSON"),
    ("[1, 2]", "2: expected an object, got list"),
    ({"question": "x"}, "2: 'answer' is missing"),
    ({"answer": "x"}, "2: 'question' is missing"),
    ({"question": "", "answer": "x"}, "2: 'question' is empty"),
    ({"question": "  \n", "answer": "x"}, "2: 'question' is empty"),
    ({"question": "x", "answer": ""}, "2: 'answer' is empty"),
    ({"question": 3, "answer": "x"}, "2: 'question': expected text, got int"),
    ('{"question": "\\ud800", "answer": "x"}', "2: 'question': a lone surrogate"),
    ("[" * 100_000, "2: not JSON"),
]


@pytest.mark.parametrize(("row", "message"), BROKEN, ids=range(len(BROKEN)))
def test_a_broken_question_is_named_by_its_line(tmp_path, row, message):
    path = write_rows(tmp_path / "q.jsonl", [questions(1)[0], row, questions(2)[1]])
    with pytest.raises(InputError) as refused:
        load(path)
    assert str(refused.value).startswith(f"{path}:{message}")


def changed(**fields) -> dict:
    return {**groups(1)[0], **fields}


BROKEN_GROUPS = [
    (changed(prompt=""), "3: 'prompt' is empty"),
    (changed(responses=[]), "3: 'responses': expected a list with at least one entry"),
    (changed(responses="text"), "3: 'responses': expected a list"),
    (changed(rewards=[1.0]), "3: 3 responses but 1 rewards"),
    (changed(rewards=[1.0, float("nan"), 0.0]), "3: reward 1: expected a finite number, got nan"),
    (changed(rewards=[1.0, 0.0, float("inf")]), "3: reward 2: expected a finite number, got inf"),
    (json.dumps(changed()).replace("1.0", "1e999"), "3: reward 0: expected a finite number, got inf"),
    (json.dumps(changed()).replace("1.0", "1e39"), "3: reward 0: expected a finite number, got 1e+39; it is a float32"),
    (changed(rewards=[10**400, 0, 0]), None),
    (changed(rewards=[1.0, None, 0.0]), "3: reward 1: expected a finite number, got None"),
    (changed(rewards=[True, 0.0, 0.0]), "3: reward 0: expected a finite number, got True"),
    (changed(rewards=["1", 0.0, 0.0]), "3: reward 0: expected a finite number, got '1'"),
    (changed(responses=["a", 7, "b"]), "3: response 1: expected text, got int"),
    (changed(responses=["a", "\ud800", "b"]), "3: response 1: a lone surrogate"),
]


@pytest.mark.parametrize(("row", "message"), BROKEN_GROUPS, ids=range(len(BROKEN_GROUPS)))
def test_a_broken_group_is_named_by_its_line(tmp_path, row, message):
    path = write_rows(tmp_path / "g.jsonl", [groups(1)[0], "", row])
    with pytest.raises(InputError) as refused:
        load(path)
    assert str(refused.value).startswith(f"{path}:{message or '3: reward 0: expected a finite number'}")
    assert "\n" not in str(refused.value)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(InputError, match="No such file"):
        data.read_rows(str(tmp_path / "absent.jsonl"))


def test_a_folder_is_refused(tmp_path):
    with pytest.raises(InputError, match="Is a directory"):
        data.read_rows(str(tmp_path))


@pytest.mark.parametrize("content", ["", "\n\n  \n"])
def test_a_file_without_rows_is_refused(tmp_path, content):
    (tmp_path / "empty.jsonl").write_text(content)
    with pytest.raises(InputError, match="holds no rows"):
        data.read_rows(str(tmp_path / "empty.jsonl"))


def test_text_that_is_not_utf8_is_named_by_its_line(tmp_path):
    (tmp_path / "latin.jsonl").write_bytes(b'{"question": "a", "answer": "b"}\n{"question": "\xe9", "answer": "b"}\n')
    with pytest.raises(InputError, match=r"latin\.jsonl:2: not UTF-8 text"):
        data.read_rows(str(tmp_path / "latin.jsonl"))


def test_a_byte_order_mark_and_carriage_returns_are_read(tmp_path):
    (tmp_path / "windows.jsonl").write_bytes(b'\xef\xbb\xbf{"question": "a", "answer": "b"}\r\n')
    assert len(load(tmp_path / "windows.jsonl").training) == 1


def test_rows_of_neither_form_are_refused(tmp_path):
    path = write_rows(tmp_path / "other.jsonl", [{"text": "x"}])
    with pytest.raises(InputError, match=r"other\.jsonl:1: expected 'question' and 'answer', or .*, got 'text'"):
        load(path)


def test_more_shots_than_answers_are_refused(tmp_path):
    rows = [{key: value for key, value in row.items() if key != "answer"} for row in groups(4)]
    path = write_rows(tmp_path / "g.jsonl", rows)
    assert len(load(path).training) == 4
    for shots, held_out in ((1, 0), (0, 1)):
        with pytest.raises(InputError, match=f"{shots} and --held-out {held_out} need as many rows with an 'answer', "):
            load(path, shots=shots, held_out=held_out)


def test_held_out_rows_have_answers(tmp_path):
    rows = groups(8)
    for row in rows[:5]:
        del row["answer"]
    loaded = load(write_rows(tmp_path / "g.jsonl", rows), shots=1, held_out=2)
    assert all(example.solution for example in loaded.held_out)


def test_rows_must_remain_to_train_on(tmp_path):
    with pytest.raises(InputError, match="leave none of its 4 rows"):
        load(write_rows(tmp_path / "g.jsonl", groups(4)), shots=3, held_out=1)
