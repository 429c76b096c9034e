from job import exits
from job.exits import TABLE, Exit, JobError


def test_every_code_has_a_meaning_and_only_known_retry_words():
    assert set(TABLE) == set(Exit)
    assert {meaning.retried for meaning in TABLE.values()} == {"never", "bounded", "always"}
    assert [code for code in Exit if TABLE[code].retried == "always"] == [Exit.STOPPED]


def test_no_error_ends_with_the_code_of_success():
    errors = [e for e in vars(exits).values() if isinstance(e, type) and issubclass(e, JobError)]
    assert len(errors) > 8
    assert all(error.exit_code != Exit.FINISHED for error in errors)
