"""PDF: lines with places become paragraphs, cut words whole ones, and repeated edges go."""

import pytest
from test_documents import PROSE, pdf_bytes

from longqlora.data.documents import read_document
from longqlora.data.pdf_text import Line, edge_keys, join_pages, without_edges


def test_pdf_paragraphs_words_and_edges(tmp_path):
    pages = []
    for number in range(1, 5):
        lines = [
            "Minutes of the Council",
            "",
            f"{number}: {PROSE[:60]}",
            "The river house was built for interna-",
            "tional visitors.",
        ]
        lines += ["", f"Chapter {number}", "Name Age", f"Ann {number * 10}", "", f"Page {number} of 4"]
        pages.append(lines)
    (tmp_path / "minutes.pdf").write_bytes(pdf_bytes(pages))
    document = read_document(tmp_path / "minutes.pdf")
    assert (document.title, document.format, document.num_pages) == ("minutes", "pdf", 4)
    page = "{0}: {1} The river house was built for international visitors.\n\nChapter {0}\nName Age\nAnn {0}0"
    assert document.text == "\n\n".join(page.format(number, PROSE[:60].strip()) for number in range(1, 5))


def line(text, y, x=72.0, size=10.0):
    return Line(text, x, y, size)


def test_pdf_lines_are_joined_only_where_the_margin_broke_them():
    words = "a line of running text that is as long as the others"
    page = [line(words, 700 - 12 * number) for number in range(6)]
    assert join_pages([page]) == " ".join([words] * 6)
    assert join_pages([[*page, line("short", 628)], [line("then more", 700)]]).endswith(f"{words} short\nthen more")
    assert join_pages([[*page, line("It ends.", 628)], [line("then", 700)]]).endswith("It ends.\n\nthen")
    gap = [*page, line(words, 700 - 6 * 12 - 8)]
    assert join_pages([gap]).count("\n\n") == 1, "a gap above"
    indented = [line(f"{words}.", 640), line(words, 628, x=87), line(words, 616)]
    assert join_pages([indented]) == f"{words}.\n\n{words} {words}"
    assert "\n\n" not in join_pages([[line(words, 640), line(words, 628, x=87)]]), "no full stop before it"
    assert join_pages([[line("Heading", 640, size=16), line(words, 626)]]) == f"Heading\n\n{words}"
    assert join_pages([[line("漢字" * 20, 640), line("仮名" * 20, 628)]]) == "漢字" * 20 + "仮名" * 20
    assert join_pages([[line("Ann 3", 640), line("Bob 4", 628)]]) == "Ann 3\nBob 4"


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ("an exam-", "ple of it", "an example of it"),
        ("a well-", "known man; well-known", "a well-known man; well-known"),
        ("a re-", "do; redo, re-do", "a redo; redo, re-do"),
        ("state-of-the-", "art", "state-of-the-art"),
        ("Jean-", "Paul", "Jean-Paul"),
        ("COVID-", "19", "COVID-19"),
        ("a dash -", "then", "a dash -\nthen"),
    ],
)
def test_pdf_words_cut_at_the_end_of_a_line(first, second, expected):
    assert join_pages([[line(first, 640), line(second, 628)]]) == expected
    assert join_pages([[line(first, 640)], [line(second, 700)]]).replace("\n\n", "\n") == expected


def test_pdf_edges_that_are_no_headers_stay():
    body = [line(f"body {name}", 600 - 12 * index) for index, name in enumerate("abcd")]
    chapters = [[line(f"Chapter {number}", 700), *body[:1]] for number in range(1, 4)]
    assert [page[0].text for page in without_edges(chapters)] == ["Chapter 1", "Chapter 2", "Chapter 3"]
    same = [[line("All the same", 700)]] * 4
    assert without_edges(same) == same, "a page is never emptied"
    two = [[line("Head", 700), *body]] * 2
    assert without_edges(two) == two, "two pages are too few to tell"
    middle = [[line(f"{number} {name}", 700) for name in "abcd"] for number in range(3)]
    inner = [[*page[:2], line("refrain", 1), *page[2:]] for page in middle]
    assert all(line("refrain", 1) in page for page in without_edges(inner)), "not at an edge"
    refrain = [[line(f"start {number}", 712), line("refrain", 700), *body[: number + 1]] for number in range(4)]
    assert without_edges(refrain) == refrain, "behind a line that stays"
    texts = [[line(f"{name} {number}", 600) for name in "abcd"] for number in "pqrstu"]
    heads = ["2 The Author", "Book", "4 The Author", "Book", "6 The Author", "Book"]
    assert without_edges([[line(head, 700), *text] for head, text in zip(heads, texts, strict=True)]) == texts
    assert edge_keys("x" * 200, 1) == set() and edge_keys("- 7 -", 7) & edge_keys("- 9 -", 9)
