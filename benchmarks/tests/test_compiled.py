"""What is compiled for which accelerator, and what is counted of the programs?"""

import pytest

from benchmarks import compiled
from benchmarks.common import hlo


def test_large_trees_are_for_pods_alone():
    found = compiled.jobs(compiled.Options())
    assert ("H100", "Llama 3.2 1B") in found
    assert ("H100", "Llama 3 8B") not in found
    assert len(found) == 38
    options = compiled.Options(targets=("H100",), trees=("Llama 3 8B",))
    with pytest.raises(ValueError, match=r"Llama 3 8B.*H100.*do not go together"):
        compiled.jobs(options)


def test_automatic_axes_stand_beside_explicit_ones_for_8_bits_on_pods():
    options = compiled.Options(optimizers=("Adam", "AdaMod, 8 bits"))
    assert compiled.rows("v5e 16x16", options) == [
        ("Adam", "explicit"),
        ("AdaMod, 8 bits", "explicit"),
        ("AdaMod, 8 bits", "auto"),
    ]
    assert len(compiled.rows("H100", options)) == 2


SCHEDULE = """
HloModule jit_update, is_scheduled=true

ENTRY %main (x: f32[8,200], e: u8[3,8]) -> (f32[8,200], u8[3,8]) {
  %x = f32[8,200]{1,0:T(8,128)} parameter(0)
  %e = u8[3,8]{1,0:T(8,128)(4,1)} parameter(1)
  %fast = f32[8,200]{1,0:T(8,128)S(1)} fusion(%x), kind=kLoop, calls=%f
  %pair = (f32[8,200]{1,0:T(8,128)}, u8[3,8]{1,0:T(8,128)(4,1)}) fusion(%fast, %e), calls=%g
  %first = f32[8,200]{1,0:T(8,128)} get-tuple-element(%pair), index=0
  %second = u8[3,8]{1,0:T(8,128)(4,1)} get-tuple-element(%pair), index=1
  %turned = u8[3,8]{0,1:T(8,128)(4,1)} copy(%second)
  %again = u8[3,8]{1,0:T(8,128)(4,1)} copy(%turned), metadata={op_name="second()"}
  %view = f32[8,200]{1,0:T(8,128)} bitcast(%first)
  ROOT %out = (f32[8,200]{1,0:T(8,128)}, u8[3,8]{1,0:T(8,128)(4,1)}) tuple(%view, %again)
}
"""  # noqa: E501


def test_bytes_that_are_live_at_once():
    """Padded to tiles; without arguments, results and a TPU's fast memory."""
    assert hlo.bytes_of("f32[8,200]{1,0:T(8,128)}") == 8 * 256 * 4
    assert hlo.bytes_of("f32[8,200]{0,1:T(8,128)}") == 200 * 128 * 4
    assert hlo.bytes_of("bf16[2,8,64]{1,2,0:T(8,128)(2,1)}") == 2 * 64 * 128 * 2
    assert hlo.bytes_of("f32[8,200]{1,0:T(8,128)S(1)}") == 0
    assert hlo.bytes_of("pred[7]{0}") == hlo.bytes_of("u8[7]") == 7
    # The second of the pair, and what it is turned to.
    assert hlo.live_bytes(SCHEDULE) == 2 * 8 * 128
    assert hlo.live_bytes(SCHEDULE.replace("(%view", "(%x")) == 8192 + 2 * 1024


IN_PLACE = """
%command_buffer (a: f32[256]) -> f32[2] {
  %a = f32[256]{0} parameter(0)
  ROOT %f = f32[2]{0} fusion(%a), kind=kInput, calls=%sum
}
ENTRY %main (g: f32[256], c: u8[256], n: s32[]) -> (f32[256], u8[256]) {
  %n = s32[]{:T(128)} parameter(2)
  %one = s32[]{:T(128)} constant(1)
  %next = s32[]{:T(128)} add(%n, %one)
  %rows = s32[2]{0} iota(), iota_dimension=0
  %numbers = s32[2]{0} fusion(%next, %rows), kind=kLoop, calls=%k
  %g = f32[256]{0:T(256)} parameter(0)
  %c = u8[256]{0} parameter(1)
  %sums = f32[2]{0} call(%g), to_apply=%command_buffer
  %all = f32[2]{0} all-gather-start(%sums), dimensions={0}
  %copied = f32[256]{0} copy(%g)
  %kernel = (u8[256]{0}, f32[256]{0}) custom-call(%numbers, %copied, %c), custom_call_target="tpu_custom_call", output_to_operand_aliasing={{0}: (2, {}), {1}: (1, {})}
  %codes = u8[256]{0} get-tuple-element(%kernel), index=0
  %update = f32[256]{0} get-tuple-element(%kernel), index=1
  %new = f32[256]{0} fusion(%update), kind=kLoop, calls=%f
  ROOT %out = (f32[256]{0}, u8[256]{0}) tuple(%new, %codes)
}
"""  # noqa: E501


def test_instructions_that_read_leaves_are_told_apart():
    """Others compute indices, and what comes of the count."""
    assert [x[:2] + x[3:] for x in hlo.instructions(IN_PLACE)] == [
        ("s32[]{:T(128)}", "add", False),
        ("s32[2]{0}", "iota", False),
        ("s32[2]{0}", "fusion", False),
        ("f32[2]{0}", "fusion", True),  # within the call
        ("f32[2]{0}", "all-gather-start", True),
        ("f32[256]{0}", "copy", True),
        ("(u8[256]{0}, f32[256]{0})", "custom-call", True),
        ("f32[256]{0}", "fusion", True),
    ]
    assert "all-gather-start".startswith(hlo.COLLECTIVES)


def test_a_kernel_that_writes_in_place_takes_no_memory():
    assert hlo.live_bytes(IN_PLACE) == 8 + 1024  # the numbers, the copied gradient
    apart = IN_PLACE.replace("{0}: (2, {}), {1}: (1, {})", "{0}: (2, {})")
    assert hlo.live_bytes(apart) == 8 + 2 * 1024


FUSION = """%outer (a: f32[8]) -> f32[8] {
  %a = f32[8]{0} parameter(0)
  ROOT %b = f32[8]{0} fusion(%a), kind=kLoop, calls=%inner
}
%inner (x: f32[8]) -> f32[8] {
  %x = f32[8]{0} parameter(0)
  ROOT %y = f32[8]{0} negate(%x)
}
"""


@pytest.mark.parametrize(("operation", "kinds"), [("negate", 1), ("abs", 2)])
def test_kernels_that_differ_in_names_alone_are_of_one_kind(operation, kinds):
    other = FUSION.replace("%", "%other.").replace("negate", operation)
    other = other.replace("{0} p", "{0:S(1)} p").replace("\n}", ", metadata={x}\n}")
    kernel = "  %k = f32[8]{0} fusion(%p), kind=kLoop, calls=%outer"
    kernels = [kernel, kernel.replace("%", "%other."), kernel.replace("%k", "%l")]
    assert hlo.kinds(FUSION + other, kernels) == kinds
    kernels.append("  %m = f32[4]{0} copy(%p)")
    assert hlo.kinds(FUSION + other, kernels) == kinds + 1
