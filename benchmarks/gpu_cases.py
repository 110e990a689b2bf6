"""The shapes that benchmarks.gpu measures, with reasons."""

from dataclasses import dataclass

from benchmarks.cases import Workload


@dataclass(frozen=True)
class Case:
    """Logits of one shape, with labels, T = 2, alpha = 0.9 and reduction "mean"."""

    workload: Workload
    reason: str
    with_grad: bool = True
    graph: bool = False  # also as a CUDA graph, whose replay costs the host nothing

    @property
    def name(self) -> str:
        return self.workload.name + "-forward" * (not self.with_grad)

    @property
    def nbytes(self) -> int:
        """The minimum memory traffic: both logits are read, the gradient is written."""
        return (3 if self.with_grad else 2) * self.workload.nbytes


CASES = [
    Case(Workload(4096, 32000, "bf16"), "a language model's micro-batch, Llama 2's vocabulary"),
    Case(Workload(2048, 128256, "bf16"), "Llama 3's: rows of 250 kB, which no longer fit into registers"),
    Case(Workload(1024, 151936, "bf16"), "Qwen's, the widest of the common ones"),
    Case(Workload(4096, 50257, "bf16"), "GPT-2's: odd, so that rows are unaligned"),
    Case(
        Workload(8, 128256, "bf16"),
        "fewer rows than multiprocessors, as in a decoding step: mostly overhead",
        graph=True,
    ),
    Case(Workload(65536, 1000, "bf16"), "ImageNet, or a dense prediction: many short rows"),
    Case(Workload(4096, 32000, "fp32"), "twice the bytes for the same arithmetic"),
    Case(Workload(4096, 32000, "bf16"), "evaluation under no_grad: nothing of the logits' size is written", False),
]
DRY_CASES = [
    Case(Workload(4, 300, "bf16"), "a short row that is no multiple of a block"),
    Case(Workload(2, 4096, "bf16"), "a longer one", graph=True),
    Case(Workload(4, 300, "fp32"), "the other dtype"),
    Case(Workload(2, 4096, "bf16"), "without a gradient", False),
]
