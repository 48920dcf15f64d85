"""Words with their forms, and the families that never cross a split.

Source of the inflections: lemminflect (MIT, https://github.com/bjascob/LemmInflect), dictionary
look-ups only, never its guesses for unknown words.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass

# Left out: inflections that the dictionary gets wrong, and words that are not for a demo.
UNSUITABLE = frozenset({"licence", "practise", "people", "abuse", "rape", "murder", "kill", "sex", "screw", "torture"})


@dataclass(frozen=True)
class Word:
    """One word with the forms that the word tasks ask for; None where it has no undisputed one.

    common: a verb form is a token of the vocabulary, so the verb is in real use.
    """

    lemma: str
    plural: str | None
    past: str | None
    gerund: str | None
    common: bool

    @property
    def complete(self) -> bool:
        return None not in (self.plural, self.past, self.gerund)


def list_words(text: str) -> list[str]:
    """List the words of a text that is easier to read than a list."""
    return text.split()


def find_words(vocabulary: Iterable[str]) -> list[Word]:
    """Find nouns and verbs that are one token of a vocabulary, with their forms.

    A complete word is noun and verb with exactly one plural (a word that may also stay unchanged,
    "fish", keeps its other plural), past and -ing form, all three different from it. Tests take
    complete words only: they make sense for every task. Training takes the others as well, each for
    the tasks that it has forms for.

    Args:
        vocabulary: token strings; a leading "Ġ" stands for a space.

    Returns:
        Words in alphabetical order.
    """
    tokens = frozenset(vocabulary)
    candidates = sorted(t[1:] for t in tokens if t.startswith("Ġ") and _looks_like_word(t[1:]))
    found = []
    for lemma in candidates:
        plural, past, gerund = _inflect(lemma)
        if plural or past:
            found.append(Word(lemma, plural, past, gerund, f"Ġ{past}" in tokens or f"Ġ{gerund}" in tokens))
    return found


def _looks_like_word(text: str) -> bool:
    return text.isascii() and text.isalpha() and text.islower() and 3 <= len(text) <= 10 and text not in UNSUITABLE


def _inflect(lemma: str) -> tuple[str | None, str | None, str | None]:
    """Return (plural, past, -ing form); None where the dictionary is silent or unsure."""
    import lemminflect

    lemmas = lemminflect.getAllLemmas(lemma)
    plural = past = gerund = None
    if lemmas.get("NOUN") == (lemma,):
        plural = _take_only([f for f in lemminflect.getInflection(lemma, "NNS", inflect_oov=False) if f != lemma])
    if lemmas.get("VERB") == (lemma,) and not lemma.endswith("ic"):  # the dictionary says "mimiced"
        past = _take_only(lemminflect.getInflection(lemma, "VBD", inflect_oov=False))
        gerund = _take_only(lemminflect.getInflection(lemma, "VBG", inflect_oov=False))
    past, gerund = (past, gerund) if past and gerund and lemma not in (past, gerund) else (None, None)
    return (plural if plural and plural.endswith("s") else None), past, gerund


def _take_only(forms: Iterable[str]) -> str | None:
    forms = list(forms)
    return forms[0] if len(forms) == 1 and forms[0].isalpha() else None


def list_forms(lemma: str) -> set[str]:
    """List every form of a lemma as noun, verb and adjective, the lemma included."""
    import lemminflect

    forms = {lemma}
    for part in ("NOUN", "VERB", "ADJ"):
        for variants in lemminflect.getAllInflections(lemma, upos=part).values():
            forms.update(variants)
    return forms


def group_families(lemmas: Iterable[str]) -> dict[str, str]:
    """Group lemmas that share any form ("find" and "found", "lie" and "lay") into families.

    Returns:
        lemma -> family name (the family's first lemma in alphabetical order). A family is wholly in
        one split, so no form of a test word occurs in training as a form of another word.
    """
    import lemminflect

    parent: dict[str, str] = {}

    def root(node: str) -> str:
        parent.setdefault(node, node)
        while parent[node] != node:
            parent[node] = parent[parent[node]]
            node = parent[node]
        return node

    lemmas = sorted(set(lemmas))
    for lemma in lemmas:
        related = list_forms(lemma)
        for form in list(related):
            for others in lemminflect.getAllLemmas(form).values():
                related.update(others)
        for other in sorted(related):
            first, second = sorted((root(lemma), root(other)))
            parent[second] = first
    return {lemma: root(lemma) for lemma in lemmas}


def choose_split(key: str, seed: int) -> str:
    """Choose train (75%), valid (5%) or test (20%) for a family or a date, from its name and the seed."""
    share = int.from_bytes(hashlib.sha256(f"{seed}:{key}".encode()).digest()[:4], "big") / 2**32
    return "test" if share < 0.20 else "valid" if share < 0.25 else "train"


WORD_TASKS: dict[str, Callable[[Word], str | None]] = {
    "plural": lambda w: w.plural,
    "past": lambda w: w.past,
    "gerund": lambda w: w.gerund,
    "article": lambda w: w.plural and f"{choose_article(w.lemma)} {w.lemma}",
    "infinitive": lambda w: w.past and f"to {w.lemma}",
    "capital": lambda w: w.lemma.capitalize(),
    "initial": lambda w: w.lemma[0],
    "perfect": lambda w: w.past and f"has {find_participle(w.lemma)}",
}


def answer_word(word: Word) -> dict[str, str]:
    """Answer every word task that the word has a form for."""
    return {task: answer for task, solve in WORD_TASKS.items() if (answer := solve(word))}


def find_participle(verb: str) -> str:
    """Find the past participle of a dictionary verb (the first variant, where there are several)."""
    import lemminflect

    return lemminflect.getInflection(verb, "VBN", inflect_oov=False)[0]


# A vowel letter decides, except where the sound differs from it.
_SILENT_H = ("heir", "herb", "honest", "honor", "honour", "hour")
_CONSONANT_SOUND = (
    *("eu", "ewe", "once", "one", "ubi", "union", "unif", "unic", "unit", "univ"),
    *("ura", "usa", "use", "usu", "uti", "uto"),
)


def choose_article(noun: str) -> str:
    """Choose "a" or "an" for a singular noun: by its first letter, with the usual exceptions of sound."""
    vowel = noun[0] in "aeiou" and not noun.startswith(_CONSONANT_SOUND)
    return "an" if vowel or noun.startswith(_SILENT_H) else "a"
