"""Studies in plain words: they follow the verdicts, and leave out nothing that does not hold."""

import pytest

pytest.importorskip("typer", reason="results are read as the command line reads them")

from benchmarks import studies
from jbn.studies.plain import PLAIN, WORDS, put

KEPT = studies.gallery()


@pytest.mark.parametrize("name", studies.STUDIES)
def test_every_study_is_put_in_words_of_its_own_claims(name):
    known = {claim.sentence for claim in studies.STUDIES[name].claims}
    assert {claim for claims in PLAIN[name].clauses.values() for claim in claims} <= known
    assert PLAIN[name].question.endswith("?")


@pytest.mark.parametrize("verdict", WORDS)
@pytest.mark.parametrize("name", PLAIN)
def test_words_follow_the_verdicts(name, verdict):
    told = put(name, dict.fromkeys((claim.sentence for claim in studies.STUDIES[name].claims), verdict))
    said = f"{PLAIN[name].question} {WORDS[verdict]}: {'; '.join(PLAIN[name].clauses)}."
    listed = {claim for claims in PLAIN[name].clauses.values() for claim in claims}
    assert told == said + " The table has all claims." * (len(listed) < len(studies.STUDIES[name].claims))


def test_a_clause_of_several_claims_holds_where_all_of_them_do():
    several, claims = next((clause, claims) for clause, claims in PLAIN["convergence"].clauses.items() if claims[1:])
    verdicts = dict.fromkeys((claim.sentence for claim in studies.STUDIES["convergence"].claims), "holds")
    for verdict, word in (("not decided within the intervals", "Open"), ("does not hold", "Not so")):
        assert put("convergence", verdicts | {claims[1]: verdict}).endswith(f" {word}: {several}.")
    assert put("no such study", verdicts) == ""


@pytest.mark.parametrize("name", KEPT)
def test_what_does_not_hold_is_not_left_out(name):
    against = {claim.claim for claim in KEPT[name].claims if claim.verdict == "does not hold"}
    assert against <= {claim for claims in PLAIN[name].clauses.values() for claim in claims}
    assert KEPT[name].in_plain_words in studies.page().replace("\\", "")
