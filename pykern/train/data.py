"""Prompts, answers and rewards: generated sums, or the rows of a JSON-lines file. Tokens are bytes."""

import hashlib
import json
import random
import re
from dataclasses import dataclass, field
from decimal import Decimal, InvalidOperation
from pathlib import Path

from .config import InputError

BEGIN, END, VOCABULARY = 256, 257, 258
"""The 256 bytes, a token in front of every sequence and one behind every response."""

LARGEST_REWARD = 2**128 - 2**104
"""The largest float32, which rewards become."""


def encode(text: str) -> list[int]:
    return list(text.encode())


def decode(tokens: list[int]) -> str:
    return bytes(token for token in tokens if token < 256).decode(errors="replace")


@dataclass(frozen=True)
class Example:
    """A prompt with its worked solution, or with responses that were sampled and scored elsewhere."""

    prompt: list[int]
    solution: str
    responses: tuple[list[int], ...] = ()
    rewards: tuple[float, ...] = ()


@dataclass
class Dataset:
    """Examples behind one shared prefix of tokens, with the rule that scores a response.

    form: "arithmetic", "questions" (responses are sampled and checked) or "groups" (responses are given).
    """

    form: str
    shared: list[int]
    training: list[Example]
    held_out: list[Example]
    seed: int
    _orders: dict[int, list[int]] = field(default_factory=dict)

    def take(self, position: int, count: int) -> list[Example]:
        """`count` training examples from `position` on, in an order that each pass over the data shuffles anew.

        A function of position and seed alone: a resumed run needs to know nothing else.
        """
        size = len(self.training)
        return [self.training[self._order(at // size)[at % size]] for at in range(position, position + count)]

    def _order(self, passes: int) -> list[int]:
        if passes not in self._orders:
            self._orders.clear()
            order = list(range(len(self.training)))
            random.Random(f"order {self.seed} {passes}").shuffle(order)
            self._orders[passes] = order
        return self._orders[passes]

    def digest(self) -> str:
        """Tells whether a resumed run finds the examples that it began with."""
        found = hashlib.sha256()
        for example in (*self.training, *self.held_out):
            found.update(repr(example).encode())
        return found.hexdigest()

    def reward(self, example: Example, response: list[int]) -> float:
        """1 for a response that has ended and gives the example's answer, else 0."""
        if not response or response[-1] != END:
            return 0.0
        text = decode(response)
        if self.form == "arithmetic":
            return float(text == example.solution)
        return float(same_answer(final_answer(text), final_answer(example.solution)))


# Sums


def arithmetic(shots: int, held_out: int, seed: int, largest: int) -> Dataset:
    """a + b for all 0 <= a, b <= largest. A held-out sum is in neither order among training or shots.

    Numbers have leading zeros to one width, so that digits of one place stand at one distance, and a sum is written
    as one adds by hand, ones first: 04+26=03, 48+49=79. So a small model learns it in hundreds of steps.
    """
    pairs = [(a, b) for a in range(largest + 1) for b in range(a, largest + 1)]
    random.Random(f"split {seed}").shuffle(pairs)
    if shots + held_out >= len(pairs):
        raise InputError(
            f"--shots and --held-out: expected fewer than {len(pairs)} sums together, got {shots + held_out}"
        )
    solved, tested, trained = pairs[:shots], pairs[shots : shots + held_out], pairs[shots + held_out :]
    both_orders = [pair for a, b in trained for pair in ({(a, b), (b, a)})]

    def example(pair: tuple[int, int]) -> Example:
        a, b = pair
        return Example(encode(f"{a:0{width}}+{b:0{width}}="), f"{a + b:0{sum_width}}"[::-1])

    width, sum_width = len(str(largest)), len(str(2 * largest))
    training, tests = ([example(pair) for pair in pairs] for pairs in (sorted(both_orders), tested))
    text = "".join(f"{decode(shot.prompt)}{shot.solution}\n" for shot in map(example, solved))
    return Dataset("arithmetic", [BEGIN, *encode(text)], training, tests, seed)


# Files


def final_answer(text: str) -> str:
    """What stands behind '####' or 'A:' in the last line; the whole last line if neither does."""
    lines = text.strip().splitlines()
    last = lines[-1] if lines else ""
    return re.split(r"####|\bA:", last)[-1].strip()


def same_answer(response: str, answer: str) -> bool:
    """Equal as numbers ($ and thousands' commas apart), or else as text."""

    def number(text: str) -> Decimal | None:
        try:
            value = Decimal(text.replace(",", "").replace("$", "").rstrip("."))
        except InvalidOperation:
            return None
        return value if value.is_finite() else None

    numbers = number(response), number(answer)
    return response == answer if None in numbers else numbers[0] == numbers[1]


def read_rows(path: str) -> list[tuple[int, dict]]:
    """The objects of a JSON-lines file with their line numbers; blank lines are passed over."""
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise InputError(f"--data {path}: {error.strerror or error}") from error
    rows = []
    for number, line in enumerate(content.split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
        except UnicodeDecodeError as error:
            raise InputError(f"{path}:{number}: not UTF-8 text (byte {error.start} of the line)") from error
        except json.JSONDecodeError as error:
            raise InputError(f"{path}:{number}: not JSON: {error.msg} at column {error.colno}") from error
        except RecursionError as error:
            raise InputError(f"{path}:{number}: not JSON that a row could be: nested too deeply") from error
        if not isinstance(row, dict):
            raise InputError(f"{path}:{number}: expected an object, got {type(row).__name__}")
        rows.append((number, row))
    if not rows:
        raise InputError(f"{path}: holds no rows")
    return rows


def form_of(path: str, rows: list[tuple[int, dict]]) -> str:
    """Which of the two forms a file's first row has."""
    number, row = rows[0]
    if "question" in row:
        return "questions"
    if "prompt" in row:
        return "groups"
    raise InputError(
        f"{path}:{number}: expected 'question' and 'answer', or 'prompt', 'responses' and 'rewards', "
        f"got {', '.join(map(repr, sorted(row))) or 'an empty object'}"
    )


def _text(path: str, number: int, row: dict, name: str) -> str:
    if name not in row:
        raise InputError(f"{path}:{number}: {name!r} is missing")
    value = row[name]
    _encoded(f"{path}:{number}: {name!r}", value)
    if not value.strip():
        raise InputError(f"{path}:{number}: {name!r} is empty")
    return value


def _encoded(place: str, value: object) -> list[int]:
    if not isinstance(value, str):
        raise InputError(f"{place}: expected text, got {type(value).__name__}")
    try:
        return encode(value)
    except UnicodeEncodeError as error:
        raise InputError(f"{place}: a lone surrogate at character {error.start} is not text") from error


def _group(path: str, number: int, row: dict) -> tuple[tuple[list[int], ...], tuple[float, ...]]:
    for name in ("responses", "rewards"):
        if not isinstance(row.get(name), list) or not row[name]:
            raise InputError(f"{path}:{number}: {name!r}: expected a list with at least one entry")
    responses, rewards = row["responses"], row["rewards"]
    if len(responses) != len(rewards):
        raise InputError(f"{path}:{number}: {len(responses)} responses but {len(rewards)} rewards")
    for at, reward in enumerate(rewards):
        if isinstance(reward, bool) or not isinstance(reward, (int, float)) or not abs(reward) <= LARGEST_REWARD:
            raise InputError(
                f"{path}:{number}: reward {at}: expected a finite number, got {_short(reward)}; it is a float32"
            )
    tokens = tuple(
        [*_encoded(f"{path}:{number}: response {at}", response), END] for at, response in enumerate(responses)
    )
    return tokens, tuple(map(float, rewards))


def _short(value: object) -> str:
    text = "an integer of hundreds of digits" if isinstance(value, int) and value.bit_length() > 1024 else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def framed(question: str) -> str:
    """A question as the model sees it; the response follows."""
    return f"Question: {question}\nAnswer: "


def file(path: str, rows: list[tuple[int, dict]], shots: int, held_out: int, seed: int) -> Dataset:
    """The rows of a file, all checked; `shots` of them become the shared prefix, `held_out` of them the test."""
    form = form_of(path, rows)
    examples, solved = [], []
    for number, row in rows:
        if form == "questions":
            question, solution = _text(path, number, row, "question"), _text(path, number, row, "answer")
            example = Example(encode(framed(question)), solution)
        else:
            question = _text(path, number, row, "prompt")
            responses, rewards = _group(path, number, row)
            solution = _text(path, number, row, "answer") if "answer" in row else ""
            example = Example(encode(framed(question)), solution, responses, rewards)
        examples.append(example)
        if solution:
            solved.append(len(examples) - 1)
    if len(solved) < shots + held_out:
        raise InputError(
            f"{path}: --shots {shots} and --held-out {held_out} need as many rows with an 'answer', "
            f"there are {len(solved)}"
        )
    if shots + held_out >= len(examples):
        raise InputError(
            f"{path}: --shots {shots} and --held-out {held_out} leave none of its {len(examples)} rows to train on"
        )
    draw = random.Random(f"split {seed}")
    shown = draw.sample(solved, shots)
    rest = sorted(set(range(len(examples))) - set(shown))
    tested = set(draw.sample([at for at in rest if examples[at].solution], held_out))
    text = "".join(f"{decode(examples[at].prompt)}{examples[at].solution}\n\n" for at in shown)
    return Dataset(
        form,
        [BEGIN, *encode(text)],
        [examples[at] for at in rest if at not in tested],
        [examples[at] for at in sorted(tested)],
        seed,
    )


def supervised(examples: list[Example]) -> tuple[list[list[int]], list[list[list[int]]]]:
    """Prompts, and each one's worked solution as its only response."""
    return [e.prompt for e in examples], [[[*encode(e.solution), END]] for e in examples]
