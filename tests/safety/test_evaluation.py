"""Decisions of a tiny model against likelihoods added up one token at a time."""

import copy
import json

import pytest
import torch
from transformers import Phi3Config, Phi3ForCausalLM

from so8t_torch.core.errors import DataError, DomainError
from so8t_torch.data.docstrings import documentation_strings
from so8t_torch.data.labels import Label, leading_label
from so8t_torch.data.reading import exercises
from so8t_torch.data.records import Message, Record
from so8t_torch.data.scenarios import ScenarioSection, scenario_records
from so8t_torch.safety.evaluation import TriageReport, evaluate_triage, language_loss, prompt_text
from so8t_torch.train.scratch import ScratchBase, build_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    section = ScratchBase(vocabulary=700)
    drawn = exercises(section.scenarios, covers="seen", tellings=1, single=0.5, seed=0)
    return build_tokenizer(section, drawn, documentation_strings("held_out")[:100])


@pytest.fixture(scope="module")
def model(tokenizer):
    torch.manual_seed(0)
    config = Phi3Config(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=512, original_max_position_embeddings=512,
        pad_token_id=tokenizer.pad_token_id, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        initializer_range=0.5,
    )  # fmt: skip
    return Phi3ForCausalLM(config)


@pytest.fixture(scope="module")
def records():
    return scenario_records(ScenarioSection(), "held_out")[::23]


@torch.no_grad()
def likelihood(model, tokenizer, record, label):
    """Add up log p token by token, in a batch of one without padding."""
    prompt = tokenizer(prompt_text(tokenizer, record), add_special_tokens=False).input_ids
    answer = tokenizer(label.value, add_special_tokens=False).input_ids
    total = 0.0
    for i, token in enumerate(answer):
        logits = model(torch.tensor([prompt + answer[:i]])).logits[0, -1].double()
        total += float(logits.log_softmax(-1)[token])
    return total


def test_probabilities_are_the_label_likelihoods_added_token_by_token(model, tokenizer, records):
    report = evaluate_triage(model, tokenizer, records, generate=False)
    lengths = {len(tokenizer(label.value, add_special_tokens=False).input_ids) for label in Label}
    assert max(lengths) > 1, "the case of a label of several tokens must be covered"
    for decision in report.decisions:
        scores = torch.tensor([likelihood(model, tokenizer, decision.record, label) for label in Label]).double()
        assert decision.probabilities == pytest.approx(scores.softmax(0).tolist(), rel=1e-4, abs=1e-4)
        assert decision.likeliest is list(Label)[int(scores.argmax())]


def test_neither_padding_side_nor_batch_size_changes_a_decision(model, tokenizer, records):
    reports = []
    for side, size in (("left", 4), ("right", 4), ("left", 1), ("left", 64)):
        tokenizer.padding_side = side
        reports.append(evaluate_triage(model, tokenizer, records, batch_size=size))
    tokenizer.padding_side = "left"
    assert reports[0] == reports[1]
    for other in reports[2:]:
        assert [d.likeliest for d in other.decisions] == [d.likeliest for d in reports[0].decisions]
        assert [d.generated for d in other.decisions] == [d.generated for d in reports[0].decisions]
        for one, two in zip(reports[0].decisions, other.decisions, strict=True):
            assert one.probabilities == pytest.approx(two.probabilities, abs=1e-5)


def test_generated_answers_are_those_of_greedy_decoding_and_failures_have_their_own_column(model, tokenizer, records):
    report = evaluate_triage(model, tokenizer, records, new_tokens=3)
    first = report.decisions[0]
    ids = tokenizer(prompt_text(tokenizer, first.record), add_special_tokens=False).input_ids
    start = len(ids)
    for _ in range(3):
        with torch.no_grad():
            ids = [*ids, int(model(torch.tensor([ids])).logits[0, -1].argmax())]
    assert first.generated == tokenizer.decode(ids[start:], skip_special_tokens=True)
    failures = sum(leading_label(d.generated) is None for d in report.decisions)
    assert report.generation.parse_failures.hits == failures > 0
    assert sum(row["unparsed"] for row in report.generation.confusion.values()) == failures
    assert report.likelihood.parse_failures.hits == 0


def test_the_answer_is_not_shown_to_the_model(tokenizer, records):
    for record in records:
        assert record.messages[-1].content not in prompt_text(tokenizer, record)
        unanswered = Record(record.messages[:-1], record.label, record.group, record.source)
        assert prompt_text(tokenizer, unanswered) == prompt_text(tokenizer, record)
        assert prompt_text(tokenizer, record).endswith("<|assistant|>\n")


def test_the_report_is_json_with_the_best_constant_and_can_be_restricted(model, tokenizer, records):
    report = evaluate_triage(model, tokenizer, records, generate=False)
    stored = json.loads(report.to_json())
    assert stored["records"] == len(records)
    assert stored["generation"] is None
    truths = [record.label for record in records]
    assert stored["majority"]["share"] == max(map(truths.count, Label)) / len(truths)
    finance = report.restricted(lambda record: record.group.startswith("finance"))
    assert {d.record.group.split("/")[0] for d in finance.decisions} == {"finance"}
    assert TriageReport.of([]).likelihood.accuracy.value is None
    assert report.table().row_count > 10


def test_the_training_mode_is_restored(model, tokenizer, records):
    model.train()
    evaluate_triage(model, tokenizer, records[:2], generate=False)
    assert model.training
    model.eval()


def test_nothing_to_evaluate_and_a_missing_label_are_errors(model, tokenizer):
    with pytest.raises(DataError, match="no records"):
        evaluate_triage(model, tokenizer, [])
    with pytest.raises(DataError, match="here:1: a label is needed"):
        evaluate_triage(model, tokenizer, [Record((Message("user", "?"),), source="here:1")])


def test_a_model_that_computes_no_numbers_decides_nothing(model, tokenizer, records):
    """NaN compares false with everything; taken for a number it would read as ALLOW."""
    broken = copy.deepcopy(model)
    with torch.no_grad():
        broken.model.norm.weight[0] = float("nan")
    with pytest.raises(DomainError, match="log-likelihood for each label, got ALLOW nan"):
        evaluate_triage(broken, tokenizer, records[:2])
    with pytest.raises(DomainError, match="expected a finite loss, got nan"):
        language_loss(broken, tokenizer, ["Return a new list."])


def test_language_loss_is_the_mean_over_all_predicted_tokens(model, tokenizer):
    texts = ["Return a new list.", "単語", "A longer text, so that the rows of one batch differ in length."]
    total = count = 0
    for text in texts:
        ids = torch.tensor([tokenizer(text, add_special_tokens=False).input_ids])
        with torch.no_grad():
            log_p = model(ids).logits[0, :-1].double().log_softmax(-1)
        total -= float(log_p.gather(1, ids[0, 1:, None]).sum())
        count += ids.shape[1] - 1
    assert language_loss(model, tokenizer, texts) == pytest.approx(total / count, rel=1e-5)
    with pytest.raises(DataError, match="two tokens"):
        language_loss(model, tokenizer, ["a"])
