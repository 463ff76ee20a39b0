"""Phase 2 recalls across hundreds of tokens after a short training, its ablation does not; the report of it."""

import itertools
import json

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import set_seed
from typer.testing import CliRunner

from so8t_torch import cli
from so8t_torch.core.config import load_config
from so8t_torch.core.errors import ConfigError, ShapeError
from so8t_torch.data.recall import RecallSection
from so8t_torch.models.configuration import Phase2Config
from so8t_torch.models.phase2 import Phase2ForCausalLM
from so8t_torch.models.streaming import cache_bytes
from so8t_torch.train import reach
from so8t_torch.train.long_context import LongContextConfig, octaves, run_long_context
from so8t_torch.train.reach import gradient_reach, measure_speed
from so8t_torch.train.recall import RecallTrainingSection, accuracy, train_recall

TASK = RecallSection(items=4, symbols=16, noise=16)
TINY = {"d_model": 16, "n_layers": 1, "num_heads": 2, "head_dim": 8, "dropout": 0.0}


def phase2(task=TASK, **fields):
    set_seed(0)
    return Phase2ForCausalLM(Phase2Config(vocab_size=task.vocab_size, **{**TINY, **fields})).eval()


def test_a_short_training_teaches_recall_at_distance_256_to_the_memory_alone():
    size = {"d_model": 64, "n_layers": 2, "num_heads": 4, "head_dim": 32}
    training = RecallTrainingSection(steps=100, shortest=8, longest=64)
    found = {}
    for remembers in (True, False):
        model = phase2(**size, hebbian_enabled=remembers)
        train_recall(model, TASK, training)
        found[remembers] = accuracy(model, TASK, (256,), rows=32)[256]
    assert found[True] > 0.9, found
    assert found[False] < 0.2, found


def test_the_largest_distance_grows_from_the_shortest_and_then_stays():
    training = RecallTrainingSection(steps=100, shortest=8, longest=128, growing=0.5)
    assert [training.distance(step, 1.0) for step in (0, 25, 50, 99)] == [8, 32, 128, 128]
    assert [training.distance(step, 0.0) for step in (0, 99)] == [8, 8]
    assert training.distance(99, 0.5) == 32
    assert RecallTrainingSection(shortest=8, longest=128).distance(0, 1.0) == 128


def test_a_short_training_decays_matrices_alone():
    strong = RecallTrainingSection(steps=3, rows=2, shortest=4, longest=8, learning_rate=1e-30, warmup=0)
    strong = strong.model_copy(update={"weight_decay": 1e29})
    model = phase2(hebbian_eta_mode="head", feedback_enabled=True, memory_chunk=4)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    train_recall(model, TASK, strong)
    for name, parameter in model.named_parameters():
        moved = (parameter - before[name]).abs().max()
        assert (moved < 1e-20) == (parameter.ndim < 2), name


def test_gradients_at_the_tokens_before_agree_with_differences():
    model = phase2().double()
    tokens = TASK.batch(1, 24, torch.Generator().manual_seed(0)).input_ids
    found = gradient_reach(model, tokens)
    assert found.shape == (tokens.shape[1] - 1,)
    rows = model.get_input_embeddings()(tokens[:, :-1]).detach()

    def loss(embedded):
        return cross_entropy(model(inputs_embeds=embedded).logits[:, -1], tokens[:, -1])

    step = 1e-5
    for before in (1, 9, 30):
        slopes = []
        for channel in range(rows.shape[-1]):
            nudge = torch.zeros_like(rows)
            nudge[0, -before, channel] = step
            with torch.no_grad():
                slopes.append((loss(rows + nudge) - loss(rows - nudge)) / (2 * step))
        expected = torch.stack(slopes).norm()
        torch.testing.assert_close(found[before - 1], expected, rtol=1e-5, atol=1e-12)
        assert found[before - 1] > 0


def test_the_carried_state_does_not_grow_with_the_length():
    model = phase2()
    short, long = (measure_speed(model, length, decoded=2) for length in (8, 200))
    assert (
        short.state
        == long.state
        == 4
        * sum(
            tensor.numel()
            for tensor in model.model.layers[0].initial_state(1, torch.device("cpu"), torch.float32).values()
        )
        + 8
    )
    assert min(*short[1:3], *long[1:3]) > 0


def test_a_speed_is_the_better_of_two_after_a_warm_up_on_one_thread(monkeypatch):
    model, seen = phase2(), []
    ticks = itertools.accumulate([0, 90, 90, 0, 4, 1, 0, 2, 8])
    monkeypatch.setattr(reach.time, "thread_time", lambda: float(next(ticks)))
    model.register_forward_pre_hook(lambda *_: seen.append(torch.get_num_threads()))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        speed = measure_speed(model, 8, decoded=2)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    assert speed[:3] == (8, 8 / 2, 2 / 1)
    assert seen == [1] * 9


def test_keys_and_values_of_attention_grow_with_the_length():
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    cache = LlamaForCausalLM(config)(torch.zeros(1, 5, dtype=torch.long), use_cache=True).past_key_values
    assert cache_bytes(cache) == 2 * 5 * 8 * 4


def test_rows_without_a_token_before_the_last_are_refused():
    with pytest.raises(ShapeError, match="T ≥ 2"):
        gradient_reach(phase2(), torch.zeros(1, 1, dtype=torch.long))
    with pytest.raises(ShapeError, match="at least one token"):
        measure_speed(phase2(), 0)


def test_fourths_of_an_octave_keep_the_sum_of_squares():
    sizes = torch.rand(40, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = octaves(sizes)
    widths = [behind - first for first, behind in itertools.pairwise([*found, 41])]
    total = sum(width * size**2 for width, size in zip(widths, found.values(), strict=True))
    assert total == pytest.approx(float(sizes.square().sum()))


def settings(tmp_path, **changes):
    sections = {
        "output": tmp_path / "report",
        "tasks": ("recall", "copy"),
        "task": {"items": 2, "symbols": 4, "noise": 4},
        "model": TINY,
        "training": {"steps": 2, "rows": 2, "shortest": 4, "longest": 8},
        "trainings": {"copy": {"steps": 3, "rows": 2, "shortest": 4, "longest": 8, "growing": 0.5}},
        "measuring": {"distances": (4, 8), "rows": 2, "reach": 20, "reach_rows": 1, "lengths": (8, 16)},
    }
    return LongContextConfig(**{**sections, **changes})


def test_the_report_holds_every_task_with_and_without_memory(tmp_path):
    told = []
    report = run_long_context(settings(tmp_path), told.append)
    assert [(found.task, found.variant) for found in report.findings] == [
        (task, variant) for task in ("recall", "copy") for variant in ("memory", "no memory")
    ]
    stored = json.loads((tmp_path / "report/long_context.json").read_text())
    assert stored["environment"]["processor"]
    assert stored["environment"]["packages"]["torch"].startswith("2.")
    for found, written in zip(report.findings, stored["findings"], strict=True):
        assert len(found.losses) == {"recall": 2, "copy": 3}[found.task]
        assert written["processor_seconds"] >= 0
        assert set(found.accuracy) == {4, 8} == set(map(int, written["accuracy"]))
        assert list(found.reach) == [1, 2, 3, 4, 5, 6, 7, 8, 10, 11, 13, 16, 19]
        assert min(found.reach.values()) > 0
    assert (tmp_path / "report/long_context.png").stat().st_size > 10_000
    assert [speed["length"] for speed in stored["speeds"]] == [8, 16]
    assert len(report.tables()) == 2
    assert [line.partition(": loss ")[0] for line in told] == [f"{one.task}, {one.variant}" for one in report.findings]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model": {"vocab_size": 7}}, "no vocab_size in model"),
        ({"model": {"d_modle": 7}}, "d_model"),
        ({"task": {"items": 9}}, "a distance of 9 or more"),
        ({"trainings": {"copy": {"shortest": 1}}}, "a distance of 2 or more"),
        ({"tasks": ()}, "at least one task"),
        ({"measuring": {"lengths": (8, 0)}}, "measuring.lengths of at least 1 token, got 0"),
    ],
)
def test_wrong_settings_are_refused_before_anything_is_trained(tmp_path, changes, words):
    with pytest.raises(ConfigError, match=words):
        run_long_context(settings(tmp_path, **changes))
    assert not (tmp_path / "report").exists()


def test_the_shipped_settings_load_and_the_command_shows_what_it_refuses():
    assert load_config(LongContextConfig, "configs/long_context.yaml").tasks == ("recall", "copy", "selective_copy")
    result = CliRunner().invoke(cli.app, ["long-context", "configs/long_context.yaml", "--set", "tasks=[]"])
    assert isinstance(result.exception, ConfigError)
