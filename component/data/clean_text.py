"""Text as people read it: one Unicode form, plain spaces, no invisible characters, one blank line between paragraphs.

Pure: strings in, strings out.
"""

import re
import unicodedata

# NFC leaves these typographic ligatures alone, yet nobody searches for or spells words with them.
LIGATURES = {code: unicodedata.normalize("NFKC", chr(code)) for code in range(0xFB00, 0xFB07)}
# Soft hyphen, zero-width space, word joiner, byte order mark: layout, not text. The zero-width joiners stay, since
# they change the meaning of words in several scripts, and so do tabs and line breaks.
INVISIBLE = dict.fromkeys([0x00AD, 0x200B, 0x2060, 0xFEFF])
CONTROLS = {code: None for code in [*range(0x20), *range(0x7F, 0xA0)] if chr(code) not in "\t\n"}
SPACES = dict.fromkeys([0x00A0, 0x2007, 0x202F], " ")
LINE_BREAKS = re.compile(r"\r\n?|\x0b|\x85|\u2028")
PARAGRAPH_BREAKS = re.compile(r"\f|\u2029")
TRANSLATION = {**CONTROLS, **LIGATURES, **INVISIBLE, **SPACES}


def clean_text(text: str) -> str:
    """`text` in Unicode form NFC, without ligatures, control and invisible characters and trailing spaces.

    Line breaks become \\n, form feeds paragraph breaks, and paragraphs are one blank line apart. Indentation stays.
    """
    text = whole_characters(text)
    text = PARAGRAPH_BREAKS.sub("\n\n", LINE_BREAKS.sub("\n", text))
    text = unicodedata.normalize("NFC", text.translate(TRANSLATION))
    lines = [line.rstrip() for line in text.split("\n")]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip("\n")


def whole_characters(text: str) -> str:
    """`text` with surrogate pairs joined and lone halves, which no encoding can write, as U+FFFD."""
    if not any("\ud800" <= character <= "\udfff" for character in text):
        return text
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def one_line(text: str) -> str:
    """`text` cleaned, on a single line; for titles and cells."""
    return " ".join(clean_text(text).split())
