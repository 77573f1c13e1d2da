"""What RULER's tasks are written with: the prompts, words for keys and lists, and a user's text as a haystack.

The prompts are the protocol of RULER (arXiv 2404.06654), quoted to the letter as lm-evaluation-harness 0.4.13 has
them (lm_eval/tasks/ruler), so that a model meets the same question; the words are ours. Pure Python.
"""

import re
from bisect import bisect_right
from functools import cached_property

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
