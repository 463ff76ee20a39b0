"""Ten minutes with the workbench: invent a regulariser in JAX, judge it, try it, port it, train with it.

    python examples/new_regulariser.py

The idea: a token should pass the layers like a free particle, without being pushed. Its acceleration is the second
difference of its state along the layers; divided by the speed it has no unit:

    c = ⟨|x_{l+1} − 2x_l + x_{l−1}|²⟩ / (⟨|x_{l+1} − x_l|²⟩ + ε)        0 iff every state moves uniformly
"""

import json
import tempfile
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import torch
from jax.lax import stop_gradient

from parity_tests.harness import Budget, cases
from parity_tests.regularizers import pair_of
from so8t_jax.regularizers import Law, check, register, try_out
from so8t_torch.core.config import parse_config
from so8t_torch.core.precision import accumulation_dtype
from so8t_torch.train.config import TrainConfig
from so8t_torch.train.physics_terms import register_term
from so8t_torch.train.run import run_training


# 1. One pure function. The name of its argument says what it looks at: the residual stream, layer by layer.
def acceleration(states, *, eps=1e-12):
    """states (l+1, s, d) → (c, monitors)."""
    speed = jnp.mean(jnp.sum(jnp.diff(states, axis=0) ** 2, axis=-1))
    bend = jnp.mean(jnp.sum(jnp.diff(states, n=2, axis=0) ** 2, axis=-1))
    return bend / (speed + eps), {"speed": stop_gradient(speed)}


# 2. What it is judged on: inputs to draw, and a law. Nobody at rest among the moving: c cannot depend on the frame.
def walk(generator, size):
    """Draw states that walk at random through the layers."""
    return (generator.standard_normal((size["l"] + 1, size["s"], size["d"])).cumsum(0),)


def any_frame(f, example):
    """Return by how much c changes when all states are moved by the same vector."""
    (states,) = example
    still = float(f(states)[0])
    return np.asarray(float(f(states + 3.0)[0]) - still) / max(still, 1.0)


ENTRY = register(
    acceleration,
    inputs={"walk": walk},
    sizes=({"l": 2, "s": 2, "d": 2}, {"l": 4, "s": 5, "d": 6}),
    laws=(Law("any_frame", any_frame, budget=4096),),
)


# 3. The same in PyTorch, batched, accumulated in float32. Axes before (l+1, s, d) count independent problems.
def ported(states, *, eps=1e-12):
    """states (..., l+1, s, d) → (c, monitors)."""
    states = states.to(accumulation_dtype(states.dtype))
    speed = states.diff(dim=-3).square().sum(-1).mean((-2, -1))
    bend = states.diff(n=2, dim=-3).square().sum(-1).mean((-2, -1))
    return bend / (speed + eps), {"speed": speed.detach()}


register_term(ported, "acceleration")


# 4. A configuration names it. Any key of the run can be set here; physics.terms is the one that is new.
def settings(folder):
    """Return the settings of a run: a small Phase 2 model learns a sentence by heart."""
    text = folder / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog.\n" * 200, encoding="utf-8")
    tree = {
        "output_dir": str(folder / "run"),
        "threads": 1,
        "model": {
            "kind": "phase2",
            "fields": {"d_model": 16, "n_layers": 3, "num_heads": 2, "head_dim": 8, "memory_chunk": 16},
        },
        "data": {"text": {"source": str(text), "length": 64}},
        "training": {"max_steps": 8, "batch_size": 8, "lr": 0.003},
        "physics": {"terms": {"acceleration": {"weight": 2.0, "target": 0.1}}},
        "recording": {"every_steps": 1, "progress": False, "tensorboard": False},
        "checkpoint": {"every_steps": None},
    }
    return parse_config(TrainConfig, tree)


def judge():
    """Hold the port against the definition, by the declaration of step 2; ``generate_tests`` makes tests of them."""
    pair = pair_of(ENTRY, ported, budget=Budget(forward=32, gradient=64))
    chosen = list(cases([pair], ("declaration", "forward", "gradient", "batch", "laws")))
    for case in chosen:
        case.run()
    print(f"port: {len(chosen)} parity checks passed")


def main():
    """Go through the steps and print what each says."""
    report = check(ENTRY)
    print(report.table())
    assert report.passed
    with tempfile.TemporaryDirectory() as folder:
        trial = try_out(ENTRY, weight=1.0, target=0.2, steps=40)
        trial.plot(Path(folder) / "acceleration.png")
        print(trial.table())
        judge()
        torch.manual_seed(0)
        run = run_training(settings(Path(folder)))
        rows = [json.loads(line) for line in (run.directory / "metrics.jsonl").read_text().splitlines()]
    told = [row for row in rows if row["kind"] == "train"]
    for row in (told[0], told[-1]):
        c, multiplier = row["physics/acceleration"], row["physics/acceleration/multiplier"]
        print(f"step {row['step']}: c = {c:.4f}, λ = {multiplier:.3f}, loss {row['loss/lm']:.3f}")


if __name__ == "__main__":
    main()
