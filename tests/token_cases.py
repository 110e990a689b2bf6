r"""Tokens' log-probabilities in plain PyTorch, and how kdfast's are judged, by the rule of judge.py.

The truth is plain PyTorch in fp64. With eps of the arithmetic, and exp off by 8 eps, q_i is off by e_i = q_i (8 +
|log q_i|) eps, as there, or by the smallest normal number. Hence

    log q_y     (8 + 2 |log q_y|) eps
    H           sum of e_i (1 + |log q_i|)
    log_rest    sum of e_i over the rest, over q_rest, and 2 |log_rest| eps
    gradient    of each term its factor's e_i, as often as the factor of the result that it belongs to

Each may miss the truth by its own, and by what eager PyTorch misses it by in that row. For fp64, where eager is the
truth, that is as much times the largest |z|, or log V.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from cases import BF16, F32, F64
from judge import _within, half_ulp, in_fp64
from torch import Tensor

import kdfast
from kdfast import TokenLogProbs
from kdfast.arguments import Heads, Inputs, Settings

NAMES = TokenLogProbs._fields


def plain(
    logits: Tensor,
    ids: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    vocab_size: int | None = None,
    ignore_index: int = -100,
) -> TokenLogProbs:
    """As one would write it, in the logits' dtype, differentiable."""
    several = ids if ids.dim() == logits.dim() else ids.unsqueeze(-1)
    ignored = (several == ignore_index).all(-1)
    log_q = log_softmax(logits.masked_fill(ignored.unsqueeze(-1), 0), temperature, logit_scale, softcap, vocab_size)
    absent = several < 0
    log_probs = log_q.gather(-1, several.long().clamp_min(0)).masked_fill(absent, -math.inf)
    entropy = -(log_q.exp() * log_q.masked_fill(log_q == -math.inf, 0)).sum(-1)
    count = log_q.shape[-1]
    one_hot = F.one_hot(several.long().masked_fill(absent, count), count + 1)[..., :count].sum(-2)
    rest = log_q.masked_fill(one_hot > 0, -math.inf)
    log_rest = torch.where((rest == -math.inf).all(-1), -math.inf, rest.exp().sum(-1).clamp_min(1e-300).log())
    found = log_probs.view(ids.shape), entropy, log_rest
    return TokenLogProbs(*(x.masked_fill(_for(x, ignored), 0) for x in found))


def log_softmax(
    logits: Tensor, temperature: float | Tensor, logit_scale: float, softcap: float | None, vocab_size: int | None
) -> Tensor:  # (..., vocab_size)
    z = logits[..., :vocab_size] * logit_scale
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    T = temperature.to(z.dtype) if isinstance(temperature, Tensor) else temperature
    return torch.log_softmax(z / (T.unsqueeze(-1) if isinstance(T, Tensor) and T.dim() else T), -1)


def _for(x: Tensor, rows: Tensor) -> Tensor:
    return rows if x.dim() == rows.dim() else rows.unsqueeze(-1)


def factors(ids: Tensor, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A gradient of each result, of both signs, exact in every dtype."""
    rows, kind = logits.shape[:-1], F64 if logits.dtype == F64 else F32
    return tuple(
        ((1.5 - torch.arange(math.prod(shape), device=logits.device) % 4) / size).reshape(shape).to(kind)
        for shape, size in ((ids.shape, 1), (rows, 2), (rows, -4))
    )


def gradient(call: Any, logits: Tensor, ids: Tensor, which: Any = NAMES, **settings: Any) -> tuple[Any, Tensor]:
    """The results, and the gradient of those named in `which`, by `factors`; nothing flows where one is infinite."""
    leaf = logits.detach().requires_grad_()
    results = call(leaf, ids, **settings)
    grads = dict(zip(NAMES, factors(ids, logits), strict=True))
    outputs = [getattr(results, name) for name in which]
    given = [grads[name].to(x.dtype) for name, x in zip(which, outputs, strict=True)]
    given = [torch.where(x.isinf(), 0, g) for x, g in zip(outputs, given, strict=True)]
    (grad,) = torch.autograd.grad(outputs, leaf, given)
    return TokenLogProbs(*(x.detach() for x in results)), grad


def judge(call: Any, logits: Tensor, ids: Tensor, which: Any = NAMES, **settings: Any) -> None:
    """Judges a call with its gradient, and without; `call` may have settings of its own, such as a backend."""
    kind = F64 if logits.dtype == F64 else F32
    truth, of_truth = gradient(plain, in_fp64(logits), ids, which, **settings)
    eager, of_eager = gradient(plain, logits.to(kind), ids, which, **settings)
    values_off, gradient_off = errors(in_fp64(logits), ids, which, torch.finfo(kind), **settings)
    largest = max(math.log(logits.shape[-1]), float(in_fp64(logits).abs().max()))
    ratio = 1 + largest if kind == F64 else 1.0
    got, grad = gradient(call, logits, ids, which, **settings)
    with torch.no_grad():
        alone = call(logits, ids, **settings)
    for name, want, off, by_eager in zip(NAMES, truth, values_off, eager, strict=True):
        missed = (by_eager.double() - want).abs().nan_to_num(0, 0)
        missed = missed.amax(-1, True) if missed.dim() > logits.dim() - 1 else missed
        for what, result in (("with a gradient", got), ("alone", alone)):
            value = getattr(result, name)
            assert value.dtype == kind, f"{name} {what}: has dtype {value.dtype}"
            _within(f"{name} {what}", value, want, ratio * off + missed, limits=True)
    assert grad.dtype == logits.dtype
    floor = torch.finfo(kind).tiny
    missed = ((of_eager.double() - of_truth).abs() / (gradient_off + floor)).nan_to_num(0, 0)
    allowed = (ratio + missed.amax(-1, True)) * gradient_off + floor
    allowed = allowed + half_ulp(of_truth, grad.dtype) if grad.dtype.itemsize == 2 else allowed
    exact = _is_padding(logits, settings) | _is_ignored(logits, ids, settings)
    _within("gradient", grad, of_truth, torch.where(exact, 0, allowed))


def _is_padding(logits: Tensor, settings: dict[str, Any]) -> Tensor:
    return torch.arange(logits.shape[-1], device=logits.device) >= (settings.get("vocab_size") or logits.shape[-1])


def _is_ignored(logits: Tensor, ids: Tensor, settings: dict[str, Any]) -> Tensor:  # (..., 1)
    several = ids if ids.dim() == logits.dim() else ids.unsqueeze(-1)
    return (several == settings.get("ignore_index", -100)).all(-1, True)


def errors(
    logits: Tensor, ids: Tensor, which: Any, info: torch.finfo, *, ignore_index: int = -100, **settings: Any
) -> tuple[tuple[Tensor, ...], Tensor]:
    """How far the results and the gradient may be off; see the head of this file."""
    several = ids.long() if ids.dim() == logits.dim() else ids.long().unsqueeze(-1)
    options = {"temperature": 1.0, "logit_scale": 1.0, "softcap": None, "vocab_size": None} | settings
    logits = logits.masked_fill((several == ignore_index).all(-1, True), 0)
    log_q, q = (log_softmax(logits, **options), None)
    q = log_q.exp()
    size = log_q.abs().nan_to_num(0, 0, 0)
    cap, T = options["softcap"] or 0.0, torch.as_tensor(options["temperature"], dtype=F64)
    T = T.to(logits.device).expand(logits.shape[:-1])
    more = 8 * cap / T.unsqueeze(-1)  # a softcap's own error, of the capped logits
    e = q * (8 + size + more) * info.eps + info.tiny
    present = F.one_hot(several.clamp_min(0), log_q.shape[-1]) * (several >= 0).unsqueeze(-1)  # (..., K, V)
    is_rest = present.sum(-2) == 0
    rest = (q * is_rest).sum(-1).clamp_min(1e-300)
    of_ids = size.gather(-1, several.clamp_min(0))
    values = (
        ((8 + 2 * of_ids + more) * info.eps).view(ids.shape),
        (e * (1 + size)).sum(-1),
        ((e * is_rest).sum(-1) / rest + 2 * info.eps * rest.log().abs()),
    )
    g, h, r = (
        x.double().abs() if name in which else 0 * x for name, x in zip(NAMES, factors(ids, logits), strict=True)
    )
    g, h, r = g.view(several.shape), h.unsqueeze(-1), r.unsqueeze(-1)
    entropy = (q * size).sum(-1, True)
    of_rest = e * is_rest / rest.unsqueeze(-1) * (1 + rest.log().abs().unsqueeze(-1) / 8)
    at_ids = 4 * info.eps * (g.unsqueeze(-1) * present).sum(-2)
    off = e * (g.sum(-1, True) + h * (1 + size + entropy) + r) + r * of_rest + at_ids
    off = 2 * off * options["logit_scale"] / T.unsqueeze(-1)
    return values, F.pad(off, (0, logits.shape[-1] - log_q.shape[-1]))


def tokens(backend: str, **given: Any) -> Any:
    return lambda logits, ids, **settings: kdfast.token_log_probs(logits, ids, backend=backend, **given | settings)


def token_arguments(logits: Tensor, heads: Heads, inputs: Inputs, settings: Settings) -> dict[str, tuple[Any, ...]]:
    """Arguments of tokens' operators, for opcheck; where there are temperatures of rows one result has a gradient."""
    rows, kind = logits.shape[:-1], F64 if logits.dtype == F64 else F32
    ids = torch.arange(3 * rows.numel(), device=logits.device).view(*rows, 3) % 9 - 1
    temperature = 2.0 if math.isnan(settings.temperature) else settings.temperature
    call = inputs.temperatures, temperature, settings.logit_scale, settings.softcap, settings.vocab_size
    table = torch.ops.kdfast_reference.token_stats(logits, ids, *call, True)[-1]
    grads = ids.to(kind), logits[..., 0].to(kind), None
    grads = grads if inputs.temperatures is None else (None, None, torch.ones_like(grads[1]))
    head, chunks = (*heads[:3], ids), (2, torch.float32)
    return {
        "token_stats": (logits, ids, *call, inputs.temperatures is None),
        "token_grad": (logits, ids, table, *grads, None, *call),
        "token_grad_as": (logits, BF16, ids, table, *grads, None, *call),
        "linear_token_stats": (*head, *call, inputs.temperatures is None, *chunks),
        "linear_token_grad": (*head, table, *grads, *call, *chunks, heads.grad_hidden, heads.grad_weight, False),
    }
