"""Words that the tasks draw from: common enough that most tokenizers write many of them as one token."""

from __future__ import annotations


def _split(words: str) -> tuple[str, ...]:
    return tuple(words.split())


NAMES = _split(
    "John Mary James Peter Tom Jack Anna Sarah Paul Mark George William Henry Charles David Daniel Adam Luke Simon "
    "Robert Thomas Richard Edward Alice Jane Emma Kate Laura Susan Linda Michael Steven Kevin Brian Lisa Martin"
)


PLACES = _split("store park school garden office hospital station beach restaurant library house shop sea city church")
OBJECTS = _split("drink book ring ball letter gift key computer basket bone pen card hand word")


# Things that last from one year to another.
SPANS = _split("war project plan study trial program conflict campaign crisis peace journey marriage voyage work party")
ARGUMENTS = _split(
    "files load size last port shape state value name data path mode index text label count key type user target "
    "source limit order score color model image result option group"
)


FILLERS = _split(
    "oil column piece crime population unit dark water music light river story family market field winter stone "
    "history machine paper city summer energy time man world people war law day night"
)


NOUNS = tuple(
    zip(
        _split(
            "key book ship boat king law year hand friend house nation man state car dog teacher student doctor "
            "picture child woman whale leg name part thing word power subject eye"
        ),
        _split(
            "keys books ships boats kings laws years hands friends houses nations men states cars dogs teachers "
            "students doctors pictures children women whales legs names parts things words powers subjects eyes"
        ),
        strict=True,
    )
)


VERBS = (("is", "are"), ("was", "were"), ("has", "have"))
