import pytest

from wanfast.kernels._tiles import MAX_CHANNELS, row_tile


def test_a_row_tile_covers_the_row_and_its_head_stays_inside():
    for channels in range(1, MAX_CHANNELS + 1):
        tile = row_tile(channels)
        assert tile.head.bit_count() == tile.tail.bit_count() == 1, channels
        assert tile.head <= channels <= tile.head + tile.tail <= 2 * channels, channels


@pytest.mark.parametrize(("channels", "head", "tail"), [(5120, 4096, 1024), (3072, 2048, 1024), (4096, 2048, 2048)])
def test_wan_widths_leave_no_lane_idle(channels, head, tail):
    tile = row_tile(channels)
    assert (tile.head, tile.tail) == (head, tail)
