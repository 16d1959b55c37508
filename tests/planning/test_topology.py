"""Names of machines."""

import pytest

from sol_jax.errors import UserError
from sol_jax.planning.chips import CHIPS
from sol_jax.planning.topology import parse_topology


@pytest.mark.parametrize(
    ("text", "devices", "in_slice"),
    [
        ("v5e:4x4", 16, 16),
        ("v5p:2x2x1", 4, 4),
        ("v4:2x2x2", 8, 8),
        ("V6E:2x4", 8, 8),
        ("tpu7x:2x2x1", 8, 8),  # four chips of two devices each
        ("v5e:16x16*16", 4096, 256),
        ("h100:8", 8, 8),
        ("h100:8*4", 32, 8),
        ("cpu:1", 1, 1),
    ],
)
def test_devices(text, devices, in_slice):
    topology = parse_topology(text)
    assert (topology.num_devices, topology.devices_of_slice) == (devices, in_slice)
    again = parse_topology(str(topology))
    assert (str(again), again.num_devices, again.chip.name) == (str(topology), devices, topology.chip.name)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("v3:2x2", r"^--topology: 'v3:2x2' names none of v4, v5e, v5p, v6e, tpu7x, a100, h100, h200, cpu;"),
        ("v5e-16", r"names none of .* \(say v5e:\.\.\., the chips along each side\); it must be"),
        ("v5e:4", r"^--topology is 'v5e:4'; v5e takes 2 numbers, such as v5e:4x4$"),
        ("v5p:2x2", r"v5p takes 3 numbers, such as v5p:2x2x1$"),
        ("h100:2x4", r"h100 takes 1 number, such as h100:8$"),
        ("v5e:0x4", r"v5e takes 2 numbers"),
        ("v5e:4x4*0", r"v5e takes 2 numbers"),
        ("v5e:4x4,4", r"v5e takes 2 numbers"),
        ("v5e:32x32", r"a slice of v5e has at most 256 chips: write several as v5e:SHAPE\*COUNT$"),
        ("h100:16", r"a machine of h100 has at most 8 chips"),
        ("", r"names none of"),
    ],
)
def test_what_names_no_machine_is_refused(text, said):
    with pytest.raises(UserError, match=said):
        parse_topology(text)


def test_chips_are_what_their_makers_publish():
    """Relations that each data sheet states, by hand: a slip of a digit would break one."""
    assert CHIPS["v6e"].bfloat16 / CHIPS["v5e"].bfloat16 == pytest.approx(4.66, abs=0.01)
    assert 2 * CHIPS["tpu7x"].bfloat16 == pytest.approx(2307e12)
    assert CHIPS["h100"].bfloat16 == pytest.approx(2 * CHIPS["h100"].float32, rel=0.01)
    for chip in CHIPS.values():
        assert 1e9 < chip.network < chip.links < chip.bandwidth < chip.float32 <= chip.bfloat16
        assert chip.source.startswith("https://")
        assert 10 * 2**30 < chip.memory < 200 * 2**30
