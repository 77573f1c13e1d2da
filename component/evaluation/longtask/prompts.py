"""Prompts of long tasks, fitted to the context.

A text that is too long loses its middle and keeps head and tail in equal parts, as in LongBench (arXiv 2308.14508,
section 4.1); question, options and examples are never cut.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from longqlora.data.prompt import encode_text
from longqlora.evaluation.longtask.questions import Question
from longqlora.evaluation.longtask.scores import OPTION_LETTERS
from longqlora.inference.generation import encode_prompt

CHOICE_REQUEST = "Answer with the letter of the right option."
QUESTION_LEAD, ANSWER_LEAD = "Question: ", "Answer:"


@dataclass(frozen=True)
class PromptForm:
    """How prompts are made. template: of `encode_prompt`; max_new_tokens is kept free in context_size (tokens)."""

    tokenizer: Any
    template: str
    context_size: int
    max_new_tokens: int
    shots: Sequence[Question] = ()
    num_shots: int = 0

    @property
    def room(self) -> int:
        """Most tokens that a prompt may have."""
        return self.context_size - self.max_new_tokens

    def shots_for(self, task: Question) -> list[Question]:
        """The first `num_shots` examples that are not the question itself."""
        others = [shot for shot in self.shots if (shot.context, shot.question) != (task.context, task.question)]
        return others[: self.num_shots]

    def check(self, task: Question) -> None:
        """Raise ValueError where examples are missing, or the prompt is too long even without its context."""
        shots = self.shots_for(task)
        if len(shots) < self.num_shots:
            raise ValueError(
                f"--num_shots {self.num_shots}: --shots_file has {len(self.shots)} examples, and none may be the "
                "question itself; give more or lower --num_shots"
            )
        num_tokens = len(encode_prompt(self.tokenizer, prompt_text(task, "", shots), template=self.template))
        if num_tokens >= self.room:
            examples = f" and {len(shots)} examples" if shots else ""
            raise ValueError(
                f"question {task.id} of {task.task}: question, options{examples} make {num_tokens} tokens, but "
                f"{self.room} fit in the context of {self.context_size} beside --max_new_tokens {self.max_new_tokens}; "
                "raise --context_size, or lower --max_new_tokens or --num_shots"
            )

    def fit(self, task: Question) -> tuple[list[int], int, int]:
        """Ids of a checked question with the context that fits; tokens of the whole context, and how many were cut."""
        shots, context_ids = self.shots_for(task), encode_text(self.tokenizer, task.context)
        num_kept, context = len(context_ids), task.context
        while True:
            ids = encode_prompt(self.tokenizer, prompt_text(task, context, shots), template=self.template)
            num_over = len(ids) - self.room
            if num_over <= 0:
                return ids, len(context_ids), len(context_ids) - num_kept
            # Tokens at the new seam may split in two, so that one cut may not be enough.
            num_kept = max(0, num_kept - num_over)
            context = without_middle(self.tokenizer, context_ids, num_kept)


def question_block(task: Question, context: str, *, is_asked: bool) -> str:
    """Context, own examples, question, options and the place of the answer; with `is_asked` False the answer too."""
    examples = [f"{QUESTION_LEAD}{question.strip()}\n{ANSWER_LEAD} {answer}" for question, answer in task.examples]
    lines = [f"{QUESTION_LEAD}{task.question.strip()}"] if task.question.strip() else []
    lines += [f"({letter}) {option}" for letter, option in zip(OPTION_LETTERS, task.options, strict=False)]
    lines += [CHOICE_REQUEST] if task.options else []
    lines.append(ANSWER_LEAD if is_asked else f"{ANSWER_LEAD} {task.right_letter or task.references[0]}")
    return "\n\n".join([*filter(None, [context.strip()]), *examples, "\n".join(lines)])


def prompt_text(task: Question, context: str, shots: Sequence[Question]) -> str:
    """The whole prompt: examples, context, question. A text that brings its own question stands alone."""
    if not (task.question.strip() or task.options or task.examples or shots):
        return context
    return "\n\n".join([*(question_block(shot, shot.context, is_asked=False) for shot in shots),
                        question_block(task, context, is_asked=True)])  # fmt: skip


def without_middle(tokenizer, ids: Sequence[int], num_kept: int) -> str:
    """Text of the first and last tokens of `ids`, `num_kept` together."""
    num_head = (num_kept + 1) // 2
    head, tail = (
        tokenizer.decode(part, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        for part in (ids[:num_head], ids[len(ids) - (num_kept - num_head) :])
    )
    # A character of several tokens may have been cut.
    return head.rstrip("\ufffd") + tail.lstrip("\ufffd")
