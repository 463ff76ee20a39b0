"""Fast weights: a matrix per head that forgets, is written by outer products, and is read by queries.

    S_t = a_t S_{t−1} + η_t k_t u_tᵀ,   y_t = S_tᵀ q_t,   a_t = e^{−Γ_t}
    hebb: u_t = v_t        delta: u_t = v_t − (a_t S_{t−1})ᵀ k_t
    euler: η_t as given    zoh: η_t ↦ η_t (1 − e^{−Γ_t})/Γ_t, and η_t at Γ_t = 0

Symbols: t = 0 … T−1 counts tokens; for each of H heads S (K, V) fast weights, q queries and k keys (K,), v values (V,),
Γ ≥ 0 decay and η write strength per token, u what is written. Keys are divided by their norms (``key_norm="l2"``); a
key of zeros stays one, with gradient zero. Where the segment of a token differs from that of the token before it, the
state that would enter is dropped: S_t = η_t k_t v_tᵀ. Carried in float32, or float64 for float64.
Cost: O(T H (K V + C (K + V))) in chunks of C = 64 tokens. Saved for the backward pass: the arguments, and one state per
chunk. Every token receives credit from every later one of its segment.
Twin: so8t_jax/ops/hebbian.py. Derivation: docs/math/hebbian.md.
"""

from __future__ import annotations

from jaxtyping import Float, Int
from torch import Tensor

from so8t_torch.core import forward_mode
from so8t_torch.core.backend import Candidate, choose, explain, triton_reasons
from so8t_torch.core.errors import ShapeError
from so8t_torch.core.precision import accumulation_dtype, without_autocast
from so8t_torch.core.tensors import expect_tensors
from so8t_torch.ops.hebbian import arguments, autograd, eager
from so8t_torch.ops.hebbian.arguments import Discretization, KeyNorm, Rule
from so8t_torch.ops.hebbian.monitors import energy_balance, state_bound

__all__ = ["energy_balance", "hebbian", "state_bound", "step"]


def hebbian(
    q: Float[Tensor, "*batch t h k"],
    k: Float[Tensor, "*batch t h k"],
    v: Float[Tensor, "*batch t h v"],
    decay: Float[Tensor, "*#tokens"],
    eta: Float[Tensor, "*#tokens"],
    initial: Float[Tensor, "*#batch h k v"] | None = None,
    segment_ids: Int[Tensor, "*#batch t"] | None = None,
    *,
    rule: Rule = "hebb",
    discretization: Discretization = "euler",
    key_norm: KeyNorm = "l2",
    backend: str = "auto",
) -> tuple[Float[Tensor, "*batch t h v"], Float[Tensor, "*batch h k v"]]:
    """Return what every token reads, and the state after the last one.

    Args:
        q: queries, as they are: a query equal to a normalised key reads the value stored under it.
        k: keys.
        v: values.
        decay: Γ ≥ 0 per token, of a shape that broadcasts to (..., T, H): (H,), (T, 1); float32 rates keep their
            precision beside values of a half dtype.
        eta: η, likewise.
        initial: the state that enters the first token; zero by default.
        segment_ids: equal numbers for the tokens of one segment. Give padding a number of its own.
        rule: what is written: the value, or what the state does not yet read under the key.
        discretization: whether η is a weight, or a rate that acts for the whole token while Γ does.
        key_norm: whether keys are divided by their Euclidean norms.
        backend: ``"triton"`` (rule "hebb"), ``"chunked"`` (CPU), ``"eager"`` (one step per token in plain operations,
            the only one with forward-mode derivatives), or ``"auto"``.

    Returns:
        y in the dtype of v, and the state in the dtype of initial, or of v without: a float32 initial state keeps the
        carried state of a half-precision stream in float32.

    Raises:
        ShapeError: the shapes do not fit, or there is no token, head or channel.
        DomainError: a dtype or a device does not fit, or a rate is negative. Off the CPU and in compiled graphs, which
            do not wait for values, NaN takes the place of the error.
        ConfigError: an option is unknown.
        BackendError: the backend cannot run this call.

    Numerics:
        Editing token t changes no bit of what earlier tokens read, and nothing that is not finite reaches them. In a
        half dtype with ``key_norm="l2"`` the rule "hebb" writes (η/|k|) k vᵀ: q·k of keys as they are must not overflow
        float32.
    """
    arguments.check_options("hebbian", rule=rule, discretization=discretization, key_norm=key_norm)
    expect_tensors("hebbian", q=q, k=k, v=v)
    arguments.check_kinds("hebbian", q=q, v=v)
    if q.shape != k.shape:
        raise ShapeError(f"hebbian: expected queries of the shape of keys {tuple(k.shape)}, got {tuple(q.shape)}.")
    given = arguments.prepare("hebbian", k, v, decay, eta, initial, segment_ids, discretization)
    keys, strength = given.k, given.eta
    if key_norm == "l2":
        keys, strength = _normalised(keys, strength, rule)
    chosen = choose(
        "hebbian", backend, _candidates(rule, q, k, v, decay, eta, *(() if initial is None else (initial,)))
    )
    flat = arguments.rows(given, q), keys, given.v, given.log_decay, strength, given.initial, given.restart
    with without_autocast(v.device):
        if chosen == "eager":
            y, final = eager.recurrence(*flat, delta=rule == "delta")
        else:
            y, final, _ = autograd.hebbian(*flat, rule == "delta", chosen)
    return y.reshape(v.shape), final.reshape(*given.batch, *final.shape[1:])


def step(
    state: Float[Tensor, "*batch h k v"],
    q: Float[Tensor, "*batch h k"],
    k: Float[Tensor, "*batch h k"],
    v: Float[Tensor, "*batch h v"],
    decay: Float[Tensor, "*#heads"],
    eta: Float[Tensor, "*#heads"],
    *,
    rule: Rule = "hebb",
    discretization: Discretization = "euler",
    key_norm: KeyNorm = "l2",
) -> tuple[Float[Tensor, "*batch h v"], Float[Tensor, "*batch h k v"]]:
    """Return what one token reads, and the state that it leaves.

    Args:
        state: what the token before left; float32 beside half-precision tokens keeps the stream in float32.
        q: query.
        k: key.
        v: value.
        decay: Γ ≥ 0 of this token, of a shape that broadcasts to (..., H).
        eta: η of this token, likewise.
        rule: as for ``hebbian``.
        discretization: as for ``hebbian``.
        key_norm: as for ``hebbian``.

    Returns:
        y in the dtype of v, and the state in its own.

    Raises:
        ShapeError, DomainError, ConfigError: as ``hebbian``.
    """
    arguments.check_options("step", rule=rule, discretization=discretization, key_norm=key_norm)
    arguments.check_token("step", state, q, k, v, decay, eta)
    kind = accumulation_dtype(v.dtype)
    rate, strength = (x.to(kind).expand(v.shape[:-1]) for x in (decay, eta))
    rate = arguments.not_negative("step", rate)
    if discretization == "zoh":
        strength = strength * arguments.held(rate)
    key = arguments.unit(k) if key_norm == "l2" else k.to(kind)
    y, found, _ = eager.advance(state.to(kind), q.to(kind), key, v.to(kind), -rate, strength, delta=rule == "delta")
    return y.to(v.dtype), found.to(state.dtype)


def explain_backend(q: Tensor, k: Tensor, v: Tensor, rule: Rule = "hebb") -> str:
    """Return one line per backend: that it can run with these tensors, or every reason why not."""
    return explain(_candidates(rule, q, k, v))


def _normalised(keys: Tensor, strength: Tensor, rule: Rule) -> tuple[Tensor, Tensor]:
    """Return keys and η such that η k uᵀ is written with keys of norm one."""
    if rule == "delta" or keys.dtype == strength.dtype:
        return arguments.unit(keys), strength
    # Half-precision keys stay as they are, for products of matrices that take no more digits. Converted once, so that
    # the two parts of the gradient are added before they are rounded.
    keys = keys.to(strength.dtype)
    return keys, arguments.weakened(strength, keys)


def _candidates(rule: Rule, q: Tensor, *others: Tensor) -> list[Candidate]:
    """Return the implementations in order of preference, each with the reasons why it cannot run."""
    on_host = () if q.device.type == "cpu" else (f"q is on {q.device}, this one runs on the CPU",)
    one_way = forward_mode.reasons(q, *others)
    plain = ("its kernels know the rule 'hebb' alone",) if rule == "delta" else ()
    return [
        Candidate("triton", (*triton_reasons(q), *plain, *one_way)),
        Candidate("chunked", (*on_host, *one_way)),
        Candidate("eager"),
    ]
