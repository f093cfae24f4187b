"""A small share of the mutations of ``tests/mutate.py``; each works or is refused in one line."""

from mutate import make_cases, run


def test_sound_inputs_are_read(tmp_path):
    for _, read in make_cases(tmp_path):
        read()


def test_mutated_inputs_work_or_are_refused_in_a_sentence():
    worked, bad = run(105)
    assert not bad
    assert 5 < worked < 100
