"""Reading a compiled module's text: what runs how often, what is sent, computed and kept."""

from pathlib import Path

import pytest

from trainer.plan.buffers import Dump, at_the_peak, parse_allocations, parse_order, parse_ranges
from trainer.plan.collectives import Grid, collectives, replica_groups
from trainer.plan.flops import count_flops
from trainer.plan.hlo import parse
from trainer.plan.lives import with_loops
from trainer.plan.loops import executions

# As XLA writes modules for TPUs, shortened: a loop of 6 trips whose body was unrolled twice.
MODULE = (Path(__file__).parents[1] / "golden" / "plan_module.txt").read_text()
TWO_BY_TWO = Grid(("data", "fsdp", "tensor"), (1, 2, 2), (0,) * 4, (0, 0, 1, 1), on_tpu=True)


def test_loops_run_as_often_as_their_conditions_say():
    counts, unknown = executions(parse(MODULE))
    assert unknown == 0
    assert counts["body"] == counts["start"] == 6  # From 2 to below 14 in steps of 2.
    noted = MODULE.replace(
        "body=%body\n", 'body=%body, backend_config={"known_trip_count":{"n":"5"}}\n'
    )
    assert executions(parse(noted))[0]["body"] == 5
    by_whom = MODULE.replace("constant(14)", "parameter(1)")
    assert executions(parse(by_whom)) == (dict.fromkeys(counts, 1.0), 1)


def test_a_kernel_whose_attributes_have_lines_of_their_own_ends_nothing():
    first, _, rest = MODULE[MODULE.index("%body (") :].partition("\n")
    kernel = """  %kernel.1 = f32[] custom-call(), custom_call_target="tpu_custom_call", metadata="{
"a": {"b": 1
}}, backend_config={"cost_estimate":{"flops":"7"}}
"""
    text = MODULE.replace(f"{first}\n{rest}", f"{first}\n{kernel}{rest}")
    module = parse(text)
    assert executions(module) == executions(parse(MODULE))
    assert count_flops(module).kernels == 6 * 7


def test_a_collective_counts_once_however_it_is_cut_up():
    found = {one.kind: one for one in collectives(parse(MODULE), TWO_BY_TWO)}
    # The result of the gather is 16 x 16 bf16 = 512 bytes, of which half is sent, six times.
    gather = found["all-gather"]
    assert (gather.axes, gather.count, gather.sent_bytes) == (("fsdp",), 6, 6 * 256)
    # An all-reduce of which a slice is kept is a reduce-scatter.
    scatter = found["reduce-scatter"]
    assert (scatter.axes, scatter.count, scatter.sent_bytes) == (("tensor",), 6, 6 * 512)
    assert (found["collective-permute"].axes, found["collective-permute"].sent_bytes) == (
        ("fsdp",),
        512,
    )


def test_all_devices_and_other_slices():
    # Two slices of four devices: the module is of one slice, the other is met through `send`.
    grid = Grid(("data", "fsdp", "tensor"), (2, 2, 2), (0,) * 4 + (1,) * 4, (0,) * 8, on_tpu=True)
    found = [(one.link, one.axes, one.sent_bytes) for one in collectives(parse(MODULE), grid)
             if one.kind == "all-reduce"]  # fmt: skip
    assert ("dcn", ("data",), 512.0) in found
    assert ("ici", ("fsdp", "tensor"), 2 * 3 / 4 * 512) in found


def test_hosts_are_told_apart_where_there_is_no_tpu():
    grid = TWO_BY_TWO._replace(on_tpu=False)
    links = {one.kind: one.link for one in collectives(parse(MODULE), grid)}
    assert links["collective-permute"] == "network"
    assert links["reduce-scatter"] == "host"


@pytest.mark.parametrize(
    ("text", "groups"),
    [
        ("{{0,1},{2,3}}, more={{5,6}}", [[0, 1], [2, 3]]),
        ("{}, to_apply=%add", [[0, 1, 2, 3]]),
        ("[2,2]<=[4]", [[0, 1], [2, 3]]),
        ("[2,2]<=[2,2]T(1,0)", [[0, 2], [1, 3]]),
        ("mesh['a'=2,'b'=2] {'a'}, dim", [[0, 2], [1, 3]]),
        ("mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'a'}", [[0, 1], [2, 3]]),
        ("mesh['a'=1,'b'=4] {'b':(1)2}", [[0, 2], [1, 3]]),
        ("mesh['a'=1,'b'=4] {'b':(2)2}", [[0, 1], [2, 3]]),
    ],
)
def test_replica_groups(text, groups):
    assert replica_groups(f", replica_groups={text}", 4) == groups


def test_replica_groups_of_an_unknown_form_are_not_guessed():
    with pytest.raises(ValueError, match="not known"):
        replica_groups("replica_groups=<4>", 4)


def test_flops_of_products_with_loops():
    assert count_flops(parse(MODULE)).total == 6 * 2 * 16**3


CONVOLUTION = """\
HloModule m

ENTRY %main (a: f32[{a}], b: f32[{b}]) -> f32[{out}] {{
  %a = f32[{a}] parameter(0)
  %b = f32[{b}] parameter(1)
  ROOT %c = f32[{out}] convolution(%a, %b), {attributes}
}}
"""


@pytest.mark.parametrize(
    ("a", "b", "out", "attributes", "flops"),
    [
        ("8,16", "16,32", "8,32", "dim_labels=bf_io->bf", 2 * 8 * 16 * 32),
        # A batch of 5 products [8, 16] x [16, 4], as TPUs' compiler writes it.
        ("5,8,16", "5,16,4", "5,8,4",
         "window={size=5 stride=4 pad=0_0 lhs_dilate=5}, dim_labels=0bf_0io->0bf",
         5 * 2 * 8 * 16 * 4),
        # 3 x 3 over 6 x 6 with padding: the corners' and edges' products with it do not count.
        ("1,6,6,2", "3,3,2,4", "1,6,6,4",
         "window={size=3x3 pad=1_1x1_1}, dim_labels=b01f_01io->b01f", 2 * 2 * 4 * 16**2),
    ],
)  # fmt: skip
def test_flops_of_convolutions(a, b, out, attributes, flops):
    text = CONVOLUTION.format(a=a, b=b, out=out, attributes=attributes)
    assert count_flops(parse(text)).total == flops


def test_flops_of_kernels_are_those_that_they_say():
    call = 'custom-call(%a, %b), custom_call_target="tpu_custom_call", backend_config={}'
    text = CONVOLUTION.replace("convolution(%a, %b), {attributes}", call.replace("{}", "{{{0}}}"))
    shapes = {"a": "4,4", "b": "4,4", "out": "4,4"}
    said = text.format('"cost_estimate":{"flops":"1000","bytes_accessed":"5"}', **shapes)
    assert count_flops(parse(said))[:3] == (1000.0, 0.0, 1000.0)
    silent = count_flops(parse(text.format("", **shapes)))
    assert (silent.total, silent.silent) == (0.0, ("c",))


def test_flops_of_splash_attention_are_the_causal_half_of_its_products():
    name = "ROOT %splash_mha_dq_no_residuals.5"
    call = 'custom-call(%a, %b), custom_call_target="tpu_custom_call"'
    text = CONVOLUTION.replace("ROOT %c", name).replace("convolution(%a, %b), {attributes}", call)
    found = count_flops(parse(text.format(a="4,64,16", b="4,64,16", out="4,64,16")))
    assert found.total == found.kernels == 3 * 2 * 4 * 64 * 64 * 16 / 2
    assert found.silent == ()


ASSIGNMENT = """\
BufferAssignment:
allocation 0: size 400, parameter 1, shape |f32[100]| at ShapeIndex {}:
 value: <3 param.1 @0> (size=400,offset=0): f32[100]{0}
allocation 1: size 512, thread-local:
 value: <1 x @0> (size=512,offset=0): f32[]
allocation 2: size 64, maybe-live-out:
 value: <7 out @0> (size=64,offset=0): f32[16]{0}
allocation 3: size 12000, preallocated-temp:
 value: <10 early @0> (size=8000,offset=0): f32[2000]{0}
 value: <11 late{1} @0> (size=4000,offset=0): f32[1000]{0}
 value: <12 later @0> (size=6000,offset=4000): f32[1500]{0}
 value: <13 later.alias @0> (size=6000,offset=4000): f32[1500]{0}

Total bytes used: 1
"""
RANGES = """\
  BufferLiveRange:
    early{}:0-4
    late{1}:5-9
    later{}:5-9
    later.alias{}:6-9
"""


def test_what_lives_when_temporaries_are_largest():
    allocations = parse_allocations(ASSIGNMENT)
    kinds = [(one.kind, one.size, one.parameter) for one in allocations]
    assert kinds == [("argument", 400, 1), ("output", 64, None), ("temp", 12000, None)]
    dump = Dump(allocations, parse_ranges(RANGES), {}, "")
    # At 5 both late ones live, 10,000 bytes; of two values of one place one is named.
    assert [buffer.name for buffer in at_the_peak(dump)] == ["later", "late"]
    without = Dump(allocations, {}, {}, "")
    assert [buffer.name for buffer in at_the_peak(without)] == ["early"]


def test_what_a_loop_carries_lives_until_its_last_use_behind_it():
    # A loop that runs from moment 10 to 90 carries an array which is read at 95.
    text = """\
HloModule m

%body (p: (s32[], f32[9])) -> (s32[], f32[9]) {
  %p = (s32[], f32[9]) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %x = f32[9] get-tuple-element(%p), index=1
  ROOT %t = (s32[], f32[9]) tuple(%i, %x)
}

ENTRY %main (a: s32[]) -> f32[9] {
  %a = s32[] parameter(0)
  %made = f32[9] broadcast(%a)
  %init = (s32[], f32[9]) tuple(%a, %made)
  %loop = (s32[], f32[9]) while(%init), condition=%c, body=%body
  %first = s32[] get-tuple-element(%loop), index=0
  %second = f32[9] get-tuple-element(%loop), index=1
  ROOT %read = f32[9] negate(%second)
}
"""
    order = parse_order(
        "  InstructionSequence:\n    5:made\n    9:init\n    90:loop\n    95:read\n"
    )
    dump = Dump([], {("made", ""): (5, 9), ("first", ""): (90, 91)}, order, text)
    ranges = with_loops(dump, parse(text)).ranges
    assert ranges == {("made", ""): (5, 95), ("first", ""): (90, 91)}
