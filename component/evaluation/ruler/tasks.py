"""RULER's synthetic tasks that need no download: what a sample asks, and how it is written.

    sample = TASKS["vt"].build(random.Random(0), 40, 4096, None)       # Sample(prompt, outputs)

After RULER (arXiv 2404.06654, section 3 and its appendix on task templates): tasks, counts, answer lengths and
prompts are the paper's. Keys and list words are compounds of the lists in text.py instead of a word package's. A sample
grows with its number of units: noise sentences, distractors, pieces of text, list words.

Pure Python; knows neither tokenizers nor models.
"""

import math
import random
import string
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from longqlora.evaluation.ruler.text import (
    ADJECTIVES,
    COMMON_WORDS,
    FREQUENT_WORDS,
    NEEDLE,
    NIAH_MANY,
    NIAH_ONE,
    NOISE,
    NOUNS,
    TRACKING,
    TextHaystack,
)
from longqlora.table import text_table


@dataclass(frozen=True)
class Sample:
    """A prompt, raw text that the answer continues, and the strings that the answer should hold."""

    prompt: str
    outputs: tuple[str, ...]


def compound(rng: random.Random) -> str:
    return f"{rng.choice(ADJECTIVES)}-{rng.choice(NOUNS)}"


def distinct(make: Callable[[], str], number: int, taken: Sequence[str] = ()) -> list[str]:
    """`number` different strings from `make`, none of them in `taken`."""
    found = dict.fromkeys(taken)
    while len(found) < len(taken) + number:
        found[make()] = None
    return list(found)[len(taken) :]


def random_string(kind: str, rng: random.Random) -> str:
    if kind == "words":
        return compound(rng)
    if kind == "numbers":
        return str(rng.randint(10**6, 10**7 - 1))
    return str(uuid.UUID(int=rng.getrandbits(128), version=4))


def build_niah(
    rng: random.Random,
    num_units: int,
    length: int,
    text: TextHaystack | None,
    *,
    haystack: str = "noise",
    keys: str = "words",
    values: str = "numbers",
    num_keys: int = 1,
    num_values: int = 1,
    num_queries: int = 1,
) -> Sample:
    """Needles "KEY is: VALUE" at random depths of noise, of other needles, or of `text`."""
    names = distinct(partial(random_string, keys, rng), num_keys)
    numbers = distinct(partial(random_string, values, rng), num_keys * num_values)
    groups = [numbers[index * num_values : (index + 1) * num_values] for index in range(num_keys)]
    asked = rng.sample(range(num_keys), num_queries)
    pairs = [(name, value) for name, group in zip(names, groups, strict=True) for value in group]
    rng.shuffle(pairs)
    needles = [NEEDLE.format(kind=values, key=key, value=value) for key, value in pairs]
    depths = sorted(rng.random() for _ in needles)
    if haystack == "text" and text is not None:
        places = [text.place(int(depth * (num_units + 1))) for depth in depths]
        spans = [text.span(start, end) for start, end in zip([0, *places], [*places, num_units], strict=True)]
        context = " ".join(part for pair in zip(spans, [*needles, ""], strict=True) for part in pair if part)
    else:
        sentences = [NOISE] * num_units
        if haystack == "needles":
            others = distinct(partial(random_string, keys, rng), num_units, names)
            sentences = [NEEDLE.format(kind=values, key=key, value=random_string(values, rng)) for key in others]
        for depth, needle in zip(reversed(depths), reversed(needles), strict=True):
            sentences.insert(int(depth * (num_units + 1)), needle)
        context = "\n".join(sentences)
    queries = [names[index] for index in asked]
    query = ", ".join(queries[:-1]) + ", and " + queries[-1] if len(queries) > 1 else queries[0]
    outputs = tuple(value for index in asked for value in groups[index])
    template, kind = (NIAH_ONE, values[:-1]) if len(outputs) == 1 else (NIAH_MANY, values)
    return Sample(template.format(kind=kind, context=context, query=query), outputs)


def tracking_question(rng: random.Random, num_units: int, *, name_length: int, num_hops: int = 4) -> Sample:
    """One chain of assignments in order, at random depths of the noise; all its variables are asked for."""
    names = distinct(lambda: "".join(rng.choices(string.ascii_uppercase, k=name_length)), num_hops + 1)
    value = str(rng.randint(10000, 99999))
    sources = [value, *(f"VAR {name}" for name in names)]
    chain = [f"VAR {name} = {source}" for name, source in zip(names, sources, strict=False)]
    sentences = [NOISE] * num_units
    depths = sorted(rng.random() for _ in chain)
    for depth, line in zip(reversed(depths), reversed(chain), strict=True):
        sentences.insert(int(depth * (num_units + 1)), line)
    return Sample(TRACKING.format(context="\n".join(sentences), query=value, num=num_hops + 1), tuple(names))


def build_tracking(rng: random.Random, num_units: int, length: int, text: TextHaystack | None) -> Sample:
    """A solved example with short names, then the question. Units are noise sentences."""
    example = tracking_question(rng, 5 if length >= LONG else 1, name_length=3)
    asked = tracking_question(rng, num_units, name_length=5)
    return Sample(f"{example.prompt} {' '.join(example.outputs)}\n\n{asked.prompt}", asked.outputs)


def common_words_question(rng: random.Random, num_words: int, num_common: int, num_uncommon: int) -> Sample:
    """`num_words` different words in a shuffled list: ten of them `num_common` times, the rest `num_uncommon` times."""
    # Plain words as long as there are enough; any of them may be common, so that their form gives nothing away.
    words = rng.sample(ADJECTIVES + NOUNS, min(num_words, NUM_PLAIN))
    words += distinct(partial(compound, rng), num_words - len(words))
    rng.shuffle(words)
    listed = words[:10] * num_common + words[10:] * num_uncommon
    rng.shuffle(listed)
    return Sample(COMMON_WORDS.format(context=numbered(listed)), tuple(words[:10]))


def numbered(words: Sequence[str]) -> str:
    return " ".join(f"{number}. {word}" for number, word in enumerate(words, start=1))


def build_common_words(rng: random.Random, num_units: int, length: int, text: TextHaystack | None) -> Sample:
    """A solved example, then the question. Units are different words; below 4096 tokens words repeat less."""
    example = common_words_question(rng, *((40, 10, 3) if length >= LONG else (20, 3, 1)))
    asked = common_words_question(rng, num_units, *((30, 3) if length >= LONG else (6, 1)))
    return Sample(f"{example.prompt} {numbered(example.outputs)}\n{asked.prompt}", asked.outputs)


def build_frequent_words(rng: random.Random, num_units: int, length: int, text: TextHaystack | None) -> Sample:
    """Coded words with frequencies of a zeta distribution (alpha 2), the most frequent one blanked to dots.

    Units are words of the text; the three next ones are asked for. From 60 words on no two of them tie, nor the
    last of them with the rest.
    """
    coded = distinct(lambda: "".join(rng.choices(string.ascii_lowercase, k=6)), max(8, length // 50))
    counts = [int(num_units * 6 / math.pi**2 / rank**2) for rank in range(1, len(coded) + 1)]
    words = [word for word, count in zip(["...", *coded[1:]], counts, strict=True) for _ in range(count)]
    rng.shuffle(words)
    return Sample(FREQUENT_WORDS.format(context=" ".join(words)), tuple(coded[1:4]))


@dataclass(frozen=True)
class RulerTask:
    """One task. build: (rng, number of units, length in tokens, user's text) -> Sample, longer with more units.

    max_new_tokens: room for the answer, RULER's. haystack: noise, needles, or text (RULER's essays, for
    which the user's own text stands); words for the tasks without one.
    """

    build: Callable[[random.Random, int, int, TextHaystack | None], Sample]
    description: str
    max_new_tokens: int = 128
    haystack: str = "noise"
    needs_text: bool = False
    min_units: int = 1
    max_units: int | None = None


# From this length in tokens on the lists are those of the paper.
LONG = 4096
NUM_PLAIN = len(ADJECTIVES) + len(NOUNS)
# Of the pairs of words; the last ones would take long to find.
MOST_COMPOUNDS = len(ADJECTIVES) * len(NOUNS) * 9 // 10


def niah(description: str, *, needs_text: bool = False, **options) -> RulerTask:
    haystack = options.get("haystack", "noise")
    is_limited = haystack == "needles" and options.get("keys", "words") == "words"
    limit = MOST_COMPOUNDS if is_limited else None
    build = partial(build_niah, **options)
    return RulerTask(build, description, haystack=haystack, needs_text=needs_text, max_units=limit)


TASKS: dict[str, RulerTask] = {
    "niah_single_1": niah("one number in repeated noise"),
    "niah_single_2": niah("one number in your text", haystack="text", needs_text=True),
    "niah_single_3": niah("one UUID in your text", haystack="text", needs_text=True, values="uuids"),
    "niah_multikey_1": niah("one of 4 keys is asked for", haystack="text", num_keys=4),
    "niah_multikey_2": niah("one key among needles only", haystack="needles"),
    "niah_multikey_3": niah("one UUID key among needles only", haystack="needles", keys="uuids", values="uuids"),
    "niah_multivalue": niah("all 4 values of one key", haystack="text", num_values=4),
    "niah_multiquery": niah("the values of 4 keys", haystack="text", num_keys=4, num_queries=4),
    "vt": RulerTask(build_tracking, "variable tracking: a chain of 5 assignments", 30),
    "cwe": RulerTask(build_common_words, "the 10 common words of a list", 120, "words", min_units=20,
                     max_units=NUM_PLAIN + MOST_COMPOUNDS),
    "fwe": RulerTask(build_frequent_words, "the 3 most frequent coded words", 50, "words", min_units=60),
}  # fmt: skip


def default_tasks(*, has_text: bool) -> list[str]:
    """All tasks that can be made, with or without a text of the user."""
    return [name for name, task in TASKS.items() if has_text or not task.needs_text]


def check_tasks(names: Sequence[str], *, has_text: bool) -> None:
    """ValueError for a task whose haystack is missing; names that are not RULER's are left alone."""
    for name in names:
        if name in TASKS and TASKS[name].needs_text and not has_text:
            raise ValueError(
                f"--tasks {name}: its haystack are essays, which are not part of this repository; give text files of "
                "your own with --haystack, or take niah_single_1"
            )


def describe_tasks() -> str:
    """A line per task for the user: name, what it asks, haystack, tokens for the answer."""
    haystacks = {"noise": "noise", "needles": "needles", "words": "-", "text": "--haystack, or noise"}
    rows = [
        (name, task.description, "--haystack" if task.needs_text else haystacks[task.haystack], task.max_new_tokens)
        for name, task in TASKS.items()
    ]
    return text_table(("task", "what is asked for", "haystack", "answer tokens"), rows, num_left=3)
