"""What a tile of the teachers is: logits to be softmaxed, each teacher's or their mean, or probabilities as given."""

import triton
import triton.language as tl

from kdfast.triton.spec import LOG2E


@triton.jit
def base2(temperature):
    """log2(e) / T: what logits are multiplied by."""
    return (temperature * 0 + LOG2E) / temperature  # a constant on the left would swallow the rest as its value


@triton.jit
def teacher_slope(temperature, SPEC: tl.constexpr):
    """What the teacher's logits are multiplied by, in base 2."""
    if SPEC.target == "logits":
        return base2(temperature)
    elif SPEC.target == "log_probs":
        return temperature * 0 + LOG2E
    else:
        return temperature * 0 + 1  # their logarithms are to base 2


@triton.jit
def weighted_mean(tiles, weights):
    mean = tiles[0] * weights[0]
    for k in tl.static_range(1, len(tiles)):
        mean += tiles[k] * weights[k]
    return mean


@triton.jit
def teacher_logits(tiles, weights, SPEC: tl.constexpr):
    """What is softmaxed: a tile for each teacher, or one for all of them (a geometric ensemble)."""
    logits = ()
    for k in tl.static_range(len(tiles)):
        x = tiles[k]
        if SPEC.target == "probs":
            x = tl.log2(x)
        logits = logits + (x,)
    if SPEC.joint and len(tiles) > 1:
        return (weighted_mean(logits, weights),)
    else:
        return logits


@triton.jit
def teacher_probabilities(tiles, weights, SPEC: tl.constexpr):
    """p as it is given, or as the weighted mean of those given, and log2 p."""
    probabilities = ()
    for k in tl.static_range(len(tiles)):
        x = tiles[k]
        if SPEC.target == "log_probs":
            x = tl.exp2(x * LOG2E)
        probabilities = probabilities + (x,)
    if len(tiles) > 1:
        p = weighted_mean(probabilities, weights)
        return p, tl.log2(p)
    elif SPEC.target == "log_probs":
        return probabilities[0], tiles[0] * LOG2E
    else:
        return probabilities[0], tl.log2(probabilities[0])
