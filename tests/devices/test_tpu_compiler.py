"""Tests how programs for TPUs are read. test_tpu_steps compiles some."""

import pytest

from dense_jax.devices import tpu_compiler
from dense_jax.devices.tpu_compiler import Instruction

PROGRAM = """
HloModule jit_f

%body (p: f32[2]) -> f32[2] {
  %a = f32[2]{0} fusion(%p), metadata={op_name="jit(f)/jvp(Segmenter)/encoder/Stage_0/stride1/conv1/conv/conv/conv_general_dilated"}, backend_config={"window_config":{"estimated_cycles":"10"}}
  %sum = (f32[2,3]{1,0}, bf16[4]{0}) all-reduce(%a, %b), to_apply=%add
}

ENTRY %main (p: f32[2]) -> f32[2] {
  %loop = f32[2]{0} while(%p), condition=%test, body=%body, backend_config={"known_trip_count":{"n":"3"}}
  %c = f32[2]{0} copy(%loop), metadata={op_name="jit(f)/transpose(jvp(Segmenter))/decoder/up1/up1/transpose"}, backend_config={"estimated_cycles":"7"}
  %d = f32[2]{0} fusion(%c), metadata={op_name="jit(f)/jvp()/sub"}, backend_config={"estimated_cycles":"5"}
  ROOT %e = bf16[8]{0} all-gather-start(%d)
}
"""


class Compiled:
    """A program of which only the text is known."""

    def as_text(self):
        return PROGRAM


def test_instructions_in_loops_count_as_often_as_they_run():
    found = list(tpu_compiler.instructions(Compiled()))
    assert [(i.kind, i.cycles) for i in found] == [("products", 30), ("copies", 7), ("sums", 5)]
    assert [tpu_compiler.layer(i.path) for i in found] == [
        "encoder/stride1/conv1/conv",
        "decoder/up1",
        "loss",
    ]
    assert isinstance(found[0], Instruction)


def test_collectives_are_counted_with_their_bytes():
    found = tpu_compiler.collectives(Compiled())
    assert found == {"all-reduce": (3, 3 * (4 * 6 + 2 * 4)), "all-gather": (1, 2 * 8)}


@pytest.mark.parametrize(
    ("kind", "number", "shape"),
    [
        ("v5e", 4, "2x2"),
        ("v5e", 8, "2x4"),
        ("v5e", 16, "4x4"),
        ("v6e", 256, "16x16"),
        ("v4", 8, "2x2x1"),
        ("v5p", 32, "2x2x4"),
        ("v5p", 128, "4x4x4"),
    ],
)
def test_types_have_the_shapes_of_google_cloud(kind, number, shape):
    assert tpu_compiler._shape(kind, number) == shape


@pytest.mark.parametrize("topology", ["v5e", "v9-8", "v5e-12", "v4-4"])
def test_unknown_topologies_are_refused(topology):
    with pytest.raises(ValueError, match=r"the topology|power of 2"):
        tpu_compiler.describe(topology)
