"""Which text an image is routed by: turns, scopes, masks and their precedence."""

import pytest
import torch

from hires_lmm.modeling.question_hires_lmm import PromptText, build_question, find_sequence, number_turns


IMAGE = 9
ANSWER, USER = [50, 51], [40, 41]


def numbered(ids: list[int], question_prefix=()) -> list[int]:
    ids = torch.tensor([ids])
    return number_turns(ids, ids == IMAGE, ANSWER, list(question_prefix))[0][0].tolist()


def read(
    ids: list[int], *, scope="turn", answer=ANSWER, question=(), mask=None, labels=None, training=False, images=1
):
    """Readable positions of each image."""
    ids = torch.tensor([ids])
    placeholder = ids == IMAGE
    text = PromptText(
        ids,
        torch.zeros(1, ids.shape[1], 2),
        prompt_mask=None if mask is None else torch.tensor([mask]),
        labels=None if labels is None else torch.tensor([labels]),
    )
    result = build_question(
        text,
        placeholder,
        [int(placeholder.sum()) // images] * images,
        None,
        scope,
        list(answer),
        list(question),
        training,
    )
    return [row.nonzero()[:, 0].tolist() for row in result.image_mask()]


def test_find_sequence_marks_the_first_id_of_each_occurrence():
    ids = torch.tensor([[50, 51, 1, 50, 50, 51], [51, 50, 2, 2, 2, 50]])
    assert find_sequence(ids, ANSWER).int().tolist() == [[1, 0, 0, 0, 1, 0], [0, 0, 0, 0, 0, 0]]
    assert not find_sequence(ids, []).any()
    assert not find_sequence(ids[:, :1], ANSWER).any()


def test_turns_with_a_question_prefix():
    #      system  user     q  img q  answer    a  end user    q  answer   a
    ids = [1, 2, 40, 41, 10, 9, 11, 50, 51, 20, 3, 40, 41, 12, 50, 51, 21]
    assert numbered(ids, USER) == [0, 0, 0, 0, 1, 1, 1, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0]


def test_a_first_turn_without_its_prefix_opens_the_sequence():
    """In Vicuna's template the first "USER" follows a space differently, so only later prefixes are found."""
    first = [1, 2, 9, 11, 50, 51, 20, 3]
    assert numbered(first, USER)[:4] == [1, 1, 1, 1]
    assert numbered([*first, 40, 41, 12, 50, 51, 21], USER) == [1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0]


def test_turns_without_a_question_prefix_open_with_their_image():
    ids = [1, 10, 9, 11, 50, 51, 20, 9, 12, 50, 51, 21]
    assert numbered(ids) == [1, 1, 1, 1, 0, 0, 0, 2, 2, 0, 0, 0]


def test_a_prompt_without_any_prefix_is_one_turn():
    assert numbered([1, 9, 10, 11], USER) == [1, 1, 1, 1]


def test_each_image_reads_its_own_turn():
    ids = [40, 41, 9, 10, 50, 51, 20, 40, 41, 11, 9, 12, 50, 51, 21]
    assert read(ids, question=USER, images=2) == [[3], [9, 11]]


def test_the_answer_and_later_turns_do_not_matter():
    first = [40, 41, 9, 10, 50, 51]
    alone = read(first, question=USER)
    assert alone == [[3]]
    assert read([*first, 20, 21], question=USER) == alone
    assert read([*first, 22, 40, 41, 12, 50, 51, 23], question=USER) == alone


def test_an_image_before_the_first_question_belongs_to_it():
    assert read([9, 40, 41, 10, 50, 51, 20], question=USER) == [[3]]


def test_prompt_mask_goes_before_all_else():
    ids = [40, 41, 9, 10, 11, 50, 51, 20]
    mask = [0, 0, 1, 1, 0, 0, 0, 0]
    assert read(ids, question=USER, mask=mask, labels=[-100] * 8) == [[3]]


def test_the_template_goes_before_labels():
    ids = [40, 41, 9, 10, 11, 50, 51, 20]
    assert read(ids, question=USER, labels=ids) == [[3, 4]]  # a collator that trains on everything


def test_labels_serve_where_the_template_is_unknown_or_absent():
    ids, labels = [1, 9, 10, 11, 20, 21], [-100, -100, -100, -100, 20, 21]
    assert read(ids, answer=(), labels=labels) == [[0, 2, 3]]
    assert read(ids, labels=labels) == [[0, 2, 3]]


def test_training_without_any_source_is_an_error():
    with pytest.raises(ValueError, match="answer_prefix_ids"):
        read([1, 9, 10], answer=(), training=True)
    assert read([1, 9, 10], answer=(), training=False) == [[0, 2]]


def test_prompt_scope_reads_up_to_the_end_of_the_last_answer_prefix():
    ids = [1, 40, 41, 9, 10, 50, 51, 20, 40, 41, 11, 50, 51, 21]
    assert read(ids, scope="prompt", question=USER) == [[0, 1, 2, 4, 5, 6, 7, 8, 9, 10, 11, 12]]
    labels = [-100] * 7 + [20] + [-100] * 5 + [21]
    assert read([1, 9, 10, 20], scope="prompt", answer=(), labels=[-100, -100, -100, 20]) == [[0, 2]]
    assert read(ids[:7], scope="prompt", labels=labels[:7]) == [[0, 1, 2, 4, 5, 6]]


def test_prompt_scope_reads_no_answer_that_is_learned():
    """At inference earlier answers are part of the prompt; with labels, or in training, they are targets."""
    ids = [1, 40, 41, 9, 10, 50, 51, 20, 40, 41, 11, 50, 51, 21]
    unread = [[0, 1, 2, 4, 5, 6, 8, 9, 10, 11, 12]]
    assert read(ids, scope="prompt", question=USER, labels=ids) == unread
    assert read(ids, scope="prompt", question=USER, training=True) == unread
    # without a question prefix nothing tells where an answer ends: only the answer prefixes are read beyond
    assert read(ids, scope="prompt", training=True) == [[0, 1, 2, 4, 5, 6, 11, 12]]
