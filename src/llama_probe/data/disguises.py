"""Disguises of a text: its letters change, and people still read it. One table serves training rows and `evaluate --attacks`."""

from __future__ import annotations

import re
import string
import unicodedata
from collections.abc import Callable
from types import MappingProxyType

import numpy as np


Disguise = Callable[[str, np.random.Generator], str]

# Letters that look like Latin ones, as pairs, from Unicode's confusables.txt.
CYRILLIC_LOOK_ALIKES = (
    "аa сc ԁd еe ҽe һh іi јj ӏl оo рp ԛq ѕs ѵv ԝw хx уy үy АA ВB СC ЕE ԌG НH ІI ӀI ЈJ КK МM ОO РP ЅS ТT ѴV ԜW ХX УY ҮY"
)
GREEK_LOOK_ALIKES = "αa ιi ϳj οo ρp υu νv γy ΑA ΒB ΕE ΗH ΙI ͿJ ΚK ΜM ΝN ΟO ΡP ΤT ΧX ΥY ΖZ"
_LEET = "a4 e3 i1 o0 s5 t7 A4 E3 I1 O0 S5 T7"
_CYRILLIC_SOUNDS = "shш chч thт aа bб cк dд eе fф gг hх iи jж kк lл mм nн oо pп qк rр sс tт uу vв wв xх yй zз"
_LATIN_SOUNDS = (
    "аa бb вv гg дd еe ёyo жzh зz иi йy кk лl мm нn оo пp рr сs тt уu фf хkh цts чch шsh щshch ъ ыy ь эe юyu яya"
)
_SMALL_CAPITALS = "aᴀ bʙ cᴄ dᴅ eᴇ fꜰ gɢ hʜ iɪ jᴊ kᴋ lʟ mᴍ nɴ oᴏ pᴘ rʀ sꜱ tᴛ uᴜ vᴠ wᴡ yʏ zᴢ"
_KEYBOARD = ("qwertyuiop", "asdfghjkl", "zxcvbnm")
_ZERO_WIDTH = ("\u200b", "\u200c", "\u200d", "\u2060", "\ufeff")
_SLIPS = 0.08  # of the letters
_HIDDEN = 0.3  # of the gaps between characters that get a zero-width character
_LETTERS = string.ascii_letters
_DISGUISED_IN_CYRILLIC = "aceiopxyACEHIKMOPTXS"  # the letters that look the same in most fonts


def by_first(pairs: str) -> dict[int, str]:
    """Return a table for `str.translate` from pairs of characters with blanks between the pairs."""
    return {ord(pair[0]): pair[1] for pair in pairs.split()}


def _swapped(pairs: str) -> dict[int, str]:
    """Return `by_first` in the other direction. Of several pairs with the same second character the first one counts."""
    return {ord(pair[1]): pair[0] for pair in reversed(pairs.split())}


def _chosen(table: dict[int, str], letters: str) -> dict[int, str]:
    return {ord(letter): table[ord(letter)] for letter in letters}


def _mapped(table: dict[int, str]) -> Disguise:
    return lambda text, _rng: text.translate(table)


def _alphabet(capital: int, small: int, digit: int | None = None) -> Disguise:
    """Return a disguise in another alphabet of Unicode, which is given by the code points of its first characters."""
    table = {ord(letter): chr(capital + place) for place, letter in enumerate(string.ascii_uppercase)}
    table |= {ord(letter): chr(small + place) for place, letter in enumerate(string.ascii_lowercase)}
    if digit is not None:
        table |= {ord(letter): chr(digit + place) for place, letter in enumerate(string.digits)}
    return _mapped(table)


def _spaced(text: str, _rng: np.random.Generator) -> str:
    return " ".join(text)


def _hyphens(text: str, _rng: np.random.Generator) -> str:
    return re.sub(r"(?<=\w)(?=\w)", "-", text)


def _zero_width(text: str, rng: np.random.Generator) -> str:
    hidden = rng.choice(_ZERO_WIDTH, len(text))
    is_hidden = rng.random(len(text)) < _HIDDEN
    return "".join(letter + mark * bool(one) for letter, mark, one in zip(text, hidden, is_hidden, strict=True))


def _capitals(text: str, _rng: np.random.Generator) -> str:
    return text.upper()


def _mixed_case(text: str, rng: np.random.Generator) -> str:
    is_upper = rng.random(len(text)) < 0.5
    return "".join(letter.upper() if upper else letter.lower() for letter, upper in zip(text, is_upper, strict=True))


def _keyboard_slips(text: str, rng: np.random.Generator) -> str:
    """Leave letters out, double them, swap them with the next character, or hit a neighbour on the keyboard."""
    letters = list(text)
    for place in np.flatnonzero(rng.random(len(text)) < _SLIPS):
        letter = text[place]
        if letter not in _LETTERS:
            continue
        way = rng.integers(4)
        if way == 0:
            letters[place] = ""
        elif way == 1:
            letters[place] = letter * 2
        elif way == 2 and place + 1 < len(text):
            letters[place : place + 2] = letters[place + 1], letters[place]
        else:
            letters[place] = _neighbour(letter, rng)
    return "".join(letters)


def _neighbour(letter: str, rng: np.random.Generator) -> str:
    row = next(row for row in _KEYBOARD if letter.lower() in row)
    place = row.index(letter.lower())
    beside = row[max(place - 1, 0) : place] + row[place + 1 : place + 2]
    other = beside[int(rng.integers(len(beside)))]
    return other.upper() if letter.isupper() else other


def _transliterated(text: str, _rng: np.random.Generator) -> str:
    """Write Latin letters in Cyrillic ones by their sound; a text with Cyrillic letters is written in Latin ones."""
    if re.search("[а-яё]", text, flags=re.IGNORECASE):
        sounds = {pair[0]: pair[1:] for pair in _LATIN_SOUNDS.split()}
    else:
        sounds = {pair[:-1]: pair[-1] for pair in _CYRILLIC_SOUNDS.split()}
    return re.sub("|".join(sounds), lambda match: _like(match[0], sounds[match[0].lower()]), text, flags=re.IGNORECASE)


def _like(letters: str, others: str) -> str:
    """Return letters that begin with a capital if the letters that they replace do."""
    return others[:1].upper() + others[1:] if letters[:1].isupper() else others


def _with_marks(text: str, rng: np.random.Generator) -> str:
    marks = [chr(code) for code in range(0x300, 0x370) if unicodedata.combining(chr(code))]
    return "".join(letter + "".join(rng.choice(marks, 2)) if letter.isalpha() else letter for letter in text)


def _reversed_words(text: str, _rng: np.random.Generator) -> str:
    return re.sub(r"\w+", lambda match: match[0][::-1], text)


# Disguises from which heads may learn, by the augmentation `disguise`.
LEARNED: MappingProxyType[str, Disguise] = MappingProxyType(
    {
        "spaced": _spaced,
        "leetspeak": _mapped(by_first(_LEET)),
        "Cyrillic look-alikes": _mapped(_chosen(_swapped(CYRILLIC_LOOK_ALIKES), _DISGUISED_IN_CYRILLIC)),
        "full width": _mapped({code: chr(code + 0xFEE0) for code in range(0x21, 0x7F)}),
        "bold of Unicode": _alphabet(0x1D400, 0x1D41A, 0x1D7CE),
        "zero-width characters": _zero_width,
        "capitals": _capitals,
        "mixed case": _mixed_case,
        "keyboard slips": _keyboard_slips,
        "transliterated": _transliterated,
    }
)
# Disguises from which no head learns: how well heads find these tells how they take to unknown ones.
HELD_OUT: MappingProxyType[str, Disguise] = MappingProxyType(
    {
        "hyphens between letters": _hyphens,
        "Greek look-alikes": _mapped(_swapped(GREEK_LOOK_ALIKES)),
        "monospace of Unicode": _alphabet(0x1D670, 0x1D68A, 0x1D7F6),
        "circled": _alphabet(0x24B6, 0x24D0),
        "small capitals": _mapped(by_first(_SMALL_CAPITALS)),
        "combining marks": _with_marks,
        "reversed words": _reversed_words,
    }
)


def disguised(text: str, name: str, rng: np.random.Generator) -> str:
    """Return a text in a disguise of `LEARNED` or `HELD_OUT`. Characters that the disguise does not know stay."""
    return (LEARNED.get(name) or HELD_OUT[name])(text, rng)
