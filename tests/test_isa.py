"""Parts of the suite in processes of their own: on each instruction set of this CPU, and in Triton's interpreter."""

from pathlib import Path

import pytest
from cases import python_output

import kdfast
from kdfast import choice

HERE = Path(__file__).parent
FILES = [HERE / f"test_{name}.py" for name in ("calls", "limits")]
# Limits and dropped rows: a tail and rows of several tiles.
INTERPRETED = (
    "test_limits.py::test_a_given_probability_of_0_masks_its_class[triton-jsd-probs-5000]",
    "test_dropped_terms.py::test_the_values_of_dropped_rows_have_no_effect[triton-reverse_kl]",
    "test_dropped_terms.py::test_a_teacher_of_weight_0_is_not_read[triton-geometric]",
    "test_layouts.py::test_logits_may_have_any_number_of_dimensions[triton-shape2]",
)


def other_isas() -> list[str]:
    """All but the best one, which every other test runs on."""
    return list(choice.usable_isas())[:-1] if kdfast.backends()["cpu"]["usable"] else []


def outcome_of(*arguments: object, **environment: str) -> str:
    """The last line of a run of pytest, which must pass."""
    return python_output("-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments, **environment).splitlines()[-1]


@pytest.mark.parametrize("isa", other_isas())
def test_every_instruction_set_gives_the_right_numbers(cpu: str, isa: str) -> None:
    code = "import kdfast; print(kdfast.backends()['cpu']['isa'])"
    assert python_output("-c", code, KDFAST_CPU_ISA=isa).strip() == isa
    assert "skipped" not in outcome_of("-n0", "--only-backend", "cpu", *FILES, KDFAST_CPU_ISA=isa)


def test_a_part_of_the_suite_passes_in_tritons_interpreter() -> None:
    """Which runs the kernels where there is neither a GPU nor the emulator of one."""
    pytest.importorskip("triton")
    environment = {"KDFAST_TEST_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": ""}
    outcome = outcome_of(*(HERE / test for test in INTERPRETED), **environment)
    assert outcome.startswith(f"{len(INTERPRETED)} passed"), outcome
