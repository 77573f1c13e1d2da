"""RULER's synthetic tasks that need no download: what a sample asks, and how it is written.

    sample = TASKS["vt"].build(random.Random(0), 40, 4096, None)       # Sample(prompt, outputs)

After RULER (arXiv 2404.06654, section 3 and its appendix on task templates): tasks, counts and answer lengths are the
paper's. The prompts are quoted to the letter as lm-evaluation-harness 0.4.13 has them (lm_eval/tasks/ruler), so that a
model meets the same question. Keys and list words are compounds of words of ours instead of a word package's. A sample
grows with its number of units: noise sentences, distractors, pieces of text, list words.
"""

import math
import random
import re
import string
import uuid
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial

from longqlora.table import text_table

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
NEEDLE = "One of the special magic {kind} for {key} is: {value}."
NIAH_MANY = (
    "Some special magic {kind} are hidden within the following text. Make sure to memorize it. I will quiz you about "
    "the {kind} afterwards.\n{context}\nWhat are all the special magic {kind} for {query} mentioned in the provided "
    "text? The special magic {kind} for {query} mentioned in the provided text are"
)
NIAH_ONE = (
    "A special magic {kind} is hidden within the following text. Make sure to memorize it. I will quiz you about the "
    "{kind} afterwards.\n{context}\nWhat is the special magic {kind} for {query} mentioned in the provided text? The "
    "special magic {kind} for {query} mentioned in the provided text is"
)
# "assgined" is the benchmark's spelling.
TRACKING = (
    "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n{context}\nQuestion: "
    "Find all variables that are assigned the value {query} in the text above. Answer: According to the chain(s) of "
    "variable assignment in the text above, {num} variables are assgined the value {query}, they are:"
)
COMMON_WORDS = (
    "Below is a numbered list of words. In these words, some appear more often than others. Memorize the ones that "
    "appear most often.\n{context}\nQuestion: What are the 10 most common words in the above list? Answer: The top "
    "10 words that appear most often in the list are:"
)
FREQUENT_WORDS = (
    "Read the following coded text and track the frequency of each coded word. Find the three most frequently "
    "appeared coded words. {context}\nQuestion: Do not provide any explanation. Please ignore the dots '....'. What "
    "are the three most frequently appeared words in the above coded text? Answer: According to the coded text "
    "above, the three most frequently appeared words are:"
)

ADJECTIVES = (
    "able amber ample arid azure blunt bold brave brief bright brisk broad bronze calm clean clear clever cold cool "
    "crisp curly damp dark deep dense distant dry dusty eager early even faint fair fancy fast fierce fine firm flat "
    "fluffy fresh full gentle giant glad golden grand gray great green happy hardy heavy hidden hollow honest humble "
    "icy ivory jolly keen kind large late lazy light little lively lone loud loyal lucky mellow mighty mild modern "
    "narrow neat noble novel odd olive pale patient plain polite proud pure quick quiet rapid rare ready red rich "
    "ripe round royal rusty scarlet shiny silent silver simple slim smooth soft solid steady steep stern sturdy sunny "
    "sweet swift tall tame tender thin tidy tiny true vast vivid warm wide wild wise witty young"
).split()
NOUNS = (
    "acorn anchor apple arch arrow atlas badge bamboo banjo barn basin basket beach beacon beaver bell bench bird "
    "blanket boat bottle branch bread brick bridge brook broom brush bucket button cabin cable camel camera canal "
    "candle canoe canyon carpet castle cedar cellar chain chair chalk chapel cherry chest circle cliff clock cloud "
    "clover coal coast cobra coin comet compass copper coral corner cottage cotton crane crater creek cricket crown "
    "crystal cup curtain daisy dam desert desk dial dolphin donkey door dove dragon drum eagle easel elbow ember "
    "engine falcon farm feather fence fern ferry field finch flag flame flute forest forge fossil fountain fox frame "
    "garden gate geyser ginger glacier glove goat goose grape guitar hammer harbor harp hawk hazel helmet hill honey "
    "hook horn house island jacket jaguar jar jungle kettle kite ladder lagoon lake lamp lantern leaf lemon lens lily "
    "lion lizard llama lobster magnet mango maple marble market meadow melon mill mirror monkey moon moss motor "
    "mountain mule museum needle nest oak oasis ocean onion orange orchard otter oven owl paddle palace panda panther "
    "paper parrot path peach pear pebble pencil pepper piano pigeon pillow pine planet plate plum pocket pond pony "
    "poplar prairie puzzle quail quarry quilt rabbit raft raven reef ribbon river robin rocket roof rope rose saddle "
    "sail salmon sand scarf shell ship shore shovel sparrow spider spoon spruce stable statue stone stork storm "
    "stream sugar summit swan table temple tiger timber torch tower train tree trumpet tulip tunnel turtle valley "
    "vase village violin wagon walnut walrus whale wheel willow window wolf zebra"
).split()
# From this length in tokens on the lists are those of the paper.
LONG = 4096
# Of a chain of assignments.
NUM_HOPS = 4
NUM_PLAIN = len(ADJECTIVES) + len(NOUNS)
# Of the pairs of words; the last ones would take long to find.
MOST_COMPOUNDS = len(ADJECTIVES) * len(NOUNS) * 9 // 10


@dataclass(frozen=True)
class Sample:
    """A prompt, raw text that the answer continues, and the strings that the answer should hold."""

    prompt: str
    outputs: tuple[str, ...]


class TextHaystack:
    """A user's own text as a haystack: pieces of it, over again from the start where it is too short."""

    def __init__(self, text: str):
        # Pieces are short even in scripts without spaces, and joined they are the text again.
        self.pieces = re.findall(r"\S{1,16} ?", " ".join(text.split()) + " ")

    @cached_property
    def ends(self) -> list[int]:
        """Numbers of pieces after which a sentence ends, counted from the start of the text."""
        final = re.compile(r"[.!?。！？…][\"'”’)]? $|[。！？…]$")
        return [number for number, piece in enumerate(self.pieces, start=1) if final.search(piece)]

    def place(self, position: int) -> int:
        """The last end of a sentence at or before `position` pieces; `position` where the text has none."""
        if not self.ends:
            return position
        num_rounds, rest = divmod(position, len(self.pieces))
        index = bisect_right(self.ends, rest)
        return num_rounds * len(self.pieces) + (self.ends[index - 1] if index else 0)

    def span(self, start: int, end: int) -> str:
        return "".join(self.pieces[number % len(self.pieces)] for number in range(start, end)).strip()


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


def scattered(lines: Sequence[str], depths: Sequence[float], sentences: Sequence[str]) -> str:
    """The sentences, a line each, with `lines` between them: in order, each at its depth (0 .. 1, ascending)."""
    found = list(sentences)
    for depth, line in zip(reversed(depths), reversed(lines), strict=True):
        found.insert(int(depth * (len(sentences) + 1)), line)
    return "\n".join(found)


def build_niah(
    rng: random.Random,
    num_units: int,
    length: int,
    text: TextHaystack | None,
    *,
    haystack: str,
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
        context = scattered(needles, depths, sentences)
    queries = [names[index] for index in asked]
    query = ", ".join(queries[:-1]) + ", and " + queries[-1] if len(queries) > 1 else queries[0]
    outputs = tuple(value for index in asked for value in groups[index])
    template, kind = (NIAH_ONE, values[:-1]) if len(outputs) == 1 else (NIAH_MANY, values)
    return Sample(template.format(kind=kind, context=context, query=query), outputs)


def tracking_question(rng: random.Random, num_units: int, *, name_length: int) -> Sample:
    """One chain of assignments in order, at random depths of the noise; all its variables are asked for."""
    names = distinct(lambda: "".join(rng.choices(string.ascii_uppercase, k=name_length)), NUM_HOPS + 1)
    value = str(rng.randint(10000, 99999))
    sources = [value, *(f"VAR {name}" for name in names)]
    chain = [f"VAR {name} = {source}" for name, source in zip(names, sources, strict=False)]
    context = scattered(chain, sorted(rng.random() for _ in chain), [NOISE] * num_units)
    return Sample(TRACKING.format(context=context, query=value, num=NUM_HOPS + 1), tuple(names))


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
    max_units: float = math.inf


def niah(description: str, haystack: str, *, needs_text=False, max_units=math.inf, **options) -> RulerTask:
    build = partial(build_niah, haystack=haystack, **options)
    return RulerTask(build, description, haystack=haystack, needs_text=needs_text, max_units=max_units)


TASKS: dict[str, RulerTask] = {
    "niah_single_1": niah("one number in repeated noise", "noise"),
    "niah_single_2": niah("one number in your text", "text", needs_text=True),
    "niah_single_3": niah("one UUID in your text", "text", needs_text=True, values="uuids"),
    "niah_multikey_1": niah("one of 4 keys is asked for", "text", num_keys=4),
    "niah_multikey_2": niah("one key among needles only", "needles", max_units=MOST_COMPOUNDS),
    "niah_multikey_3": niah("one UUID key among needles only", "needles", keys="uuids", values="uuids"),
    "niah_multivalue": niah("all 4 values of one key", "text", num_values=4),
    "niah_multiquery": niah("the values of 4 keys", "text", num_keys=4, num_queries=4),
    "vt": RulerTask(build_tracking, "variable tracking: a chain of 5 assignments", 30),
    "cwe": RulerTask(build_common_words, "the 10 common words of a list", 120, "words", min_units=20,
                     max_units=NUM_PLAIN + MOST_COMPOUNDS),
    "fwe": RulerTask(build_frequent_words, "the 3 most frequent coded words", 50, "words", min_units=60),
}  # fmt: skip


def describe_tasks() -> str:
    """A line per task for the user: name, what it asks, haystack, tokens for the answer."""
    haystacks = {"words": "-", "text": "--haystack, or noise"}
    rows = []
    for name, task in TASKS.items():
        haystack = "--haystack" if task.needs_text else haystacks.get(task.haystack, task.haystack)
        rows.append((name, task.description, haystack, task.max_new_tokens))
    return text_table(("task", "what is asked for", "haystack", "answer tokens"), rows, num_left=3)
