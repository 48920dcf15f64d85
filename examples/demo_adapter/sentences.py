"""Sentences of a small grammar: "The nurse carries the lamp every day.", and what the experts make of them.

The word lists are this project's own; the inflections are lemminflect's (MIT).
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from words import choose_split, list_words

PEOPLE = list_words(
    "nurse teacher farmer pilot baker lawyer doctor sailor student painter driver gardener singer actor "
    "plumber waiter judge chef clerk artist builder butcher carpenter cleaner dancer dentist designer "
    "editor engineer florist guard guest hunter janitor jeweler king queen librarian manager mechanic "
    "merchant minister monk musician neighbor officer poet porter potter priest prince professor ranger "
    "reporter sculptor soldier surgeon tailor tenant tourist traveler visitor weaver widow writer uncle "
    "aunt nephew niece boy girl child woman worker barber banker captain"
)
THINGS = list_words(
    "box lamp chair table bottle basket ladder camera clock guitar piano mirror kettle pillow blanket "
    "carpet statue vase painting bicycle suitcase umbrella hammer bucket candle drum violin helmet "
    "jacket shirt coat boot hat ring necklace letter book map parcel package plate bowl cup spoon knife "
    "oven stove door window curtain desk sofa shelf cabinet drawer barrel crate cart wagon boat kite "
    "doll puppet toy ball rope tent flag poster ticket wallet purse bag sack lantern engine wheel motor "
    "pump radio telephone printer machine tool brush towel scarf sweater glove medal coin stone cushion "
    "mug jar tray tractor truck"
)
ACTIONS = list_words(
    "clean carry paint repair buy sell move lift wash inspect photograph draw hide find lose steal "
    "break keep bring hold choose describe examine remove return send deliver weigh admire sketch wrap "
    "polish drop throw catch take want watch remember mention order store touch measure collect display "
    "borrow replace protect cover rent design build test study use push pull drag guard check count "
    "need notice prepare receive recommend reject restore save see share show sort spot support trade "
    "treasure unload value adjust assemble arrange decorate destroy dust forget hate ignore like lock "
    "love name pack pick place possess praise rescue search select seize ship squeeze stack tie trust "
    "turn deserve discover"
)
TAILS = ("", "", " every day", " in the morning", " at home", " on Sundays")
DETERMINERS = ("the", "the", "this", "that", "my", "our")
_PLURAL_DETERMINER = {"this": "these", "that": "those"}


@dataclass(frozen=True)
class Noun:
    """A noun phrase: determiner, word, number."""

    determiner: str
    word: str
    plural: bool

    def __str__(self) -> str:
        return f"{self.determiner} {self.word}"

    @property
    def be(self) -> str:
        return "are" if self.plural else "is"

    @property
    def do(self) -> str:
        return "do" if self.plural else "does"


@dataclass(frozen=True)
class Clause:
    """Subject, verb with its forms, object and what follows."""

    subject: Noun
    lemma: str
    third: str
    past: str
    participle: str
    object: Noun
    tail: str

    def agree(self, subject: Noun) -> str:
        """Return the present form that goes with a subject."""
        return self.lemma if subject.plural else self.third


def _start(text: str, mark: str = ".") -> str:
    return text[0].upper() + text[1:] + mark


def write_sentence(c: Clause) -> str:
    """Write the clause in the present tense: what every sentence expert is given."""
    return _start(f"{c.subject} {c.agree(c.subject)} {c.object}{c.tail}")


SENTENCE_TASKS = {
    "negate": lambda c: _start(f"{c.subject} {c.subject.do} not {c.lemma} {c.object}{c.tail}"),
    "question": lambda c: _start(f"{c.subject.do} {c.subject} {c.lemma} {c.object}{c.tail}", "?"),
    "past_sentence": lambda c: _start(f"{c.subject} {c.past} {c.object}{c.tail}"),
    "passive": lambda c: _start(f"{c.object} {c.object.be} {c.participle} by {c.subject}{c.tail}"),
    "swap": lambda c: _start(f"{c.object} {c.agree(c.object)} {c.subject}{c.tail}"),
    "object": lambda c: f"{c.object}",
    "future": lambda c: _start(f"{c.subject} will {c.lemma} {c.object}{c.tail}"),
    "who": lambda c: _start(f"who {c.third} {c.object}{c.tail}", "?"),
}


def draw_clauses(split: str, count: int, families: dict[str, str], seed: int) -> list[Clause]:
    """Draw different clauses whose content words all belong to one split.

    Args:
        split: "train", "valid" or "test".
        count: how many; fewer come back if the split's words allow no more.
        families: lemma -> family, of at least PEOPLE, THINGS and ACTIONS.
        seed: of the splits and of the draw.

    Returns:
        Clauses, no two the same.
    """
    people, things, actions = (
        [w for w in words if choose_split(families[w], seed) == split] for words in (PEOPLE, THINGS, ACTIONS)
    )
    draw = random.Random(f"{seed}:{split}:sentences")
    drawn: dict[str, Clause] = {}
    for _ in range(20 * count):
        clause = _draw_clause(draw, people, things, actions)
        drawn.setdefault(write_sentence(clause), clause)
        if len(drawn) == count:
            break
    return list(drawn.values())


def _draw_clause(draw: random.Random, people: list[str], things: list[str], actions: list[str]) -> Clause:
    lemma = draw.choice(actions)
    return Clause(
        subject=_draw_noun(draw, people),
        lemma=lemma,
        third=_inflect(lemma, "VBZ"),
        past=_inflect(lemma, "VBD"),
        participle=_inflect(lemma, "VBN"),
        object=_draw_noun(draw, things),
        tail=draw.choice(TAILS),
    )


def _draw_noun(draw: random.Random, words: list[str]) -> Noun:
    word, determiner = draw.choice(words), draw.choice(DETERMINERS)
    if draw.random() < 0.3:
        return Noun(_PLURAL_DETERMINER.get(determiner, determiner), _inflect(word, "NNS"), True)
    return Noun(determiner, word, False)


def _inflect(lemma: str, tag: str) -> str:
    import lemminflect

    forms = lemminflect.getInflection(lemma, tag, inflect_oov=False)
    return next((f for f in forms if tag != "NNS" or f != lemma), lemma)
