"""Globs mean what they say, in bounded time; and the tie check knows when two of them can meet."""

import time

from hypothesis import example, given, settings
from hypothesis import strategies as st

from appliance.rules.globs import Glob, Wild

PATTERNS = st.lists(st.sampled_from(["a", "b", "/", "?", "*", "**"]), max_size=7).map("".join)
TEXTS = st.text(alphabet="ab/", max_size=8)


def slowly(glob: Glob, text: str) -> bool:
    """The textbook matcher: every position of the pattern against every position of the text."""
    reach = {0}
    tokens = glob.tokens

    def close(places):
        todo = list(places)
        for place in todo:
            if place < len(tokens) and tokens[place] in (Wild.SEGMENT, Wild.ANY) and place + 1 not in todo:
                todo.append(place + 1)
        return set(todo)

    reach = close(reach)
    for char in text:
        after = set()
        for place in reach:
            token = tokens[place] if place < len(tokens) else None
            separator = glob.is_path and char in "/\\"
            if token is Wild.ANY or (token is Wild.SEGMENT and not separator):
                after.add(place)
            elif token == char or (token is Wild.ONE and not separator):
                after.add(place + 1)
        reach = close(after)
    return len(tokens) in reach


@settings(max_examples=600, deadline=None)
@given(PATTERNS, TEXTS, st.booleans())
@example("**/a*b", "/a/ab", True)
@example("a*b*/c", "abab/c", True)
def test_a_glob_matches_as_the_textbook_says(pattern, text, is_path):
    glob = Glob(pattern, is_path)
    assert glob.matches(text) == slowly(glob, text)
    assert glob.matches(text.upper(), fold=True) == slowly(glob, text)


@settings(max_examples=600, deadline=None)
@given(PATTERNS, PATTERNS, TEXTS, st.booleans())
def test_patterns_that_share_a_text_meet(left, right, text, is_path):
    a, b = Glob(left, is_path), Glob(right, is_path)
    if a.matches(text) and b.matches(text):
        assert a.meets(b)
    assert a.meets(b) == b.meets(a)
    assert a.meets(a)


@settings(max_examples=300, deadline=None)
@given(PATTERNS, TEXTS)
def test_a_literal_meets_exactly_what_matches_it(pattern, text):
    assert Glob(pattern, True).meets(Glob(text, True)) == Glob(pattern, True).matches(text)


def test_nothing_but_wildcards_is_special():
    for text in ("/usr/bin/[", "/a{b}c", "/a.b+c", "/a(b|c)$", "/a\nb"):
        assert Glob(text, True).matches(text)
        assert not Glob(text, True).matches(text + "x")
    assert not Glob("/a.b", True).matches("/axb")


def test_hostile_text_costs_little():
    began = time.process_time()
    for pattern in ("*a*a*a*a*a*b", "**/a*a*a**b*c", "a?*?*?*?b", "**a**a**a**a**b"):
        for text in ("a" * 8000, "/a" * 4000, "a/" * 4000, "/" * 8000):
            for is_path in (True, False):
                Glob(pattern, is_path).matches(text)
    assert time.process_time() - began < 10
