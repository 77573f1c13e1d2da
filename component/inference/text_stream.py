"""From bytes and token ids to text: UTF-8, incremental decoding, stop strings. Knows nothing of models."""

from collections.abc import Sequence

# Tokens of the prompt decoded along with the answer, so that a first token keeps its leading space.
NUM_PROMPT_TOKENS_DECODED = 4


def decode_utf8(data: bytes, flag: str, path: str) -> str:
    """Text of a file or stream without its byte order mark; `flag` and `path` name it in the ValueError."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{flag}: {path!r} is not UTF-8 text ({error.reason} at byte {error.start})") from None


class StreamDecoder:
    """Turn token ids into text as they arrive.

    A piece is given out once it is whole: bytes of an unfinished character wait for the rest. Ids are
    decoded together with a few before them, since tokenizers drop the leading space of a first token.
    """

    def __init__(self, tokenizer, prompt_ids: Sequence[int]):
        self.tokenizer = tokenizer
        self.ids = list(prompt_ids[-NUM_PROMPT_TOKENS_DECODED:])
        self.start, self.end_given_out = 0, len(self.ids)

    def decode(self, start: int, end: int | None = None) -> str:
        ids = self.ids[start:end]
        return self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def put(self, token_id: int) -> str:
        self.ids.append(token_id)
        return self._give_out(keep_unfinished=True)

    def flush(self) -> str:
        return self._give_out(keep_unfinished=False)

    def _give_out(self, *, keep_unfinished: bool) -> str:
        known, text = self.decode(self.start, self.end_given_out), self.decode(self.start)
        if len(text) <= len(known) or (keep_unfinished and text.endswith("\ufffd")):
            return ""
        self.start, self.end_given_out = self.end_given_out, len(self.ids)
        return text[len(known) :]


class StopStringFilter:
    """Pass text on up to the first stop string; hold back an ending that may become one."""

    def __init__(self, stop: Sequence[str]):
        self.stop = stop
        self.held = ""
        self.is_stopped = False

    def put(self, text: str) -> str:
        self.held += text
        found = [position for position in map(self.held.find, self.stop) if position >= 0]
        if found:
            self.is_stopped = True
            passed, self.held = self.held[: min(found)], ""
            return passed
        num_held = max((self._overlap(stop) for stop in self.stop), default=0)
        split = len(self.held) - num_held
        passed, self.held = self.held[:split], self.held[split:]
        return passed

    def flush(self) -> str:
        passed, self.held = self.held, ""
        return passed

    def _overlap(self, stop: str) -> int:
        longest = min(len(stop) - 1, len(self.held))
        return next((size for size in range(longest, 0, -1) if self.held.endswith(stop[:size])), 0)
